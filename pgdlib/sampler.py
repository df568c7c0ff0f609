"""The sampler of diffusion models (Karras et al. 2022), with a hook for guidance. Trajectories x are in normalised space."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

BLOCK = 32  # trajectories that share a generator
SIGMA_MIN, SIGMA_MAX, RHO = 0.002, 80.0, 7.0  # the paper's Table 2; RHO: Karras et al., Table 1
S_TMIN, S_TMAX, S_NOISE = 0.05, 50.0, 1.003  # the paper's Table 2
SOLVERS = ("heun", "multistep")
DIVERGED = 100.0  # a value this many std of the noised data away from its mean marks a trajectory as diverged


def noise_levels(steps: int) -> Tensor:
    """σ_0 = SIGMA_MAX down to σ_{steps-1} = SIGMA_MIN, then 0: [steps + 1] (Eq. 5 of Karras et al.)."""
    if steps < 2:
        raise ValueError(f"steps={steps} is not allowed; it must be 2 or more")
    i = torch.arange(steps, dtype=torch.float64) / (steps - 1)
    sigmas = (SIGMA_MAX ** (1 / RHO) + i * (SIGMA_MIN ** (1 / RHO) - SIGMA_MAX ** (1 / RHO))) ** RHO
    return torch.cat([sigmas, sigmas.new_zeros(1)])


@torch.no_grad()
def sample(
    denoise: Callable, shape: tuple, steps: int, churn: float, noise: torch.Generator | list, guide: Callable | None = None,
    solver: str = "heun", dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Draw trajectories `shape` = (B, T, C) with `denoise(x, σ)`; returns them and which have diverged [B].

    "heun": Algorithm 2 of Karras et al. with churn, two network evaluations a step, as the paper. "multistep": DPM-Solver++(2M)
    (Lu et al. 2022), one; with churn its SDE form, where churn = steps is the reverse SDE of the diffusion itself.
    `noise`: a generator, or for each block of the batch one with its size, in a list.
    `guide(x, denoised, σ, step)` gives a shift: added to x before the step if `guide.on == "noised"` (then `denoised` is
    None), or to every denoised estimate if "denoised". Values beyond `DIVERGED` std are clamped: such a guide is not fatal.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver={solver!r} is not allowed; it must be one of {', '.join(map(repr, SOLVERS))}")
    noised, shifted = (guide if guide is not None and guide.on == on else None for on in ("noised", "denoised"))

    def estimate(x, sigma):
        denoised = denoise(x, sigma)
        return denoised if shifted is None else denoised + shifted(x, denoised, sigma, step)

    sigmas, gamma = noise_levels(steps).tolist(), min(churn / steps, math.sqrt(2) - 1)
    x, before, diverged = _randn(noise, shape, dtype) * sigmas[0], None, False
    for step, (sigma, sigma_next) in enumerate(zip(sigmas, sigmas[1:])):
        x, before = (x, before) if noised is None else _shifted(x, noised(x, None, sigma, step), sigma, before)
        x, out_of_range = _clamp(x, sigma)
        diverged = diverged | out_of_range
        if solver == "heun":  # raise the noise level for a moment (lines 4 to 6), then step from the raised point
            sigma_hat = sigma * (1 + gamma if S_TMIN <= sigma <= S_TMAX else 1)
            if sigma_hat > sigma:
                x = torch.add(x, _randn(noise, shape, dtype), alpha=math.sqrt(sigma_hat**2 - sigma**2) * S_NOISE)
            x = _heun(x, sigma_hat, sigma_next, estimate)
        else:  # step below the next noise level, then raise it to that
            sigma_down = sigma_next * (sigma_next / sigma) ** (churn / steps)
            x, before = _multistep(x, estimate(x, sigma), sigma, sigma_next, sigma_down, before)
            if sigma_down < sigma_next:
                x = torch.add(x, _randn(noise, shape, dtype), alpha=math.sqrt(sigma_next**2 - sigma_down**2))
    x, out_of_range = _clamp(x, 0.0)
    return x, diverged | out_of_range


def evaluations(solver: str, steps: int) -> int:
    """How often the network is asked for each trajectory."""
    return 2 * steps - 1 if solver == "heun" else steps


def chunks(n: int, most: int) -> list[list[tuple[int, int]]]:
    """How n trajectories are drawn, at most `most` or one block at once: for each chunk the (number, size) of its blocks."""
    blocks = [(i, min(BLOCK, n - first)) for i, first in enumerate(range(0, n, BLOCK))]
    each = max(1, most // BLOCK)
    return [blocks[i : i + each] for i in range(0, len(blocks), each)]


def draw(
    denoise: Callable, shape: tuple, steps: int, churn: float, noise: Callable, guide: Callable | None = None,
    solver: str = "heun", most: int | None = None, keep: Callable | None = None, watch: Callable | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`sample`, at most `most` trajectories at once (None: all), each block with noise of its own, from `noise(its number)`.

    `noise` is a `fast.stream`: trajectory i has the same noise for every guide and every `most`; what is drawn is equal up to
    float rounding. `keep(name, make)` gives what `make()` does, (x, diverged) of one chunk of several, or what it knows of the
    same name from before. `watch(x, denoised, σ, done)` sees every evaluation of the network, `done` the share that is over;
    what it raises ends the drawing.
    """
    asked, over = evaluations(solver, steps), 0  # of the network for each trajectory: in all, and until now for all

    def watched(x, sigma):
        nonlocal over
        denoised = denoise(x, sigma)
        over += len(x)
        watch(x, denoised, sigma, over / (asked * shape[0]))
        return denoised

    def make(blocks):
        some = sum(size for _, size in blocks), *shape[1:]
        streams = [(noise(number), size) for number, size in blocks]
        return sample(denoise if watch is None else watched, some, steps, churn, streams, guide, solver, dtype)

    drawn, plan = [], chunks(shape[0], most or shape[0])
    for blocks in plan:
        if keep is None or len(plan) == 1:
            drawn.append(make(blocks))
            continue
        first = blocks[0][0] * BLOCK
        end = first + sum(size for _, size in blocks)
        drawn.append(keep(f"{first}-{end}", lambda b=blocks: make(b)))
        over = asked * end
    x, diverged = (torch.cat(each) for each in zip(*drawn))
    return x, diverged


def _randn(noise, shape, dtype):
    blocks = noise if isinstance(noise, list) else [(noise, shape[0])]
    drawn = [torch.randn((n, *shape[1:]), generator=g, device=g.device, dtype=dtype) for g, n in blocks]
    return torch.cat(drawn) if len(drawn) > 1 else drawn[0]


def _heun(x, sigma, sigma_next, estimate):
    """Euler's step along d = (x - denoised) / σ, then Heun's along the mean of d at both ends, in few passes over x."""
    euler = torch.lerp(estimate(x, sigma), x, sigma_next / sigma)
    if sigma_next == 0:
        return euler
    x = torch.lerp(x, euler, 0.5)
    return x.add_(euler - estimate(euler, sigma_next), alpha=(sigma_next - sigma) / (2 * sigma_next))


def _multistep(x, denoised, sigma, sigma_next, sigma_down, before):
    """One step of DPM-Solver++(2M) from σ to σ_down: the new x, and what the next step needs to know of this one.

    `before` is that of the last step: the denoised estimate is extrapolated along log σ, to the middle between σ and σ_next,
    but on the first and the last step.
    """
    if sigma_next == 0:
        return denoised, None
    width = math.log(sigma / sigma_next)
    extrapolated = denoised
    if before is not None:
        denoised_before, width_before = before
        extrapolated = denoised + (denoised - denoised_before) * width / (2 * width_before)
    ratio = sigma_down / sigma
    return ratio * x + (1 - ratio) * extrapolated, (denoised, width)


def _shifted(x, shift, sigma, before):
    """x after a shift, and `before` of `_multistep`, moved along as for data N(0, 1): the jump is no trend to extrapolate."""
    return x + shift, before and (before[0] + shift / (sigma**2 + 1), before[1])


def _clamp(x, sigma):
    """x within DIVERGED std of data noised to σ, and which trajectories were not."""
    limit = DIVERGED * math.sqrt(sigma**2 + 1)
    values = x.flatten(1)
    out_of_range = ~(torch.maximum(values.amax(1), -values.amin(1)) <= limit)  # NaN too
    # To ask a GPU whether any was would be to wait for it, in every step: there a clamp that may change nothing costs less.
    needed = x.device.type != "cpu" or out_of_range.any()
    return (x.nan_to_num(0.0).clamp(-limit, limit) if needed else x), out_of_range

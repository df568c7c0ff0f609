"""The sampler of diffusion models (Karras et al. 2022), with a hook for guidance. Trajectories x are in normalised space."""

import math

import torch

SIGMA_MIN, SIGMA_MAX, RHO = 0.002, 80.0, 7.0  # the paper's Table 2; RHO: Karras et al., Table 1
S_TMIN, S_TMAX, S_NOISE = 0.05, 50.0, 1.003  # the paper's Table 2
SOLVERS = ("heun", "multistep")
DIVERGED = 100.0  # a value this many std of the noised data away from its mean marks a trajectory as diverged


def noise_levels(steps):
    """σ_0 = SIGMA_MAX down to σ_{steps-1} = SIGMA_MIN, then 0: [steps + 1] (Eq. 5 of Karras et al.)."""
    if steps < 2:
        raise ValueError(f"steps={steps} is not allowed; it must be 2 or more")
    i = torch.arange(steps, dtype=torch.float64) / (steps - 1)
    sigmas = (SIGMA_MAX ** (1 / RHO) + i * (SIGMA_MIN ** (1 / RHO) - SIGMA_MAX ** (1 / RHO))) ** RHO
    return torch.cat([sigmas, sigmas.new_zeros(1)])


@torch.no_grad()
def sample(denoise, shape, steps, churn, generator, guide=None, device="cpu", dtype=torch.float32, solver="heun"):
    """Draw trajectories `shape` = (B, T, C) with `denoise(x, σ)`; returns them and which have diverged [B].

    solver "heun": Algorithm 2 of Karras et al. with churn, two network evaluations a step, as the paper. "multistep":
    DPM-Solver++(2M) (Lu et al. 2022), no churn, one evaluation a step.

    `generator` is one, or a list of one for each block of the batch, all of one size.

    `guide(x, denoised, σ, step)` gives a shift: added to x before the step if `guide.on == "noised"` (then `denoised` is
    None), or to every denoised estimate if `guide.on == "denoised"`. Values beyond `DIVERGED` std are clamped, so that a
    guide that diverges is counted, not fatal.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver={solver!r} is not allowed; it must be one of {', '.join(map(repr, SOLVERS))}")
    if solver == "multistep" and churn != 0:
        raise ValueError(f"churn={churn!r} is not allowed with solver='multistep'; it must be 0")
    noised = guide if guide is not None and guide.on == "noised" else None
    shifted = guide if guide is not None and guide.on == "denoised" else None

    def estimate(x, sigma, step):
        denoised = denoise(x, sigma)
        return denoised if shifted is None else denoised + shifted(x, denoised, sigma, step)

    def randn():
        blocks = generator if isinstance(generator, list) else [generator]
        block = (shape[0] // len(blocks), *shape[1:])
        return torch.cat([torch.randn(block, generator=g, device=device, dtype=dtype) for g in blocks])

    sigmas = noise_levels(steps).tolist()
    gamma = min(churn / steps, math.sqrt(2) - 1)
    x, before = randn() * sigmas[0], None
    diverged = torch.zeros(shape[0], dtype=torch.bool, device=device)
    for step, (sigma, sigma_next) in enumerate(zip(sigmas, sigmas[1:], strict=False)):
        if noised is not None:
            x = x + noised(x, None, sigma, step)
        x, out_of_range = _clamp(x, sigma)
        diverged |= out_of_range
        # Raise the noise level for a moment (lines 4 to 6), then step from the raised point.
        sigma_hat, x_hat = sigma, x
        if gamma > 0 and S_TMIN <= sigma <= S_TMAX:
            sigma_hat = sigma * (1 + gamma)
            x_hat = x + math.sqrt(sigma_hat**2 - sigma**2) * S_NOISE * randn()
        denoised = estimate(x_hat, sigma_hat, step)
        if solver == "multistep":
            x, before = _multistep(x_hat, denoised, sigma_hat, sigma_next, before)
            continue
        d = (x_hat - denoised) / sigma_hat
        x = x_hat + (sigma_next - sigma_hat) * d
        if sigma_next > 0:
            d_next = (x - estimate(x, sigma_next, step)) / sigma_next
            x = x_hat + (sigma_next - sigma_hat) * (d + d_next) / 2
    x, out_of_range = _clamp(x, 0.0)
    return x, diverged | out_of_range


def _multistep(x, denoised, sigma, sigma_next, before):
    """One step of DPM-Solver++(2M) from σ to σ_next: the new x, and what the next step needs to know of this one.

    `before` is that of the last step: the denoised estimate is extrapolated along log σ, but on the first and the last step.
    """
    if sigma_next == 0:
        return denoised, None
    width = math.log(sigma / sigma_next)
    extrapolated = denoised
    if before is not None:
        denoised_before, width_before = before
        extrapolated = denoised + (denoised - denoised_before) * width / (2 * width_before)
    ratio = sigma_next / sigma
    return ratio * x + (1 - ratio) * extrapolated, (denoised, width)


def _clamp(x, sigma):
    """x within DIVERGED std of data noised to σ, and which trajectories were not."""
    limit = DIVERGED * math.sqrt(sigma**2 + 1)
    out_of_range = ~(x.abs() <= limit).flatten(1).all(1)
    return x.nan_to_num(0.0).clamp(-limit, limit), out_of_range

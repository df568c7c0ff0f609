"""The sampler against the published algorithms, line by line, and closed forms for Gaussian data; guides that are counted."""

import math

import numpy as np
import pytest
import torch
from conftest import a_denoiser, draw

from pgdlib import fast, sampler

PAIRS = [("heun", 0.0), ("heun", 5.0), ("multistep", 0.0), ("multistep", 9.0)]


def gaussian_denoiser(x, sigma):
    """The exact denoiser of N(0, 1) data."""
    return x / (1 + sigma**2)


def drawn(shape, steps, churn=0.0, seed=0, guide=None, denoise=gaussian_denoiser, **named):
    """(x, diverged) in float64; `seed` may be a list of (generator, size)."""
    noise = torch.Generator().manual_seed(seed) if isinstance(seed, int) else seed
    return sampler.sample(denoise, shape, steps, churn, noise, guide, dtype=torch.float64, **named)


def algorithm_2(denoise, x, steps, churn=0.0, noise=None):
    """Karras et al., line by line, from x of std 80; `noise()` gives new N(0, 1)."""
    rho, last = 7.0, steps - 1
    levels = [(80 ** (1 / rho) + i / last * (0.002 ** (1 / rho) - 80 ** (1 / rho))) ** rho for i in range(steps)] + [0.0]
    for t, t_next in zip(levels, levels[1:]):
        t_hat = t
        if churn and 0.05 <= t <= 50:
            t_hat = t + min(churn / steps, math.sqrt(2) - 1) * t
            x = x + math.sqrt(t_hat**2 - t**2) * 1.003 * noise()
        slope = (x - denoise(x, t_hat)) / t_hat
        following = x + (t_next - t_hat) * slope
        if t_next:
            slope = (slope + (following - denoise(following, t_next)) / t_next) / 2
        x = x + (t_next - t_hat) * slope
    return x


@pytest.mark.parametrize("steps, churn", [(18, 0.0), (18, 5.0), (64, 12.8), (32, 80.0), (256, 80.0)])
def test_heun_is_the_published_algorithm(steps, churn):
    def denoise(x, sigma):
        return torch.tanh(x / (1 + sigma))

    generator, how = torch.Generator().manual_seed(7), dict(dtype=torch.float64)
    start = 80 * torch.randn((2, 3, 4), generator=generator, **how)
    expected = algorithm_2(denoise, start, steps, churn, lambda: torch.randn((2, 3, 4), generator=generator, **how))
    found, diverged = drawn((2, 3, 4), steps, churn, seed=7, denoise=denoise)
    torch.testing.assert_close(found, expected)
    assert not diverged.any()


@pytest.mark.parametrize("solver, steps", [("heun", (40, 80, 160)), ("multistep", (80, 160, 320))])
def test_order_of_convergence_is_two(solver, steps):
    """Without churn it solves an ODE, whose solution for N(0, 1) data is x(0) = x(σ_max) / sqrt(1 + σ_max²)."""
    exact = 80 * draw(3, 1, 1, 1, dtype=torch.float64) / math.sqrt(1 + 80**2)
    errors = [abs(drawn((1, 1, 1), n, seed=3, solver=solver)[0] / exact - 1).item() for n in steps]
    orders = [math.log2(a / b) for a, b in zip(errors, errors[1:])]
    assert orders == pytest.approx([2, 2], abs=0.2) and errors[-1] < 1e-3


def test_noise_levels_end_points():
    sigmas = sampler.noise_levels(400)
    assert sigmas[0] == pytest.approx(80) and sigmas[399] == pytest.approx(0.002) and sigmas[400] == 0
    assert (sigmas.diff() < 0).all()
    with pytest.raises(ValueError, match="steps=1 is not allowed"):
        sampler.noise_levels(1)


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_multistep_is_the_published_update(eta):
    """DPM-Solver++(2M) in the half-log-SNR l = -log σ: x' = σ'/σ x - (exp(-h) - 1) D, D with its last change over 2r; and SDE-
    DPM-Solver++(2M) for η = 1, with noise.
    """
    levels, generator = sampler.noise_levels(9).tolist(), torch.Generator().manual_seed(5)
    new = lambda: torch.randn((2, 3, 4), generator=generator, dtype=torch.float64)  # noqa: E731
    x = 80 * new()
    denoised, l_before = [], None
    for sigma, following in zip(levels[:-1], levels[1:-1]):
        denoised.append(torch.tanh(x / (1 + sigma)))
        h = math.log(sigma) - math.log(following)
        guess = denoised[-1]
        if l_before is not None:
            r = (-math.log(sigma) - l_before) / h
            guess = (1 + 1 / (2 * r)) * denoised[-1] - 1 / (2 * r) * denoised[-2]
        l_before = -math.log(sigma)
        x = following / sigma * math.exp(-eta * h) * x - math.expm1(-h - eta * h) * guess
        if eta:
            x = x + following * math.sqrt(-math.expm1(-2 * eta * h)) * new()
    expected = torch.tanh(x / (1 + levels[-2]))
    found, _ = drawn((2, 3, 4), 9, 9 * eta, 5, denoise=lambda x, s: torch.tanh(x / (1 + s)), solver="multistep")
    torch.testing.assert_close(found, expected)


def test_with_noise_multistep_draws_the_right_variance_with_an_error_of_second_order():
    """Of N(0, 1) data, exactly: each step is linear, so the variance of what it draws follows from those before."""

    def variance(steps, eta):
        levels, before = sampler.noise_levels(steps).tolist(), None
        now, last = np.zeros(steps + 1), np.zeros(steps + 1)  # x and the last estimate, as sums of independent N(0, 1)
        now[0] = levels[0]
        for k, (sigma, following) in enumerate(zip(levels[:-1], levels[1:-1])):
            h, guess = math.log(sigma / following), now / (1 + sigma**2)
            extrapolated = guess if before is None else guess + (guess - last) * h / (2 * before)
            now, last, before = math.exp(-h - eta * h) * now - math.expm1(-h - eta * h) * extrapolated, guess, h
            now[k + 1] += following * math.sqrt(-math.expm1(-2 * eta * h))
        return float(np.square(now / (1 + levels[-2] ** 2)).sum())

    for eta in (0.5, 1.0):
        found, _ = drawn((1000, 10, 10), 24, 24 * eta, solver="multistep")
        assert found.var().item() == pytest.approx(variance(24, eta), rel=0.02)
        errors = [abs(variance(n, eta) - 1) for n in (100, 200, 400)]
        assert all(math.log2(a / b) == pytest.approx(2, abs=0.4) for a, b in zip(errors, errors[1:])) and errors[-1] < 2e-3


def test_solvers_that_cannot_be_are_named():
    with pytest.raises(ValueError, match=r"solver='euler' is not allowed.*'heun', 'multistep'"):
        drawn((1, 1, 1), 8, solver="euler")


# Guides


@pytest.mark.parametrize("solver, churn", PAIRS)
def test_the_network_is_asked_at_the_noise_levels(solver, churn):
    asked = []
    drawn((1, 1, 1), 12, churn, denoise=lambda x, sigma: asked.append(sigma) or gaussian_denoiser(x, sigma), solver=solver)
    levels = sampler.noise_levels(12)[:-1].tolist()
    raised = [s * (1 + min(churn / 12, math.sqrt(2) - 1)) if 0.05 <= s <= 50 else s for s in levels]
    both_ends = [s for pair in zip(raised, [*levels[1:], None]) for s in pair][:-1]  # of each step but the last
    expected = levels if solver == "multistep" else both_ends
    assert asked == pytest.approx(expected) and len(asked) == sampler.evaluations(solver, 12)


class Shift:
    """A guide that adds a constant to one channel, of one trajectory or of all, in one step or in all."""

    def __init__(self, on, size, row=slice(None), only=None):
        self.on, self.size, self.row, self.only, self.seen = on, size, row, only, []

    def __call__(self, x, denoised, sigma, step):
        self.seen.append((sigma, step, denoised is None))
        shift = torch.zeros_like(x)
        if self.only in (None, step):
            shift[self.row, ..., 0] = self.size
        return shift


def test_a_denoised_shift_moves_the_mean():
    """Shifting every denoised estimate (1 / (1 + σ²)) x by (1 - 1 / (1 + σ²)) m is exactly the denoiser of N(m, 1) data."""

    class Mean(Shift):
        def __call__(self, x, denoised, sigma, step):
            torch.testing.assert_close(denoised, gaussian_denoiser(x, sigma))
            return super().__call__(x, denoised, sigma, step) * (1 - 1 / (1 + sigma**2))

    x, _ = drawn((2000, 4, 2), 40, guide=Mean("denoised", 3.0))
    shrink = algorithm_2(gaussian_denoiser, 80.0, 40) / 80  # x - m shrinks by this; x starts at mean 0, not m
    assert x[..., 0].mean().item() == pytest.approx(3.0 * (1 - shrink), abs=0.05)
    assert x[..., 1].mean().item() == pytest.approx(0.0, abs=0.05)


@pytest.mark.parametrize("solver, churn", PAIRS)
def test_a_noised_shift_comes_once_a_step_and_a_denoised_one_with_every_estimate(solver, churn):
    plain, _ = drawn((3, 4, 2), 12, churn, solver=solver)
    for on, count in (("noised", 12), ("denoised", sampler.evaluations(solver, 12))):
        none, some = Shift(on, 0.0), Shift(on, 1.0)
        assert torch.equal(drawn((3, 4, 2), 12, churn, guide=none, solver=solver)[0], plain)
        guided, _ = drawn((3, 4, 2), 12, churn, guide=some, solver=solver)
        assert (guided[..., 0] > plain[..., 0]).all() and torch.equal(guided[..., 1], plain[..., 1])
        assert len(some.seen) == count and all(unseen == (on == "noised") for _, _, unseen in some.seen)
        assert sorted({step for _, step, _ in some.seen}) == list(range(12))
        if on == "noised":
            assert [sigma for sigma, _, _ in some.seen] == pytest.approx(sampler.noise_levels(12)[:-1].tolist())


class Pull(Shift):
    """The explicit rule for a policy N(1, ...) in natural units: x + λ (1 - x)."""

    def __call__(self, x, denoised, sigma, step):
        return self.size * (1 - x)


@pytest.mark.parametrize("solver, churn", PAIRS)
def test_guided_steps_explode_at_the_limit_of_the_steps_themselves(solver, churn):
    """Repeated, such a step multiplies x - 1 by 1 - λ: no solver may blow up below λ = 2, and well beyond it all must."""
    stable, explodes = (drawn((20, 4, 2), 24, churn, guide=Pull("noised", lam), solver=solver) for lam in (1.9, 2.5))
    assert not stable[1].any() and (stable[0] - 1).abs().max() < 5 and explodes[1].all()


def test_a_shift_is_no_trend_to_the_multistep_solver():
    """Of N(0, 1) data x is a sum of what the noise became and what each shift did: one at a time, from a start at rest."""

    def after(first):  # x at the end, of a shift by 1 before the step `first` alone, as DPM-Solver++(2M) from there on
        x, levels, last = 1.0, sampler.noise_levels(9).tolist(), None
        for k in range(first, 8):
            estimate, h = x / (1 + levels[k] ** 2), math.log(levels[k] / levels[k + 1])
            trend = 0.0 if k == first else (estimate - last) * h / (2 * math.log(levels[k - 1] / levels[k]))
            x, last = math.exp(-h) * x - math.expm1(-h) * (estimate + trend), estimate
        return x / (1 + levels[8] ** 2)

    plain = drawn((1, 1, 1), 9, solver="multistep")[0]
    for step in range(9):
        found = drawn((1, 1, 1), 9, guide=Shift("noised", 1.0, only=step), solver="multistep")[0]
        assert (found - plain).item() == pytest.approx(after(step), abs=1e-6), step


@pytest.mark.parametrize("size", [1e30, math.inf, math.nan])
@pytest.mark.parametrize("only", [None, 2, 11])
@pytest.mark.parametrize("solver", sampler.SOLVERS)
def test_divergence_is_finite_and_counted(solver, size, only):
    x, diverged = drawn((3, 4, 2), 12, guide=Shift("noised", size, row=1, only=only), solver=solver)
    assert diverged.tolist() == [False, True, False] and x.isfinite().all()
    assert torch.equal(x[[0, 2]], drawn((3, 4, 2), 12, solver=solver)[0][[0, 2]])


# Noise in blocks, trajectories in chunks


@pytest.mark.parametrize("solver, churn", PAIRS)
@pytest.mark.parametrize("on", ["noised", "denoised"])
def test_a_list_of_generators_gives_separate_samples_one_after_the_other(solver, churn, on):
    def guided(count, seed):
        return drawn((count, 4, 3), 12, churn, seed, Shift(on, 0.5), solver=solver)

    def listed(*sizes):
        return guided(sum(size for _, size in sizes), [(torch.Generator().manual_seed(seed), size) for seed, size in sizes])

    sizes = ((4, 2), (0, 3), (7, 1))
    (x, diverged), parts = listed(*sizes), [guided(size, seed) for seed, size in sizes]
    assert torch.equal(x, torch.cat([part[0] for part in parts])) and torch.equal(diverged, torch.cat([p[1] for p in parts]))
    assert len(x[:, 0, 0].unique()) == 6
    assert torch.equal(listed((4, 6))[0], guided(6, 4)[0])  # a list of one is that one
    same, _ = listed((1, 2), (1, 2))
    assert torch.equal(same[:2], same[2:])  # two of one seed


@pytest.fixture(scope="module")
def network():
    """A small U-Net with random weights, in float64, so that only the order of sums differs between chunks."""
    return a_denoiser().double().requires_grad_(False)


def in_chunks(n, denoise=gaussian_denoiser, churn=3.0, guide=None, seed=3, **named):
    noise = fast.stream("cpu", "drawing", seed)
    return sampler.draw(denoise, (n, 4, 12), 6, churn, noise, guide, dtype=torch.float64, **named)


@pytest.mark.parametrize("n", [1, 6, 32, 33, 70, 96])
def test_a_drawing_is_the_samplers_with_a_generator_for_every_32(n):
    noise = [(fast.generator("cpu", "drawing", 3, i), len(ids)) for i, ids in enumerate(torch.arange(n).split(32))]
    expected = drawn((n, 4, 12), 6, 3.0, noise)
    for most in (None, 1, 32, 40, 64, 1000):
        found = in_chunks(n, most=most)
        assert all(torch.equal(a, b) for a, b in zip(found, expected))  # a formula for each value rounds alike
    assert len(found[0][:, 0, 0].unique()) == n
    assert not torch.equal(in_chunks(n, seed=4)[0], found[0])


@pytest.mark.parametrize("on", ["noised", "denoised"])
@pytest.mark.parametrize("n, most, chunks", [(20, 32, 1), (70, 32, 3), (96, 80, 2)])
def test_chunks_change_nothing_but_rounding(network, n, most, chunks, on):
    sizes, whole = [], in_chunks(n, network, guide=Shift(on, 0.3))
    x, diverged = in_chunks(n, lambda x, s: sizes.append(len(x)) or network(x, s), guide=Shift(on, 0.3), most=most)
    assert len(sizes) == 11 * chunks and max(sizes) <= most
    torch.testing.assert_close(x, whole[0], rtol=1e-9, atol=1e-9)
    assert torch.equal(diverged, whole[1]) and x.shape == (n, 4, 12)


@pytest.mark.parametrize("solver, each", [("heun", 11), ("multistep", 6)])
def test_every_chunk_is_watched(solver, each):
    seen = []
    in_chunks(70, churn=0.0, solver=solver, most=32, watch=lambda x, d, sigma, done: seen.append((len(x), len(d), done)))
    assert [size for size, _, _ in seen] == [32] * 2 * each + [6] * each == [size for _, size, _ in seen]
    shares = [done for *_, done in seen]
    assert shares == sorted(set(shares)) and shares[-1] == 1.0
    assert shares[each - 1] == pytest.approx(32 / 70) and shares[2 * each - 1] == pytest.approx(64 / 70)


def test_a_stopped_drawing_goes_on_with_the_next_chunk(network):
    known, seen, whole = {}, [], in_chunks(100, network, most=32)

    def keep(name, make):
        if name not in known:
            known[name] = make()
        return known[name]

    def stop(x, denoised, sigma, done):
        if done > 0.7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        in_chunks(100, network, most=32, keep=keep, watch=stop)
    assert list(known) == ["0-32", "32-64"] and torch.equal(known["32-64"][0], whole[0][32:64])
    x, diverged = in_chunks(100, network, most=32, keep=keep, watch=lambda *given: seen.append(given[-1]))
    assert torch.equal(x, whole[0]) and torch.equal(diverged, whole[1])
    assert len(seen) == 22 and seen[0] > 0.64 and seen[-1] == 1.0  # two chunks were there
    assert list(known) == ["0-32", "32-64", "64-96", "96-100"]
    in_chunks(64, most=64, keep=lambda name, make: pytest.fail("an only chunk is not kept"))

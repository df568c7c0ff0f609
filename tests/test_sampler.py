"""The sampler against closed forms for Gaussian data, and guides that are counted."""

import math

import pytest
import torch
from conftest import cut

from pgdlib import edm, sampler


def gaussian_denoiser(x, sigma):
    """The exact denoiser of N(0, 1) data."""
    return x / (1 + sigma**2)


def predicted_variance(steps, churn):
    """Every step of Algorithm 2 is linear in x for Gaussian data, so the variance follows a recursion."""
    rho, i = 7.0, range(steps)
    sigmas = [(80 ** (1 / rho) + k / (steps - 1) * (0.002 ** (1 / rho) - 80 ** (1 / rho))) ** rho for k in i] + [0.0]
    variance = 80.0**2
    for s, s_next in zip(sigmas, sigmas[1:], strict=False):
        s_hat = s
        if 0.05 <= s <= 50:
            s_hat = s * (1 + min(churn / steps, math.sqrt(2) - 1))
            variance += (s_hat**2 - s**2) * 1.003**2
        slope = s_hat / (1 + s_hat**2)
        factor = 1 + (s_next - s_hat) * slope
        if s_next:
            slope_next = factor * s_next / (1 + s_next**2)
            factor = 1 + (s_next - s_hat) * (slope + slope_next) / 2
        variance *= factor**2
    return variance


@pytest.mark.parametrize("steps, churn", [(18, 0.0), (18, 5.0), (64, 12.8), (32, 80.0), (256, 80.0)])
def test_variance_follows_the_recursion(steps, churn):
    generator = torch.Generator().manual_seed(0)
    x, diverged = sampler.sample(gaussian_denoiser, (4000, 5, 10), steps, churn, generator, dtype=torch.float64)
    expected = predicted_variance(steps, churn)
    # The variance of n Gaussian values has relative standard error sqrt(2 / n); 4.5 of them allow for five tests.
    assert x.var().item() == pytest.approx(expected, rel=4.5 * math.sqrt(2 / x.numel()))
    assert not diverged.any()


def test_order_of_convergence_is_two():
    """Without churn the sampler solves an ODE, whose solution for N(0, 1) data is x(0) = x(σ_max) / sqrt(1 + σ_max²)."""
    errors = []
    for steps in (40, 80, 160):
        x, _ = sampler.sample(gaussian_denoiser, (1, 1, 1), steps, 0.0, torch.Generator().manual_seed(3), dtype=torch.float64)
        start = torch.randn((1, 1, 1), generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 80
        errors.append(abs(x / (start / math.sqrt(1 + 80**2)) - 1).item())
    orders = [math.log2(a / b) for a, b in zip(errors, errors[1:], strict=False)]
    assert orders == pytest.approx([2, 2], abs=0.15)


def test_noise_levels_end_points():
    sigmas = sampler.noise_levels(400)
    assert sigmas[0] == pytest.approx(80) and sigmas[399] == pytest.approx(0.002) and sigmas[400] == 0
    assert (sigmas.diff() < 0).all()
    with pytest.raises(ValueError, match="steps=1"):
        sampler.noise_levels(1)


class Shift:
    """A guide that adds a constant to one channel."""

    def __init__(self, on, size):
        self.on, self.size, self.seen = on, size, []

    def __call__(self, x, denoised, sigma, step):
        self.seen.append((sigma, denoised is None))
        shift = torch.zeros_like(x)
        shift[..., 0] = self.size
        return shift


def test_a_denoised_shift_moves_the_mean():
    """Shifting every denoised estimate (1 / (1 + σ²)) x by (1 - 1 / (1 + σ²)) m is exactly the denoiser of N(m, 1) data."""

    class Mean(Shift):
        def __call__(self, x, denoised, sigma, step):
            return super().__call__(x, denoised, sigma, step) * (1 - 1 / (1 + sigma**2))

    x, _ = sampler.sample(
        gaussian_denoiser, (2000, 4, 2), 40, 0.0, torch.Generator().manual_seed(0), guide=Mean("denoised", 3.0)
    )
    shrink = math.sqrt(predicted_variance(40, 0.0)) / 80  # x - m shrinks by this; x starts at mean 0, not m
    assert x[..., 0].mean().item() == pytest.approx(3.0 * (1 - shrink), abs=0.05)
    assert x[..., 1].mean().item() == pytest.approx(0.0, abs=0.05)


def test_a_noised_shift_comes_once_a_step_and_sees_no_estimate():
    guide = Shift("noised", 0.0)
    unguided, _ = sampler.sample(gaussian_denoiser, (3, 4, 2), 12, 4.0, torch.Generator().manual_seed(0))
    guided, _ = sampler.sample(gaussian_denoiser, (3, 4, 2), 12, 4.0, torch.Generator().manual_seed(0), guide=guide)
    assert torch.equal(unguided, guided)
    assert [s for s, _ in guide.seen] == pytest.approx(sampler.noise_levels(12)[:-1].tolist())
    assert all(none for _, none in guide.seen)


@pytest.mark.parametrize("size", [1e30, math.inf, math.nan])
def test_divergence_is_finite_and_counted(size):
    class One(Shift):
        def __call__(self, x, denoised, sigma, step):
            shift = torch.zeros_like(x)
            shift[1] = self.size
            return shift

    x, diverged = sampler.sample(
        gaussian_denoiser, (3, 4, 2), 12, 0.0, torch.Generator().manual_seed(0), guide=One("noised", size)
    )
    alone, _ = sampler.sample(gaussian_denoiser, (3, 4, 2), 12, 0.0, torch.Generator().manual_seed(0))
    assert diverged.tolist() == [False, True, False]
    assert x.isfinite().all()
    assert torch.equal(x[[0, 2]], alone[[0, 2]])


# The multistep solver


def multistep(steps, seed=3, shape=(1, 1, 1), **more):
    generator = torch.Generator().manual_seed(seed)
    return sampler.sample(gaussian_denoiser, shape, steps, 0.0, generator, dtype=torch.float64, solver="multistep", **more)[0]


def test_multistep_has_order_two():
    """Each halving of the steps' length quarters the error against the closed form."""
    start = torch.randn((1, 1, 1), generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 80
    exact = start / math.sqrt(1 + 80**2)
    errors = [abs(multistep(steps) / exact - 1).item() for steps in (80, 160, 320)]
    orders = [math.log2(a / b) for a, b in zip(errors, errors[1:])]
    assert orders == pytest.approx([2, 2], abs=0.2) and errors[-1] < 1e-3


def test_multistep_is_the_published_update():
    """DPM-Solver++(2M) in the half-log-SNR l = -log σ: x' = σ'/σ x - (exp(-h) - 1) D, D with its last change over 2r."""
    levels = sampler.noise_levels(9).tolist()
    x = torch.randn((2, 3, 4), generator=torch.Generator().manual_seed(5), dtype=torch.float64) * 80
    denoised, l_before = [], None
    for sigma, following in zip(levels[:-1], levels[1:-1]):
        denoised.append(torch.tanh(x / (1 + sigma)))
        h = math.log(sigma) - math.log(following)
        guess = denoised[-1]
        if l_before is not None:
            r = (-math.log(sigma) - l_before) / h
            guess = (1 + 1 / (2 * r)) * denoised[-1] - 1 / (2 * r) * denoised[-2]
        l_before = -math.log(sigma)
        x = following / sigma * x - math.expm1(-h) * guess
    expected = torch.tanh(x / (1 + levels[-2]))
    generator = torch.Generator().manual_seed(5)
    found, _ = sampler.sample(
        lambda x, s: torch.tanh(x / (1 + s)), (2, 3, 4), 9, 0, generator, dtype=torch.float64, solver="multistep"
    )
    torch.testing.assert_close(found, expected)


def test_multistep_evaluates_once_a_step_and_hears_both_kinds_of_guide():
    calls = []

    def counted(x, sigma):
        calls.append(sigma)
        return gaussian_denoiser(x, sigma)

    sampler.sample(counted, (1, 1, 1), 12, 0.0, torch.Generator().manual_seed(0), solver="multistep")
    assert calls == sampler.noise_levels(12)[:-1].tolist()
    plain = multistep(12, shape=(3, 4, 2))
    for on in ("noised", "denoised"):
        guide = Shift(on, 1.0)
        guided = multistep(12, shape=(3, 4, 2), guide=guide)
        assert len(guide.seen) == 12 and (guided[..., 0] > plain[..., 0]).all() and torch.equal(guided[..., 1], plain[..., 1])


def test_solvers_that_cannot_be_are_named():
    with pytest.raises(ValueError, match=r"solver='euler' is not allowed.*'heun', 'multistep'"):
        sampler.sample(gaussian_denoiser, (1, 1, 1), 8, 0.0, torch.Generator(), solver="euler")
    with pytest.raises(ValueError, match=r"churn=5.0 is not allowed with solver='multistep'"):
        sampler.sample(gaussian_denoiser, (1, 1, 1), 8, 5.0, torch.Generator(), solver="multistep")


@pytest.mark.parametrize("solver, churn", [("heun", 0.0), ("heun", 5.0), ("multistep", 0.0)])
@pytest.mark.parametrize("on", ["noised", "denoised"])
def test_a_list_of_generators_gives_separate_samples_one_after_the_other(solver, churn, on):
    def drawn(count, generators):
        guide = Shift(on, 0.5)
        return sampler.sample(
            gaussian_denoiser, (count, 4, 3), 12, churn, generators, guide, dtype=torch.float64, solver=solver
        )

    sizes = {4: 2, 0: 3, 7: 1}
    x, diverged = drawn(6, [(torch.Generator().manual_seed(seed), size) for seed, size in sizes.items()])
    parts = [drawn(size, torch.Generator().manual_seed(seed)) for seed, size in sizes.items()]
    assert torch.equal(x, torch.cat([part[0] for part in parts])) and torch.equal(diverged, torch.cat([p[1] for p in parts]))
    assert len(x[:, 0, 0].unique()) == 6
    again = drawn(6, [(torch.Generator().manual_seed(4), 6)])
    assert torch.equal(again[0], drawn(6, torch.Generator().manual_seed(4))[0])  # a list of one is that one
    same = drawn(4, [(torch.Generator().manual_seed(1), 2) for _ in range(2)])[0]
    assert torch.equal(same[:2], same[2:])  # two of one seed


# In chunks


def network():
    """A small U-Net with random weights, in float64, so that only the order of sums differs between chunks."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return edm.Denoiser(45, 24, 4, 8, 2).double().requires_grad_(False)


def in_chunks(n, denoise=gaussian_denoiser, churn=3.0, guide=None, seed=3, **named):
    return sampler.draw(denoise, (n, 4, 71), 6, churn, seed, guide, dtype=torch.float64, **named)


@pytest.mark.parametrize("n", [1, 6, 32, 33, 70, 96])
def test_a_drawing_is_the_samplers_with_a_generator_for_every_32(n):
    noise = [(edm.seeded("cpu", 5_000_003, i), len(ids)) for i, ids in enumerate(torch.arange(n).split(32))]
    expected = sampler.sample(gaussian_denoiser, (n, 4, 71), 6, 3.0, noise, dtype=torch.float64)
    for most in (None, 1, 32, 40, 64, 1000):
        found = in_chunks(n, most=most)
        assert all(torch.equal(a, b) for a, b in zip(found, expected))  # a formula for each value rounds alike
    assert len(found[0][:, 0, 0].unique()) == n
    assert not torch.equal(in_chunks(n, seed=4)[0], found[0])


@pytest.mark.parametrize("on", ["noised", "denoised"])
@pytest.mark.parametrize("n, chunks", [(20, 1), (70, 3), (96, 3)])
def test_chunks_change_nothing_but_rounding(n, chunks, on):
    sizes, model, whole = [], network(), in_chunks(n, network(), guide=Shift(on, 0.3))

    def counted(x, sigma):
        sizes.append(len(x))
        return model(x, sigma)

    x, diverged = in_chunks(n, counted, guide=Shift(on, 0.3), most=32)
    assert len(sizes) == 11 * chunks and max(sizes) <= 32
    torch.testing.assert_close(x, whole[0], rtol=1e-9, atol=1e-9)
    assert torch.equal(diverged, whole[1]) and x.shape == (n, 4, 71)


def test_every_chunk_is_watched():
    seen = []
    in_chunks(70, most=32, watch=lambda x, denoised, sigma, done: seen.append((len(x), done)))
    assert [size for size, _ in seen] == [32] * 22 + [6] * 11
    shares = [done for _, done in seen]
    assert shares == sorted(set(shares)) and shares[-1] == 1.0
    assert shares[10] == pytest.approx(32 / 70) and shares[21] == pytest.approx(64 / 70)


def test_a_killed_drawing_goes_on_with_the_next_chunk(tmp_path):
    seen, folder = [], tmp_path / "parts"
    whole = in_chunks(100, network(), most=32)

    def killed(x, denoised, sigma, done):
        if done > 0.7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        in_chunks(100, network(), most=32, parts=folder, watch=killed)
    assert sorted(f.name for f in folder.glob("*.safetensors")) == ["0-32.safetensors", "32-64.safetensors"]
    assert sampler.kept_most(folder) == 32
    x, diverged = in_chunks(100, network(), most=32, parts=folder, watch=lambda *given: seen.append(given[-1]))
    assert torch.equal(x, whole[0]) and torch.equal(diverged, whole[1])
    assert len(seen) == 22 and seen[0] > 0.64 and seen[-1] == 1.0  # two chunks were there
    torch.testing.assert_close(in_chunks(100, network(), most=64, parts=folder)[0], x, rtol=1e-9, atol=1e-9)


def test_a_damaged_chunk_is_drawn_again_and_an_only_one_is_not_kept(tmp_path):
    folder = tmp_path / "parts"
    assert sampler.kept_most(folder) is None
    in_chunks(64, most=64, parts=folder)
    assert not folder.exists()
    x, _ = in_chunks(64, most=32, parts=folder)
    cut(folder / "0-32.safetensors")
    assert torch.equal(in_chunks(64, most=32, parts=folder)[0], x)

"""The sampler against closed forms for Gaussian data, the loss against its known value, training against its interruption."""

import math

import pytest
import torch

from pgdlib import data, edm
from pgdlib.unet import UNet


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
    x, diverged = edm.sample(gaussian_denoiser, (4000, 5, 10), steps, churn, generator, dtype=torch.float64)
    expected = predicted_variance(steps, churn)
    # The variance of n Gaussian values has relative standard error sqrt(2 / n); 4.5 of them allow for five tests.
    assert x.var().item() == pytest.approx(expected, rel=4.5 * math.sqrt(2 / x.numel()))
    assert not diverged.any()


def test_order_of_convergence_is_two():
    """Without churn the sampler solves an ODE, whose solution for N(0, 1) data is x(0) = x(σ_max) / sqrt(1 + σ_max²)."""
    errors = []
    for steps in (40, 80, 160):
        x, _ = edm.sample(gaussian_denoiser, (1, 1, 1), steps, 0.0, torch.Generator().manual_seed(3), dtype=torch.float64)
        start = torch.randn((1, 1, 1), generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 80
        errors.append(abs(x / (start / math.sqrt(1 + 80**2)) - 1).item())
    orders = [math.log2(a / b) for a, b in zip(errors, errors[1:], strict=False)]
    assert orders == pytest.approx([2, 2], abs=0.15)


def test_noise_levels_end_points():
    sigmas = edm.noise_levels(400)
    assert sigmas[0] == pytest.approx(80) and sigmas[399] == pytest.approx(0.002) and sigmas[400] == 0
    assert (sigmas.diff() < 0).all()
    with pytest.raises(ValueError, match="steps=1"):
        edm.noise_levels(1)


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

    x, _ = edm.sample(gaussian_denoiser, (2000, 4, 2), 40, 0.0, torch.Generator().manual_seed(0), guide=Mean("denoised", 3.0))
    shrink = math.sqrt(predicted_variance(40, 0.0)) / 80  # x - m shrinks by this; x starts at mean 0, not m
    assert x[..., 0].mean().item() == pytest.approx(3.0 * (1 - shrink), abs=0.05)
    assert x[..., 1].mean().item() == pytest.approx(0.0, abs=0.05)


def test_a_noised_shift_comes_once_a_step_and_sees_no_estimate():
    guide = Shift("noised", 0.0)
    unguided, _ = edm.sample(gaussian_denoiser, (3, 4, 2), 12, 4.0, torch.Generator().manual_seed(0))
    guided, _ = edm.sample(gaussian_denoiser, (3, 4, 2), 12, 4.0, torch.Generator().manual_seed(0), guide=guide)
    assert torch.equal(unguided, guided)
    assert [s for s, _ in guide.seen] == pytest.approx(edm.noise_levels(12)[:-1].tolist())
    assert all(none for _, none in guide.seen)


@pytest.mark.parametrize("size", [1e30, math.inf, math.nan])
def test_divergence_is_finite_and_counted(size):
    class One(Shift):
        def __call__(self, x, denoised, sigma, step):
            shift = torch.zeros_like(x)
            shift[1] = self.size
            return shift

    x, diverged = edm.sample(gaussian_denoiser, (3, 4, 2), 12, 0.0, torch.Generator().manual_seed(0), guide=One("noised", size))
    alone, _ = edm.sample(gaussian_denoiser, (3, 4, 2), 12, 0.0, torch.Generator().manual_seed(0))
    assert diverged.tolist() == [False, True, False]
    assert x.isfinite().all()
    assert torch.equal(x[[0, 2]], alone[[0, 2]])


def small_denoiser(horizon=8):
    torch.manual_seed(0)
    return edm.Denoiser(horizon, features=8, blocks=2)


class Zero(torch.nn.Module):
    def forward(self, x, noise):
        return torch.zeros_like(x)


@pytest.mark.parametrize("sigma", [0.01, 0.5, 1.0, 20.0])
def test_loss_of_a_zero_network_is_one(sigma):
    """Karras' preconditioning and weight make the loss of a network that says 0 equal to 1 on N(0, 1) data, at every σ."""
    denoiser = small_denoiser()
    denoiser.net = Zero()
    x = torch.randn(4000, 8, 71, generator=torch.Generator().manual_seed(0))
    value = edm.loss(denoiser, x, torch.ones(4000, 8), torch.full((4000,), sigma), torch.Generator().manual_seed(1)).mean()
    assert value.item() == pytest.approx(1.0, abs=4.5 * math.sqrt(2 / x.numel()))


def test_masked_steps_do_not_count():
    denoiser = small_denoiser()
    denoiser.net = Zero()
    x = torch.randn(5, 8, 71, generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(8) < torch.tensor([8, 6, 1, 4, 2])[:, None]).float()
    other = torch.where(mask[..., None] > 0, x, x * 7 + 3)
    other[..., data.TERMINAL] = x[..., data.TERMINAL]
    a, b = (edm.loss(denoiser, v, mask, torch.full((5,), 0.5), torch.Generator().manual_seed(1)) for v in (x, other))
    assert torch.allclose(a, b)
    other[:, -1, data.TERMINAL] += 1.0  # but the flag of an end counts to the end of the window
    c = edm.loss(denoiser, other, mask, torch.full((5,), 0.5), torch.Generator().manual_seed(1))
    assert (a != c).all()


@pytest.mark.parametrize("blocks, kernel_size", [(1, 3), (2, 3), (3, 5)])
def test_unet_shapes_and_reach(blocks, kernel_size):
    torch.manual_seed(0)
    net = UNet(71, features=16, blocks=blocks, kernel_size=kernel_size)
    x, noise = torch.randn(3, 16, 71), torch.randn(3)
    assert net(x, noise).shape == x.shape
    assert not torch.allclose(net(x, noise), net(x, noise + 1))  # the noise level matters
    assert torch.allclose(net(x, noise)[1], net(x[1:2], noise[1:2])[0], atol=1e-5)  # trajectories do not mix


def test_unet_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="horizon=7"):
        UNet(71, features=16, blocks=2)(torch.zeros(1, 7, 71), torch.zeros(1))
    with pytest.raises(ValueError, match="features=12"):
        UNet(71, features=12)


def training_windows():
    n = 60
    g = torch.Generator().manual_seed(0)
    trajectories = data.Trajectories(
        torch.randn(n, 45, generator=g),
        torch.randn(n, 24, generator=g).clamp(-1, 1),
        torch.randn(n, generator=g),
        torch.zeros(n),
        torch.randn(n, 45, generator=g),
        torch.tensor([30, 30]),
        "toy",
    )
    return data.Windows(trajectories, data.Normaliser().fit(trajectories.packed()), 8)


def test_resume_gives_the_same_weights(tmp_path):
    how = edm.Training(steps=30, batch_size=4, learning_rate=1e-3)
    whole, losses = edm.train(small_denoiser(), training_windows(), how)

    def interrupt(step, losses):
        if step == 17:
            raise KeyboardInterrupt

    path = tmp_path / "checkpoint.safetensors"
    with pytest.raises(KeyboardInterrupt):
        edm.train(small_denoiser(), training_windows(), how, path, save_every=0.0, report=interrupt)
    torch.manual_seed(99)
    steps = []
    resumed, losses_again = edm.train(
        small_denoiser(), training_windows(), how, path, report=lambda step, losses: steps.append(step)
    )
    assert steps[0] in (17, 18)  # it did go on, not start anew
    assert torch.equal(losses, losses_again)
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_a_checkpoint_of_another_training_is_refused(tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    edm.train(small_denoiser(), training_windows(), edm.Training(3, 4, 1e-3), path, save_every=0.0)
    with pytest.raises(ValueError, match="another training"):
        edm.train(small_denoiser(), training_windows(), edm.Training(3, 4, 2e-3), path)


def test_training_learns():
    windows = training_windows()
    denoiser = small_denoiser()
    ema, _ = edm.train(denoiser, windows, edm.Training(150, 16, 3e-3, ema=0.9))
    sigmas = torch.tensor([0.1, 1.0, 10.0])
    torch.manual_seed(0)
    before = edm.validation_loss(small_denoiser(), windows, sigmas, 64, seed=1)
    assert (edm.validation_loss(ema, windows, sigmas, 64, seed=1)[:2] < 0.9 * before[:2]).all()

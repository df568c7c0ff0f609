"""The loss against its known value, training against its interruption."""

import math

import pytest
import torch
from conftest import SPEC, cut

from pgdlib import data, edm
from pgdlib.lab import store
from pgdlib.unet import UNet


def small_denoiser(horizon=8):
    torch.manual_seed(0)
    return edm.Denoiser(45, 24, horizon, features=8, blocks=2)


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
    other[..., SPEC.terminal] = x[..., SPEC.terminal]
    a, b = (edm.loss(denoiser, v, mask, torch.full((5,), 0.5), torch.Generator().manual_seed(1)) for v in (x, other))
    assert torch.allclose(a, b)
    other[:, -1, SPEC.terminal] += 1.0  # but the flag of an end counts to the end of the window
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
    return data.Windows(trajectories, data.Normaliser(SPEC).fit(trajectories.packed()), 8)


HOW = edm.Training(steps=12, batch_size=5, learning_rate=1e-3)  # two processes have 2 windows and 3


def in_float64():
    windows = training_windows()
    windows.steps = windows.steps.double()
    return small_denoiser().double(), windows


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
    assert steps[0] == 18  # it did go on, not start anew, and lost nothing
    assert torch.equal(losses, losses_again)
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def other_tensors(path):
    tensors, card = store.load(path)
    store.save(path, {**tensors, "losses": torch.zeros(4)}, card)


def renamed(path):
    other = path.with_name("other")
    store.save(other, *store.load(path))
    other.replace(path)


SPOILS = {
    "cut": cut,
    "empty": lambda path: path.write_bytes(b""),
    "of another learning rate": lambda path: edm.train(
        small_denoiser(), training_windows(), edm.Training(3, 4, 2e-3), path, save_every=0.0
    ),
    "of another network": lambda path: edm.train(
        edm.Denoiser(45, 24, 8, 16, 2), training_windows(), edm.Training(3, 4, 1e-3), path, save_every=0.0
    ),
    "with other tensors": other_tensors,
    "a list": lambda path: store.save(path, {}, [1]),
    "saved under another name": renamed,
}


@pytest.mark.parametrize("spoil", SPOILS)
def test_a_checkpoint_that_cannot_be_used_is_set_aside_and_training_begins_anew(tmp_path, spoil, capsys):
    how, path = edm.Training(3, 4, 1e-3), tmp_path / "checkpoint.safetensors"
    expected, losses = edm.train(small_denoiser(), training_windows(), how)
    edm.train(small_denoiser(), training_windows(), how, path, save_every=0.0)
    if spoil.startswith("of another"):
        path.unlink()
    SPOILS[spoil](path)
    bad, steps = path.read_bytes(), []
    found, again = edm.train(small_denoiser(), training_windows(), how, path, report=lambda step, losses: steps.append(step))
    assert steps == [1, 2, 3] and torch.equal(losses, again)
    for (name, a), b in zip(expected.state_dict().items(), found.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    (aside,) = tmp_path.glob("*.damaged")
    assert aside.read_bytes() == bad and aside.name in capsys.readouterr().out


def test_what_a_report_raises_is_saved_before(tmp_path):
    def interrupt(step, losses):
        if step == 2:
            raise KeyboardInterrupt

    path = tmp_path / "checkpoint.safetensors"
    assert edm.steps_done(path) == 0
    with pytest.raises(KeyboardInterrupt):
        edm.train(small_denoiser(), training_windows(), edm.Training(3, 4, 1e-3), path, report=interrupt)
    assert edm.steps_done(path) == 2


@pytest.mark.slow
def test_training_learns():
    windows = training_windows()
    denoiser = small_denoiser()
    ema, _ = edm.train(denoiser, windows, edm.Training(150, 16, 3e-3, ema=0.9))
    sigmas = torch.tensor([0.1, 1.0, 10.0])
    torch.manual_seed(0)
    before = edm.validation_loss(small_denoiser(), windows, sigmas, 64, seed=1)
    assert (edm.validation_loss(ema, windows, sigmas, 64, seed=1)[:2] < 0.9 * before[:2]).all()

"""The loss against its known value, training against a plain loop with torch's own parts and against its interruption."""

import copy
import math

import pytest
import torch
from conftest import SMALL, SPEC, a_denoiser, assert_goes_on, draw, toy
from torch import nn

from pgdlib import data, edm, fast


def windows_of(spec=SPEC, lengths=(30, 5, 30)):
    mine = toy(list(lengths), spec=spec)
    return data.Windows(mine, data.Normaliser(spec).fit(mine.packed()), 8)


class Zero(nn.Module):
    """With Karras' preconditioning the exact denoiser of N(0, 1) data."""

    def forward(self, x, noise):
        return torch.zeros_like(x)


def zero():
    denoiser = a_denoiser(SPEC)
    denoiser.net = Zero()
    return denoiser


@pytest.mark.parametrize("sigma", [0.01, 0.5, 1.0, 20.0])
def test_loss_of_a_zero_network_is_one(sigma):
    """Karras' preconditioning and weight make the loss of a network that says 0 equal to 1 on N(0, 1) data, at every σ."""
    x = draw(0, 4000, 8, 71)
    value = edm.loss(zero(), x, torch.ones(4000, 8), torch.full((4000,), sigma), torch.Generator().manual_seed(1)).mean()
    assert value.item() == pytest.approx(1.0, abs=4.5 * math.sqrt(2 / x.numel()))


@pytest.mark.parametrize("sigma", [0.1, 3.0])
def test_the_denoiser_is_karras_formula(sigma):
    """D(x; σ) = c_skip x + c_out F(c_in x; ln(σ) / 4), for one σ and for one each."""
    denoiser, x = a_denoiser().double(), draw(0, 3, 8, 12).double()
    root = math.sqrt(1 + sigma**2)
    expected = x / root**2 + sigma / root * denoiser.net(x / root, torch.full((3,), math.log(sigma) / 4).double())
    for given in (sigma, torch.tensor(sigma).double(), torch.full((3,), sigma).double()):
        torch.testing.assert_close(denoiser(x, given), expected)


def test_masked_steps_do_not_count():
    x, mask = draw(0, 5, 8, 71), (torch.arange(8) < torch.tensor([8, 6, 1, 4, 2])[:, None]).float()
    other = torch.where(mask[..., None] > 0, x, x * 7 + 3)
    other[..., SPEC.terminal] = x[..., SPEC.terminal]

    def loss(x):
        return edm.loss(zero(), x, mask, torch.full((5,), 0.5), torch.Generator().manual_seed(1))

    torch.testing.assert_close(loss(x), loss(other))
    other[:, -1, SPEC.terminal] += 1.0  # but the flag of an end counts to the end of the window
    assert (loss(x) != loss(other)).all()


def test_the_validation_loss_of_the_exact_denoiser_is_one():
    """At every σ, for windows of data whose channels have mean 0 and variance 1; the same windows and noise for one seed."""
    mine = toy([4000], rewards=torch.ones(4000).index_fill(0, torch.arange(0, 4000, 2), -1.0))
    windows, sigmas = data.Windows(mine, data.Normaliser(SPEC).fit(mine.packed()), 8), torch.tensor([0.1, 1.0, 10.0])
    found = edm.validation_loss(zero(), windows, sigmas, 2000, seed=3)
    torch.testing.assert_close(found, torch.ones(3), atol=0.01, rtol=0)
    assert torch.equal(found, edm.validation_loss(zero(), windows, sigmas, 2000, seed=3))
    one = windows_of(lengths=[8])  # of which all seeds see one window, in other noise
    assert not torch.equal(*(edm.validation_loss(zero(), one, sigmas, 2, seed) for seed in (3, 4)))


# Training


def plain(denoiser, windows, recipe):
    """Algorithm and schedule written out, with torch's own Adam; the random numbers are those of the stream."""
    ema, losses = copy.deepcopy(denoiser), []
    adam = torch.optim.Adam(denoiser.net.parameters(), recipe.learning_rate)
    for step in range(recipe.steps):
        warmup = recipe.steps // 10
        rise, fall = 0.1 + 0.9 * step / warmup, 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / (recipe.steps - warmup))
        adam.param_groups[0]["lr"] = recipe.learning_rate * (rise if step < warmup else fall)
        noise = fast.generator("cpu", "training", recipe.seed, step)
        x, mask = windows[torch.randint(len(windows), (recipe.batch_size,), generator=noise)]
        sigma = torch.randn(recipe.batch_size, generator=noise).mul(recipe.p_std).add(recipe.p_mean).exp()
        loss = edm.loss(denoiser, x, mask, sigma, noise).mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses.append(loss.item())
        keep = min(recipe.ema, (1 + step) / (10 + step))
        for slow, new in zip(ema.net.parameters(), denoiser.net.parameters()):
            slow.data = keep * slow.data + (1 - keep) * new.data
    return ema, losses


@pytest.mark.parametrize("changes", [dict(ema=0.4), dict(p_mean=0.5, p_std=0.7)], ids=["ema", "noise"])
def test_training_is_the_plain_loop(changes):
    """In float64, where Adam does not make much of rounding; the noise is Karras' where nothing else is said."""
    recipe, windows = edm.Recipe(steps=20, batch_size=5, learning_rate=1e-3, seed=4, **changes), windows_of(SMALL)
    assert (recipe.ema, recipe.p_mean, recipe.p_std) == tuple({"ema": 0.999, "p_mean": -1.2, "p_std": 1.2, **changes}.values())
    windows.steps, (mine, model) = windows.steps.double(), (a_denoiser().double() for _ in range(2))
    expected, losses = plain(model, windows, recipe)
    training = edm.Training(mine, windows, recipe)
    assert list(training) == list(range(1, 21)) and list(training) == [] and training.step == training.steps == 20
    torch.testing.assert_close(training.losses, torch.tensor(losses))
    for found, right in ((training.ema, expected), (training.denoiser, model)):
        for name, tensor in right.state_dict().items():
            torch.testing.assert_close(found.state_dict()[name], tensor, rtol=1e-8, atol=1e-8, msg=name)
    other = edm.Training(mine, windows, edm.Recipe(20, 5, 1e-3, seed=5))
    assert next(iter(other)) == 1 and other.losses[0] != training.losses[0]


@pytest.mark.parametrize("spec", [SPEC, SMALL], ids=["pen", "small"])
@pytest.mark.parametrize("optimiser", ["adam", "muon"])
def test_a_state_copied_into_a_fresh_training_goes_on_to_the_same_weights(spec, optimiser):
    recipe = edm.Recipe(steps=30, batch_size=4, learning_rate=1e-3, optimiser=optimiser)
    whole, fresh = (edm.Training(a_denoiser(spec), windows_of(spec), recipe) for _ in range(2))
    for parameter in fresh.denoiser.parameters():
        parameter.data.add_(1.0)  # another start, which the state must undo
    assert_goes_on(whole, fresh, 17)
    assert not any(p.requires_grad for p in whole.ema.parameters())
    assert whole.card == dict(recipe=vars(recipe), config=whole.denoiser.config)
    assert edm.Denoiser(**whole.card["config"]).state_dict().keys() == whole.ema.state_dict().keys()


def test_muon_has_the_convolutions_between_first_and_last_layer_and_adam_the_rest():
    training = edm.Training(a_denoiser(), windows_of(), edm.Recipe(2, 4, 1e-3, optimiser="muon"))
    names = {id(p): name for name, p in training.denoiser.net.named_parameters()}
    muons, adams = ({names[id(p)] for g in o.param_groups for p in g["params"]} for o in training.optimisers)
    blocks = [f"{block}.{layer}" for block in ("down.0", "down.1", "up.0") for layer in ("conv_1", "conv_2")]
    assert muons == {f"{layer}.weight" for layer in (*blocks, "down.1.skip", "up.0.skip", "narrow.0")}
    assert not muons & adams and muons | adams == set(names.values())
    with pytest.raises(ValueError, match="optimiser='sgd' is not allowed; it must be 'adam' or 'muon'"):
        edm.Training(a_denoiser(), windows_of(), edm.Recipe(2, 4, 1e-3, optimiser="sgd"))


@pytest.mark.parametrize("shape", [(6, 3, 5), (15, 6)], ids=["wide", "tall"])
def test_muon_is_torchs(shape, monkeypatch):
    """Of matrices, with torch's rate for steps like Adam's; its momentum is a sum, ours a mean: all one to Muon."""
    monkeypatch.setattr(edm, "has_bfloat16", lambda device: True)  # as torch's own always computes
    mine, theirs = (draw(0, *shape).requires_grad_() for _ in range(2))
    theirs = theirs.detach().flatten(1).requires_grad_()
    ours, torchs = edm.Muon([mine], 0.01), torch.optim.Muon([theirs], 0.01, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    for i in range(4):
        mine.grad = draw(i + 1, *shape)
        theirs.grad = mine.grad.flatten(1)
        ours.step()
        torchs.step()
        torch.testing.assert_close(mine.flatten(1), theirs, rtol=0, atol=2e-4 * (i + 1))  # of steps of 0.008: bfloat16
    assert (mine - draw(0, *shape)).abs().mean() > 2e-3


@pytest.mark.parametrize("shape", [(8, 20), (20, 8)])
def test_muons_direction_has_the_singular_vectors_of_the_momentum_and_values_near_one(shape):
    matrix = draw(0, *shape, dtype=torch.float64)
    found = edm.Muon.orthogonal(matrix)
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    values = u.T @ found @ v.T
    torch.testing.assert_close(values, torch.diag(values.diagonal()), rtol=0, atol=1e-9)
    assert values.diagonal().min() > 0.6 and values.diagonal().max() < 1.3

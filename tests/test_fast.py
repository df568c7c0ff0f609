"""Streams of random numbers against numpy, layers and Adam against torch's own: values and gradients."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import assert_same, draw, plain_network
from scipy import stats
from torch import nn

from pgdlib import fast
from pgdlib.fast import Convolution, GroupNorm, StackedMLP

EXACT = dict(rtol=1e-10, atol=1e-12)
DEVICES = ["cpu", *["cuda"] * torch.cuda.is_available()]
SEEDS = (3, 0, 11)


def gradients(y, inputs):
    """Those of a random sum of y."""
    return torch.autograd.grad((y * draw(9, *y.shape, dtype=y.dtype)).sum(), inputs, retain_graph=True)


def assert_alike(found, expected, inputs, theirs=None):
    """The values, and their gradients by all inputs, which for the expected values may have other places."""
    torch.testing.assert_close(found, expected, **EXACT)
    for mine, right in zip(gradients(found, inputs), gradients(expected, theirs or inputs), strict=True):
        torch.testing.assert_close(mine, right, **EXACT)


def random(*shape, seed=0):
    return draw(seed, *shape, dtype=torch.float64).requires_grad_()


# Streams


@pytest.mark.parametrize("name, key", [("weights", ()), ("rounds", (0,)), ("fresh", (7, 2**32 - 1, 5, 0, 9))])
def test_a_stream_is_numpys_mersenne_twister(name, key):
    """All 32 bits of each of more words than a block of the twister holds."""
    twister = np.random.MT19937(np.random.SeedSequence([fast.STREAMS.index(name), len(key), *key]))
    words = twister.random_raw(2_001)[1:].astype(np.uint64)  # numpy's first word is of the seeded block, torch begins the next
    found = torch.empty(1_000, dtype=torch.int64).random_(-(2**63), None, generator=fast.generator("cpu", name, *key))
    assert (found.numpy().view(np.uint64) == (words[::2] << np.uint64(32) | words[1::2])).all()
    found = torch.rand(2_000, generator=fast.generator("cpu", name, *key)).numpy()
    assert (found == (words % 2**24).astype(np.float32) / 2**24).all()  # what torch makes of a word


@pytest.mark.parametrize("device", DEVICES)
def test_streams_share_nothing_and_a_key_gives_the_same_numbers_again(device):
    keys = [(0, 0), (0, 1), (1, 0), (1, 1), (2**32 - 1, 0), (0, 2**32 - 1)]

    def drawn():
        return {
            (name, key): torch.rand(50, generator=fast.generator(device, name, *key), device=device).tolist()
            for name in fast.STREAMS
            for key in keys
        }

    found = drawn()
    assert drawn() == found and len({v for values in found.values() for v in values}) > 0.999 * 50 * len(found)
    values = torch.tensor(list(found.values())).flatten()
    assert stats.kstest(values, stats.uniform.cdf).pvalue > 1e-3
    for numbers in ((), (4,), (4, 1)):  # of the key, given later
        some = fast.stream(device, "drawing", 3)(*numbers), fast.generator(device, "drawing", 3, *numbers)
        assert torch.equal(*(torch.rand(9, generator=g, device=device) for g in some))


def test_what_is_no_stream_or_key_is_named():
    for key in ((-1,), (2**32,), (3, -1), (3, 2**32, 0)):
        with pytest.raises(ValueError, match=r"key=\(.*\) is not allowed; it must hold whole numbers from 0 to 2\*\*32 - 1"):
            fast.generator("cpu", "training", *key)
    with pytest.raises(ValueError, match=r"stream='noise' is not allowed; it must be one of weights, training, .*fresh"):
        fast.generator("cpu", "noise", 0)


# What the device has


def test_bfloat16_is_what_the_processor_says(monkeypatch):
    if Path("/proc/cpuinfo").exists():
        assert fast.has_bfloat16("cpu") == ("avx512_bf16" in Path("/proc/cpuinfo").read_text())
    for supported in (True, False):  # of a GPU, whether this machine has one or not; emulation does not count
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, s=supported: s or including_emulation)
        assert fast.has_bfloat16.__wrapped__("cuda:0") is supported


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adam_is_torchs_and_its_state_can_be_copied_into_another(dtype):
    def steps(optimiser, weights, first, last):
        for i in range(first, last):
            weights.grad = draw(i, 40, dtype=dtype)
            optimiser.step()

    mine, theirs, other = (draw(0, 40, dtype=dtype).requires_grad_() for _ in range(3))
    adam = fast.adam([mine], 0.01)
    fresh = {k: v.clone() for k, v in fast.optimiser_state(adam).items()}
    assert fresh and not any(v.any() for v in fresh.values())
    steps(adam, mine, 0, 3)
    steps(torch.optim.Adam([theirs], 0.01), theirs, 0, 3)
    torch.testing.assert_close(mine, theirs)
    again = fast.adam([other], 0.01)
    there, here = (fast.optimiser_state(optimiser).values() for optimiser in (again, adam))
    for tensor, value in zip((other.data, *there), (mine.data, *here)):
        tensor.copy_(value)
    steps(adam, mine, 3, 6)
    steps(again, other, 3, 6)
    assert torch.equal(mine, other) and not torch.equal(mine, theirs)
    assert_same(fast.optimiser_state(again), fast.optimiser_state(adam))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-15)], ids=["float32", "float64"])
def test_tanh_is_torchs(dtype, tolerance):
    z = torch.cat([torch.linspace(-20, 20, 4001), torch.tensor([-math.inf, -1e30, -1e-30, 1e-30, 1e30, math.inf])]).to(dtype)
    kept, z = z.clone(), z.requires_grad_()
    ours, theirs = fast.tanh(z), torch.tanh(z)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)
    slopes = (torch.autograd.grad(tanh.sum(), z)[0] for tanh in (ours, theirs))
    torch.testing.assert_close(*slopes, rtol=0, atol=tolerance)
    assert torch.equal(z, kept)
    with torch.no_grad():
        torch.testing.assert_close(fast.tanh(kept), ours, rtol=0, atol=0)


# Layers of the U-Net


@pytest.mark.parametrize("rows", [1, 3], ids=["one level", "a level each"])
def test_group_norm_is_torchs_own(rows):
    norm = GroupNorm(4, 12).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x, scale, shift = random(3, 5, 12), random(rows, 12, seed=1), random(rows, 12, seed=2)
    plain = F.group_norm(x.transpose(1, 2) + 2, 4, norm.weight, norm.bias, norm.eps).transpose(1, 2)
    assert_alike(norm(x + 2), plain, [x, norm.weight, norm.bias])
    modulated = plain * (1 + scale[:, None]) + shift[:, None]
    assert_alike(norm(x + 2, scale, shift), modulated, [x, scale, shift, norm.weight, norm.bias])


def test_group_norm_of_constant_groups_is_finite():
    x = torch.full((2, 8, 16), 3.0, requires_grad=True)
    y = GroupNorm(8, 16)(x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert y.abs().max() < 0.2 and gradient.isfinite().all()  # 3² cancels to 1e-7, beside eps = 1e-5


def test_group_norm_in_bfloat16_holds_where_the_mean_is_large():
    x = (draw(0, 4, 64, 64) + 10).bfloat16()
    expected = F.group_norm(x.float().transpose(1, 2), 8).transpose(1, 2)  # of the same, already rounded values
    off = (GroupNorm(8, 64)(x).float() - expected).square().mean().sqrt()
    assert off < 0.05  # the offset of -10 is itself rounded to 8 bits: 10 / 512 = 0.02


@pytest.mark.parametrize("unfold", [1, 10_000], ids=["unfolded", "as an image"])
@pytest.mark.parametrize("size", [1, 3, 5])
def test_convolution_is_torchs_own(monkeypatch, unfold, size):
    monkeypatch.setattr(Convolution, "UNFOLD", unfold)
    layer, x = Convolution(6, 4, size).double(), random(3, 7, 6)
    expected = F.conv1d(x.transpose(1, 2), layer.weight.transpose(1, 2), layer.bias, padding=size // 2).transpose(1, 2)
    assert_alike(layer(x), expected, [x, layer.weight, layer.bias])


def test_weights_are_cast_once_and_cast_weights_follow_the_weights():
    layer, x = Convolution(8, 8, 3), draw(0, 2, 4, 8).bfloat16()
    trained = layer(x)
    (gradient,) = torch.autograd.grad(trained.float().sum(), layer.weight)
    assert gradient.dtype == torch.float32 and gradient.any()
    layer.requires_grad_(False)
    assert torch.equal(layer(x), trained)
    kept = layer._kept[1]
    assert torch.equal(layer(x), trained) and layer._kept[1] is kept
    for change in (
        lambda: layer.weight.mul_(2),
        lambda: layer.load_state_dict(Convolution(8, 8, 3).state_dict()),
        lambda: layer.bias.add_(1),
        lambda: setattr(layer.weight, "data", layer.weight.data.clone() * 3),
    ):
        change()
        expected = F.conv1d(x.transpose(1, 2), layer.weight.transpose(1, 2).bfloat16(), layer.bias.bfloat16(), padding=1)
        torch.testing.assert_close(layer(x), expected.transpose(1, 2), rtol=0.02, atol=0.02)


# Stacks of networks


def stacked(widths, seeds=SEEDS, **how):
    return StackedMLP(widths, [torch.Generator().manual_seed(seed) for seed in seeds], **how)


@pytest.mark.parametrize("how", [dict(), dict(activation=fast.tanh)], ids=["relu", "tanh"])
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("widths", [[7, 9, 5, 3], [7, 6, 1], [7, 3]], ids=str)
def test_a_stack_is_separate_networks(widths, frozen, how):
    mlp, x = stacked(widths, **how).double(), random(3, 11, 7)
    out = mlp(x, frozen)
    for i in range(3):
        network = plain_network(mlp, i, activation=nn.Tanh if how else nn.ReLU)
        assert_alike(out[i], network(x[i]), [x])
        mine = [p for layer in zip(mlp.weights, mlp.biases) for p in layer]
        if not frozen:
            for found, right in zip(gradients(out[i], mine), gradients(network(x[i]), list(network.parameters()))):
                torch.testing.assert_close(found[i].mT if right.ndim > 1 else found[i, 0], right, **EXACT)
                assert not found[[j for j in range(3) if j != i]].any()  # nothing reaches the other networks
    if frozen:
        assert all(g is None for g in torch.autograd.grad(out.sum(), mine, allow_unused=True))
    with torch.no_grad():
        torch.testing.assert_close(mlp(x), out, **EXACT)


@pytest.mark.parametrize("low", [False, True], ids=["float32", "bfloat16"])
def test_low_precision_stays_near_float64(monkeypatch, low):
    monkeypatch.setattr(fast, "has_bfloat16", lambda device: low)
    mlp, x = stacked([69, 256, 256, 24]), draw(0, 3, 100, 69)
    with torch.no_grad():
        out, plain = mlp(x), mlp(x, low=False)
        exact = mlp.double()(x.double())
    # Bfloat16 rounds to 1 part in 512 at each of weights, inputs, sums, of which errors average out; hidden layers only.
    error, without = ((v - exact).square().mean().sqrt() / exact.std() for v in (out, plain))
    assert out.dtype == plain.dtype == torch.float32 and without < 1e-6
    assert 1e-4 < error < 0.01 if low else error < 1e-6, error


@pytest.mark.parametrize("low", [False, True], ids=["float32", "bfloat16"])
def test_large_values_and_their_gradients_keep_their_precision(monkeypatch, low):
    """Values near 1,000, which bfloat16 alone would round to steps of 4."""
    monkeypatch.setattr(fast, "has_bfloat16", lambda device: low)
    mlp, x = stacked([69, 256, 256, 1]), draw(0, 3, 512, 69).requires_grad_()
    with torch.no_grad():
        mlp.weights[-1].mul_(100)
        mlp.biases[-1].add_(1000)
    aim = 1000 + 10 * draw(1, 3, 512, 1)

    def found(dtype):
        values, inputs = mlp.to(dtype)(x.to(dtype)), [*mlp.parameters(), x]
        return values.detach(), torch.autograd.grad((values - aim).square().mean(), inputs)

    (values, slopes), (exact, expected) = found(torch.float32), found(torch.float64)
    assert values.dtype == torch.float32 and exact.mean().item() == pytest.approx(1000, rel=0.05) and exact.std() > 5
    assert (values / exact - 1).abs().max() < (3e-4 if low else 1e-6)
    errors = [(g - right).norm() / right.norm() for g, right in zip(slopes, expected, strict=True)]
    assert all(g.dtype == torch.float32 for g in slopes)
    assert max(errors) < (0.08 if low else 1e-5), errors  # most of it from hidden units that rounding turns on or off
    assert max(errors[2], errors[5]) < 0.01, errors  # the last layer's own


def test_initial_weights_are_those_of_linear_layers():
    widths = [69, 200, 100, 1]
    mlp = stacked(widths, (0, 1, 0))
    for weight, bias, i, o in zip(mlp.weights, mlp.biases, widths, widths[1:]):
        assert weight.shape == (3, i, o) and bias.shape == (3, 1, o)
        assert torch.equal(weight[0], weight[2]) and torch.equal(bias[0], bias[2])  # of one seed
        assert not (weight[0] == weight[1]).any()
        both = torch.cat([weight, bias], 1)[:2].detach().reshape(-1)
        assert both.abs().max() <= 1 / math.sqrt(i)
        assert stats.kstest(both * math.sqrt(i), stats.uniform(-1, 2).cdf).pvalue > 1e-3
        torch.manual_seed(0)
        linear = nn.Linear(i, o)
        assert stats.ks_2samp(weight[:2].detach().reshape(-1), linear.weight.detach().reshape(-1)).pvalue > 1e-3
    for i, seed in enumerate((0, 1, 0)):
        assert all(torch.equal(p[i], q[0]) for p, q in zip(mlp.parameters(), stacked(widths, [seed]).parameters()))

"""The U-Net's layers against torch's own, which have another layout: values and gradients."""

import pytest
import torch
import torch.nn.functional as F

from pgdlib.unet import Convolution, GroupNorm, UNet

EXACT = dict(rtol=1e-10, atol=1e-12)


def random(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def gradients(y, inputs):
    return torch.autograd.grad((y * random(*y.shape, seed=9).detach()).sum(), inputs, retain_graph=True)


@pytest.mark.parametrize("rows", [1, 3], ids=["one level", "a level each"])
def test_group_norm_is_torchs_own(rows):
    norm = GroupNorm(4, 12).double()
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x, scale, shift = random(3, 5, 12), random(rows, 12, seed=1), random(rows, 12, seed=2)
    plain = F.group_norm(x.transpose(1, 2) + 2, 4, norm.weight, norm.bias, norm.eps).transpose(1, 2)
    for expected, found, inputs in (
        (plain, norm(x + 2), [x]),
        (plain * (1 + scale[:, None]) + shift[:, None], norm(x + 2, scale, shift), [x, scale, shift]),
    ):
        torch.testing.assert_close(found, expected, **EXACT)
        inputs = [*inputs, norm.weight, norm.bias]
        for mine, theirs in zip(gradients(found, inputs), gradients(expected, inputs), strict=True):
            torch.testing.assert_close(mine, theirs, **EXACT)


def test_group_norm_of_constant_groups_is_finite():
    x = torch.full((2, 8, 16), 3.0, requires_grad=True)
    y = GroupNorm(8, 16)(x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert y.abs().max() < 0.2 and gradient.isfinite().all()  # 3² cancels to 1e-7, beside eps = 1e-5


def test_group_norm_in_bfloat16_holds_where_the_mean_is_large():
    norm, x = GroupNorm(8, 64), random(4, 64, 64, dtype=torch.float32).detach() + 10
    x = x.bfloat16()
    expected = F.group_norm(x.float().transpose(1, 2), 8).transpose(1, 2)  # of the same, already rounded values
    off = (norm(x).float() - expected).square().mean().sqrt()
    assert off < 0.05  # the offset of -10 is itself rounded to 8 bits: 10 / 512 = 0.02


@pytest.mark.parametrize("unfold", [1, 10_000], ids=["unfolded", "as an image"])
@pytest.mark.parametrize("size", [1, 3, 5])
def test_convolution_is_torchs_own(monkeypatch, unfold, size):
    monkeypatch.setattr(Convolution, "UNFOLD", unfold)
    layer, x = Convolution(6, 4, size).double(), random(3, 7, 6)
    expected = F.conv1d(x.transpose(1, 2), layer.weight.transpose(1, 2), layer.bias, padding=size // 2).transpose(1, 2)
    found, inputs = layer(x), [x, layer.weight, layer.bias]
    torch.testing.assert_close(found, expected, **EXACT)
    for mine, theirs in zip(gradients(found, inputs), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(mine, theirs, **EXACT)


def test_cast_weights_follow_the_weights():
    layer, x = Convolution(8, 8, 3).requires_grad_(False), random(2, 4, 8, dtype=torch.float32).detach().bfloat16()
    first = layer(x)
    kept = layer._kept[1]
    assert (layer(x) == first).all() and layer._kept[1] is kept  # cast once
    for change in (
        lambda: layer.weight.mul_(2),
        lambda: layer.load_state_dict(Convolution(8, 8, 3).state_dict()),
        lambda: layer.bias.add_(1),
        lambda: setattr(layer.weight, "data", layer.weight.data.clone() * 3),
    ):
        change()
        expected = F.conv1d(x.transpose(1, 2), layer.weight.transpose(1, 2).bfloat16(), layer.bias.bfloat16(), padding=1)
        torch.testing.assert_close(layer(x), expected.transpose(1, 2), rtol=0.02, atol=0.02)


def test_one_noise_level_stands_for_all():
    net, x = UNet(5, 16).double(), random(4, 8, 5)
    torch.testing.assert_close(net(x, torch.full((1,), 0.3).double()), net(x, torch.full((4,), 0.3).double()), **EXACT)


def test_without_gradients_it_is_the_same():
    net, x, noise = UNet(5, 16), random(4, 8, 5, dtype=torch.float32), torch.randn(4)
    expected = net(x, noise)
    with torch.no_grad():
        torch.testing.assert_close(net(x, noise), expected, rtol=1e-5, atol=1e-6)


def test_bfloat16_is_near():
    net, x = UNet(71, 64).requires_grad_(False), random(8, 32, 71, dtype=torch.float32).detach()
    exact, low = net(x, torch.zeros(8)), net(x.bfloat16(), torch.zeros(8))
    assert low.dtype == torch.bfloat16
    assert (low.float() - exact).square().mean().sqrt() < 0.01 * exact.square().mean().sqrt()

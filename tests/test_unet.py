"""The U-Net: what it may depend on, and its number formats. Its layers are in test_fast."""

import pytest
import torch
from conftest import draw

from pgdlib.unet import UNet


@pytest.mark.parametrize("channels, blocks, kernel_size", [(71, 1, 3), (71, 2, 3), (12, 3, 5)])
def test_shapes_and_reach(channels, blocks, kernel_size):
    torch.manual_seed(0)
    net, x, noise = UNet(channels, 16, blocks, kernel_size).double(), draw(0, 3, 16, channels).double(), draw(1, 3).double()
    out = net(x.requires_grad_(), noise)
    assert out.shape == x.shape and not torch.allclose(net(x, noise + 1), out)  # the noise level matters
    for i in range(3):
        torch.testing.assert_close(net(x[i : i + 1], noise[i : i + 1])[0], out[i])
    (slope,) = torch.autograd.grad(out[1, 0].sum(), x)
    assert not slope[[0, 2]].any() and slope[1, -1].any()  # trajectories do not mix; the statistics of a norm see every step
    torch.testing.assert_close(net(x, noise[:1]), net(x, noise[:1].repeat(3)))  # one noise level stands for all
    with torch.no_grad():  # where layers work in place
        kept = x.clone()
        torch.testing.assert_close(net(x, noise), out)
        assert torch.equal(x, kept)


def test_what_it_cannot_do_is_refused():
    with pytest.raises(ValueError, match="horizon=7 is not allowed; it must be divisible by 2"):
        UNet(71, features=16, blocks=2)(torch.zeros(1, 7, 71), torch.zeros(1))
    for how in (dict(features=12), dict(features=16, blocks=0), dict(features=16, kernel_size=4)):
        with pytest.raises(ValueError, match=", ".join(f".*{k}={v}" for k, v in how.items())):
            UNet(71, **how)


def test_bfloat16_is_near():
    torch.manual_seed(0)
    net, x = UNet(71, 64).requires_grad_(False), draw(0, 8, 32, 71)
    exact, low = net(x, torch.zeros(8)), net(x.bfloat16(), torch.zeros(8))
    assert low.dtype == torch.bfloat16
    assert (low.float() - exact).square().mean().sqrt() < 0.01 * exact.square().mean().sqrt()

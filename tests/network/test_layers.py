import math

import pytest
import torch
from torch import nn

from carrara.network import layers
from carrara.network.layers import Downsample, ResidualBlock, RMSNorm, SwiGLU, Upsample, exact, sinusoidal_embedding


def test_the_root_mean_square_is_one_and_the_dtype_stays():
    norm = RMSNorm(8)
    x = 5 * torch.randn(3, 4, 8) + 2
    torch.testing.assert_close(norm(x).square().mean(-1), torch.ones(3, 4), atol=1e-4, rtol=0)
    torch.testing.assert_close(norm(x), x / x.square().mean(-1, keepdim=True).sqrt())  # the mean is not taken out
    with torch.autocast("cpu", torch.bfloat16):
        assert norm(x.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(norm(x.bfloat16()).float(), norm(x), atol=0.02, rtol=0.02)


def test_the_norm_of_float64_is_not_rounded_to_float32():
    x = torch.randn(3, 8, dtype=torch.float64)
    wanted = x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    torch.testing.assert_close(RMSNorm(8, elementwise_affine=False)(x), wanted, atol=1e-14, rtol=0)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("size", [1e-3, 1.0, 100.0])
def test_the_norm_on_the_cpu_is_torchs(affine, size):
    norm = RMSNorm(8, elementwise_affine=affine)
    if affine:
        nn.init.normal_(norm.weight)
    x = (size * torch.randn(3, 4, 8)).requires_grad_()
    ours, theirs = norm(x), nn.RMSNorm.forward(norm, x)
    torch.testing.assert_close(ours, theirs)
    weight, sources = torch.randn(3, 4, 8), [x, *norm.parameters()]
    gradients = (torch.autograd.grad((y * weight).sum(), sources) for y in (ours, theirs))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    assert torch.equal(norm(torch.zeros(2, 8)), torch.zeros(2, 8))


def test_the_gated_layer_is_that_of_the_paper():
    layer = SwiGLU(6, hidden=10)
    x = torch.randn(2, 3, 6)
    gate, value = x @ layer.gate.weight.T, x @ layer.up.weight.T
    torch.testing.assert_close(layer(x), (gate * gate.sigmoid() * value) @ layer.down.weight.T)


def test_time_embedding_is_that_of_the_paper():
    time = torch.tensor([0.0, 250.5, 1000.0])
    embedding = sinusoidal_embedding(time, 6)
    frequencies = [1.0, 10_000 ** (-1 / 3), 10_000 ** (-2 / 3)]
    for row, t in zip(embedding, time.tolist(), strict=True):
        wanted = [math.cos(t * f) for f in frequencies] + [math.sin(t * f) for f in frequencies]
        assert row.tolist() == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("channels", [1, 3, 8, 48, 320])
def test_groups_divide_the_channels(channels):
    groups = layers.norm_groups(channels)
    assert channels % groups == 0 and groups <= 32
    assert groups <= channels / 2 or channels == 1  # a norm of one channel takes out what is added to all its pixels
    assert layers.norm_groups(320) == 32  # as in Stable Diffusion


def test_a_residual_block_is_the_identity_once_its_last_convolution_is_zero():
    block = ResidualBlock(8, 8, embedding_width=4)
    layers.zero_(block.conv2)
    x = torch.randn(2, 8, 4, 4)
    assert torch.equal(block(x, torch.randn(2, 4)), x)


@pytest.mark.parametrize("width", [16, 64])
def test_the_embedding_reaches_a_residual_block(width):
    block = ResidualBlock(8, width, embedding_width=4)
    x = torch.randn(2, 8, 4, 4)
    a, b = block(x, torch.zeros(2, 4)), block(x, torch.ones(2, 4))
    assert a.shape == (2, width, 4, 4)
    assert (a - b).abs().mean() > 0.01


@pytest.mark.parametrize("padding", [(1, 1, 1, 1), (0, 1, 0, 1)])
def test_the_resolution_is_halved_and_doubled(padding):
    x = torch.randn(1, 4, 8, 8)
    assert Downsample(4, padding)(x).shape == (1, 4, 4, 4)
    assert Upsample(4)(x).shape == (1, 4, 16, 16)


def test_products_are_exact_where_asked_for_and_only_there():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        a, b = torch.randn(2, 64, 64)
        with torch.autocast("cpu", torch.bfloat16):
            with exact(a):
                assert torch.get_float32_matmul_precision() == "highest" and (a @ b).dtype == torch.float32
            assert torch.get_float32_matmul_precision() == "high" and (a @ b).dtype == torch.bfloat16
    finally:
        torch.set_float32_matmul_precision(before)

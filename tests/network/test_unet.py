from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from carrara.network.conditioning import Conditioning
from carrara.network.unet import SpatialTransformer, Stage, UNet
from tests.tiny import awake, unet

SIZES = Path(__file__).parents[2] / "conf" / "size"
STABLE_DIFFUSION_1 = 859_520_964  # parameters of the published U-Net
POOLED = 768 * 1280 + 1280


def conditioning(batch: int = 2, length: int = 3, width: int = 8) -> Conditioning:
    mask = torch.ones(batch, length, dtype=torch.bool)
    return Conditioning(torch.randn(batch, length, width), mask, torch.randn(batch, width))


def inputs(batch: int = 2) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 3, 8, 8), torch.linspace(10, 900, batch)


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def of_size(name: str, **changes: Any) -> UNet:
    size = yaml.safe_load((SIZES / f"{name}.yaml").read_text())
    network, width = size["latent_unet"], size["conditioner"]["width"]
    keys = ("channels", "attention", "num_blocks", "depth", "heads", "expansion")
    settings: dict[str, Any] = {
        "in_channels": 4,
        "resolution": size["resolution"] // size["autoencoder"]["downsampling"],
        "context_width": width,
        "pooled_width": width,
        "qk_norm": size["qk_norm"],
        "learned_positions": size["learned_positions"],
        **{key: network[key] for key in keys},
    }
    with torch.device("meta"):
        return UNet(**settings | changes)


def test_the_base_size_is_stable_diffusion_1():
    assert count(of_size("base", pooled_width=0)) == STABLE_DIFFUSION_1
    assert count(of_size("base")) == STABLE_DIFFUSION_1 + POOLED


def test_it_gives_the_shape_of_its_input():
    model = awake(unet(channels=[8, 8, 16], attention=[False, True, False], num_blocks=2, learned_positions=False))
    x = torch.randn(2, 3, 16, 8)  # not square, not that of training
    assert model(x, torch.tensor([1.0, 2.0]), conditioning()).shape == x.shape


def test_learned_positions_tell_pixels_apart():
    """Attention alone does not: whatever order the pixels are in, each gets the same answer."""
    x, text = torch.randn(1, 8, 4, 4), conditioning(1)

    def error(positions: tuple[int, int] | None) -> float:
        model = awake(
            SpatialTransformer(8, heads=2, context_width=8, depth=1, expansion=2, qk_norm=False, positions=positions)
        )
        with torch.no_grad():
            a = model(x, text.tokens, text.mask).flip(2)
            return float((a - model(x.flip(2), text.tokens, text.mask)).abs().max())

    assert error(None) < 1e-5 < 1e-3 < error((4, 4))


def test_checkpointing_recomputes_and_gives_the_same_gradients():
    (x, time), text = inputs(), conditioning()
    calls, gradients = [], []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = awake(unet(checkpointing=checkpointing)).train()
        counted: list[int] = []
        for stage in model.modules():
            if isinstance(stage, Stage):
                stage.residual.register_forward_pre_hook(lambda *_, counted=counted: counted.append(1))
        model(x, time, text).square().sum().backward()
        calls.append(len(counted))
        gradients.append([p.grad for p in model.parameters()])
    assert calls[1] == 2 * calls[0]
    for a, b in zip(*gradients, strict=True):
        assert a is not None and b is not None
        torch.testing.assert_close(a, b)


def test_every_parameter_is_trained():
    model = awake(unet())
    (x, time), text = inputs(), conditioning()
    model(x, time, text).square().sum().backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not idle


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention": [True]}, "network.channels has 2 levels, network.attention 1"),
        ({"resolution": 7}, "a resolution of 7 cannot be halved 1 times"),
        ({"heads": 3}, "is not 3 heads"),
        ({"heads": 0}, "is not 0 heads"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        unet(**changes)

"""Our U-Net against that of `diffusers`, both ways, at random weights."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from carrara.config import build
from carrara.errors import UserError
from carrara.network.conditioning import Conditioning
from carrara.network.unet import UNet
from carrara.published import unet as published
from tests.published.pipelines import UNETS, relative_error, unet

SIZES = [
    "tiny",
    "tiny, heads of one size",
    pytest.param("Stable Diffusion 1.5", marks=pytest.mark.slow),
    pytest.param("Stable Diffusion 2.1", marks=pytest.mark.slow),
]
FILE = Path("unet/config.json")


def node_of(model: UNet2DConditionModel, **changes: Any) -> dict[str, Any]:
    return published.node_of(FILE, json.loads(model.to_json_string()) | changes)


def ours_of(model: UNet2DConditionModel) -> UNet:
    """Shares the weights with theirs, for the large ones to fit into memory."""
    node = node_of(model)
    with torch.device("meta"):
        network = build(node)
    state = published.from_published(published.tidied(model.state_dict()), node)
    network.load_state_dict(state, strict=True, assign=True)
    return network.eval()


def inputs(model: UNet2DConditionModel) -> tuple[Tensor, Tensor, Conditioning]:
    tokens = torch.randn(1, 7, model.config.cross_attention_dim)
    return torch.randn(1, 4, 8, 8), tokens, Conditioning(tokens, torch.ones(1, 7, dtype=torch.bool), tokens[:, 0])


@pytest.mark.parametrize("name", SIZES)
@torch.no_grad()
def test_it_answers_as_theirs_does_both_ways(name):
    theirs = unet(name)
    ours = ours_of(theirs)
    x, tokens, conditioning = inputs(theirs)
    expected = {index: theirs(x, index, tokens).sample for index in (0, 500, 999)}
    assert relative_error(expected[0], expected[999]) > 1e-3  # the time matters
    for index, answer in expected.items():
        assert relative_error(ours(x, torch.tensor([index + 1.0]), conditioning), answer) < 1e-4
    node = node_of(theirs)
    state = published.to_published(ours.state_dict(), node)
    config = published.config_of(ours, node, theirs.config.sample_size)
    del theirs, ours
    with torch.device("meta"):
        back = UNet2DConditionModel.from_config(config)
    assert published.node_of(FILE, json.loads(back.to_json_string())) == node
    back.load_state_dict(state, strict=True, assign=True)
    for index, answer in expected.items():
        assert relative_error(back.eval()(x, index, tokens).sample, answer) < 1e-4


def test_stable_diffusions_own_settings():
    """Of the files as they are published, without weights."""
    with torch.device("meta"):
        first, second = (
            UNet2DConditionModel(in_channels=4, out_channels=4, **UNETS[f"Stable Diffusion {k}"])
            for k in ("1.5", "2.1")
        )
        counts = [sum(p.numel() for p in build(node_of(model)).parameters()) for model in (first, second)]
    assert counts == [sum(p.numel() for p in model.parameters()) for model in (first, second)]
    assert counts[0] == 859_520_964
    assert node_of(second)["heads"] == [5, 10, 20, 20] and node_of(second)["context_width"] == 1024


def test_settings_go_there_and_back():
    theirs = unet("tiny, heads of one size")
    node = node_of(theirs)
    again = published.node_of(FILE, published.config_of(ours_of(theirs), node, 8))
    assert again == node


def test_a_field_that_a_file_leaves_out_has_their_default():
    config = {
        "_class_name": "UNet2DConditionModel",
        "_name_or_path": "x",
        "sample_size": 64,
        "cross_attention_dim": 768,
    }
    node = published.node_of(FILE, config)
    with torch.device("meta"):
        theirs = UNet2DConditionModel.from_config(config)
    assert node == node_of(theirs) and node["heads"] == 8 and node["attention"] == [True, True, True, False]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("act_fn", "gelu"),
        ("center_input_sample", True),
        ("flip_sin_to_cos", False),
        ("freq_shift", 1),
        ("class_embed_type", "timestep"),
        ("addition_embed_type", "text_time"),
        ("only_cross_attention", True),
        ("mid_block_type", None),
        ("norm_eps", 1e-6),
        ("out_channels", 8),
        ("down_block_types", ["CrossAttnDownBlock2D", "SimpleCrossAttnDownBlock2D"]),
        ("up_block_types", ["CrossAttnUpBlock2D", "UpBlock2D"]),
        ("layers_per_block", [1, 2]),
        ("transformer_layers_per_block", [1, 2]),
        ("cross_attention_dim", [32, 32]),
        ("norm_num_groups", 16),
        ("block_out_channels", [96, 192]),
        ("a_field_of_tomorrow", 1),
    ],
)
def test_a_field_that_ours_cannot_be_is_named_with_its_file(field, value):
    with pytest.raises(UserError, match=r"unet/config\.json") as mistake:
        node_of(unet(), **{field: value})
    named = "norm_num_groups" if field == "block_out_channels" else field
    assert named in str(mistake.value) and "\n" not in str(mistake.value)


def test_a_wrong_number_of_heads_is_told_with_the_file():
    with pytest.raises(UserError, match=r"unet/config.json: .*heads"):
        node_of(unet(), attention_head_dim=[2, 4, 8])

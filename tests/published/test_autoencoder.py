"""Our KL auto-encoder against that of `diffusers`, both ways, at random weights."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL

from carrara.autoencoder.kl import KL
from carrara.config import build
from carrara.errors import UserError
from carrara.published import autoencoder as published
from tests.published.pipelines import relative_error, vae

SIZES = ["tiny", "shifted", pytest.param("Stable Diffusion", marks=pytest.mark.slow)]
FILE = Path("vae/config.json")
NEW_NAMES = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}


def config_of(model: AutoencoderKL) -> dict[str, Any]:
    return json.loads(model.to_json_string())


def ours_of(model: AutoencoderKL, state: dict[str, torch.Tensor] | None = None) -> KL:
    node = published.node_of(FILE, config_of(model))
    autoencoder = build(node)
    tidied = published.tidied(state or model.state_dict())
    autoencoder.load_state_dict(published.from_published(tidied, node, config_of(model)))
    return autoencoder.eval()


@pytest.mark.parametrize("name", SIZES)
@torch.no_grad()
def test_it_encodes_and_decodes_as_theirs_does(name):
    theirs = vae(name)
    ours = ours_of(theirs)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    posterior = theirs.encode(images).latent_dist
    noise = torch.randn_like(posterior.mean)
    shift = theirs.config.shift_factor or 0.0
    latents = (posterior.mean + posterior.std * noise - shift) * theirs.config.scaling_factor
    assert relative_error(ours.encode(images, noise), latents) < 1e-4
    assert (
        relative_error(ours.decode(latents), theirs.decode(latents / theirs.config.scaling_factor + shift).sample)
        < 1e-4
    )


@pytest.mark.parametrize("name", SIZES)
@torch.no_grad()
def test_theirs_answers_as_ours_with_statistics_of_each_channel(name):
    ours = ours_of(vae(name))
    ours.set_statistics(torch.tensor([0.5, -1.0, 2.0, 0.1]), torch.tensor([0.3, 4.0, 1.5, 9.0]))
    node = published.node_of(FILE, config_of(vae("tiny")) if name == "tiny" else config_of(vae(name)))
    theirs = AutoencoderKL.from_config(published.config_of(ours, node, 32)).eval()
    theirs.load_state_dict(published.to_published(ours.state_dict(), node), strict=True)
    assert theirs.config.scaling_factor == 1 and theirs.config.shift_factor is None
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    posterior = theirs.encode(images).latent_dist
    noise = torch.randn_like(posterior.mean)
    assert relative_error(posterior.mean + posterior.std * noise, ours.encode(images, noise)) < 1e-4
    assert relative_error(theirs.decode(noise).sample, ours.decode(noise)) < 1e-4


@torch.no_grad()
def test_attention_may_have_its_old_names_and_be_a_convolution():
    theirs = vae()
    old = {}
    for key, value in theirs.state_dict().items():
        for new, name in NEW_NAMES.items():
            if new in key:
                key, value = key.replace(new, name), value[..., None, None] if value.ndim == 2 else value
        old[key] = value
    assert old.keys() != theirs.state_dict().keys()
    images = torch.rand(1, 3, 16, 16) * 2 - 1
    assert torch.equal(ours_of(theirs, old).encode(images), ours_of(theirs).encode(images))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("act_fn", "gelu"),
        ("in_channels", 4),
        ("latents_mean", [0.0, 0, 0, 0]),
        ("use_quant_conv", False),
        ("mid_block_add_attention", False),
        ("down_block_types", ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]),
        ("up_block_types", ["UpDecoderBlock2D"]),
        ("norm_num_groups", 16),
        ("a_field_of_tomorrow", 1),
    ],
)
def test_a_field_that_ours_cannot_be_is_named_with_its_file(field, value):
    with pytest.raises(UserError, match=rf"^vae/config.json: .*{field}") as mistake:
        published.node_of(FILE, config_of(vae()) | {field: value})
    assert "\n" not in str(mistake.value)

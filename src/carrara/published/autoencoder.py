"""The KL auto-encoder of Stable Diffusion, `AutoencoderKL` of `diffusers`, to and from ours."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from carrara.autoencoder.kl import KL
from carrara.errors import UserError
from carrara.published.folder import read_fields
from carrara.published.names import inverse, renamed
from carrara.published.unet import norm_groups_of

CLASS, PART = "AutoencoderKL", "vae"
_TARGET = "carrara.autoencoder.kl.KL"
_DOWN, _UP = "DownEncoderBlock2D", "UpDecoderBlock2D"
_DEFAULTS: dict[str, Any] = {
    "in_channels": 3, "out_channels": 3, "down_block_types": [_DOWN], "up_block_types": [_UP],
    "block_out_channels": [64], "layers_per_block": 1, "act_fn": "silu", "latent_channels": 4, "norm_num_groups": 32,
    "sample_size": 32, "scaling_factor": 0.18215, "shift_factor": None, "latents_mean": None, "latents_std": None,
    "force_upcast": True, "use_quant_conv": True, "use_post_quant_conv": True, "mid_block_add_attention": True,
}  # fmt: skip
_READ = {
    "down_block_types", "up_block_types", "block_out_channels", "layers_per_block", "latent_channels",
    "norm_num_groups", "scaling_factor", "shift_factor",
}  # fmt: skip
_IGNORED = {"sample_size", "force_upcast"}  # of tiles and of half precision
_OLD_NAMES = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


def node_of(file: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of our auto-encoder for a `config.json`.

    Raises:
        UserError: it is of an auto-encoder that ours cannot be.
    """
    fields = read_fields(file, config, _DEFAULTS, _READ, _IGNORED)
    channels = fields["block_out_channels"]
    for key, block in (("down_block_types", _DOWN), ("up_block_types", _UP)):
        if fields[key] != [block] * len(channels):
            raise UserError(
                f"{file}: {key} is {fields[key]}; only {block}, once for each of block_out_channels, can be read here"
            )
    if not fields["scaling_factor"] > 0:
        raise UserError(f"{file}: scaling_factor is {fields['scaling_factor']}; it must be positive")
    if not isinstance(fields["shift_factor"], int | float | None):
        raise UserError(f"{file}: shift_factor is {fields['shift_factor']}; it must be a number")
    node = {
        "_target_": _TARGET,
        "latent_channels": fields["latent_channels"],
        "downsampling": 2 ** (len(channels) - 1),
        "channels": channels,
        "num_blocks": fields["layers_per_block"],
        "patch": 1,
        "kl_weight": 1e-6,  # Rombach et al. 2022, appendix G; no config says it
    }
    with torch.device("meta"):
        groups = norm_groups_of(_build(node))
    if groups != {fields["norm_num_groups"]}:
        raise UserError(
            f"{file}: norm_num_groups is {fields['norm_num_groups']}; only {max(groups)} with block_out_channels in "
            f"multiples of {2 * max(groups)} can be read here"
        )
    return node


def config_of(autoencoder: KL, node: Mapping[str, Any], resolution: int) -> dict[str, Any]:
    """The `config.json` of one of our auto-encoders with its statistics taken into the weights.

    Args:
        resolution: height and width of the pictures.
    """
    channels = list(node["channels"])
    return {
        "_class_name": CLASS,
        **_DEFAULTS,
        "down_block_types": [_DOWN] * len(channels),
        "up_block_types": [_UP] * len(channels),
        "block_out_channels": channels,
        "layers_per_block": node["num_blocks"],
        "latent_channels": node["latent_channels"],
        "norm_num_groups": norm_groups_of(autoencoder).pop(),
        "sample_size": resolution,
        "scaling_factor": 1.0,
    }


def tidied(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their state with the names that attention has today, and linear layers where those were 1×1 convolutions."""
    result = {}
    for key, value in state.items():
        for old, new in _OLD_NAMES.items():
            key = key.replace(old, new)
        result[key] = value.flatten(1) if ".to_" in key and value.ndim == 4 else value
    return result


def from_published(
    state: Mapping[str, Tensor], node: Mapping[str, Any], config: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Our state for their tidied one: (z − shift) · scaling becomes a mean and a standard deviation of each channel."""
    fields = {**_DEFAULTS, **config}
    size = node["latent_channels"]
    return {
        **renamed(state, dict(modules(node))),
        "latent_mean": torch.full((size,), float(fields["shift_factor"] or 0)),
        "latent_std": torch.full((size,), 1 / fields["scaling_factor"]),
    }


def to_published(state: Mapping[str, Tensor], node: Mapping[str, Any]) -> dict[str, Tensor]:
    """Their state of an auto-encoder whose latents are normalised already, since they have one scale for all channels.

    What follows the encoder is divided by the standard deviations, and what goes before the decoder multiplied.
    """
    mean, std = state["latent_mean"].double(), state["latent_std"].double()
    of_both = torch.cat([std, std.new_ones(len(std))])  # the log-variance is shifted, not scaled
    shift = torch.cat([mean / std, 2 * std.log()])
    folded = {key: value for key, value in state.items() if key not in ("latent_mean", "latent_std")}

    def put(key: str, value: Tensor) -> None:
        folded[key] = value.to(state[key].dtype)

    put("quant_conv.weight", state["quant_conv.weight"].double() / of_both[:, None, None, None])
    put("quant_conv.bias", state["quant_conv.bias"].double() / of_both - shift)
    weight = state["post_quant_conv.weight"].double()
    put("post_quant_conv.weight", weight * std[:, None, None])
    put("post_quant_conv.bias", state["post_quant_conv.bias"].double() + weight[:, :, 0, 0] @ mean)
    return renamed(folded, inverse(modules(node)))


def modules(node: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(their name, ours) of all layers of an auto-encoder with these settings."""
    levels, blocks = len(node["channels"]), node["num_blocks"]
    yield "encoder.conv_in", "encoder.0"
    place = 1  # in the sequence of our encoder
    for level in range(levels):
        for block in range(blocks):
            yield from _residual(f"encoder.down_blocks.{level}.resnets.{block}", f"encoder.{place}")
            place += 1
        if level < levels - 1:
            yield f"encoder.down_blocks.{level}.downsamplers.0.conv", f"encoder.{place}.conv"
            place += 1
    yield from _middle("encoder.mid_block", f"encoder.{place}")
    yield "encoder.conv_norm_out", f"encoder.{place + 1}"
    yield "encoder.conv_out", f"encoder.{place + 3}"  # after the activation
    yield "quant_conv", "quant_conv"
    yield "post_quant_conv", "post_quant_conv"
    yield "decoder.conv_in", "decoder.0"
    yield from _middle("decoder.mid_block", "decoder.1")
    place = 2
    for step in range(levels):
        for block in range(blocks + 1):
            yield from _residual(f"decoder.up_blocks.{step}.resnets.{block}", f"decoder.{place}")
            place += 1
        if step < levels - 1:
            yield f"decoder.up_blocks.{step}.upsamplers.0.conv", f"decoder.{place}.conv"
            place += 1
    yield "decoder.conv_norm_out", f"decoder.{place}"
    yield "decoder.conv_out", f"decoder.{place + 2}"


def _middle(theirs: str, ours: str) -> Iterator[tuple[str, str]]:
    yield from _residual(f"{theirs}.resnets.0", f"{ours}.0")
    yield f"{theirs}.attentions.0.group_norm", f"{ours}.1.norm"
    for a, b in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "out")):
        yield f"{theirs}.attentions.0.{a}", f"{ours}.1.attention.{b}"
    yield from _residual(f"{theirs}.resnets.1", f"{ours}.2")


def _residual(theirs: str, ours: str) -> Iterator[tuple[str, str]]:
    for layer in ("norm1", "conv1", "norm2", "conv2"):
        yield f"{theirs}.{layer}", f"{ours}.{layer}"
    yield f"{theirs}.conv_shortcut", f"{ours}.skip"


def _build(node: Mapping[str, Any]) -> KL:
    return KL(**{key: value for key, value in node.items() if key != "_target_"})

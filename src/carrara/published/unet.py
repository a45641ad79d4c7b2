"""The U-Net of Stable Diffusion 1 and 2, `UNet2DConditionModel` of `diffusers`, to and from ours."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from carrara.errors import UserError
from carrara.network.unet import UNet
from carrara.published.folder import read_fields
from carrara.published.names import inverse, renamed

CLASS, PART = "UNet2DConditionModel", "unet"
_TARGET = "carrara.network.unet.UNet"
_DOWN = {True: "CrossAttnDownBlock2D", False: "DownBlock2D"}
_UP = {True: "CrossAttnUpBlock2D", False: "UpBlock2D"}
_DEFAULTS: dict[str, Any] = {
    "sample_size": None, "in_channels": 4, "out_channels": 4, "center_input_sample": False, "flip_sin_to_cos": True,
    "freq_shift": 0, "down_block_types": [*[_DOWN[True]] * 3, _DOWN[False]],
    "mid_block_type": "UNetMidBlock2DCrossAttn", "up_block_types": [_UP[False], *[_UP[True]] * 3],
    "only_cross_attention": False,
    "block_out_channels": [320, 640, 1280, 1280], "layers_per_block": 2, "downsample_padding": 1,
    "mid_block_scale_factor": 1, "dropout": 0.0, "act_fn": "silu", "norm_num_groups": 32, "norm_eps": 1e-5,
    "cross_attention_dim": 1280, "transformer_layers_per_block": 1, "reverse_transformer_layers_per_block": None,
    "encoder_hid_dim": None, "encoder_hid_dim_type": None, "attention_head_dim": 8, "num_attention_heads": None,
    "dual_cross_attention": False, "use_linear_projection": False, "class_embed_type": None,
    "addition_embed_type": None, "addition_time_embed_dim": None, "num_class_embeds": None, "upcast_attention": False,
    "resnet_time_scale_shift": "default", "resnet_skip_time_act": False, "resnet_out_scale_factor": 1.0,
    "time_embedding_type": "positional", "time_embedding_dim": None, "time_embedding_act_fn": None,
    "timestep_post_act": None, "time_cond_proj_dim": None, "conv_in_kernel": 3, "conv_out_kernel": 3,
    "projection_class_embeddings_input_dim": None, "attention_type": "default", "class_embeddings_concat": False,
    "mid_block_only_cross_attention": None, "cross_attention_norm": None, "addition_embed_type_num_heads": 64,
}  # fmt: skip
_READ = {
    "in_channels", "out_channels", "down_block_types", "up_block_types", "block_out_channels", "layers_per_block",
    "cross_attention_dim", "transformer_layers_per_block", "attention_head_dim", "num_attention_heads",
    "norm_num_groups", "sample_size",
}  # fmt: skip
_IGNORED = {"upcast_attention", "use_linear_projection"}  # of half precision; a 1×1 convolution is a linear layer


def node_of(file: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of our U-Net for a `config.json`.

    Raises:
        UserError: it is of a U-Net that ours cannot be.
    """
    fields = read_fields(file, config, _DEFAULTS, _READ, _IGNORED)
    channels, down = fields["block_out_channels"], fields["down_block_types"]
    attention = [kind == _DOWN[True] for kind in down]

    def refuse(key: str, wanted: object) -> UserError:
        return UserError(f"{file}: {key} is {fields[key]}; only {wanted} can be read here")

    if fields["out_channels"] != fields["in_channels"]:
        raise refuse("out_channels", f"in_channels, {fields['in_channels']},")
    if down != [_DOWN[there] for there in attention] or len(down) != len(channels):
        raise refuse("down_block_types", f"{' and '.join(_DOWN.values())}, one of each of {len(channels)} levels,")
    if fields["up_block_types"] != [_UP[there] for there in reversed(attention)]:
        raise refuse("up_block_types", "those of down_block_types in reverse")
    for key in ("layers_per_block", "transformer_layers_per_block", "cross_attention_dim"):
        if not isinstance(fields[key], int):
            raise refuse(key, "one number for all levels")
    heads = fields["num_attention_heads"] or fields["attention_head_dim"]  # misnamed there: it is the number of heads
    node = {
        "_target_": _TARGET,
        "in_channels": fields["in_channels"],
        "resolution": fields["sample_size"] or 2 ** (len(channels) - 1),
        "channels": channels,
        "attention": attention,
        "num_blocks": fields["layers_per_block"],
        "depth": fields["transformer_layers_per_block"],
        "heads": heads,
        "expansion": 4,
        "context_width": fields["cross_attention_dim"],
        "pooled_width": 0,
        "qk_norm": False,
        "learned_positions": False,
        "checkpointing": False,
    }
    groups = norm_groups_of(_on_meta(file, node))
    if groups != {fields["norm_num_groups"]}:
        raise refuse("norm_num_groups", f"{max(groups)} with block_out_channels in multiples of {2 * max(groups)}")
    return node


def config_of(network: UNet, node: Mapping[str, Any], resolution: int) -> dict[str, Any]:
    """The `config.json` of one of our U-Nets that can be exported.

    Args:
        resolution: height and width of the latents.
    """
    attention = list(node["attention"])
    return {
        "_class_name": CLASS,
        **_DEFAULTS,
        "sample_size": resolution,
        "in_channels": node["in_channels"],
        "out_channels": node["in_channels"],
        "down_block_types": [_DOWN[there] for there in attention],
        "up_block_types": [_UP[there] for there in reversed(attention)],
        "block_out_channels": list(node["channels"]),
        "layers_per_block": node["num_blocks"],
        "transformer_layers_per_block": node["depth"],
        "attention_head_dim": node["heads"],
        "cross_attention_dim": node["context_width"],
        "norm_num_groups": norm_groups_of(network).pop(),
        "use_linear_projection": True,
    }


def tidied(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their state with linear projections, where they may have been saved as 1×1 convolutions."""
    return {key: value.flatten(1) if key.endswith(_PROJECTIONS) else value for key, value in state.items()}


def from_published(state: Mapping[str, Tensor], node: Mapping[str, Any]) -> dict[str, Tensor]:
    """Our state for their tidied one; the network is told i where theirs is told i − 1."""
    return _retimed(renamed(state, dict(modules(node))), 1)


def to_published(state: Mapping[str, Tensor], node: Mapping[str, Any]) -> dict[str, Tensor]:
    """The inverse, with linear projections."""
    return renamed(_retimed(state, -1), inverse(modules(node)))


def norm_groups_of(network: nn.Module) -> set[int]:
    """The numbers of groups of its GroupNorms; theirs have one number for all."""
    return {module.num_groups for module in network.modules() if isinstance(module, nn.GroupNorm)}


def modules(node: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(their name, ours) of all layers of a U-Net with these settings."""
    blocks, depth, attention = node["num_blocks"], node["depth"], node["attention"]
    last = len(attention) - 1
    yield from _ENDS
    for level, there in enumerate(attention):
        for block in range(blocks):
            yield from _stage(f"down_blocks.{level}", block, f"down.{level}.{block}", depth if there else 0)
        yield f"down_blocks.{level}.downsamplers.0.conv", f"downsample.{level}.conv"
    yield from _stage("mid_block", 0, "middle", depth)
    yield from _residual("mid_block.resnets.1", "middle_residual")
    for step, there in enumerate(reversed(attention)):
        for block in range(blocks + 1):
            yield from _stage(f"up_blocks.{step}", block, f"up.{step}.{block}", depth if there else 0)
        if step < last:
            yield f"up_blocks.{step}.upsamplers.0.conv", f"upsample.{step}.conv"


_FIRST_LAYER = "time_embedding.0.weight"
_PROJECTIONS = (".proj_in.weight", ".proj_out.weight")
_ENDS = (
    ("conv_in", "conv_in"),
    ("time_embedding.linear_1", "time_embedding.0"),
    ("time_embedding.linear_2", "time_embedding.2"),
    ("conv_norm_out", "norm_out"),
    ("conv_out", "conv_out"),
)
_RESIDUAL = (
    ("norm1", "norm1"),
    ("conv1", "conv1"),
    ("time_emb_proj", "embed"),
    ("norm2", "norm2"),
    ("conv2", "conv2"),
    ("conv_shortcut", "skip"),
)
_AROUND = (("norm", "norm"), ("proj_in", "project_in"), ("proj_out", "project_out"))
_BLOCK = (
    ("norm1", "norm1"),
    ("norm2", "norm2"),
    ("norm3", "norm3"),
    *(
        (f"{theirs}.{their_layer}", f"{ours}.{our_layer}")
        for theirs, ours in (("attn1", "self_attention"), ("attn2", "cross_attention"))
        for their_layer, our_layer in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "out"))
    ),
    ("ff.net.0.proj", "feed_forward.up"),
    ("ff.net.2", "feed_forward.down"),
)


def _stage(theirs: str, block: int, ours: str, depth: int) -> Iterator[tuple[str, str]]:
    yield from _residual(f"{theirs}.resnets.{block}", f"{ours}.residual")
    if not depth:
        return
    around, inner = f"{theirs}.attentions.{block}", f"{ours}.transformer"
    yield from ((f"{around}.{a}", f"{inner}.{b}") for a, b in _AROUND)
    for k in range(depth):
        yield from ((f"{around}.transformer_blocks.{k}.{a}", f"{inner}.blocks.{k}.{b}") for a, b in _BLOCK)


def _residual(theirs: str, ours: str) -> Iterator[tuple[str, str]]:
    yield from ((f"{theirs}.{a}", f"{ours}.{b}") for a, b in _RESIDUAL)


def _retimed(state: Mapping[str, Tensor], delta: int) -> dict[str, Tensor]:
    """The first layer of the time embedding for a time that is larger by `delta`, with the same answer.

    A table's index i is our time i, and theirs counts from 0. The sinusoids of t − delta are those of t, each pair
    turned by an angle, so the turn can be taken into the layer's weights: W R(delta) e(t) = W e(t − delta).
    """
    weight = state[_FIRST_LAYER].double()
    half = weight.shape[1] // 2
    angle = delta * torch.exp(-math.log(10_000) / half * torch.arange(half, dtype=torch.float64))
    cos, sin = weight.chunk(2, dim=1)
    turned = torch.cat([cos * angle.cos() - sin * angle.sin(), cos * angle.sin() + sin * angle.cos()], dim=1)
    return {**state, _FIRST_LAYER: turned.to(state[_FIRST_LAYER].dtype)}


def _on_meta(file: Path, node: Mapping[str, Any]) -> UNet:
    try:
        with torch.device("meta"):
            return UNet(**{key: value for key, value in node.items() if key != "_target_"})
    except ValueError as error:
        raise UserError(f"{file}: {error}") from None

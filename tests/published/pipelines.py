"""Models of `diffusers` and `transformers` with random weights, and whole pipelines of them in a folder."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn

from carrara.diffusion.sampler import Ancestral
from carrara.pipeline.text_to_image import TextToImage

Module = TypeVar("Module", bound=nn.Module)

WIDTH, LENGTH = 32, 16  # of the captions' tokens
LETTERS = "abcdefghijklmnopqrstuvwxyz"
CAPTIONS = ["a red disc above a blue square", ""]
CROSS, PLAIN = ("CrossAttnDownBlock2D", "DownBlock2D"), ("CrossAttnUpBlock2D", "UpBlock2D")

UNETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "sample_size": 8,
        "down_block_types": CROSS,
        "up_block_types": PLAIN[::-1],
        "block_out_channels": (64, 128),
        "layers_per_block": 1,
        "cross_attention_dim": WIDTH,
        "attention_head_dim": 8,
    },
    "tiny, heads of one size": {
        "sample_size": 8,
        "down_block_types": (CROSS[0], CROSS[0], CROSS[1]),
        "up_block_types": (PLAIN[1], PLAIN[0], PLAIN[0]),
        "block_out_channels": (64, 128, 128),
        "layers_per_block": 2,
        "cross_attention_dim": WIDTH,
        "attention_head_dim": (2, 4, 4),
        "transformer_layers_per_block": 2,
        "use_linear_projection": True,
    },
    "Stable Diffusion 1.5": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    "Stable Diffusion 2.1": {
        "sample_size": 96,
        "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
        "upcast_attention": True,
    },
}
VAES: dict[str, dict[str, Any]] = {
    "tiny": {"block_out_channels": (64, 128), "layers_per_block": 1, "sample_size": 16},
    "shifted": {"block_out_channels": (64, 64, 128), "scaling_factor": 0.4, "shift_factor": 0.3},
    "Stable Diffusion": {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "sample_size": 512},
}


def unet(name: str = "tiny", **changes: Any) -> UNet2DConditionModel:
    return lively(UNet2DConditionModel(in_channels=4, out_channels=4, **UNETS[name] | changes))


def vae(name: str = "tiny", **changes: Any) -> AutoencoderKL:
    settings = VAES[name] | changes
    levels = len(settings["block_out_channels"])
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * levels, "up_block_types": ("UpDecoderBlock2D",) * levels}
    return lively(AutoencoderKL(**blocks, **settings))


def text_encoder(**changes: Any) -> transformers.CLIPTextModel:
    settings = {
        "vocab_size": len(tokenizer()),
        "hidden_size": WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": LENGTH,
        "eos_token_id": 2,  # as in the published file, where it is not the end token's
    }
    return lively(transformers.CLIPTextModel(transformers.CLIPTextConfig(**settings | changes)))


def tokenizer() -> transformers.CLIPTokenizer:
    pieces = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: k for k, piece in enumerate(pieces)}
    return transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=LENGTH)


def lively(module: Module) -> Module:
    """With norms and biases that are not the ones they start with."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return module.eval()


def scheduler(**changes: Any) -> DDIMScheduler:
    settings = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
    }
    return DDIMScheduler(**settings | changes)


def save_pipeline(folder: Path, unet_name: str = "tiny", vae_name: str = "tiny") -> StableDiffusionPipeline:
    """A whole pipeline, in evaluation mode, and its folder."""
    pipeline = StableDiffusionPipeline(
        vae=vae(vae_name),
        text_encoder=text_encoder(),
        tokenizer=tokenizer(),
        unet=unet(unet_name),
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return pipeline


def change_json(file: Path, **changes: Any) -> None:
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in content.items() if value != "leave out"}))


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def start(pipeline: TextToImage, captions: list[str]) -> Tensor:
    """What our sampler starts from, of seed 0."""
    seen: list[Tensor] = []

    class Seen(Ancestral):
        def __call__(self, denoise, x, *rest):
            seen.append(x)
            return x

    how = replace(pipeline.sampling, sampler=Seen())
    replace(pipeline, sampling=how)(captions, range(len(captions)), 0)
    return seen[0]

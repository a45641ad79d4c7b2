"""A trained run as a folder that `diffusers.StableDiffusionPipeline` opens."""

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor, nn

from carrara.autoencoder.base import Autoencoder
from carrara.autoencoder.kl import KL
from carrara.component import read_component
from carrara.conditioner.pretrained import Pretrained
from carrara.config import Config
from carrara.errors import UserError
from carrara.network.unet import UNet
from carrara.published import autoencoder as published_autoencoder
from carrara.published import scheduler
from carrara.published import unet as published_unet
from carrara.published.folder import CONFIG, INDEX, WEIGHTS

_ABSENT = ("feature_extractor", "image_encoder", "safety_checker")


def export_pipeline(
    folder: Path, config: Config, network: nn.Module, conditioner: nn.Module, autoencoder: Autoencoder
) -> None:
    """Writes the folder, whole or not at all.

    `diffusers` starts from noise of standard deviation 1 where our samplers start from sigma(1), which differs where
    the schedule does not end in noise alone.

    Args:
        config: of the run.

    Raises:
        UserError: the folder holds something already or cannot be made; or all that has no place in such a pipeline,
            with the keys.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"export={folder} is there already: name a new folder")
    node = _autoencoder_node(config)
    problems = [
        *_of_network(config["network"], network),
        *_of_autoencoder(node, autoencoder),
        *_of_conditioner(conditioner),
        *scheduler.problems_of(config["diffusion"]),
    ]
    if problems:
        raise UserError(
            f"export={folder}: Stable Diffusion's pipeline has no place for this model; it needs {'; '.join(problems)}"
        )
    assert isinstance(network, UNet) and isinstance(autoencoder, KL) and isinstance(conditioner, Pretrained)
    resolution = config["data"]["resolution"]
    latent = resolution // autoencoder.downsampling
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise UserError(f"export={folder} cannot be made: {error.strerror}") from None
    try:
        unet_node = config["network"]
        _write(
            made / published_unet.PART,
            published_unet.config_of(network, unet_node, latent),
            published_unet.to_published(network.state_dict(), unet_node),
        )
        _write(
            made / published_autoencoder.PART,
            published_autoencoder.config_of(autoencoder, node, resolution),
            published_autoencoder.to_published(autoencoder.state_dict(), node),
        )
        _write_json(made / "scheduler" / scheduler.FILE, scheduler.config_of(config["diffusion"]))
        tokenizer = conditioner.save(made / "text_encoder", made / "tokenizer")
        _write_json(made / INDEX, _index(tokenizer))
        made.chmod(0o755)  # mkdtemp keeps others out
        os.replace(made, folder)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _of_network(node: Mapping[str, Any], network: nn.Module) -> list[str]:
    if not isinstance(network, UNet):
        return ["network=unet"]
    wanted = {"learned_positions": False, "qk_norm": False, "pooled_width": 0, "expansion": 4}
    problems = [f"network.{key}={str(value).lower()}" for key, value in wanted.items() if node[key] != value]
    if len(published_unet.norm_groups_of(network)) > 1:
        problems.append("network.channels in multiples of 64")
    return problems


def _of_autoencoder(node: Mapping[str, Any], autoencoder: Autoencoder) -> list[str]:
    if not isinstance(autoencoder, KL):
        return ["autoencoder=kl"]
    problems = ["autoencoder.patch=1"] if node["patch"] != 1 else []
    if len(published_unet.norm_groups_of(autoencoder)) > 1:
        problems.append("autoencoder.channels in multiples of 64")
    return problems


def _of_conditioner(conditioner: nn.Module) -> list[str]:
    if not isinstance(conditioner, Pretrained) or not conditioner.is_clip:
        return ["conditioner=clip or open_clip"]
    problems = [] if conditioner.padding == "max_length" else ["conditioner.padding=max_length"]
    return problems if conditioner.layer is None else [*problems, "conditioner.layer=null"]


def _autoencoder_node(config: Config) -> Config:
    part = (config.get("part") or {}).get("autoencoder")
    return dict(config["autoencoder"] if part is None else read_component(Path(part), "autoencoder").config)


def _index(tokenizer: str) -> dict[str, Any]:
    return {
        "_class_name": "StableDiffusionPipeline",
        "unet": ["diffusers", published_unet.CLASS],
        "vae": ["diffusers", published_autoencoder.CLASS],
        "scheduler": ["diffusers", scheduler.CLASS],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", tokenizer],
        **{name: [None, None] for name in _ABSENT},
        "requires_safety_checker": False,
    }


def _write(folder: Path, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    _write_json(folder / CONFIG, config)
    contiguous = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    safetensors.torch.save_file(contiguous, folder / WEIGHTS, metadata={"format": "pt"})


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

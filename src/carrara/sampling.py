"""Sampling a trained run in another way than it was sampled in training."""

import difflib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from carrara.build import load_trained
from carrara.callback.checkpoint_file import digest, is_valid, newest_valid
from carrara.component import read_component
from carrara.config import Config, build, load_yaml
from carrara.diffusion.spacing import Uniform
from carrara.errors import UserError
from carrara.model.base import Model
from carrara.model.diffusion import DiffusionModel
from carrara.model.super_resolution import SuperResolutionModel
from carrara.model.unclip import UnCLIPModel
from carrara.run_folder import component_folder, find_run, is_finished

_OPTIONS = ("sampler", "spacing", "thresholding")
_VALUES = {
    "num_steps": ("num_steps",),
    "guidance_scale": ("guidance", "scale"),
    "guidance_rescale": ("guidance", "rescale"),
    "guidance_interval": ("guidance", "interval"),
}
_OF_PIPELINES = ("temperature", "top_k", "top_p", "candidates")  # and whatever of the others a pipeline has
SAMPLING_KEYS = (*_OPTIONS, *_VALUES, *_OF_PIPELINES)  # of generate.py and evaluate.py
_DENOISING = ("schedule", "parameterization")
_NUMBERS = ("temperature", "top_p", "guidance_scale")  # of pipelines


def load_weak(reference: str, config: Config, runs_dir: Path, device: torch.device) -> tuple[DiffusionModel, str]:
    """The weaker model of autoguidance, and the hash of its weights.

    Args:
        reference: a run, or a checkpoint of one.
        config: of the run that it guides.
        device: where it goes.

    Raises:
        UserError: there is none, or it denoises something else: other latents, schedule or target.
    """
    if "diffusion" not in config:
        raise UserError(f"{config['name']} is not guided: leave weak out")
    if config["diffusion"]["guidance"]["scale"] == 1:
        raise UserError(f"weak={reference} guides nothing where guidance_scale is 1")
    checkpoint = Path(reference) if reference.endswith(".ckpt") else None
    if checkpoint is not None and not is_valid(checkpoint):
        raise UserError(f"weak={reference} is no intact checkpoint, or its .sha256 is missing")
    folder = find_run(reference, runs_dir) if checkpoint is None else checkpoint.parent.parent
    theirs, model, _ = load_trained(folder, checkpoint=checkpoint)
    if not isinstance(model, DiffusionModel):
        raise UserError(f"weak={reference} trained {theirs['name']}, which makes no pictures")
    if isinstance(model, UnCLIPModel) or theirs["model"]["_target_"] != config["model"]["_target_"]:
        raise UserError(f"weak={reference} trained {theirs['name']}, which cannot guide {config['name']}")
    for key, mine, other in (
        *((f"diffusion.{key}", config["diffusion"][key], theirs["diffusion"][key]) for key in _DENOISING),
        ("data.resolution", config["data"]["resolution"], theirs["data"]["resolution"]),
        ("its auto-encoder", _latents(config), _latents(theirs)),
    ):
        if mine != other:
            raise UserError(f"weak={reference} cannot guide this run: {key} is {other}, here it is {mine}")
    if checkpoint is None:
        checkpoint = None if is_finished(folder) else newest_valid(folder / "checkpoints")
    card = read_component(component_folder(folder)).card if checkpoint is None else {"sha256": digest(checkpoint)}
    return model.to(device), card["sha256"]


def _latents(config: Config) -> object:
    part = (config.get("part") or {}).get("autoencoder")
    return config["autoencoder"] if part is None else read_component(Path(part)).card["sha256"]


def set_sampling(config: Config, conf_dir: Path, order: Mapping[str, Any]) -> None:
    """Other ways to sample in a run's config, where `order` has them and they are not None.

    Args:
        order: `sampler`, `spacing`, `thresholding`: options of `conf/diffusion/…`; `num_steps`; `guidance_…`: of the
            guidance; and what the run's pipeline has.

    Raises:
        UserError: a run that is not sampled, or not in that way, or an option that is not there.
    """
    given = {key: order[key] for key in SAMPLING_KEYS if order[key] is not None}
    if given and "pipeline" not in config:
        raise UserError(f"{config['name']} samples nothing: leave {', '.join(given)} out")
    for key, value in given.items():
        if key in config["pipeline"]:
            if key in _NUMBERS and not (isinstance(value, int | float) and math.isfinite(value)):
                raise UserError(f"{key} must be a number, not {value!r}")
            config["pipeline"][key] = value
        elif "diffusion" not in config or key in _OF_PIPELINES:
            raise UserError(f"{config['name']} is not sampled with a {key}: leave it out")
        elif key in _OPTIONS:
            config["diffusion"][key] = _option(conf_dir / "diffusion" / key, str(value))
        else:
            *path, last = _VALUES[key]
            node = config["diffusion"]
            for name in path:
                node = node[name]
            node[last] = value


def check_likelihood(config: Config, model: Model, likelihood_steps: Any) -> None:
    """The model has a likelihood of pixels, and its schedule so many steps.

    Raises:
        UserError: it has not, or it is no number of steps.
    """
    in_pixels = isinstance(model, DiffusionModel) and model.autoencoder.is_identity
    if not in_pixels or isinstance(model, SuperResolutionModel):
        raise UserError(f"{config['name']} is no diffusion of pixels, which likelihood_steps is for: leave it out")
    try:
        Uniform()(build(config["diffusion"]["schedule"]), likelihood_steps)
    except ValueError as error:
        raise UserError(f"likelihood_steps={likelihood_steps}: {error}") from None


def _option(group: Path, name: str) -> Config:
    there = sorted(p.stem for p in group.glob("*.yaml"))
    if name not in there:
        close = difflib.get_close_matches(name, there, 1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(there)}"
        raise UserError(f"{group.name}={name} is not known; {hint}")
    return load_yaml(group / f"{name}.yaml")

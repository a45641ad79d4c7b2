"""`python generate.py run=DIR prompt="…"`: pictures, a grid and the strip of intermediate steps."""

import logging
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import torch
from PIL import Image

from carrara.build import build_pipeline, load_trained
from carrara.command_line import quote_free_text, split_flags
from carrara.config import Config, compose
from carrara.data.decode import DecodeError, decode_image
from carrara.errors import UserError
from carrara.model.conditioned import Conditioned
from carrara.model.diffusion import DiffusionModel
from carrara.pipeline.base import Pipeline, Watch
from carrara.pipeline.pictures import save_grid, save_strip, to_uint8
from carrara.pipeline.source import Source
from carrara.pipeline.super_resolution import Enlarged, SuperResolution
from carrara.pipeline.text_to_image import TextToImage
from carrara.pipeline.unclip import UnCLIP
from carrara.precision import default_device, set_arithmetic
from carrara.published.export import export_pipeline
from carrara.run_folder import find_run, made_folder
from carrara.sampling import load_weak, set_sampling

NAME = "generate"
_NO_PROMPT = "prompt is missing: prompt='a caption' or [several,of,them], or export=FOLDER"
_STRIP_ROWS = 4
_STRENGTH = 0.75  # with a picture and no mask

_log = logging.getLogger(__name__)


def main(conf_dir: Path, argv: list[str]) -> None:
    """Generates as `argv` says.

    Raises:
        UserError: a mistake in the command, or a run that makes no pictures.
    """
    flags, overrides = split_flags(quote_free_text(argv))
    if flags:
        print((conf_dir / f"{NAME}.yaml").read_text())
        return
    order = compose(conf_dir, NAME, overrides).config
    if all(order[key] is None for key in ("prompt", "image", "export")):
        raise UserError(_NO_PROMPT)
    folder = find_run(str(order["run"]), Path(order["runs_dir"]))
    for key in ("count", "num_frames", "batch_size"):
        if not isinstance(order[key], int) or order[key] < 1:
            raise UserError(f"{key} must be a whole number from 1 on, not {order[key]!r}")
    config, model, modules = load_trained(folder)
    if order["export"] is not None:
        if not isinstance(model, DiffusionModel):
            raise UserError(f"export: {folder} trained {config['name']}, and diffusers has no pipeline for it")
        predictor = model.exported  # LoRA's additions are in its weights
        assert isinstance(predictor, Conditioned)
        export_pipeline(Path(order["export"]), config, predictor.network, predictor.conditioner, model.autoencoder)
        _log.info("%s opens with diffusers.StableDiffusionPipeline.from_pretrained", order["export"])
        if order["prompt"] is None:
            return
    set_sampling(config, conf_dir, order)
    set_arithmetic()
    device = default_device()
    weak = None if order["weak"] is None else load_weak(str(order["weak"]), config, Path(order["runs_dir"]), device)[0]
    for module in (model, *modules.values()):
        module.to(device)
    pipeline, captions = _job(order, config, build_pipeline(config, modules, weak)(model))
    out = made_folder(Path(order["out"] or folder / "generated" / f"{datetime.now():%Y-%m-%d_%H-%M-%S}"))
    watch = Watch(pipeline, order["num_frames"], _STRIP_ROWS)
    pictures = []
    for start in range(0, len(captions), order["batch_size"]):
        chunk = captions[start : start + order["batch_size"]]
        indices = range(start, start + len(chunk))
        on_step = watch if start == 0 else None
        made = pipeline(chunk, indices, order["seed"], on_step)
        pictures.append(to_uint8(made).cpu())
    images = torch.cat(pictures)
    for k, image in enumerate(images):  # the name says the number, never the caption: it is not ours
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(out / f"{k:04d}.png")
        (out / f"{k:04d}.txt").write_text(captions[k] + "\n", encoding="utf-8")
    columns = order["count"] if len(captions) > order["count"] else min(8, order["count"])
    save_grid(out / "grid.png", images, columns, [{"caption": caption, "correct": None} for caption in captions])
    if isinstance(pipeline, TextToImage) and pipeline.source is not None:
        watch.frames[-1] = pipeline.source.paste(watch.frames[-1])  # the last is the picture
    if watch.frames:
        frames = torch.stack([to_uint8(frame) for frame in watch.frames])
        save_strip(out / "strip.png", frames, captions[:_STRIP_ROWS], watch.times)
    names = "grid.png and strip.png" if watch.frames else "grid.png"
    _log.info("%d pictures, %s in %s", len(images), names, out)


def _job(order: Config, config: Config, pipeline: Pipeline | SuperResolution) -> tuple[Pipeline, list[str]]:
    """The pipeline with the pictures that it starts from, if any; and the caption of each picture that it is to make.

    Raises:
        UserError: no caption where one is needed, or a picture where none is; or a run that makes no pictures.
    """
    resolution, count = config["data"]["resolution"], order["count"]
    prompts = [order["prompt"]] if isinstance(order["prompt"], str) else [str(p) for p in order["prompt"] or []]
    replaces = order["mask"] is not None or order["strength"] is not None
    if isinstance(pipeline, SuperResolution):
        if replaces or not isinstance(order["image"], str):
            raise UserError(f"{config['name']} enlarges one picture: image=FILE, without mask and strength")
        small = _picture("image", order, resolution // pipeline.model.factor).float() / 127.5 - 1
        return Enlarged(pipeline, small[None]), [prompt for prompt in prompts or [""] for _ in range(count)]
    if not isinstance(pipeline, Pipeline):
        raise UserError(f"model={config['name']} makes no pictures; name a run that does")
    if isinstance(pipeline, UnCLIP) and (replaces or order["image"] is not None):
        paths = order["image"] if isinstance(order["image"], list) else [order["image"]]
        if prompts or replaces or not 1 <= len(paths) <= 2:
            raise UserError(
                f"{config['name']} varies one picture, or goes from one to another: image=FILE or image=[FILE,FILE], "
                "without prompt, mask and strength"
            )
        images = torch.stack([_picture("image", {"image": path}, resolution).float() / 127.5 - 1 for path in paths])
        return pipeline.varying(images, count), [""] * count
    if not prompts:
        raise UserError(_NO_PROMPT)
    source = _source(order, resolution)
    if source is not None:
        if not isinstance(pipeline, TextToImage):
            raise UserError(f"{config['name']} does not start from a picture: leave image out")
        pipeline = replace(pipeline, source=source)
    return pipeline, [prompt for prompt in prompts for _ in range(count)]


def _source(order: Config, resolution: int) -> Source | None:
    if isinstance(order["image"], list):
        raise UserError("image=[…]: this run starts from one picture: image=FILE")
    if order["image"] is None:
        if order["mask"] is not None or order["strength"] is not None:
            raise UserError("mask and strength are of a picture to start from: give image=FILE")
        return None
    image = _picture("image", order, resolution).float() / 127.5 - 1
    mask = None if order["mask"] is None else _picture("mask", order, resolution).float().mean(0) > 127.5
    if mask is not None and not mask.any():
        raise UserError(f"mask={order['mask']} is black everywhere: what is white is painted anew")
    strength = order["strength"]
    if strength is None:
        strength = _STRENGTH if mask is None else 1.0
    if not isinstance(strength, int | float) or not 0 < strength <= 1:
        raise UserError(f"strength must be a number above 0 and at most 1, not {strength!r}")
    return Source(image, strength, mask)


def _picture(key: str, order: Config, resolution: int) -> torch.Tensor:
    """uint8 (3, R, R), the largest square at the centre."""
    try:
        return torch.from_numpy(decode_image(Path(str(order[key])).read_bytes(), resolution))
    except OSError as error:
        raise UserError(f"{key}={order[key]} cannot be read: {error.strerror}") from None
    except DecodeError as error:
        raise UserError(f"{key}={order[key]} is no picture that can be used: {error}") from None

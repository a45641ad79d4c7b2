"""One process of `evaluate.py`: its share of the chunks, and on rank 0 the result."""

import json
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from carrara.build import build_scores, load_trained
from carrara.callback.generation import PictureScores
from carrara.callback.likelihood import Likelihood
from carrara.callback.score import Setting
from carrara.classifier.cnn import CNN
from carrara.component import load_component
from carrara.config import Config, build, load_yaml
from carrara.data.decode import DecodeError, decode_caption, decode_image
from carrara.data.module import ShardData
from carrara.errors import UserError
from carrara.evaluator.clip import CLIP
from carrara.metric.extractor import InceptionExtractor
from carrara.precision import choose_precision, local_device, set_arithmetic
from carrara.rank import rank_main
from carrara.sampling import check_likelihood, load_weak, set_sampling
from carrara.score_card import extractor_hashes, folder_card, score_card

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def run(out: Path) -> None:
    """Scores as `out/evaluate.yaml` says; rank 0 writes `out/scores.json`."""
    order = load_yaml(out / "evaluate.yaml")
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    settings = order["trainer"]
    device = local_device(settings["accelerator"])
    if world > 1:
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    set_arithmetic()
    precision, _ = choose_precision(settings["precision"], settings["accelerator"])

    def autocast() -> AbstractContextManager[object]:
        half = torch.float16 if precision == "16-mixed" else torch.bfloat16
        return torch.autocast(device.type, half, enabled=precision != "32-true")

    def setting(data: ShardData) -> Setting:
        return Setting(data.validation, rank, world, device, autocast, out if rank == 0 else None, 0)

    with torch.no_grad():
        made = _of_run if order["run"] is not None else _of_folder
        card = made(order, precision, setting)
    if rank == 0:
        (out / "scores.json").write_text(json.dumps(card, indent=1), encoding="utf-8")
    if world > 1:
        torch.distributed.destroy_process_group()


def _of_run(order: Config, precision: str, setting: Callable[[ShardData], Setting]) -> dict[str, Any]:
    config, model, modules = load_trained(Path(order["run"]), order["part"]["classifier"])
    set_sampling(config, Path(order["conf_dir"]), order)
    set_scores(config, order)
    data: ShardData = build(config["data"])
    where = setting(data)
    model.to(where.device)
    weak, weak_hash = None, None
    if order["weak"] is not None:
        weak, weak_hash = load_weak(str(order["weak"]), config, Path(order["runs_dir"]), where.device)
    scores: dict[str, float] = {}
    scorers = build_scores(config, data, modules, weak)
    steps = order["likelihood_steps"]
    if steps is not None:
        check_likelihood(config, model, steps)
        score = config["callback"]["score"]
        scorers.append(Likelihood(steps, score["seed"], score["num_images"], score["batch_size"]))
    for one in scorers:
        scores |= one(model, where)
    return score_card(config, data.validation.fingerprint, precision, scores, weak_hash, steps)


def set_scores(config: Config, order: Config) -> None:
    """Other settings for all of a run's scores that have them.

    Raises:
        UserError: a key that none of them has.
    """
    scores = [node for node in config["callback"].values() if isinstance(node, dict)]
    for key in ("num_images", "seed", "batch_size", "inception"):
        if order[key] is None:
            continue
        having = [node for node in scores if key in node]
        if not having and key != "batch_size":  # which is always given
            raise UserError(f"{config['name']} is not scored with {key}: leave it out")
        for node in having:
            node[key] = order[key]


def _of_folder(order: Config, precision: str, setting: Callable[[ShardData], Setting]) -> dict[str, Any]:
    data: ShardData = build({**order["data"], "seed": 0})  # of training's order; null, the run's, is no number
    where = setting(data)
    part, device = order["part"], where.device
    evaluator, classifier = (
        None if part[kind] is None else load_component(Path(part[kind]), kind)[0].to(device)
        for kind in ("evaluator", "classifier")
    )
    assert isinstance(evaluator, CLIP | None) and isinstance(classifier, CNN | None)
    inception = None if order["inception"] is None else InceptionExtractor(order["inception"]).to(device)
    files = sorted(p for p in Path(order["images"]).iterdir() if p.suffix.lower() in _SUFFIXES)
    files = [p for p in files if p.stem not in ("grid", "strip")][: order["num_images"]]
    if len(files) < 2:
        raise UserError(
            f"images={order['images']} holds {len(files)} pictures ({', '.join(_SUFFIXES)}); two are needed"
        )
    captioned = all(p.with_suffix(".txt").is_file() for p in files)
    judge = PictureScores(evaluator, classifier, inception, data.prompt_check, len(files), device, captioned)
    if not judge.metrics:
        raise UserError("nothing judges these pictures: give part.evaluator=…, part.classifier=… or inception=…")
    resolution = data.decoding.resolution
    for chunk in where.chunks(np.arange(len(files)), order["batch_size"]):
        pictures = torch.stack([_picture(files[k], resolution) for k in chunk.tolist()]).to(device)
        captions = [decode_caption(files[k].with_suffix(".txt").read_bytes()) for k in chunk] if captioned else []
        with where.autocast():
            judge.add_generated(pictures, captions, torch.from_numpy(chunk))
    real = data.validation.held_out
    for chunk in where.chunks(real, order["batch_size"]):
        batch = data.validation.take(chunk)
        with where.autocast():
            judge.add_real(batch["images"].to(where.device), batch["positions"])
    extractors = extractor_hashes(part, order["inception"])
    counts = len(real), len(files)
    return folder_card(judge.compute(), extractors, data.validation.fingerprint, precision, *counts, resolution)


def _picture(path: Path, resolution: int) -> torch.Tensor:
    try:
        return torch.from_numpy(decode_image(path.read_bytes(), resolution))
    except DecodeError as error:
        raise UserError(f"{path} cannot be decoded: {error}") from None


if __name__ == "__main__":
    rank_main(run)

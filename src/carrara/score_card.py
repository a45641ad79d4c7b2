"""Scores together with all they depend on, as `scores.json` holds them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from carrara.component import read_component
from carrara.config import Config
from carrara.metric.extractor import INCEPTION_SHA256
from carrara.metric.fingerprint import ScoreFingerprint, few_images_warning, score_fingerprint
from carrara.parts import STAGES

SAMPLING = ("sampler", "spacing", "guidance", "thresholding", "num_steps")  # what shapes pictures besides the model


def score_card(
    config: Config,
    data: str,
    precision: str,
    scores: dict[str, float],
    weak: str | None = None,
    likelihood_steps: int | None = None,
) -> dict[str, Any]:
    """The card of a run's scores.

    Args:
        config: the run's, as it was sampled.
        data: fingerprint of the validation set.
        precision: as `choose_precision` has it.
        scores: by name, `val/…` and `val_seen/…`.
        weak: the hash of the model that guided, with autoguidance.
        likelihood_steps: of the bits per dimension, if they were computed.
    """
    score, diffusion = config["callback"]["score"], config.get("diffusion")
    sampling = None
    if diffusion is not None:
        sampling = {key: diffusion[key] for key in SAMPLING} | {"weak": weak, "likelihood_steps": likelihood_steps}
    if "corruption" in config:
        sampling = {"corruption": config["corruption"]}
    if "pipeline" in config:
        part = config.get("part") or {}
        stages = {name: read_component(Path(part[name])).card["sha256"] for name in STAGES if part.get(name)}
        sampling = (sampling or {}) | {"pipeline": config["pipeline"], "stages": stages}
    counts = {name: int(value) for name, value in scores.items() if name.endswith(("/num_images", "/num_captions"))}
    number = max(counts.values(), default=0)
    fields = ScoreFingerprint(
        extractors=extractor_hashes(config.get("part") or {}, score.get("inception")),
        data=data,
        num_real=number,
        num_generated=number,
        resize=f"{config['data']['resolution']} {config['data']['crop']}",
        sampling=sampling,
        ema=True,
        seed=score.get("seed"),
        precision=precision,
    )
    return _card(scores, fields, counts)


def folder_card(
    scores: dict[str, float],
    extractors: dict[str, str],
    data: str,
    precision: str,
    num_real: int,
    num_generated: int,
    resolution: int,
) -> dict[str, Any]:
    """The card of the scores of a folder of pictures.

    Args:
        extractors: of `extractor_hashes`.
        data, precision: as of `score_card`.
    """
    fields = ScoreFingerprint(
        extractors, data, num_real, num_generated, f"{resolution} center", None, None, None, precision
    )
    return _card(scores, fields, {"num_real": num_real, "num_generated": num_generated})


def extractor_hashes(part: Mapping[str, Any], inception: str | None) -> dict[str, str]:
    """Hashes of what judges, by the names that metrics have."""
    parts = {"evaluator": "evaluator", "cnn": "classifier"}
    cards = {name: read_component(Path(part[kind]), kind).card for name, kind in parts.items() if part.get(kind)}
    hashes = {name: str(card["sha256"]) for name, card in cards.items()}
    return hashes if inception is None else {**hashes, "inception": INCEPTION_SHA256}


def _card(scores: dict[str, float], fields: ScoreFingerprint, counts: dict[str, int]) -> dict[str, Any]:
    digest, facts = score_fingerprint(fields)
    distances = [name for name in scores if name.rpartition("/")[2].startswith(("fd_", "fid_"))]
    fewest = min(fields.num_real, fields.num_generated)
    numbers = {name: counts.get(f"{name.rpartition('/')[0]}/num_images", fewest) for name in distances}
    warnings = [warning for name, number in numbers.items() if (warning := few_images_warning(name, number))]
    return {
        "scores": scores,
        "fingerprint": facts,
        "hash": digest,
        "num_images": counts,
        "warnings": warnings,
    }

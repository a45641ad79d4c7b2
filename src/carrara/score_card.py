"""Scores together with all they depend on, as `scores.json` holds them."""

from pathlib import Path
from typing import Any

from carrara.component import read_component
from carrara.config import Config
from carrara.metric.fingerprint import ScoreFingerprint, few_images_warning, score_fingerprint


def score_card(config: Config, scores: dict[str, float]) -> dict[str, Any]:
    """The card of a run's scores.

    Args:
        config: the run's, as it was sampled.
        scores: by name, `val/…` and `val_seen/…`.
    """
    evaluator = (config.get("part") or {}).get("evaluator")
    score, diffusion = config["callback"]["score"], config.get("diffusion")
    counts = {name: int(value) for name, value in scores.items() if name.endswith(("/num_images", "/num_captions"))}
    number = max(counts.values(), default=0)
    fields = ScoreFingerprint(
        extractor="none" if evaluator is None else read_component(Path(evaluator), "evaluator").card["sha256"],
        num_real=number,
        num_generated=number,
        resize=f"{config['data']['resolution']} {config['data']['crop']}",
        sampler=None if diffusion is None else repr(sorted(diffusion["sampler"].items())),
        num_steps=score.get("num_steps"),
        guidance_scale=None if diffusion is None else diffusion["guidance"]["scale"],
        ema=True,
        seed=score.get("seed"),
    )
    return _card(scores, fields, counts)


def folder_card(
    scores: dict[str, float], evaluator_hash: str, num_real: int, num_generated: int, resolution: int
) -> dict[str, Any]:
    """The card of the scores of a folder of pictures."""
    fields = ScoreFingerprint(
        evaluator_hash, num_real, num_generated, f"{resolution} center", None, None, None, None, None
    )
    return _card(scores, fields, {"num_real": num_real, "num_generated": num_generated})


def _card(scores: dict[str, float], fields: ScoreFingerprint, counts: dict[str, int]) -> dict[str, Any]:
    digest, facts = score_fingerprint(fields)
    distances = [name for name in scores if name.rpartition("/")[2].startswith(("fd_", "fid_"))]
    number = min(fields.num_real, fields.num_generated)
    warnings = [warning for name in distances if (warning := few_images_warning(name, number))]
    return {
        "scores": scores,
        "fingerprint": facts,
        "hash": digest,
        "num_images": counts,
        "warnings": warnings,
    }

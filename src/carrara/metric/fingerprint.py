"""What a score depends on: scores with different fingerprints are not compared."""

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

RECOMMENDED_IMAGES = 10_000


@dataclass(frozen=True)
class ScoreFingerprint:
    """Everything that shapes a score besides the model. None where it does not apply (a folder of images).

    extractors: the hash of each by its name ("evaluator", "cnn", "inception"). data: fingerprint of the real
    images and captions. num_real, num_generated: images counted, over all ranks. resize: how
    images came to the extractor's input ("none", "inside", "64 bicubic antialias", ...). sampling (sampler, spacing,
    steps, guidance, ...: plain data), ema (whether averaged weights were used), seed: how they were generated.
    precision: of the networks that generate and judge ("32-true", "bf16-mixed", ...).
    """

    extractors: dict[str, str]
    data: str
    num_real: int
    num_generated: int
    resize: str
    sampling: dict[str, Any] | None
    ema: bool | None
    seed: int | None
    precision: str


def score_fingerprint(fields: ScoreFingerprint) -> tuple[str, dict[str, Any]]:
    """A 12-digit hash of the fields, the same in every process and version, and the fields themselves."""
    values = asdict(fields)
    text = json.dumps(_floats(values), sort_keys=True, ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12], values


def _floats(value: Any) -> Any:
    """A guidance scale of 7 is one of 7.0."""
    if isinstance(value, dict):
        return {key: _floats(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_floats(inner) for inner in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def few_images_warning(metric: str, num_images: int) -> str | None:
    """A line for the log if `metric`, a Fréchet distance, is over fewer than `RECOMMENDED_IMAGES` images.

    It is biased upwards, the more so the fewer the images (Chong & Forsyth 2020).
    """
    if num_images >= RECOMMENDED_IMAGES:
        return None
    return (
        f"{metric} is over {num_images} images, and biased upwards below {RECOMMENDED_IMAGES}: compare it "
        "at equal counts only, and read the kernel distance beside it"
    )

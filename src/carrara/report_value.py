"""What a run scored, held-out beside seen."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any

from carrara.report_folder import Metrics, number
from carrara.report_number import EN_DASH, MINUS, format_count, format_value, interval
from carrara.report_score import ATTRIBUTES, SCORES, Score, is_score, score_of, split_name


@dataclass(frozen=True)
class Value:
    """The last value of a score, the number of images it was measured on (None: not recorded), and when."""

    name: str  # with its split: val/psnr
    value: float
    images: int | None
    when: str

    @property
    def score(self) -> Score:
        return score_of(self.name)

    @property
    def text(self) -> str:
        return format_value(self.value, self.score.unit)

    @property
    def interval(self) -> str:
        """The 95 % interval, where the score is a share of images."""
        if self.score.unit != "share" or not self.images or not 0 <= self.value <= 1:
            return ""
        low, high = interval(self.value, self.images)
        return f"{100 * low:.1f}{EN_DASH}{format_value(high, 'share')}"

    @property
    def share(self) -> float | None:
        """The length of its bar, 0 to 1, where it has one."""
        return self.value if self.score.unit == "share" and 0 <= self.value <= 1 else None

    @property
    def warning(self) -> str:
        if not isfinite(self.value):
            return "not a number: see the curves"
        return self.score.warning if self.images is not None and self.images < self.score.few else ""


def _images(name: str, given: Mapping[str, object], metrics: Metrics) -> int | None:
    """The images behind a score: listed by its split, else the fewest listed, else logged."""
    split = split_name(name)[0]
    listed = {key: int(value) for key, value in given.items() if isinstance(value, int | float) and isfinite(value)}
    if listed:
        return listed.get(f"{split}/num_images", min(listed.values()))
    logged = metrics.last(f"{split}/num_images") or metrics.last("val/num_images")
    return int(logged) if logged and isfinite(logged) else None


def read_values(metrics: Metrics, final: Mapping[str, Any]) -> dict[str, Value]:
    """The scores by full name, the important first: from `final` (scores.json, a card) or last logged."""
    values: dict[str, Value] = {}
    for name in metrics.names():
        row = next(row for row in reversed(metrics.rows) if name in row)
        if is_score(name):
            when = f"epoch {format_count(row['epoch'])}" if "epoch" in row else "last logged"
            values[name] = Value(name, row[name], _images(name, {}, metrics), when)
    scores, counts = final.get("scores"), final.get("num_images")
    for given, entry in scores.items() if isinstance(scores, dict) else ():
        value, name = number(entry), "/".join(split_name(str(given)))
        if value is not None and is_score(name):
            images = _images(name, counts if isinstance(counts, dict) else {}, metrics)
            values[name] = Value(name, value, images, "final scores")
    rank = {key: place for place, key in enumerate(SCORES)}
    return dict(sorted(values.items(), key=lambda item: rank.get(split_name(item[0])[1], len(rank))))


def headline(values: Mapping[str, Value]) -> list[Value]:
    """The scores on held-out data that deserve a tile; the loss only where there is nothing better."""
    major = [f"val/{key}" for key in SCORES if key not in ATTRIBUTES and key != "loss"]
    return [values[name] for name in major if name in values] or [v for k, v in values.items() if k == "val/loss"]


@dataclass(frozen=True)
class Row:
    """Held-out beside seen; the gap between them is what the model has not learned to generalise."""

    key: str
    held_out: Value | None
    seen: Value | None

    @property
    def score(self) -> Score:
        return score_of(f"val/{self.key}")

    @property
    def is_attribute(self) -> bool:
        return self.key in ATTRIBUTES

    @property
    def images(self) -> str:
        """The number of images beside the scores: one number, or two where the splits differ."""
        counts = [value.images for value in (self.held_out, self.seen) if value]
        return " / ".join(dict.fromkeys(format_value(count) if count is not None else "?" for count in counts))

    @property
    def gap(self) -> str:
        if not self.held_out or not self.seen or not isfinite(self.held_out.value - self.seen.value):
            return ""
        difference = self.held_out.value - self.seen.value
        text = f"{100 * difference:+.1f} pt" if self.score.unit == "share" else f"{difference:+.3g}"
        return text.replace("-", MINUS) if difference else "0"


def score_rows(values: Mapping[str, Value]) -> list[Row]:
    keys = dict.fromkeys(split_name(name)[1] for name in values)
    return [Row(key, values.get(f"val/{key}"), values.get(f"val_seen/{key}")) for key in keys]

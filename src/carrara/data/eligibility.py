"""Which samples are fit to train on."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from carrara.data.manifest import Manifest
from carrara.data.shard_index import CAPTION
from carrara.errors import UserError


@dataclass(frozen=True)
class _Filter:
    """`sign · value >= sign · limit`, where the value is of the first of these columns that the data has."""

    columns: tuple[tuple[str, ...], ...]  # one or two values, each under its possible names
    sign: int
    reason: str


_WIDTHS, _HEIGHTS = ("WIDTH", "original_width", "width"), ("HEIGHT", "original_height", "height")
FILTERS = {
    "min_width": _Filter((_WIDTHS,), 1, "width"),
    "min_height": _Filter((_HEIGHTS,), 1, "height"),
    "max_aspect": _Filter((_WIDTHS, _HEIGHTS), -1, "aspect"),
    "min_similarity": _Filter((("similarity",),), 1, "similarity"),
    "max_punsafe": _Filter((("punsafe",),), -1, "punsafe"),
    "max_pwatermark": _Filter((("pwatermark",),), -1, "pwatermark"),
    "min_aesthetic": _Filter((("aesthetic",),), 1, "aesthetic"),
}


def eligible(
    manifest: Manifest, caption: str | None, filters: Mapping[str, float | None]
) -> tuple[NDArray[np.bool_], Counter[str]]:
    """Which samples have what training needs: (N,) bool, and how many are left out for which (first) reason.

    Filters that are null are off. A null or absent value fails its filter (`punsafe_null`). Raises UserError
    for an unknown filter, for a column that no shard has, and if nothing is left.
    """
    reasons: Counter[str] = Counter()
    masks = []
    for why in judge(manifest, caption, filters):
        masks.append(why == "")
        reasons.update(why[why != ""].tolist())
    mask = np.concatenate(masks)
    if not mask.any():
        histogram = ", ".join(f"{reason} {count}" for reason, count in reasons.most_common())
        raise UserError(f"no sample of {len(mask)} passes data.filters: {histogram}")
    return mask, reasons


def judge(manifest: Manifest, caption: str | None, filters: Mapping[str, float | None]) -> Iterator[NDArray[np.str_]]:
    """Of each shard in turn, why its samples are left out: (n,) the first reason, "" for those that are not."""
    active = {name: limit for name, limit in filters.items() if limit is not None}
    chosen = _columns(manifest, filters, active)
    for shard in range(len(manifest.shards)):
        index = manifest.index(shard)
        why = np.full(len(index.keys), "", dtype="U32")
        size = index.members[:, CAPTION, 1]
        if caption is not None:
            why[size < 0] = "no_caption"
            why[size == 0] = "empty_caption"
        absent = np.full(len(index.keys), np.nan)
        for name, columns in chosen.items():
            rule = FILTERS[name]
            values = [index.columns.get(column, absent) for column in columns]
            value = values[0] if len(values) == 1 else _aspect(*values)
            why[(why == "") & np.isnan(value)] = f"{rule.reason}_null"
            why[(why == "") & ~(rule.sign * value >= rule.sign * active[name])] = rule.reason
        yield why


def _columns(manifest: Manifest, filters: Mapping[str, object], active: Mapping[str, float]) -> dict[str, list[str]]:
    """The columns of the data that each active filter looks at."""
    for name in filters:
        if name not in FILTERS:
            raise UserError(f"data.filters.{name} is not known; the filters are {', '.join(FILTERS)}")
    present: set[str] = set()
    if active:
        for shard in range(len(manifest.shards)):
            present.update(manifest.index(shard).columns)
    chosen: dict[str, list[str]] = {}
    for name in active:
        for names in FILTERS[name].columns:
            of_data = next((column for column in names if column in present), None)
            if of_data is None:
                raise UserError(f"data.filters.{name}: no shard has the column '{names[0]}'; set it to null")
            chosen.setdefault(name, []).append(of_data)
    return chosen


def _aspect(width: NDArray[np.float64], height: NDArray[np.float64]) -> NDArray[np.float64]:
    """Longer over shorter side; NaN unless both are positive."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.maximum(width, height) / np.minimum(width, height)
    return np.where((width > 0) & (height > 0), ratio, np.nan)

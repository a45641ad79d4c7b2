"""What frozen parts make of a sample, kept beside it in its shard as KEY.cache.npz."""

import io
import json
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from carrara.data.decode import DecodeError
from carrara.errors import UserError

SUFFIX = ".cache.npz"
Facts = dict[str, str | int | None]  # what it was made with: field -> value


class Cached(NamedTuple):
    """Normalised posterior of the picture, mean and std (C, h, w), and the encoded caption, tokens (L, D), pooled (P,).

    The text is None where it was not encoded, or is not asked for.
    """

    mean: NDArray[np.floating]
    std: NDArray[np.floating]
    tokens: NDArray[np.floating] | None = None
    pooled: NDArray[np.floating] | None = None


def pack(cached: Cached, facts: Facts) -> bytes:
    """The member's bytes, its floats of `facts["dtype"]`."""
    arrays = {name: value.astype(str(facts["dtype"])) for name, value in cached._asdict().items() if value is not None}
    buffer = io.BytesIO()
    np.savez(buffer, facts=np.array(_text(facts)), **arrays)
    return buffer.getvalue()


def unpack(data: bytes, facts: str, text: bool) -> Cached:
    """What `pack` was given, of float32.

    Raises DecodeError: broken_cache, or other_cache where it was made with other facts than those of the shard.
    """
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            if str(arrays["facts"]) != facts:
                raise DecodeError("other_cache")
            names = ("mean", "std", "tokens", "pooled") if text else ("mean", "std")
            return Cached(*(arrays[name].astype(np.float32) for name in names))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError):
        raise DecodeError("broken_cache") from None


def facts_of(data: bytes) -> str:
    """The facts of a member, "" of a broken one."""
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            return _text(json.loads(str(arrays["facts"])))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError):
        return ""


def check_facts(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises UserError naming the first field of `wanted` in which a cache differs."""
    for field, value in wanted.items():
        if found.get(field) != value:
            raise UserError(
                f"data.urls: the shards' cache was made with {field}={_short(found.get(field))}, and this run has "
                f"{_short(value)}: make it anew with shards.py do=cache, or set data.use_cache=false"
            )


def _short(value: object) -> str:
    return f"{value[:12]}…" if isinstance(value, str) and len(value) == 64 else str(value)


def _text(facts: Facts) -> str:
    return json.dumps(facts, sort_keys=True)

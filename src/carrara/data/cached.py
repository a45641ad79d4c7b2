"""What frozen parts make of a sample, kept beside it in its shard as KEY.cache.npz."""

import io
import json
import math
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from carrara.data.decode import DecodeError
from carrara.errors import UserError

SUFFIX = ".cache.npz"
Facts = dict[str, str | int | None]  # what it was made with: field -> value
_LONGEST_FACTS = 4096  # characters


class Cached(NamedTuple):
    """Normalised posterior of the picture, mean and std (C, h, w), and the encoded caption, tokens (L, D), pooled (P,).

    The text is None where it was not encoded, or is not asked for.
    """

    mean: NDArray[np.floating]
    std: NDArray[np.floating]
    tokens: NDArray[np.floating] | None = None
    pooled: NDArray[np.floating] | None = None


def pack(cached: Cached, facts: Facts) -> bytes:
    """The member's bytes, its floats of `facts["dtype"]`; what is packed has the shapes that the facts tell."""
    arrays = {name: value.astype(str(facts["dtype"])) for name, value in cached._asdict().items() if value is not None}
    buffer = io.BytesIO()
    np.savez(buffer, facts=np.array(_text(facts)), **arrays)
    return buffer.getvalue()


def unpack(data: bytes, facts: str, text: bool) -> Cached:
    """What `pack` was given, of float32.

    Raises DecodeError: broken_cache, or other_cache where it was made with other facts than those of the shard.
    """
    names = ("mean", "std", "tokens", "pooled") if text else ("mean", "std")
    try:
        found, *arrays = _arrays(data, "facts", *names)
        cached = Cached(*(array.astype(np.float32) for array in arrays))
        same, fits = str(found) == facts, _fits(cached, json.loads(facts))
    except Exception:  # as in `_arrays`
        raise DecodeError("broken_cache") from None
    if not (same and fits):
        raise DecodeError("broken_cache" if same else "other_cache")
    return cached


def facts_of(data: bytes) -> str:
    """The facts of a member, "" of a broken one."""
    try:
        (found,) = _arrays(data, "facts")
        facts = json.loads(str(found))
        return _text(facts) if isinstance(facts, dict) and len(str(found)) <= _LONGEST_FACTS else ""
    except Exception:  # as in `_arrays`
        return ""


def decoded_bytes(facts: Mapping[str, Any], text: bool) -> int:
    """What a sample takes at most once it is unpacked, of the facts that a run has found to be its own."""
    values = 2 * math.prod(map(int, facts["latent_shape"].split("x")))
    return 4 * (values + ((facts["max_length"] + 1) * facts["text_width"] if text else 0))


def shape_text(shape: Sequence[int]) -> str:
    """A shape as facts tell it: `4x8x8`."""
    return "x".join(map(str, shape))


def _arrays(data: bytes, *names: str) -> list[NDArray[Any]]:
    """Those of the member. Whatever zipfile and numpy's parser raise on bytes that come from anyone is for the caller.

    Members that are compressed are refused: some kilobytes of them make gigabytes.
    """
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [archive.getinfo(f"{name}.npy") for name in names]
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise zipfile.BadZipFile
        return [np.lib.format.read_array(io.BytesIO(archive.read(member)), allow_pickle=False) for member in members]


def _fits(cached: Cached, facts: Mapping[str, Any]) -> bool:
    """Whether the shapes are those that the facts tell, so that samples of one shard make a batch."""
    mean, std, tokens, pooled = cached
    text = tokens is None or pooled is None or (tokens.shape[1:] == pooled.shape == (facts["text_width"],))
    return text and shape_text(mean.shape) == shape_text(std.shape) == facts["latent_shape"]


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

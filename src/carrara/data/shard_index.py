"""What is in one shard: one walk over the tar's headers, kept as an index."""

import json
import math
import mmap
import os
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from carrara.data.cached import SUFFIX, facts_of
from carrara.data.decode import picture_size
from carrara.data.tar_walk import Member, Problem, walk
from carrara.errors import UserError

IMAGE, CAPTION, JSON, CACHED = range(4)  # a sample's members, rows of `ShardIndex.members`
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
COLUMNS = (  # numbers kept of a sample's JSON, as LAION and img2dataset name them
    "WIDTH", "HEIGHT", "original_width", "original_height", "width", "height",
    "similarity", "punsafe", "pwatermark", "aesthetic",
)  # fmt: skip
_PROBED, _END = 32, 1024  # samples, and bytes of each member: a picture's first bytes are tables, its last ones pixels


@dataclass(frozen=True)
class ShardIndex:
    """Where the samples of one shard lie. A sample is what has an image; its key is the member's name without
    the suffix.

    keys: (n,) UTF-8 bytes. members: (n, 4, 2) int64, [IMAGE | CAPTION | JSON | CACHED] -> offset, size; size -1
    where there is none. pictures: (n, 2) height and width by their headers, 0 where they have none; (0, 2) where nobody
    asked for them: they take as long as all the rest, and on a cold disk every picture's first page. columns: those of
    COLUMNS that occur, (n,) float64, NaN where null or absent. problems: what is wrong with members and samples that
    are not here or not whole. bytes, sha256: of a remote shard as it was when it was scanned.
    cached: the facts of the first sample that has a cache, see `cached`.
    ends: CRC-32 of the last 1024 bytes of all members of some 32 samples, evenly spread: of two shards with the same
    keys and sizes it tells the pictures apart, unless they differ in a few of them only.
    """

    keys: NDArray[np.bytes_]
    members: NDArray[np.int64]
    pictures: NDArray[np.int32]
    columns: dict[str, NDArray[np.float64]]
    problems: list[Problem]
    bytes: int = 0
    sha256: str = ""
    cached: str = ""
    ends: int = 0

    def save(self, path: Path) -> None:
        """Atomically."""
        # JSON, as in an array of text all were as wide as the widest
        about = json.dumps([self.problems, self.bytes, self.sha256, self.cached, self.ends])
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".partial", delete=False) as file:
            try:
                np.savez(
                    file,
                    keys=self.keys,
                    members=self.members,
                    pictures=self.pictures,
                    names=np.array(list(self.columns), dtype=np.str_),
                    values=np.array(list(self.columns.values()), dtype=np.float64),
                    about=np.frombuffer(about.encode(), dtype=np.uint8),
                )
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise

    @classmethod
    def load(cls, path: str | Path) -> "ShardIndex":
        with np.load(path, allow_pickle=False) as arrays:
            problems, size, sha256, cached, ends = json.loads(arrays["about"].tobytes())
            return cls(
                keys=arrays["keys"],
                members=arrays["members"],
                pictures=arrays["pictures"],
                columns=dict(zip(arrays["names"].tolist(), arrays["values"], strict=True)),
                problems=[Problem(*row) for row in problems],
                bytes=size,
                sha256=sha256,
                cached=cached,
                ends=ends,
            )


def scan(path: str, caption: str | None = ".txt", pictures: bool = False) -> ShardIndex:
    """Index one local shard. `caption` is a member's suffix (`.txt`), a key of the JSON, or None for none; `pictures`
    asks for their sizes.

    Raises UserError, naming the file, if it cannot be read or is no tar.
    """
    try:
        with open(path, "rb") as file:
            return scan_file(file, path, caption, pictures)
    except OSError as error:
        raise UserError(f"{path} cannot be read as a tar file: {error}") from None


def scan_file(file: BinaryIO, name: str, caption: str | None, pictures: bool) -> ShardIndex:
    """As `scan`, of an open file; `name` is for messages."""
    try:
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            found, problems = walk(data)
            if not found:
                raise UserError(f"{name} is not a tar file; remove it or fetch it again")
            return _group(found, problems, data, caption, pictures)
    except ValueError as error:  # mmap of an empty file
        raise UserError(f"{name} cannot be read as a tar file: {error}") from None


def _group(
    found: list[Member], problems: list[Problem], data: mmap.mmap, caption: str | None, pictures: bool
) -> ShardIndex:
    samples: dict[str, list[tuple[int, int]]] = {}
    caption_suffix = caption if caption is not None and caption.startswith(".") else ".txt"
    last, scattered = None, set()
    for member in found:
        key, part = _split_name(member.name, caption_suffix)
        if part < 0:
            continue
        if key != last and key in samples:
            scattered.add(key)
        last = key
        sample = samples.setdefault(key, [(0, -1)] * 4)
        if sample[part][1] >= 0:
            problems.append(Problem(member.name, "duplicate_key"))
        else:
            sample[part] = (member.offset, member.size)
    problems += [Problem(key, "unsorted") for key in samples if key in scattered]  # whole here, split by others
    problems += [Problem(key, "no_image") for key, parts in samples.items() if parts[IMAGE][1] < 0]
    samples = {key: parts for key, parts in samples.items() if parts[IMAGE][1] >= 0}
    columns: dict[str, NDArray[np.float64]] = {}
    for row, (key, parts) in enumerate(samples.items()):
        offset, size = parts[JSON]
        facts: dict[str, Any] = {}
        if size >= 0:
            try:
                loaded = json.loads(data[offset : offset + size])
                facts = loaded if isinstance(loaded, dict) else {}
            except (ValueError, RecursionError):
                problems.append(Problem(key, "broken_json"))
        for name in COLUMNS:
            if name in facts:
                if name not in columns:
                    columns[name] = np.full(len(samples), np.nan)
                columns[name][row] = _number(facts[name])
                if facts[name] is not None and not _is_number(facts[name]):
                    problems.append(Problem(key, f"no_number_{name}"))
        if caption is not None and not caption.startswith("."):
            text = facts.get(caption)
            has_text = isinstance(text, str) and bool(text.strip())
            parts[CAPTION] = parts[JSON] if has_text else (0, 0 if isinstance(text, str) else -1)
    places = [parts[IMAGE] for parts in samples.values()] if pictures else []
    caches = [parts[CACHED] for parts in samples.values()]
    sizes = [picture_size(data[offset : offset + size]) for offset, size in places]
    return ShardIndex(
        keys=np.array([key.encode("utf-8", "surrogateescape") for key in samples], dtype=np.bytes_),
        members=np.array(list(samples.values()), dtype=np.int64).reshape(-1, 4, 2),
        pictures=np.array(sizes, dtype=np.int32).reshape(-1, 2),
        columns=columns,
        problems=problems,
        cached=next((facts_of(data[offset : offset + size]) for offset, size in caches if size >= 0), ""),
        ends=_ends(list(samples.values()), data),
    )


def _ends(samples: list[list[tuple[int, int]]], data: mmap.mmap) -> int:
    crc = 0
    for parts in samples[:: -(-len(samples) // _PROBED) or 1]:
        for offset, size in parts:
            crc = zlib.crc32(data[offset + max(0, size - _END) : offset + max(0, size)], crc)
    return crc


def _split_name(name: str, caption_suffix: str) -> tuple[str, int]:
    """Key and part of a member, -1 for none of ours. A known suffix is cut off; other dots are the key's."""
    lower = name.lower()
    if lower.endswith(SUFFIX):
        key, part = name[: -len(SUFFIX)], CACHED
    elif lower.endswith(caption_suffix):
        key, part = name[: -len(caption_suffix)], CAPTION
    else:
        key, dot, suffix = name.rpartition(".")
        suffix = dot + suffix.lower()
        part = JSON if suffix == ".json" else IMAGE if suffix in IMAGE_SUFFIXES else -1
    base = key.rpartition("/")[2]
    if (
        not base or base.startswith(".") or key.startswith("__")
    ):  # hidden files, macOS's ._ files, webdataset's __meta__
        return key, -1
    return key, part


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(value: object) -> float:
    """A JSON number; NaN for null, text, true, false, infinities and what no float can hold."""
    try:
        number = float(value) if _is_number(value) else math.nan  # type: ignore[arg-type]
    except OverflowError:
        return math.nan
    return number if math.isfinite(number) else math.nan

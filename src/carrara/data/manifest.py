"""What is in the shards: one walk over each tar's headers, kept as an index."""

import hashlib
import json
import logging
import math
import mmap
import multiprocessing
import os
import tempfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from carrara.data.cache import ShardCache, is_remote, size_of
from carrara.data.decode import picture_size
from carrara.data.tar_walk import Member, Problem, walk
from carrara.errors import UserError

_log = logging.getLogger(__name__)

IMAGE, CAPTION, JSON = range(3)  # a sample's members, rows of `ShardIndex.members`
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
COLUMNS = (  # numbers kept of a sample's JSON, as LAION and img2dataset name them
    "WIDTH", "HEIGHT", "original_width", "original_height", "width", "height",
    "similarity", "punsafe", "pwatermark", "aesthetic",
)  # fmt: skip
_VERSION = 3  # of the index files; another number makes them anew
_SERIAL = 4  # up to so many shards are scanned without other processes


@dataclass(frozen=True)
class ShardIndex:
    """Where the samples of one shard lie. A sample is what has an image; its key is the member's name without
    the suffix.

    keys: (n,) UTF-8 bytes. members: (n, 3, 2) int64, [IMAGE | CAPTION | JSON] -> offset, size; size -1 where
    there is none. pictures: (n, 2) height and width by their headers, 0 where they have none. columns: those of
    COLUMNS that occur, (n,) float64, NaN where null or absent. problems: what is wrong with members and samples that
    are not here or not whole. bytes, sha256: of a remote shard as it was when it was scanned.
    """

    keys: NDArray[np.bytes_]
    members: NDArray[np.int64]
    pictures: NDArray[np.int32]
    columns: dict[str, NDArray[np.float64]]
    problems: list[Problem]
    bytes: int = 0
    sha256: str = ""

    def save(self, path: Path) -> None:
        """Atomically."""
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".partial", delete=False) as file:
            try:
                np.savez(
                    file,
                    keys=self.keys,
                    members=self.members,
                    pictures=self.pictures,
                    names=np.array(list(self.columns), dtype=np.str_),
                    values=np.array(list(self.columns.values()), dtype=np.float64),
                    problems=np.array(self.problems, dtype=np.str_).reshape(-1, 2),
                    remote=np.array([str(self.bytes), self.sha256], dtype=np.str_),
                )
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise

    @classmethod
    def load(cls, path: str | Path) -> "ShardIndex":
        with np.load(path, allow_pickle=False) as arrays:
            return cls(
                keys=arrays["keys"],
                members=arrays["members"],
                pictures=arrays["pictures"],
                columns=dict(zip(arrays["names"].tolist(), arrays["values"], strict=True)),
                problems=[Problem(*row) for row in arrays["problems"].tolist()],
                bytes=int(arrays["remote"][0]),
                sha256=str(arrays["remote"][1]),
            )


def scan(path: str, caption: str | None = ".txt") -> ShardIndex:
    """Index one local shard. `caption` is a member's suffix (`.txt`), a key of the JSON, or None for none.

    Raises UserError, naming the file, if it cannot be read or is no tar.
    """
    try:
        with open(path, "rb") as file:
            return _scan_file(file, path, caption)
    except OSError as error:
        raise UserError(f"{path} cannot be read as a tar file: {error}") from None


def _scan_file(file: BinaryIO, name: str, caption: str | None) -> ShardIndex:
    try:
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            found, problems = walk(data)
            if not found:
                raise UserError(f"{name} is not a tar file; remove it or fetch it again")
            return _group(found, problems, data, caption)
    except ValueError as error:  # mmap of an empty file
        raise UserError(f"{name} cannot be read as a tar file: {error}") from None


def _group(found: list[Member], problems: list[Problem], data: mmap.mmap, caption: str | None) -> ShardIndex:
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
        sample = samples.setdefault(key, [(0, -1)] * 3)
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
    places = [parts[IMAGE] for parts in samples.values()]
    pictures = [picture_size(data[offset : offset + size]) for offset, size in places]
    return ShardIndex(
        keys=np.array([key.encode("utf-8", "surrogateescape") for key in samples], dtype=np.bytes_),
        members=np.array(list(samples.values()), dtype=np.int64).reshape(-1, 3, 2),
        pictures=np.array(pictures, dtype=np.int32).reshape(-1, 2),
        columns=columns,
        problems=problems,
    )


def _split_name(name: str, caption_suffix: str) -> tuple[str, int]:
    """Key and part of a member, -1 for none of ours. A known suffix is cut off; other dots are the key's."""
    lower = name.lower()
    if lower.endswith(caption_suffix):
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
    """A JSON number; NaN for null, text, true, false and what no float can hold."""
    try:
        return float(value) if _is_number(value) else math.nan  # type: ignore[arg-type]
    except OverflowError:
        return math.nan


@dataclass(frozen=True)
class Shard:
    """What is kept in memory of a shard, whatever its size."""

    path: str  # or address
    name: str
    bytes: int
    mtime_ns: int | None  # None of a remote one
    sha256: str  # of a remote one
    index_path: str
    num_samples: int
    digest: str  # of keys, offsets and sizes: the shard's content as far as a scan sees it
    problems: dict[str, int]  # reason -> count


@dataclass(frozen=True)
class Manifest:
    """The shards in order. A sample's id counts through them; shard s begins with id starts[s]."""

    shards: tuple[Shard, ...]

    @property
    def starts(self) -> NDArray[np.int64]:
        """(S + 1,) first id of each shard, and the number of samples."""
        return np.concatenate([[0], np.cumsum([shard.num_samples for shard in self.shards], dtype=np.int64)])

    def __len__(self) -> int:
        return sum(shard.num_samples for shard in self.shards)

    def index(self, shard: int) -> ShardIndex:
        return ShardIndex.load(self.shards[shard].index_path)

    @classmethod
    def load(cls, paths: Sequence[str], cache_dir: str | Path, caption: str | None = ".txt") -> "Manifest":
        """Of local shards, scanned where they are new, and of remote ones that were; see `scan_all`.

        Raises UserError naming the shard that is no tar, has no image, or (with `caption`) no caption; or the command
        that scans the remote ones.
        """
        found = scan_all(paths, cache_dir, caption)
        absent = [path for path, shard in zip(paths, found, strict=True) if shard is None]
        if absent:
            some = [size for url in absent[:4] if (size := size_of(url)) is not None]
            amount = f", about {len(absent) * sum(some) / len(some) / 1e9:,.2f} GB," if some else ""
            count = f"{len(absent):,} of {len(paths):,}"
            raise UserError(
                f"{count} shards are remote and not known yet ({absent[0]}): python shards.py "
                f"do=inspect with the same data.… reads them{amount} once, and can be stopped and started again"
            )
        shards = []
        for shard in found:
            if isinstance(shard, UserError):
                raise shard
            assert shard is not None
            shards.append(shard)
        return cls(tuple(shards))


Scanned = Shard | UserError | None  # why a shard cannot be used; None of a remote one that is not known yet


def scan_all(
    paths: Sequence[str], cache_dir: str | Path, caption: str | None = ".txt", cache: ShardCache | None = None
) -> list[Scanned]:
    """Scan shards, several at once; what is unchanged since last time is taken from `cache_dir`.

    Remote ones are fetched only with a `cache`, and once they are known never looked at again.
    """
    folder = Path(cache_dir) / "index"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"data.cache_dir: cannot make {folder}: {error.strerror}") from None
    found = {path: _known(path, folder, caption) for path in paths}
    missing = [path for path, shard in found.items() if shard is None and (cache is not None or not is_remote(path))]
    processes = min(len(os.sched_getaffinity(0)), len(missing))
    scan_one = partial(_scanned, folder=folder, caption=caption, cache=cache)
    if len(missing) > _SERIAL and processes > 1:
        # fork: spawn would import the caller's main module again. The children touch files and numpy only
        with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("fork")) as pool:
            scanned = list(pool.map(scan_one, missing))
    else:
        scanned = list(map(scan_one, missing))
    found |= dict(zip(missing, scanned, strict=True))
    return [found[path] for path in paths]


def _index_path(path: str, status: os.stat_result | None, folder: Path, caption: str | None) -> Path:
    version = [path] if status is None else [os.path.realpath(path), status.st_size, status.st_mtime_ns]
    content = json.dumps([_VERSION, *version, caption])
    return folder / f"{hashlib.sha256(content.encode()).hexdigest()[:32]}.npz"


def _known(path: str, folder: Path, caption: str | None) -> Scanned:
    """The shard by its index on disk; None if there is none, or a damaged one."""
    try:
        status = None if is_remote(path) else os.stat(path)
        place = _index_path(path, status, folder, caption)
        index = ShardIndex.load(place)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        return None
    return _shard(path, status, place, index, caption)


def _scanned(path: str, folder: Path, caption: str | None, cache: ShardCache | None) -> Shard | UserError:
    try:
        if cache is not None and is_remote(path):
            with cache.open(path) as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                index = _scan_file(file, path, caption)
                index = replace(index, bytes=os.fstat(file.fileno()).st_size, sha256=digest)
            status = None
        else:
            status, index = os.stat(path), scan(path, caption)
    except OSError as error:
        return UserError(f"cannot read the shard {path}: {error.strerror}")
    except UserError as mistake:
        return mistake
    place = _index_path(path, status, folder, caption)
    index.save(place)
    return _shard(path, status, place, index, caption)


def _shard(
    path: str, status: os.stat_result | None, place: Path, index: ShardIndex, caption: str | None
) -> Shard | UserError:
    if not len(index.keys):
        return UserError(f"{path} holds no image ({', '.join(IMAGE_SUFFIXES)}); remove it from data.urls")
    if caption is not None and not (index.members[:, CAPTION, 1] >= 0).any():
        return UserError(f"{path} holds no image with a caption ({caption}); set data.caption, or null for none")
    return Shard(
        path=path,
        name=os.path.basename(path.partition("?")[0]) if status is None else os.path.basename(path),
        bytes=index.bytes if status is None else status.st_size,
        mtime_ns=None if status is None else status.st_mtime_ns,
        sha256=index.sha256,
        index_path=str(place),
        num_samples=len(index.keys),
        digest=hashlib.sha256(index.keys.tobytes() + index.members.tobytes()).hexdigest()[:16],
        problems=dict(Counter(problem.reason for problem in index.problems)),
    )

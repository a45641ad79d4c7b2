"""Samples by their global id: bytes out of the shards, decoded."""

import logging
import os
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from carrara.data.buckets import Size
from carrara.data.cache import ShardCache
from carrara.data.cached import Cached, unpack
from carrara.data.decode import Crop, DecodeError, decode_caption, decode_image
from carrara.data.manifest import Manifest, Shard
from carrara.data.shard_index import CACHED, CAPTION, IMAGE, JSON
from carrara.errors import UserError

_log = logging.getLogger(__name__)
_READ = os.O_RDONLY | os.O_CLOEXEC
_FETCHERS = 4  # threads of each process
_NO_IMAGE = np.empty((3, 0, 0), dtype=np.uint8)
TRIES = 16  # samples tried for one place in the stream


@dataclass(frozen=True)
class Decoding:
    """How a sample becomes a picture and a caption. Fields as in `ShardData`."""

    resolution: int
    caption: str | None
    crop: Crop = "center"
    flip: bool = False
    max_pixels: int = 64_000_000


Use = Literal["pictures", "latents", "latents_and_text"]  # of a sample: it itself, or what its cache holds


class Sample(NamedTuple):
    """key: `shard/key`, as keys repeat across shards. image: uint8 (3, H, W). caption: "" if it has none.

    cached: of samples whose cache is used, and whose image is empty.
    """

    key: str
    image: NDArray[np.uint8]
    caption: str
    cached: Cached | None = None


class _Open(NamedTuple):
    """A shard that is being read."""

    file: int
    keys: NDArray[np.bytes_]
    members: NDArray[np.int64]


class ShardReader:
    """Bytes of samples. Holds `capacity` shards open; a copy in another process opens its own.

    `os.pread`, not mmap: one system call a member, and a file that is cut while it is read is a short read,
    where a mapping would be a SIGBUS that kills the worker without a word.
    """

    def __init__(self, manifest: Manifest, capacity: int = 32, cache: ShardCache | None = None) -> None:
        """`cache`: where remote shards are opened from."""
        self.manifest, self.capacity, self.cache = manifest, capacity, cache
        self._starts = manifest.starts
        self._open: OrderedDict[int, _Open] = OrderedDict()
        self._ahead: tuple[int, ...] = ()
        self._wanted: SimpleQueue[Shard] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict(), "_ahead": (), "_wanted": None}

    def __del__(self) -> None:
        for shard in self._open.values():
            os.close(shard.file)

    def locate(self, sample: int) -> tuple[int, int]:
        """Shard and row in its index of a global id."""
        shard = int(np.searchsorted(self._starts, sample, side="right")) - 1
        return shard, sample - int(self._starts[shard])

    def key(self, sample: int) -> str:
        """`shard/key`, to be shown."""
        key = self.member(sample).encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        return f"{self.manifest.shards[self.locate(sample)[0]].name}/{key}"

    def member(self, sample: int) -> str:
        """The key in its shard, as `tarfile` has it: bytes that are no UTF-8 are surrogates."""
        shard, row = self.locate(sample)
        return bytes(self._opened(shard).keys[row]).decode("utf-8", "surrogateescape")

    def read(self, sample: int, part: int) -> bytes:
        """Bytes of its IMAGE, CAPTION or JSON, empty if it has none. Raises DecodeError: unreadable."""
        shard, row = self.locate(sample)
        opened = self._opened(shard)
        offset, size = opened.members[row, part].tolist()
        try:
            data = os.pread(opened.file, size, offset) if size > 0 else b""
        except OSError:
            raise DecodeError("unreadable") from None
        if len(data) < size:  # the file was cut since it was opened
            raise DecodeError("unreadable")
        return data

    def prefetch(self, shards: NDArray[np.int64]) -> None:
        """Fetches remote shards that are read soon, in threads; told the same again, it does nothing."""
        numbers = tuple(shards.tolist())
        if self.cache is None or numbers == self._ahead:
            return
        self._ahead = numbers
        remote = [shard for shard in (self.manifest.shards[number] for number in numbers) if shard.mtime_ns is None]
        if remote and self._wanted is None:
            self._wanted = SimpleQueue()
            for _ in range(_FETCHERS):  # daemons: nothing waits for them at the end
                threading.Thread(target=_fetch_ahead, args=(self.cache, self._wanted), daemon=True).start()
        for shard in remote:
            assert self._wanted is not None
            self._wanted.put(shard)

    def _opened(self, number: int) -> _Open:
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        shard = self.manifest.shards[number]
        file = self._file(shard)
        status = os.fstat(file)
        if status.st_size != shard.bytes or shard.mtime_ns not in (None, status.st_mtime_ns):
            os.close(file)
            raise UserError(f"the shard {shard.path} has changed since the run began; start again")
        index = self.manifest.index(number)
        self._open[number] = _Open(file, index.keys, index.members)
        if len(self._open) > self.capacity:
            os.close(self._open.popitem(last=False)[1].file)
        return self._open[number]

    def _file(self, shard: Shard) -> int:
        try:
            if shard.mtime_ns is not None:
                return os.open(shard.path, _READ)
            assert self.cache is not None
            with self.cache.open(shard.path, shard.bytes, shard.sha256) as copy:
                return os.dup(copy.fileno())
        except OSError as error:
            raise UserError(f"cannot read the shard {shard.path}: {error.strerror}") from None


def _fetch_ahead(cache: ShardCache, wanted: SimpleQueue[Shard]) -> None:
    while True:
        shard = wanted.get()
        cache.prefetch(shard.path, shard.bytes, shard.sha256)


class Samples:
    """Decoded samples by global id. With `keep`, each is decoded once and kept, its failure too.

    What is kept does not depend on `u` and `size`: keep only what is not cropped at random, and has one size. The
    flip, where there is one, is done on the way out.
    """

    def __init__(self, reader: ShardReader, decoding: Decoding, keep: bool = False, use: Use = "pictures") -> None:
        self.reader, self.decoding, self.keep, self.use = reader, decoding, keep, use
        self._kept: dict[int, Sample | str] = {}  # or the reason why there is none

    def load(self, sample: int, u: Sequence[float] = (0.5, 0.5, 0.0), size: Size | None = None) -> Sample:
        """`u`: uniforms for the crop's place (2) and the flip; `size`: other than R × R. Raises DecodeError."""
        found = self._kept.get(sample)
        if found is None:
            try:
                found = self._decode(sample, u, size)
            except DecodeError as error:
                found = error.reason
            if self.keep:
                self._kept[sample] = found
        if isinstance(found, str):
            raise DecodeError(found)
        if self.decoding.flip and u[2] >= 0.5:
            return found._replace(image=found.image[:, :, ::-1])
        return found

    def load_or_substitute(
        self,
        sample: int,
        substitute: Callable[[int], int],
        u: Sequence[float] = (0.5, 0.5, 0.0),
        size: Size | None = None,
    ) -> tuple[Sample, Counter[str]]:
        """The sample, or in place of one that cannot be decoded the first good one of substitute(0),
        substitute(1) …; and how many were skipped for which reason. Raises UserError after TRIES.
        """
        skipped: Counter[str] = Counter()
        for attempt in range(TRIES):
            try:
                return self.load(sample, u, size), skipped
            except DecodeError as error:
                skipped[error.reason] += 1
                _log.info("%s is skipped: %s", self.reader.key(sample), error.reason)
                sample = substitute(attempt)
        histogram = ", ".join(f"{reason} {count}" for reason, count in skipped.most_common())
        raise UserError(f"{TRIES} samples in a row cannot be decoded ({histogram}); check the shards in data.urls")

    def caption(self, sample: int) -> str:
        """ "" if none is asked for. Raises DecodeError: unreadable, no_caption."""
        caption = self.decoding.caption
        if caption is None:
            return ""
        return decode_caption(self.reader.read(sample, CAPTION), None if caption.startswith(".") else caption)

    def facts(self, sample: int) -> bytes:
        """The sample's JSON, empty if there is none."""
        return self.reader.read(sample, JSON)

    def _decode(self, sample: int, u: Sequence[float], size: Size | None) -> Sample:
        caption = self.caption(sample)
        if not caption and self.decoding.caption is not None:  # white space, which a scan has not looked into
            raise DecodeError("empty_caption")
        if self.use != "pictures":
            facts = self.reader.manifest.shards[self.reader.locate(sample)[0]].cached
            cached = unpack(self.reader.read(sample, CACHED), facts, self.use == "latents_and_text")
            return Sample(self.reader.key(sample), _NO_IMAGE, caption, cached)
        image = decode_image(
            self.reader.read(sample, IMAGE),
            size or self.decoding.resolution,
            self.decoding.crop,
            u,
            self.decoding.max_pixels,
        )
        image.setflags(write=False)  # where it is kept, a stage that draws on it would do so for all later epochs
        return Sample(self.reader.key(sample), image, caption)

"""Batches of one aspect ratio each: every picture in a size near its own shape, all sizes of about one area."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from carrara.data.order import TURNS, Stream, permutation
from carrara.errors import UserError

Size = tuple[int, int]  # height, width

_BLOCK = 64  # batches that are shuffled with one another
_FINE = 1 << 40  # of the clock by which buckets take turns


def bucket_sizes(resolution: int, largest_aspect: float, multiple: int) -> list[Size]:
    """Sizes of at most resolution² pixels whose sides are multiples of `multiple`; the square is the first.

    For every shorter side, the longest that the area allows, and both ways round, up to `largest_aspect` = longer over
    shorter (the buckets of SDXL, Podell et al. 2023, appendix I, are of this kind).
    """
    if largest_aspect == 1:
        return [(resolution, resolution)]
    if largest_aspect < 1 or resolution % multiple:
        raise UserError(
            f"data.bucket_aspect={largest_aspect:g} must be 1 or more, and data.bucket_multiple={multiple} must divide "
            f"the resolution {resolution}"
        )
    units = resolution // multiple
    sizes = [(resolution, resolution)]
    for short in range(units - 1, 0, -1):
        long = units * units // short
        if long <= largest_aspect * short:
            sizes += [(short * multiple, long * multiple), (long * multiple, short * multiple)]
    return sizes


def nearest_bucket(pictures: NDArray[np.int64], sizes: Sequence[Size]) -> NDArray[np.int64]:
    """(N,) the number of the size with the nearest aspect ratio, of pictures (N, 2) of height, width.

    The square where a side is 0, which is to say unknown.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        aspects = np.log(pictures[:, 1] / pictures[:, 0])
    aspects[~np.isfinite(aspects)] = 0.0
    targets = np.array([math.log(width / height) for height, width in sizes])
    return np.abs(aspects[:, None] - targets).argmin(axis=1)


class Turns:
    """Which bucket each global batch is of: by turns, in proportion to their samples, shuffled over 64 batches.

    A pure function of (counts, seed, k), exact for any k: bucket b's i-th batch stands at the time (i + u_b) / n_b, and
    the batches go by time. So over any stretch each has its share to within one batch, and none starves.
    """

    def __init__(self, counts: Sequence[int], seed: int) -> None:
        """`counts`: samples of each bucket, each at least 1."""
        self.counts, self.seed = list(counts), seed
        # evenly spread phases: buckets of one size take turns
        self.phases = [(2 * b + 1) * _FINE // (2 * len(counts)) for b in range(len(counts))]
        self._last: tuple[int, list[tuple[int, int]]] = (-1, [])  # a block and its turns

    def at(self, k: int) -> tuple[int, int]:
        """The bucket of global batch k, and how many batches that bucket has had before it."""
        block, place = divmod(k, _BLOCK)
        if self._last[0] != block:
            self._last = block, self._block(block)
        return self._last[1][place]

    def _block(self, block: int) -> list[tuple[int, int]]:
        turns = [self._turn(k) for k in range(block * _BLOCK, (block + 1) * _BLOCK)]
        numbers = permutation(_BLOCK, self.seed, TURNS, block).tolist()
        buckets = [turns[number][0] for number in numbers]
        had: dict[int, int] = {}
        for bucket, i in turns:
            had[bucket] = min(had.get(bucket, i), i)
        result = []
        for bucket in buckets:  # within a bucket the batches stay in their order
            result.append((bucket, had[bucket]))
            had[bucket] += 1
        return result

    def _before(self, time: int) -> list[int]:
        """Batches of each bucket that stand before a time, which counts in 1 / _FINE²; whole numbers throughout."""
        return [
            max(0, -(-(time * n - phase * _FINE) // (_FINE * _FINE)))
            for n, phase in zip(self.counts, self.phases, strict=True)
        ]

    def _turn(self, k: int) -> tuple[int, int]:
        low, high = 0, (k + 1) * _FINE * _FINE + 1  # at the latest, the first bucket alone has had k + 1
        while high - low > 1:
            middle = (low + high) // 2
            if sum(self._before(middle)) > k:
                high = middle
            else:
                low = middle
        before, after = self._before(low), self._before(high)
        waiting = [bucket for bucket, (a, b) in enumerate(zip(before, after, strict=True)) if b > a]
        bucket = waiting[k - sum(before)]
        return bucket, before[bucket]


class BucketedStream:
    """As `Stream`, but every global batch is of one bucket, whose samples come in the order of a stream of their own.

    What is left of a bucket at the end of its epoch begins the next one's first batch: nothing is dropped.
    """

    def __init__(
        self,
        eligible: NDArray[np.bool_],
        buckets: NDArray[np.int64],
        sizes: Sequence[Size],
        starts: NDArray[np.int64],
        seed: int,
        window: int,
        groups: int,
        global_batch: int,
    ) -> None:
        """`buckets`: (N,) the number of each sample's size; the rest as of `Stream`."""
        used = [b for b in range(len(sizes)) if (eligible & (buckets == b)).any()]
        self.seed, self.global_batch = seed, global_batch
        self.sizes = [sizes[b] for b in used]
        self.streams = [Stream(eligible & (buckets == b), starts, seed, window, groups, global_batch) for b in used]
        self.turns = Turns([len(stream) for stream in self.streams], seed)

    def __len__(self) -> int:
        return sum(len(stream) for stream in self.streams)

    def take(self, start: int, stop: int) -> NDArray[np.int64]:
        """Sample ids at positions start ... stop - 1, which lie in one global batch."""
        bucket, first = self._within(start)
        return self.streams[bucket].take(first, first + stop - start)

    def size(self, position: int) -> Size:
        """Of the pictures of the global batch that this position is in."""
        return self.sizes[self.turns.at(position // self.global_batch)[0]]

    def ahead(self, start: int, stop: int) -> NDArray[np.int64]:
        """As of `Stream`, for positions that lie in one global batch."""
        bucket, first = self._within(start)
        return self.streams[bucket].ahead(first, first + stop - start)

    def substitute(self, position: int, attempt: int) -> int:
        """As of `Stream`, of the same bucket."""
        bucket, first = self._within(position)
        return self.streams[bucket].substitute(first, attempt)

    def _within(self, position: int) -> tuple[int, int]:
        """The bucket of this position, and the position in its stream."""
        k, offset = divmod(position, self.global_batch)
        bucket, i = self.turns.at(k)
        return bucket, i * self.global_batch + offset

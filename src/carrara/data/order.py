"""In which order samples are seen: a pure function of (manifest, seed, epoch)."""

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from carrara.errors import UserError

_SHARDS, _WINDOW, _SUBSTITUTE, _DECODING, TURNS = range(5)  # what random numbers are for

_NEAR = 3  # attempts at a substitute among shards that are open; one that is all bad must not end a run


def _bits(count: int, *key: int) -> NDArray[np.uint64]:
    """(count,) random 64-bit words of this key."""
    # raw words and SeedSequence are what numpy promises to keep from version to version; its shuffles are not
    return np.random.Philox(np.random.SeedSequence([part % 2**64 for part in key])).random_raw(count)


def permutation(count: int, *key: int) -> NDArray[np.int64]:
    """0 … count − 1 in a random order of this key."""
    return np.argsort(_bits(count, *key), kind="stable")


def uniforms(seed: int, start: int, count: int) -> NDArray[np.float64]:
    """(count, 4) uniforms in [0, 1) for decoding the samples at positions start, start + 1 …

    Row p is a function of (seed, position) alone: Philox's counter is the position, and gives four words.
    """
    key = np.array([seed % 2**64, _DECODING], dtype=np.uint64)
    words = np.random.Philox(key=key, counter=[start, 0, 0, 0]).random_raw(4 * count).reshape(count, 4)
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


class _Epochs:
    """The epochs' sequences over some of the shards, end to end."""

    def __init__(self, shards: NDArray[np.int64], counts: NDArray[np.int64], key: tuple[int, int]) -> None:
        """`shards`: numbers in the manifest; `counts`: eligible samples of each; `key`: seed and group."""
        self.shards, self.counts, self.key = shards, counts, key
        self.size = int(counts.sum())
        self._order = (-1, shards, counts)  # epoch, shards in its order, first positions of its windows
        self._window = (-1, -1, shards)  # epoch, window, sample ids in order

    def _shards_of(self, epoch: int) -> NDArray[np.int64]:
        """Places in `shards`, in the epoch's order."""
        return permutation(len(self.shards), *self.key, _SHARDS, epoch)

    def ahead(self, position: int, stream: "Stream") -> NDArray[np.int64]:
        """The shards of the window after that of this position."""
        self.window(position, stream)
        epoch, w, _ = self._window
        following = self._order[1][(w + 1) * stream.window : (w + 2) * stream.window]
        return following if len(following) else self.shards[self._shards_of(epoch + 1)][: stream.window]

    def window(self, position: int, stream: "Stream") -> NDArray[np.int64]:
        """Sample ids from this position to the end of its window of shards."""
        epoch, within = divmod(position, self.size)
        if self._order[0] != epoch:
            order = self._shards_of(epoch)
            firsts = np.concatenate([[0], np.cumsum(self.counts[order])[:-1]])
            self._order = (epoch, self.shards[order], firsts[:: stream.window])
        _, shards, firsts = self._order
        w = int(np.searchsorted(firsts, within, side="right")) - 1
        if self._window[:2] != (epoch, w):
            of_window = shards[w * stream.window : (w + 1) * stream.window]
            ids = np.concatenate([stream.ids(shard) for shard in of_window.tolist()])
            self._window = (epoch, w, ids[permutation(len(ids), *self.key, _WINDOW, epoch, w)])
        return self._window[2][within - int(firsts[w]) :]

    def whole_window(self, position: int, stream: "Stream") -> tuple[NDArray[np.int64], int]:
        """All sample ids of this position's window, and where among them the position is."""
        rest = self.window(position, stream)
        return self._window[2], len(self._window[2]) - len(rest)


class Stream:
    """The epochs' sequences of eligible sample ids, end to end.

    In an epoch the shards are permuted, and the samples within each window of `window` shards. With several
    `groups` the shards are dealt into that many such streams, and every global batch is made of equal parts,
    one of each in turn. In memory are the mask and one window a group.
    """

    def __init__(
        self,
        eligible: NDArray[np.bool_],
        starts: NDArray[np.int64],
        seed: int,
        window: int = 16,
        groups: int = 1,
        global_batch: int = 1,
    ) -> None:
        """`eligible`: (N,) bool by sample id; `starts`: (S + 1,) first id of each shard, and N.

        Raises UserError if `groups` does not divide the batch, or exceeds the shards with eligible samples.
        """
        if window < 1:
            raise UserError(f"data.shuffle_window={window} must be at least 1 shard")
        if groups < 1 or global_batch % groups:
            raise UserError(f"data.groups={groups} does not divide the global batch of {global_batch}")
        self.eligible, self.starts, self.seed, self.window = eligible, starts, seed, window
        counts = np.array([np.count_nonzero(eligible[a:b]) for a, b in pairwise(starts.tolist())])
        shards = np.flatnonzero(counts)
        if len(shards) < groups:
            raise UserError(f"data.groups={groups} is more than the {len(shards)} shards with eligible samples")
        self._ends = np.cumsum(counts)
        self._part = global_batch // groups
        self._groups = [_Epochs(shards[g::groups], counts[shards[g::groups]], (seed, g)) for g in range(groups)]

    def __len__(self) -> int:
        """Samples in an epoch."""
        return int(self._ends[-1])

    def take(self, start: int, stop: int) -> NDArray[np.int64]:
        """(stop - start,) sample ids at positions start ... stop - 1."""
        parts = [np.empty(0, dtype=np.int64)]
        while start < stop:
            ids = self._group(start).window(self._within(start), self)
            # one group's part ends with its turn, unless there is one group alone
            end = stop if len(self._groups) == 1 else min(stop, (start // self._part + 1) * self._part)
            parts.append(ids[: end - start])
            start += len(parts[-1])
        return np.concatenate(parts)

    def ahead(self, start: int, stop: int) -> NDArray[np.int64]:
        """The shards that are read after the windows that positions start ... stop - 1 are in, of their groups."""
        turns = range(start // self._part, (stop - 1) // self._part + 1)
        begins = [turn * self._part for turn in turns]
        return np.concatenate([self._group(begin).ahead(self._within(begin), self) for begin in begins])

    def _group(self, position: int) -> _Epochs:
        return self._groups[position // self._part % len(self._groups)]

    def _within(self, position: int) -> int:
        """The position in its group's own sequence."""
        turn, offset = divmod(position, self._part)
        return turn // len(self._groups) * self._part + offset

    def ids(self, shard: int) -> NDArray[np.int64]:
        """Eligible sample ids of a shard."""
        start, stop = self.starts[shard : shard + 2].tolist()
        return np.flatnonzero(self.eligible[start:stop]) + start

    def substitute(self, position: int, attempt: int) -> int:
        """A sample id in place of the one at this position, by hash: another of its window, whose shards are at hand,
        and after some attempts any eligible one.
        """
        bits = int(_bits(1, self.seed, _SUBSTITUTE, position, attempt)[0])
        near, here = self._group(position).whole_window(self._within(position), self)
        if attempt < _NEAR and len(near) > 1:
            return int(near[(here + 1 + bits % (len(near) - 1)) % len(near)])  # another one, that is
        k = bits % len(self)
        shard = int(np.searchsorted(self._ends, k, side="right"))
        return int(self.ids(shard)[k - int(self._ends[shard])])


def epoch_order(
    eligible: NDArray[np.bool_], starts: NDArray[np.int64], seed: int, epoch: int, window: int = 16
) -> NDArray[np.int64]:
    """Every eligible sample id once, in the order of that epoch."""
    stream = Stream(eligible, starts, seed, window)
    return stream.take(epoch * len(stream), (epoch + 1) * len(stream))

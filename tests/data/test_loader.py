"""The loader: the same global batches whatever the ranks, workers, start and memory."""

import io
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from carrara.data.manifest import Manifest
from carrara.data.reader import Decoding

ENDS = [13, 17, 39, 48]  # of the four shards of `manifest`

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores


def same(a, b):
    """Two lists of batches are equal in every bit."""
    assert len(a) == len(b)
    for one, other in zip(a, b, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            if isinstance(one[key], torch.Tensor):
                assert one[key].dtype == other[key].dtype
                assert torch.equal(one[key], other[key])
            else:
                assert one[key] == other[key]


def captions(batches):
    return [caption for batch in batches for caption in batch["captions"]]


def test_a_batch_holds_what_the_shard_does(loader, manifest, value_of):
    (batch,) = loader(manifest, batch=48)
    assert batch["images"].shape == (48, 3, 8, 8) and batch["images"].dtype == torch.uint8
    assert batch["positions"].tolist() == list(range(48)) and batch["positions"].dtype == torch.int64
    values = [value_of(image) for image in batch["images"].numpy()]
    assert sorted(values) == list(range(48))
    assert batch["captions"] == [f"caption {value}" for value in values]
    shard = np.searchsorted(ENDS, values, side="right")
    assert batch["keys"] == [f"{s}.tar/{value:06d}" for s, value in zip(shard, values, strict=True)]
    assert batch["skipped"] == {}


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_sample_comes_once_an_epoch_over_ranks_and_workers(loader, manifest, world, workers):
    ranks = [loader(manifest, 12, rank, world, num_workers=workers) for rank in range(world)]
    for _ in range(2):
        epochs = [list(rank) for rank in ranks]
        assert [len(epoch) for epoch in epochs] == [4] * world  # trap 2: not 4 times the workers
        assert sorted(c for epoch in epochs for c in captions(epoch)) == sorted(f"caption {v}" for v in range(48))
    for rank in ranks:
        rank.close()


def test_two_epochs_hold_every_sample_once_each_where_batches_cross_the_epochs(loader, manifest):
    found = captions(list(loader(manifest, batch=20, steps_per_epoch=120)))  # 2400 = 50 · 48
    assert len(found) == 2400
    for epoch in range(50):
        assert len(set(found[48 * epoch : 48 * (epoch + 1)])) == 48


@pytest.mark.parametrize("accumulate", [1, 2, 3])
@pytest.mark.parametrize("workers", [1, 3])
def test_the_batches_do_not_depend_on_the_workers(loader, manifest, accumulate, workers):
    decoding = Decoding(6, ".txt", crop="random", flip=True)
    options = {"batch": 12, "rank": 1, "world": 2, "accumulate": accumulate, "decoding": decoding}
    alone, shared = loader(manifest, **options), loader(manifest, num_workers=workers, **options)
    for _ in range(3):
        same(list(alone), list(shared))
    shared.close()


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("world", "accumulate"), [(2, 1), (3, 1), (2, 2), (1, 3)])
def test_the_ranks_share_out_the_global_batch(loader, manifest, world, accumulate, groups):
    whole = list(loader(manifest, 12, groups=groups))
    parts = [list(loader(manifest, 12, rank, world, accumulate, groups=groups)) for rank in range(world)]
    for step, batch in enumerate(whole):
        mine = [part[step * accumulate + a] for part in parts for a in range(accumulate)]
        assert batch["captions"] == captions(mine)
        assert torch.equal(batch["images"], torch.cat([micro["images"] for micro in mine]))
        assert torch.equal(batch["positions"], torch.cat([micro["positions"] for micro in mine]))


def test_order_is_by_seed_and_differs_between_epochs(loader, manifest):
    one = loader(manifest)
    epochs = [captions(list(one)), captions(list(one))]
    assert epochs[0] != epochs[1]
    again = loader(manifest)
    assert [captions(list(again)), captions(list(again))] == epochs
    assert captions(list(loader(manifest, seed=1))) not in epochs


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_start_within_the_stream_gives_its_tail(loader, manifest, workers, accumulate):
    options = {
        "accumulate": accumulate,
        "decoding": Decoding(6, ".txt", "random", True),
        "num_workers": workers,
    }
    whole = loader(manifest, **options)
    batches = [*whole, *whole, *whole, *whole]
    whole.close()
    for step in (1, 3, 4, 6, 9):
        late = loader(manifest, start_position=12 * step, **options)
        assert late.position == 12 * step
        rest = list(late)  # of the epoch
        assert len(rest) == (4 - step % 4) * accumulate
        assert len(late) == 4 * accumulate
        rest += list(late)
        same(rest, batches[step * accumulate :][: len(rest)])
        assert late.position == 12 * (step + len(rest) // accumulate)
        late.close()


def test_the_position_counts_whole_global_batches_given_out(loader, manifest):
    one = loader(manifest, accumulate=2)
    positions = []
    for _ in one:
        positions.append(one.position)
    assert positions == [0, 12, 12, 24, 24, 36, 36, 48]


def test_an_iteration_that_is_left_is_gone_on_with(loader, manifest):
    whole = list(loader(manifest))
    left = loader(manifest, num_workers=1)
    iter(left)  # as Lightning does to see whether it can be iterated
    first = next(iter(left))
    same([first, *left], whole)
    left.close()


@pytest.mark.parametrize("decoding", [Decoding(8, ".txt"), Decoding(5, ".txt", flip=True), Decoding(8, None, "none")])
def test_the_memory_path_is_the_streaming_path(loader, manifest, decoding, monkeypatch):
    kept, streamed = loader(manifest, decoding=decoding, keep=True), loader(manifest, decoding=decoding)
    for epoch in range(3):
        same(list(kept), list(streamed))
        if epoch == 0:  # from here on nothing is read
            monkeypatch.setattr(kept.samples.reader, "read", lambda *_: pytest.fail("read again"))


def test_flips_mirror_half_of_the_pictures_wherever_they_are_cropped(loader, write_tar, tmp_path):
    ramp = np.broadcast_to(np.arange(0, 240, 24, dtype=np.uint8), (8, 10))
    buffer = io.BytesIO()
    Image.fromarray(ramp).save(buffer, "PNG")
    path = write_tar("a.tar", [("a.png", buffer.getvalue()), ("a.txt", b"t")])
    manifest = Manifest.load([str(path)], tmp_path / "cache")
    one = loader(manifest, batch=600, steps_per_epoch=1, decoding=Decoding(8, ".txt", "random", flip=True))
    edges = next(iter(one))["images"][:, 0, 0, [0, -1]] // 24  # first and last column
    for left in range(3):
        for edge in ([left, left + 7], [left + 7, left]):
            assert 60 < (edges == torch.tensor(edge)).all(1).sum() < 140


_PEAK = """
import resource, sys, itertools
from carrara.data.module import ShardData
data = ShardData("x", sys.argv[1], 32, cache_dir=sys.argv[2], val_samples=1, memory_limit=0, shuffle_window=4)
for batch in itertools.islice(data.train_loader(50), 60):
    pass
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_shards(write_shard, sample, tmp_path):
    """F1: the peak of a process that has read the same number of samples of 10 and of 100 shards of 300."""
    noise = np.random.default_rng(0)
    for s in range(100):
        samples = {}
        for k in range(300):
            buffer = io.BytesIO()
            Image.fromarray(noise.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(buffer, "PNG")
            samples[f"{k:05d}"] = {**sample(k), "png": buffer.getvalue()}
        write_shard(f"{s:03d}.tar", samples)
    peaks = []
    for spec in ("00?.tar", "*.tar"):
        command = [sys.executable, "-c", _PEAK, str(tmp_path / spec), str(tmp_path / "cache")]
        for _ in range(2):  # the first makes the index
            done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout))
    assert peaks[1] < 1.05 * peaks[0]

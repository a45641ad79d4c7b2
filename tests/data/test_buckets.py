import io
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from carrara.data.buckets import BucketedStream, Turns, bucket_sizes, nearest_bucket
from carrara.data.decode import decode_image, picture_size
from carrara.data.loader import Loader
from carrara.data.manifest import Manifest
from carrara.data.module import ShardData
from carrara.errors import UserError


def test_sizes_have_about_the_area_of_the_square_and_come_both_ways_round():
    sizes = bucket_sizes(512, 2.0, 64)
    assert sizes == [(512, 512), (448, 576), (576, 448), (384, 640), (640, 384)]
    for height, width in bucket_sizes(1024, 4.0, 64):
        assert 0.85 * 1024**2 < height * width <= 1024**2 and max(height, width) <= 4 * min(height, width)
    assert bucket_sizes(32, 1.0, 64) == [(32, 32)]
    with pytest.raises(UserError, match=r"data\.bucket_multiple=64 must divide the resolution 96"):
        bucket_sizes(96, 2.0, 64)
    with pytest.raises(UserError, match=r"data\.bucket_aspect=0\.5"):
        bucket_sizes(512, 0.5, 64)


def test_a_picture_goes_where_it_is_cropped_least():
    sizes = bucket_sizes(512, 2.0, 64)
    pictures = np.array([[100, 100], [100, 130], [130, 100], [100, 400], [400, 100], [0, 0], [5, 0]])
    assert nearest_bucket(pictures, sizes).tolist() == [0, 1, 2, 3, 4, 0, 0]


@pytest.mark.parametrize("counts", [[1], [5, 5], [1000, 10, 1], [7, 3, 3, 3, 1], [123_456_789, 1, 999]])
def test_buckets_take_turns_in_proportion(counts):
    turns, total = Turns(counts, seed=0), sum(counts)
    had: Counter[int] = Counter()
    for k in range(640):
        bucket, i = turns.at(k)
        assert i == had[bucket]  # each batch of each bucket once, in its order
        had[bucket] += 1
        if k % 64 == 63:  # whatever the order within a block of 64
            for b, count in enumerate(counts):
                assert abs(had[b] - (k + 1) * count / total) <= 1 + 1e-9


def test_turns_are_exact_however_far_and_from_wherever():
    counts = [123_456, 7_890, 1_200]
    whole = [Turns(counts, 3).at(k) for k in range(300)]
    assert [Turns(counts, 3).at(k) for k in reversed(range(300))] == whole[::-1]
    far = 10**12
    turns = Turns(counts, 3)
    seen = [turns.at(far + k) for k in range(2000)]
    for b in range(3):
        numbers = [i for bucket, i in seen if bucket == b]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
        assert abs(numbers[0] - far * counts[b] / sum(counts)) < 64
    assert [Turns(counts, 4).at(k) for k in range(300)] != whole


def test_all_buckets_go_on_for_ever_and_nothing_is_dropped():
    """Every sample as often as every other, to within an epoch of its bucket."""
    rng = np.random.default_rng(0)
    buckets = rng.choice(3, 200, p=[0.7, 0.25, 0.05])
    starts = np.array([0, 60, 120, 200])
    stream = BucketedStream(np.ones(200, bool), buckets, [(8, 8), (8, 16), (16, 8)], starts, 0, 2, 1, 12)
    seen: Counter[int] = Counter()
    for k in range(400):
        ids = stream.take(12 * k, 12 * k + 12)
        (bucket,) = set(buckets[ids].tolist())  # one bucket a batch
        assert stream.size(12 * k + 5) == stream.sizes[bucket]
        seen.update(ids.tolist())
    assert set(seen) == set(range(200))
    times = np.array([seen[k] for k in range(200)])
    assert abs(times.mean() - 24) < 1e-9 and times.min() >= 20 and times.max() <= 28


def picture(height: int, width: int, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (9, 9, 9)).save(buffer, format, **options)
    return buffer.getvalue()


def test_a_picture_is_cut_to_its_buckets_shape():
    pixels = np.zeros((30, 60, 3), dtype=np.uint8)
    pixels[:, 10:50] = 200
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    wide = decode_image(buffer.getvalue(), (15, 20))  # of 30 × 60 the middle 30 × 40
    assert wide.shape == (3, 15, 20) and wide.min() == 200
    tall = decode_image(buffer.getvalue(), (30, 10), "random", (0.0, 0.0))  # the leftmost 30 × 10, copied
    assert tall.shape == (3, 30, 10) and tall.max() == 0
    assert decode_image(buffer.getvalue(), (30, 60)).shape == (3, 30, 60)


def test_sizes_are_known_by_the_header_as_a_viewer_shows_them():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert picture_size(picture(20, 30)) == (20, 30)
    assert picture_size(picture(20, 30, "JPEG")) == (20, 30)
    assert picture_size(picture(20, 30, "JPEG", exif=exif)) == (30, 20)
    assert picture_size(picture(20, 30, "JPEG")[:300]) in ((0, 0), (20, 30))
    assert picture_size(b"<html>") == picture_size(b"") == (0, 0)


@pytest.fixture
def mixed(write_shard, sample, tmp_path) -> ShardData:
    paths = []
    for s in range(4):
        samples = {}
        for k in range(15):
            size = ((32, 32), (24, 40), (40, 24))[min(2, k % 5)]
            samples[f"{s}{k:02d}"] = {**sample(k), "png": picture(*size)}
        paths.append(str(write_shard(f"{s}.tar", samples)))
    return ShardData(
        "mixed", paths, 16, cache_dir=str(tmp_path), val_samples=5, bucket_aspect=2.0, bucket_multiple=4, memory_limit=0
    )


def gone_through(loader: Loader, batches: int) -> list[tuple[tuple[int, ...], list[str]]]:
    found: list[tuple[tuple[int, ...], list[str]]] = []
    while len(found) < batches:
        found += [(tuple(batch["images"].shape), batch["keys"]) for batch in loader]
    return found[:batches]


def test_batches_of_one_shape_for_all_ranks_and_resumed_anywhere(mixed):
    whole = gone_through(mixed.train_loader(6), 30)
    assert {shape[2:] for shape, _ in whole} == {(16, 16), (12, 20), (20, 12)}
    ranks = [gone_through(mixed.train_loader(6, rank, 2), 30) for rank in (0, 1)]
    for k, (shape, keys) in enumerate(whole):
        parts = [ranks[rank][k] for rank in (0, 1)]
        assert parts[0][0] == parts[1][0] == (3, *shape[1:])
        assert parts[0][1] + parts[1][1] == keys
    for start in (1, 7, 20):
        assert gone_through(mixed.train_loader(6, position=6 * start), 30 - start) == whole[start:]
    assert len({key for _, keys in whole for key in keys}) == 55
    assert mixed.validation.batch(0, 5)["images"].shape == (5, 3, 16, 16)


def test_without_buckets_all_is_as_it_was(mixed, tmp_path):
    paths = [shard.path for shard in mixed.manifest.shards]
    square = ShardData("mixed", paths, 16, cache_dir=str(tmp_path), val_samples=5, memory_limit=0)
    assert square.fingerprint != mixed.fingerprint
    assert {shape for shape, _ in gone_through(square.train_loader(6), 9)} == {(6, 3, 16, 16)}
    assert isinstance(Manifest.load(paths, tmp_path), Manifest)

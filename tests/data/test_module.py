"""`ShardData`: the split, the validation set, the fingerprint and what is told of a data set."""

from typing import Any

import numpy as np
import pytest
import torch

from carrara.data.module import ShardData
from carrara.data.shapes_shards import write_shapes
from carrara.errors import UserError


@pytest.fixture
def shards(write_shard):
    return [write_shard(f"{s}.tar", range(20 * s, 20 * s + 20)) for s in range(3)]


def data(shards, tmp_path, **options):
    urls = options.pop("urls", [str(path) for path in shards])
    return ShardData("test", urls, options.pop("resolution", 8), cache_dir=str(tmp_path / "cache"), **options)


def training_captions(shard_data):
    return set(shard_data.captions())


def test_validation_samples_are_taken_out_of_training(shards, tmp_path):
    one = data(shards, tmp_path, val_samples=7)
    assert (one.num_train, len(one.validation)) == (53, 7)
    held_out, training = set(one.validation.captions()), training_captions(one)
    assert len(held_out) == 7 and len(training) == 53 and not held_out & training
    seen = {c for batch in one.train_loader(53) for c in batch["captions"]}
    assert seen == training


def test_the_split_stays_as_it_is(shards, tmp_path):
    small, large = (data(shards, tmp_path, val_samples=n, seed=n) for n in (5, 12))
    assert large.validation.captions()[:5] == small.validation.captions()
    fewer = data(shards, tmp_path, urls=[str(path) for path in shards[::-1]][:2], val_samples=5)
    kept = [c for c in large.validation.captions() if int(c.split()[1]) >= 20]
    assert fewer.validation.captions()[: len(kept)] == kept[:5]  # a sample's place is its own


def test_the_split_is_random(shards, tmp_path):
    values = np.array([int(c.split()[1]) for c in data(shards, tmp_path, val_samples=30).validation.captions()])
    assert len(set(values // 20)) == 3
    assert np.abs(np.corrcoef(values, np.arange(30))[0, 1]) < 0.5


def test_by_default_one_sample_in_twenty_is_validated_on(shards, tmp_path):
    assert len(data(shards, tmp_path).validation) == 3


def test_a_split_that_leaves_nothing_is_refused(shards, tmp_path):
    with pytest.raises(UserError, match="val_samples=60 leaves none of 60"):
        data(shards, tmp_path, val_samples=60)


def test_validation_is_by_index(shards, tmp_path, value_of):
    one = data(shards, tmp_path, urls=str(shards[0]), val_urls=[str(path) for path in shards[1:]])
    assert (one.num_train, len(one.validation)) == (20, 40)
    whole = one.validation.batch(0, 100)
    assert whole["images"].shape == (40, 3, 8, 8) and whole["images"].dtype == torch.uint8
    assert whole["captions"] == one.validation.captions()
    assert whole["captions"] == [f"caption {value_of(image)}" for image in whole["images"].numpy()]
    assert sorted(whole["captions"]) == sorted(f"caption {v}" for v in range(20, 60))
    part = one.validation.take(np.array([30, 2]))
    assert part["positions"].tolist() == [30, 2]
    assert torch.equal(part["images"], whole["images"][[30, 2]])
    assert len(data(shards, tmp_path, urls=str(shards[0]), val_urls=str(shards[1]), val_samples=6).validation) == 6


def test_validation_is_the_same_whatever_training_draws(shards, tmp_path):
    options = {"val_samples": 10, "resolution": 5}
    a = data(shards, tmp_path, **options)
    b = data(shards, tmp_path, **options, crop="random", flip=True, seed=9, memory_limit=0)
    assert torch.equal(a.validation.batch(0, 10)["images"], b.validation.batch(0, 10)["images"])


def test_a_validation_sample_that_cannot_be_decoded_is_replaced_by_the_next(write_shard, sample, tmp_path):
    samples = {f"{v:06d}": sample(v) for v in range(10)}
    samples["000004"]["png"] = b"damaged"
    path = write_shard("a.tar", samples)
    validation = data([], tmp_path, urls=str(path), val_urls=str(path)).validation
    place = validation.captions().index("caption 4")
    batch = validation.batch(0, 10)
    assert batch["captions"][place] == validation.captions()[(place + 1) % 10]
    assert batch["skipped"] == {"not_an_image": 1}


def test_shapes_tell_held_out_from_seen(tmp_path):
    sizes = {"num_train": 30, "num_val": 6, "num_val_seen": 4}
    shapes = data(
        [],
        tmp_path,
        urls=f"{tmp_path}/shapes/train-*.tar",
        val_urls=f"{tmp_path}/shapes/val-*.tar",
        root=str(tmp_path / "shapes"),
        make=lambda root: write_shapes(root, **sizes),
        resolution=32,
    )
    assert (shapes.num_train, len(shapes.validation)) == (30, 10)
    assert {name: len(indices) for name, indices in shapes.validation.splits.items()} == {
        "held_out": 6,
        "seen": 4,
    }
    for name, indices in shapes.validation.splits.items():
        assert {shapes.validation.metadata(index)["split"] for index in indices} == {name}
    assert next(iter(shapes.train_loader(10)))["images"].shape == (10, 3, 32, 32)


def test_without_a_split_all_is_held_out(shards, tmp_path):
    validation = data(shards, tmp_path).validation
    assert {name: indices.tolist() for name, indices in validation.splits.items()} == {"held_out": [0, 1, 2]}


def test_scores_of_held_out_samples_need_some(tmp_path):
    sizes = {"num_train": 4, "num_val": 0, "num_val_seen": 3}
    root = write_shapes(tmp_path / "shapes", **sizes)
    seen = data([], tmp_path, urls=f"{root}/train-*.tar", val_urls=f"{root}/val-*.tar", resolution=32).validation
    assert list(seen.splits) == ["seen"]
    with pytest.raises(UserError, match='all 3 samples to validate on are "split": "seen" by their JSON: score on'):
        seen.held_out.tolist()


def test_small_sets_are_kept_in_memory_and_give_the_same(shards, tmp_path):
    small = data(shards, tmp_path, memory_limit=57 * 3 * 64)
    large = data(shards, tmp_path, memory_limit=57 * 3 * 64 - 1, num_workers=1)
    assert small.in_memory and not large.in_memory
    a, b = small.train_loader(19), large.train_loader(19)
    for _ in range(2):
        for one, other in zip(a, b, strict=True):
            assert one["captions"] == other["captions"]
            assert torch.equal(one["images"], other["images"])
    b.close()
    assert not data(shards, tmp_path, crop="random").in_memory


def test_captions_are_those_of_training_spread_over_the_shards(shards, tmp_path):
    one = data(shards, tmp_path, val_samples=6)
    every = list(one.captions())
    assert len(every) == 54
    few = list(one.captions(9))
    assert few == every[::6] == list(one.captions(9))


def test_every_caption_is_that_of_all_shards(write_shard, tmp_path):
    shards = [write_shard(f"{s:03}.tar", [2 * s, 2 * s + 1]) for s in range(70)]
    one = data(shards, tmp_path, val_samples=6)
    assert len(list(one.captions())) < 134
    assert list(one.every_caption())[134:] == one.validation.captions()
    assert sorted(one.every_caption()) == sorted(f"caption {value}" for value in range(140))


def test_a_few_pictures_leave_two_to_score(write_shard, tmp_path):
    one = data([write_shard("a.tar", range(20))], tmp_path)
    assert (one.num_train, len(one.validation)) == (18, 2)


def test_data_without_captions(write_tar, sample, tmp_path):
    path = write_tar("a.tar", [(f"{v}.png", sample(v)["png"]) for v in range(40)])
    one = data([], tmp_path, urls=str(path), caption=None)
    assert (one.num_train, len(one.validation)) == (38, 2)
    assert next(iter(one.train_loader(4)))["captions"] == [""] * 4


def test_the_fingerprint_is_of_the_content(shards, tmp_path, write_shard):
    first = data(shards, tmp_path).fingerprint
    moved = [write_shard(f"elsewhere/{path.name}", range(20 * s, 20 * s + 20)) for s, path in enumerate(shards)]
    same: list[dict[str, Any]] = [{"urls": [str(path) for path in files]} for files in (moved, shards[::-1])]
    same += [{"seed": 3, "num_workers": 2, "shuffle_window": 1, "memory_limit": 0, "filters": {"min_width": None}}]
    for options in same:
        assert data(shards, tmp_path, **options).fingerprint == first
    other: list[dict[str, Any]] = [
        {"resolution": 16},
        {"crop": "random"},
        {"val_samples": 9},
        {"caption": None},
    ]
    other += [{"urls": [str(path) for path in shards[:2]]}, {"val_urls": str(shards[0])}]
    found = [data(shards, tmp_path, **options).fingerprint for options in other]
    write_shard("1.tar", range(120, 140))  # as many samples, in a file of the same size
    found.append(data(shards, tmp_path).fingerprint)
    assert len({first, *found}) == len(other) + 2


def test_the_report_says_what_is_there_and_what_is_left_out(write_shard, sample, tmp_path):
    facts = [{"punsafe": 0.1}] * 30 + [{"punsafe": 0.9}] * 4 + [{"punsafe": None}] * 3
    samples = {f"{v:06d}": sample(v, fact) for v, fact in enumerate(facts)}
    del samples["000000"]["png"]
    path = write_shard("a.tar", samples)
    lines = data([], tmp_path, urls=str(path), filters={"max_punsafe": 0.5}, val_samples=2).report()
    assert lines[0].startswith("test: 1 shards, ") and lines[0].endswith(" 36 samples")
    assert lines[1:] == [
        "27 to train on, 2 to validate on, kept in memory",
        "left out: punsafe 4, punsafe_null 3",
        "damaged: no_image 1",
    ]


@pytest.mark.parametrize(
    "setting",
    [{"val_samples": 0}, {"val_samples": -1}, {"val_samples": 2.5}, {"num_workers": -1}, {"max_pixels": 0},
     {"max_bad_fraction": -1}, {"max_bad_fraction": 1.5}],
)  # fmt: skip
def test_numbers_out_of_range_are_named(shards, tmp_path, setting):
    ((key, value),) = setting.items()
    with pytest.raises(UserError, match=rf"data\.{key}.* {value}|data\.{key}={value}"):
        data(shards, tmp_path, **setting)


def test_metadata_that_no_parser_gets_through_are_none(write_shard, sample, tmp_path):
    """As a scan has it: they would end every evaluation, and a run that has begun takes no other shards."""
    hostile = {"0": {**sample(0), "json": b"[" * 100_000}, "1": {**sample(1), "json": b"{"}}
    one = data([write_shard("a.tar", hostile)], tmp_path, val_urls=[str(write_shard("v.tar", hostile))])
    assert [one.validation.metadata(index) for index in range(2)] == [{}, {}]
    assert len(one.validation.held_out) == 2

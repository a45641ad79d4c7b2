"""The loader on damaged shards, wrong stages and changed files: counted, named, never endless."""

import gc
import itertools
import json
import os
import pickle

import pytest
import torch

from carrara.data.manifest import Manifest
from carrara.data.reader import Decoding
from carrara.data.workers import workers_explained
from carrara.errors import MachineError, UserError


def captions(batches):
    return [caption for batch in batches for caption in batch["captions"]]


def damaged(write_shard, sample, tmp_path, bad, total=60):
    """A manifest of one shard in which the samples of `bad` cannot be decoded."""
    samples = {f"{v:06d}": sample(v) for v in range(total)}
    for v in bad:
        samples[f"{v:06d}"]["png"] = b"\x89PNG\r\n\x1a\n damaged" if v % 2 else b"no picture"
    return Manifest.load([str(write_shard("a.tar", samples))], tmp_path / "cache")


@pytest.mark.parametrize("keep", [True, False])
def test_a_sample_that_cannot_be_decoded_is_replaced_and_counted(loader, write_shard, sample, tmp_path, keep):
    manifest = damaged(write_shard, sample, tmp_path, bad=[3, 7, 10])
    batches = list(loader(manifest, batch=20, keep=keep))
    found = captions(batches)
    assert len(found) == 60
    assert set(found) == {f"caption {v}" for v in range(60) if v not in (3, 7, 10)}
    counts = {"not_an_image": 0}
    for batch in batches:
        for reason, count in batch["skipped"].items():
            counts[reason] = counts.get(reason, 0) + count
    assert sum(counts.values()) >= 3
    clean = list(loader(damaged(write_shard, sample, tmp_path, bad=[]), batch=20))
    moved = [a == b for a, b in zip(found, captions(clean), strict=True)]
    assert moved.count(False) == 3  # every other place in the stream is as it was


@pytest.mark.parametrize("workers", [0, 2])
def test_substitutes_do_not_depend_on_ranks_and_workers(loader, write_shard, sample, tmp_path, workers):
    manifest = damaged(write_shard, sample, tmp_path, bad=[3, 7, 10])
    whole = list(loader(manifest, batch=20))
    halves = [loader(manifest, 20, rank, 2, num_workers=workers) for rank in range(2)]
    for batch, *parts in zip(whole, *halves, strict=True):
        assert batch["captions"] == captions(parts)
    for half in halves:
        half.close()


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_bad_samples_stop_the_run(loader, write_shard, sample, tmp_path, workers):
    manifest = damaged(write_shard, sample, tmp_path, bad=range(0, 60, 4))
    few = loader(manifest, batch=10, max_bad_fraction=0.5, num_workers=workers)
    assert len([*few, *few, *few]) == 18
    few.close()
    strict = loader(manifest, batch=10, max_bad_fraction=0.1, num_workers=workers, steps_per_epoch=100)
    given = []
    with pytest.raises(UserError, match=r"of the last \d+ samples cannot be decoded .*max_bad_fraction=0\.1"):
        given.extend(strict)
    assert 60 < 10 * len(given) <= 100  # judged as soon as there are 100 tries, not before
    strict.close()


@pytest.mark.parametrize("workers", [0, 1])
def test_trap_6_samples_that_all_fail_to_decode_stop_the_run(loader, write_shard, sample, tmp_path, workers):
    manifest = damaged(write_shard, sample, tmp_path, bad=range(60))
    one = loader(manifest, num_workers=workers)
    with pytest.raises(UserError, match=r"^16 samples in a row cannot be decoded") as error:
        next(iter(one))
    assert "Traceback" not in str(error.value)
    one.close()


def reject_all(samples):
    return (sample for sample in samples if sample["position"] < 0)


def reject_some(samples):
    return (sample for sample in samples if sample["position"] != 17)


def end_early(samples):
    yield from itertools.islice(samples, 24)


def label(samples):
    for sample in samples:
        yield {
            **sample,
            "caption": f"{sample['__key__']}: {sample['caption']}",
            "image": 255 - sample["image"],
        }


@pytest.mark.parametrize("workers", [0, 1])
def test_trap_6_a_stage_that_rejects_samples_is_an_error_and_no_endless_loop(loader, manifest, workers):
    for stage, message in ((reject_all, "holds back"), (reject_some, "drops or reorders"), (end_early, "an end")):
        one = loader(manifest, stages=[stage], num_workers=workers)
        with pytest.raises(UserError, match=message):
            list(one)
        one.close()


def test_stages_of_ones_own_stand_between_decoding_and_batching(loader, manifest):
    plain, own = list(loader(manifest)), loader(manifest, stages=[label], num_workers=2)
    for a, b in zip(plain, own, strict=True):
        assert torch.equal(b["images"], 255 - a["images"])
        assert b["captions"] == [f"{k}: {c}" for k, c in zip(a["keys"], a["captions"], strict=True)]
    own.close()


def test_trap_1_a_spawned_worker_reads_its_own_rank(loader, manifest):
    whole = list(loader(manifest))
    second = loader(manifest, rank=1, world=2, num_workers=1, start_method="spawn")
    for batch, part in zip(whole, second, strict=True):
        assert part["captions"] == batch["captions"][6:]
        assert torch.equal(part["images"], batch["images"][6:])
    second.close()


def test_trap_4_keys_that_repeat_across_shards_stay_apart(loader, write_shard, tmp_path, sample):
    paths = [write_shard(f"{s}.tar", {f"{v:06d}": sample(10 * s + v) for v in range(10)}) for s in range(3)]
    manifest = Manifest.load([str(path) for path in paths], tmp_path / "cache")
    (batch,) = loader(manifest, batch=30)
    assert len(set(batch["keys"])) == len(set(batch["captions"])) == 30


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was run",))


def test_trap_5_pickles_in_a_shard_are_not_run(loader, write_shard, sample, tmp_path):
    bomb = pickle.dumps(Bomb())
    members = dict.fromkeys(("pyd", "pickle", "pkl", "pth"), bomb)
    path = write_shard("a.tar", {f"{v:06d}": {**sample(v), **members} for v in range(6)})
    manifest = Manifest.load([str(path)], tmp_path / "cache")
    assert len(captions(list(loader(manifest, batch=6)))) == 6


def test_a_batch_that_cannot_be_cut_is_refused(loader, manifest):
    with pytest.raises(UserError, match="batch_size=12 cannot be cut into 5 ranks"):
        loader(manifest, 12, world=5)
    with pytest.raises(UserError, match=r"position 18 is no multiple of trainer\.batch_size=12"):
        loader(manifest, 12, start_position=18)


def test_a_shard_that_changes_under_the_run_is_named(loader, manifest, write_shard):
    one = loader(manifest)
    for s in range(4):
        write_shard(f"{s}.tar", range(3))
    with pytest.raises(UserError, match=r"\d\.tar has changed since the run began"):
        list(one)


def test_a_shard_cut_while_it_is_read_costs_its_samples(loader, write_shard, tmp_path):
    path = write_shard("a.tar", range(60))
    one = loader(Manifest.load([str(path)], tmp_path / "cache"), max_bad_fraction=1.0, batch=10)
    first = next(iter(one))
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)
    rest = list(one)
    assert first["skipped"] == {} and len(rest) == 5
    assert sum(batch["skipped"].get("unreadable", 0) for batch in rest) > 5


def test_a_caption_in_the_json_is_read(loader, write_shard, sample, tmp_path):
    path = write_shard(
        "a.tar", {str(v): {**sample(v), "json": json.dumps({"TEXT": f"text {v}"}).encode()} for v in range(4)}
    )
    manifest = Manifest.load([str(path)], tmp_path / "cache", "TEXT")
    (batch,) = loader(manifest, batch=4, decoding=Decoding(8, "TEXT"))
    assert sorted(batch["captions"]) == [f"text {v}" for v in range(4)]


def test_a_caption_of_white_space_alone_is_none(loader, write_shard, sample, tmp_path):
    samples = {str(v): sample(v) for v in range(8)}
    samples["3"]["txt"], samples["5"]["txt"] = b" \n\t ", b"\0"
    manifest = Manifest.load([str(write_shard("a.tar", samples))], tmp_path / "cache")
    (batch,) = loader(manifest, batch=8)
    assert batch["skipped"] == {"empty_caption": 2} and all(batch["captions"])


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that …", "shared memory is full"),
        ("unable to write to file </torch_7>: No space left on device (28)", "shared memory is full"),
        ("DataLoader worker (pid(s) 7, 8) exited unexpectedly", "data worker is gone"),
        (
            "DataLoader worker (pid 7) is killed by signal: Killed. ",
            r"pid 7\) is killed by signal: Killed\. Out of mem",
        ),
    ],
)
def test_a_worker_that_is_gone_is_told_in_one_line(said, told):
    with pytest.raises(MachineError, match=told), workers_explained():
        raise RuntimeError(said)


def test_shared_memory_that_is_full_is_told_in_one_line(loader, manifest, monkeypatch):
    """The thread in which torch moves a batch there would print its traceback, drop the batch, and wait for ever."""

    def full(tensor):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    with pytest.raises(MachineError, match="enlarge /dev/shm"):
        next(iter(loader(manifest, num_workers=1)))
    next(iter(loader(manifest, num_workers=0)))


class Ending:
    """Part of a cycle, so that only the collector ends it; tells which process did."""

    def __init__(self, told):
        self.told, self.cycle = told, self

    def __del__(self):
        (self.told / str(os.getpid())).touch()


def collect(samples):
    for sample in samples:
        gc.collect()
        yield sample


def test_a_worker_does_not_end_what_is_garbage_in_its_rank(loader, manifest, tmp_path):
    """Such as the iterator of an evaluation that was left: "AssertionError: can only test a child process"."""
    told = tmp_path / "ended"
    told.mkdir()
    one = loader(manifest, stages=[collect], num_workers=1)
    gc.disable()
    try:
        Ending(told)
        next(iter(one))
    finally:
        gc.enable()
    one.close()
    gc.collect()
    assert [path.name for path in told.iterdir()] == [str(os.getpid())]


def test_other_errors_in_a_worker_keep_their_traceback():
    with pytest.raises(RuntimeError, match="Original Traceback"), workers_explained():
        raise RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback …")

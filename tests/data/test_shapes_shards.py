"""Shards of shapes: what is in them, and that they are whole, the same, and made once."""

import io
import json
import multiprocessing
import tarfile

import numpy as np
import pytest
import webdataset
from PIL import Image

from carrara.data.shapes import HELD_OUT, Object, Scene, examples
from carrara.data.shapes_shards import write_shapes
from carrara.errors import UserError

SMALL = {"num_train": 25, "num_val": 7, "num_val_seen": 5, "shard_size": 10, "seed": 3}


def members(path):
    with tarfile.open(path) as tar:
        files = {info.name: tar.extractfile(info) for info in tar.getmembers()}
        return {name: file.read() for name, file in files.items() if file is not None}


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_shards_hold_samples_in_the_layout_of_laion(tmp_path):
    folder = write_shapes(tmp_path / "shapes", **SMALL, resolution=48)
    assert sorted(path.name for path in folder.iterdir()) == [
        "shapes.json",
        "train-000000.tar",
        "train-000001.tar",
        "train-000002.tar",
        "val-000000.tar",
        "val-000001.tar",
    ]
    shard = members(folder / "train-000002.tar")
    assert sorted({name.split(".")[0] for name in shard}) == [f"train_{k:08d}" for k in range(20, 25)]
    assert len(shard) == 15

    drawn = examples(3, "train", [22], 48)
    image = Image.open(io.BytesIO(shard["train_00000022.png"]))
    assert image.mode == "RGB"
    assert np.array_equal(np.asarray(image).transpose(2, 0, 1), drawn.images[0])
    assert shard["train_00000022.txt"].decode() == drawn.captions[0]
    facts = json.loads(shard["train_00000022.json"])
    assert (facts["WIDTH"], facts["HEIGHT"], facts["split"]) == (48, 48, "train")
    assert (facts["key"], facts["caption"]) == ("train_00000022", drawn.captions[0])
    scene = facts["scene"]
    objects = tuple(Object(**thing) for thing in scene["objects"])
    assert Scene(scene["background"], objects, scene["relation"]) == drawn.scenes[0]
    assert facts["shape"] == ", ".join(thing.shape for thing in objects)
    assert facts["color"] == ", ".join(thing.color for thing in objects)


def test_validation_says_what_is_held_out(tmp_path):
    folder = write_shapes(tmp_path / "shapes", **SMALL)
    facts = [
        json.loads(value)
        for path in sorted(folder.glob("val-*.tar"))
        for name, value in members(path).items()
        if name.endswith(".json")
    ]
    assert [fact["split"] for fact in facts] == ["held_out"] * 7 + ["seen"] * 5
    for fact in facts:
        special = any((thing["shape"], thing["color"]) in HELD_OUT for thing in fact["scene"]["objects"])
        assert special == (fact["split"] == "held_out")


def test_webdataset_reads_them(tmp_path):
    folder = write_shapes(tmp_path / "shapes", **SMALL)
    dataset = webdataset.WebDataset(str(folder / "train-{000000..000002}.tar"), shardshuffle=False)
    samples = list(dataset.decode("rgb8").to_tuple("__key__", "png", "txt", "json"))
    assert [key for key, *_ in samples] == [f"train_{k:08d}" for k in range(25)]
    assert samples[0][1].shape == (32, 32, 3)
    assert samples[4][2] == samples[4][3]["caption"]


def test_bytes_depend_on_the_arguments_only(tmp_path):
    first = contents(write_shapes(tmp_path / "a", **SMALL))
    assert contents(write_shapes(tmp_path / "b", **SMALL)) == first
    other = contents(write_shapes(tmp_path / "c", **{**SMALL, "seed": 4}))
    assert all(other[name] != first[name] for name in first)


def test_more_samples_begin_with_the_same(tmp_path):
    few = write_shapes(tmp_path / "few", **SMALL)
    many = write_shapes(tmp_path / "many", **{**SMALL, "num_train": 40})
    for name in ("train-000000.tar", "train-000001.tar", "val-000000.tar"):
        assert (few / name).read_bytes() == (many / name).read_bytes()


def test_the_same_shapes_are_kept(tmp_path):
    folder = write_shapes(tmp_path / "shapes", **SMALL)
    (folder / "train-000000.index").write_text("left by somebody")
    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert write_shapes(folder, **SMALL) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == times


def test_other_contents_are_refused_and_left_alone(tmp_path):
    folder = write_shapes(tmp_path / "shapes", **SMALL)
    before = contents(folder)
    with pytest.raises(UserError, match="num_train 25 is not 26"):
        write_shapes(folder, **{**SMALL, "num_train": 26})
    assert contents(folder) == before
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "letter.txt").write_text("dear")
    with pytest.raises(UserError, match="not a folder of shapes"):
        write_shapes(mine, **SMALL)
    assert (mine / "letter.txt").read_text() == "dear"


def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    def full_disk(*_):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("carrara.data.shapes_shards._png", full_disk)
        with pytest.raises(OSError, match="No space"):
            write_shapes(tmp_path / "shapes", **SMALL)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
    assert len(list(write_shapes(tmp_path / "shapes", **SMALL).glob("*.tar"))) == 5


def test_remains_of_a_killed_process_are_replaced(tmp_path):
    remains = tmp_path / ".shapes.partial"
    remains.mkdir()
    (remains / "train-000009.tar").write_bytes(b"half a shard")
    (tmp_path / "shapes").mkdir()
    folder = write_shapes(tmp_path / "shapes", **SMALL)
    assert not remains.exists()
    assert len(list(folder.glob("*.tar"))) == 5


def test_processes_that_ask_at_once_make_it_once(tmp_path):
    context = multiprocessing.get_context("spawn")
    with context.Pool(2) as pool:
        jobs = [pool.apply_async(write_shapes, (tmp_path / "shapes",), SMALL) for _ in range(4)]
        assert [job.get(timeout=60) for job in jobs] == [tmp_path / "shapes"] * 4
    assert contents(tmp_path / "shapes") == contents(write_shapes(tmp_path / "alone", **SMALL))


@pytest.mark.parametrize("wrong", [{"num_train": -1}, {"shard_size": 0}, {"resolution": 8}, {"pair_share": 1.5}])
def test_impossible_arguments(tmp_path, wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        write_shapes(tmp_path / "shapes", **{**SMALL, **wrong})
    assert not list(tmp_path.iterdir())

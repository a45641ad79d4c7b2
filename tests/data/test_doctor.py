import io
import json
import os
from pathlib import Path

import pytest
from PIL import Image

from carrara.data import doctor as doctor_module
from carrara.data.cache import ShardCache
from carrara.data.doctor import Health, examine
from carrara.data.reader import Decoding
from tests.shards import png


def look(tmp_path, *paths: Path, caption: str | None = ".txt", filters=None, processes: int = 1, **decoding) -> Health:
    cache = ShardCache(tmp_path / "cache", 1e9)
    names = [str(path) for path in paths]
    return examine(names, tmp_path / "cache", cache, Decoding(8, caption, **decoding), filters or {}, processes)


def check(health: Health) -> None:
    """Every sample is accounted for, once."""
    for shard in health.shards:
        assert shard.samples == shard.ok + sum(shard.skipped.values())
    told = json.loads(health.as_json())
    assert told["samples"] == told["ok"] + sum(told["skipped"].values()) == health.samples


def test_a_clean_shard_is_clean(tmp_path, write_shard):
    health = look(tmp_path, write_shard("a.tar", range(10)))
    check(health)
    assert (health.samples, health.skipped, health.archive) == (10, {}, {})
    assert not health.exceeds(0.0)
    assert list(health.lines()) == ["1 shards, 10 samples = 10 that can be used + skipped: none"]


def test_every_sample_has_one_reason(tmp_path, write_shard, sample):
    samples = {f"{k:03d}": sample(k, {"punsafe": 0.1}) for k in range(12)}
    samples["001"]["png"] = b"<html>gone</html>"
    samples["002"]["png"] = samples["002"]["png"][:50]
    del samples["003"]["txt"]
    samples["004"]["txt"] = b""
    samples["005"]["json"] = b'{"punsafe": null}'
    samples["006"]["json"] = b'{"punsafe": 0.9}'
    del samples["007"]["png"]
    samples["008"]["json"] = b"{broken"
    samples["009"]["json"] = b'{"punsafe": "0.1"}'
    samples["010"]["png"] = png(10, (40, 40))
    samples["011"]["txt"] = b" \n"  # seen only where it is read
    health = look(tmp_path, write_shard("a.tar", samples), filters={"max_punsafe": 0.5}, max_pixels=1000)
    check(health)
    assert health.samples == 12
    assert health.skipped == {
        "not_an_image": 1, "broken_image": 1, "no_caption": 1, "empty_caption": 2, "punsafe_null": 3, "punsafe": 1,
        "no_image": 1, "too_many_pixels": 1,
    }  # fmt: skip
    assert health.archive == {"broken_json": 1, "no_number_punsafe": 1}
    (shard,) = health.shards
    assert shard.ok == 1 and shard.examples["no_image"] == ["007"] and shard.examples["broken_json"] == ["008"]
    assert health.exceeds(0.9) and not health.exceeds(0.92)
    (first, last) = health.lines()
    assert "1 of 12 samples can be used" in first and "no_image 1 (007)" in first
    assert last.startswith("1 shards, 12 samples = 1 that can be used + skipped: punsafe_null 3, ")


def test_what_is_wrong_with_the_tar_is_told_beside_its_samples(tmp_path, write_shard, write_tar, sample):
    members = [
        (f"{k}.{suffix}", data) for suffix in ("png", "txt", "json") for k in range(4) for data in (sample(k)[suffix],)
    ]
    unsorted = write_tar("unsorted.tar", members)
    twice = write_tar(
        "twice.tar", [("7.png", png(7)), ("7.txt", b"a"), ("7.txt", b"b"), ("8.png", png(8)), ("8.txt", b"c")]
    )
    cut = write_shard("cut.tar", range(100, 110))
    cut.write_bytes(cut.read_bytes()[:-12_000])
    page = tmp_path / "page.tar"
    page.write_text("<html>503</html>" * 100)
    empty = tmp_path / "empty.tar"
    empty.touch()
    health = look(tmp_path, unsorted, twice, cut, page, empty)
    check(health)
    by_name = {Path(shard.path).name: shard for shard in health.shards}
    assert by_name["unsorted.tar"].archive == {"unsorted": 4} and by_name["unsorted.tar"].ok == 4
    assert by_name["twice.tar"].archive == {"duplicate_key": 1} and by_name["twice.tar"].ok == 2
    assert by_name["cut.tar"].archive == {"truncated": 1} and by_name["cut.tar"].skipped == {"no_image": 1}
    assert "is not a tar file" in by_name["page.tar"].unusable
    assert "cannot be read" in by_name["empty.tar"].unusable
    assert health.exceeds(1.0)  # a shard of which nothing can be read is more than any share of samples
    assert sum("page.tar" in line for line in health.lines()) == 1


def test_keys_that_repeat_across_shards_are_counted(tmp_path, write_shard):
    health = look(tmp_path, write_shard("a.tar", range(10)), write_shard("b.tar", range(7, 20)))
    assert health.repeated_keys == 3
    assert "3 keys occur in more than one shard" in list(health.lines())[-1]


def test_many_processes_find_the_same(tmp_path, write_shard, sample):
    paths = []
    for s in range(5):
        samples = {f"{k:03d}": sample(k) for k in range(s, s + 6)}
        samples[f"{s:03d}"]["png"] = b"x"
        paths.append(write_shard(f"{s}.tar", samples))
    assert look(tmp_path, *paths, processes=3).as_json() == look(tmp_path, *paths).as_json()


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("bad", ["b", "ag"])
def test_a_picture_that_crashes_the_decoder_costs_its_shard_alone(tmp_path, write_shard, monkeypatch, processes, bad):
    def load(self, sample, u=()):
        if self.reader.key(sample)[0] in bad:
            os._exit(11)

    alone: list[int] = []
    examine_alone = doctor_module._examine_alone

    def noted(one, manifest, item):
        alone.append(item[0])
        return examine_alone(one, manifest, item)

    monkeypatch.setattr(doctor_module.Samples, "load", load)
    monkeypatch.setattr(doctor_module, "_examine_alone", noted)
    paths = [write_shard(f"{name}.tar", range(4)) for name in "abcdefg"]
    health = look(tmp_path, *paths, processes=processes)
    assert [bool(shard.unusable) for shard in health.shards] == [name in bad for name in "abcdefg"]
    assert all("crashed" in shard.unusable for shard in health.shards if shard.unusable)
    assert len(alone) <= len(bad) * processes  # the rest go on side by side


def test_gigantic_pictures_are_judged_by_their_header(tmp_path, write_shard, sample):
    """A bomb of 2.5 gigapixels in 3 MB; decoding it would take 2.5 GB."""
    buffer = io.BytesIO()
    Image.new("1", (50_000, 50_000)).save(buffer, "PNG")
    samples = {"0": sample(0), "1": {**sample(1), "png": buffer.getvalue()}}
    assert look(tmp_path, write_shard("a.tar", samples)).skipped == {"too_many_pixels": 1}


@pytest.mark.parametrize("processes", [1, 2])
def test_no_shard_at_all_can_be_used(tmp_path, processes):
    page = tmp_path / "page.tar"
    page.write_text("x")
    health = look(tmp_path, page, processes=processes, filters={"min_width": 8})
    assert health.samples == 0 and health.exceeds(1.0)
    assert "page.tar is not a tar file" in next(health.lines())

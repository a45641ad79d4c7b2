"""Scanning shards: whatever is whole is found, whatever is not is named."""

import errno
import tarfile

import numpy as np
import pytest
from webdataset.tariterators import group_by_keys, tar_file_expander

from carrara.data import manifest as manifest_module
from carrara.data.eligibility import eligible
from carrara.data.manifest import Manifest
from carrara.data.shard_index import CAPTION, IMAGE, JSON, ShardIndex, scan
from carrara.data.tar_walk import Problem, walk
from carrara.errors import MachineError, UserError
from tests.shards import within


def contents(path, index):
    """{key: (image, caption, JSON)}, None for what is absent."""
    data = path.read_bytes()
    found = {}
    for key, members in zip(index.keys.tolist(), index.members.tolist(), strict=True):
        found[key.decode()] = tuple(data[o : o + s] if s >= 0 else None for o, s in members[:3])
    return found


def keys(index):
    return [key.decode() for key in index.keys.tolist()]


def header_at(path, name):
    """Offset of the header of a member of a shard without extended headers."""
    with tarfile.open(path) as tar:
        return tar.getmember(name).offset


def overwrite(path, offset, data):
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def by_webdataset(path):
    """The samples that webdataset's own reader finds."""
    with path.open("rb") as stream:
        return list(group_by_keys(tar_file_expander([{"url": str(path), "stream": stream}])))


def load(tmp_path, *paths, caption=".txt"):
    return Manifest.load([str(path) for path in paths], tmp_path / "cache", caption)


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_those_of_the_standard_library(write_tar, sample, format):
    names = ["a/0001", "ünïcode", "x" * 90, "folder/" * 15 + "name"]
    if format != tarfile.USTAR_FORMAT:
        names += ["y" * 300, "long folder/" * 40 + "z" * 200]
    written = {name: sample(value) for value, name in enumerate(names)}
    path = write_tar(
        "a.tar", [(f"{k}.{suffix}", data) for k, m in written.items() for suffix, data in m.items()], format
    )
    index = scan(str(path))
    assert contents(path, index) == {k: (m["png"], m["txt"], m["json"]) for k, m in written.items()}
    assert index.problems == []


def test_a_clean_shard_reads_as_with_webdataset(write_shard, sample):
    path = write_shard("a.tar", {f"sub/{v:03d}": sample(v) for v in range(12)})
    theirs = {s["__key__"]: (s["png"], s["txt"], s["json"]) for s in by_webdataset(path)}
    assert len(theirs) == 12
    ours = contents(path, scan(str(path)))
    assert ours == theirs
    assert list(ours) == list(theirs)


def test_sizes_in_base_256_and_pax_records_are_read(sample):
    # such headers are written for members of 8 GiB; here they tell small sizes
    for size in (b"\x80" + (700).to_bytes(11, "big"), b"%011o\0" % 700):
        info = tarfile.TarInfo("a.png")
        header = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
        header[124:136] = size
        header[148:156] = b"%06o\0 " % (256 + sum(header[:148]) + sum(header[156:]))
        members, problems = walk(bytes(header) + bytes(1024))
        assert (members, problems) == ([("a.png", 512, 700)], [])
    info = tarfile.TarInfo("a.png")
    info.pax_headers = {"size": "700", "path": "b.png"}
    record = info.tobuf(tarfile.PAX_FORMAT)
    assert walk(record + bytes(1024)) == ([("b.png", len(record), 700)], [])


def pax(records, name="a.png", payload=b"p" * 10):
    """An archive of one member, behind a pax record of these bytes."""

    def member(kind, name, data):
        info = tarfile.TarInfo(name)
        info.type, info.size = kind, len(data)
        return info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % 512)

    return member(tarfile.XHDTYPE, "x", records) + member(tarfile.REGTYPE, name, payload) + bytes(1024)


@pytest.mark.parametrize("size", [-1, -512, -1024, -1536, -(10**6)])
def test_a_pax_record_of_a_negative_size_does_not_lead_back(size):
    """To the record itself, say, for ever."""
    record = f"{len(str(size)) + 9} size={size}\n".encode()
    with within(5):
        assert walk(pax(record)) == ([("a.png", 1536, 10)], [])


def test_a_pax_record_is_read_once_and_up_to_its_first_megabyte():
    path = b"14 path=b.png\n"
    many = b"9 a=bcd1\n" * 100_000
    with within(5):
        assert walk(pax(many + path))[0][0].name == "b.png"
        assert walk(pax(b"9 a=bcd1\n" * 3_000_000 + path))[0][0].name == "a.png"


def test_a_name_that_is_too_long_costs_its_member_alone(tmp_path, write_tar, sample):
    """And does not make the index, whose keys and problems are as wide as the widest, a thousand times as large."""
    long = "é" * 500_000
    names = [f"{k:04d}.png" for k in range(300)] + [f"{long}.png", f"{'n' * 1021}.png"]
    path = write_tar("a.tar", [(name, b"p") for name in names])
    index = scan(str(path), None)
    assert keys(index) == [f"{k:04d}" for k in range(300)]
    assert [problem.reason for problem in index.problems] == ["long_name"] * 2
    assert index.problems[0].place == "é" * 512 and index.keys.itemsize == 4
    index.save(tmp_path / "index.npz")
    assert (tmp_path / "index.npz").stat().st_size < 50_000
    assert ShardIndex.load(tmp_path / "index.npz").problems == index.problems


def test_trap_4_a_garbage_header_costs_its_own_sample_only(write_shard):
    path = write_shard("a.tar", range(40))
    overwrite(path, header_at(path, "000010.png"), b"\xa5" * 512)
    assert len(by_webdataset(path)) < 15  # what makes it a trap
    index = scan(str(path))
    assert len(index.keys) == 39
    assert [problem.reason for problem in index.problems] == ["garbage_header", "no_image"]
    assert index.problems[1].place == "000010"


def test_trap_4_nul_blocks_cost_the_members_under_them_only(write_shard):
    path = write_shard("a.tar", range(40))
    start, stop = header_at(path, "000010.json"), header_at(path, "000012.json")
    overwrite(path, start, bytes(stop - start))
    index = scan(str(path))
    assert keys(index) == [f"{v:06d}" for v in range(40) if v not in (10, 11)]
    assert Problem(f"@{start}", "nul_blocks") in index.problems


def test_trap_4_archives_written_behind_one_another_are_read_whole(write_shard, tmp_path):
    both = write_shard("a.tar", range(5)).read_bytes() + write_shard("b.tar", range(5, 9)).read_bytes()
    path = tmp_path / "both.tar"
    path.write_bytes(both)
    assert len(scan(str(path)).keys) == 9


@pytest.mark.parametrize("cut", ["payload", "header", "between"])
def test_trap_4_a_cut_shard_keeps_what_is_whole(write_shard, tmp_path, cut):
    path = write_shard("a.tar", {f"{v:06d}": {"png": b"p" * 600, "txt": b"t" * 600} for v in range(10)})
    # the image comes first, so that a cut before the caption leaves a sample without one
    start = header_at(path, "000006.txt")
    path.write_bytes(path.read_bytes()[: start + {"payload": 700, "header": 100, "between": 0}[cut]])
    index = scan(str(path))
    assert len(index.keys) == 7
    assert [problem.reason for problem in index.problems] == ([] if cut == "between" else ["truncated"])
    mask, reasons = eligible(load(tmp_path, path), ".txt", {})
    assert mask.sum() == 6
    assert reasons == {"no_caption": 1}


def test_trap_4_unsorted_members_make_whole_samples(write_tar, sample):
    members = [(f"{v:03d}.{suffix}", data) for v in range(20) for suffix, data in sample(v).items()]
    order = np.random.default_rng(0).permutation(len(members))
    path = write_tar("a.tar", [members[i] for i in order])
    expected = {f"{v:03d}": tuple(sample(v).values()) for v in range(20)}
    assert contents(path, scan(str(path))) == expected


def test_trap_4_dots_in_a_name_belong_to_the_key(write_tar):
    members = [
        ("img.v1.0.jpg", b"1"),
        ("img.v1.0.txt", b"one"),
        ("img.v1.1.JPG", b"2"),
        ("img.v1.1.TXT", b"two"),
    ]
    found = contents(path := write_tar("a.tar", members), scan(str(path)))
    assert found == {"img.v1.0": (b"1", b"one", None), "img.v1.1": (b"2", b"two", None)}


def test_trap_4_of_a_repeated_key_the_first_counts(write_tar):
    members = [("a.png", b"1"), ("a.txt", b"one"), ("a.png", b"2"), ("a.txt", b"two"), ("a.jpg", b"3")]
    path = write_tar("a.tar", members)
    index = scan(str(path))
    assert contents(path, index) == {"a": (b"1", b"one", None)}
    assert index.problems == [(name, "duplicate_key") for name in ("a.png", "a.txt", "a.jpg")]


def test_hidden_files_and_other_members_are_passed_over(write_tar):
    members = [
        ("._a.png", b"-"),
        (".png", b"-"),
        ("__meta__", b"-"),
        ("a.png", b"1"),
        ("a.txt", b"t"),
        ("a.cls", b"3"),
    ]
    path = write_tar("a.tar", members)
    assert contents(path, scan(str(path))) == {"a": (b"1", b"t", None)}


@pytest.mark.parametrize("data", [b"", b"<html>404</html>", bytes(10240), b"\x8f" * 5000])
def test_a_file_that_is_no_tar_is_named(tmp_path, data):
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(UserError, match=r"a\.tar"):
        load(tmp_path, tmp_path / "a.tar")


def test_a_shard_without_images_or_captions_is_named(write_tar, tmp_path):
    no_images = write_tar("no_images.tar", [("a.txt", b"t")])
    no_captions = write_tar("no_captions.tar", [("a.png", b"p")])
    with pytest.raises(UserError, match=r"no_images\.tar holds no image"):
        load(tmp_path, no_images)
    with pytest.raises(UserError, match=r"no_captions\.tar holds no image with a caption"):
        load(tmp_path, no_captions)
    assert len(load(tmp_path, no_captions, caption=None)) == 1


def test_captions_from_the_json_are_those_that_are_text(write_shard, sample, tmp_path):
    facts = [{"TEXT": "a cat"}, {"TEXT": None}, {}, {"TEXT": " "}]
    path = write_shard("a.tar", {str(v): sample(v, fact) for v, fact in enumerate(facts)})
    manifest = load(tmp_path, path, caption="TEXT")
    mask, reasons = eligible(manifest, "TEXT", {})
    assert mask.tolist() == [True, False, False, False]
    assert reasons == {"no_caption": 2, "empty_caption": 1}
    members = manifest.index(0).members
    assert members[0, CAPTION].tolist() == members[0, JSON].tolist()


def test_damaged_json_is_a_problem_and_not_the_end(write_shard, sample):
    path = write_shard("a.tar", {"0": {**sample(0), "json": b'{"width": '}, "1": sample(1, {"width": 8})})
    index = scan(str(path))
    assert index.problems == [("0", "broken_json")]
    np.testing.assert_equal(index.columns["width"], [np.nan, 8])
    assert (index.members[:, IMAGE, 1] > 0).all()


def test_an_index_is_kept_until_the_shard_changes(write_shard, tmp_path, monkeypatch):
    path = write_shard("a.tar", range(5))
    first = load(tmp_path, path)
    monkeypatch.setattr(manifest_module, "scan", lambda *_: pytest.fail("scanned again"))
    assert load(tmp_path, path) == first
    monkeypatch.undo()
    write_shard("a.tar", range(7))
    assert len(load(tmp_path, path)) == 7
    for index in (tmp_path / "cache").rglob("*.npz"):
        index.write_bytes(index.read_bytes()[:200])
    assert len(load(tmp_path, path)) == 7


def test_a_full_disk_is_told_in_one_line(write_shard, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    path = write_shard("a.tar", range(5))
    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(MachineError, match=r"data\.cache_dir: cannot write .*\.npz: No space left"):
        load(tmp_path, path)
    assert list((tmp_path / "cache").rglob("*.*")) == []


def test_many_shards_are_scanned_as_few_are(write_shard, tmp_path):
    paths = [write_shard(f"{s}.tar", range(s, 2 * s + 1)) for s in range(7)]
    together = load(tmp_path / "together", *paths)
    assert [shard.path for shard in together.shards] == [str(path) for path in paths]
    for shard, path in zip(together.shards, paths, strict=True):
        (alone,) = load(tmp_path / "alone", path).shards
        assert (alone.digest, alone.num_samples) == (shard.digest, shard.num_samples)


@pytest.mark.parametrize("changed", ["pictures", "captions", "one picture of few"])
def test_shards_of_the_same_keys_and_sizes_are_told_apart_by_what_they_hold(write_shard, sample, tmp_path, changed):
    count = 5 if changed == "one picture of few" else 300
    samples = {f"{k:03d}": sample(k) for k in range(count)}
    other = {key: dict(members) for key, members in samples.items()}
    for k, members in enumerate(other.values()):
        if changed == "captions":
            members["txt"] = members["txt"].replace(b"caption", b"CAPTION")
        elif changed == "pictures" or k == 3:
            members["png"] = sample(k + 2000)["png"]
    one = load(tmp_path, write_shard("one/a.tar", samples)).shards[0]
    again = load(tmp_path, write_shard("again/a.tar", samples)).shards[0]
    two = load(tmp_path, write_shard("two/a.tar", other)).shards[0]
    assert one.bytes == two.bytes and one.digest == again.digest != two.digest


FACTS = [
    {"WIDTH": 100, "HEIGHT": 50, "punsafe": 0.1, "similarity": 0.5, "aesthetic": 6, "pwatermark": 0.2},
    {"WIDTH": 100.0, "HEIGHT": 100.0, "punsafe": 0.9, "similarity": 0.4, "aesthetic": 5.0, "pwatermark": 0.2},
    {
        "WIDTH": None,
        "HEIGHT": None,
        "punsafe": None,
        "similarity": None,
        "aesthetic": None,
        "pwatermark": None,
    },
    {},
    {"WIDTH": "100", "HEIGHT": True, "punsafe": "0", "similarity": [], "aesthetic": {}, "pwatermark": False},
    {"WIDTH": 0, "HEIGHT": 0, "punsafe": float("nan"), "similarity": 0.1, "aesthetic": 1, "pwatermark": 0.9},
]


@pytest.mark.parametrize(
    ("filters", "passing", "counts"),
    [
        ({"max_punsafe": 0.5}, [0], {"punsafe": 1, "punsafe_null": 4}),
        ({"max_pwatermark": 0.5}, [0, 1], {"pwatermark": 1, "pwatermark_null": 3}),
        ({"min_similarity": 0.5}, [0], {"similarity": 2, "similarity_null": 3}),
        ({"min_aesthetic": 5}, [0, 1], {"aesthetic": 1, "aesthetic_null": 3}),
        ({"min_width": 100}, [0, 1], {"width": 1, "width_null": 3}),
        ({"min_height": 51}, [1], {"height": 2, "height_null": 3}),
        ({"max_aspect": 1.5}, [1], {"aspect": 1, "aspect_null": 4}),
        ({"max_aspect": 2, "min_width": None}, [0, 1], {"aspect_null": 4}),
        ({"min_width": 100, "max_punsafe": 0.5}, [0], {"width": 1, "width_null": 3, "punsafe": 1}),
        ({}, [0, 1, 2, 3, 4, 5], {}),
    ],
)
def test_trap_9_filters_fail_closed(write_shard, sample, tmp_path, filters, passing, counts):
    path = write_shard("a.tar", {str(v): sample(v, facts) for v, facts in enumerate(FACTS)})
    mask, reasons = eligible(load(tmp_path, path), ".txt", filters)
    assert np.flatnonzero(mask).tolist() == passing
    assert reasons == counts


def test_trap_9_infinities_fail_closed(write_shard, sample, tmp_path):
    facts = [b'{"width": Infinity, "punsafe": 0.1}', b'{"width": 9, "punsafe": -Infinity}', b'{"width": 1e999}']
    path = write_shard("a.tar", {str(v): {**sample(v), "json": one} for v, one in enumerate(facts)} | {"3": sample(3)})
    manifest = load(tmp_path, path)
    for filters, passing, counts in (
        ({"min_width": 8}, 1, {"width_null": 3}),
        ({"max_punsafe": 0.5}, 0, {"punsafe_null": 3}),
    ):
        mask, reasons = eligible(manifest, ".txt", filters)
        assert np.flatnonzero(mask).tolist() == [passing] and reasons == counts


def test_trap_9_a_column_that_some_shards_lack_is_null_there(write_shard, sample, tmp_path):
    with_column = write_shard("a.tar", {str(v): sample(v, {"punsafe": 0.1}) for v in range(3)})
    without = write_shard("b.tar", range(4))
    mask, reasons = eligible(load(tmp_path, with_column, without), ".txt", {"max_punsafe": 0.5})
    assert mask.tolist() == [True] * 3 + [False] * 4
    assert reasons == {"punsafe_null": 4}


def test_trap_9_a_column_that_no_shard_has_is_named(write_shard, tmp_path):
    manifest = load(tmp_path, write_shard("a.tar", range(3)))
    with pytest.raises(UserError, match=r"max_punsafe: no shard has the column 'punsafe'"):
        eligible(manifest, ".txt", {"max_punsafe": 0.5})
    with pytest.raises(UserError, match="min_hight is not known"):
        eligible(manifest, ".txt", {"min_hight": 5})


def test_trap_6_filters_that_leave_nothing_say_why(write_shard, sample, tmp_path):
    path = write_shard("a.tar", {"0": sample(0, {"punsafe": 0.9}), "1": sample(1), "2": sample(2)})
    with pytest.raises(UserError, match=r"no sample of 3 passes data\.filters: punsafe_null 2, punsafe 1"):
        eligible(load(tmp_path, path), ".txt", {"max_punsafe": 0.5})


def test_sizes_of_pictures_are_read_for_those_who_ask(tmp_path, write_shard):
    """Each question has an index of its own: after one without sizes, one with them is made."""
    path = write_shard("a.tar", range(3))
    for asked, shape in [(False, (0, 2)), (True, (3, 2)), (False, (0, 2))]:
        found = Manifest.load([str(path)], tmp_path / "cache", pictures=asked).index(0).pictures
        assert found.shape == shape and (found == 8).all()

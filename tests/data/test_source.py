"""Which shards a spec means."""

import gzip

import pytest
import webdataset.utils

from carrara.data.source import expand, unpacked
from carrara.errors import UserError


@pytest.fixture
def folder(tmp_path):
    for name in ("a-0.tar", "a-1.tar", "a-2.tar", "b.tar", "with [brackets] {and},comma.tar", "note.txt"):
        (tmp_path / name).write_bytes(b"tar")
    return tmp_path


def names(found, folder):
    assert all(path.startswith(f"{folder}/") for path in found)
    return [path.removeprefix(f"{folder}/") for path in found]


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("b.tar", ["b.tar"]),
        ("a-{0..2}.tar", ["a-0.tar", "a-1.tar", "a-2.tar"]),
        ("{b,a-1}.tar", ["b.tar", "a-1.tar"]),
        ("a-*.tar", ["a-0.tar", "a-1.tar", "a-2.tar"]),
        ("[ab]*.tar", ["a-0.tar", "a-1.tar", "a-2.tar", "b.tar"]),
        ("{a-[01],b}*.tar", ["a-0.tar", "a-1.tar", "b.tar"]),
        ("with [brackets] {and},comma.tar", ["with [brackets] {and},comma.tar"]),
        ("a-0.tar::b.tar", ["a-0.tar", "b.tar"]),
    ],
)
def test_specs(folder, monkeypatch, spec, expected):
    monkeypatch.chdir(folder)
    assert expand(spec) == expected
    assert (
        names(expand(f"{folder}/{spec}") if "::" not in spec else [f"{folder}/{e}" for e in expected], folder)
        == expected
    )


def test_lists_and_folders(folder):
    assert names(expand([f"{folder}/b.tar", f"{folder}/a-{{0..1}}.tar"]), folder) == [
        "b.tar",
        "a-0.tar",
        "a-1.tar",
    ]
    assert names(expand(f"[{folder}/b.tar, {folder}/{{a-2,a-0}}.tar]"), folder) == [
        "b.tar",
        "a-2.tar",
        "a-0.tar",
    ]
    assert len(expand(str(folder))) == 5
    assert names(expand(f"file:{folder}/b.tar"), folder) == names(expand(f"file://{folder}/b.tar"), folder) == ["b.tar"]


def test_a_shard_named_twice_is_read_once(folder, caplog):
    assert names(expand([f"{folder}/a-*.tar", f"{folder}/a-1.tar"]), folder) == [
        "a-0.tar",
        "a-1.tar",
        "a-2.tar",
    ]
    assert "names 1 shards more than once" in caplog.text


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("c-*.tar", r"data\.urls: no shard matches .*c-\*\.tar"),
        ("a-{0..3}.tar", r"data\.urls: there is no shard .*a-3\.tar"),
        ("c.tar", r"data\.urls: there is no shard .*c\.tar"),
        ([], "is empty"),
        ("[]", "is empty"),
    ],
)
def test_what_is_not_there_is_named(folder, monkeypatch, spec, message):
    monkeypatch.chdir(folder)
    with pytest.raises(UserError, match=message):
        expand(spec)


@pytest.mark.parametrize(
    "address",
    [
        "https://user:SECRET@host/a.tar",
        "https://host/{0..3}.tar?X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Signature=SECRET",
        "https://host/a.tar?AWSAccessKeyId=SECRET",
        "https://host/a.tar?sv=2022&sig=SECRET",
        "https://host/a.tar?GoogleAccessId=a&Signature=SECRET",
        "https://host/a.tar?download=true&access_token=SECRET",
    ],
)
def test_addresses_with_a_password_or_signature_are_refused(address):
    """They are written into run folders; the message does not tell them either."""
    with pytest.raises(UserError, match="must hold no password, key or signature") as refused:
        expand(address)
    assert "SECRET" not in str(refused.value)
    assert expand("https://host/a.tar?download=true&version=3") == ["https://host/a.tar?download=true&version=3"]


@pytest.mark.parametrize(
    "url", ["pipe:cat a-0.tar", "pipe:touch hacked", "pipe:cat *.tar", "ftp://h/a.tar", "memory://a.tar"]
)
def test_trap_5_shells_and_unknown_schemes_are_refused_by_name(folder, monkeypatch, url):
    monkeypatch.chdir(folder)
    for spec in (url, [url], f"[{url}]"):
        with pytest.raises(UserError, match=f"'{url.partition(':')[0]}:' is not read"):
            expand(spec)
    assert not (folder / "hacked").exists()


def test_trap_5_webdataset_runs_neither_pickles_nor_shells(folder):
    assert webdataset.utils.enforce_security
    with pytest.raises(ValueError, match="unsafe_gopen"):
        webdataset.gopen(f"pipe:touch {folder}/hacked")
    assert not (folder / "hacked").exists()


def test_gzipped_shards_are_unpacked_once(tmp_path):
    plain, packed = tmp_path / "a.tar", tmp_path / "b.tar.gz"
    plain.write_bytes(b"plain")
    packed.write_bytes(gzip.compress(b"packed"))
    found = unpacked([str(plain), str(packed)], tmp_path / "cache")
    assert found[0] == str(plain)
    with open(found[1], "rb") as file:
        assert file.read() == b"packed"
    assert unpacked([str(packed)], tmp_path / "cache") == found[1:]
    packed.write_bytes(gzip.compress(b"packed anew"))
    assert unpacked([str(packed)], tmp_path / "cache") != found[1:]
    packed.write_bytes(gzip.compress(b"cut" * 1000)[:-10])
    with pytest.raises(UserError, match=r"b\.tar\.gz"):
        unpacked([str(packed)], tmp_path / "cache")
    assert len([path for path in (tmp_path / "cache").rglob("*") if path.is_file()]) == 2

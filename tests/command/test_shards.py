"""`python shards.py do=inspect|doctor`."""

import io
import json
import sys
import tarfile
from pathlib import Path

import pytest

from carrara.command import shards
from carrara.command_line import RunFailed
from carrara.errors import UserError
from tests.data.test_cache import server  # noqa: F401
from tests.shards import png

CONF = Path(__file__).parents[2] / "conf"


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(*overrides: str) -> None:
        shards.main(CONF, ["data=laion", "size=demo", *overrides])

    return run


def test_a_remote_shard_that_cannot_be_read_is_told_with_the_reason(run, server, write_shard, capsys):  # noqa: F811
    """The others are known then; and once it is mended it is fetched again."""
    (server.folder / "html.tar").write_bytes(b"<html>" * 1000)
    write_shard("served/good.tar", range(20))
    urls = f"data.urls=[{server.url('none.tar')},{server.url('html.tar')},{server.url('good.tar')}]"
    with pytest.raises(UserError, match=r"none\.tar: there is nothing at this address \(and 1 more"):
        run("do=inspect", urls)
    with pytest.raises(UserError, match=r"html\.tar is not a tar file"):
        run("do=inspect", f"data.urls={server.url('html.tar')}")
    assert server.gets["good.tar"] == 1
    write_shard("served/html.tar", range(20, 40))
    run("do=inspect", f"data.urls=[{server.url('html.tar')},{server.url('good.tar')}]")
    assert "2 shards" in capsys.readouterr().out and server.gets["good.tar"] == 1


def test_the_doctors_report_has_its_place_before_anything_is_decoded(run, write_shard, tmp_path, monkeypatch):
    write_shard("a.tar", range(4))
    run("do=doctor", "data.urls=a.tar", "out=reports/health.json")
    assert json.loads((tmp_path / "reports/health.json").read_text())["ok"] == 4
    monkeypatch.setattr(shards, "examine", lambda *_: pytest.fail("decoded"))
    for out in ("reports", "a.tar/health.json"):
        with pytest.raises(UserError, match=f"out={out} cannot be written: "):
            run("do=doctor", "data.urls=a.tar", f"out={out}")


def test_names_that_are_no_utf8_are_told(run, tmp_path, monkeypatch):
    members = [("a.png", png(1)), ("a.txt", b"c"), ("caf\udce9.txt", b"no picture")]
    with tarfile.open("a.tar", "w", encoding="utf-8", errors="surrogateescape") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    told = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(told, encoding="utf-8", write_through=True))
    with pytest.raises(RunFailed):
        run("do=doctor", "data.urls=a.tar", "out=health.json")
    assert "no_image 1 (caf\N{REPLACEMENT CHARACTER})" in told.getvalue().decode()
    assert json.loads((tmp_path / "health.json").read_text())["skipped"] == {"no_image": 1}

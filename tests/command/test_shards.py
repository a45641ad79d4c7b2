"""`python shards.py do=inspect|doctor`."""

from pathlib import Path

import pytest

from carrara.command import shards
from carrara.errors import UserError
from tests.data.test_cache import server  # noqa: F401

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

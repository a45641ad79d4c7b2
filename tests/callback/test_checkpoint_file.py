import logging
import os
import resource
import signal
from pathlib import Path

import pytest
import torch

from carrara.callback.checkpoint_file import VerifiedCheckpointIO, checkpoint_step, checkpoints, newest_valid, write
from carrara.errors import UserError


def save(folder: Path, step: int) -> Path:
    path = folder / f"step={step:08d}.ckpt"
    VerifiedCheckpointIO().save_checkpoint({"step": step, "x": torch.arange(1000.0)}, path)
    return path


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def test_what_is_saved_comes_back(tmp_path):
    path = save(tmp_path / "checkpoints", 7)
    loaded = VerifiedCheckpointIO().load_checkpoint(path)
    assert loaded["step"] == 7 and torch.equal(loaded["x"], torch.arange(1000.0))
    assert sorted(p.name for p in path.parent.iterdir()) == [path.name, path.name + ".sha256"]
    assert checkpoint_step(path) == 7


def test_a_failed_save_leaves_nothing_and_the_old_one_whole(tmp_path, monkeypatch):
    old = save(tmp_path, 1)

    def fail(checkpoint, file):
        file.write(b"half of it")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", fail)
    writer = VerifiedCheckpointIO()
    writer.save_checkpoint({}, tmp_path / "step=00000002.ckpt")
    assert isinstance(writer.problem, OSError) and str(writer.problem) == "no space left on device"
    assert sorted(p.name for p in tmp_path.iterdir()) == [old.name, old.name + ".sha256"]
    assert newest_valid(tmp_path) == old


def test_what_is_not_named_as_a_checkpoint_is_none(tmp_path):
    old, new = save(tmp_path, 99_999_999), save(tmp_path, 100_000_000)
    for name in ("step=00000100 (copy).ckpt", "step=last.ckpt", "step=7.ckpt.rejected", ".step=8.ckpt.tmp"):
        (tmp_path / name).touch()
    assert list(checkpoints(tmp_path).items()) == [(99_999_999, old), (100_000_000, new)]
    assert newest_valid(tmp_path) == new


def test_a_checkpoint_and_its_checksum_outlive_a_power_cut(tmp_path, monkeypatch):
    """Their contents, before they have their names, and then the names."""
    synced, real = [], os.fsync

    def sync(descriptor):
        synced.append((Path(os.readlink(f"/proc/self/fd/{descriptor}")).name, (tmp_path / name).exists()))
        real(descriptor)

    name = "step=00000003.ckpt"
    monkeypatch.setattr(os, "fsync", sync)
    save(tmp_path, 3)
    assert synced == [(f".{name}.tmp", False), (f"{name}.sha256", False), (tmp_path.name, True)]


def test_a_checkpoint_appears_whole(tmp_path, monkeypatch):
    """Under its own name there is never a part of one, and never one without its checksum."""
    written = []
    real = torch.save

    def watch(checkpoint, file):
        real(checkpoint, file)
        written.append(sorted(p.name for p in tmp_path.glob("step=*")))

    monkeypatch.setattr(torch, "save", watch)
    path = save(tmp_path, 3)
    assert written == [[]] and path.exists()


def test_objects_are_not_unpickled(tmp_path):
    path = tmp_path / "step=00000001.ckpt"
    torch.save({"x": Path("/")}, path)
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        VerifiedCheckpointIO().load_checkpoint(path, weights_only=False)


@pytest.mark.parametrize("damage", [flip, cut])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, caplog, damage):
    old, new = save(tmp_path, 90), save(tmp_path, 100)
    assert newest_valid(tmp_path) == new
    damage(new)
    with caplog.at_level(logging.WARNING):
        assert newest_valid(tmp_path) == old
    assert "step=00000100.ckpt" in caplog.text and "damaged" in caplog.text


def test_a_checkpoint_without_its_checksum_is_passed_over(tmp_path, caplog):
    old, new = save(tmp_path, 1), save(tmp_path, 2)
    new.with_name(new.name + ".sha256").unlink()
    with caplog.at_level(logging.WARNING):
        assert newest_valid(tmp_path) == old
    assert "is missing" in caplog.text


def test_all_damaged_is_the_users_to_know(tmp_path):
    for step in (1, 2):
        flip(save(tmp_path, step))
    with pytest.raises(UserError, match=r"no checkpoint in .* is intact"):
        newest_valid(tmp_path)


def test_no_checkpoint_at_all_is_a_fresh_start(tmp_path):
    assert newest_valid(tmp_path) is None
    assert newest_valid(tmp_path / "absent") is None


def test_a_full_disk_is_told_by_its_name_and_leaves_no_litter(tmp_path):
    """By a limit on the size of files, which the kernel enforces as it does the disk's end."""
    old = save(tmp_path, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        with pytest.raises(OSError, match="File too large"):
            write({"x": torch.zeros(1_000_000)}, tmp_path / "step=00000002.ckpt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert sorted(p.name for p in tmp_path.iterdir()) == [old.name, old.name + ".sha256"]
    assert newest_valid(tmp_path) == old

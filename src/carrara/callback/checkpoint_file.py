"""Checkpoint files that are whole or absent: written beside, fsynced, renamed, with a checksum."""

import hashlib
import logging
import os
import re
from pathlib import Path
from typing import IO, Any

import torch
from lightning.fabric.plugins import CheckpointIO

from carrara.errors import UserError

_log = logging.getLogger(__name__)

_NAME = re.compile(r"step=(\d+)\.ckpt")


class VerifiedCheckpointIO(CheckpointIO):
    """Saves through a temporary file of the same folder; loads tensors and plain data only, never objects.

    Attributes:
        problem: why the last file is not there; None if it is. Raised, it would leave the other ranks waiting for the
            one that writes.
    """

    problem: OSError | UserError | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        self.problem = None
        try:
            write(checkpoint, Path(path))
        except (OSError, UserError) as error:
            self.problem = error

    def load_checkpoint(
        self, path: Any, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return torch.load(path, map_location=map_location or "cpu", weights_only=True)

    def remove_checkpoint(self, path: Any) -> None:
        remove(Path(path))


def write(checkpoint: dict[str, Any], path: Path) -> None:
    """The whole file under its name, with its checksum beside it, or an exception and neither.

    Raises:
        UserError: it holds objects. They are not loaded again, and that would show only once it is needed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            _save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        if objects := torch.serialization.get_unsafe_globals_in_checkpoint(temporary):
            names = ", ".join(sorted(objects))
            raise UserError(f"a checkpoint is to hold tensors and plain data, and this has objects: {names}")
        with _digest_file(path).open("w") as recorded:
            recorded.write(digest(temporary))
            recorded.flush()
            os.fsync(recorded.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except BaseException:
        if not path.exists():
            _digest_file(path).unlink(missing_ok=True)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def _save(checkpoint: dict[str, Any], file: IO[bytes]) -> None:
    try:
        torch.save(checkpoint, file)
    except RuntimeError as error:  # torch's writer says "enforce fail" where the file system said what is wrong
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def remove(path: Path) -> None:
    """The file and its checksum."""
    path.unlink(missing_ok=True)
    _digest_file(path).unlink(missing_ok=True)


def set_aside(path: Path) -> None:
    """Renames a checkpoint to `….rejected`, which nothing takes for one."""
    path.rename(path.with_name(path.name + ".rejected"))
    _digest_file(path).unlink(missing_ok=True)


def checkpoints(folder: Path) -> dict[int, Path]:
    """step -> file, in rising order; what somebody else has put beside them is none."""
    found = {int(match[1]): path for path in folder.glob("step=*") if (match := _NAME.fullmatch(path.name))}
    return dict(sorted(found.items()))


def newest_valid(folder: Path) -> Path | None:
    """The newest checkpoint whose checksum holds; None if there is none at all.

    Raises:
        UserError: there are checkpoints, and all are damaged.
    """
    found = checkpoints(folder)
    for path in reversed(found.values()):
        if is_valid(path):
            return path
    if found:
        raise UserError(f"no checkpoint in {folder} is intact; start a new run, or restore the folder from a copy")
    return None


def is_valid(path: Path) -> bool:
    """Whether a checkpoint's checksum holds; if not, the log says what is wrong."""
    recorded = _digest_file(path)
    if not recorded.exists():
        _log.warning("passing over %s: its .sha256 is missing", path)
    elif not path.exists():
        _log.warning("passing over %s: it does not exist", path)
    elif recorded.read_text().strip() != digest(path):
        _log.warning("passing over %s: it is damaged (checksum differs)", path)
    else:
        return True
    return False


def checkpoint_name(step: int) -> str:
    """The file of a step; names are in the order of steps."""
    return f"step={step:08d}.ckpt"


def checkpoint_step(path: Path) -> int:
    """The optimizer step in a checkpoint's name."""
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1])


def _sync_folder(folder: Path) -> None:
    """The names in it outlive a power cut too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest_file(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def digest(path: Path) -> str:
    """SHA-256 of a checkpoint."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""Checkpoints that are whole or absent: written beside, fsynced, renamed, with a checksum."""

import hashlib
import logging
import os
import re
import time
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from carrara.errors import UserError

_log = logging.getLogger(__name__)

_CLOCK_STEPS = 20  # optimizer steps between two looks at the clock


class VerifiedCheckpointIO(CheckpointIO):
    """Saves through a temporary file of the same folder; loads tensors and plain data only, never objects."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")
        try:
            with temporary.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            _digest_file(path).write_text(digest(temporary))
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def load_checkpoint(
        self, path: Any, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return torch.load(path, map_location=map_location or "cpu", weights_only=True)

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)
        _digest_file(Path(path)).unlink(missing_ok=True)


class Checkpoints(Callback):
    """Saves everything a run needs to go on, every so many minutes, after every evaluation and after the last step.

    Besides Lightning's own, a checkpoint holds every rank's random state and the data position; the modules leave
    frozen weights out.

    Args:
        folder: the run's `checkpoints/`.
        minutes: between two, at most.
        epoch_steps: optimizer steps between two evaluations.
        keep: how many of the newest are kept.
        batch_size: global batch; samples consumed = steps · batch_size.
    """

    def __init__(self, folder: Path, minutes: float, epoch_steps: int, keep: int, batch_size: int):
        self.folder = folder
        self.seconds = 60 * minutes
        self.epoch_steps = epoch_steps
        self.keep = keep
        self.batch_size = batch_size
        self.step = 0
        self.saved_at = time.monotonic()

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        step = trainer.global_step
        if step == self.step or not self._due(trainer, step):
            return
        self.step, self.saved_at = step, time.monotonic()
        trainer.save_checkpoint(self.folder / f"step={step:08d}.ckpt")
        if trainer.is_global_zero:
            for old in sorted(self.folder.glob("step=*.ckpt"))[: -self.keep]:
                trainer.strategy.remove_checkpoint(old)

    def _due(self, trainer: lightning.Trainer, step: int) -> bool:
        if step % self.epoch_steps == 0 or step == trainer.max_steps:
            return True
        if step % _CLOCK_STEPS:
            return False
        late = time.monotonic() - self.saved_at > self.seconds
        return bool(trainer.strategy.broadcast(late))  # rank 0's clock decides for all

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["samples_consumed"] = trainer.global_step * self.batch_size
        checkpoint["random_states"] = _gather_random_states(trainer, pl_module.device)

    def on_load_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self.step = checkpoint["global_step"]
        states = checkpoint["random_states"]
        if len(states) == trainer.world_size:  # on another number of ranks nothing per rank can be carried over
            _set_random_state(states[trainer.global_rank], pl_module.device)


def newest_valid(folder: Path) -> Path | None:
    """The newest checkpoint whose checksum holds; None if there is none at all.

    Raises:
        UserError: there are checkpoints, and all are damaged.
    """
    found = sorted(folder.glob("step=*.ckpt"), reverse=True)
    for path in found:
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


def checkpoint_step(path: Path) -> int:
    """The optimizer step in a checkpoint's name."""
    match = re.fullmatch(r"step=(\d+)\.ckpt", path.name)
    assert match is not None
    return int(match[1])


def _digest_file(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def digest(path: Path) -> str:
    """SHA-256 of a checkpoint."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _gather_random_states(trainer: lightning.Trainer, device: torch.device) -> list[dict[str, Tensor]]:
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    if trainer.world_size == 1:
        return [states]
    gathered = {name: trainer.strategy.all_gather(state.to(device)).cpu() for name, state in states.items()}
    return [{name: state[rank].clone() for name, state in gathered.items()} for rank in range(trainer.world_size)]


def _set_random_state(states: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)

"""When a run's checkpoints are written, what is in them, and which are kept."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from carrara.callback.checkpoint_file import (
    VerifiedCheckpointIO,
    checkpoint_name,
    checkpoints,
    remove,
    set_aside,
)
from carrara.callback.ema import EMA, trainable
from carrara.callback.ranks import gather
from carrara.errors import UserError

_log = logging.getLogger(__name__)

Keep = Callable[[Sequence[int]], set[int]]
_CLOCK_STEPS = 20  # optimizer steps between two looks at the clock


class Checkpoints(Callback):
    """Saves everything a run needs to go on: every so many minutes, before every evaluation and after the last step.

    Besides Lightning's own, a checkpoint holds every rank's random state and the data position; the modules leave
    frozen weights out. It is saved before the evaluation, so that nothing is lost if that is not lived through.

    Where the disk is full, training goes on and tries again when the next is due; only the last one must succeed.

    Args:
        folder: the run's `checkpoints/`.
        minutes: between two, at most.
        epoch_steps: optimizer steps between two evaluations.
        keep: which are not removed; given the steps in rising order, the steps to keep.
        batch_size: global batch; samples consumed = steps · batch_size.
        ema: its average must be finite too.

    Attributes:
        step: of the last one that was written; 0 if none was.
    """

    def __init__(
        self,
        folder: Path,
        minutes: float,
        epoch_steps: int,
        keep: Keep,
        batch_size: int,
        ema: EMA,
    ):
        self.folder = folder
        self.seconds = 60 * minutes
        self.epoch_steps = epoch_steps
        self.keep = keep
        self.batch_size = batch_size
        self.ema = ema
        self.step = 0
        self._seen = 0
        self.saved_at = time.monotonic()

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._seen = trainer.global_step

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        step = trainer.global_step
        if step == self._seen:  # in the middle of an accumulated step, from which nothing could go on
            return
        self._seen = step
        if self._due(trainer, step):
            self.save(trainer, pl_module)

    def save(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """A checkpoint of the step that has just been made, unless there is one. All ranks call it.

        Whether it was written is in `step`.

        Raises:
            UserError: the weights are not finite; what is to be saved could not be loaded again; or it is the run's
                last step and the disk is full.
        """
        step = trainer.global_step
        if step == self.step:
            return
        self._check_finite(pl_module, step)
        self.saved_at = time.monotonic()
        trainer.save_checkpoint(self.folder / checkpoint_name(step))
        writer = trainer.strategy.checkpoint_io
        assert isinstance(writer, VerifiedCheckpointIO)
        problem = trainer.strategy.broadcast(writer.problem)
        if isinstance(problem, UserError):
            raise problem
        if problem is not None:
            told = f"cannot write the checkpoint of step {step} in {self.folder}: {problem.strerror or problem}"
            if step == trainer.max_steps:
                raise UserError(f"{told}; make room, then resume the run")
            _log.error("%s; it is tried again when the next is due", told)
            return
        self.step = step
        if trainer.is_global_zero:
            self._remove_others()

    def _remove_others(self) -> None:
        paths = checkpoints(self.folder)
        kept = {self.step, *self.keep(list(paths))}
        for step, path in paths.items():
            if step not in kept:
                remove(path)

    def _set_aside_later(self) -> None:
        """What could not be resumed from is damaged, and must not be taken for the newest when others are removed."""
        for step, path in checkpoints(self.folder).items():
            if step > self.step:
                set_aside(path)
                _log.warning("%s is set aside, and is named .rejected now", path)

    def _check_finite(self, pl_module: lightning.LightningModule, step: int) -> None:
        """Weights are alike on all ranks, so all find the same."""
        for of, tensors in (("", dict(trainable(pl_module))), ("the average of ", self.ema.average)):
            norms = torch._foreach_norm(list(tensors.values()), float("inf"))
            for name, norm in zip(tensors, norms, strict=True):
                if not norm.isfinite():
                    raise UserError(
                        f"{of}{name} is not finite after step {step}: the checkpoint is not written, and the last one "
                        "stays as it is. Start again with a lower trainer.learning_rate"
                    )

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
        checkpoint["random_states"] = gather(trainer, _random_state(pl_module.device))

    def on_load_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self.step = checkpoint["global_step"]
        if trainer.is_global_zero:  # all ranks have chosen by now
            self._set_aside_later()
        states = checkpoint["random_states"]
        if len(states) == trainer.world_size:  # on another number of ranks nothing per rank can be carried over
            _set_random_state(states[trainer.global_rank], pl_module.device)


def retention(newest: int, every: int | None, best: int, scores: Callable[[], Mapping[int, float]]) -> Keep:
    """Which steps to keep: the `newest` (1 or more), every multiple of `every`, the `best` by scores (the higher)."""

    def keep(steps: Sequence[int]) -> set[int]:
        known = scores() if best else {}
        ranked = sorted((step for step in steps if step in known), key=lambda step: (known[step], step))
        regular = [step for step in steps if every and step % every == 0]
        return {*steps[-newest:], *regular, *(ranked[-best:] if best else [])}

    return keep


def best_score(evaluated: Mapping[int, Mapping[str, float]], name: str, highest: bool) -> dict[int, float]:
    """step -> one of the scores of its evaluation, its sign such that the highest is the best.

    Where evaluations have no such score, the log says which they have.
    """
    found = {step: scores[name] * (1 if highest else -1) for step, scores in evaluated.items() if name in scores}
    if evaluated and not found:
        there = ", ".join(sorted(evaluated[max(evaluated)]))
        _log.warning("no checkpoint is kept as one of the best: trainer.best_score=%s is none of %s", name, there)
    return found


def _random_state(device: torch.device) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def _set_random_state(states: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)

"""A signal ends a run at its next step: checkpointed, logged, with exit code 128 + n."""

import logging
import signal
from types import FrameType
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback

from carrara.callback.checkpoint import Checkpoints
from carrara.callback.ranks import largest
from carrara.signals import SIGNALS

_log = logging.getLogger(__name__)


class Stop(Callback):
    """Ends the run after the step in which any rank was sent a signal of `SIGNALS`, once or often.

    Between steps, such as in an evaluation, the step has its checkpoint and the run ends at once. Stands between
    `Checkpoints` and `Evaluation`.
    """

    def __init__(self, checkpoints: Checkpoints):
        self.checkpoints = checkpoints
        self.signum = 0
        self.step = 0
        self.saved = False  # what has been trained so far is in a checkpoint

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.step = trainer.global_step
        for signum in SIGNALS:  # here: Lightning has just put its own in place, and takes ours away with them
            signal.signal(signum, self._note)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.signum = signum
        if self.saved:
            raise SystemExit(128 + signum)

    def on_train_batch_start(self, trainer: lightning.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.saved = False

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if trainer.global_step == self.step:  # gradients are still being accumulated
            return
        self.step = trainer.global_step
        signum = largest(trainer, self.signum)
        if signum:
            self.checkpoints.save(trainer, pl_module)
            if trainer.is_global_zero:
                _log.info("%s: stopped after step %d; %s", signal.Signals(signum).name, self.step, self._way_on())
            raise SystemExit(128 + signum)
        self.saved = self.checkpoints.step == self.step

    def _way_on(self) -> str:
        last = self.checkpoints.step
        if last == self.step:
            return "resume=… goes on from there"
        return f"it is not saved, and resume=… goes on from {f'step {last}' if last else 'the start'}"

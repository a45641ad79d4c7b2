"""The trained part leaves the run as a component, with averaged weights."""

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from carrara.callback.ema import EMA
from carrara.callback.evaluation import Evaluation
from carrara.component import save_component
from carrara.model.base import Model


class Export(Callback):
    """Writes `component/` and `scores.json` when training has come to its end.

    Args:
        folder: the run's.
        config: the node the part is built from.
        images: gives batches of training images, uint8 (B, 3, R, R), for what the part measures on them.
        ema: whose average is exported.
        evaluation: whose last scores go onto the card.
        card: what else goes onto it: `fingerprint` and `data`.
        score_card: the scores with what they depend on.
        write_more: writes further files into the component's folder, besides what the model itself writes.
    """

    def __init__(
        self,
        folder: Path,
        config: dict[str, Any],
        images: Callable[[], Iterator[Tensor]],
        ema: EMA,
        evaluation: Evaluation,
        card: dict[str, Any],
        score_card: Callable[[dict[str, float]], dict[str, Any]],
        write_more: Callable[[Model, Path], None] | None = None,
    ):
        self.folder = folder
        self.config = config
        self.images = images
        self.ema = ema
        self.evaluation = evaluation
        self.card = card
        self.score_card = score_card
        self.write_more = write_more

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """A run that was killed after its last step: nothing is left to train, so `on_train_end` never comes."""
        if self.ema.step >= trainer.max_steps:  # the trainer does not know its own step yet
            self._export(trainer, pl_module)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if trainer.global_step >= trainer.max_steps:
            self._export(trainer, pl_module)

    @torch.no_grad()
    def _export(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        assert isinstance(pl_module, Model)
        pl_module.eval()
        with self.ema.applied(pl_module):
            pl_module.finish(images.to(pl_module.device).float() / 127.5 - 1 for images in self.images())
            card = self.card | {"scores": self.evaluation.latest, "steps": self.ema.step}
            scores = json.dumps(self.score_card(self.evaluation.latest), indent=1)
            (self.folder / "scores.json").write_text(scores)
            save_component(
                self.folder / "component",
                pl_module.kind,
                self.config,
                pl_module.exported,
                card,
                partial(self._write_more, pl_module),
            )

    def _write_more(self, model: Model, folder: Path) -> None:
        model.write_exported(folder)
        if self.write_more is not None:
            self.write_more(model, folder)

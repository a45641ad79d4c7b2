"""`python -m dump_weights RUN`: a worker that leaves every rank's trained weights in RUN/rank<k>.pt."""

import sys
from pathlib import Path
from typing import Any

import lightning
import torch

from carrara.callback.ema import trainable
from carrara.rank import rank_main
from carrara.worker import run

fit = lightning.Trainer.fit


def fit_and_dump(trainer: lightning.Trainer, model: lightning.LightningModule, *args: Any, **kwargs: Any) -> None:
    fit(trainer, model, *args, **kwargs)
    torch.save({name: p.detach() for name, p in trainable(model)}, Path(sys.argv[1]) / f"rank{trainer.global_rank}.pt")


if __name__ == "__main__":
    lightning.Trainer.fit = fit_and_dump  # type: ignore[assignment,method-assign]
    rank_main(run)

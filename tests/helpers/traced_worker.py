"""`python -m traced_worker RUN`: a worker that writes down all it does, and does harm where it is told to.

RUN/trace_rank<k>.jsonl has a line for each micro-batch: step, loss to the bit, keys. RUN/end_rank<k>.pt is the state
after the last step. RUN/harm.json, a list of {rank, step, what}, is done once each: what is "kill" ("after" so many
seconds), "stop" (suspend), "raise", "nan" (the loss of that step), "signal" (SIGTERM, twice, to it and its data
workers), or "data_worker" (one of them is killed).
"""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import lightning
import torch
import torch._dynamo
from lightning.pytorch.callbacks import Callback

from carrara import worker
from carrara.callback.ema import EMA
from carrara.model.base import Model
from carrara.rank import rank_main

RANK = int(os.environ["RANK"])
callbacks = worker._callbacks
loss_of = Model.training_step


class Trace(Callback):
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = (folder / f"trace_rank{RANK}.jsonl").open("a", buffering=1)

    def on_train_batch_start(self, trainer: lightning.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        for harm in pending(self.folder):
            if harm["rank"] == RANK and harm["step"] == trainer.global_step:
                (self.folder / f"done_{harm['number']}").touch()
                do(harm["what"], pl_module, harm.get("after", 0.0))

    def on_train_batch_end(self, trainer: lightning.Trainer, pl_module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        line = {"step": trainer.global_step, "loss": float(outputs["loss"]).hex(), "keys": batch["keys"]}
        self.file.write(json.dumps(line) + "\n")

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        (ema,) = (callback for callback in trainer.callbacks if isinstance(callback, EMA))  # type: ignore[attr-defined]
        state = {
            "weights": {name: p.detach() for name, p in pl_module.named_parameters()},
            "ema": ema.average,
            "optimizer": trainer.optimizers[0].state_dict(),
            "scheduler": trainer.lr_scheduler_configs[0].scheduler.state_dict(),
            "random": torch.get_rng_state(),
            "compiled": torch._dynamo.utils.counters["stats"]["unique_graphs"],
            "flushed": bool((torch.full((1000,), 1e-40) * 1.0 == 0.0).all()),
        }
        torch.save(state, self.folder / f"end_rank{RANK}.pt")


def pending(folder: Path) -> list[dict[str, Any]]:
    path = folder / "harm.json"
    harms = json.loads(path.read_text()) if path.exists() else []
    numbered = [{**harm, "number": number} for number, harm in enumerate(harms)]
    return [harm for harm in numbered if not (folder / f"done_{harm['number']}").exists()]


def do(what: str, pl_module: Any, after: float) -> None:
    if what == "kill":
        threading.Timer(after, os.kill, (os.getpid(), signal.SIGKILL)).start()
        time.sleep(0.0 if after else 60.0)
    elif what == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif what == "raise":
        raise ZeroDivisionError("harm")
    elif what == "signal":
        for _ in range(2):  # not by this process itself, from which torch's data workers take it otherwise
            ids = [process.pid or 0 for process in multiprocessing.active_children()]
            subprocess.run(["kill", "-TERM", *map(str, [*ids, os.getpid()])], check=True)
            time.sleep(0.2)
    elif what == "data_worker":
        os.kill(multiprocessing.active_children()[0].pid or 0, signal.SIGKILL)
    elif what == "nan":
        loss = pl_module.loss

        def nan(batch: Any, u: Any = None) -> Any:
            pl_module.loss = loss
            return {name: value + torch.nan for name, value in loss(batch, u).items()}

        pl_module.loss = nan


def traced(config: Any, folder: Path, *rest: Any) -> list[Callback]:
    return [Trace(folder), *callbacks(config, folder, *rest)]


if __name__ == "__main__":
    worker._callbacks = traced  # type: ignore[assignment]
    rank_main(worker.run)
    sys.exit(0)

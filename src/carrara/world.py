"""Ranks that somebody else started: `torchrun … train.py`, or `srun` with a task per device.

Rank 0 then composes and makes the run's folder; the others learn its path from it and compose nothing.
"""

import os
import re
from collections.abc import Generator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from carrara.errors import UserError

_MEETING = timedelta(minutes=10)  # for the last of the ranks to start
_LONG = timedelta(days=14)  # rank 0 may have to wait for a part that another run is training


@dataclass(frozen=True)
class World:
    """This process among all of a run.

    Attributes:
        rank: from 0 to size − 1.
        local_size: processes on this machine.
    """

    rank: int
    size: int
    local_size: int

    def fill_in(self, trainer: Mapping[str, Any], given: set[str]) -> dict[str, Any]:
        """`trainer` with this world's devices and nodes.

        Args:
            given: the dotted keys that were set on the command line.

        Raises:
            UserError: a given number is another.
        """
        numbers = {"devices": self.local_size, "num_nodes": self.size // self.local_size}
        for key, number in numbers.items():
            if f"trainer.{key}" in given and trainer.get(key) != number:
                raise UserError(f"trainer.{key}={trainer.get(key)}, but {number} were started: leave trainer.{key} out")
        return {**trainer, **numbers}


def outside_world(environment: Mapping[str, str] | None = None) -> World | None:
    """The world that `torchrun` or `srun` made for this process, or None where we start processes ourselves.

    For `srun` the variables of torchrun are set in `os.environ`, where torch.distributed reads them.
    """
    env = os.environ if environment is None else environment
    if "RANK" not in env and _is_srun(env):
        os.environ.update(_from_slurm(env))
        env = os.environ
    if "RANK" not in env or "WORLD_SIZE" not in env:
        return None
    size = int(env["WORLD_SIZE"])
    return World(int(env["RANK"]), size, int(env.get("LOCAL_WORLD_SIZE", size)))


def _is_srun(env: Mapping[str, str]) -> bool:
    """A step of several tasks; the shell of an allocation (no step, `batch`, or one with a terminal) starts its own."""
    if "SLURM_PTY_PORT" in env:  # srun --pty: the other tasks' shells have ended
        return False
    return env.get("SLURM_STEP_ID", "").isdigit() and int(env.get("SLURM_STEP_NUM_TASKS", "1")) > 1


def _from_slurm(env: Mapping[str, str]) -> dict[str, str]:
    tasks, nodes = int(env["SLURM_STEP_NUM_TASKS"]), int(env.get("SLURM_STEP_NUM_NODES", "1"))
    if tasks % nodes:
        raise UserError(f"srun started {tasks} tasks on {nodes} nodes: each node needs the same number")
    # node[03-05,07] and node03,node04 both begin with node03
    first = re.sub(r"\[(\w+)[^\]]*\].*", r"\1", env.get("SLURM_STEP_NODELIST", "127.0.0.1")).split(",")[0]
    job = int(env.get("SLURM_JOB_ID", "0")) * 100 + int(env["SLURM_STEP_ID"])
    return {
        "RANK": env["SLURM_PROCID"],
        "LOCAL_RANK": env["SLURM_LOCALID"],
        "GROUP_RANK": env.get("SLURM_NODEID", "0"),
        "WORLD_SIZE": str(tasks),
        "LOCAL_WORLD_SIZE": str(tasks // nodes),
        "MASTER_ADDR": env.get("MASTER_ADDR", first),
        "MASTER_PORT": env.get("MASTER_PORT", str(15000 + job % 20000)),
    }


class Relay:
    """Words from rank 0 to the others, in order, through the store they meet in.

    The store may live in rank 0's process (under `srun` it does), which must not end before the others have heard that
    no run follows: they say so, and one that has died is not waited for longer than `_PATIENCE`.
    """

    _FAILED, _END = "failed", "end"
    _PATIENCE = timedelta(seconds=10)

    def __init__(self, world: World):
        from torch.distributed import DistError, PrefixStore, rendezvous

        try:
            store, _, _ = next(rendezvous("env://", world.rank, world.size, timeout=_MEETING))
        except DistError as error:
            raise UserError(
                f"rank {world.rank} has not met all {world.size} ranks within {_MEETING}: see which of them did not "
                f"start ({str(error).splitlines()[0]})"
            ) from None
        store.set_timeout(_LONG)
        # torchrun keeps its store over a restart, with what was said before
        self._store = PrefixStore(f"carrara/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        self._world = world
        self._sent = 0

    def send(self, folder: str) -> None:
        """Tells the others the run that comes next."""
        self._set(f"run {folder}")

    def end(self, failed: bool = False) -> None:
        """Tells the others that no run follows."""
        from torch.distributed import DistError

        self._set(self._FAILED if failed else self._END)
        with suppress(DistError):
            self._store.wait([f"heard {rank}" for rank in range(1, self._world.size)], self._PATIENCE)

    def receive(self) -> Generator[str]:
        """The runs, as rank 0 names them.

        Raises:
            ConnectionError: rank 0 failed; it says itself why.
        """
        from torch.distributed import DistError

        try:
            for number in range(1 << 30):
                word = self._store.get(str(number)).decode()
                if word.startswith("run "):
                    yield word.removeprefix("run ")
                    continue
                if word == self._FAILED:
                    raise ConnectionError("rank 0 failed")
                return
        finally:  # also where a run ends this process: rank 0 need not wait for it
            with suppress(DistError):
                self._store.set(f"heard {self._world.rank}", "")

    def _set(self, word: str) -> None:
        self._store.set(str(self._sent), word)
        self._sent += 1

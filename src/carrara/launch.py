"""Starts the processes of a run on this machine, waits for them, and says once what went wrong."""

import logging
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch.distributed.launcher.api
from torch.distributed.elastic.agent.server.api import WorkerGroup
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, launch_agent

from carrara.signals import EXIT_CODES, SIGNALS, exit_on_signal

_log = logging.getLogger(__name__)

_AGENT = "torch.distributed.elastic"  # whose loggers
# glibc hands a step's freed activations back to the kernel, and gets every page anew in the next one: 5 % of a step
_MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": str(2**25),
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
    "MALLOC_TOP_PAD_": str(2**26),
}
_TO_SAVE, _TO_END = 120, 10  # seconds that processes have after a signal, and after one of them has failed


class _Agent(LocalElasticAgent):
    """Gives processes that are stopped by a signal the time to save, and no more than they need where one has failed.

    A process that hangs or is suspended does not hear the others' end, and is killed after that time.
    """

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        workers = super()._start_workers(worker_group)
        processes = self._pcontext
        assert processes is not None
        close = processes.close

        def close_soon(death_sig: signal.Signals | None = None, timeout: int = _TO_END) -> None:
            close(death_sig, timeout)

        processes.close = close_soon  # type: ignore[method-assign]  # which it calls itself when one has failed
        return workers

    def _stop_workers(self, worker_group: WorkerGroup) -> None:
        if self._pcontext:
            self._pcontext.close()

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = 0) -> None:
        if self._pcontext:
            self._pcontext.close(death_sig, _TO_SAVE)


def launch(folder: Path, devices: int, module: str = "carrara.worker", max_restarts: int = 0) -> int:
    """Runs `python -m module folder` in `devices` processes under torch.distributed's elastic agent.

    A process that fails takes the others with it, and its error is shown once; then all are started again, up to
    `max_restarts` times, unless it was a user's mistake. The signals of `SIGNALS` are handed to the processes, which
    have two minutes to save what they have. Nothing is left running.

    Returns:
        0; 2 for a user's mistake (`UserError`); 128 + n for signal n; otherwise 1.
    """
    for restart in range(1, max_restarts + 2):
        code = _launch_once(folder, devices, module)
        if code in (0, 2, *EXIT_CODES) or restart > max_restarts:
            return code
        _log.warning("starting %s again, %d of %d times", folder, restart, max_restarts)
    raise AssertionError


def _launch_once(folder: Path, devices: int, module: str) -> int:
    with tempfile.TemporaryDirectory(prefix="carrara-") as errors, _surroundings(devices):
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=devices,
            run_id=folder.name,
            rdzv_backend="c10d",
            rdzv_endpoint="127.0.0.1:0",  # the agent holds the port: no race for a free one
            local_addr="127.0.0.1",
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=errors),
            signals_to_handle=",".join(s.name for s in _handled()),
        )
        try:
            with patch.object(torch.distributed.launcher.api, "LocalElasticAgent", _Agent):
                launch_agent(config, sys.executable, ["-m", module, str(folder)])
        except SignalException as stopped:
            return 128 + stopped.sigval
        except ChildFailedError as failed:
            return _explain(failed.failures)
    return 0


def _handled() -> list[signal.Signals]:
    """Where submitit has started us, USR2 is its: it puts the job back into the queue, and exits, which stops us."""
    free = signal.getsignal(signal.SIGUSR2) in (signal.SIG_DFL, exit_on_signal)
    return [signum for signum in SIGNALS if signum != signal.SIGUSR2 or free]


def _explain(failures: Mapping[int, ProcessFailure]) -> int:
    """Shows the first failure and gives the exit code."""
    rank = min(failures, key=lambda r: _time(failures[r]))
    failure = failures[rank]
    record = failure.error_file_data
    if "traceback" in record:  # written by carrara.rank
        sys.stderr.write(record["traceback"])
    elif failure.exitcode < 0 and not _stopped(failure):
        hint = " (out of memory?)" if failure.exitcode == -signal.SIGKILL else ""
        sys.stderr.write(f"error: rank {rank} was ended by {failure.signal_name()}{hint}\n")
    sys.stderr.flush()
    return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode


def _time(failure: ProcessFailure) -> float:
    """When it failed, in seconds; what was only stopped because of another failure comes last."""
    if _stopped(failure):
        return float("inf")
    if failure.exitcode < 0:
        return failure.timestamp - 2.0  # seen a moment late; its peers' broken connections follow within that moment
    return float(failure.error_file_data.get("time", failure.timestamp))


def _stopped(failure: ProcessFailure) -> bool:
    return failure.exitcode in (-signal.SIGTERM, 128 + signal.SIGTERM)


@contextmanager
def _surroundings(processes: int) -> Iterator[None]:
    """The processes' environment, a silent agent, and our signal handlers back in place at the end.

    Threads are shared out among the processes. What the user's environment says stays.
    """
    handlers = {s: signal.getsignal(s) for s in SIGNALS}
    settings = {"OMP_NUM_THREADS": str(max(1, physical_cores() // processes)), **_MALLOC}
    settings = {key: value for key, value in settings.items() if key not in os.environ}
    os.environ.update(settings)
    agents = [logging.getLogger(name) for name in logging.root.manager.loggerDict if name.startswith(_AGENT)]
    levels = [log.level for log in agents]
    for log in agents:
        log.setLevel(logging.CRITICAL)  # what it would say on a failure is said by `_explain`
    try:
        yield
    finally:
        for log, level in zip(agents, levels, strict=True):
            log.setLevel(level)
        for key in settings:
            del os.environ[key]
        for s, handler in handlers.items():
            if handler is not None and threading.current_thread() is threading.main_thread():
                signal.signal(s, handler)


def physical_cores() -> int:
    """Cores this process may use: its affinity and its container's quota, hyper-threads counted once."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    cores = set()
    for cpu in os.sched_getaffinity(0):
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        cores.add(siblings.read_text() if siblings.exists() else str(cpu))
    limit = Path("/sys/fs/cgroup/cpu.max")
    quota, _, period = limit.read_text().partition(" ") if limit.exists() else ("max", "", "")
    return len(cores) if quota == "max" else max(1, min(len(cores), int(quota) // int(period)))

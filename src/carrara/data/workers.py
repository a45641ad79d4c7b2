"""The processes that decode for a rank: what they are asked for, and how their end is told."""

import errno
import gc
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from carrara.errors import MachineError, UserError
from carrara.signals import SIGNALS

Batch = dict[str, Any]

_NO_SHARED_MEMORY = "shared memory is full: enlarge /dev/shm (docker: --shm-size), or lower data.num_workers"


def start(pipeline: Iterable[Batch], num_workers: int, start_method: str | None = None) -> Iterator[Batch]:
    """The batches of `pipeline`, made by so many processes in turn; by this one if there are none.

    The processes end when the iterator is forgotten.

    Raises:
        UserError, MachineError: as the pipeline does, without a traceback of torch's around it.
    """
    guarded = _Guarded(pipeline)
    batches: Iterable[Batch | _Failure] = guarded
    if num_workers:
        batches = DataLoader(
            guarded,
            batch_size=None,
            num_workers=num_workers,
            worker_init_fn=_quiet_worker,
            multiprocessing_context=start_method,
            generator=torch.Generator(),  # of the workers' seeds; else the rank's own would be one number further
            pin_memory=torch.cuda.is_available(),
        )
    gc.freeze()  # what is garbage here is not for a worker: it would end another iterator's workers, and stumble
    try:
        started = iter(batches)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise MachineError(_NO_SHARED_MEMORY) from None
    finally:
        gc.unfreeze()
    for batch in started:
        if isinstance(batch, _Failure):
            raise batch.error
        yield batch


@contextmanager
def workers_explained() -> Iterator[None]:
    """Tells in one line that a data worker is gone, as a MachineError.

    Around all of the training: torch raises from a signal handler, wherever the process happens to be, and has no
    exception of its own for it.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if "shared memory" in text or "Bus error" in text or "No space left on device" in text:
            reason = _NO_SHARED_MEMORY
        elif "is killed by signal" in text or "exited unexpectedly" in text:
            reason = f"a data worker is gone: {text.strip()} Out of memory? Lower data.num_workers"
        else:
            raise
        raise MachineError(reason) from None


@dataclass
class _Failure:
    """What a worker ends with in one line; torch would wrap it in a traceback."""

    error: UserError | MachineError


class _Guarded(IterableDataset[Batch | _Failure]):
    def __init__(self, pipeline: Iterable[Batch]) -> None:
        self.pipeline = pipeline

    def __iter__(self) -> Iterator[Batch | _Failure]:
        try:
            for batch in self.pipeline:
                yield _share(batch)
        except (UserError, MachineError) as error:
            yield _Failure(error)


def _share(batch: Batch) -> Batch:
    """Moves a worker's tensors to shared memory: the thread that does it otherwise loses them if there is no room."""
    if get_worker_info() is not None:
        try:
            for value in batch.values():
                if isinstance(value, torch.Tensor):
                    value.share_memory_()
        except RuntimeError:
            raise MachineError(_NO_SHARED_MEMORY) from None
    return batch


def _quiet_worker(worker: int) -> None:
    """Terminals, service managers and Slurm signal every process; the rank acts on it, and needs its workers till then.

    (torch gives workers one thread.)
    """
    for signum in SIGNALS:
        if signum != signal.SIGTERM:
            signal.signal(signum, signal.SIG_IGN)
    if sys.platform == "linux":  # elsewhere nobody tells who sent it
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_rank, daemon=True).start()


def _end_with_rank() -> None:
    """By SIGTERM a process ends the ones it has started; from anyone else it is not for a worker."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)

"""What every process of a run does around its work: it dies with its parent, and fails with one report."""

import ctypes
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from carrara.command_line import RunFailed, show_log
from carrara.errors import MachineError, UserError, full_disk
from carrara.signals import SIGNALS, exit_on_signal

_PR_SET_PDEATHSIG = 1


def rank_main(run: Callable[[Path], None]) -> NoReturn:
    """`run(folder)` on the folder in `sys.argv[1]`; the body of `python -m carrara.worker FOLDER`.

    What it raises is left for the launcher to show, once for all ranks. Exit codes: 0, 2 for a `UserError`,
    128 + n for signal n, 1 otherwise. `run` may install handlers of its own.
    """
    _die_with_parent()
    for signum in SIGNALS:
        signal.signal(signum, exit_on_signal)
    show_log()
    code = 0
    try:
        run(Path(sys.argv[1]))
    except UserError as mistake:
        _report(f"error: {mistake}\n")
        code = 2
    except MachineError as failure:
        _report(f"error: {failure}\n")
        code = 1
    except RunFailed as failure:
        code = failure.code
    except Exception as error:  # the process ends here: its traceback is handed to the launcher, not swallowed
        full = full_disk(error)
        _report(traceback.format_exc() if full is None else f"error: {full}\n")
        code = 1
    sys.exit(code)


def _report(text: str) -> None:
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path is None:  # started by hand
        sys.stderr.write(text)
        return
    now = time.time()
    record = {"message": text.strip().splitlines()[-1], "timestamp": int(now), "time": now, "traceback": text}
    Path(path).write_text(json.dumps(record), encoding="utf-8")


def _die_with_parent() -> None:
    """On Linux, the kernel ends this process when the launcher is killed and cannot do it itself."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

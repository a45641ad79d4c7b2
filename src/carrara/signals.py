"""The signals that end a run, and how."""

import signal
from types import FrameType

SIGNALS = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGUSR1,  # Slurm's, ahead of its end, by docs/slurm.sh
    signal.SIGUSR2,  # and by submitit
)
EXIT_CODES = tuple(128 + s for s in SIGNALS)


def exit_on_signal(signum: int, frame: FrameType | None) -> None:
    """A signal handler that unwinds the stack, with its locks and temporary files, and exits with 128 + signum."""
    raise SystemExit(128 + signum)

"""The exceptions that end a command with one line in place of a traceback."""

import errno
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_log = logging.getLogger(__name__)


class UserError(Exception):
    """A mistake in a command, a config or a file. Its message is one clear line that says what to do.

    Commands print it without a traceback and exit with code 2.
    """


class MachineError(Exception):
    """Something outside of the run failed; the message says what in one line. Started again, the run may go on."""


def full_disk(error: Exception) -> MachineError | None:
    """What to say of a write for which there was no room; None of any other error."""
    if not isinstance(error, OSError) or error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return None
    where = f" at {error.filename}" if error.filename else ""
    return MachineError(f"the disk is full{where} ({error.strerror}): make room, then start the same command again")


@contextmanager
def going_on_without(path: Path) -> Iterator[None]:
    """A file that there is no room for is left out, which is said in one line: a training does not end of it."""
    try:
        yield
    except OSError as error:
        if full_disk(error) is None:
            raise
        _log.error("%s is not written: the disk is full (%s)", path, error.strerror)

"""The one exception for a user's mistake."""


class UserError(Exception):
    """A mistake in a command, a config or a file. Its message is one clear line that says what to do.

    Commands print it without a traceback and exit with code 2.
    """


class MachineError(Exception):
    """Something outside of the run failed; the message says what in one line. Started again, the run may go on."""

"""Failures that a user is told in one line, without a traceback. Bad input is a plain ValueError."""


class RunFailed(RuntimeError):
    """A run can't go on; the message says why and what to do. Exit code 1."""

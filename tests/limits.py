"""Limits that the tests put on their own process."""

import contextlib
import resource


@contextlib.contextmanager
def largest_file(num_bytes):
    """Let the system refuse to write any file beyond a size, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

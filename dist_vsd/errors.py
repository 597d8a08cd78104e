"""Failures that a user is told in one line, without a traceback. Bad input is a plain ValueError."""

# What Python, torch, CUDA's libraries, oneDNN and the system say when memory is at its end: they share no exception.
_SIGNS_OF_NO_MEMORY = (
    "out of memory", "allocate memory", "not enough memory", "alloc_failed", "bad_alloc", "could not create a memory object",
    "could not create a primitive",
    "start new thread",
)  # fmt: skip


class RunFailed(RuntimeError):
    """A run can't go on; the message says why and what to do. Exit code 1."""


class OutOfMemory(RunFailed):
    """Memory did not suffice; the message says what would fit."""


def is_out_of_memory(error: BaseException | None) -> bool:
    """Say whether an exception, or what it was raised from, is for want of memory, on a CPU or a GPU, and nobody has told of it yet."""
    while error is not None and not isinstance(error, RunFailed):
        if isinstance(error, MemoryError) or any(sign in str(error).lower() for sign in _SIGNS_OF_NO_MEMORY):
            return True
        error = error.__cause__
    return False

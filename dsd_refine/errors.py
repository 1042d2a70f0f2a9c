"""The errors of the package. The command turns each into its exit code and one message; no user error is a traceback."""

from __future__ import annotations


class DsdError(Exception):
    """Root of all errors that this package raises on purpose. `exit_code` is what the command ends with."""

    exit_code = 1


class UsageError(DsdError):
    """Arguments, recipe, model or data cannot be used; nothing was trained."""

    exit_code = 2


class RecipeError(UsageError):
    """A recipe that does not validate. The message lists every mistake at once."""


class CheckpointError(UsageError):
    """The source cannot be read, or cannot be given back in its own shape."""


class DataError(UsageError):
    """The data cannot be used: absent, empty, wrong columns, labels that do not match."""


class VerifyError(DsdError):
    """What was written is not what was evaluated, or does not have the source's shape."""

    exit_code = 3


class Interrupted(DsdError):
    """SIGTERM or SIGINT arrived; the state is saved and `--resume` goes on from it."""

    exit_code = 4


class RunError(DsdError):
    """The run failed after it had begun: non-finite loss, no space, out of memory."""

    exit_code = 5


# how libraries and devices say that memory is full, where they raise no error of a kind of its own
MEMORY_IS_FULL = ("allocate memory", "out of memory", "_ALLOC_FAILED")


def is_full_memory(error: BaseException) -> bool:
    """Is it memory that there is not enough of, on whatever device?"""
    named = type(error).__name__ in ("OutOfMemoryError", "MemoryError")
    return named or any(words in str(error) for words in MEMORY_IS_FULL)

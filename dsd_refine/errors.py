"""The errors of the package.

The command turns each into a message and an exit code, without a traceback.
"""

from __future__ import annotations


class DsdError(Exception):
    """The base of all errors that this package raises on purpose.

    `exit_code` is that of the command.
    """

    exit_code = 1


class UsageError(DsdError):
    """Arguments, recipe, model or data cannot be used; nothing was trained."""

    exit_code = 2


class RecipeError(UsageError):
    """The recipe is not valid. The message lists all mistakes."""


class CheckpointError(UsageError):
    """The source cannot be read, or cannot be written back in the same shape."""


class DataError(UsageError):
    """The data cannot be used: missing, empty, wrong columns, or labels that do not match."""


class VerifyError(DsdError):
    """The written checkpoint is not the evaluated one, or does not have the source's shape."""

    exit_code = 3


class Interrupted(DsdError):
    """SIGTERM or SIGINT stopped the run. The state is saved, and `--resume` continues from it."""

    exit_code = 4


class RunError(DsdError):
    """The run failed after it had begun: a loss that is not finite, a full disk, or out of memory."""

    exit_code = 5


class AgreedError(RunError):
    """An error of one process that all processes of a run raise together. The main one alone says it."""


class Diverged(RunError):
    """A loss or a weight is not finite. A search goes on without this try.

    `step` is the optimizer step of the phase, and `loss` its loss as text, such as "nan". Both are None
    if an evaluation found it.
    """

    def __init__(self, message: str, step: int | None = None, loss: str | None = None) -> None:
        super().__init__(message)
        self.step, self.loss = step, loss


# Parts of the messages of libraries and devices that raise no special error when the memory is
# full.
MEMORY_IS_FULL = ("allocate memory", "out of memory", "_ALLOC_FAILED")


def is_full_memory(error: BaseException) -> bool:
    """Return whether an error says that the memory of any device is full."""
    named = type(error).__name__ in ("OutOfMemoryError", "MemoryError")
    return named or any(words in str(error) for words in MEMORY_IS_FULL)

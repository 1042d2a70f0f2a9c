"""Call the Hub: retry if it is busy, turn its errors into one line each, and check what was
downloaded.
"""

from __future__ import annotations

import errno
import re
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from dsd_refine.errors import CheckpointError, RunError, UsageError
from dsd_refine.files import sha256_file

T = TypeVar("T")

WAITS, LONGEST_WAIT = (1.0, 3.0), 60  # seconds between tries; the longest that we wait if the Hub asks for more

BROKEN_OFF = ("ReadError", "RemoteProtocolError", "ReadTimeout", "ConnectionResetError", "IncompleteRead")
UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS)


def ask_hub(repo: str, call: Callable[[], T], what: str = "model") -> T:
    """Call the Hub, and turn its errors into one line that keeps the Hub's own reason.

    Args:
        repo: The repository, for the message.
        call: The call of `huggingface_hub`.
        what: What the repository is, for the message.

    Raises:
        CheckpointError: The Hub refuses, or cannot be reached. `__cause__` is set only in the
            second case.
    """
    from huggingface_hub import errors as hub

    try:
        return _with_retries(call)
    except hub.GatedRepoError:
        raise CheckpointError(f"{repo}: the Hub says it is gated: accept its terms on its page, then `hf auth login`") from None
    except hub.RevisionNotFoundError:
        raise CheckpointError(f"{repo}: the Hub has no such revision of it") from None
    except hub.RepositoryNotFoundError:
        raise CheckpointError(
            f"{repo}: the Hub has no such {what}, or it is private: check the name, or log in with `hf auth login`"
        ) from None
    except hub.HFValidationError:
        raise CheckpointError(f"{repo}: not a directory here and not a valid Hub name (org/name)") from None
    except Exception as error:
        known = isinstance(error, hub.HfHubHTTPError | hub.LocalEntryNotFoundError | hub.OfflineModeIsEnabled | OSError)
        if not known and not is_of_the_hub(error):
            raise
        reason = _reason(repo, error)
        if reason is not None:
            raise CheckpointError(reason) from None
        raise _unreachable(repo, what) from error


def push_to_hub(repo: str, call: Callable[[], T]) -> T:
    """Make a call that writes to the Hub, and turn its errors into one line.

    Only a call that the Hub refused because it is busy (429) is tried again. Any other failed call
    may have had its effect, and a second one would write twice.

    Args:
        repo: The repository, for the message.
        call: The call of `huggingface_hub`.

    Raises:
        UsageError: The Hub refuses the token or what was sent. Another try would be of no use.
        RunError: The Hub is busy, the repository has changed, or the connection broke off.
    """
    try:
        return _with_retries(call, only_if_busy=True)
    except Exception as error:
        if isinstance(error, ValueError) and not is_of_the_hub(error):  # README's metadata, or an object that is refused
            raise UsageError(f"{repo}: the Hub refuses the files: {' '.join(str(error).split())[:300]}") from None
        if not isinstance(error, OSError) and not is_of_the_hub(error):
            raise
        raise _not_pushed(repo, _status(error)) from None


AGAIN = "nothing was pushed; run the same command again, what has arrived is not sent twice"


def _not_pushed(repo: str, status: int | None) -> UsageError | RunError:
    """The error for a failed write. `status` is the Hub's answer; None: the connection broke off."""
    if status in (401, 404):
        return UsageError(
            f"{repo}: the Hub does not accept the token for this repository ({status}): check the name, log in with "
            "`hf auth login`, or set HF_TOKEN to a token with write access; nothing was pushed"
        )
    if status == 403:
        return UsageError(
            f"{repo}: the token may not write to this repository (403): use a token with write access; nothing was pushed"
        )
    if status in (409, 412):
        return RunError(f"{repo}: the repository was changed while this push was under way ({status}); {AGAIN}")
    if status == 429:
        return RunError(f"{repo}: the Hub asks to wait (429); {AGAIN}")
    if status is not None:
        return RunError(f"{repo}: the Hub answered {status}; {AGAIN}")
    return RunError(f"{repo}: the connection to the Hub broke off; {AGAIN}")


def is_of_the_hub(error: Exception) -> bool:
    """Return whether an answer of the Hub, or a broken connection to it, caused an error."""
    return any(_from_http(cause) or hasattr(cause, "response") for cause in _chain(error))


def _from_http(error: BaseException) -> bool:
    return type(error).__module__.split(".")[0].startswith(("httpx", "httpcore"))


def _reason(repo: str, error: Exception) -> str | None:
    """Return the message for an error if the Hub has answered or the cache cannot be written.

    Else return None. The error of a failed snapshot only says "not in the cache", so the answer of
    the Hub is looked for in its causes.

    Raises:
        OSError: The disk of the cache is full.
    """
    for cause in _chain(error):
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            raise cause from None
        if isinstance(cause, OSError) and cause.errno in UNWRITABLE:
            return f"{cause.filename or 'the cache'}: {cause.strerror}; give the cache a place of your own with HF_HOME"
        if "Consistency check failed" in str(cause) or type(cause).__name__ in BROKEN_OFF:
            return f"{repo}: the download broke off before it was complete; nothing of it is used, try again"
    status = _status(error)
    if status in (401, 403):
        return f"{repo}: the Hub refuses access ({status}): log in with `hf auth login`, or let your token read it"
    if status == 404:
        return f"{repo}: the Hub answered 404: one of its files is missing"
    return None if status is None else f"{repo}: the Hub answered {status}; try again later"


def _status(error: BaseException) -> int | None:
    """Return the status of the Hub's answer that caused an error; None if there was no answer."""
    statuses = (getattr(getattr(cause, "response", None), "status_code", None) for cause in _chain(error))
    return next((status for status in statuses if status is not None), None)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error, its cause, the cause of that, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _with_retries(call: Callable[[], T], only_if_busy: bool = False) -> T:
    """Call again if the Hub is busy (429, 5xx) or a file came incomplete. Or `only_if_busy`: 429."""
    for wait in WAITS:
        try:
            return call()
        except Exception as error:
            requested = _seconds_to_wait(error)
            if requested is None or (only_if_busy and _status(error) != 429):
                raise
            time.sleep(requested or wait)
    return call()


def _seconds_to_wait(error: Exception) -> float | None:
    """Return the seconds that the Hub asks us to wait; 0 if it does not say.

    None: another try would be of no use.
    """
    if any("Consistency check failed" in str(cause) for cause in _chain(error)):
        return 0
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", 0)
    if response is None or (status != 429 and status < 500):
        return None
    retry_after = response.headers.get("Retry-After", "")
    return min(int(retry_after), LONGEST_WAIT) if retry_after.isdecimal() else 0


def check_blobs(repo: str, files: Iterable[Path]) -> None:
    """Check cached files against the SHA-256 that the Hub gave for them.

    The cache uses the hash as the name of a large file, but the library does not check it. A wrong
    file is removed from the cache, so that the next try downloads it again.

    Raises:
        CheckpointError: A file is wrong.
    """
    for path in files:
        blob = path.resolve()
        if blob.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", blob.name) and sha256_file(blob) != blob.name:
            for wrong_file in {blob, path}:
                wrong_file.unlink(missing_ok=True)
            raise CheckpointError(
                f"{repo}: {path.name} is not what the Hub says it is (wrong checksum); it was removed from the cache, try again"
            )


def _unreachable(repo: str, what: str) -> CheckpointError:
    from huggingface_hub import is_offline_mode

    reason = "HF_HUB_OFFLINE is set" if is_offline_mode() else "the Hub cannot be reached"
    return CheckpointError(
        f"{repo}: {reason} and the {what} is not in the cache. Give a local directory instead, or fetch it where there is "
        f"a network (`hf download {repo}`) and bring the cache (HF_HOME); HF_ENDPOINT names another server"
    )

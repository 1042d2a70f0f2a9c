"""Asking the Hub: patient where it is busy, one line with its own reason where it refuses, and no byte but what it meant."""

from __future__ import annotations

import errno
import re
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from dsd_refine.errors import CheckpointError
from dsd_refine.files import sha256_file

T = TypeVar("T")

WAITS, LONGEST_WAIT = (1.0, 3.0), 60  # seconds between tries

BROKEN_OFF = ("ReadError", "RemoteProtocolError", "ReadTimeout", "ConnectionResetError", "IncompleteRead")
UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS)


def ask_hub(repo: str, call: Callable[[], T], what: str = "model") -> T:
    """Run a Hub call; turn its many errors into one line that keeps the Hub's own reason.

    Raises:
        CheckpointError: `__cause__` is set where the Hub could not be reached at all.
    """
    from huggingface_hub import errors as hub

    try:
        return _patiently(call)
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
        ours = isinstance(error, hub.HfHubHTTPError | hub.LocalEntryNotFoundError | hub.OfflineModeIsEnabled | OSError)
        if not ours and not is_of_the_hub(error):
            raise
        reason = _answered(repo, error)
        if reason is not None:
            raise CheckpointError(reason) from None
        raise _unreachable(repo, what) from error


def is_of_the_hub(error: Exception) -> bool:
    """Is an answer of the Hub, or a broken connection to it, behind this error?"""
    return any(_from_http(each) or hasattr(each, "response") for each in _chain(error))


def _from_http(error: BaseException) -> bool:
    return type(error).__module__.split(".")[0].startswith(("httpx", "httpcore"))


def _answered(repo: str, error: Exception) -> str | None:
    """What to say where the Hub was reached, or the cache could not be used. None: neither.

    A snapshot that fails for the Hub's answer says "not in the cache", and keeps the answer as its cause.

    Raises:
        OSError: no room in the cache.
    """
    for each in _chain(error):
        if isinstance(each, OSError) and each.errno in (errno.ENOSPC, errno.EDQUOT):
            raise each from None
        if isinstance(each, OSError) and each.errno in UNWRITABLE:
            return f"{each.filename or 'the cache'}: {each.strerror}; give the cache a place of your own with HF_HOME"
        if "Consistency check failed" in str(each) or type(each).__name__ in BROKEN_OFF:
            return f"{repo}: the download broke off before it was complete; nothing of it is used, try again"
    statuses = (getattr(getattr(each, "response", None), "status_code", None) for each in _chain(error))
    status = next((found for found in statuses if found is not None), None)
    if status in (401, 403):
        return f"{repo}: the Hub refuses access ({status}): log in with `hf auth login`, or let your token read it"
    if status == 404:
        return f"{repo}: the Hub answered 404: one of its files is not there"
    return None if status is None else f"{repo}: the Hub answered {status}; try again later"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _patiently(call: Callable[[], T]) -> T:
    """Ask again where the Hub is busy (429, 5xx), which says for how long, and where a file came short."""
    for wait in WAITS:
        try:
            return call()
        except Exception as error:
            asked = _worth_asking_again(error)
            if asked is None:
                raise
            time.sleep(asked or wait)
    return call()


def _worth_asking_again(error: Exception) -> float | None:
    """The seconds that the Hub asks for (0: it does not say), or None where the same would come again."""
    if any("Consistency check failed" in str(each) for each in _chain(error)):
        return 0
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", 0)
    if response is None or (status != 429 and status < 500):
        return None
    asked = response.headers.get("Retry-After", "")
    return min(int(asked), LONGEST_WAIT) if asked.isdecimal() else 0


def check_blobs(repo: str, files: Iterable[Path]) -> None:
    """Hold cached files against the SHA-256 that the Hub gave for them: the cache names a large file by it.

    The library does not look. A file that is something else is taken out of the cache, so that the next try fetches it.

    Raises:
        CheckpointError: names the file.
    """
    for path in files:
        blob = path.resolve()
        if blob.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", blob.name) and sha256_file(blob) != blob.name:
            for wrong in {blob, path}:
                wrong.unlink(missing_ok=True)
            raise CheckpointError(
                f"{repo}: {path.name} is not what the Hub says it is (wrong checksum); it was removed from the cache, try again"
            )


def _unreachable(repo: str, what: str) -> CheckpointError:
    from huggingface_hub import is_offline_mode

    how = "HF_HUB_OFFLINE is set" if is_offline_mode() else "the Hub cannot be reached"
    return CheckpointError(
        f"{repo}: {how} and the {what} is not in the cache. Give a local directory instead, or fetch it where there is "
        f"a network (`hf download {repo}`) and bring the cache (HF_HOME); HF_ENDPOINT names another server"
    )

"""Push an output to a repository on the Hub, as one commit or as a pull request.

Nothing is ever pushed by halves: large files are uploaded first, and become part of the repository
by the one commit at the end. If the same command runs again, it sends only what has not arrived.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dsd_refine.checkpoint.copies import may_be_weights
from dsd_refine.checkpoint.verify import PROBE, weights_folder
from dsd_refine.errors import UsageError, VerifyError
from dsd_refine.files import in_words, sha256_file
from dsd_refine.hub import ask_hub, push_to_hub
from dsd_refine.release.target import Target, look_at
from dsd_refine.report import words
from dsd_refine.report.markdown import code
from dsd_refine.report.notes import notes, proof
from dsd_refine.report.page import shows_rows
from dsd_refine.report.report import Report

TITLE = "dsd-refine: "  # every commit and pull request of this package begins so
ROWS = ("dsd/predictions.parquet", PROBE)  # they hold evaluation rows
PHASES = "dsd/phases/"  # whole checkpoints from the middle of the run


@dataclass(frozen=True)
class Wishes:
    """What the user asks of a push.

    Attributes:
        create_pr: Open a pull request. None: if the repository holds weights already.
        dry_run: Send nothing.
        force: Push in spite of the reasons not to.
        with_rows: Also send the files that hold evaluation rows.
        public: Make a new repository public.
    """

    create_pr: bool | None = None
    dry_run: bool = False
    force: bool = False
    with_rows: bool = False
    public: bool = False


@dataclass(frozen=True)
class Pushed:
    """What was pushed, or would be.

    Attributes:
        repo: The repository.
        url: The address of the pull request, or of the commit. None for a dry run.
        commit: The commit. None for a dry run, and if there was nothing to send.
        pull_request: Whether it is a pull request.
        new: Whether the repository is made by this push.
        dry_run: Whether nothing was sent.
        files: Name in the repository -> bytes.
        left_out: Files of the output that are not sent, each with the reason.
        overridden: The reasons against the push that `force` overrode.
        title: The title of the commit or the pull request.
        description: Its text, in Markdown.
    """

    repo: str
    url: str | None
    commit: str | None
    pull_request: bool
    new: bool
    dry_run: bool
    files: dict[str, int]
    left_out: dict[str, str]
    overridden: list[str]
    title: str
    description: str

    def to_dict(self) -> dict[str, Any]:
        """Return all fields, for JSON."""
        return asdict(self)


def push(report: Report, repo: str, problems: Sequence[str], wishes: Wishes, say: Callable[[str], None]) -> Pushed:
    """Push an output to a repository.

    Args:
        report: The report of the output.
        repo: The repository, `org/name`.
        problems: What `verify` found wrong with the output.
        wishes: What the user asks for.
        say: Called with each line of news.

    Returns:
        What was pushed. If the repository, or an open pull request of this package, has these
        weights already, nothing is sent, and `commit` is None.

    Raises:
        VerifyError: The gate was not met, or `verify` found problems.
        UsageError: The repository has other weights than the run started from, or the Hub refuses.
        RunError: The Hub is busy or the connection broke off. Nothing was pushed.
    """
    target = look_at(repo)
    with readable(report):
        pushed, files = _prepared(report, target, problems, wishes)
    for reason in pushed.overridden:
        say(f"--force overrides: {reason}")
    if wishes.dry_run:
        return pushed
    there = _already_there(target, files, pushed.pull_request)
    if there:
        return Pushed(**{**asdict(pushed), "url": there, "files": {}})
    return _send(target, files, pushed, private=not wishes.public)


@contextmanager
def readable(report: Report) -> Iterator[None]:
    """In a `with` block, turn the errors of a report with missing or wrong fields into one line.

    Raises:
        UsageError: The report is not as a run writes it.
    """
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        text = f"{report.output}/dsd/report.json: was changed since the run, or is of another release"
        raise UsageError(f"{text} ({type(error).__name__}: {error!s:.100})") from None


def _prepared(report: Report, target: Target, problems: Sequence[str], wishes: Wishes) -> tuple[Pushed, dict[str, Path]]:
    """Decide what is pushed, and whether it may be. Returns it, and the files by their names in the repository."""
    overridden = _refuse(report, target, problems, wishes)
    pull_request = bool(target.weights) if wishes.create_pr is None else wishes.create_pr
    if pull_request and target.commit is None:
        raise UsageError(f"{target.repo}: does not exist, so it cannot get a pull request; leave out --create-pr")
    files, left_out = _chosen(report, target, wishes.with_rows)
    description = notes(report.data) + proof(report.data, problems) + _kept_copies(target, files)
    sizes = {name: path.stat().st_size for name, path in files.items()}
    pushed = Pushed(
        target.repo, None, None, pull_request, target.commit is None, wishes.dry_run, sizes, left_out, overridden,
        _title(report), description,
    )  # fmt: skip
    return pushed, files


def _refuse(report: Report, target: Target, problems: Sequence[str], wishes: Wishes) -> list[str]:
    """Return the reasons against the push if they are overridden; else raise the error that names them."""
    unproven = [f"the gate was not met: {words.gate_words(report.data)}"] if not report.gate_passed else []
    unproven += [f"`verify`: {problem}" for problem in problems]
    moved = list(_moved(report, target))
    reasons = [*unproven, *moved]
    if reasons and not wishes.force:
        kind = VerifyError if unproven else UsageError
        listed = "\n".join(f"  - {reason}" for reason in reasons)
        raise kind(f"{target.repo}: nothing was pushed (--force overrides this):\n{listed}")
    return reasons


def _moved(report: Report, target: Target) -> Iterator[str]:
    """Compare the repository's weights with those that the run started from."""
    started = {file["name"]: file["sha256"] for file in report.data["source"]["files"] if may_be_weights(file["name"])}
    written = {file["name"]: file["sha256"] for file in report.data["output"]["files"]}
    if not target.weights:
        return
    for name, digest in started.items():
        found = target.weights.get(name)
        if found is None:
            yield f"{name}: the run started from this file, and the repository does not have it"
        elif found not in (digest, written.get(name)):
            yield (
                f"{name}: is no longer what the run started from (SHA-256 {found[:12]} in the repository, {digest[:12]} in "
                "the report); refine the repository's newest commit"
            )


def _chosen(report: Report, target: Target, with_rows: bool) -> tuple[dict[str, Path], dict[str, str]]:
    """Return the files to send, by their names in the repository, and those left out, with the reason.

    A file that the run only copied is left out if the repository has a file of this name: the
    repository's may be newer.
    """
    folder = weights_folder(report.output)
    of_checkpoint = {path.relative_to(folder).as_posix(): path for path in _files_below(folder)}
    files = {name: path for name, path in of_checkpoint.items() if name.split("/")[0] not in ("dsd", "rejected")}
    files |= {path.relative_to(report.output).as_posix(): path for path in _files_below(report.output / "dsd")}
    hashes = {side: {file["name"]: file["sha256"] for file in report.data[side]["files"]} for side in ("source", "output")}
    left_out = {}
    for name, path in files.items():
        if name in target.files and hashes["source"].get(name) == hashes["output"].get(name, ""):
            left_out[name] = "the run did not change it, and the repository has one"
        elif name.startswith(PHASES):
            left_out[name] = "a checkpoint from the middle of the run"
        elif not with_rows and (name in ROWS or (path.name == "report.html" and _page_shows_rows(report, path))):
            left_out[name] = "holds evaluation rows; --with-rows sends it"
    return {name: path for name, path in files.items() if name not in left_out}, left_out


def _files_below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def _page_shows_rows(report: Report, path: Path) -> bool:
    return shows_rows(path.read_text(encoding="utf-8"), has_classes=report.data.get("labels") is not None)


def _title(report: Report) -> str:
    return f"{TITLE}{report.verdict}, {words.change(report.data)}"


def _kept_copies(target: Target, files: dict[str, Path]) -> str:
    """The sentence on other copies of the old weights, which stay in the repository."""
    kept = [code(name) for name in sorted(target.weights) if name not in files]
    return f"Other weights in this repository stay as they are: {', '.join(kept)}.\n" if kept else ""


def _already_there(target: Target, files: dict[str, Path], pull_request: bool) -> str | None:
    """Return the address of the repository or the open pull request that has these weights already, if any.

    An earlier push may have arrived although its answer was lost.
    """
    from huggingface_hub import HfApi, constants

    ours = {name: sha256_file(path) for name, path in files.items() if may_be_weights(name)}
    if target.commit is None or not ours:
        return None
    if ours.items() <= target.weights.items() and "dsd/report.json" in target.files:
        return f"{constants.ENDPOINT}/{target.repo}"
    if not pull_request:
        return None
    listed = HfApi().get_repo_discussions(target.repo, discussion_type="pull_request", discussion_status="open")
    for discussion in ask_hub(target.repo, lambda: list(listed), "repository"):
        if discussion.title.startswith(TITLE):
            request = look_at(target.repo, discussion.git_reference)
            if ours.items() <= request.weights.items():
                return str(discussion.url)
    return None


def _send(target: Target, files: dict[str, Path], pushed: Pushed, private: bool) -> Pushed:
    """Make the repository if needed, upload the files, and commit them."""
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    if get_token() is None:
        raise UsageError(f"{target.repo}: a push needs a token with write access: `hf auth login`, or set HF_TOKEN")
    api = HfApi()
    if target.commit is None:
        push_to_hub(target.repo, lambda: api.create_repo(target.repo, private=private, exist_ok=True))
    # New objects for each try, because a failed commit leaves its own changed.
    made = push_to_hub(
        target.repo,
        lambda: api.create_commit(
            target.repo,
            [CommitOperationAdd(name, str(path)) for name, path in files.items()],
            commit_message=pushed.title,
            commit_description=pushed.description,
            create_pr=pushed.pull_request,
            parent_commit=target.commit,  # a commit since we looked is refused
        ),
    )
    return Pushed(**{**asdict(pushed), "url": made.pr_url or made.commit_url, "commit": made.oid})


def pushed_text(pushed: Pushed) -> str:
    """Return the text that the command `push` prints."""
    if pushed.url and not pushed.commit:
        return f"{pushed.repo}: has these weights already, nothing was sent: {pushed.url}"
    if not pushed.dry_run:
        kind = "pull request" if pushed.pull_request else "commit"
        return f"{pushed.repo}: {kind} with {len(pushed.files)} files: {pushed.url}"
    where = "as a pull request" if pushed.pull_request else "into a new repository" if pushed.new else "as one commit"
    lines = [f"{pushed.repo}: {len(pushed.files)} files would be sent {where}; this is a dry run, nothing was sent"]
    lines += [f"  {name} ({in_words(size)})" for name, size in pushed.files.items()]
    lines += [f"  not sent: {name}: {reason}" for name, reason in pushed.left_out.items()]
    return "\n".join([*lines, "", f"title: {pushed.title}", "", pushed.description])

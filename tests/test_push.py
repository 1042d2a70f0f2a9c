"""`push` over a loopback Hub: one commit or a pull request, refused where nothing is proven, and never by halves."""

import json
import shutil

import pytest
from builders import copy_folder
from conftest import hashes
from forked import Child, command, preload
from hub import on_hub
from writable_hub import NEXT, TOKEN, writable_hub

ROWS = {"dsd/predictions.parquet", "dsd/probe.safetensors"}
CHANGED = {"model.safetensors", "README.md", "dsd/report.json", "dsd/report.html", "dsd/recipe.yaml", "dsd/log.jsonl"}


@pytest.fixture(scope="module", autouse=True)
def imported():
    preload()


@pytest.fixture
def output(finished, tmp_path):
    return copy_folder(finished, tmp_path / "out")


@pytest.fixture
def push(made, output, tmp_path, monkeypatch):
    """Push `output` to a Hub that has org/tiny, the source: `push("--force", faults=…)` -> (code, what was said, server)."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    count = iter(range(100))

    def go(*more, repo="org/tiny", folders=None, server=None, **failing):
        def patient():
            import time

            time.sleep = lambda seconds: None
            command("push", output, repo, *more)()

        def child(server):
            log = tmp_path / f"log-{next(count)}"
            started = Child(on_hub(server.url, tmp_path / "home", patient, HF_HUB_DISABLE_XET=True), log)
            code = started.wait()
            said = started.said()
            assert "Traceback" not in said, said
            assert TOKEN not in said
            return code, said, server

        if server:
            return child(server)
        folders = {"org/tiny": made / "timm"} if folders is None else folders
        with writable_hub(folders, tmp_path / "hub", **failing) as server:
            return child(server)

    return go


def edit(folder, /, **changes):
    path = folder / "dsd/report.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def with_gate_missed(output):
    """Make an output whose gate was not met: the checkpoint is under rejected/."""
    (output / "rejected").mkdir()
    for path in list(output.iterdir()):
        if path.name not in ("dsd", "rejected"):
            path.rename(output / "rejected" / path.name)
    edit(output, gate={"rule": "better", "passed": False}, exit_code=3)


def flip(path):
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)


def test_a_repository_with_the_source_gets_a_pull_request(push, output, made):
    code, said, server = push()
    assert code == 0, said
    assert "pull request" in said
    assert f"{server.url}/org/tiny/discussions/1" in said
    assert (server.commits, server.made) == ([], {})
    (request,) = server.requests
    sent = {name for name in request["files"] if not name.startswith(".eval_results/")}
    assert sent == CHANGED, "config.json is the source's own, so the repository's stays"
    assert request["parentCommit"]
    assert hashes(server.folders["org/tiny"]) == hashes(made / "timm"), "the main branch is as it was"
    assert (request["folder"] / "model.safetensors").read_bytes() == (output / "model.safetensors").read_bytes()
    assert all(token == f"Bearer {TOKEN}" for path, token in server.tokens.items() if not path.startswith("upload/"))


def test_the_pull_request_says_verdict_credit_arms_rows_and_proof(push, output):
    _, _, server = push()
    report = json.loads((output / "dsd/report.json").read_text())
    (request,) = server.requests
    assert request["summary"].startswith(f"dsd-refine: {report['verdict']}, accuracy ")
    text = request["description"]
    assert f"## dsd-refine: {report['verdict']}, credit: {report['credit']}" in text
    for arm in report["arms"]:
        assert f"\n| {arm} |" in text
    assert "95 % interval" in text
    assert "refined right" in text
    assert "`verify` found the same files" in text
    written = {file["name"]: file["sha256"] for file in report["output"]["files"]}
    assert written["model.safetensors"] in text


def test_a_new_repository_is_private_and_gets_one_commit_of_every_file(push, output):
    code, said, server = push(repo="org/new")
    assert code == 0, said
    assert server.made["org/new"]["visibility"] == "private"
    (commit,) = server.commits
    left = ROWS | {name for name in hashes(output) if name.startswith("dsd/phases/")}
    assert set(commit["files"]) == set(hashes(output)) - left
    assert {name: digest for name, digest in hashes(output).items() if name not in left} == hashes(commit["folder"])
    _, _, server = push("--public", repo="org/new", folders={})
    assert server.made["org/new"]["visibility"] == "public"


def test_rows_go_only_with_rows(push):
    _, said, server = push("--with-rows", repo="org/new")
    assert set(server.commits[0]["files"]) >= ROWS
    _, said, server = push("--dry-run")
    assert all(f"not sent: {name}: holds evaluation rows" in said for name in ROWS)


@pytest.mark.parametrize(("labels", "classes"), [(["cat"], ' pictured"'), (["cat"], ' told"'), (None, '"')])
def test_a_page_that_shows_rows_stays_with_them(push, output, labels, classes):
    (output / "dsd/report.html").write_text(f'<ul class="examples{classes}>')
    edit(output, labels=labels)
    _, said, _ = push("--dry-run")
    assert "not sent: dsd/report.html: holds evaluation rows" in said


def test_no_create_pr_commits_directly(push):
    code, said, server = push("--no-create-pr")
    assert code == 0, said
    assert len(server.commits) == 1
    assert server.requests == []


def test_a_pull_request_needs_a_repository(push):
    code, said, server = push("--create-pr", repo="org/new")
    assert code == 2
    assert "org/new: does not exist" in said
    assert server.made == {}


def test_a_dry_run_sends_nothing(push, made):
    code, said, server = push("--dry-run")
    assert code == 0, said
    assert "would be sent as a pull request" in said
    assert "model.safetensors (" in said
    assert "## dsd-refine: " in said
    assert not any(kind in path for path in server.seen for kind in ("commit/", "upload", "preupload", "create"))


def test_json_holds_what_was_pushed(push):
    code, said, _ = push("--json")
    assert code == 0, said
    pushed = json.loads(said)
    assert pushed["pull_request"] is True
    assert pushed["url"].endswith("/org/tiny/discussions/1")
    assert pushed["commit"] == NEXT


def refused(found, code):
    """Nothing came to the Hub, and the first line says so. Returns what was said."""
    ended, said, server = found
    assert ended == code, said
    assert (server.commits, server.requests, server.made, server.objects) == ([], [], {}, {})
    return said


def test_a_gate_that_was_not_met_is_refused(push, output):
    with_gate_missed(output)
    said = refused(push(), 3)
    assert "nothing was pushed (--force overrides this)" in said
    assert "the gate was not met: better" in said


def test_an_output_that_was_edited_after_the_run_is_refused(push, output):
    flip(output / "model.safetensors")
    said = refused(push(), 3)
    assert "`verify`: model.safetensors: SHA-256" in said


def test_a_repository_that_moved_on_is_refused(push, made, tmp_path):
    moved = copy_folder(made / "timm", tmp_path / "moved")
    flip(moved / "model.safetensors")
    said = refused(push(folders={"org/tiny": moved}), 2)
    assert "model.safetensors: is no longer what the run started from" in said
    said = refused(push(folders={"org/other": made / "bert", "org/tiny": made / "bert"}), 2)
    assert "is no longer what the run started from" in said


def test_force_says_what_it_overrides(push, output, made, tmp_path):
    with_gate_missed(output)
    flip(output / "rejected/model.safetensors")
    moved = copy_folder(made / "timm", tmp_path / "moved")
    flip(moved / "model.safetensors")
    code, said, server = push("--force", folders={"org/tiny": moved})
    assert code == 0, said
    overridden = [line for line in said.splitlines() if line.startswith("--force overrides: ")]
    assert all(any(words in line for line in overridden) for words in ("gate", "verify", "no longer"))
    (request,) = server.requests
    assert "the push was forced" in request["description"]
    assert (request["folder"] / "model.safetensors").read_bytes() == (output / "rejected/model.safetensors").read_bytes()
    assert not any(name.startswith("rejected/") for name in request["files"])


def test_files_of_the_repository_that_are_newer_stay(push, made, tmp_path):
    newer = copy_folder(made / "timm", tmp_path / "newer")
    config = json.loads((newer / "config.json").read_text()) | {"note": "newer"}
    (newer / "config.json").write_text(json.dumps(config))
    shutil.copy(newer / "model.safetensors", newer / "pytorch_model.bin")
    code, said, server = push(folders={"org/tiny": newer})
    assert code == 0, said
    (request,) = server.requests
    assert json.loads((request["folder"] / "config.json").read_text())["note"] == "newer"
    assert "Other weights in this repository stay as they are: `pytorch_model.bin`" in request["description"]


@pytest.mark.parametrize(
    ("kind", "status", "code", "says"),
    [
        ("commit", 401, 2, "set HF_TOKEN to a token with write access"),
        ("commit", 403, 2, "the token may not write to this repository (403)"),
        ("preupload", 403, 2, "the token may not write to this repository (403)"),
        ("batch", 403, 2, "the token may not write to this repository (403)"),
        ("commit", 409, 5, "the repository was changed while this push was under way (409)"),
        ("commit", 412, 5, "the repository was changed while this push was under way (412)"),
        ("commit", 429, 5, "the Hub asks to wait (429)"),
        ("commit", 500, 5, "the Hub answered 500"),
        ("upload", "cut", 5, "the connection to the Hub broke off"),
        ("commit", "cut", 5, "the connection to the Hub broke off"),
    ],
)
def test_what_the_hub_refuses_pushes_nothing_and_the_same_command_goes_on(push, made, tmp_path, kind, status, code, says):
    with writable_hub({"org/tiny": made / "timm"}, tmp_path / "hub", faults={kind: [status] * 20}) as server:
        ended, said, _ = push(server=server)
        assert ended == code, said
        assert says in said
        assert "nothing was pushed" in said
        assert len(said.strip().splitlines()) == 1
        assert (server.commits, server.requests) == ([], [])
        arrived = dict(server.objects)
        server.faults, server.seen[:] = {}, []
        ended, said, _ = push(server=server)
        assert ended == 0, said
        assert len(server.requests) == 1
        assert sum(path.startswith("upload/") for path in server.seen) == (0 if arrived else 1)


def test_a_hub_that_is_busy_for_a_moment_is_asked_again(push):
    code, said, server = push(faults={"commit": [429, 429]}, after={"Retry-After": "1"})
    assert code == 0, said
    assert len(server.requests) == 1


@pytest.mark.parametrize("more", [(), ("--no-create-pr",)])
def test_a_push_whose_answer_was_lost_is_not_made_twice(push, made, tmp_path, more):
    with writable_hub({"org/tiny": made / "timm"}, tmp_path / "hub", faults={"commit": ["lost"]}) as server:
        code, said, _ = push(*more, server=server)
        assert code == 5, said
        code, said, _ = push(*more, server=server)
        assert code == 0, said
        assert "has these weights already, nothing was sent" in said
        assert len(server.commits) + len(server.requests) == 1


def test_without_a_token_nothing_begins(push, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    said = refused(push(), 2)
    assert "a push needs a token with write access" in said


def test_a_name_that_is_none_and_a_folder_that_is_no_output_are_refused(push, output, tmp_path, refused):
    code, said, _ = push(repo="not a name")
    assert code == 2
    assert "not a valid Hub name" in said
    assert "is not an output of dsd-refine" in refused("push", tmp_path, "org/tiny")


def test_a_source_that_moved_is_named(push, output):
    report = json.loads((output / "dsd/report.json").read_text())
    gone = report["source"] | {"model": "gone", "resolved": "gone"}
    edit(output, source=gone)
    code, said, _ = push()
    assert code == 2
    assert "--source MODEL" in said
    code, said, _ = push("--source", report["source"]["resolved"])
    assert code == 0, said


def test_a_hub_that_cannot_be_reached_is_one_line(push, output, made, tmp_path):
    with writable_hub({"org/tiny": made / "timm"}, tmp_path / "hub") as server:
        pass
    code, said, _ = push(server=server)
    assert code == 5, said
    assert "the Hub cannot be reached, so nothing was pushed" in said
    assert len(said.strip().splitlines()) == 1


@pytest.mark.parametrize("field", ["gate", "source", "output", "arms", "metric", "data", "credit", "warnings"])
@pytest.mark.parametrize("broken", [None, "text"])
def test_a_report_that_was_edited_is_one_line(push, output, field, broken):
    edit(output, **{field: broken})
    code, said, server = push("--force")
    assert code in (2, 0), said
    if code == 2:
        assert len([line for line in said.splitlines() if line.startswith("Error: ")]) == 1
        assert (server.commits, server.requests) == ([], [])

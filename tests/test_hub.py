"""The Hub over loopback, failing in every way: the right message or the right retry, and no byte used that is not the Hub's."""

import json
import os
import shutil
import subprocess
import time

import pyarrow.csv
import pyarrow.parquet
import pytest
from forked import Child, command, preload, unprivileged
from hub import COMMIT, hub, on_hub

STEPS = ("--gate", "none", "--control", "none", "--device", "cpu", "--quiet", "--sparse-steps", "1", "--dense-steps", "1")
WEIGHTS, ROWS = "model.safetensors", "train.parquet"
TOKEN = "hf_markedTokenThatMustShowNowhere"


@pytest.fixture(scope="module", autouse=True)
def imported():
    preload()


@pytest.fixture(scope="module")
def rows(made, tmp_path_factory):
    """A data set's repository: a Parquet file."""
    folder = tmp_path_factory.mktemp("rows")
    pyarrow.parquet.write_table(pyarrow.csv.read_csv(made / "texts.csv"), folder / ROWS)
    return folder


@pytest.fixture
def ask(made, rows, tmp_path):
    """Run with org/tiny and a data set of a failing Hub: `ask("--data", …, faults=…)` -> (exit code, what was said, server)."""

    def go(*more, model="org/tiny", data=None, work=lambda work: work, constants=(), **failing):
        args = (model, "--data", data or made / "texts.csv", "-o", tmp_path / "out", *STEPS, *more)
        sets = {"org/rows": failing.pop("repository", rows)}
        with hub({"org/tiny": made / "bert"}, failing.pop("answers", ()), datasets=sets, **failing) as server:
            child = Child(on_hub(server.url, tmp_path / "home", work(command(*args)), **dict(constants)), tmp_path / "log")
            code = child.wait()
        assert "Traceback" not in child.said()
        if code:
            lines = [line for line in child.said().splitlines() if line]
            assert len(lines) == 1, child.said()
            assert not (tmp_path / "out").exists()
        return code, child.said(), server

    return go


def fetched(server, name):
    return sum(path.endswith(name) for path in server.seen)


@pytest.mark.parametrize(
    ("failing", "says"),
    [
        ({"answers": {"org/tiny": (401, {"X-Error-Code": "GatedRepo"})}}, "it is gated: accept its terms"),
        ({"answers": {"org/tiny": (401, {"X-Error-Code": "RepoNotFound"})}}, "no such model, or it is private"),
        ({"answers": {"org/tiny": (403, {})}}, "refuses access (403)"),
        ({"answers": {"org/tiny": (404, {"X-Error-Code": "RepoNotFound"})}}, "no such model"),
        ({"faults": {WEIGHTS: [403]}, "after": {"X-Error-Code": "GatedRepo"}}, "it is gated"),
        ({"answers": {"org/tiny": (418, {})}}, "the Hub answered 418"),
        ({"model": "org/tiny@nope"}, "the Hub has no such revision of it"),
        ({"faults": {WEIGHTS: [404]}, "after": {"X-Error-Code": "EntryNotFound"}}, "one of its files is missing"),
        ({"faults": {WEIGHTS: ["changed"]}}, "model.safetensors is not what the Hub says it is (wrong checksum)"),
    ],
)
def test_what_cannot_be_had_is_refused_with_the_hub_s_reason(ask, failing, says):
    code, said, _ = ask(**failing)
    assert code == 2, said
    assert "Error: org/tiny: " in said
    assert says in said


def test_a_fault_of_the_data_costs_no_download_of_weights(ask, made, tmp_path):
    (tmp_path / "wrong.csv").write_text("text,label\na cat,unheard\n" * 8)
    code, said, server = ask(data=tmp_path / "wrong.csv")
    assert code == 2
    assert "unheard" in said
    assert not [path for path in server.seen if "model.safetensors" in path]


@pytest.mark.parametrize(
    ("failing", "tries"),
    [
        ({"faults": {WEIGHTS: ["cut"]}}, 2),
        ({"faults": {WEIGHTS: ["short"]}}, 2),
        ({"faults": {WEIGHTS: [500]}}, 2),
        ({"faults": {"api/models/org/tiny": [429]}, "after": {"Retry-After": "1"}}, 1),
    ],
)
def test_what_passes_is_asked_for_again(ask, made, tmp_path, failing, tries):
    code, said, server = ask(**failing)
    assert code == 0, said
    assert fetched(server, WEIGHTS) >= 1 + tries  # a HEAD, and each try
    report = json.loads((tmp_path / "out/dsd/report.json").read_text())
    assert (report["source"]["resolved"], report["source"]["revision"]) == ("org/tiny", COMMIT)
    blob = (tmp_path / "home/hub/models--org--tiny/snapshots" / COMMIT / WEIGHTS).read_bytes()
    assert blob == (made / "bert" / WEIGHTS).read_bytes()


def test_a_wait_that_the_hub_asks_for_is_kept(monkeypatch):
    from types import SimpleNamespace

    from dsd_refine import hub as asked

    waited, answers = [], [429, 429, 200]
    monkeypatch.setattr(asked.time, "sleep", waited.append)

    class Busy(Exception):
        response = SimpleNamespace(status_code=429, headers={"Retry-After": "17"})

    def call():
        if answers.pop(0) != 200:
            raise Busy
        return "here"

    assert asked.ask_hub("org/tiny", call) == "here"
    assert waited == [17, 17]


@pytest.mark.parametrize("fault", ["cut", "short"])
def test_a_download_that_never_ends_is_no_checkpoint(ask, tmp_path, monkeypatch, fault):
    from dsd_refine import hub as asked

    monkeypatch.setattr(asked.time, "sleep", lambda seconds: None)
    code, said, _ = ask(faults={WEIGHTS: [fault] * 100})
    assert code == 2, said
    assert "the download broke off before it was complete; nothing of it is used" in said
    assert not list((tmp_path / "home").rglob(f"snapshots/*/{WEIGHTS}"))
    code, said, _ = ask()
    assert code == 0, said


def test_wrong_bytes_leave_the_cache_and_the_next_try_fetches_the_right_ones(ask):
    assert ask(faults={WEIGHTS: ["changed"]})[0] == 2
    code, said, server = ask()
    assert code == 0, said
    assert fetched(server, WEIGHTS) == 2
    code, said, server = ask("--overwrite")
    assert code == 0, said
    assert fetched(server, WEIGHTS) == 0


def test_a_cache_that_went_bad_is_seen_offline_too(ask, tmp_path):
    assert ask()[0] == 0
    blob = (tmp_path / "home/hub/models--org--tiny/snapshots" / COMMIT / WEIGHTS).resolve()
    blob.write_bytes(blob.read_bytes()[:-1] + b"\x7f")
    shutil.rmtree(tmp_path / "out")
    code, said, _ = ask(constants={"HF_HUB_OFFLINE": True})
    assert code == 2, said
    assert "wrong checksum" in said


def test_offline_with_everything_cached_asks_nobody(ask, tmp_path):
    assert ask(data="org/rows")[0] == 0
    code, said, server = ask("--overwrite", data="org/rows", constants={"HF_HUB_OFFLINE": True})
    assert code == 0, said
    assert server.seen == []


@pytest.mark.parametrize("given", [{}, {"data": "org/rows"}])
def test_offline_without_a_copy_is_said_at_once(ask, made, given):
    started = time.monotonic()
    model = made / "bert" if given else "org/tiny"
    code, said, server = ask(model=model, constants={"HF_HUB_OFFLINE": True}, **given)
    assert time.monotonic() - started < 5
    assert code == 2, said
    assert "HF_HUB_OFFLINE is set" in said
    assert server.seen == []


def test_no_network_is_said_at_once(ask, tmp_path, made):
    """Not told to be offline, and nobody answers: as in a firewalled CI."""
    started = time.monotonic()
    child = Child(
        on_hub("http://127.0.0.1:9", tmp_path / "home", command("org/tiny", "--data", made / "texts.csv")), tmp_path / "log"
    )
    assert child.wait() == 2
    assert "the Hub cannot be reached and the model is not in the cache" in child.said()
    assert time.monotonic() - started < 5


# ---------------------------------------------------------------- data sets


def test_a_data_set_of_the_hub(ask, tmp_path):
    code, said, server = ask(data="org/rows")
    assert code == 0, said
    assert fetched(server, ROWS) == 2
    assert json.loads((tmp_path / "out/dsd/report.json").read_text())["data"]["train"]["rows"] == 18


def test_configurations_of_a_data_set_are_listed_and_named(ask, rows, tmp_path):
    folder = tmp_path / "several"
    for name in ("de", "fr"):
        (folder / name).mkdir(parents=True)
        (folder / name / "train.parquet").write_bytes((rows / ROWS).read_bytes())
    configs = "".join(f"- config_name: {name}\n  data_files: {name}/*.parquet\n" for name in ("de", "fr"))
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    code, said, _ = ask(data="org/rows", repository=folder)
    assert code == 2, said
    assert "org/rows: has several configurations (de, fr); name one: --data org/rows:CONFIG" in said
    code, said, _ = ask(data="org/rows:fr", repository=folder)
    assert code == 0, said


def test_a_split_of_a_data_set_of_the_hub_is_named_by_an_option(ask, rows, tmp_path):
    names, place = ("train", "validation_matched", "validation_mismatched"), tmp_path / "nli"
    for name in names:
        (place / name).mkdir(parents=True)
        shutil.copy(rows / ROWS, place / name / ROWS)
    files = "".join(f"  - split: {name}\n    path: {name}/*\n" for name in names)
    (place / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files:\n{files}---\n")
    code, said, _ = ask(data="org/rows", repository=place)
    assert code == 2
    assert "Which of validation_matched, validation_mismatched evaluates is not known: give --eval-split NAME" in said
    code, said, _ = ask("--eval-split", "validation_mismatched", data="org/rows", repository=place)
    assert code == 0, said
    data = json.loads((tmp_path / "out/dsd/report.json").read_text())["data"]
    assert data["sources"][-1] == {"part": "eval", "file": "org/rows", "split": "validation_mismatched", "rows": 24}
    assert data["unused"] == ["split validation_matched: not used"]


@pytest.mark.parametrize(
    ("failing", "says"),
    [
        ({"answers": {"org/rows": (401, {"X-Error-Code": "GatedRepo"})}}, "org/rows: the Hub says it is gated"),
        ({"answers": {"org/rows": (404, {"X-Error-Code": "RepoNotFound"})}}, "org/rows: the Hub has no such data set"),
        ({"faults": {ROWS: ["changed"]}}, "train.parquet is not what the Hub says it is (wrong checksum)"),
        ({"sizes": {ROWS: 6 * 10**9}}, "org/rows: 6 GB to download; give --yes to agree"),
    ],
)
def test_a_data_set_that_cannot_be_had_is_refused(ask, failing, says):
    code, said, _ = ask(data="org/rows", **failing)
    assert code == 2, said
    assert says in said


def test_wrong_rows_are_not_kept(ask):
    assert ask(data="org/rows", faults={ROWS: ["changed"]})[0] == 2
    assert ask(data="org/rows")[0] == 0


def test_a_large_download_is_agreed_to(ask):
    code, said, server = ask("--yes", data="org/rows", sizes={ROWS: 6 * 10**9})
    assert code == 0, said
    assert fetched(server, ROWS) == 2


# ---------------------------------------------------------------- caches and tokens


def test_a_cache_of_someone_else_s_is_said_in_one_line(ask, tmp_path):
    home = tmp_path / "home"
    (home / "hub").mkdir(parents=True)
    for path in (home, home / "hub"):
        path.chmod(0o555)
        os.chown(path, 65534, 65534)
    code, said, _ = ask(work=unprivileged)
    assert code == 2, said
    assert "Permission denied; give the cache a place of your own with HF_HOME" in said


@pytest.mark.parametrize("offline", [False, True])
def test_a_cache_that_can_only_be_read_serves(ask, tmp_path, offline):
    assert ask()[0] == 0
    for path in (tmp_path / "home", *(tmp_path / "home").rglob("*")):
        if not path.is_symlink():
            path.chmod(0o555 if path.is_dir() else 0o444)
            os.chown(path, 65534, 65534)
    code, said, _ = ask("--overwrite", work=unprivileged, constants={"HF_HUB_OFFLINE": offline})
    assert code == 0, said


@pytest.mark.parametrize(
    "failing", [{}, {"answers": {"org/tiny": (401, {"X-Error-Code": "GatedRepo"})}}, {"faults": {WEIGHTS: ["elsewhere"]}}]
)
def test_a_token_goes_to_the_hub_and_is_written_nowhere(ask, made, tmp_path, monkeypatch, failing):
    """Not to another server that the Hub points at, not into logs, reports, cards, errors or states."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with hub({"org/tiny": made / "bert"}) as other:
        _, said, server = ask(elsewhere=f"{other.url.replace('127.0.0.1', 'localhost')}/org/tiny/resolve/main", **failing)
    assert server.tokens["api/models/org/tiny"] == f"Bearer {TOKEN}"
    assert not any(other.tokens.values())
    assert TOKEN not in said
    found = subprocess.run(["grep", "-rl", TOKEN, tmp_path], capture_output=True, text=True, check=False)
    assert found.stdout == ""


@pytest.fixture
def repository(made, tmp_path):
    """Run with a repository of these files beside, or in place of, its own: `repository({"x": b"…"}, without=(…))`."""

    def go(more, without=(), given=(), offline=False):
        folder = tmp_path / "repository"
        if not folder.exists():
            shutil.copytree(made / "bert", folder)
            for name in without:
                (folder / name).unlink()
            for name, data in more.items():
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).write_bytes(data)
        args = ("org/tiny", "--data", made / "texts.csv", "-o", tmp_path / f"out{offline}", *STEPS, *given)
        with hub({"org/tiny": folder}) as server:
            work = on_hub(server.url, tmp_path / "home", command(*args), HF_HUB_OFFLINE=offline)
            child = Child(work, tmp_path / "log")
            return child.wait(), child.said(), server

    return go


BASE = json.dumps({"peft_type": "LORA", "base_model_name_or_path": "org/base"}).encode()


@pytest.mark.parametrize(
    ("more", "without", "says"),
    [
        ({"pytorch_model.bin": b"x"}, (WEIGHTS,), "only pickle weights (pytorch_model.bin); pickles can carry code"),
        ({"x.gguf": b"x"}, (WEIGHTS,), "found x.gguf (GGUF): give the checkpoint that it was exported from"),
        (
            {"x.gguf": b"x"},
            (WEIGHTS, "config.json"),
            "no config.json, so neither timm's nor transformers' layout; found x.gguf",
        ),
        ({"onnx/model.onnx": b"x", "tf_model.h5": b"x"}, (WEIGHTS,), "onnx/model.onnx (ONNX), tf_model.h5 (TensorFlow)"),
        (
            {"adapter_config.json": BASE, "adapter_model.safetensors": b"x"},
            (WEIGHTS, "config.json"),
            "LoRA adapter of org/base",
        ),
        ({"adapter_config.json": BASE, "adapter_model.safetensors": b"x"}, (), "LoRA adapter of org/base beside a model"),
        ({"adapter_config.json": BASE, "adapter_model.safetensors": b"x"}, (WEIGHTS,), "LoRA adapter of org/base"),
    ],
)
def test_a_repository_that_holds_no_model_to_train_says_what_it_holds(repository, more, without, says):
    code, said, server = repository(more, without)
    assert code == 2, said
    assert says in said
    assert len(said.strip().splitlines()) == 1
    assert not fetched(server, ".gguf")
    assert not fetched(server, ".onnx")


def test_what_an_output_copies_is_fetched_and_offline_the_cache_serves(repository, tmp_path):
    copied = {"language_model/5gram.bin": b"5", "2_Dense/model.safetensors": b"d", "vocab.bin": b"v"}
    other = {"onnx/model.onnx": b"o", "model.fp16.safetensors": b"h", "tf_model.h5": b"t", "pytorch_model.bin": b"p"}
    for offline in (False, True):
        code, said, server = repository(copied | other, offline=offline)
        assert code == 0, said
        out = tmp_path / f"out{offline}"
        assert {name: (out / name).read_bytes() for name in copied} == copied
        assert not any((out / name).exists() or fetched(server, f"/{name}") for name in other)
    assert server.seen == []

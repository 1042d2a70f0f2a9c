"""Files from strangers run nothing, and nothing leaves this machine that nobody asked for."""

import ctypes
import json
import os
import socket
import sys

import hostile
import pytest
from builders import copy_folder
from conftest import SHORT
from forked import Child, preload
from forked import command as run_command
from hub import hub, on_hub

from dsd_refine.evidence.card_results import read_card_results
from dsd_refine.files import leads_out

TEMPLATE = "{{ cycler.__init__.__globals__.os.system('touch MARK') }}{% for x in messages %}{{ x }}{% endfor %}"
MODULE = """
import pathlib
pathlib.Path({mark!r}).touch()
from transformers import BertConfig, BertForSequenceClassification
class Config(BertConfig):
    model_type = "bert-of-a-stranger"
class Model(BertForSequenceClassification):
    config_class = Config
"""


@pytest.fixture
def mark(tmp_path):
    """A file that is there once something of a stranger's has run."""
    return tmp_path / "pwned"


def texts(made, source, out):
    return (source, "--data", made / "texts.csv", "-o", out, *SHORT, "--quiet")


def edited(folder, file, **values):
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return folder


@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.pth"])
def test_a_pickle_runs_nothing(refused, made, tmp_path, mark, name):
    source = copy_folder(made / "bert", tmp_path / "bert")
    (source / "model.safetensors").unlink()
    hostile.evil_pickle(source / name, mark)
    message = refused(*texts(made, source, tmp_path / "out"))
    assert "only with --allow-pickle, and weights-only even then" in message
    message = refused(*texts(made, source, tmp_path / "out"), "--allow-pickle")
    assert f"{name}: cannot be read weights-only, refused" in message
    assert "weights_only=False" not in message
    assert not mark.exists()


def test_pickles_beside_safetensors_are_not_even_opened(command, made, tmp_path, mark):
    source = copy_folder(made / "bert", tmp_path / "bert")
    for name in ("pytorch_model.bin", "optimizer.pt", "training_args.bin", "x.pkl"):
        hostile.evil_pickle(source / name, mark)
    found = command(*texts(made, source, tmp_path / "out"), "--allow-pickle")
    assert found.code == 0, found.err
    assert command("verify", source, tmp_path / "out", "--allow-pickle").code == 0
    assert not mark.exists()
    assert not [name for name in ("pytorch_model.bin", "optimizer.pt") if (tmp_path / "out" / name).exists()]
    assert (tmp_path / "out/training_args.bin").read_bytes() == (source / "training_args.bin").read_bytes()


@pytest.mark.parametrize(
    "model_args", [{"checkpoint_path": "evil.pth"}, {"pretrained_cfg": {"file": "evil.pth"}}, {"pretrained": True}]
)
@pytest.mark.parametrize("verb", ["run", "plan"])
def test_a_timm_config_names_no_other_file_to_load(refused, made, tmp_path, mark, monkeypatch, model_args, verb):
    source = edited(copy_folder(made / "timm", tmp_path / "timm"), "config.json", model_args={"in_chans": 1, **model_args})
    hostile.evil_pickle(source / "evil.pth", mark)
    monkeypatch.chdir(source)
    message = refused(verb, source, "--data", made / "pictures", *(["-o", tmp_path / "out"] if verb == "run" else []))
    assert f"its model_args set {next(iter(model_args))}, which is not theirs to set" in message
    assert not mark.exists()


@pytest.mark.parametrize(
    "pretrained_cfg",
    [{"file": "evil.pth"}, {"url": "http://127.0.0.1:9/evil.pth"}, {"custom_load": True}, {"hf_hub_id": "evil/x"}],
)
def test_a_timm_config_s_other_places_of_weights_are_left_alone(command, made, tmp_path, mark, monkeypatch, pretrained_cfg):
    source = copy_folder(made / "timm", tmp_path / "timm")
    config = json.loads((source / "config.json").read_text())
    config["pretrained_cfg"] |= pretrained_cfg
    (source / "config.json").write_text(json.dumps(config))
    hostile.evil_pickle(source / "evil.pth", mark)
    monkeypatch.chdir(source)
    found = command(source, "--data", made / "pictures", "-o", tmp_path / "out", *SHORT, "--quiet")
    assert found.code in (0, 2), found.err
    assert not mark.exists()


@pytest.fixture
def strange(made, tmp_path, mark):
    """A model that brings its own code along."""
    source = copy_folder(made / "bert", tmp_path / "strange")
    (source / "modeling.py").write_text(MODULE.format(mark=str(mark)))
    classes = {"AutoConfig": "modeling.Config", "AutoModelForSequenceClassification": "modeling.Model"}
    return edited(
        source,
        "config.json",
        auto_map=classes,
        model_type="bert-of-a-stranger",
        architectures=["ModelForSequenceClassification"],
    )


def test_remote_code_is_refused(refused, made, strange, tmp_path, mark):
    for verb in (("run", *texts(made, strange, tmp_path / "out")), ("plan", strange)):
        assert "needs code of its own; read that code, then give --trust-remote-code" in refused(*verb)
    assert not mark.exists()


def test_remote_code_runs_with_its_flag_and_the_report_says_so(command, made, strange, tmp_path, mark):
    found = command(*texts(made, strange, tmp_path / "out"), "--trust-remote-code")
    assert found.code == 0, found.err
    assert mark.exists()
    warnings = json.loads((tmp_path / "out/dsd/report.json").read_text())["warnings"]
    assert "code that came with the model was run (--trust-remote-code): modeling.py" in warnings
    assert (tmp_path / "out/modeling.py").read_bytes() == (strange / "modeling.py").read_bytes()


def test_a_tokenizer_s_and_a_processor_s_code_is_not_run(command, refused, made, tmp_path, mark):
    source = copy_folder(made / "bert", tmp_path / "bert")
    (source / "tokenization.py").write_text(MODULE.format(mark=str(mark)))
    edited(source, "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization.Model", None]}, tokenizer_class="Model")
    assert command(*texts(made, source, tmp_path / "out")).code in (0, 2)  # tokenizer.json does without that class
    vit = copy_folder(made / "vit", tmp_path / "vit")
    (vit / "processing.py").write_text(MODULE.format(mark=str(mark)))
    name = next(vit.glob("*processor*.json")).name
    edited(vit, name, auto_map={"AutoImageProcessor": "processing.Model"}, image_processor_type="Model")
    assert "image processor" in refused(vit, "--data", made / "colours", "-o", tmp_path / "other")
    assert not mark.exists()


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
def test_a_kernel_of_the_hub_is_code_too(refused, made, tmp_path, key):
    source = edited(copy_folder(made / "bert", tmp_path / "bert"), "config.json", **{key: "evil/kernel"})
    assert "wants the code of evil/kernel from the Hub" in refused(*texts(made, source, tmp_path / "out"))


def test_templates_and_cards_are_text(command, made, tmp_path, mark):
    """A chat template is carried along byte for byte, a card is kept, neither is rendered."""
    source = copy_folder(made / "gpt2", tmp_path / "gpt2")
    template = TEMPLATE.replace("MARK", str(mark))
    edited(source, "tokenizer_config.json", chat_template=template)
    (source / "chat_template.jinja").write_text(template)
    (source / "README.md").write_text(f"---\nlicense: mit\n---\n# {template}\n<script>alert(1)</script>\n")
    found = command(source, "--data", made / "documents.txt", "-o", tmp_path / "out", *SHORT, "--quiet")
    assert found.code == 0, found.err
    assert template in (tmp_path / "out/README.md").read_text()
    assert (tmp_path / "out/chat_template.jinja").read_text() == template
    assert not mark.exists()


def test_a_data_set_s_script_is_not_run(made, tmp_path, mark):
    """The Hub may send a Python file beside the rows, or in their place."""
    preload()
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows/rows.py").write_text(MODULE.format(mark=str(mark)))
    with hub({}, datasets={"org/rows": tmp_path / "rows"}) as server:
        args = (made / "bert", "--data", "org/rows", "-o", tmp_path / "out", *SHORT)
        child = Child(on_hub(server.url, tmp_path / "home", run_command(*args)), tmp_path / "log")
        assert child.wait() == 2, child.said()
    assert "Traceback" not in child.said()
    assert not mark.exists()


# ---------------------------------------------------------------- links lead nowhere

SECRET = "hf_secretOfThisMachine"


@pytest.fixture
def secret(tmp_path):
    """A file of this machine's, and a folder with it, outside of any source."""
    place = tmp_path / "home/.cache/huggingface"
    place.mkdir(parents=True)
    (place / "token").write_text(SECRET)
    (place / "card.yaml").write_text(f"- dataset: {{id: {SECRET}}}\n  value: 0.5\n")
    return place


LINKS = {
    "a side file": ("notes.txt", "token"),
    "a file that libraries read": ("chat_template.jinja", "token"),
    "a file in a folder": ("extra/notes.txt", "token"),
    "a folder": ("extra", "."),
    "nothing": ("notes.txt", "gone"),
    "the card": ("README.md", "token"),
    "results": (".eval_results/x.yaml", "card.yaml"),
    "a folder of results": (".eval_results", "."),
}


@pytest.mark.parametrize("chain", [False, True])
@pytest.mark.parametrize("what", LINKS)
def test_a_link_out_of_the_source_s_folder_copies_nothing_and_is_named(command, made, secret, tmp_path, what, chain):
    name, target = LINKS[what]
    source = copy_folder(made / "bert", tmp_path / "bert")
    link = source / name
    link.parent.mkdir(exist_ok=True)
    link.unlink(missing_ok=True)
    if chain:  # by way of another link, in the folder and relative
        (source / "first").symlink_to(os.path.relpath(secret / target, source))
        link.symlink_to(os.path.relpath(source / "first", link.parent))
    else:
        link.symlink_to(secret / target)
    found = command(*texts(made, source, tmp_path / "out"), "--json")
    assert found.code == 0, found.err
    assert SECRET not in found.out + found.err
    for path in (tmp_path / "out").rglob("*"):
        assert not path.is_symlink()
        assert path.is_dir() or SECRET.encode() not in path.read_bytes()
    warnings = json.loads(found.out)["warnings"]
    if not name.startswith(".eval_results"):
        assert any(name in warning and "link" in warning for warning in warnings), warnings
    assert command("verify", source, tmp_path / "out").code == 0


@pytest.mark.parametrize("name", [".eval_results/x.yaml", ".eval_results"])
def test_results_that_are_a_link_out_of_the_folder_are_no_claims(secret, tmp_path, name):
    link = tmp_path / "source" / name
    link.parent.mkdir(parents=True)
    link.symlink_to(secret / "card.yaml" if name.endswith(".yaml") else secret)
    assert read_card_results(tmp_path / "source") == []
    assert read_card_results(_moved(link, secret / "card.yaml")) != []  # as files of the folder's own they are


def _moved(link, file):
    """The source of a link, with the file itself in its place."""
    link.unlink()
    place = link if link.suffix else link / "x.yaml"
    place.parent.mkdir(exist_ok=True)
    place.write_bytes(file.read_bytes())
    return place.parent.parent


def test_links_within_the_folder_and_to_the_weights_are_followed(command, made, tmp_path):
    """Weights and config lie elsewhere in many a folder; they are read, and only read, as what they are."""
    source = copy_folder(made / "bert", tmp_path / "bert")
    store = tmp_path / "store"
    store.mkdir()
    for name in ("model.safetensors", "config.json"):
        (source / name).rename(store / name)
        (source / name).symlink_to(store / name)
    (source / "real.txt").write_text("kept")
    (source / "alias.txt").symlink_to("real.txt")
    found = command(*texts(made, source, tmp_path / "out"))
    assert found.code == 0, found.err
    assert (tmp_path / "out/alias.txt").read_text() == "kept"
    assert (tmp_path / "out/config.json").read_bytes() == (store / "config.json").read_bytes()
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))
    assert not any(
        "links that lead out" in line for line in json.loads((tmp_path / "out/dsd/report.json").read_text())["warnings"]
    )
    assert command("verify", source, tmp_path / "out").code == 0


def test_the_cache_s_own_blobs_are_a_snapshot_s_own(tmp_path):
    snapshot, blobs = tmp_path / "models--org--tiny/snapshots/0123", tmp_path / "models--org--tiny/blobs"
    other = tmp_path / "models--org--secret/blobs"
    for folder in (snapshot, blobs, other):
        folder.mkdir(parents=True)
        (folder / "file").write_text("x")
    for name, target in (("own", blobs / "file"), ("here", snapshot / "file"), ("theirs", other / "file")):
        (snapshot / name).symlink_to(target)
    (tmp_path / "reached").symlink_to(tmp_path / "models--org--tiny")  # a cache that is itself reached by a link
    for root in (snapshot, tmp_path / "reached/snapshots/0123"):
        assert [leads_out(root / name, root) for name in ("file", "own", "here", "theirs")] == [False, False, False, True]
    assert leads_out(blobs / "../blobs/file", tmp_path / "models--org--secret")
    assert not leads_out(tmp_path / "models--org--secret/blobs/file", tmp_path / "models--org--secret")
    assert leads_out(tmp_path / "models--org--secret", tmp_path / "models--org--sec")  # a name that only begins so


# ---------------------------------------------------------------- nothing is sent anywhere

CLONE_NEWNET = 0x40000000
CALLS = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "socket.sendmsg", "urllib.Request")


def test_local_work_asks_no_network(made, finished, tmp_path):
    """Not told to be offline: the libraries could ask if they would. Every connection that is tried is counted."""
    preload()
    commands = [
        (made / "timm", "--data", made / "pictures", "-o", tmp_path / "timm", *SHORT, "--quiet"),
        (made / "bert", "--data", made / "texts.csv", "-o", tmp_path / "bert", *SHORT, "--quiet"),
        (made / "vit", "--data", made / "colours", "-o", tmp_path / "vit", *SHORT, "--quiet", "--workers", "1"),
        ("plan", made / "gpt2", "--data", made / "documents.txt"),
        ("plan", "timm:resnet18"),
        ("verify", made / "timm", finished),
        ("recipes",),
    ]

    def counted(args):
        def work():
            def hook(event, given):
                # loading processes talk over sockets of this machine's
                if event in CALLS and getattr(given[0], "family", None) != socket.AF_UNIX:
                    os.write(2, f"ASKED {event} {given!r:.300}\n".encode())

            sys.addaudithook(hook)
            run_command(*args)()

        return work

    for number, args in enumerate(commands):
        child = Child(on_hub("http://127.0.0.1:9", tmp_path / "home", counted(args)), tmp_path / f"log{number}")
        assert child.wait() == 0, child.said()
        asked = [line for line in child.said().splitlines() if line.startswith("ASKED")]
        if "timm:resnet18" in args:  # a name of the Hub's is asked for, once, at the Hub
            assert asked
            assert all("127.0.0.1" in line for line in asked)
        else:
            assert asked == []


def test_a_run_needs_no_network_at_all(made, tmp_path):
    """In a network name space of its own, without a route, and not told so."""
    preload()
    args = (made / "bert", "--data", made / "texts.csv", "-o", tmp_path / "out", *SHORT, "--quiet")

    def cut_off():
        if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET):
            sys.exit(77)
        run_command(*args)()

    child = Child(on_hub("http://127.0.0.1:9", tmp_path / "home", cut_off), tmp_path / "log")
    code = child.wait()
    if code == 77:
        pytest.skip("no network name spaces here")
    assert code == 0, child.said()

"""What MODEL can name, and the Hub over loopback."""

import json
from types import SimpleNamespace

import builders
import pytest
from conftest import SHORT, process
from hub import COMMIT, hub

from dsd_refine.checkpoint import find_source
from dsd_refine.errors import CheckpointError, UsageError


def test_a_directory_tells_its_library(tmp_path):
    assert find_source(str(builders.timm_checkpoint(tmp_path / "t"))).library == "timm"
    assert find_source(str(builders.bert_checkpoint(tmp_path / "b"))).library == "transformers"


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("resnet5o", "did you mean resnet50"),
        ("./nowhere", "no such directory"),
        ("torchvision:resnet5o", "did you mean resnet50"),
        ("torchvision:resnet50.V3", "no weights 'V3' of it, but IMAGENET1K_V1, IMAGENET1K_V2"),
        ("torchvision:vgg16.IMAGENET1K_FEATURES", "no classifier"),
        ("torchvision:resnet50", "resnet50-11ad3fa6.pth.*--allow-pickle"),
        ("a/b/c", "no such directory"),
        ("timm:nothing", "not a timm model"),
    ],
)
def test_what_names_nothing_is_refused(model, said):
    with pytest.raises((CheckpointError, UsageError), match=said):
        find_source(model)


def test_a_directory_named_as_a_timm_model_must_say_which_is_meant(tmp_path, monkeypatch):
    builders.timm_checkpoint(tmp_path / "resnet50")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"\./resnet50 or timm:resnet50"):
        find_source("resnet50")
    assert find_source("./resnet50").library == "timm"


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        find_source(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="which library"):
        find_source(str(tmp_path))


def test_a_repository_is_refined_from_the_hub_and_then_offline_from_the_cache(tmp_path):
    folder = builders.timm_checkpoint(tmp_path / "t")
    (folder / "pytorch_model.bin").write_bytes(b"never fetched")
    data = builders.image_folder(tmp_path / "data")
    home = {"HF_HOME": str(tmp_path / "home")}
    with hub({"org/tiny": folder}) as server:
        found = process("-m", "dsd_refine", "hf-hub:org/tiny@v1", "--data", data, "-o", tmp_path / "out", *SHORT, "--json",
                        HF_ENDPOINT=server.url, HF_HUB_OFFLINE="0", **home)  # fmt: skip
        assert found.returncode == 0, found.stderr
        assert not any("resolve" in path and path.endswith(".bin") for path in server.seen)
    source = json.loads(found.stdout)["source"]
    assert (source["resolved"], source["revision"]) == ("org/tiny", COMMIT)
    again = process("-m", "dsd_refine", "verify", f"org/tiny@{COMMIT}", tmp_path / "out", HF_HUB_OFFLINE="1", **home)
    assert again.returncode == 0, again.stdout + again.stderr


def test_offline_without_a_copy_says_what_is_missing_and_how_to_give_it(tmp_path):
    found = process("-m", "dsd_refine", "resnet50", "--sparsity", "0.3", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "home"))
    assert found.returncode == 2
    assert found.stdout == ""
    for part in ("timm/resnet50.a1_in1k", "HF_HUB_OFFLINE is set", "local directory", "HF_ENDPOINT"):
        assert part in found.stderr
    assert len(found.stderr.strip().splitlines()) == 1


def test_a_timm_name_is_planned_from_what_timm_knows_where_there_is_no_network(command, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = command("plan", "resnet18", "--sparsity", "0.3", "--json")
    assert found.code == 0, found.err
    plan = json.loads(found.out)
    assert plan["resolved"].startswith("timm/resnet18")
    assert plan["revision"] == "not fetched"
    layers = {layer["name"]: layer for layer in plan["layers"]}
    assert layers["layer1.0.conv1.weight"]["masked"] == [round(0.3 * 64 * 64 * 9)]
    assert layers["conv1.weight"]["excluded"]


def test_a_busy_hub_is_asked_again(tmp_path, monkeypatch):
    """500, 429 with Retry-After, then the answer: three questions, no error."""
    from huggingface_hub.errors import HfHubHTTPError

    from dsd_refine.checkpoint import hub

    answers = [
        SimpleNamespace(status_code=500, headers={}, request=None),
        SimpleNamespace(status_code=429, headers={"Retry-After": "7"}, request=None),
    ]
    waited = []
    monkeypatch.setattr(hub.time, "sleep", waited.append)

    def call():
        if answers:
            raise HfHubHTTPError("busy", response=answers.pop(0))
        return "here"

    assert hub.ask_hub("org/tiny", call) == "here"
    assert waited == [1.0, 7]


def test_a_tag_that_timm_does_not_have_names_those_that_it_has(refused):
    assert "resnet18.a1_in1k" in refused("plan", "resnet18.nope")

"""What MODEL can name, and the Hub over loopback."""

import json
from argparse import Namespace
from types import SimpleNamespace

import builders
import numpy as np
import pytest
import torch
from conftest import SHORT, process
from hub import COMMIT, hub, on_hub
from PIL import Image
from runs import fresh, run_command
from safetensors.torch import load_file

from dsd_refine.checkpoint import source as source_module
from dsd_refine.checkpoint.checkpoint import open_checkpoint
from dsd_refine.checkpoint.libraries.open import open_library
from dsd_refine.checkpoint.source import find_source
from dsd_refine.errors import CheckpointError, Interrupted, UsageError
from dsd_refine.masking.checkpoint_layers import first_layers
from dsd_refine.run.open import _unreadable
from dsd_refine.run.workspace import Workspace


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


def offline(home, *args):
    """The command, with this home and no network."""
    on_hub("http://127.0.0.1:9", home, lambda: run_command(*args), HF_HUB_OFFLINE=True)()


def test_a_repository_is_refined_from_the_hub_and_then_offline_from_the_cache(tmp_path):
    folder = builders.timm_checkpoint(tmp_path / "t")
    for name in ("pytorch_model.bin", "onnx/model.onnx", "language_model/5gram.bin"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(name.encode())
    data = builders.image_folder(tmp_path / "data")
    home = {"HF_HOME": str(tmp_path / "home")}
    with hub({"org/tiny": folder}) as server:
        found = process("-m", "dsd_refine", "hf-hub:org/tiny@v1", "--data", data, "-o", tmp_path / "out", *SHORT, "--json",
                        HF_ENDPOINT=server.url, HF_HUB_OFFLINE="0", **home)  # fmt: skip
        assert found.returncode == 0, found.stderr
        assert not any("resolve" in path and path.endswith(("pytorch_model.bin", ".onnx")) for path in server.seen)
    assert (tmp_path / "out/language_model/5gram.bin").read_bytes() == b"language_model/5gram.bin"
    source = json.loads(found.stdout)["source"]
    assert (source["resolved"], source["revision"]) == ("org/tiny", COMMIT)
    again = fresh(offline, tmp_path / "home", "verify", f"org/tiny@{COMMIT}", tmp_path / "out")
    assert again.returncode == 0, again.stdout + again.stderr


def test_offline_without_a_copy_says_what_is_missing_and_how_to_give_it(tmp_path):
    found = fresh(offline, tmp_path / "home", "resnet50", "--sparsity", "0.3")
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

    from dsd_refine import hub

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


# ---------------------------------------------------------------- what a folder is, where it is no model


def edited(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return folder


def adapter(folder, base="org/base", kind="LORA"):
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": kind, "base_model_name_or_path": base}))
    builders.write_tensors(folder / "adapter_model.safetensors", {"a": torch.ones(1)})
    return folder


def test_an_adapter_alone_says_what_it_is_to_be_merged_into(refused, tmp_path):
    message = refused(adapter(tmp_path / "a"), "--data", tmp_path)
    assert "it is a LoRA adapter of org/base alone, and only whole weights are refined: merge it first" in message
    assert "peft: PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(out)" in message


@pytest.mark.parametrize("build", [builders.bert_checkpoint, builders.timm_checkpoint])
@pytest.mark.parametrize("verb", ["run", "plan"])
def test_an_adapter_beside_a_whole_model_is_refused_before_the_first_step(refused, tmp_path, build, verb):
    message = refused(verb, adapter(build(tmp_path / "m")), "--data", tmp_path)
    assert (
        "a LoRA adapter of org/base beside a model: merge it first (peft: PeftModel.from_pretrained(base, adapter)" in message
    )
    assert "or remove adapter_config.json, adapter_model.safetensors" in message


@pytest.mark.parametrize("text", ["", "[]", "{", '{"peft_type": 7}'])
def test_an_adapter_whose_config_says_nothing_is_one_all_the_same(refused, tmp_path, text):
    (adapter(tmp_path / "a") / "adapter_config.json").write_text(text)
    assert "adapter of another model alone" in refused(tmp_path / "a", "--data", tmp_path)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["x.Q4_K_M.gguf", "README.md"], "found x.Q4_K_M.gguf (GGUF): give the checkpoint that it was exported from"),
        (["onnx/model.onnx"], "found onnx/model.onnx (ONNX)"),
        (["tf_model.h5", "flax_model.msgpack"], "found flax_model.msgpack (Flax), tf_model.h5 (TensorFlow)"),
    ],
)
def test_exports_alone_are_named_with_what_is_needed(refused, tmp_path, names, said):
    for name in names:
        (tmp_path / "m" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "m" / name).write_bytes(b"x")
    assert said in refused(tmp_path / "m", "--data", tmp_path)


@pytest.mark.parametrize(
    "lost", [["config.json"], ["tokenizer.json"], ["config.json", "tokenizer.json"], ["model.safetensors"]]
)
def test_a_clone_without_its_large_files_names_the_pointers(refused, made, tmp_path, lost):
    folder = builders.copy_folder(made / "bert", tmp_path / "b")
    for name in lost:
        (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 5\n")
    message = refused(folder, "--data", made / "texts.csv", "-o", tmp_path / "out")
    assert "git-lfs pointer" in message
    assert "git lfs pull" in message
    assert all(name in message for name in lost)
    assert "Expecting value" not in message


def test_a_pointer_that_nobody_reads_is_copied_and_named(tmp_path):
    folder = builders.timm_checkpoint(tmp_path / "t")
    (folder / "runs").mkdir()
    (folder / "runs/events.out").write_text("version https://git-lfs.github.com/spec/v1\n")
    source = find_source(str(folder))
    warnings = open_checkpoint(source, open_library(source)).warnings
    assert any("git-lfs pointers instead of files: runs/events.out" in warning for warning in warnings)


def test_a_directory_that_is_not_there_is_said_with_the_place_that_was_tried(refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert f"no such directory (looked for {tmp_path}/nowhere)" in refused("./nowhere")


# ---------------------------------------------------------------- which weights of a pickle, through the command

AVERAGED, RAW = "state_dict_ema", "state_dict"


@pytest.fixture
def trained(made, tmp_path):
    """A folder as timm's train.py leaves it: raw and averaged weights, settings and an optimizer in one pickle."""
    folder = builders.copy_folder(made / "timm", tmp_path / "trained")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    average = {name: tensor * 1.5 if name == "fc.weight" else tensor for name, tensor in tensors.items()}
    optimizer = {"state": {0: {"momentum_buffer": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]}
    saved = {"epoch": 1, "arch": "test_resnet", RAW: tensors, "optimizer": optimizer, AVERAGED: average}
    torch.save({**saved, "args": Namespace(lr=0.1), "metric": np.float64(71.5)}, folder / "last.pth.tar")
    return folder


NOTHING = ("--sparse-steps", "0", "--dense-steps", "0", "--sparsity", "0", "--gate", "none", "--control", "none")


def test_the_averaged_weights_are_taken_and_said_and_a_key_chooses(command, refused, made, trained, tmp_path):
    common = ("--data", made / "pictures", "--allow-pickle", "--device", "cpu", "--json", *NOTHING)
    sets = torch.load(trained / "last.pth.tar", weights_only=False)
    for number, (given, key) in enumerate([((), AVERAGED), (("--weights-key", RAW), RAW)]):
        out = tmp_path / f"out{number}"
        found = command(trained, *common, *given, "-o", out)
        assert found.code == 0, found.err
        report = json.loads(found.out)
        assert report["source"]["weights_key"] == key
        other = RAW if key == AVERAGED else AVERAGED
        assert any(f"{key!r} is taken" in warning and f"left: {other}" in warning for warning in report["warnings"])
        assert all(tensor.equal(sets[key][name]) for name, tensor in load_file(out / "model.safetensors").items())
        # what is remembered takes the same: the recipe, a resumed run, verify
        again = command(trained, "--recipe", out / "dsd/recipe.yaml", *common, "-o", tmp_path / f"again{number}")
        assert json.loads(again.out)["source"]["weights_key"] == key
        assert command("verify", trained, out, "--allow-pickle").code == 0
        assert command("verify", trained, out, "--allow-pickle", "--weights-key", key).code == 0
        wrong = command("verify", trained, out, "--allow-pickle", "--weights-key", other)
        assert wrong.code == 3
        assert f"the weights under {key!r} of its pickle, looked at were those under {other!r}" in wrong.out
    message = refused(trained, *common, "--weights-key", "ema", "-o", tmp_path / "other")
    assert "--weights-key ema: no weights there; the file has state_dict, state_dict_ema" in message
    assert not (tmp_path / "other").exists()


def test_a_stopped_run_is_not_resumed_with_other_weights_of_the_same_file(command, refused, made, trained, tmp_path):
    args = (trained, "--data", made / "pictures", "--allow-pickle", "-o", tmp_path / "out", *SHORT, "--quiet", "--weights-key")
    assert command("plan", *args, AVERAGED).code == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Workspace, "publish", lambda self: (_ for _ in ()).throw(Interrupted("stopped")))
        assert command(*args, AVERAGED).code == 4
    assert "weights_key was 'state_dict_ema', is 'state_dict'" in refused(*args, RAW, "--resume")
    assert command(*args, AVERAGED, "--resume").code == 0


def test_a_weights_key_for_safetensors_is_refused(refused, made, tmp_path):
    message = refused(made / "timm", "--data", made / "pictures", "-o", tmp_path / "out", "--weights-key", "model")
    assert "model.safetensors is safetensors, which holds one set of weights" in message


def test_two_models_in_one_file_are_refused_with_the_option(command, refused, made, tmp_path):
    folder = builders.copy_folder(made / "bert", tmp_path / "b")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save({"student": tensors, "teacher": tensors}, folder / "pytorch_model.bin")
    args = (folder, "--data", made / "texts.csv", "--allow-pickle", "-o", tmp_path / "out", "--device", "cpu", *NOTHING)
    assert "several sets of weights (student, teacher); say which with --weights-key" in refused(*args)
    assert command(*args, "--weights-key", "student").code == 0


# ---------------------------------------------------------------- timm's models as transformers saves them


@pytest.mark.parametrize("in_chans", [1, 3])
def test_a_timm_model_that_transformers_saved_is_refined_and_loads_there(command, made, tmp_path, in_chans):
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    plain = builders.timm_checkpoint(tmp_path / "plain", in_chans=in_chans)
    edited(plain, model_args={"in_chans": in_chans} if in_chans != 3 else None)
    AutoModelForImageClassification.from_pretrained(plain).save_pretrained(tmp_path / "wrapped")
    data = made / ("pictures" if in_chans == 1 else "colours")
    found = command(tmp_path / "wrapped", "--data", data, "-o", tmp_path / "out", *SHORT, "--json")
    assert found.code == 0, found.err
    report = json.loads(found.out)
    assert (report["source"]["library"], report["labels"]["model"]) == ("transformers", ["a", "b", "c"])
    assert [layer["name"] for layer in report["layers"] if "first layer" in (layer["excluded"] or "")] == ["conv1.0.weight"]
    assert report["preprocessing"]["input_size"] == [in_chans, 32, 32]
    assert command("verify", tmp_path / "wrapped", tmp_path / "out").code == 0
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    picture = Image.open(next((data / "test").rglob("*.png")))
    inputs = processor(picture, return_tensors="pt")
    logits = [
        AutoModelForImageClassification.from_pretrained(tmp_path / name).eval()(**inputs).logits for name in ("wrapped", "out")
    ]
    assert logits[0].shape == logits[1].shape == (1, 3)
    assert not logits[0].equal(logits[1])


def test_what_timm_calls_the_first_layer_is_it_in_a_wrapped_model_too(tmp_path):
    folder = builders.timm_checkpoint(tmp_path / "t", in_chans=3)
    edited(folder, model_type="timm_wrapper", architectures=["TimmWrapperForImageClassification"], model_args=None)
    source = find_source(str(folder))
    model = open_library(source).build_meta()
    model.timm_model.pretrained_cfg["first_conv"] = ("conv1.3", "layer1.0.conv1")
    assert first_layers(model, "image-classification") == ["timm_model.conv1.3", "timm_model.layer1.0.conv1"]


def test_a_wrapped_model_sees_what_transformers_would_show_it(tmp_path):
    from transformers import AutoImageProcessor

    from dsd_refine.checkpoint.libraries.image_processor import processor_preprocessing

    folder = builders.timm_checkpoint(tmp_path / "t", in_chans=3, size=48)
    edited(folder, model_type="timm_wrapper", architectures=["TimmWrapperForImageClassification"], model_args=None)
    source = find_source(str(folder))
    assert source.library == "transformers"
    found = processor_preprocessing(folder, open_library(source).config)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8))
    wanted = AutoImageProcessor.from_pretrained(folder)(picture, return_tensors="pt")["pixel_values"][0]
    assert found.evaluation(picture).equal(wanted)
    assert (found.channels, found.size) == (3, (48, 48))
    assert torch.allclose(found.normalise(picture.crop((0, 0, 48, 48))), found.evaluation(picture.crop((0, 0, 48, 48))))


# ---------------------------------------------------------------- a value that the file's dtype cannot hold


def test_a_statistic_that_outgrows_float16_ends_the_run_at_the_first_look(command, made, tmp_path):
    folder = builders.copy_folder(made / "timm", tmp_path / "half")
    tensors = load_file(folder / "model.safetensors")
    tensors["conv1.0.weight"] *= 3000  # its outputs vary by more than float16 reaches; BatchNorm evens them out
    tensors["conv1.1.running_var"].fill_(60_000)
    half = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    builders.write_tensors(folder / "model.safetensors", half)
    found = command(folder, "--data", made / "pictures", "-o", tmp_path / "out", *SHORT)
    assert found.code == 5, found.err
    assert "conv1.1.running_var: training brought a value to " in found.err
    assert "float16, which the source's file has, ends at 65,504" in found.err
    assert not (tmp_path / "out").exists()
    lines = [json.loads(line) for line in (tmp_path / "out.partial/log.jsonl").read_text().splitlines()]
    assert {line["arm"] for line in lines} == {"baseline", "refined"}  # the control was not trained for nothing


def test_a_statistic_that_outgrows_float32_ends_the_run_at_the_first_look(command, made, tmp_path):
    folder = builders.copy_folder(made / "timm", tmp_path / "large")
    tensors = load_file(folder / "model.safetensors")
    tensors["conv1.0.weight"] *= 1e20  # the variance of its outputs is beyond float32; what BatchNorm makes of them is not
    tensors["conv1.1.running_var"].fill_(1e38)
    builders.write_tensors(folder / "model.safetensors", tensors)
    found = command(folder, "--data", made / "pictures", "-o", tmp_path / "out", *SHORT)
    assert found.code == 5, found.err
    assert "conv1.1.running_var: holds values that are not finite after training" in found.err
    assert not (tmp_path / "out").exists()
    lines = [json.loads(line) for line in (tmp_path / "out.partial/log.jsonl").read_text().splitlines()]
    assert {line["arm"] for line in lines} == {"baseline", "refined"}  # the control was not trained for nothing


# ---------------------------------------------------------------- what is copied is fetched, what is not is not

FILES = [
    "config.json", "model.safetensors", "README.md", "language_model/5gram.bin", "adapter.fra.safetensors", "vocab.bin",
    "training_args.bin", "2_Dense/model.safetensors", "onnx/model.onnx", "pytorch_model.bin", "model.fp16.safetensors",
    "tf_model.h5", "original/consolidated.00.pth", "original/params.json", "odd[1].gguf", "odd1.txt", "optimizer.pt",
    "label_encoder.pt", "normalizer.ckpt", "model_head.pkl", "model_card.safetensors", "weights.npz", "best.pth",
]  # fmt: skip


def test_what_is_copied_is_fetched_and_copies_of_the_weights_are_not(tmp_path):
    """Over any choice of files: an output of the repository is one of the folder that was fetched."""
    from huggingface_hub.utils import filter_repo_objects

    draw = np.random.default_rng(0)
    for number in range(60):
        names = sorted({"config.json", "model.safetensors", *draw.choice(FILES, draw.integers(1, len(FILES)))})
        ignored = source_module._not_wanted(set(names), True, bool(number % 2))
        fetched = set(filter_repo_objects(names, ignore_patterns=ignored))
        whole = tmp_path / str(number)
        for name in names:
            (whole / name).parent.mkdir(parents=True, exist_ok=True)
            (whole / name).write_bytes(b"x" * (9 if name == "model.safetensors" else 1))
        copied, left, _ = source_module.Source("", "", None, whole, "timm").side_files({"model.safetensors"})
        assert {"config.json", "model.safetensors", *copied} <= fetched
        assert not {name for name in left if not name.endswith("/")} & fetched


@pytest.mark.parametrize(
    ("names", "read"),
    [
        (["pytorch_model.bin"], {"pytorch_model.bin"}),
        (["pytorch_model-1.bin", "pytorch_model-2.bin", "pytorch_model.bin.index.json"], None),
        (["a.pth"], {"a.pth"}),
        (["model_best.pth.tar"], {"model_best.pth.tar"}),
        (["weights.safetensors", "pytorch_model.bin"], {"weights.safetensors"}),
        (["model-1.safetensors", "model.safetensors.index.json", "pytorch_model.bin"], {"model-1.safetensors"}),
        (["model.fp16.safetensors"], {"model.fp16.safetensors"}),
    ],
)
def test_what_is_read_is_fetched(names, read):
    from huggingface_hub.utils import filter_repo_objects

    ignored = source_module._not_wanted(set(names), True, True)
    assert set(read or names) <= set(filter_repo_objects(names, ignore_patterns=ignored))


@pytest.mark.parametrize("where", [None, "/somewhere/vocab.txt"])
def test_a_file_that_a_library_misses_is_said_with_the_place(made, where):
    """Some libraries raise without the path that they tried: the source's folder says at least where."""
    source = find_source(str(made / "bert"))
    with (
        pytest.raises(UsageError, match=rf"{where or source.folder}: .*No such file.*; nothing was trained"),
        _unreadable(source),
    ):
        raise FileNotFoundError(2, "No such file or directory", where)

"""torchvision's models: released weights from torch.hub's cache, folders in our layout, auxiliary heads, the way back."""

import json
import re
import warnings
from argparse import Namespace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import builders
import pytest
import torch
from conftest import SHORT
from PIL import Image
from safetensors.torch import load_file
from tasks import open_task
from torch.nn import functional as F
from torchvision import models
from torchvision.models import _api
from torchvision.models.googlenet import GoogLeNetOutputs
from torchvision.models.inception import InceptionOutputs

from dsd_refine.checkpoint.checkpoint import open_checkpoint
from dsd_refine.checkpoint.libraries.open import open_library
from dsd_refine.checkpoint.libraries.torchvision import TorchvisionLibrary, preset_preprocessing
from dsd_refine.checkpoint.source import find_source
from dsd_refine.checkpoint.torchvision_release import _cached, describe
from dsd_refine.errors import CheckpointError
from dsd_refine.forward import weighted_logits

SMALL = "shufflenet_v2_x0_5"
CLASSES = ("tench", "n01443537", "great white shark")  # the middle one by its synset, as ImageNet's folders are called


def report(out):
    return json.loads((out / "dsd/report.json").read_text())


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """(TORCH_HOME, OUT of a finished run of `torchvision:NAME`)."""
    from dsd_refine.cli.app import main

    place = tmp_path_factory.mktemp("released")
    builders.torchvision_cache(place / "home", SMALL)
    builders.image_folder(place / "data", CLASSES, per_class=8, channels=3)
    args = [f"torchvision:{SMALL}", "--data", place / "data", "-o", place / "out", *SHORT, "--allow-pickle", "--quiet"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_HOME", str(place / "home"))
        with pytest.raises(SystemExit) as ended:
            main([str(arg) for arg in args])
    assert ended.value.code == 0
    return place


def test_a_released_file_comes_out_as_safetensors_with_its_own_keys(released):
    model = models.get_model(SMALL)
    state = load_file(released / "out/model.safetensors")
    assert set(state) == set(model.state_dict())
    model.load_state_dict(state)
    changed = [
        name for name, value in torch.load(next((released / "home").rglob("*.pth"))).items() if not value.equal(state[name])
    ]
    assert "fc.weight" in changed


def test_the_report_names_entry_and_file(released):
    found = report(released / "out")
    assert found["source"]["resolved"] == f"{SMALL}.IMAGENET1K_V1"
    assert found["source"]["library"] == "torchvision"
    file = next((released / "home").rglob("*.pth")).name
    assert found["source"]["files"][0]["name"] == file
    assert found["source"]["revision"] in file
    assert found["labels"]["model"][:3] == ["tench", "goldfish", "great white shark"]
    assert "the source's weights are a pickle; the output's are model.safetensors" in found["warnings"]
    first = next(layer for layer in found["layers"] if layer["name"] == "conv1.0.weight")
    assert first["excluded"] == "the first layer: it sees the input"


def test_an_output_is_verified_and_can_be_refined_again(released, command, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(released / "home"))
    found = command("verify", f"torchvision:{SMALL}", released / "out", "--allow-pickle")
    assert found.code == 0, found.out + found.err
    again = command(released / "out", "--data", released / "data", "-o", tmp_path / "again", *SHORT, "--sparse-steps", 0)
    assert again.code == 0, again.err
    assert command("verify", released / "out", tmp_path / "again").code == 0
    assert report(tmp_path / "again")["source"]["library"] == "torchvision"


def test_plan_needs_neither_the_file_nor_the_flag(command, released, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    found = command("plan", "torchvision:googlenet", "--json")
    assert found.code == 0, found.err
    layers = {layer["name"]: layer["excluded"] for layer in json.loads(found.out)["layers"]}
    assert layers["aux1.fc2.weight"] is None
    assert layers["conv1.conv.weight"] == "the first layer: it sees the input"
    assert not list(tmp_path.rglob("*.pth"))


def test_a_run_needs_the_flag(refused, released, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(released / "home"))
    said = refused(f"torchvision:{SMALL}", "--data", released / "data", "-o", tmp_path / "out")
    assert "--allow-pickle" in said
    assert ".pth" in said


def test_a_file_that_cannot_be_fetched_is_said_with_the_cache_s_place(refused, released, monkeypatch, tmp_path):
    def offline(*args, **options):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    said = refused("torchvision:resnet18", "--data", released / "data", "-o", tmp_path / "out", "--allow-pickle")
    assert "no network" in said
    assert "TORCH_HOME" in said


def test_a_download_is_checked_against_the_hash_in_its_name(monkeypatch, tmp_path):
    (tmp_path / "web").mkdir()
    (tmp_path / "web/file.pth").write_bytes(b"content")
    handler = partial(SimpleHTTPRequestHandler, directory=tmp_path / "web")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/file.pth"
        with pytest.raises(CheckpointError, match="invalid hash"):
            _cached(url, "file.pth", "00000000")
        assert not list((tmp_path / "home").rglob("*.pth"))
        assert _cached(url, "file.pth", "ed7002b4").read_bytes() == b"content"
        server.shutdown()


@pytest.mark.parametrize(
    "name", ["googlenet", "inception_v3", "vit_b_16", "regnet_y_400mf", "maxvit_t", "swin_v2_t", "densenet121"]
)
def test_the_model_is_the_one_that_torchvision_builds_for_its_weights(name, monkeypatch, tmp_path):
    from accelerate import init_empty_weights

    monkeypatch.setattr(_api, "load_state_dict_from_url", lambda *args, **options: {})
    for weights in models.get_model_weights(name):
        (tmp_path / "config.json").write_text(json.dumps(describe(name, weights)))
        ours = TorchvisionLibrary.open(tmp_path).build_meta()
        with init_empty_weights(), monkeypatch.context() as patch, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            patch.setattr(torch.nn.Module, "load_state_dict", lambda *args, **options: None)
            theirs = models.get_model(name, weights=weights, **({"aux_logits": True} if name == "googlenet" else {}))
        assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
        assert getattr(ours, "transform_input", None) == getattr(theirs, "transform_input", None)


def test_preprocessing_is_torchvision_s_own():
    weights = models.get_model_weights("resnet50").IMAGENET1K_V2
    found = preset_preprocessing(describe("resnet50", weights)["preprocessing"])
    picture = Image.effect_noise((300, 260), 64).convert("RGB")
    assert torch.equal(found.evaluation(picture), weights.transforms()(picture))
    assert found.size == (224, 224)


@pytest.fixture(scope="module")
def googlenet(tmp_path_factory):
    return builders.torchvision_checkpoint(tmp_path_factory.mktemp("g") / "m", "googlenet", size=64, init_weights=False)


def opened(folder):
    source = find_source(str(folder))
    return open_checkpoint(source, open_library(source))


def test_auxiliary_heads_train_at_their_papers_weights_and_do_not_judge():
    heads = [torch.randn(4, 3) for _ in range(3)]
    google = weighted_logits(lambda x: GoogLeNetOutputs(*heads), {"x": torch.empty(0)})
    assert [(weight, logits is h) for (weight, logits), h in zip(google, heads, strict=True)] == [
        (1.0, True), (0.3, True), (0.3, True),
    ]  # fmt: skip
    inception = weighted_logits(lambda x: InceptionOutputs(*heads[:2]), {"x": torch.empty(0)})
    assert [weight for weight, _ in inception] == [1.0, 0.4]
    assert inception[1][1] is heads[1]


def test_googlenet_trains_with_its_heads_and_is_judged_by_the_main_one(googlenet, command, tmp_path):
    """Heads are maskable layers, train, and come out under their names."""
    builders.image_folder(tmp_path / "data", per_class=8, size=64, channels=3)
    out = tmp_path / "out"
    args = ("--data", tmp_path / "data", "-o", out, *SHORT, "--dense-lr", "0.01", "--control", "none")
    found = command(googlenet, *args)
    assert found.code == 0, found.err
    layers = {layer["name"]: layer for layer in report(out)["layers"]}
    assert layers["aux1.conv.conv.weight"]["excluded"] is None
    assert layers["aux2.fc2.weight"]["zeros_in_sparse"] == layers["aux2.fc2.weight"]["masked"] > 0
    before, after = load_file(googlenet / "model.safetensors"), load_file(out / "model.safetensors")
    assert not before["aux1.fc2.weight"].equal(after["aux1.fc2.weight"])


def test_the_loss_of_a_batch_is_the_weighted_sum_over_heads(googlenet, made):
    from dsd_refine.recipe import validate

    checkpoint = opened(googlenet)
    recipe = validate({"phases": [{"kind": "sparse", "steps": 1, "lr": 0.1, "sparsity": 0.3}], "data": str(made / "colours")})
    task = open_task(recipe, checkpoint.library, checkpoint.model, made / "cache")
    model = checkpoint.model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    batch = task.batch(task.train, [(unit, None) for unit in range(4)])
    main, second, first = model(batch.inputs["x"])
    by_hand = [F.cross_entropy(logits, batch.targets, reduction="sum") for logits in (main, first, second)]
    torch.testing.assert_close(task.loss(model, batch), by_hand[0] + 0.3 * by_hand[1] + 0.3 * by_hand[2])
    model.eval()
    losses = [score.loss for score in task.score(model, batch)]
    torch.testing.assert_close(
        torch.tensor(losses).sum(), F.cross_entropy(model(batch.inputs["x"]), batch.targets, reduction="sum")
    )


def test_heads_that_are_left_out_pass_through(googlenet, tmp_path):
    builders.copy_folder(googlenet, tmp_path / "m")
    config = json.loads((tmp_path / "m/config.json").read_text())
    config["args"] |= {"aux_logits": False}
    (tmp_path / "m/config.json").write_text(json.dumps(config))
    checkpoint = opened(tmp_path / "m")
    assert not [name for name in checkpoint.placement if name.startswith("aux")]
    (tmp_path / "out").mkdir()
    checkpoint.write(checkpoint.model, tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").read_bytes() == (googlenet / "model.safetensors").read_bytes()
    assert "strict=False" in checkpoint.library.snippet()


@pytest.mark.parametrize(
    ("architecture", "args"),
    [
        (SMALL, {}),
        ("googlenet", {"transform_input": True, "init_weights": False}),
        ("densenet121", {}),
        ("mnasnet0_5", {}),
    ],
)
def test_the_snippet_of_the_model_card_loads_the_output(architecture, args, tmp_path, monkeypatch):
    """Old DenseNet names stay in the file and are renamed in the snippet; MNASNet asks for a version."""
    builders.torchvision_checkpoint(tmp_path / "m", architecture, **args)
    if architecture == "densenet121":
        state = load_file(tmp_path / "m/model.safetensors")
        state = {name: value for name, value in state.items() if "num_batches" not in name}  # of before there were any
        old = {re.sub(r"(denselayer\d+\.(?:norm|conv))([12])", r"\1.\2", name): value for name, value in state.items()}
        assert set(old) != set(state)
        builders.write_tensors(tmp_path / "m/model.safetensors", old)
    checkpoint = opened(tmp_path / "m")
    assert set(checkpoint.placement) == set(checkpoint.layout.names())
    monkeypatch.chdir(tmp_path / "m")
    scope = {}
    exec(checkpoint.library.snippet(), scope)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(scope["model"].eval()(x), checkpoint.model.eval()(x))
        assert torch.equal(scope["model"](x), checkpoint.library.load_plain(tmp_path / "m").eval()(x))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"architecture": "resnet5o"}, "did you mean resnet50"),
        ({"weights": "V9"}, "no weights 'V9' of it, but IMAGENET1K_V1"),
        ({"num_classes": 4}, "not that of label_names"),
        ({"label_names": None}, "is no number of classes"),
        ({"preprocessing": {"crop": 3}}, "needs `weights`.*or `preprocessing` with resize_size"),
        ({"args": {"weights": "DEFAULT"}}, "args is not a mapping for get_model"),
        ({"args": {"depth": 3}}, "torchvision cannot load this as shufflenet"),
        ({"pretrained": True}, "unknown keys pretrained"),
        ({"label_names": ["a", "b"]}, "torchvision cannot load this.*size mismatch"),
    ],
)
def test_a_config_that_says_something_else_is_refused(change, said, tmp_path):
    builders.torchvision_checkpoint(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=re.compile(said, re.DOTALL)):
        opened(tmp_path)


def test_a_folder_that_names_an_entry_needs_no_more(tmp_path):
    """`weights` fills in what is not said; with another number of classes its label names do not count."""
    config = {"library": "torchvision", "architecture": "resnet18", "weights": "IMAGENET1K_V1"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert len(TorchvisionLibrary.open(tmp_path).label_names()[0]) == 1000
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_classes": 10}))
    library = TorchvisionLibrary.open(tmp_path)
    assert library.label_names() == (None, 10)
    assert library.preprocessing(library.build_meta()).size == (224, 224)


def test_a_folder_with_a_pickle_needs_the_flag_and_gives_safetensors(tmp_path, refused, command):
    builders.torchvision_checkpoint(tmp_path / "m")
    state = load_file(tmp_path / "m/model.safetensors")
    (tmp_path / "m/model.safetensors").unlink()
    torch.save(state, tmp_path / "m/weights.pth")
    builders.image_folder(tmp_path / "data", channels=3)
    args = (tmp_path / "m", "--data", tmp_path / "data", "-o", tmp_path / "out", *SHORT, "--sparsity", 0, "--sparse-steps", 0)
    assert "--allow-pickle" in refused(*args)
    assert command(*args, "--dense-steps", 0, "--control", "none", "--allow-pickle").code == 0
    written = load_file(tmp_path / "out/model.safetensors")
    assert all(torch.equal(written[name], value) for name, value in state.items())
    assert not (tmp_path / "out/weights.pth").exists()


def test_a_missing_tensor_is_named(tmp_path):
    builders.torchvision_checkpoint(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["fc.bias"]
    builders.write_tensors(tmp_path / "model.safetensors", state)
    with pytest.raises(CheckpointError, match=r"lack what shufflenet_v2_x0_5 needs: fc\.bias"):
        opened(tmp_path)


def test_the_average_that_torchvision_s_own_training_saves_is_taken_without_its_wrapper(tmp_path):
    """Its references/classification/train.py: `model`, and `model_ema` of an AveragedModel."""
    folder = builders.torchvision_checkpoint(tmp_path / "m")
    plain = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    average = {f"module.{name}": tensor * 2 if name == "fc.weight" else tensor for name, tensor in plain.items()}
    saved = {"model": plain, "model_ema": {"n_averaged": torch.tensor(3), **average}, "epoch": 2, "args": Namespace(lr=0.1)}
    torch.save(saved, folder / "checkpoint.pth")
    source = find_source(str(folder))
    checkpoint = open_checkpoint(source, open_library(source), allow_pickle=True)
    assert list(checkpoint.layout.names()) == list(plain)
    assert torch.equal(checkpoint.model.fc.weight, plain["fc.weight"] * 2)
    assert any("'model_ema' is taken (as timm does" in warning for warning in checkpoint.warnings)
    assert any("without the 'module.'" in warning for warning in checkpoint.warnings)

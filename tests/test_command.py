"""The command from outside: what it refuses and how it says so, where its output goes, what it imports."""

import json
import shutil

import pytest
import torch
from builders import bert_checkpoint, copy_folder, image_folder, text_csv, timm_checkpoint, write_shards
from conftest import ROOT, SHORT, hashes, process
from runs import fresh, run_program, start
from safetensors.torch import load_file

import dsd_refine

# ---------------------------------------------------------------- exit code 2


def text_run(made, out, *more):
    return (made / "bert", "--data", made / "texts.csv", "-o", out, *more)


def picture_run(made, out, *more):
    return (made / "timm", "--data", made / "pictures", "-o", out, *more)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--label-column", "stars"], r"no column 'stars'; the data has text, label"),
        (["--text-column", "words"], r"no column 'words'; the data has text, label"),
        (["--include", "nothing.*"], r"nothing.*"),
        (["--exclude", "no.such.weight"], r"no.such.weight"),
        (["--sparsity", "1"], r"at least 0 and less than 1"),
        (["--sparsity", "-0.1"], r"at least 0 and less than 1"),
        (["--sparsity", "0.3,1.5"], r"at least 0 and less than 1"),
        (["--sparsity", "much"], r"not a number"),
        (["--set", "phases.0.sparcity=0.3"], r"unknown key; did you mean 'sparsity'"),
        (["--set", "learning_rate=1"], r"unknown key"),
        (["--set", "phases.7.lr=1"], r"not a number from 0 to 1"),
        (["--set", "nonsense"], r"expected FIELD=VALUE"),
        (["--set", "batch_size=0"], r"batch_size"),
        (["--recipe", "text-clasification"], r"did you mean 'text-classification'"),
        (["--recipe", "image-classification"], r"is for image-classification, the model for text-classification"),
        (["--task", "ctc-speech"], r"no class that does ctc-speech with bert"),
        (["--task", "poetry"], r"not a task; known are"),
        (["--control", "none", "--gate", "beats-control"], r"needs a control"),
        (["--control", "none", "--control", "dense"], r"cannot be combined"),
        (["--holdout", "0"], r"use keep: last"),
        (["--holdout", "0", "--keep", "last", "--sparsity", "0.2,0.3"], r"use keep: last and one sparsity"),
        (["--max-length", "33"], r"only 32 positions"),
        (["--lr", "-1"], r"lr"),
        (["--lr", "nan"], r"lr"),
        (["--eval-data", "./nowhere.csv"], r"nowhere.csv: no such file"),
        (["--no-such-option"], r"no such option"),
        (["--workers", "-1"], r"workers"),
    ],
)
def test_bad_options_are_refused(refused, made, tmp_path, options, says):
    import re

    assert re.search(says, refused(*text_run(made, tmp_path / "out"), *options))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there(refused, made, tmp_path):
    assert "torch sees no CUDA device" in refused(*text_run(made, tmp_path / "out"), "--device", "cuda")


def test_data_that_are_not_there(refused, made, tmp_path):
    out = tmp_path / "out"
    assert "no data: give --data" in refused(made / "timm", "-o", out)
    assert "no such file" in refused(made / "timm", "--data", tmp_path / "nowhere", "-o", out)
    (tmp_path / "empty.csv").write_text("")
    assert "is empty" in refused(made / "bert", "--data", tmp_path / "empty.csv", "-o", out)
    (tmp_path / "folder").mkdir()
    assert "no images in class folders" in refused(made / "timm", "--data", tmp_path / "folder", "-o", out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.csv", "folder"]


def test_a_hub_data_set_offline(refused, made, tmp_path):
    message = refused(made / "bert", "--data", "someone/no-such-set", "-o", tmp_path / "out")
    assert "HF_HUB_OFFLINE is set and the data set is not in the cache" in message


def test_labels_that_do_not_match_show_both_lists(refused, made, tmp_path):
    text_csv(tmp_path / "t.csv", labels=("good", "bad"))
    message = refused(made / "bert", "--data", tmp_path / "t.csv", "-o", tmp_path / "out")
    assert all(name in message for name in ("good", "bad", "neg", "pos"))
    image_folder(tmp_path / "d", classes=("a", "b", "d"), per_class=2)
    message = refused(made / "timm", "--data", tmp_path / "d", "-o", tmp_path / "out")
    assert "no class names of the model: d" in message
    assert "a, b, c" in message


def test_class_counts_that_differ(refused, tmp_path):
    timm_checkpoint(tmp_path / "m", classes=4)
    image_folder(tmp_path / "d", per_class=2)
    message = refused(tmp_path / "m", "--data", tmp_path / "d", "-o", tmp_path / "out")
    assert "the data has 3 classes (a, b, c), the model 4" in message


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("torchvision:resnet81", "torchvision"),
        ("./nowhere", "no such directory"),
        ("resnet5000", "not a timm model; did you mean"),
        ("someone/no-such-model", "HF_HUB_OFFLINE is set and the model is not in the cache"),
    ],
)
@pytest.mark.parametrize("verb", ["run", "plan"])
def test_sources_that_are_none(refused, made, model, says, verb):
    assert says in refused(verb, model, "--data", made / "pictures")


def spoiled(made, tmp_path, change):
    folder = copy_folder(made / "bert", tmp_path / "m")
    change(folder / "model.safetensors")
    return folder


def truncated(path):
    path.write_bytes(path.read_bytes()[:-100])


def pointer(path):
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def one_shard_short(path):
    tensors = load_file(path)
    names = sorted(tensors)
    shards = {f"model-0000{i + 1}-of-00002.safetensors": {n: tensors[n] for n in names[i::2]} for i in range(2)}
    write_shards(path.parent, shards)
    truncated(path.parent / "model-00002-of-00002.safetensors")


def shard_missing(path):
    one_shard_short(path)
    (path.parent / "model-00002-of-00002.safetensors").unlink()


def not_finite(path):
    from safetensors.torch import save_file

    tensors = load_file(path)
    tensors["classifier.weight"][0, 0] = float("nan")
    save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (truncated, "truncated"),
        (pointer, "git-lfs pointer"),
        (one_shard_short, "model-00002-of-00002.safetensors: truncated"),
        (shard_missing, "names the shard model-00002-of-00002.safetensors, which is not there"),
        (not_finite, "classifier.weight holds values that are not finite"),
        (lambda path: path.unlink(), "no weights here"),
    ],
)
def test_broken_weights_are_named(refused, made, tmp_path, change, says):
    folder = spoiled(made, tmp_path, change)
    assert says in refused(folder, "--data", made / "texts.csv", "-o", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_base_model_without_its_head(refused, made, tmp_path):
    from transformers import BertModel

    folder = bert_checkpoint(tmp_path / "m")
    BertModel.from_pretrained(folder).save_pretrained(folder)
    message = refused(folder, "--data", made / "texts.csv", "-o", tmp_path / "out")
    assert "no task's head" in message
    message = refused(folder, "--data", made / "texts.csv", "-o", tmp_path / "out", "--task", "text-classification")
    assert "classifier.weight" in message


def test_a_source_without_its_tokenizer_or_config(refused, made, tmp_path):
    folder = copy_folder(made / "bert", tmp_path / "m")
    for path in folder.glob("token*"):
        path.unlink()
    assert "has no tokenizer (none of tokenizer.json, vocab.txt is there)" in refused(
        folder, "--data", made / "texts.csv", "-o", tmp_path / "out"
    )
    (folder / "config.json").write_text("{")
    assert "config.json: not readable as JSON" in refused(folder, "--data", made / "texts.csv", "-o", tmp_path / "out")
    (folder / "config.json").unlink()
    assert "has no config.json" in refused(folder, "--data", made / "texts.csv", "-o", tmp_path / "out")


def test_quantised_and_regression_models(refused, made, tmp_path):
    for key, value in (("problem_type", "regression"), ("quantization_config", {"quant_method": "awq"})):
        folder = copy_folder(made / "bert", tmp_path / key)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {key: value}))
        assert refused(folder, "--data", made / "texts.csv", "-o", tmp_path / "out")


@pytest.mark.parametrize("where", ["same", "link", "inside", "around"])
def test_an_output_over_the_source_is_refused(refused, made, tmp_path, where):
    source = copy_folder(made / "timm", tmp_path / "sources/m")
    before = hashes(source)
    link = tmp_path / "link"
    link.symlink_to(source)
    out = {"same": source, "link": link, "inside": source / "out", "around": tmp_path / "sources"}[where]
    message = refused(source, "--data", made / "pictures", "-o", out, "--overwrite")
    assert "in or over the source" in message
    assert hashes(source) == before
    assert not source.with_name("m.partial").exists()


def test_an_output_that_is_not_empty_is_refused(refused, made, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("precious")
    assert "is not empty" in refused(*picture_run(made, out))
    assert "no report of dsd-refine" in refused(*picture_run(made, out, "--overwrite"))
    assert hashes(out).keys() == {"thesis.txt"}
    shutil.rmtree(out)
    out.write_text("a file")
    assert "is a file" in refused(*picture_run(made, out))
    assert out.read_text() == "a file"


def test_an_unfinished_run_is_not_trodden_on(refused, made, tmp_path):
    left = tmp_path / "out.partial"
    left.mkdir()
    (left / "state.json").write_text("{}")
    message = refused(*picture_run(made, tmp_path / "out"))
    assert "--resume" in message
    assert "--overwrite" in message
    assert (left / "state.json").read_text() == "{}"


def test_a_place_that_cannot_be_written(refused, made, tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refused(*picture_run(made, tmp_path / "file/out"))


@pytest.mark.parametrize(("what", "arguments"), [("run", []), ("plan", []), ("verify", ["a"]), ("recipes", ["show"])])
def test_missing_arguments(refused, what, arguments):
    assert "Missing argument" in refused(what, *arguments)


def test_verify_of_what_is_no_output(refused, made):
    assert "has no dsd/report.json" in refused("verify", made / "timm", made / "bert")


def test_a_diverging_run_ends_with_5_and_publishes_nothing(command, made, tmp_path):
    found = command(*text_run(made, tmp_path / "out", *SHORT, "--lr", "1e38", "--set", "max_grad_norm=null"))
    assert found.code == 5, found.err
    assert "try a lower --lr" in found.err
    assert "Traceback" not in found.err
    assert not (tmp_path / "out").exists()


def test_a_bug_of_ours_ends_with_1_and_its_traceback(command, made, monkeypatch):
    from dsd_refine.planning import plan

    monkeypatch.setattr(plan, "make_plan", lambda *a, **k: 1 / 0)
    found = command("plan", made / "timm")
    assert found.code == 1
    assert "ZeroDivisionError" in found.err


def test_no_space_ends_with_5(command, made, tmp_path, monkeypatch):
    from dsd_refine.run import publish

    def full(*_):
        raise OSError(28, "No space left on device", "somewhere")

    monkeypatch.setattr(publish, "copy_file", full)
    found = command(*picture_run(made, tmp_path / "out", *SHORT))
    assert found.code == 5
    assert "No space left" in found.err
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- what is imported, where output goes


HEAVY = ("torch", "timm", "transformers", "datasets", "numpy", "scipy", "accelerate")


@pytest.mark.parametrize(
    ("arguments", "also"),
    [
        (["--help"], ("pydantic", "yaml")),
        (["--version"], ("pydantic", "yaml")),
        (["run", "--help"], ("pydantic",)),
        (["recipes"], ()),
        (["recipes", "show", "digits"], ()),
    ],
)
def test_light_verbs_import_nothing_heavy(arguments, also):
    code = (
        "import sys\nfrom dsd_refine.cli.app import main\n"
        f"try:\n    main({arguments})\n"
        f"finally:\n    sys.stderr.write(' '.join(m for m in {(*HEAVY, *also)} if m in sys.modules))"
    )
    found = process("-c", code)
    assert found.returncode == 0
    assert found.stdout
    assert found.stderr == ""


def test_help_version_and_recipes(command):
    assert "--sparsity" in command("run", "--help").out
    assert command("--version").out.split()[-1] == dsd_refine.__version__
    listed = command("recipes")
    assert listed.code == 0
    assert {"image-classification", "text-classification", "causal-lm", "digits"} <= set(listed.out.split())
    shown = command("recipes", "show", "digits").out
    assert shown.rstrip("\n") == (ROOT / "recipes/digits.yaml").read_text().rstrip("\n")
    assert command("recipes", "show", "digit").code == 2


def test_stdout_is_the_result_alone(made, tmp_path):
    one, two = tmp_path / "a", tmp_path / "b"
    loud = start(*picture_run(made, one, *SHORT), "--json", absent="transformers")
    quiet = fresh(run_program, ROOT / "cli.py", *picture_run(made, two, *SHORT), "--json", "--quiet")
    for found, out in ((loud, one), (quiet, two)):
        assert found.returncode == 0, found.stderr
        assert found.stdout == (out / "dsd/report.json").read_text()
        assert json.loads(found.stdout)["exit_code"] == 0
    assert "refined, phase 1 of 2 (sparse)" in loud.stderr
    assert "\r" not in loud.stderr  # no bars where nobody watches
    assert quiet.stderr == ""


def test_the_summary_says_what_was_measured(command, made, tmp_path):
    found = command(*picture_run(made, tmp_path / "out", *SHORT, "--quiet"))
    report = json.loads((tmp_path / "out/dsd/report.json").read_text())
    for arm, figures in report["arms"].items():
        assert f"{arm.ljust(10)}{figures['accuracy']:12.4f}{figures['loss']:12.4f}" in found.out
    assert f"verdict   {report['verdict']}" in found.out
    assert str(tmp_path / "out") in found.out
    assert found.err == ""


def test_a_first_progress_line_makes_nothing_up(command, made, tmp_path):
    import re

    found = command(*picture_run(made, tmp_path / "out", *SHORT, "--sparse-steps", 1))
    assert "refined, phase 1 of 2 (sparse): step 1/1, loss " in found.err
    lines = [line for line in found.err.splitlines() if ": step " in line]
    assert not lines[0].endswith("left of the run")  # the first step only starts the clock
    assert len(re.findall(r"\d+ (?:s|min) left of the run", found.err)) == len(lines) - 1 == 3


def test_run_is_the_default_verb_and_a_model_called_plan_is_reachable(command, made, tmp_path, monkeypatch):
    shutil.copytree(made / "timm", tmp_path / "plan")
    shutil.copytree(made / "timm", tmp_path / "net")
    monkeypatch.chdir(tmp_path)
    assert command("net", "--data", made / "pictures", *SHORT, "--control", "none").code == 0
    assert command("run", "plan", "--data", made / "pictures", *SHORT, "--control", "none").code == 0
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("net-dsd", "plan-dsd"))
    assert one == two
    assert command("plan", "plan").code == 0


def test_no_arguments_show_the_help():
    found = process("-m", "dsd_refine")
    assert found.returncode == 2
    assert "Usage:" in found.stdout + found.stderr


def test_data_already_downloaded_to_a_folder_asks_no_network(command, made, tmp_path, monkeypatch):
    import socket

    monkeypatch.setenv("HF_HUB_OFFLINE", "0")

    def no_network(*_, **__):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    found = command(*text_run(made, tmp_path / "out", *SHORT, "--control", "none"))
    assert found.code == 0, found.err


# ---------------------------------------------------------------- plan


def test_plan_reads_no_weights(command, made, tmp_path):
    folder = copy_folder(made / "timm", tmp_path / "m")
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    head = 8 + int.from_bytes(raw[:8], "little")
    path.write_bytes(raw[:head] + b"\xff" * (len(raw) - head))  # every float a NaN
    before = hashes(tmp_path)
    found, whole = (
        command("plan", where, "--data", made / "pictures", "--json", "--batch-size", 8, "--sparsity", 0.3)
        for where in (folder, made / "timm")
    )
    assert found.code == 0, found.err
    plan = json.loads(found.out)
    assert plan["layers"] == json.loads(whole.out)["layers"]
    assert hashes(tmp_path) == before


def test_plan_says_what_a_run_will_do(command, made, finished):
    report = json.loads((finished / "dsd/report.json").read_text())
    arguments = (made / "timm", "--data", made / "pictures", *SHORT[:4], "--batch-size", 8)
    plan = json.loads(command("plan", *arguments, "--json").out)
    told = {
        layer["name"]: (layer["excluded"], (layer["masked"] or [0])[0] if not layer["excluded"] else 0)
        for layer in plan["layers"]
    }
    done = {layer["name"]: (layer["excluded"], layer["masked"]) for layer in report["layers"]}
    assert told == done
    text = command("plan", *arguments, "--layers").out
    for layer in report["layers"]:
        line = next(line for line in text.splitlines() if line.split()[:1] == [layer["name"]])
        assert line.endswith(layer["excluded"] or f"{layer['masked']:,}")
    assert "21 train, 3 holdout, 24 evaluation" in text
    assert "1-sparse" in text
    assert "10 steps: 2 runs of the phases (refined, dense)" in text


def test_plan_without_data_and_with_several_sparsities(command, made):
    found = command("plan", made / "gpt2", "--sparsity", "0.25,0.5", "--json")
    assert found.code == 0, found.err
    plan = json.loads(found.out)
    masked = [layer for layer in plan["layers"] if not layer["excluded"]]
    assert masked
    for layer in masked:
        assert layer["masked"] == [round(0.25 * layer["weights"]), round(0.5 * layer["weights"])]
    assert "no data given" in plan["totals"]["steps"]


def test_set_and_flags_reach_the_recipe(command, made, tmp_path):
    import yaml

    options = ["--lr", "0.02", "--set", "phases.1.schedule=linear", "--exclude", "fc.*", "--seed", "7"]
    found = command(*picture_run(made, tmp_path / "out", *SHORT, *options))
    assert found.code == 0, found.err
    recipe = yaml.safe_load((tmp_path / "out/dsd/recipe.yaml").read_text())
    assert [phase["lr"] for phase in recipe["phases"]] == [0.02, 0.002]
    assert recipe["phases"][1]["schedule"] == "linear"
    report = json.loads((tmp_path / "out/dsd/report.json").read_text())
    assert report["seed"] == recipe["seed"] == 7
    assert [phase["lr_peak"] for phase in report["phases"][:2]] == pytest.approx([0.02 * 3 / 20, 0.002])
    excluded = {layer["name"]: layer["excluded"] for layer in report["layers"]}
    assert "exclude" in excluded["fc.weight"]


def test_a_picture_model_without_its_processor(refused, made, tmp_path):
    folder = copy_folder(made / "vit", tmp_path / "m")
    (folder / "preprocessor_config.json").unlink()
    message = refused(folder, "--data", made / "colours", "-o", tmp_path / "out")
    assert "image processor cannot be loaded" in message

"""Broken and hostile files: refused in one message, or used as far as they are good; never a traceback, a bomb or a way in.

The long campaign is benchmarks/fuzz.py, recorded in benchmarks/results/; here is its short form, and each fault that it found.
"""

import contextlib
import io
import json
import os
import struct
import subprocess
import time
from random import Random

import hostile
import pytest
import torch
from builders import copy_folder, image_folder, timm_checkpoint, write_tensors
from conftest import ROOT, SHORT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from runs import fresh, run_program

from dsd_refine.checkpoint import guard, layout
from dsd_refine.checkpoint.safetensors_file import read_header, read_json
from dsd_refine.errors import CheckpointError, DataError, RecipeError
from dsd_refine.recipe import parse_yaml, validate
from dsd_refine.tasks.inputs.images import PIXELS, decode

SEEDS = st.integers(0, 2**32)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.sampled_from(hostile.NASTY[:26]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=12,
)
many = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def test_the_short_campaign():
    """Whole commands on mutated files of every kind, each in a process of its own with its time, memory and writes watched."""
    found = fresh(run_program, ROOT / "benchmarks/fuzz.py", 16, 11, timeout=600)
    assert found.returncode == 0, found.stdout + found.stderr
    assert "16 cases (seed 11), 0 gone wrong" in found.stdout


# ---------------------------------------------------------------- by hypothesis, function by function


@many
@given(SEEDS)
def test_a_changed_header_is_refused_or_is_one(tmp_path, seed):
    path = write_tensors(
        tmp_path / "x.safetensors", {"a": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(3, dtype=torch.int64)}
    )
    path.write_bytes(hostile.bytes_changed(Random(seed), path.read_bytes()))
    try:
        found = read_header(path)
    except CheckpointError:
        return
    assert sum(e.end - e.begin for e in found.entries) + len(found.head) == path.stat().st_size
    for e in found.entries:
        found.tensor(e)


@many
@given(st.dictionaries(st.text(max_size=8), JSON, max_size=4))
def test_any_header_is_refused_or_covers_the_file(tmp_path, header):
    text = json.dumps(header).encode()
    (tmp_path / "x").write_bytes(struct.pack("<Q", len(text)) + text + bytes(16))
    try:
        found = read_header(tmp_path / "x")
    except CheckpointError:
        return
    assert sum(e.end - e.begin for e in found.entries) == 16


@many
@given(JSON)
def test_any_index_is_refused_or_stays_in_its_folder(tmp_path, value):
    for index in (value, {"weight_map": value}, {"weight_map": {"a": value}}):
        (tmp_path / "i.json").write_text(json.dumps(index))
        try:
            found = layout.read_index(tmp_path / "i.json")
        except CheckpointError:
            continue
        assert all((tmp_path / name).parent == tmp_path for name in found.values())


@many
@given(SEEDS)
def test_a_changed_recipe_is_refused_or_is_one(seed):
    draw = Random(seed)
    text = hostile.bytes_changed(draw, hostile.RECIPE.encode()).decode(errors="replace")
    with_bomb = draw.choice([text, text, draw.choice(hostile.RECIPE_BOMBS)])
    try:
        recipe = validate(parse_yaml(with_bomb, "recipe"), "recipe")
    except RecipeError:
        return
    assert validate(parse_yaml(recipe.dump(), "again")) == recipe


def test_a_recipe_of_a_million_characters_is_none(tmp_path):
    started = time.process_time()
    with pytest.raises(RecipeError, match="a recipe has a few dozen lines"):
        parse_yaml("".join(f"k{i}: {i}\n" for i in range(100_000)), "recipe")
    assert time.process_time() - started < 1


@many
@given(JSON)
def test_any_value_in_a_recipe_is_refused_or_is_one(value):
    for raw in (value, {"phases": value}, {"phases": [value]}, {"phases": [{"kind": "dense", "steps": value, "lr": value}]}):
        if isinstance(raw, dict):
            try:
                validate({str(key): inner for key, inner in raw.items()})
            except RecipeError:
                continue


@many
@given(SEEDS, st.sampled_from(["PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP", "PPM"]), st.sampled_from([1, 3, 4]))
def test_a_changed_picture_is_skipped_or_is_one(seed, kind, channels):
    draw, out = Random(seed), io.BytesIO()
    Image.frombytes("L", (8, 8), draw.randbytes(64)).save(out, kind)
    try:
        found = decode(hostile.bytes_changed(draw, out.getvalue()), channels)
    except DataError:
        return
    assert found.mode == {1: "L", 3: "RGB", 4: "RGBA"}[channels]
    assert found.width * found.height <= PIXELS


# ---------------------------------------------------------------- pictures


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("50,000 x 50,000", "too large to decode safely"),
        ("13,000 x 13,000", "too large to decode safely"),
        ("1 x 100,000", "too elongated"),
        ("100,000 x 1", "too elongated"),
        ("0 x 0", "unreadable picture"),
        ("PostScript", "unreadable picture"),
        ("text bomb", "unreadable picture"),
        ("colour profile bomb", "unreadable picture"),
        ("empty", "unreadable picture"),
        ("pointer", "unreadable picture"),
    ],
)
def test_bombs_are_skipped_at_once(name, says):
    raw = hostile.BOMBS[name]()
    started = time.process_time()
    said = ""
    try:
        decode(raw, 3)
    except DataError as error:
        said = str(error)
    assert says in said or (not said and "bomb" in name)  # a library may leave out the text that it cannot unpack
    assert time.process_time() - started < 5


def test_a_reason_is_the_same_in_each_run():
    """Libraries put the address of the object that they were given into their words."""
    from dsd_refine.tasks.inputs import audio as sound

    kept = [bytearray(100_000 + i) for i in range(3)]  # so that no two objects share an address
    for read, raw in ((lambda raw: decode(raw, 3), b"no picture"), (sound.decode, b"no sound")):
        reasons = []
        for _ in range(3):
            kept.append(io.BytesIO(raw))
            with pytest.raises(DataError) as error:
                read(raw)
            reasons.append(str(error.value))
        assert len(set(reasons)) == 1
        assert "0x" not in reasons[0]


@pytest.mark.parametrize("name", sorted(hostile.SOUND_BOMBS))
def test_sounds_that_ask_for_memory_are_skipped_at_once(monkeypatch, name):
    from dsd_refine.tasks.inputs import audio as sound

    monkeypatch.setattr(sound, "MOST_SAMPLES", 1_000_000)
    raw = hostile.packed_silence(2_000_000) if name == "hours of silence" else hostile.SOUND_BOMBS[name]()
    started = time.process_time()
    with contextlib.suppress(DataError):
        samples, rate = sound.decode(raw)
        assert name in ("four gigabytes claimed", "a thousand channels")  # those have samples, at a rate that sound has
        sound.resample(samples, rate, 16_000)
    assert time.process_time() - started < 5


def test_a_picture_of_postscript_starts_no_program(monkeypatch):
    """Pillow would hand it to Ghostscript, whatever the file is called."""
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **more: pytest.fail("a program was started"))
    with pytest.raises(DataError):
        decode(hostile.POSTSCRIPT, 3)


@pytest.mark.parametrize("kind", ["GIF", "WEBP"])
def test_the_first_picture_of_an_animation_counts(kind):
    assert decode(hostile.animated(kind=kind), 1).getpixel((5, 5)) < 8


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_set_upright(orientation):
    assert decode(hostile.rotated(orientation), 3).size == ((32, 24) if orientation < 5 else (24, 32))


def test_what_is_no_regular_file_is_skipped(command, made, tmp_path):
    """A pipe would never end, a device gives for ever, a link may lead to itself."""
    data = image_folder(tmp_path / "data")
    os.mkfifo(data / "train/a/pipe.png")
    (data / "train/a/zero.png").symlink_to("/dev/zero")
    (data / "train/a/loop.png").symlink_to("loop.png")
    found = command(made / "timm", "--data", data, "-o", tmp_path / "out", *SHORT, "--quiet")
    assert found.code == 0, found.err
    skipped = json.loads((tmp_path / "out/dsd/report.json").read_text())["data"]["train"]["skipped"]
    reasons = {item["row"].rsplit("/", 1)[-1]: item["reason"] for item in skipped}
    assert reasons["pipe.png"] == reasons["zero.png"] == "unreadable file (not a regular file)"
    assert "loop.png" in reasons


@pytest.mark.parametrize("name", ["../x.png", "/etc/passwd", "/dev/zero", "a\0b", "a/../../x.png"])
def test_a_listing_that_leads_out_of_its_folder_is_refused(refused, made, tmp_path, name):
    data = image_folder(tmp_path / "data", splits=()) / "a"
    rows = [{"file_name": name, "label": "a"}, *({"file_name": f"{i:03}.png", "label": "a"} for i in range(8))]
    (data / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "leads out of" in refused(made / "timm", "--data", data, "-o", tmp_path / "out")


# ---------------------------------------------------------------- configs


def changed(made, tmp_path, model, file="config.json", **values):
    source = copy_folder(made / model, tmp_path / model)
    config = json.loads((source / file).read_text())
    (source / file).write_text(json.dumps(config | values))
    return source


@pytest.mark.parametrize(
    ("model", "values", "says"),
    [
        ("bert", {"num_labels": 10**9}, "num_labels is 1.0e+09, more than any model has"),
        ("bert", {"num_hidden_layers": 10**8}, "num_hidden_layers is 1.0e+08"),
        ("bert", {"num_hidden_layers": 10**400}, "num_hidden_layers is beyond 1e300"),
        ("bert", {"num_hidden_layers": 50_000}, "modules, which its weights could not fill"),
        ("bert", {"hidden_size": 2 * 10**6}, "elements with"),
        ("bert", {"vocab_size": 10**9}, "elements with"),
        ("bert", {"max_position_embeddings": 10**10}, "elements with"),
        ("bert", {"architectures": ["A" * 10**5]}, "its config names AAA"),
        ("bert", {"architectures": [7.5]}, "`architectures` is not a list of class names"),
        ("bert", {"id2label": {"0": "a", "5": "b"}}, "`id2label` does not name the classes"),
        ("timm", {"num_classes": 10**9}, "num_classes is 1.0e+09"),
        ("timm", {"model_args": {"layers": [10**7] * 4, "in_chans": 1}}, "layers is 1.0e+07"),
        ("timm", {"model_args": {"in_chans": 10**9}}, "elements with"),
    ],
)
@pytest.mark.parametrize("verb", ["plan", "run"])
def test_a_config_that_asks_for_more_than_its_weights_fill_is_refused(refused, made, tmp_path, verb, model, values, says):
    source, data = changed(made, tmp_path, model, **values), {"bert": "texts.csv", "timm": "pictures"}[model]
    started = time.process_time()
    message = refused(verb, source, *(["--data", made / data, "-o", tmp_path / "out"] if verb == "run" else []))
    assert says in message
    assert len(message) < 2000
    assert time.process_time() - started < 10


def test_counts_are_held_wherever_they_stand(tmp_path):
    for config in ({"a": {"num_layers": 10**7}}, {"depths": [1, 10**7]}, {"x": [{"n_head": -(10**7)}]}):
        with pytest.raises(CheckpointError, match="more than any model has"):
            guard.refuse_counts(tmp_path, config)
    guard.refuse_counts(tmp_path, {"rope_theta": 10**9, "num_layers": 10**6, "num_labels": True, "seed": 2**63})


def test_a_header_or_config_of_a_hundred_megabytes_is_no_bomb(tmp_path):
    """Each empty object would take 64 bytes of memory for its 3."""
    text = b'{"a":[' + b"{}," * 2_000_000 + b"{}]}"
    (tmp_path / "x").write_bytes(struct.pack("<Q", len(text)) + text)
    (tmp_path / "config.json").write_bytes(text)
    started = time.process_time()
    with pytest.raises(CheckpointError, match="more values than any checkpoint has"):
        read_header(tmp_path / "x")
    with pytest.raises(CheckpointError, match="more values than any checkpoint has"):
        read_json(tmp_path / "config.json")
    assert time.process_time() - started < 5


def test_a_preprocessing_that_cannot_be_done_is_refused(refused, made, tmp_path):
    name = next((made / "vit").glob("*processor*.json")).name
    for number, values in enumerate(
        ({"image_std": [1, None, 1]}, {"image_mean": [0.5] * 7}, {"do_resize": False}, {"size": {"height": 0, "width": 3}})
    ):
        source = changed(made, tmp_path / str(number), "vit", name, **values)
        assert "its image processor" in refused(source, "--data", made / "colours", "-o", tmp_path / "out")


@pytest.mark.parametrize(
    "values",
    [
        *({"mean": ["0.5"]}, {"crop_pct": "all"}, {"interpolation": 7}),
        *({"std": [0.5, 0.5]}, {"std": [0.0]}, {"crop_pct": -1}),  # which only a picture tells
    ],
    ids=str,
)
def test_a_timm_preprocessing_that_cannot_be_done_is_refused(refused, made, tmp_path, values):
    config = json.loads((made / "timm/config.json").read_text())["pretrained_cfg"]
    source = changed(made, tmp_path, "timm", "config.json", pretrained_cfg={**config, **values})
    message = refused(source, "--data", made / "pictures", "-o", tmp_path / "out")
    unusable = "the preprocessing of config.json (pretrained_cfg) is not usable: "
    assert message.startswith((unusable, "config.json: pretrained_cfg has 2 values of `std`"))
    assert not (tmp_path / "out.partial").exists()


def test_values_that_json_has_not_are_words_in_the_report(command, made, tmp_path):
    """Unread keys of a processor's config are shown too: a NaN there ended a run where its report was written."""
    name = next((made / "vit").glob("*processor*.json")).name
    source = changed(made, tmp_path, "vit", name, extra=float("nan"), more=[float("inf"), None, {"a": float("-inf")}])
    found = command(source, "--data", made / "colours", "-o", tmp_path / "out", *SHORT)
    assert found.code in (0, 3), found.err
    shown = json.loads((tmp_path / "out/dsd/report.json").read_text())["preprocessing"]
    assert (shown["extra"], shown["more"]) == ("nan", ["inf", None, {"a": "-inf"}])


@pytest.mark.parametrize("kind", [[], {}, 3, None, True])
def test_a_phase_of_a_kind_that_is_no_word_is_refused(refused, made, tmp_path, kind):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(json.dumps({"phases": [{"kind": kind, "steps": 1, "lr": 0.1}]}))
    assert "kind" in refused(
        made / "timm", "--data", made / "pictures", "-o", tmp_path / "out", "--recipe", recipe, "--lr", "1"
    )


def test_a_model_that_cannot_compute_on_the_data_is_refused_before_it_trains(refused, made, tmp_path):
    """The processor's size is not the model's."""
    name = next((made / "vit").glob("*processor*.json")).name
    source = changed(made, tmp_path, "vit", name, size={"height": 48, "width": 48})
    message = refused(source, "--data", made / "colours", "-o", tmp_path / "out")
    assert "the model cannot compute on these data" in message
    assert not (tmp_path / "out.partial").exists()


def test_a_tokenizer_that_contradicts_itself_is_refused_in_one_line(refused, made, tmp_path, capfd):
    """Its Rust code panics, which is no Exception in Python and writes past sys.stderr."""
    source = copy_folder(made / "gpt2", tmp_path / "gpt2")
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    single = [{"SpecialToken": {"id": "[GONE]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    tokenizer["post_processor"] = {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": {}}
    (source / "tokenizer.json").write_text(json.dumps(tokenizer))
    refused(source, "--data", made / "documents.txt", "-o", tmp_path / "out")
    assert "panicked" not in capfd.readouterr().err


def test_a_tokenizer_with_ids_beyond_the_model_is_refused_where_every_row_holds_one(refused, made, tmp_path):
    source = copy_folder(made / "bert", tmp_path / "bert")
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["then"] = 10_000
    (source / "tokenizer.json").write_text(json.dumps(tokenizer))
    (tmp_path / "texts.csv").write_text("text,label\n" + "".join(f"cat then,{'neg' if i % 2 else 'pos'}\n" for i in range(9)))
    message = refused(source, "--data", tmp_path / "texts.csv", "-o", tmp_path / "out")
    assert "9 x holds the token 'then' (10000), which the model has not: it has 29" in message


# ---------------------------------------------------------------- what was written


def test_verify_names_what_is_wrong_with_an_output(command, made, finished, tmp_path):
    for number, (file, data) in enumerate(
        [
            ("dsd/report.json", b'{"output": 3}'),
            (
                "dsd/report.json",
                b'{"task": [], "output": {"files": [{"name": "../../x", "sha256": 1}]}, "source": {"files": []}}',
            ),
            ("dsd/probe.safetensors", b"\x00" * 100),
        ]
    ):
        out = copy_folder(finished, tmp_path / str(number))
        (out / file).write_bytes(data)
        found = command("verify", made / "timm", out)
        assert found.code == 3, found.err
        assert "Traceback" not in found.err + found.out


def test_verify_does_not_load_what_is_not_the_source_s(command, made, finished, tmp_path, monkeypatch):
    from dsd_refine.checkpoint.libraries.timm import TimmLibrary

    out = copy_folder(finished, tmp_path / "out")
    (out / "config.json").write_text(json.dumps(json.loads((out / "config.json").read_text()) | {"num_classes": 10**9}))
    monkeypatch.setattr(TimmLibrary, "load_plain", lambda *_: pytest.fail("the output's config was loaded"))
    found = command("verify", made / "timm", out)
    assert found.code == 3, found.err
    assert "config.json: differs from the source's" in found.out


def test_a_saved_state_that_is_not_what_was_saved_is_refused(command, made, tmp_path):
    from dsd_refine.training import loop as train

    args = [made / "timm", "--data", made / "pictures", "-o", tmp_path / "out", *SHORT, "--quiet"]
    with pytest.MonkeyPatch.context() as patch:
        step = train.train_step

        def asked(loop, *given):
            loop.stopping = lambda: True
            return step(loop, *given)

        patch.setattr(train, "train_step", asked)
        assert command(*args).code == 4
    partial = tmp_path / "out.partial"
    for path in [partial / "state.json", partial / "log.jsonl", *partial.glob("*.safetensors")]:
        good = path.read_bytes()
        path.write_bytes(good[:-3] + bytes([good[-3] ^ 4]) + good[-2:])
        found = command(*args, "--resume")
        assert found.code == 2, (path, found.err)
        assert f"{path}: the saved state cannot be used" in found.err
        assert "--overwrite" in found.err
        path.write_bytes(good)
    assert command(*args, "--resume").code == 0


def test_a_timm_model_of_another_size_than_its_config(refused, tmp_path, made):
    source = timm_checkpoint(tmp_path / "t", in_chans=3)
    config = json.loads((source / "config.json").read_text())
    config["model_args"] = {"in_chans": 1}
    (source / "config.json").write_text(json.dumps(config))
    assert "timm cannot load this" in refused(source, "--data", made / "pictures", "-o", tmp_path / "out")

"""image-text-to-text: conversations as the checkpoint's processor writes them, losses of answers, a tower that stays as it is."""

import json
import shutil

import datasets
import pytest
import torch
import transformers
from conftest import SHORT, hashes
from outputs import near, report_of, same
from runs import stop_after, two_processes, whole
from safetensors.torch import load_file
from tasks import open_task
from viewers import CHAT, MARKED_CHAT, QWEN2_VL, TILES, picture, picture_chat, picture_chat_checkpoint, said, viewer_checkpoint

from dsd_refine.checkpoint.libraries.transformers import TransformersLibrary
from dsd_refine.errors import CheckpointError, DataError
from dsd_refine.recipe import Phase, Recipe

QUIET = (*SHORT, "--quiet", "--lr", "0.003", "--warmup-steps", "0", "--control", "none", "--batch-size", "4")
TOWER = ("vision_model", "connector")


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """Read-only: a model, one that cuts pictures into tiles and whose template marks answers, and conversations."""
    place = tmp_path_factory.mktemp("seen")
    picture_chat_checkpoint(place / "plain")
    picture_chat_checkpoint(place / "tiles", MARKED_CHAT, splits=True)
    picture_chat(place / "data")
    return place


def opened(model, data, cache, **fields):
    """(task, model in evaluation mode) on conversations."""
    recipe = Recipe(phases=(Phase(kind="dense", steps=1, lr=0.1),), data=str(data), **fields)
    loaded = transformers.AutoModelForImageTextToText.from_pretrained(model).eval()
    return open_task(recipe, TransformersLibrary.open(model), loaded, cache), loaded


def lines_of(data):
    return [json.loads(line) for line in (data / "rows.jsonl").read_text().splitlines()]


def write(folder, rows):
    """`folder/rows.jsonl` of rows, and eight pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(8):
        picture(number).save(folder / f"{number}.png")
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder / "rows.jsonl"


# ---------------------------------------------------------------- what the model is given


@pytest.mark.parametrize("name", ["plain", "tiles"])
def test_tokens_and_pictures_are_those_of_the_processor(seen, tmp_path, name):
    task, model = opened(seen / name, seen / "data", tmp_path / "c")
    processor = transformers.AutoProcessor.from_pretrained(seen / name)
    lines, part = lines_of(seen / "data"), task.train
    for unit in range(part.units):
        messages = lines[int(part.rows.numbers[unit])]["messages"]
        for item in (item for message in messages for item in message["content"] if "path" in item):
            item["path"] = str(seen / "data" / item["path"])
        own = processor.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_tensors="pt", return_assistant_tokens_mask=name == "tiles",
            processor_kwargs={"add_special_tokens": False},
        )  # fmt: skip
        inputs = task.batch(part, [(unit, None)]).inputs
        given = {key: value for key, value in own.items() if key != "assistant_masks"}
        assert set(inputs) == set(given)
        assert all(torch.equal(inputs[key], given[key]) for key in inputs)
        if name == "tiles":
            asked = part.asked[part.start[unit] : part.stop[unit]]
            assert asked.tolist() == torch.tensor(own["assistant_masks"]).bool()[0].tolist()
    batch = task.batch(part, [(unit, None) for unit in range(part.units)])
    with torch.no_grad():
        together = [score.loss for score in task.score(model, batch)]
        for unit, loss in enumerate(together):
            alone = task.batch(part, [(unit, None)])
            labels = torch.where(alone.targets == -100, -100, alone.inputs["input_ids"].roll(-1)).roll(1)
            assert loss / alone.count == pytest.approx(float(model(**alone.inputs, labels=labels).loss), rel=1e-5)


def test_marks_and_written_beginnings_find_the_same_answers(seen, tmp_path):
    template = tmp_path / "m"
    shutil.copytree(seen / "tiles", template)
    (template / "chat_template.jinja").write_text(CHAT)
    marked, _ = opened(seen / "tiles", seen / "data", tmp_path / "c")
    written, _ = opened(template, seen / "data", tmp_path / "c")
    assert marked.train.tokens.tolist() == written.train.tokens.tolist()
    assert marked.train.asked.tolist() == written.train.asked.tolist()


def test_no_picture_is_a_target_if_all_tokens_are(seen, tmp_path):
    task, _ = opened(seen / "tiles", seen / "data", tmp_path / "c", loss_on="all")
    tokenizer = task.reader.processor.tokenizer
    left = {tokenizer.convert_ids_to_tokens(int(one)) for one in task.train.tokens[~task.train.asked]}
    assert left == {"<image>", "<fake_token_around_image>", "<global-img>", *TILES}
    assert task.train.asked.sum() > 100


@pytest.mark.parametrize("form", ["typed", "texts", "named"])
def test_pictures_in_a_column_are_those_in_the_messages(seen, tmp_path, form):
    """As TRL's data have them: a column of pictures, and places for them in the messages, or none."""
    lines = [line["messages"] for line in lines_of(seen / "data")]
    paths = [[item["path"] for message in line for item in message["content"] if "path" in item] for line in lines]
    rows = []
    for line, shown in zip(lines, paths, strict=True):
        messages = [said(message["role"], *(item.get("text") for item in message["content"])) for message in line]
        if form == "texts":  # the pictures of such a row stand before what the user says first
            messages = [{**message, "content": message["content"][-1].get("text", "")} for message in messages]
        rows.append({"messages": messages, "images": shown})
    if form == "texts":
        asked_later = [any("path" in item for message in line[1:] for item in message["content"]) for line in lines]
        rows, lines = ([one for one, later in zip(each, asked_later, strict=True) if not later] for each in (rows, lines))
    folder = shutil.copytree(seen / "data", tmp_path / "d")
    if form == "typed":
        files = [{**row, "images": [str(folder / path) for path in row["images"]]} for row in rows]
        typed = datasets.Dataset.from_list(files).cast_column("images", datasets.List(datasets.Image()))
        typed.save_to_disk(tmp_path / "typed")
    name = "pics" if form == "named" else "images"
    more = {"image_column": name} if form == "named" else {}
    listed = [json.dumps({"messages": row["messages"], name: row["images"]}) for row in rows]
    (folder / "rows.jsonl").write_text("\n".join(listed) + "\n")
    data = tmp_path / "typed" if form == "typed" else folder / "rows.jsonl"
    other = shutil.copytree(seen / "data", tmp_path / "e")
    (other / "rows.jsonl").write_text("\n".join(json.dumps({"messages": line}) for line in lines) + "\n")
    how = {"holdout": 0.0, "keep": "last"}
    ours, _ = opened(seen / "plain", data, tmp_path / "c", **how, **more)
    plain, _ = opened(seen / "plain", other / "rows.jsonl", tmp_path / "c", **how)
    for part, wanted in ((ours.train, plain.train), (ours.eval, plain.eval)):
        assert part.rows.fingerprint == wanted.rows.fingerprint
        units = [(unit, None) for unit in range(part.units)]
        one, two = ours.batch(part, units).inputs, plain.batch(wanted, units).inputs
        assert all(torch.equal(one[key], two[key]) for key in two)


# ---------------------------------------------------------------- rows and models that cannot be used


def test_rows_that_cannot_be_used_are_skipped_and_named(seen, tmp_path):
    good = [{"messages": [said("user", [f"{row}.png"], "a"), said("assistant", "cat")]} for row in range(8)]
    (tmp_path / "d").mkdir()
    (tmp_path / "d/broken.png").write_bytes(b"no picture")
    answer = said("assistant", "here")
    odd = [
        [said("user", ["gone.png"], "a"), answer],
        [said("user", ["broken.png"], "a"), answer],
        [said("user", ["https://example.org/a.png"], "a"), answer],
        [said("user", None, "a"), answer],
        [said("user", *([["3.png"]] * 6), "a"), answer],
        [said("poet", ["3.png"], "a"), answer],
        [said("user", ["3.png"], "a")],
        [said("user", "a"), said("assistant", ["3.png"], "here")],
        [said("user", ["3.png"], "a"), said("assistant", " ")],
        [said("user", ["3.png"], "a " * 40), answer],
    ]
    data = write(tmp_path / "d", [*good, *({"messages": row} for row in odd)])
    task, _ = opened(seen / "plain", data, tmp_path / "c", holdout=0.0, keep="last", max_length=30)
    reasons = [item["reason"] for item in task.train.rows.skipped]
    assert [item["row"] for item in task.train.rows.skipped] == list(range(8, 18))
    wanted = [
        "unreadable picture file (No such file or directory", "unreadable picture (not one of the known formats)",
        "https://example.org/a.png: pictures are not fetched: download it, and give its path",
        "its messages have 1 places for the 0 pictures of its column",
        "its pictures end at token 44, and pictures cannot be cut: a row has 30 tokens (--max-length)",
        "the chat template refuses it (no role poet)", "ends with a message of the user: no answer follows",
        "message 2 is an answer with a picture", "message 2 is an empty answer", "no answer within 30 tokens (--max-length)",
    ]  # fmt: skip
    assert [reason[: len(start)] for reason, start in zip(reasons, wanted, strict=True)] == wanted


def test_a_processor_of_another_model_is_refused(seen, tmp_path):
    folder = shutil.copytree(seen / "plain", tmp_path / "m")
    config = json.loads((folder / "processor_config.json").read_text())
    (folder / "processor_config.json").write_text(json.dumps({**config, "image_seq_len": 9}))
    with pytest.raises(CheckpointError, match="the number of tokens of a picture is 9 for its processor, and 4 for its model"):
        opened(folder, seen / "data", tmp_path / "c")
    for name in ("processor_config.json", "preprocessor_config.json"):
        (folder / name).unlink()
    with pytest.raises(CheckpointError, match="its processor cannot be used"):
        opened(folder, seen / "data", tmp_path / "c")


def test_causal_lm_and_other_families_point_to_it(refused, seen, tmp_path):
    data = write(tmp_path / "d", [{"messages": [said("user", ["3.png"], word), said("assistant", "b")]} for word in "abcd"])
    message = refused(seen / "plain", "--data", data, "--task", "causal-lm", "--max-length", "60", "-o", tmp_path / "o", *SHORT)
    assert "has a picture, which causal-lm does not read: --task image-text-to-text is for models that do" in message
    other = viewer_checkpoint(tmp_path / "q", "qwen2_vl", QWEN2_VL)
    assert "image-text-to-text is for idefics3, smolvlm; this is qwen2_vl" in refused(other, "--data", seen / "data")


# ---------------------------------------------------------------- through the command


@pytest.fixture(scope="module")
def out(seen, tmp_path_factory):
    """OUT of a finished run."""
    place = tmp_path_factory.mktemp("out")
    return whole([seen / "tiles", "--data", seen / "data", *QUIET, "--report-images", "2", "-o", place / "one"])


def test_the_text_part_is_refined_and_everything_else_comes_back(command, seen, out):
    report = report_of(out)
    assert (report["task"], report["metric"]) == ("image-text-to-text", {"name": "loss", "higher_is_better": False})
    assert set(report["arms"]["refined"]) == {"loss", "perplexity"}
    assert report["phases"][-1]["loss_last"] < report["phases"][0]["loss_first"]
    assert command("verify", seen / "tiles", out).code == 0
    mine, theirs = hashes(out), hashes(seen / "tiles")
    assert {"processor_config.json", "preprocessor_config.json", "chat_template.jinja", "tokenizer.json"} < set(theirs)
    assert all(mine[name] == theirs[name] for name in theirs if name != "model.safetensors")
    reasons = {layer["name"]: layer["excluded"] for layer in report["layers"]}
    masked = [name for name, reason in reasons.items() if reason is None]
    assert len(masked) > 10
    assert all("text_model" in name or name.startswith("lm_head") for name in masked)
    before, after = (load_file(folder / "model.safetensors") for folder in (seen / "tiles", out))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if not any(part in name for part in TOWER)}
    assert report["data"]["unused"] == []  # the pictures are what the rows name


def test_the_patch_embedding_is_not_masked_if_the_tower_trains(command, seen, tmp_path):
    thawed = [value for phase in (0, 1) for value in ("--set", f"phases.{phase}.frozen=[]")]
    plan = json.loads(command("plan", seen / "plain", "--data", seen / "data", *thawed, "--json").out)
    reasons = {layer["name"]: layer["excluded"] for layer in plan["layers"]}
    assert reasons["model.vision_model.embeddings.patch_embedding.weight"] == "the first layer: it sees the input"
    assert reasons["model.connector.modality_projection.proj.weight"] is None


def test_stopped_and_resumed(command, seen, out, tmp_path):
    args = [seen / "tiles", "--data", seen / "data", *QUIET, "--report-images", "2", "-o", tmp_path / "two"]
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 2)
        assert command(*args, "--resume").code == 4
    assert command(*args, "--resume").code == 0
    same(out, tmp_path / "two")


def test_two_processes_are_one_of_twice_the_batch(command, seen, tmp_path):
    args = [seen / "plain", "--data", seen / "data", "--optimizer", "sgd", "--lr", "0.01", "--warmup-steps", "0", "--quiet",
            "--sparse-steps", 3, "--dense-steps", 2, "--gate", "none", "--device", "cpu", "--control", "none"]  # fmt: skip
    two = two_processes(*args, "-o", tmp_path / "two", "--batch-size", 2)
    assert two.returncode == 0, two.stderr
    assert command(*args, "-o", tmp_path / "one", "--batch-size", 4).code == 0
    near(tmp_path / "one", tmp_path / "two")


def test_no_pictures_at_all_is_an_error_only_where_no_row_is_left(seen, tmp_path):
    data = write(tmp_path / "d", [{"messages": [said("user", ["gone.png"], "a"), said("assistant", "b")]}] * 4)
    with pytest.raises(DataError, match=r"no usable training rows.*unreadable picture file"):
        opened(seen / "plain", data, tmp_path / "c")

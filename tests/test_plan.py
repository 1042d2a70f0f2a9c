"""`plan` for every task: it ends well, and says what the run would say."""

import json
import re

import builders
import embedders
import pairs
import pytest
import questions
import sounds
import taggers
import torch
import viewers
from heads import write
from runs import fresh, run_command
from safetensors.torch import load_file

from dsd_refine.planning import plan as planning
from dsd_refine.task_specs import TASKS

BUILT = {
    "image-classification": (builders.timm_checkpoint, builders.image_folder, "pictures"),
    "text-classification": (builders.bert_checkpoint, builders.text_csv, "texts.csv"),
    "causal-lm": (builders.gpt2_checkpoint, builders.text_file, "documents.txt"),
    "masked-lm": (builders.masked_checkpoint, builders.text_file, "documents.txt"),
    "ctc-speech": (builders.ctc_checkpoint, builders.speech_folder, "sounds"),
    "token-classification": (taggers.tagger_checkpoint, taggers.tagged_file, "rows.jsonl"),
    "embedding": (embedders.embedder_checkpoint, embedders.together_file, "rows.jsonl"),
    "question-answering": (questions.answerer_checkpoint, lambda path: write(path, questions.asked_rows()), "rows.jsonl"),
    "audio-classification": (sounds.sound_checkpoint, sounds.sound_folder, "sounds"),
    "image-captioning": (builders.caption_checkpoint, builders.caption_folder, "pictures"),
    "image-text-to-text": (viewers.picture_chat_checkpoint, viewers.picture_chat, "talk"),
    "seq2seq-lm": (pairs.seq2seq_checkpoint, pairs.pairs_file, "pairs.jsonl"),
    "speech-seq2seq": (pairs.speech2text_checkpoint, builders.speech_folder, "sounds"),
}


@pytest.mark.parametrize("task", TASKS)
def test_plan_of_every_task_ends_well_as_text_and_as_json(command, tmp_path, task):
    checkpoint, data, name = BUILT[task]
    args = ("plan", checkpoint(tmp_path / "model"), "--data", data(tmp_path / name))
    text = command(*args)
    assert text.code == 0, text.err
    found = command(*args, "--json")
    assert found.code == 0, found.err
    plan = json.loads(found.out)
    assert plan["task"] == task
    assert all(line in text.out for line in (task, plan["totals"]["rows"], plan["totals"]["disk"]))


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_plan_of_a_captioner_in_a_process_that_has_scored_nothing(tmp_path, options):
    model, data = builders.caption_checkpoint(tmp_path / "cap"), builders.caption_folder(tmp_path / "pics")
    done = fresh(run_command, "plan", model, "--data", data, *options)
    assert done.returncode == 0, done.stderr
    assert "image-captioning" in done.stdout


def test_plan_warns_of_the_weights_and_files_as_the_run_does(command, made, tmp_path):
    model = builders.copy_folder(made / "timm", tmp_path / "m")
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    (model / "model.onnx").write_bytes(b"x")
    torch.save({"model": tensors, "ema": {"module": tensors, "updates": 3}}, model / "pytorch_model.bin")
    args = (
        model,
        "--data",
        made / "pictures",
        "--allow-pickle",
        "--sparse-steps",
        "1",
        "--dense-steps",
        "1",
        "--device",
        "cpu",
    )
    plan = json.loads(command("plan", *args, "--json").out)
    text = command("plan", *args).out
    run = command(*args, "--json", "--gate", "none", "-o", tmp_path / "out")
    report = json.loads(run.out)
    assert any("'model' is taken (as timm does; --weights-key chooses), left: ema.module" in each for each in plan["warnings"])
    assert any("model.onnx" in each for each in plan["warnings"])
    assert {*plan["warnings"]} <= {*report["warnings"]}
    assert all(each in text for each in plan["warnings"])
    assert plan["labels"] == report["labels"]
    assert report["labels"]["rule"] in text
    key = command("plan", *args, "--json", "--weights-key", "ema.module")
    assert any("'ema.module' is taken (--weights-key), left: model" in each for each in json.loads(key.out)["warnings"])


def test_plan_says_how_many_gpus_a_model_needs_that_one_cannot_hold(command, made, monkeypatch):
    """Each doubling of the GPUs halves what is divided; a block that is whole for a moment is not divided."""
    monkeypatch.setattr(planning, "USUAL_GPU", 450_000)
    found = command("plan", made / "gpt2", "--data", made / "documents.txt", "--json")
    assert found.code == 0, found.err
    text = json.loads(found.out)["totals"]["sharded"]
    assert re.match(r"needs (2|4|8) x 0 GB, 0\.00 GB a GPU and the activations: torchrun --nproc-per-node \1 ", text)
    assert text.endswith(f"-m dsd_refine {made / 'gpt2'} … --shard")


def test_plan_says_what_a_machine_without_a_gpu_cannot_hold(command, made, monkeypatch):
    """As many processes as the launcher starts, unless the model is divided among them."""
    args = ("plan", made / "gpt2", "--data", made / "documents.txt", "--json")
    monkeypatch.setattr(planning, "host_memory", lambda: 3_000_000)
    monkeypatch.setattr(planning, "memory_of", lambda *_, **__: 1_000_000)
    for count, is_said in (("3", False), ("4", True)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", count)
        totals = json.loads(command(*args).out)["totals"]
        assert ("too large" in totals) is is_said
    assert totals["too large"].endswith("and no GPU. --shard divides a model among processes")
    assert "for 4 processes; this machine has 0.0 GB" in totals["too large"]
    assert "too large" not in json.loads(command(*args, "--shard").out)["totals"]


def test_plan_offers_the_tries_side_by_side_where_a_gpu_holds_the_model(command, made, monkeypatch):
    args = ("plan", made / "gpt2", "--data", made / "documents.txt", "--control", "dense", "--seeds", "3", "--json")
    totals = json.loads(command(*args).out)["totals"]
    assert "sharded" not in totals
    assert "side by side" not in totals
    monkeypatch.setattr(planning, "gpu_bytes", lambda: 80 * 10**9)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    totals = json.loads(command(*args).out)["totals"]
    assert totals["side by side"].startswith("6 tries on 4 GPUs: torchrun --nproc-per-node 4 -m dsd_refine ")
    assert totals["side by side"].endswith("--spread tries")

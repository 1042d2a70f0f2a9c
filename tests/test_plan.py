"""`plan` for every task: it ends well, and says what the run would say."""

import json

import builders
import pytest
from conftest import process

from dsd_refine.recipe import TASKS

BUILT = {
    "image-classification": (builders.timm_checkpoint, builders.image_folder, "pictures"),
    "text-classification": (builders.bert_checkpoint, builders.text_csv, "texts.csv"),
    "causal-lm": (builders.gpt2_checkpoint, builders.text_file, "documents.txt"),
    "masked-lm": (builders.masked_checkpoint, builders.text_file, "documents.txt"),
    "ctc-speech": (builders.ctc_checkpoint, builders.speech_folder, "sounds"),
    "image-captioning": (builders.caption_checkpoint, builders.caption_folder, "pictures"),
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
    done = process("-m", "dsd_refine", "plan", model, "--data", data, *options)
    assert done.returncode == 0, done.stderr
    assert "image-captioning" in done.stdout

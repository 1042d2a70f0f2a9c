"""Each task without a test of its own for it, in two processes: the weights are those of one process with twice the batch."""

import pytest
from builders import bert_checkpoint, masked_checkpoint, vit_checkpoint
from chats import chat_checkpoint, chat_file
from heads import preference_rows, striped_folder, write
from outputs import near
from questions import answerer_checkpoint, asked_rows
from runs import two_processes
from sounds import sound_checkpoint, sound_folder
from taggers import tagged_file, tagger_checkpoint


@pytest.mark.parametrize("task", ["conversations", "tags", "pairs", "questions", "words", "sounds", "pictures"])
def test_two_processes_are_one_of_twice_the_batch(command, made, tmp_path, task):
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    if task == "conversations":
        model = chat_checkpoint(tmp_path / "m", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
        data = chat_file(tmp_path / "d.jsonl")
    elif task == "questions":
        model, data = answerer_checkpoint(tmp_path / "m", **still), write(tmp_path / "d.jsonl", asked_rows(answered=0.7))
    elif task == "words":
        model, data = masked_checkpoint(tmp_path / "m", **still), made / "documents.txt"
    elif task == "sounds":
        model, data = sound_checkpoint(tmp_path / "m", "Hubert", feat_extract_norm="layer"), sound_folder(tmp_path / "d")
    elif task == "pictures":  # with several labels a row
        names = ("cat", "dog", "bird")
        model, data = vit_checkpoint(tmp_path / "m", names), striped_folder(tmp_path / "d", names)
    elif task == "tags":
        model, data = tagger_checkpoint(tmp_path / "m", **still), tagged_file(tmp_path / "d.jsonl")
    else:
        model, data = bert_checkpoint(tmp_path / "m", 1, **still), write(tmp_path / "d.jsonl", preference_rows())
    args = [model, "--data", data, "--optimizer", "sgd", "--lr", "0.01", "--warmup-steps", "0", "--quiet", "--control", "none",
            "--sparse-steps", 3, "--dense-steps", 2, "--gate", "none", "--device", "cpu"]  # fmt: skip
    two = two_processes(*args, "-o", tmp_path / "two", "--batch-size", 3)
    assert two.returncode == 0, two.stderr
    assert command(*args, "-o", tmp_path / "one", "--batch-size", 6).code == 0
    near(tmp_path / "one", tmp_path / "two")

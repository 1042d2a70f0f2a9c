"""Models that read pictures and write texts: their text part, by causal-lm, on texts and conversations without pictures."""

import pytest
import torch
from chats import chat_file
from conftest import SHORT, hashes
from outputs import report_of
from safetensors.torch import load_file
from viewers import QWEN2_VL, viewer_checkpoint

from dsd_refine.data.conversations import read_conversation
from dsd_refine.tasks.inputs.chats import ChatTemplate
from dsd_refine.tasks.inputs.tokens import load_tokenizer

HINT = "Its text part is trained on texts, and on conversations without pictures, with --task causal-lm"


@pytest.fixture(scope="module")
def viewer(tmp_path_factory):
    """A SmolVLM. Do not change it."""
    return viewer_checkpoint(tmp_path_factory.mktemp("viewer") / "m")


def test_the_text_part_is_refined_and_the_vision_tower_comes_back(command, viewer, tmp_path):
    data = chat_file(tmp_path / "d.jsonl")
    how = ("--task", "causal-lm", *SHORT, "--batch-size", "4", "--control", "none", "--quiet")
    found = command(viewer, "--data", data, "-o", tmp_path / "out", *how)
    assert found.code == 0, found.err
    assert command("verify", viewer, tmp_path / "out").code == 0
    report = report_of(tmp_path / "out")
    assert report["data"]["train"]["skipped"] == []
    reasons = {layer["name"]: layer["excluded"] for layer in report["layers"]}
    seeing = [name for name in reasons if "vision_model" in name]
    assert seeing
    assert all(reasons[name] is not None for name in seeing)
    assert any(reason is None for name, reason in reasons.items() if "text_model" in name)
    before, after = (load_file(folder / "model.safetensors") for folder in (viewer, tmp_path / "out"))
    assert all(torch.equal(before[name], after[name]) for name in before if "vision_model" in name)
    assert any(not torch.equal(before[name], after[name]) for name in before if "text_model" in name)
    assert hashes(viewer)["chat_template.json"] == hashes(tmp_path / "out")["chat_template.json"]


def test_a_template_that_wants_parts_gets_them(viewer):
    template = ChatTemplate(load_tokenizer(viewer))
    said = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "eats here"}]
    plain = template.write(read_conversation(("messages",), (said,)))
    parts = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in said]
    assert plain.text == "[CLS] user the cat [SEP]\n[CLS] assistant eats here [SEP]\n"
    assert plain.text == template.write(read_conversation(("messages",), (parts,))).text
    asked = template.tokenizer.convert_ids_to_tokens(plain.ids[plain.asked])
    assert asked == ["eats", "here", "[SEP]"]


def test_who_asks_for_pictures_is_told_of_the_text_part(refused, viewer, tmp_path):
    data = chat_file(tmp_path / "d.jsonl")
    said = refused(viewer, "--data", data)  # it has no processor
    assert "its processor cannot be used" in said
    assert "Conversations without pictures need only the tokenizer: --task causal-lm" in said
    assert HINT in refused(viewer, "--data", data, "--task", "image-captioning")


def test_plan_of_another_family(command, tmp_path):
    folder = viewer_checkpoint(tmp_path / "m", "qwen2_vl", QWEN2_VL)
    found = command("plan", folder, "--data", chat_file(tmp_path / "d.jsonl"), "--task", "causal-lm")
    assert found.code == 0, found.err

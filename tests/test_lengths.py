"""Batches of rows of about one length: what is evaluated, grouped or packed so comes out as without."""

import numpy as np
import pytest
import torch
from builders import text_file, word_tokenizer
from chats import chat_checkpoint, chat_file
from conftest import SHORT
from hypothesis import given
from hypothesis import strategies as st
from outputs import near, report_of, same
from runs import stop_after, two_processes

from dsd_refine.data.reading import Table
from dsd_refine.data.splits import Examined, use_rows
from dsd_refine.errors import CheckpointError
from dsd_refine.forward import logits_of
from dsd_refine.tasks.base import unit_lengths
from dsd_refine.tasks.causal_lm import CausalLM
from dsd_refine.tasks.inputs.windows import cut_windows
from dsd_refine.tasks.packed_texts import pack_windows, packed, refuse_mixing
from dsd_refine.training.batches import grouped
from dsd_refine.training.evaluate import evaluation_order
from dsd_refine.training.evaluation_batch import batches_in
from dsd_refine.training.state import Key

QUIET = (*SHORT, "--batch-size", "4", "--control", "none", "--quiet")
STILL = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def windows_of(lengths, seed=0):
    import datasets

    draw = np.random.default_rng(seed)
    table = Table(datasets.Dataset.from_dict({"text": [str(n) for n in lengths]}), origin="rows.jsonl")
    rows = use_rows(table, [Examined(bytes([n])) for n in range(len(lengths))])
    return cut_windows(rows, [draw.integers(4, 20, n).astype(np.int32) for n in lengths], 32, lambda ids: True)


def task_of(part):
    return CausalLM(part, None, part, vocabulary=20)


lengths_of_rows = st.lists(st.integers(2, 32), min_size=1, max_size=60)


@given(lengths_of_rows)
def test_evaluation_takes_the_longest_first_and_each_unit_once(lengths):
    order = evaluation_order(windows_of(lengths), len(lengths))
    assert sorted(order) == list(range(len(lengths)))
    assert [lengths[unit] for unit in order] == sorted(lengths, reverse=True)


@given(lengths_of_rows, st.integers(1, 9), st.integers(0, 5))
def test_groups_are_an_order_of_all_units_with_less_padding(lengths, size, epoch):
    lengths, key = np.array(lengths), Key(3, 1)
    order = np.random.default_rng(0).permutation(len(lengths))
    found = grouped(order, lengths, size, key, epoch)
    assert sorted(found.tolist()) == list(range(len(lengths)))
    assert found.tolist() == grouped(order, lengths, size, key, epoch).tolist()
    whole = len(order) // size * size
    assert found[whole:].tolist() == order[whole:].tolist()

    def padded(units):
        return sum(lengths[batch].max() * size for batch in units[:whole].reshape(-1, size))

    assert padded(found) <= padded(order)


def test_lengths_are_those_of_the_tokens(command, made, tmp_path):
    """Of texts, words with tags, conversations and windows: also where rows were skipped."""
    import datasets

    from dsd_refine.tasks.inputs.texts import TextInputs
    from dsd_refine.tasks.text_rows import TextExaminer

    texts = ["the cat", "", "the cat sees a dog"]
    table = Table(datasets.Dataset.from_dict({"text": texts}), origin="rows.jsonl")
    examiner = TextExaminer(TextInputs(word_tokenizer(), 32, None), None)
    rows = use_rows(table, examiner.examine(table, [[(text,) for text in texts]], ["a", "a", "b"]))
    assert rows.lengths.tolist() == [len(word_tokenizer()(text)["input_ids"]) for text in texts if text]
    assert rows.subset([1]).lengths.tolist() == rows.lengths[1:].tolist()
    assert unit_lengths(windows_of([5, 9])).tolist() == [5, 9]


@given(st.lists(st.integers(1, 32), max_size=80))
def test_packs_hold_each_window_once_and_no_more_than_fits(lengths):
    packs = pack_windows(lengths, 32)
    assert sorted(window for pack in packs for window in pack) == list(range(len(lengths)))
    sums = [sum(lengths[window] for window in pack) for pack in packs]
    assert all(each <= 32 for each in sums)
    assert len(packs) <= 11 / 9 * -(-sum(lengths) // 32) + 6 / 9 + max(0, sum(n > 16 for n in lengths))
    assert sum(each <= 16 for each in sums) <= 1  # two of these would be one row


FAMILIES = {
    "GPT2": {"n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 2, **STILL},
    "Llama": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
              "num_key_value_heads": 1, "max_position_embeddings": 32},
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_of_packed_rows_are_those_of_their_windows(family):
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(vocab_size=20, bos_token_id=2, eos_token_id=3, **FAMILIES[family])
    name = "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"
    model = getattr(transformers, name)(config).eval()
    part = windows_of([3, 9, 17, 4, 30, 2, 2, 8])
    task, together = task_of(part), packed(part, 32)
    refuse_mixing(lambda inputs: logits_of(model, inputs), together, torch.device("cpu"))
    one = task.batch(part, [(unit, None) for unit in range(part.units)])
    two = task.batch(together, [(unit, None) for unit in range(together.units)])
    assert together.units < part.units
    assert one.count == two.count == sum(n - 1 for n in [3, 9, 17, 4, 30, 2, 2, 8])
    with torch.no_grad():
        assert abs(float(task.loss(model, one)) - float(task.loss(model, two))) / one.count < 1e-5


def test_a_model_that_mixes_the_texts_of_a_row_is_refused():
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "state_size": 4, "vocab_size": 20}
    model = transformers.MambaForCausalLM(transformers.MambaConfig(**sizes)).eval()
    with torch.no_grad(), pytest.raises(CheckpointError, match="pack: this model lets a text see the texts before it"):
        refuse_mixing(lambda inputs: logits_of(model, inputs), packed(windows_of([9, 8, 7, 6]), 32), torch.device("cpu"))


@pytest.mark.parametrize("how", ["pack", "group_by_length"])
def test_stopped_and_resumed_to_the_same_bytes(command, made, tmp_path, how):
    data = text_file(tmp_path / "t.txt", paragraphs=40)
    args = [made / "gpt2", "--data", data, *QUIET, "--set", f"{how}=true", "-o"]
    assert command(*args, tmp_path / "one").code == 0
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 3)
        assert command(*args, tmp_path / "two", "--resume").code == 4
    assert command(*args, tmp_path / "two", "--resume").code == 0
    same(tmp_path / "one", tmp_path / "two")
    assert command("verify", made / "gpt2", tmp_path / "one").code == 0


@pytest.mark.parametrize("how", ["pack", "group_by_length"])
def test_two_processes_are_one_of_twice_the_batch(command, tmp_path, how):
    model, data = chat_checkpoint(tmp_path / "m", **STILL), chat_file(tmp_path / "d.jsonl", rows=24)
    args = [model, "--data", data, "--optimizer", "sgd", "--lr", "0.01", "--warmup-steps", "0", "--quiet", "--control", "none",
            "--sparse-steps", 3, "--dense-steps", 2, "--gate", "none", "--device", "cpu", "--set", f"{how}=true"]  # fmt: skip
    two = two_processes(*args, "-o", tmp_path / "two", "--batch-size", 2)
    assert two.returncode == 0, two.stderr
    assert command(*args, "-o", tmp_path / "one", "--batch-size", 4).code == 0
    near(tmp_path / "one", tmp_path / "two")


def test_what_has_no_use_for_lengths_refuses_them(refused, made, tmp_path):
    said = refused(made / "timm", "--data", made / "images", "--set", "group_by_length=true", *QUIET)
    assert "group_by_length: image-classification has no use for it" in said
    both = ("--set", "pack=true", "--set", "group_by_length=true")
    assert "leave out group_by_length" in refused(made / "gpt2", "--data", made / "documents.txt", *both, *QUIET)


def test_the_batch_of_evaluation_changes_no_score(command, made, tmp_path):
    for size in (1, 3, 64):
        out = tmp_path / str(size)
        found = command(made / "bert", "--data", made / "texts.csv", *QUIET, "--eval-batch-size", size, "-o", out)
        assert found.code == 0, found.err
    reports = [report_of(tmp_path / str(size)) for size in (1, 3, 64)]
    for arm in ("baseline", "refined"):
        assert {report["arms"][arm]["accuracy"] for report in reports} == {reports[0]["arms"][arm]["accuracy"]}
        assert np.allclose([report["arms"][arm]["loss"] for report in reports], reports[0]["arms"][arm]["loss"], rtol=1e-5)


def test_a_gpu_evaluates_as_many_batches_at_once_as_half_of_its_free_memory_holds():
    assert [batches_in(free, 100) for free in (-5, 0, 399, 400, 799, 800, 10**9)] == [1, 1, 1, 2, 2, 4, 8]

"""A model that is to say the next token and sees it is refused; every family that does not is not."""

import json

import pytest
import small
import torch
from builders import caption_checkpoint, caption_folder, gpt2_checkpoint, text_file
from conftest import SHORT
from hypothesis import given, settings
from hypothesis import strategies as st
from small import CAUSAL, SEEING, TOKENS

from dsd_refine.errors import CheckpointError
from dsd_refine.forward import logits_of, without_cache
from dsd_refine.tasks.causality import refuse_foresight

NAMES = ("input_ids", "attention_mask")


def windows(*lengths, seed=0):
    draw = torch.Generator().manual_seed(seed)
    ids = [torch.randint(4, TOKENS, (1, length), generator=draw) for length in lengths]
    return [{"input_ids": one, "attention_mask": torch.ones_like(one)} for one in ids]


def look(model, *lengths):
    refuse_foresight("causal-lm", lambda inputs: logits_of(model, inputs), windows(*lengths), NAMES)


@pytest.mark.parametrize("name", CAUSAL)
def test_a_causal_model_passes(name):
    model = small.family(*CAUSAL[name])
    look(model, 2, 3, 7, 13, 40)


@pytest.mark.parametrize("name", SEEING)
@pytest.mark.parametrize("lengths", [(3,), (12, 12), (2, 3, 40, 60)])
def test_a_model_that_sees_later_tokens_is_refused(name, lengths):
    model = small.family(*SEEING[name])
    with pytest.raises(CheckpointError, match=r"sees later tokens.*`is_decoder: true`.*--task masked-lm"):
        look(model, *lengths)


class Shaky:
    """Logits of each token by itself, and `leak` times what stands behind it, in the first `wrong` windows that it is given."""

    def __init__(self, leak, wrong=100, offset=0.0):
        self.table = torch.randn(TOKENS, TOKENS, generator=torch.Generator().manual_seed(0))
        self.leak, self.wrong, self.offset, self.seen = leak, wrong, offset, []

    def __call__(self, inputs):
        ids = inputs["input_ids"]
        key = (ids.shape[1], int(ids[0, 0]))
        if key not in self.seen:
            self.seen.append(key)
        leaks = self.leak * (self.seen.index(key) < self.wrong)
        return self.table[ids] + leaks * self.table[ids].flip(1) + self.offset


def test_what_rounding_does_is_no_foresight():
    refuse_foresight("causal-lm", Shaky(leak=1e-6), windows(9, 8, 7), NAMES)


def test_an_odd_window_of_many_is_no_foresight_most_of_them_are():
    """In a mixture of experts a rounding may turn a token's route."""
    refuse_foresight("causal-lm", Shaky(leak=0.1, wrong=3), windows(*range(5, 13)), NAMES)
    with pytest.raises(CheckpointError, match=r"in 5 of 8 texts"):
        refuse_foresight("causal-lm", Shaky(leak=0.1, wrong=5), windows(*range(5, 13)), NAMES)


@pytest.mark.parametrize("offset", [0.0, 1000.0, -1000.0])
def test_logits_far_from_zero_hide_nothing(offset):
    with pytest.raises(CheckpointError, match="sees later tokens"):
        refuse_foresight("causal-lm", Shaky(leak=1e-2, offset=offset), windows(9, 8), NAMES)


@given(st.lists(st.lists(st.integers(0, 5), min_size=2, max_size=8), min_size=1, max_size=4))
@settings(deadline=None)
def test_any_texts_tell_equal_tokens_too(texts):
    """Whatever the tokens are, another one is found to put in their place."""
    rows = [{"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids))} for ids in texts]

    def ahead(inputs):
        """Each position says what stands last."""
        return torch.nn.functional.one_hot(inputs["input_ids"][:, -1:].expand_as(inputs["input_ids"]), 7).float()

    with pytest.raises(CheckpointError):
        refuse_foresight("causal-lm", ahead, rows, NAMES)
    refuse_foresight("causal-lm", lambda inputs: torch.nn.functional.one_hot(inputs["input_ids"], 7).float(), rows, NAMES)


@pytest.mark.parametrize("name", ["xlnet", "bert", "xlm"])
def test_the_command_refuses_it_before_the_first_step(refused, tmp_path, name):
    folder, data = small.save_family(tmp_path / "m", *SEEING[name]), text_file(tmp_path / "d.txt", 8)
    message = refused(folder, "--data", data, "-o", tmp_path / "out", "--task", "causal-lm", *SHORT)
    assert message.startswith("causal-lm: the model sees later tokens")
    assert not (tmp_path / "out").exists()


def test_what_is_no_causal_model_trains_as_masked_lm(command, tmp_path):
    """XLM's one class is for both: its config says which."""
    folder, data = small.save_family(tmp_path / "m", *SEEING["xlm"]), text_file(tmp_path / "d.txt", 8)
    found = command(folder, "--data", data, "-o", tmp_path / "out", *SHORT)
    assert found.code == 0, found.err
    assert '"task": "masked-lm"' in (tmp_path / "out/dsd/report.json").read_text()


def test_a_captioner_whose_decoder_sees_later_words_is_refused(refused, tmp_path):
    folder, data = caption_checkpoint(tmp_path / "m", "vit-bert"), caption_folder(tmp_path / "data")
    config = json.loads((folder / "config.json").read_text())
    config["decoder"] |= {"is_decoder": False, "add_cross_attention": False}
    (folder / "config.json").write_text(json.dumps(config))
    message = refused(folder, "--data", data, "-o", tmp_path / "out", *SHORT, "--batch-size", "4")
    assert message.startswith("image-captioning: the model sees later tokens")


# ---------------------------------------------------------------- no cache for a next token


@pytest.mark.parametrize("name", CAUSAL)
def test_without_a_cache_the_logits_are_the_same(name):
    model = small.family(*CAUSAL[name])
    (inputs,) = windows(12)
    with torch.no_grad():
        assert torch.equal(logits_of(model, inputs), model(**inputs).logits.float())


def test_the_cache_is_turned_off_where_a_forward_has_one_also_through_wrappers():
    with_one, without = small.family(*CAUSAL["gpt2"]), small.family(*SEEING["xlnet"])
    assert without_cache(with_one) == without_cache(torch.compile(with_one)) == {"use_cache": False}
    assert without_cache(without) == {}
    assert without_cache(lambda **inputs: None) == {}
    (inputs,) = windows(5)
    kept = []
    hook = with_one.register_forward_hook(lambda module, args, found: kept.append(found.past_key_values))
    logits_of(with_one, inputs)
    hook.remove()
    assert kept == [None]


def test_the_cache_is_turned_off_through_a_wrapper_for_several_processes(tmp_path):
    from torch import distributed

    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        spread = torch.nn.parallel.DistributedDataParallel(small.family(*CAUSAL["gpt2"]))
        assert without_cache(spread) == without_cache(torch.compile(spread)) == {"use_cache": False}
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize("more", [(), ("--set", "phases.1.distill={weight: 0.5, temperature: 2}")])
def test_a_model_whose_cache_breaks_its_backward_trains(command, tmp_path, more):
    folder, data = small.save_family(tmp_path / "m", *CAUSAL["rwkv"]), text_file(tmp_path / "d.txt", 8)
    found = command(folder, "--data", data, "-o", tmp_path / "out", *SHORT, *more)
    assert found.code == 0, found.err


def test_the_gpt2_of_the_other_tests_still_trains(command, tmp_path):
    folder, data = gpt2_checkpoint(tmp_path / "m"), text_file(tmp_path / "d.txt", 8)
    assert command(folder, "--data", data, "-o", tmp_path / "out", *SHORT).code == 0


def test_pictures_with_captions_pass(command, tmp_path):
    model, data = caption_checkpoint(tmp_path / "m", "vit-bert"), caption_folder(tmp_path / "data")
    found = command(model, "--data", data, "-o", tmp_path / "out", *SHORT, "--batch-size", "4")
    assert found.code == 0, found.err

"""A phase's dropout reaches every dropout of a model, wherever the family keeps its rate, and leaves nothing behind."""

import families
import pytest
import timm
import torch
from conftest import SHORT
from outputs import report_of
from torch import nn

from dsd_refine.errors import UsageError
from dsd_refine.recipe import Phase, Recipe
from dsd_refine.training.dropout import dropouts
from dsd_refine.training.settings import check_settings, settings

END = 24
IDS = {"input_ids": torch.tensor([[*range(5, 14), END], [*range(14, 23), END]])}
PIXELS = {"pixel_values": torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))}
SOUND = {"input_values": torch.rand(2, 800, generator=torch.Generator().manual_seed(0))}
BART = {"vocab_size": 64, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 32,
        "eos_token_id": END, "forced_eos_token_id": None, "activation_dropout": 0.2}  # fmt: skip
FAMILIES = {
    "llama": ("LlamaForCausalLM", families.LM, IDS),
    "falcon": ("FalconForCausalLM", families.LM, IDS),  # reads its rates from its config at each step
    "gpt2": ("GPT2LMHeadModel", families.GPT, IDS),
    "bert": ("BertForMaskedLM", families.BERT, IDS),
    "bart": ("BartForSequenceClassification", BART, IDS),
    "t5": ("T5ForSequenceClassification", {**families.FAMILIES["text-classification"]["t5"], "eos_token_id": END, "decoder_start_token_id": 0}, IDS),
    "vit": ("ViTForImageClassification", families.VIT, PIXELS),
    "swin": ("SwinForImageClassification", {**families.SWIN, "drop_path_rate": 0.0}, PIXELS),
    "wav2vec2": ("Wav2Vec2ForCTC", {**families.SOUND, "layerdrop": 0.0, "apply_spec_augment": False}, SOUND),
    "parakeet": ("ParakeetForCTC", families.FAMILIES["ctc-speech"]["parakeet_ctc"], {"input_features": torch.rand(2, 80, 16)}),
}  # fmt: skip


def phase(rate):
    return Phase.model_validate({"kind": "dense", "steps": 1, "lr": 0.1, "dropout": rate})


def recipe(rate):
    return Recipe(phases=(phase(rate),))


def family(name):
    import transformers

    class_name, sizes, inputs = FAMILIES[name]
    torch.manual_seed(0)
    kind = getattr(transformers, class_name)
    model = kind(kind.config_class(**sizes))
    if name == "parakeet":
        model.encoder.layerdrop = 0.0
    return model, lambda: model(**inputs).logits


class Heard(nn.Module):
    """torch's own: a stacked LSTM, attention, a GRU of one layer, whose rate has no effect."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(8, 8, num_layers=2, batch_first=True)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.gru = nn.GRU(8, 8, batch_first=True)

    def forward(self, x):
        x = self.lstm(x)[0]
        return self.gru(self.attention(x, x, x)[0])[0]


def opened(name):
    """A model of a family in training mode, and its forward."""
    torch.manual_seed(0)
    if name in FAMILIES:
        model, forward = family(name)
    elif name == "torch":
        model = Heard()
        forward = lambda: model(torch.ones(2, 6, 8))  # noqa: E731
    else:
        model = timm.create_model(name, num_classes=3, drop_path_rate=0.0)
        forward = lambda: model(torch.ones(2, 3, *model.pretrained_cfg["input_size"][1:]))  # noqa: E731
    return model.train(), forward


ALL = [*FAMILIES, "torch", "test_vit", "test_resnet", "test_efficientnet", "test_convnext"]


@pytest.fixture
def heard(monkeypatch):
    """The rates that torch's functions are given, one a call."""
    rates = []
    for name, at in (("dropout", 1), ("scaled_dot_product_attention", 4)):
        original = getattr(nn.functional, name)
        key = "p" if name == "dropout" else "dropout_p"

        def call(*args, original=original, at=at, key=key, **kwargs):
            rates.append(args[at] if len(args) > at else kwargs.get(key, 0.0))
            return original(*args, **kwargs)

        monkeypatch.setattr(nn.functional, name, call)
    return rates


def state_of(model):
    """Every plain value of the model's modules and of the configs that they hold."""
    holders = [*model.modules(), *(m.config for m in model.modules() if "config" in vars(m))]
    return [{k: (type(v), v) for k, v in vars(one).items() if isinstance(v, int | float | None)} for one in holders]


@pytest.mark.parametrize("name", ALL)
def test_every_dropout_of_a_forward_has_the_phase_s_rate(name, heard):
    model, forward = opened(name)
    check_settings(model, recipe(0.25), {})
    with settings(model, phase(0.25), {}):
        forward()
    constant = {0.0} if name == "falcon" else set()  # written into the code of its attention
    assert heard
    assert set(heard) - constant == {0.25}


@pytest.mark.parametrize("name", ALL)
def test_at_rate_0_training_draws_nothing_and_at_a_half_it_does(name):
    model, forward = opened(name)
    before = state_of(model)
    for rate, same in ((0.0, True), (0.5, False)):
        with settings(model, phase(rate), {}):
            one, two = forward(), forward()
        assert torch.equal(one, two) == same
    assert state_of(model) == before
    with pytest.raises(KeyError), settings(model, phase(0.5), {}):
        raise KeyError
    assert state_of(model) == before


def test_what_does_not_drop_between_layers_is_not_counted():
    assert {(type(module).__name__, name) for module, name in dropouts(Heard())} == {("LSTM", "dropout"), ("MultiheadAttention", "dropout")}  # fmt: skip


def test_stochastic_depth_is_left_alone():
    model = timm.create_model("test_vit", drop_path_rate=0.3)
    paths = [module for module in model.modules() if hasattr(module, "drop_prob")]
    rates = [module.drop_prob for module in paths]
    assert max(rates) > 0.29
    with settings(model, phase(0.7), {}):
        assert [module.drop_prob for module in paths] == rates
    with pytest.raises(UsageError, match=r"phases.0.dropout: the model has no dropout to set \(stochastic depth is none\)"):
        check_settings(nn.Sequential(nn.Linear(2, 2), *paths), recipe(0.2), {})


def test_levit_s_drop_rate_is_stochastic_depth():
    import transformers

    sizes = families.FAMILIES["image-classification"]["levit"]
    model = transformers.LevitForImageClassification(transformers.LevitConfig(**{**sizes, "architectures": None}))
    assert any("drop_rate" in vars(module) for module in model.modules())
    assert dropouts(model) == []


def test_a_run_s_losses_follow_its_dropout(command, made, tmp_path):
    """timm's ResNet calls the function with a rate of its own; no layer of it is a dropout."""
    args = (made / "timm", "--data", made / "pictures", *SHORT, "--control", "none", "--quiet")
    losses = {}
    for rate in ("null", "0.0", "0.9"):
        found = command(*args, "-o", tmp_path / rate, "--set", f"phases.0.dropout={rate}")
        assert found.code == 0, found.err
        losses[rate] = report_of(tmp_path / rate)["phases"][0]["loss_first"]
    assert losses["null"] == losses["0.0"] != losses["0.9"]

"""Models, checkpoints and data of known shapes, made on the spot: random weights, random pictures and words."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import nn

from dsd_refine.compat import BatchNorm
from dsd_refine.masking.layers import Layer, find_layers
from dsd_refine.masking.masks import Masks
from dsd_refine.recipe import Phase, Recipe
from dsd_refine.tasks.base import Batch, Scores
from dsd_refine.training.hooks import Place
from dsd_refine.training.loop import arrived, train_step
from dsd_refine.training.state import Loop, PhaseState, Progress


@dataclass
class Fixed:
    """A part of as many equal units as are asked for, and the task of it: one batch over and over, no loading."""

    inputs: dict[str, torch.Tensor]
    targets: torch.Tensor
    loss_of: Callable[..., torch.Tensor]
    units: int = 1 << 20
    name: str = "fixed"
    metric: str = "loss"
    higher_is_better: bool = False
    draws: ClassVar[bool] = False
    rows: range = field(default_factory=lambda: range(1 << 20))

    @property
    def train(self) -> Fixed:
        return self

    holdout = None
    eval = train

    def row_of(self, unit: int) -> int:
        return unit

    def batch(self, part: Any, items: Any) -> Batch:
        return Batch(self.inputs, self.targets, len(self.targets))

    def loss(self, forward: Callable[..., Any], batch: Batch) -> torch.Tensor:
        return self.loss_of(forward, batch)

    def score(self, forward: Callable[..., Any], batch: Batch) -> Any:
        raise NotImplementedError

    def metrics(self, scores: Scores) -> dict[str, float]:
        return {}


def loop_of(model: nn.Module, task: Any, recipe: Recipe, accelerator: Accelerator | None = None) -> Loop:
    """Our loop around a model and a task, without a checkpoint or a workspace; log lines go nowhere."""
    convolutional = any(isinstance(module, nn.Conv2d) for module in model.modules())
    return Loop(
        accelerator=accelerator or Accelerator(cpu=True),
        model=model,
        forward=model,
        task=task,
        recipe=recipe,
        as_written=lambda model: nullcontext(),
        workers=0,
        has_batchnorm=any(isinstance(module, BatchNorm) for module in model.modules()),
        channels_last=convolutional,
        parameters=dict(model.named_parameters(remove_duplicate=False)),
    )


def stepper(
    loop: Loop, phase: Phase, batch: list[Batch], masks: Masks, apply: Callable[[], None], optimizer: Any
) -> Callable[[], object]:
    """The first step of a phase, over and over: `apply` is called for the mask."""
    state = PhaseState(Place("refined", 1, 1, 0, 1, 1, phase.kind, 0, 1))
    state.optimizer, state.masks, state.apply = optimizer, masks, apply

    def step() -> None:
        state.progress = Progress()
        train_step(loop, phase, state, batch)
        deque(arrived(loop, state), maxlen=0)

    return step


def recipe_of(batch: int, steps: int, optimizer: str = "sgd", **more: Any) -> Recipe:
    """A recipe of one dense phase."""
    phase = {"kind": "dense", "steps": steps, "lr": 1e-4, "schedule": "constant"}
    return Recipe.model_validate({"phases": [phase], "batch_size": batch, "optimizer": optimizer, **more})


def phase_of(steps: int, lr: float = 1e-4) -> Phase:
    return Phase(kind="dense", steps=steps, lr=lr, schedule="constant")


def layers_of(model: nn.Module, first: Sequence[str] = ()) -> list[Layer]:
    """The model's parameters as layers, as if the file held them under their own names."""
    return find_layers(model, first=first)


def resnet50(size: int = 128, batch: int = 16) -> tuple[nn.Module, Fixed]:
    """timm's ResNet-50 of random weights, channels-last, with a batch."""
    import timm

    torch.manual_seed(0)
    model = timm.create_model("resnet50").to(memory_format=torch.channels_last)
    x = torch.randn(batch, 3, size, size).contiguous(memory_format=torch.channels_last)
    return model, Fixed({"x": x}, torch.randint(0, 1000, (batch,)), _by_position)


def small_bert(length: int = 48, batch: int = 32) -> tuple[nn.Module, Fixed]:
    """A BERT classifier of 6 layers and 384 wide, the shape of a released tweet classifier, with a batch."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    shape = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 12, "num_labels": 3}
    model = BertForSequenceClassification(BertConfig(**shape))
    ids = torch.randint(5, 30522, (batch, length))
    return model, Fixed({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, torch.randint(0, 3, (batch,)), _by_name)


def small_gpt2(length: int = 256, batch: int = 4) -> tuple[nn.Module, Fixed]:
    """GPT-2 small's shape with 2 of its 12 layers, with a batch of documents."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=2))
    ids = torch.randint(0, 50257, (batch, length))
    targets = nn.functional.pad(ids[:, 1:], (0, 1), value=-100).flatten()  # of every token what follows it
    return model, Fixed({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, targets, _of_tokens)


def _by_position(forward: Callable[..., Any], batch: Batch) -> torch.Tensor:
    return nn.functional.cross_entropy(forward(batch.inputs["x"]), batch.targets, reduction="sum")


def _by_name(forward: Callable[..., Any], batch: Batch) -> torch.Tensor:
    return nn.functional.cross_entropy(forward(**batch.inputs).logits, batch.targets, reduction="sum")


def _of_tokens(forward: Callable[..., Any], batch: Batch) -> torch.Tensor:
    logits = forward(**batch.inputs).logits.flatten(0, 1)
    return nn.functional.cross_entropy(logits, batch.targets, reduction="sum")


def pictures(folder: Path, rows: int, size: int, classes: int = 10, kind: str = "jpg", seed: int = 0) -> None:
    """`folder/cN/…`: smooth random pictures."""
    draw = np.random.default_rng(seed)
    for row in range(rows):
        target = folder / f"c{row % classes}" / f"{row:06}.{kind}"
        target.parent.mkdir(parents=True, exist_ok=True)
        small = Image.fromarray(draw.integers(0, 256, (max(2, size // 8), max(2, size // 8), 3), dtype=np.uint8))
        small.resize((size, size), Image.Resampling.BICUBIC).save(target)


def words(rows: int, length: int, seed: int = 0) -> list[str]:
    """Texts of `length` words."""
    draw, known = np.random.default_rng(seed), np.array([f"w{n}" for n in range(2000)])
    return [" ".join(known[draw.integers(0, len(known), length)]) for _ in range(rows)]


def word_tokenizer(longest: int) -> Any:
    """A fast tokenizer of whole words, with BERT's special tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {word: number for number, word in enumerate([*special, *(f"w{n}" for n in range(2000))])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    return PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=longest, **names)


def timm_folder(folder: Path, arch: str, classes: int, size: int) -> Path:
    """A timm checkpoint of random weights whose classes are c0, c1, …"""
    import timm
    from timm.models import save_for_hf

    overlay = {
        "input_size": (3, size, size), "mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 1.0, "interpolation": "bilinear",
        "test_input_size": (3, size, size), "test_crop_pct": 1.0, "tag": None, "hf_hub_id": None,
    }  # fmt: skip
    torch.manual_seed(0)
    model = timm.create_model(arch, num_classes=classes, pretrained_cfg_overlay=overlay)
    names = {"label_names": [f"c{n}" for n in range(classes)]}
    save_for_hf(model, str(folder), model_config=names, safe_serialization=True)
    return folder


def bert_folder(folder: Path, length: int, **shape: Any) -> Path:
    """A BERT classifier of random weights with the classes c0, c1, c2, and its word tokenizer."""
    from transformers import BertConfig, BertForSequenceClassification

    labels = {n: f"c{n}" for n in range(3)}
    config = BertConfig(vocab_size=2005, max_position_embeddings=max(64, length), id2label=labels,
                        label2id={name: n for n, name in labels.items()}, pad_token_id=0, **shape)  # fmt: skip
    torch.manual_seed(0)
    BertForSequenceClassification(config).save_pretrained(folder)
    word_tokenizer(length).save_pretrained(folder)
    return folder


def text_table(path: Path, rows: int, length: int, seed: int = 0) -> Path:
    """A CSV of `text,label` with the labels c0, c1, c2 in turn."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"{text},c{row % 3}" for row, text in enumerate(words(rows, length, seed))]
    path.write_text("\n".join(["text,label", *lines]) + "\n")
    return path

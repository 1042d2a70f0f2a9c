"""A small model and made data for seven tasks: `python benchmarks/small_tasks.py OUT [questions|sounds|digits|tags …]`.

Each model is taught here as the first Dense phase, then refined by the default command, and with rates and lengths for so
small a model, each beside a control of the same budget. Prints the summaries.
It takes some minutes on one core.

questions: a BERT finds the answer in facts about invented people; a fifth of the questions has no answer in its context.
sounds: a wav2vec2 tells eight rising and falling tones in noise.
digits: a ViT names which of the ten digits of scikit-learn stand in a picture of three.
tags, scores, answers, words: see benchmarks/small_texts.py.
"""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import small_texts
import soundfile
import torch
import transformers
from PIL import Image
from sklearn.datasets import load_digits
from taught import first_dense, refine
from tokenizers import Tokenizer, models, pre_tokenizers, processors

ROWS = {"train": 800, "test": 500}
RATE = 4000
PEOPLE = [
    f"{first}{last}" for first in ("an", "be", "cor", "dal", "er", "fin", "gor", "hil") for last in ("a", "ek", "is", "o", "um")
]
PLACES = [
    f"{first}{last}"
    for first in ("mar", "nor", "ol", "par", "rim", "sal")
    for last in ("burg", "dorf", "ford", "stad", "ville")
]
VERBS = {"lives in": "where does {} live", "works in": "where does {} work", "comes from": "where does {} come from"}
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
GLIDES = {f"{begin} to {end}": (begin, end) for begin, end in
          ((300, 600), (600, 300), (300, 900), (900, 300), (600, 900), (900, 600), (500, 500), (800, 800))}  # fmt: skip
COMMON = ("--control", "dense", "--gate", "none", "--quiet", "--overwrite")
FOR_SMALL = (
    "--optimizer", "adamw", "--schedule", "cosine", "--warmup-steps", "10", "--sparse-epochs", "3", "--dense-epochs", "2",
    "--batch-size", "16", "--lr", "5e-4",
)  # fmt: skip


def asked(draw: np.random.Generator) -> dict[str, Any]:
    """A context of four facts and a question. The answer may have two words."""
    people = draw.choice(PEOPLE, 5, replace=False)
    facts = []
    for person in people[:4]:
        place = " ".join([*(["old"] if draw.random() < 0.3 else []), str(draw.choice(PLACES))])
        facts.append((str(person), str(draw.choice(list(VERBS))), place))
    context = ""
    starts = []
    for person, verb, place in facts:
        context += f"{person} {verb} "
        starts.append(len(context))
        context += f"{place} . "
    number = int(draw.integers(0, 4))
    person, verb, place = facts[number]
    if draw.random() < 0.2:
        return {"context": context, "question": VERBS[verb].format(people[4]), "answers": {"text": [], "answer_start": []}}
    answers = {"text": [place], "answer_start": [starts[number]]}
    return {"context": context, "question": VERBS[verb].format(person), "answers": answers}


def questions(out: Path) -> Any:
    """Rows in SQuAD's layout, and an untrained BERT with a tokenizer of whole words."""
    for number, split in enumerate(ROWS):
        draw = np.random.default_rng([0, number])
        small_texts.write_lines(out / "data" / f"{split}.jsonl", [asked(draw) for _ in range(2 * ROWS[split])])
    words = sorted({word for text in (*VERBS, *VERBS.values()) for word in text.split()} - {"{}"})
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, ".", "old", *words, *PEOPLE, *PLACES])}
    whole = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    whole.pre_tokenizer = pre_tokenizers.Whitespace()
    whole.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=whole, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", model_max_length=64
    )
    tokenizer.save_pretrained(out / "model")
    return transformers.BertForQuestionAnswering(
        transformers.BertConfig(
            vocab_size=len(vocabulary),
            hidden_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=128,
            max_position_embeddings=64,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


def glide(draw: np.random.Generator, begin: int, end: int) -> np.ndarray[Any, Any]:
    """A third of a second of a tone that glides from one frequency to another, in noise louder than it."""
    count = int(RATE * draw.uniform(0.25, 0.4))
    hertz = np.linspace(begin, end, count) * draw.uniform(0.9, 1.1)
    wave = 0.2 * np.sin(2 * np.pi * np.cumsum(hertz) / RATE + draw.uniform(0, 6))
    return (wave + draw.normal(0, 0.25, count)).astype(np.float32)


def sounds(out: Path) -> Any:
    """Class folders of clips, and an untrained wav2vec2."""
    for number, split in enumerate(ROWS):
        draw = np.random.default_rng([1, number])
        for name, (begin, end) in GLIDES.items():
            place = out / "data" / split / name
            place.mkdir(parents=True, exist_ok=True)
            for row in range(ROWS[split] // len(GLIDES)):
                soundfile.write(place / f"{row:03}.wav", glide(draw, begin, end), RATE)
    transformers.Wav2Vec2FeatureExtractor(sampling_rate=RATE, return_attention_mask=True).save_pretrained(out / "model")
    names = dict(enumerate(GLIDES))
    return transformers.Wav2Vec2ForSequenceClassification(
        transformers.Wav2Vec2Config(
            hidden_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=96,
            conv_dim=(32, 32, 48),
            conv_kernel=(10, 8, 4),
            conv_stride=(5, 4, 2),
            num_feat_extract_layers=3,
            num_conv_pos_embeddings=16,
            num_conv_pos_embedding_groups=4,
            classifier_proj_size=48,
            feat_extract_norm="layer",
            do_stable_layer_norm=True,
            mask_time_prob=0.0,
            layerdrop=0.0,
            id2label=names,
            label2id={name: k for k, name in names.items()},
        )
    )


def digits(out: Path) -> Any:
    """Pictures of three digits in nine places, with lists of their names, and an untrained ViT."""
    images, labels = load_digits(return_X_y=True)
    names = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    halves = np.array_split(np.random.default_rng(2).permutation(len(images)), 2)
    for number, (split, of_split) in enumerate(zip(ROWS, halves, strict=True)):
        draw, rows, place = np.random.default_rng([2, number]), [], out / "data" / split
        place.mkdir(parents=True, exist_ok=True)
        for row in range(2 * ROWS[split]):
            picture, chosen = np.zeros((24, 24)), draw.choice(of_split, 3)
            for digit, cell in zip(chosen, draw.choice(9, 3, replace=False), strict=True):
                top, left = 8 * (cell // 3), 8 * (cell % 3)
                picture[top : top + 8, left : left + 8] = images[digit].reshape(8, 8)
            Image.fromarray((picture * 15.9).astype(np.uint8)).save(place / f"{row:04}.png")
            rows.append({"file_name": f"{row:04}.png", "labels": sorted({names[labels[digit]] for digit in chosen})})
        small_texts.write_lines(place / "metadata.jsonl", rows)
    size = {"height": 24, "width": 24}
    transformers.ViTImageProcessor(size=size, image_mean=[0.5], image_std=[0.5]).save_pretrained(out / "model")
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(
            hidden_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=128,
            image_size=24,
            patch_size=8,
            num_channels=1,
            problem_type="multi_label_classification",
            id2label=dict(enumerate(names)),
            label2id={name: k for k, name in enumerate(names)},
        )
    )


# name -> what makes it, its task, the epochs and the rate of its first Dense phase, options of its refinement
TASKS: dict[str, tuple[Callable[[Path], Any], str, int, float, tuple[str, ...]]] = {
    "questions": (questions, "question-answering", 12, 2e-3, ()),
    "sounds": (sounds, "audio-classification", 12, 2e-3, ()),
    "digits": (digits, "image-classification", 12, 2e-3, ("--set", "metric=map")),
    "tags": (small_texts.tags, "token-classification", 6, 2e-3, ()),
    "scores": (small_texts.scores, "text-classification", 6, 2e-3, ()),
    "answers": (small_texts.answers, "text-classification", 6, 2e-3, ()),
    "words": (small_texts.words, "masked-lm", 4, 2e-3, ("--task", "masked-lm")),
}


def main() -> None:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "scikit-learn"))
    print(f"{platform.machine()}, Python {platform.python_version()}, {versions}\n", flush=True)
    for name in sys.argv[2:] or TASKS:
        make, task, epochs, peak, options = TASKS[name]
        out, started = Path(sys.argv[1]).resolve() / name, time.time()
        torch.manual_seed(0)
        model = make(out)
        model.save_pretrained(out / "model")
        first_dense(out / "model", out / "data", model, task, epochs, peak, 16)
        print(
            f"{name}: {sum(p.numel() for p in model.parameters()):,} parameters, first Dense in {time.time() - started:.0f} s"
        )
        refine(out, "model", "default", (*options, *COMMON))
        refine(out, "model", "rate", (*options, *COMMON, *FOR_SMALL))


if __name__ == "__main__":
    main()

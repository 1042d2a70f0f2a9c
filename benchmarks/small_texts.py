"""Made data and untrained models on texts for benchmarks/small_tasks.py.

tags: names of people, places and clubs in short sentences; some sentences do not say which of them a name is.
scores: texts with four judgements; the score, from 1 to 5, adds them up, with some noise.
answers: two such texts, the better one chosen, for a model of rewards; a tenth of the choices are wrong.
words: a masked language model reads docstrings of Python's own library.
"""

from __future__ import annotations

import ast
import json
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

ROWS = {"train": 1600, "test": 1000}
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
NAMES = [f"{first}{last}" for first in ("an", "be", "cor", "dal", "er", "fin", "gor", "hil", "mar", "nor", "ol", "par")
         for last in ("a", "ek", "is", "o", "um", "burg", "ford", "ville")]  # fmt: skip
KINDS = ("PER", "LOC", "ORG")
SENTENCES = (
    "PER lives in LOC .", "PER works for ORG in LOC .", "ORG beat ORG .", "LOC lies near LOC .", "PER met PER in LOC .",
    "we saw PER .", "we saw LOC .", "we saw ORG .",
)  # fmt: skip
THINGS = ("food", "room", "bed", "view", "staff", "price", "bath", "music", "wine", "garden")
WORTH = {"good": 1.0, "nice": 0.7, "fine": 0.4, "usual": 0.0, "dull": -0.4, "poor": -0.7, "bad": -1.0}
DEGREES = {"": 1.0, "very": 1.5, "rather": 0.7, "not": -0.7}
SIZES = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128,
         "max_position_embeddings": 96, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # fmt: skip


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def whole_words(words: Iterable[str], folder: Path) -> Any:
    """Save a tokenizer to which each of these words is a token, and return it."""
    known = [*SPECIAL, *sorted(set(words))]
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(known)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return _saved(made, folder)


def _saved(made: Tokenizer, folder: Path) -> Any:
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {f"{name.strip('[]').lower()}_token": name for name in SPECIAL}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=96, **names)
    tokenizer.save_pretrained(folder)
    return tokenizer


def _bert(tokenizer: Any, head: str, **config: Any) -> Any:
    made = transformers.BertConfig(vocab_size=len(tokenizer), pad_token_id=0, **SIZES, **config)
    return getattr(transformers, f"BertFor{head}")(made)


def _names(classes: Iterable[str]) -> dict[str, Any]:
    names = dict(enumerate(classes))
    return {"id2label": names, "label2id": {name: number for number, name in names.items()}}


def tagged(draw: np.random.Generator) -> dict[str, list[str]]:
    """A row of words and tags: two sentences. A name may have two words."""
    tokens: list[str] = []
    tags: list[str] = []
    for word in " ".join(map(str, draw.choice(SENTENCES, 2))).split():
        if word not in KINDS:
            tokens.append(word)
            tags.append("O")
            continue
        name = [*(["old"] if draw.random() < 0.3 else []), str(draw.choice(NAMES))]
        tokens += name
        tags += [f"B-{word}", f"I-{word}"][: len(name)]
    return {"tokens": tokens, "ner_tags": tags}


def tags(out: Path) -> Any:
    """Rows of words with tags, and an untrained BERT."""
    for number, split in enumerate(ROWS):
        draw = np.random.default_rng([3, number])
        write_lines(out / "data" / f"{split}.jsonl", (tagged(draw) for _ in range(ROWS[split])))
    words = {word for sentence in SENTENCES for word in sentence.split()} - set(KINDS)
    classes = ["O", *(f"{part}-{kind}" for kind in KINDS for part in "BI")]
    return _bert(whole_words({*words, "old", *NAMES}, out / "model"), "TokenClassification", **_names(classes))


def said(draw: np.random.Generator) -> tuple[str, float]:
    """A text of judgements ("the food was very good , ..."), and what they add up to."""
    total, parts = 0.0, []
    for thing in draw.choice(THINGS, 4, replace=False):
        word = str(draw.choice(list(WORTH)))
        degree = str(draw.choice(list(DEGREES)))
        total += WORTH[word] * DEGREES[degree]
        parts.append(" ".join(["the", str(thing), "was", *degree.split(), word]))
    return " , ".join(parts), total


def scored(draw: np.random.Generator) -> dict[str, Any]:
    """A text, and a score from 1 to 5."""
    text, total = said(draw)
    return {"text": text, "score": round(float(np.clip(3 + 0.5 * total + draw.normal(0, 0.5), 1, 5)), 2)}


def _judgements(out: Path, seed: int, row: Callable[[np.random.Generator], dict[str, Any]], **config: Any) -> Any:
    for number, split in enumerate(ROWS):
        draw = np.random.default_rng([seed, number])
        write_lines(out / "data" / f"{split}.jsonl", (row(draw) for _ in range(ROWS[split])))
    known = {*THINGS, *WORTH, *" ".join(DEGREES).split(), "the", "was", ","}
    return _bert(whole_words(known, out / "model"), "SequenceClassification", num_labels=1, **config)


def scores(out: Path) -> Any:
    """Texts with a score, and an untrained BERT with one output."""
    return _judgements(out, 4, scored, problem_type="regression")


def preferred(draw: np.random.Generator) -> dict[str, str]:
    """Two texts, the better one chosen; in a tenth of the rows it is the other way round, as people err."""
    ranked = sorted((said(draw) for _ in range(2)), key=lambda pair: pair[1])
    worse, better = (text for text, _ in (ranked[::-1] if draw.random() < 0.1 else ranked))
    return {"chosen": better, "rejected": worse}


def answers(out: Path) -> Any:
    """Rows of chosen and rejected, and an untrained BERT with one output."""
    return _judgements(out, 5, preferred)


def docstrings(folder: Path) -> Iterator[str]:
    """The docstrings of 200 to 500 characters below a folder, without the tests'."""
    for path in sorted(folder.rglob("*.py")):
        if {"tests", "test", "site-packages", "idlelib", "lib2to3"} & set(path.relative_to(folder).parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError, ValueError):
            continue
        nodes = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module))
        texts = (" ".join((ast.get_docstring(node) or "").split()) for node in nodes)
        yield from (text for text in texts if 200 <= len(text) <= 500)


def words(out: Path) -> Any:
    """Docstrings, and an untrained BERT with a WordPiece tokenizer of 2,000 pieces."""
    found = list(dict.fromkeys(docstrings(Path(sysconfig.get_paths()["stdlib"]))))
    order = np.random.default_rng(6).permutation(len(found))
    parts = {"train": order[: -len(order) // 4], "test": order[-len(order) // 4 :]}
    for split, numbers in parts.items():
        write_lines(out / "data" / f"{split}.jsonl", ({"text": found[number]} for number in numbers))
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    texts = [found[number] for number in parts["train"]]
    made.train_from_iterator(
        texts, trainers.WordPieceTrainer(vocab_size=2000, special_tokens=list(SPECIAL), show_progress=False)
    )
    return _bert(_saved(made, out / "model"), "MaskedLM")

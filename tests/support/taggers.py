"""A tiny tagger of names in texts, and rows of words with tags."""

import json

import builders
import numpy as np
from builders import SPECIAL, WORDS, save_transformers, seeded

TAGS = ("O", "B-ANIMAL", "I-ANIMAL", "B-FOOD", "I-FOOD")


def tagger_checkpoint(folder, labels=TAGS, kind="Bert", tokenizer=None, seed=0, **config):
    """A BERT (or RoBERTa) of two layers that tags words; `labels` as a number: LABEL_0, LABEL_1, …"""
    import transformers

    names = {"num_labels": labels} if isinstance(labels, int) else {
        "id2label": dict(enumerate(labels)), "label2id": {name: number for number, name in enumerate(labels)},
    }  # fmt: skip
    sizes = {"vocab_size": len(SPECIAL) + len(WORDS), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
             "intermediate_size": 48, "max_position_embeddings": 40, "pad_token_id": 0}  # fmt: skip
    with seeded(seed):
        made = getattr(transformers, f"{kind}Config")(**(sizes | names | config))
        model = getattr(transformers, f"{kind}ForTokenClassification")(made)
    return save_transformers(model, folder, tokenizer or builders.word_tokenizer())


def tagged(draw, names=TAGS):
    """A row: words, and for each a tag; entities are one or two words long."""
    words, tags = [], []
    for _ in range(draw.integers(2, 5)):
        kind = draw.integers(0, 3)
        long = 1 + int(draw.integers(0, 2))
        words += draw.choice(WORDS, long).tolist()
        tags += ["O"] * long if kind == 0 else [names[2 * kind - 1]] + [names[2 * kind]] * (long - 1)
    return {"tokens": words, "ner_tags": tags}


def tagged_file(path, rows=24, seed=0, column="ner_tags"):
    """A JSON-lines file of such rows."""
    draw = np.random.default_rng(seed)
    made = [tagged(draw) for _ in range(rows)]
    lines = [json.dumps({"tokens": row["tokens"], column: row["ner_tags"]}) for row in made]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path

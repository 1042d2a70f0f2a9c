"""A tiny model that answers questions by a span of the context, and rows of questions in SQuAD's layout."""

import json

import builders
import numpy as np
from builders import SPECIAL, WORDS, save_transformers, seeded

ANIMALS, FOODS = ("cat", "dog", "bird", "fish"), ("red", "blue", "small", "large", "old", "new")


def answerer_checkpoint(folder, kind="Bert", tokenizer=None, seed=0, **config):
    """A BERT (or another family) of two layers with a head for the first and the last token of an answer."""
    import transformers

    sizes = {"vocab_size": len(SPECIAL) + len(WORDS), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
             "intermediate_size": 48, "max_position_embeddings": 40, "pad_token_id": 0}  # fmt: skip
    with seeded(seed):
        made = getattr(transformers, f"{kind}Config")(**(sizes | config))
        model = getattr(transformers, f"{kind}ForQuestionAnswering")(made)
    return save_transformers(model, folder, tokenizer or builders.word_tokenizer())


def asked_row(draw, facts=3, answered=True):
    """A row: a context of several facts ("cat eats small red now"), and a question after one of them."""
    animals = draw.permutation(ANIMALS)[:facts]
    answers = [" ".join(draw.choice(FOODS, draw.integers(1, 3))) for _ in animals]
    context, starts = "", []
    for animal, answer in zip(animals, answers, strict=True):
        context += f"{animal} eats "
        starts.append(len(context))
        context += f"{answer} now "
    if not answered:
        left = next(name for name in ANIMALS if name not in animals)
        return {"context": context, "question": f"the {left} eats", "answers": {"text": [], "answer_start": []}}
    number = int(draw.integers(0, len(animals)))
    answers = {"text": [answers[number]] * 2, "answer_start": [starts[number]] * 2}
    return {"context": context, "question": f"the {animals[number]} eats", "answers": answers}


def asked_rows(rows=24, seed=0, answered=1.0, facts=3):
    """Rows, of which a share has an answer."""
    draw = np.random.default_rng(seed)
    return [asked_row(draw, facts, draw.random() < answered) for _ in range(rows)]


def squad_file(path, rows):
    """The rows in the nested layout of SQuAD's own file, two questions to an article."""
    articles = []
    for number in range(0, len(rows), 2):
        paragraphs = [
            {"context": row["context"], "qas": [{
                "id": str(number), "question": row["question"], "is_impossible": not row["answers"]["text"],
                "answers": [{"text": text, "answer_start": start}
                            for text, start in zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True)],
            }]}
            for row in rows[number : number + 2]
        ]  # fmt: skip
        articles.append({"title": "facts", "paragraphs": paragraphs})
    path.write_text(json.dumps({"version": "v2.0", "data": articles}), encoding="utf-8")
    return path

"""Rows for heads on texts besides one label a row: scores, pairs of answers, several labels."""

import json

import numpy as np
from builders import WORDS
from PIL import Image


def words(draw, least=2, most=6):
    """A text of known words."""
    return " ".join(draw.choice(WORDS, draw.integers(least, most + 1)))


def write(path, rows):
    """A JSON-lines file of these rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def scored_file(path, rows=24, binary=False, seed=0, column="score"):
    """Pairs of texts; the score is the share of words that both have, or whether it is more than a third."""
    draw, found = np.random.default_rng(seed), []
    for row in range(rows):
        one = words(draw)
        other = one if row % 3 == 0 else words(draw)
        share = len({*one.split()} & {*other.split()}) / len({*one.split(), *other.split()})
        found.append(
            {"sentence1": one, "sentence2": f"{other} then", column: int(share > 1 / 3) if binary else round(share, 3)}
        )
    return write(path, found)


def preference_rows(rows=24, seed=0, prompt=False):
    """Pairs of answers: the chosen one ends in `good`, the rejected one in `bad`."""
    draw, found = np.random.default_rng(seed), []
    for _ in range(rows):
        row = {"chosen": f"{words(draw)} good", "rejected": f"{words(draw)} bad"}
        found.append({"prompt": words(draw), **row} if prompt else row)
    return found


def labelled_rows(names, rows=24, seed=0):
    """Texts with some of the names, each of which stands in the text."""
    draw, found = np.random.default_rng(seed), []
    for _ in range(rows):
        held = [name for name in names if draw.random() < 0.5]
        found.append({"text": " ".join([words(draw), *held]), "labels": held})
    return found


def striped_folder(folder, names, rows=24, size=32, seed=0, flags=False):
    """`folder/metadata.jsonl` and grey PNGs with some of the names, each of which is a bright stripe.

    With `flags` there is a column of 0 and 1 for each name, else a list of names.
    """
    draw, found = np.random.default_rng(seed), []
    folder.mkdir(parents=True, exist_ok=True)
    for row in range(rows):
        pixels = draw.integers(0, 96, (size, size), dtype=np.uint8)
        held = [draw.random() < 0.5 for _ in names]
        for number, is_held in enumerate(held):
            pixels[number * size // len(names) : (number + 1) * size // len(names)] += 128 * is_held
        Image.fromarray(pixels).save(folder / f"{row:03}.png")
        of_row = (
            dict(zip(names, map(int, held), strict=True))
            if flags
            else {"labels": [n for n, h in zip(names, held, strict=True) if h]}
        )
        found.append({"file_name": f"{row:03}.png", **of_row})
    write(folder / "metadata.jsonl", found)
    return folder

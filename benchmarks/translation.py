"""Numbers from English into German: `python benchmarks/translation.py OUT` (some minutes on one core).

"four thousand two hundred and thirty-one" becomes "viertausendzweihunderteinunddreißig". A small T5 with a tokenizer of its own
is trained on 2,000 of the numbers below 10,000 as the first Dense phase. The default command refines it, and a second run with
a rate for so small a model, each beside a control of the same budget; 400 other numbers judge. Prints chrF, BLEU and exact
matches for benchmarks/results/translation.txt.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import transformers
from taught import first_dense, refine
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

ROWS, EPOCHS, PEAK, BATCH = {"train": 2000, "test": 400}, 6, 3e-3, 32
COMMON = ("--control", "dense", "--gate", "none", "--quiet", "--overwrite")
RUNS = {
    "default": COMMON,
    "refined": ("--sparse-epochs", "1", "--dense-epochs", "1", "--lr", "1e-3", "--batch-size", "32", "--sparsity", "0.3",
                *COMMON, "--warmup-steps", "10"),
}  # fmt: skip
ENGLISH = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine",
    "ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
GERMAN = (
    "null", "ein", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun",
    "zehn", "elf", "zwölf", "dreizehn", "vierzehn", "fünfzehn", "sechzehn", "siebzehn", "achtzehn", "neunzehn",
)  # fmt: skip
TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
ZEHNER = ("zwanzig", "dreißig", "vierzig", "fünfzig", "sechzig", "siebzig", "achtzig", "neunzig")


def english(number: int) -> str:
    """A number below 10,000 in English."""
    if number < 20:
        return ENGLISH[number]
    if number < 100:
        return TENS[number // 10 - 2] + (f"-{ENGLISH[number % 10]}" if number % 10 else "")
    unit, name = (1000, "thousand") if number >= 1000 else (100, "hundred")
    rest = number % unit
    return f"{ENGLISH[number // unit]} {name}" + (f"{' and' if rest < 100 else ''} {english(rest)}" if rest else "")


def german(number: int) -> str:
    """A number below 10,000 in German. One is `eins` where the word ends."""
    if number < 20:
        return "eins" if number == 1 else GERMAN[number]
    if number < 100:
        return (f"{GERMAN[number % 10]}und" if number % 10 else "") + ZEHNER[number // 10 - 2]
    unit, name = (1000, "tausend") if number >= 1000 else (100, "hundert")
    return f"{GERMAN[number // unit]}{name}" + (german(number % unit) if number % unit else "")


def untrained(texts: list[str], folder: Path) -> None:
    """A T5 of two layers, and a Unigram tokenizer of both languages."""
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    made.train_from_iterator(
        texts, trainers.UnigramTrainer(vocab_size=150, special_tokens=special, unk_token="<unk>", show_progress=False)
    )
    pieces = [tuple(piece) for piece in json.loads(made.to_str())["model"]["vocab"]]
    tokenizer = transformers.T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=64)
    torch.manual_seed(0)
    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
    config = transformers.T5Config(vocab_size=len(tokenizer), decoder_start_token_id=0, pad_token_id=0, eos_token_id=1, **sizes)
    for part in (transformers.T5ForConditionalGeneration(config), tokenizer):
        part.save_pretrained(folder)


def main() -> None:
    started, out = time.time(), Path(sys.argv[1]).resolve()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    numbers = np.random.default_rng(0).permutation(10_000)[: sum(ROWS.values())].tolist()
    pairs = [{"source": english(number), "target": german(number)} for number in numbers]
    (out / "data").mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", pairs[: ROWS["train"]]), ("test", pairs[ROWS["train"] :])):
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        (out / "data" / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    untrained([text for pair in pairs for text in pair.values()], out / "t5")
    model = transformers.T5ForConditionalGeneration.from_pretrained(out / "t5")
    first_dense(out / "t5", out / "data", model, "seq2seq-lm", EPOCHS, PEAK, BATCH)
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "sacrebleu"))
    print(f"{platform.machine()}, Python {platform.python_version()}, {versions}")
    print(f"{ROWS['train']:,} + {ROWS['test']:,} numbers; first Dense trained in {time.time() - started:.0f} s\n", flush=True)
    for name, options in RUNS.items():
        refine(out, "t5", name, options)
    print(f"{time.time() - started:.0f} s in all")


if __name__ == "__main__":
    main()

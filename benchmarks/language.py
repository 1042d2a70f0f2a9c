"""A language model on running text: `python benchmarks/language.py TEXTS OUT`, TEXTS a folder of .txt or .txt.gz files.

Trains a small GPT-2 with a tokenizer of its own as the first Dense phase, then refines it; prints the summary (loss in nats a
token, perplexity) for benchmarks/results/language.txt. Measured there with the texts of Debian's package debian-policy.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, logging

ROOT = Path(__file__).parent.parent
WINDOW = 128
OPTIONS = (
    "--sparse-epochs", "3", "--dense-epochs", "3", "--lr", "0.001", "--batch-size", "16", "--max-length", str(WINDOW),
    "--sparsity", "0.3", "--control", "dense", "--control", "random", "--gate", "none",
)  # fmt: skip


def paragraphs(folder: Path) -> list[str]:
    """The distinct paragraphs of at least 80 characters."""
    texts = [path.read_text() for path in sorted(folder.rglob("*.txt"))]
    texts += [gzip.decompress(path.read_bytes()).decode() for path in sorted(folder.rglob("*.txt.gz"))]
    found = dict.fromkeys(" ".join(part.split()) for text in texts for part in text.split("\n\n"))
    return [part for part in found if len(part) >= 80]


def first_dense(train: list[str], folder: Path, epochs: int = 6) -> None:
    """A byte-level BPE of 2,000 tokens and a GPT-2 of two layers, trained plainly."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(train, trainers.BpeTrainer(vocab_size=2000, initial_alphabet=alphabet, show_progress=False))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=WINDOW)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=2000, n_positions=WINDOW, n_embd=128, n_layer=2, n_head=4))
    ids = torch.cat([torch.tensor(fast(text)["input_ids"]) for text in train])
    windows = ids[: len(ids) // WINDOW * WINDOW].reshape(-1, WINDOW)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * (-(-len(windows) // 16)))
    for _ in range(epochs):
        for batch in torch.randperm(len(windows)).split(16):
            optimizer.zero_grad()
            model(input_ids=windows[batch], labels=windows[batch]).loss.backward()
            optimizer.step()
            schedule.step()
    logging.disable_progress_bar()
    model.save_pretrained(folder)
    fast.save_pretrained(folder)


def main() -> None:
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "timm", "transformers"))
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, {versions}", flush=True)
    texts, out = Path(sys.argv[1]), Path(sys.argv[2])
    out.mkdir(parents=True, exist_ok=True)
    parts = paragraphs(texts)
    test = {part for part in parts if hashlib.sha256(part.encode()).digest()[0] < 51}  # a fifth
    train = [part for part in parts if part not in test]
    (out / "train.txt").write_text("\n\n".join(train))
    (out / "test.txt").write_text("\n\n".join(part for part in parts if part in test))
    first_dense(train, out / "gpt2")
    command = [sys.executable, str(ROOT / "cli.py"), str(out / "gpt2"), "--data", str(out / "train.txt"), "--eval-data",
               str(out / "test.txt"), "-o", str(out / "refined"), "--overwrite", "--quiet", *OPTIONS]  # fmt: skip
    print(
        f"{len(train):,} paragraphs to train on, {len(test):,} to judge by\n$ dsd-refine gpt2 {' '.join(OPTIONS)}\n", flush=True
    )
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    print(done.stdout.replace(f"{out}/", ""))


if __name__ == "__main__":
    main()

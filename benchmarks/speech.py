"""Spoken digits: `python benchmarks/speech.py OUT` (needs espeak-ng; about ten minutes on one core).

espeak-ng reads strings of one to four digits in several voices, pitches and speeds, over noise. A small Parakeet (conformer and
CTC) is trained on them as the first Dense phase, then refined by DSD and by DSDSD, each beside a control of the same budget.
Prints word error rates with their intervals for benchmarks/results/speech.txt.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
import transformers
from taught import first_dense, refine

from dsd_refine.tasks.inputs.audio import decode, resample

RATE, ROWS = 8000, {"train": 1000, "test": 800}
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
VOICES = ("en-gb", "en-us", "en-gb-scotland", "en-gb-x-rp", "en-gb-x-gbclan", "en-029")
VARIANTS = ("", "+m1", "+m3", "+m5", "+m7", "+f1", "+f2", "+f4", "+croak")
EPOCHS, PEAK, BATCH = 20, 2e-3, 16
DEFAULT = ("--control", "dense", "--gate", "none", "--quiet", "--overwrite")
COMMON = (
    "--batch-size", str(BATCH), "--optimizer", "adamw", "--schedule", "cosine", "--warmup-steps", "20", *DEFAULT,
    "--set", "weight_decay=0.01",
)  # fmt: skip
RUNS = {
    "DSD": ("--recipe", "ctc-speech", "--sparsity", "0.5", "--sparse-epochs", "3", "--dense-epochs", "3", "--lr", "1e-3"),
    "DSDSD": (
        "--recipe", "speech", "--set", "exclude=['*subsampling*']", "--sparse-epochs", "2", "--dense-epochs", "1",
        "--set", "phases.0.lr=1e-3", "--set", "phases.1.lr=1e-4", "--set", "phases.2.lr=1e-4", "--set", "phases.3.lr=2e-5",
    ),
}  # fmt: skip


def utterances(split: str) -> list[tuple[str, tuple[str, ...], float, int]]:
    """(digits, espeak-ng's options, signal to noise in dB, seed of the noise) of each row: the same in every run."""
    draw = np.random.default_rng([0, list(ROWS).index(split)])
    found = []
    for row in range(ROWS[split]):
        text = " ".join(draw.choice(DIGITS, draw.integers(1, 5)))
        voice = f"{draw.choice(VOICES)}{draw.choice(VARIANTS)}"
        options = ("-v", voice, "-s", str(draw.integers(120, 231)), "-p", str(draw.integers(25, 80)))
        found.append((text, options, float(draw.uniform(-3, 12)), row))
    return found


def speak(text: str, options: tuple[str, ...], decibel: float, seed: int) -> np.ndarray[Any, Any]:
    """The utterance at RATE over white noise."""
    raw = subprocess.run(["espeak-ng", *options, "--stdout", text], capture_output=True, check=True).stdout
    clean = resample(*decode(raw), RATE)
    noise = np.random.default_rng([1, seed]).normal(0, 1, len(clean)).astype(np.float32)
    level = np.sqrt(np.mean(clean**2) / 10 ** (decibel / 10))
    return 0.5 * (clean + level * noise) / np.abs(clean + level * noise).max()


def record(folder: Path) -> None:
    """`folder/SPLIT/metadata.csv` and the clips."""
    for split in ROWS:
        rows = utterances(split)
        (folder / split).mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for row, samples in enumerate(pool.map(lambda one: speak(*one), rows)):
                soundfile.write(folder / split / f"{row:04}.wav", samples, RATE)
        lines = ["file_name,text", *(f"{row:04}.wav,{text}" for row, (text, *_) in enumerate(rows))]
        (folder / split / "metadata.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def untrained(folder: Path) -> None:
    """A small Parakeet for the letters of the digits, 25 frames a second halved once: 50."""
    folder.mkdir(parents=True, exist_ok=True)
    names = ["<pad>", "<unk>", "|", *sorted({letter for word in DIGITS for letter in word})]
    (folder / "vocab.json").write_text(json.dumps({name: number for number, name in enumerate(names)}), encoding="utf-8")
    tokenizer = transformers.Wav2Vec2CTCTokenizer(str(folder / "vocab.json"), bos_token=None, eos_token=None)
    encoder = transformers.ParakeetEncoderConfig(
        hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=128, subsampling_factor=2,
        subsampling_conv_channels=32, num_mel_bins=40, layerdrop=0.0,
    )  # fmt: skip
    config = transformers.ParakeetCTCConfig(vocab_size=len(names), encoder_config=encoder.to_dict(), pad_token_id=0)
    torch.manual_seed(0)
    extractor = transformers.ParakeetFeatureExtractor(40, RATE, hop_length=80, n_fft=256, win_length=200)
    for part in (transformers.ParakeetForCTC(config), extractor, tokenizer):
        part.save_pretrained(folder)


def main() -> None:
    out, started = Path(sys.argv[1]).resolve(), time.time()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    record(out / "data")
    untrained(out / "parakeet")
    model = transformers.ParakeetForCTC.from_pretrained(out / "parakeet")
    first_dense(out / "parakeet", out / "data", model, "ctc-speech", EPOCHS, PEAK, BATCH)
    spoken = (
        subprocess.run(["espeak-ng", "--version"], capture_output=True, text=True, check=True).stdout.split("Data")[0].strip()
    )
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "jiwer"))
    print(f"{platform.processor() or platform.machine()}, Python {platform.python_version()}, {versions}, {spoken}")
    print(f"{ROWS['train']} + {ROWS['test']} utterances; recorded and first Dense trained in {time.time() - started:.0f} s\n")
    refine(out, "parakeet", "default", DEFAULT)
    for name in RUNS:
        refine(out, "parakeet", name, (*RUNS[name], *COMMON))
    print(f"{time.time() - started:.0f} s in all")


if __name__ == "__main__":
    main()

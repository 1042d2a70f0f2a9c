"""Spoken digits for a Whisper: `python benchmarks/transcripts.py OUT` (needs espeak-ng; some minutes on one core).

espeak-ng reads one to three digits in several voices, pitches and speeds, over noise. A small Whisper is taught on them as the
first Dense phase, then refined by the default command, and with a rate for so small a model, each beside a control of the same
budget. Prints word error rates with their intervals (benchmarks/results/transcripts.txt).
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
from speech import DIGITS, RATE, speak
from taught import first_dense, refine
from tokenizers import ByteLevelBPETokenizer

ROWS, EPOCHS, PEAK, BATCH = {"train": 1600, "test": 600}, 16, 2e-3, 16
SECONDS, MELS = 3, 40
VOICES = [f"{voice}{variant}" for voice in ("en-gb", "en-us", "en-029") for variant in ("", "+m3", "+f1", "+f4")]
COMMON = ("--control", "dense", "--gate", "none", "--quiet", "--overwrite")
RUNS = {
    "default": COMMON,
    "rate": (*COMMON, "--sparse-epochs", "2", "--dense-epochs", "2", "--batch-size", str(BATCH), "--lr", "5e-4",
             "--warmup-steps", "20"),
}  # fmt: skip


def record(folder: Path) -> None:
    """`folder/SPLIT/metadata.csv` and the clips: the same in every run."""
    for number, split in enumerate(ROWS):
        draw, spoken = np.random.default_rng([2, number]), []
        for row in range(ROWS[split]):
            text = " ".join(draw.choice(DIGITS, draw.integers(1, 4)))
            options = ("-v", str(draw.choice(VOICES)), "-s", str(draw.integers(150, 231)), "-p", str(draw.integers(35, 70)))
            spoken.append((text, options, float(draw.uniform(5, 20)), 10_000 * number + row))
        (folder / split).mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(1) as pool:
            for row, samples in enumerate(pool.map(lambda one: speak(*one), spoken)):
                soundfile.write(folder / split / f"{row:04}.wav", samples, RATE)
        lines = ["file_name,text", *(f"{row:04}.wav,{text}" for row, (text, *_) in enumerate(spoken))]
        (folder / split / "metadata.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def untrained(folder: Path) -> Any:
    """A small Whisper for English alone, which hears three seconds. Each digit is one token."""
    pieces = ByteLevelBPETokenizer()
    texts = [f"{first} {second}" for first in DIGITS for second in DIGITS]
    pieces.train_from_iterator(texts, vocab_size=400, min_frequency=1, show_progress=False)
    learned = json.loads(pieces.to_str())["model"]
    merges = [tuple(pair) if isinstance(pair, list) else tuple(pair.split()) for pair in learned["merges"]]
    tokenizer = transformers.WhisperTokenizer(
        vocab=learned["vocab"], merges=merges, pad_token="<|endoftext|>", model_max_length=16
    )
    marks = ["<|endoftext|>", "<|startoftranscript|>", "<|translate|>", "<|transcribe|>", "<|startoflm|>", "<|startofprev|>",
             "<|nospeech|>", "<|notimestamps|>"]  # fmt: skip
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    ids = tokenizer.get_vocab()
    start, end = ids["<|startoftranscript|>"], ids["<|endoftext|>"]
    extractor = transformers.WhisperFeatureExtractor(
        feature_size=MELS, sampling_rate=RATE, hop_length=RATE // 100, chunk_length=SECONDS, n_fft=RATE // 40
    )
    config = transformers.WhisperConfig(
        vocab_size=len(tokenizer), num_mel_bins=MELS, d_model=96, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=192, decoder_ffn_dim=192, dropout=0.0,
        max_source_positions=extractor.nb_max_frames // 2, max_target_positions=16, pad_token_id=end, bos_token_id=end,
        eos_token_id=end, decoder_start_token_id=start,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.WhisperForConditionalGeneration(config)
    settings = model.generation_config
    settings._from_model_config = False  # else transformers drops what only Whisper has when it reads the file
    settings.max_length, settings.is_multilingual, settings.return_timestamps = 12, False, False
    settings.suppress_tokens, settings.begin_suppress_tokens = [ids["<|startoflm|>"]], [end]
    settings.no_timestamps_token_id, settings.decoder_start_token_id = ids["<|notimestamps|>"], start
    for part in (model, extractor, tokenizer):
        part.save_pretrained(folder)
    return model


def main() -> None:
    out, started = Path(sys.argv[1]).resolve(), time.time()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    record(out / "data")
    model = untrained(out / "whisper")
    recorded = time.time() - started
    first_dense(out / "whisper", out / "data", model, "speech-seq2seq", EPOCHS, PEAK, BATCH)
    said = (
        subprocess.run(["espeak-ng", "--version"], capture_output=True, text=True, check=True).stdout.split("Data")[0].strip()
    )
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "jiwer"))
    print(f"{platform.machine()}, Python {platform.python_version()}, {versions}, {said}")
    size = sum(parameter.numel() for parameter in model.parameters())
    taught = time.time() - started - recorded
    print(
        f"{ROWS['train']:,} + {ROWS['test']:,} clips in {recorded:.0f} s, {size:,} parameters; first Dense in {taught:.0f} s\n"
    )
    for name, options in RUNS.items():
        refine(out, "whisper", name, options)
    print(f"{time.time() - started:.0f} s in all")


if __name__ == "__main__":
    main()

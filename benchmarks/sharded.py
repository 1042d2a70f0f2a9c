"""Memory of each process of a sharded run: `python benchmarks/sharded.py [--kinds "llama tied …"] [--processes "2 4"]`.

A model of random bfloat16 weights in two files is refined by SGD with momentum, with `--shard`: on as many GPUs as there are,
or in processes on the CPU. Each process prints the most memory that it held above what it held before the run: of its GPU as
torch counts it, on a CPU the anonymous memory, which no file stands behind, looked at every few milliseconds. The limit is 1/N
of the weights, gradients, momentum and masks, and two blocks with their gradients. `--kinds billion --processes 4` is a Llama
with 1 billion parameters, for 3 steps: it needs 20 GB.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from common import Peak, arguments, machine, place, table, verdict
from made import pictures, word_tokenizer, words
from torch import nn

VOCABULARY, LENGTH, SIZE, CLASSES = 2005, 16, 64, 10
BYTES = 13  # of a weight: itself, its gradient, its momentum, each float32, and its mask
RUN = (
    "--sparse-steps", "2", "--dense-steps", "1", "--lr", "0.01", "--optimizer", "sgd", "--batch-size", "1", "--control", "none",
    "--gate", "none", "--holdout", "0", "--keep", "last", "--set", "phases.1.average=none", "--quiet", "--shard",
)  # fmt: skip
GPUS = torch.cuda.device_count()
SHAPES = {  # width, inner width, blocks
    "llama": (768, 2048, 14),
    "tied": (768, 2048, 14),
    "mixtral": (512, 1024, 8),
    "vit": (768, 3072, 12),
    "billion": (2048, 5632, 20),
}
TINY = (24, 48, 2)


def model_of(kind: str, hidden: int, inner: int, blocks: int) -> nn.Module:
    """Return a model of random weights."""
    import transformers

    heads = max(1, hidden // 64)
    sizes = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": blocks, "num_attention_heads": heads}
    if kind == "vit":
        config = transformers.ViTConfig(**sizes, image_size=SIZE, patch_size=16, num_labels=CLASSES)
        return transformers.ViTForImageClassification(config)
    sizes |= {"vocab_size": VOCABULARY, "max_position_embeddings": 64}
    if kind == "mixtral":
        experts = {"num_key_value_heads": heads, "num_local_experts": 4, "tie_word_embeddings": False}
        return transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, **experts))
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, tie_word_embeddings=kind == "tied"))


def source(folder: Path, kind: str, hidden: int, inner: int, blocks: int) -> tuple[int, int]:
    """Write a model of bfloat16 weights, and return its number of weights and that of one block."""
    from transformers import ViTImageProcessor

    from dsd_refine.training.blocks import repeated_blocks

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = model_of(kind, hidden, inner, blocks)
    torch.set_default_dtype(torch.float32)
    weights, block = (sum(p.numel() for p in module.parameters()) for module in (model, repeated_blocks(model)[0]))
    model.save_pretrained(folder, max_shard_size=weights + 10**6)
    beside = ViTImageProcessor(size={"height": SIZE, "width": SIZE}) if kind == "vit" else word_tokenizer(LENGTH)
    beside.save_pretrained(folder)
    return weights, block


def one_process(folder: Path, out: str, *options: str) -> None:
    """Refine in one of the processes that torchrun started, and print the memory. A tiny model first loads the libraries."""
    torch.set_num_threads(1)
    given = (*RUN, "--device", "cuda" if GPUS > 1 else "cpu", *options)
    refined(folder / "tiny", folder / "data", folder / f"{out}-tiny", *given)
    before = torch.cuda.memory_allocated() if GPUS > 1 else 0
    if GPUS > 1:
        torch.cuda.reset_peak_memory_stats()
    with Peak() as peak:
        code = refined(folder / "model", folder / "data", folder / out, *given)
    most = torch.cuda.max_memory_allocated() - before if GPUS > 1 else peak.bytes
    print(f"process {os.environ['RANK']}: {most} bytes, exit code {code}", flush=True)


def refined(model: Path, data: Path, out: Path, *options: str) -> object:
    """Run the command, and return its exit code."""
    from dsd_refine.cli.app import main as command

    try:
        command([str(model), "--data", str(data), "--output-dir", str(out), *options])
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


def plan(folder: Path, processes: int) -> tuple[str, str]:
    """Return what `plan` says of the memory of one process, and whether the machine holds so many without `--shard`."""
    given = ("--data", folder / "data", "--optimizer", "sgd", "--holdout", "0", "--keep", "last", "--json")
    command = [sys.executable, *map(str, ("-m", "dsd_refine", "plan", folder / "model", *given))]
    launched = {**os.environ, "LOCAL_WORLD_SIZE": str(processes)}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=launched)
    totals = json.loads(done.stdout)["totals"]
    return totals["memory"], totals.get("too large", "")


def measure(folder: Path, kind: str, processes: list[int], quick: bool, options: list[str]) -> None:
    """Print a row for each number of processes."""
    (folder / "data").mkdir(parents=True)
    if kind == "vit":
        pictures(folder / "data", 40, SIZE, CLASSES)
    else:
        (folder / "data/texts.txt").write_text("\n\n".join(words(24, LENGTH)))
        options = ["--max-length", str(LENGTH), *options]
    source(folder / "tiny", kind, *TINY)
    hidden, inner, blocks = SHAPES[kind]
    weights, block = source(folder / "model", kind, hidden, inner, 2 if quick else blocks)
    rows, shares = [], {}
    for count in processes:
        found = max(measured(folder, count, options))
        share = BYTES * weights / count
        limit = share + 2 * 8 * block
        rows.append([str(count), *(f"{number / 1e6:,.0f}" for number in (found, share, limit))])
        shares[count] = found / limit
    memory, too_large = plan(folder, max(processes))
    title = f"{kind}: MB a process, {weights / 1e6:.0f} M weights, {block / 1e6:.1f} M of them in a block"
    title += f" (one process, by plan: {memory})"
    table(title, ["processes", "measured", "1/N of the state", "and two blocks"], rows)
    if too_large:
        print(f"  without --shard, by plan: {too_large}")
    for count, over in shares.items():
        verdict(f"{kind}, {count} processes: measured over the limit", over, 1.0)


def main() -> None:
    """Measure each kind of model."""
    kinds, more = ("llama tied mixtral vit", "kinds of models"), ("", "more options of the command")
    processes = (str(GPUS) if GPUS > 1 else "2 4", "numbers of processes")
    given = arguments(__doc__, 1, kinds=kinds, processes=processes, options=more)
    print(machine())
    for kind in given.kinds.split():
        with place() as folder:
            measure(folder, kind, [int(each) for each in given.processes.split()], given.quick, given.options.split())


if __name__ == "__main__":
    one_process(Path(sys.argv[1]), *sys.argv[2:]) if "RANK" in os.environ else main()

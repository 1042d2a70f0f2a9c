"""What a GPU does: `benchmarks/gpu.sh [PYTHON]`, which keeps the output, or `python benchmarks/gpu.py [--device cpu --quick]`.

ResNet-50 at 224 px and BERT-base at 128 tokens in bf16, channels-last where there are convolutions, plain and under
`torch.compile`: samples a second of a dense and of a sparse step of our loop beside a bare loop, what the mask adds, the share
of the card's own peak in matrix products (measured first), and the most memory. Then the selection of the smallest weights by
counters beside torch's own ways. Then whole commands: fp16 with its loss scaling, bf16, an LSTM through cuDNN whose weights
come back after unmasking, and a run that is stopped and resumed.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from accelerate import Accelerator
from common import ROOT, arguments, machine, place, table
from made import Fixed, layers_of, loop_of, phase_of, pictures, recipe_of, resnet50, stepper, timm_folder
from safetensors.torch import load_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dsd_refine.masking.masks import make_masks, masker
from dsd_refine.masking.selection import all_but_smallest
from dsd_refine.tasks.base import Batch
from dsd_refine.training.optimizer import make_optimizer
from dsd_refine.training.state import Loop, on_device

SPARSITY = 0.3
Step = Callable[[], object]


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(step: Step, device: str, steps: int) -> float:
    synchronize(device)
    began = time.perf_counter()
    for _ in range(steps):
        step()
    synchronize(device)
    return (time.perf_counter() - began) / steps


def peak(device: str, size: int) -> float:
    """Operations a second in bf16 matrix products of size x size, the best of several."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    step = lambda: a @ b  # noqa: E731
    seconds(step, device, 3)
    return 2 * size**3 / min(seconds(step, device, 10) for _ in range(5))


def bert_base(length: int, batch: int) -> tuple[nn.Module, Fixed]:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(num_labels=3))
    ids = torch.randint(5, 30522, (batch, length))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    loss = lambda forward, b: nn.functional.cross_entropy(forward(**b.inputs).logits, b.targets, reduction="sum")  # noqa: E731
    return model, Fixed(inputs, torch.randint(0, 3, (batch,)), loss)


def steps_of(model: nn.Module, task: Fixed, accelerator: Accelerator, compiled: bool) -> dict[str, Step]:
    """A step of a bare loop with our optimizer, and a dense and a sparse step of our loop."""
    model.to(accelerator.device)
    loop = loop_of(model, task, recipe_of(len(task.targets), 1), accelerator=accelerator)
    loop.forward = torch.compile(model) if compiled else model
    optimizer, batch = make_optimizer(loop, phase_of(1)), [task.batch(task, [])]
    first = ["conv1"] if hasattr(model, "conv1") else []
    masks = make_masks(layers_of(model, first=first), dict(model.named_parameters()), SPARSITY)
    mask = masker(masks, loop.parameters)
    model.train()
    return {
        "bare": bare(loop, optimizer, on_device(loop, batch[0])),
        "dense": stepper(loop, phase_of(1), batch, {}, lambda: None, optimizer),
        "sparse": stepper(loop, phase_of(1), batch, masks, mask, optimizer),
    }


def bare(loop: Loop, optimizer: Any, batch: Batch) -> Step:
    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with loop.autocast():
            loss = loop.task.loss(loop.forward, batch)
        (loss / batch.count).backward()
        optimizer.step()

    return step


def operations(step: Step) -> int:
    with FlopCounterMode(display=False) as counter:
        step()
    return int(counter.get_total_flops())


def speed(title: str, make: Callable[[], tuple[nn.Module, Fixed]], given: Any, best: float) -> None:
    """One model's table: plain and compiled."""
    rows, count = [], 1
    for compiled in (False, True):
        model, task = make()
        steps = steps_of(model, task, Accelerator(mixed_precision="bf16", cpu=given.device == "cpu"), compiled)
        if not compiled:
            count = operations(steps["dense"])  # a compiled model's are not seen
        for step in steps.values():
            seconds(step, given.device, 3)
        if given.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        found: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(given.rounds):
            for name, step in steps.items():
                found[name].append(seconds(step, given.device, 2 if given.quick else 10))
        most = torch.cuda.max_memory_allocated() if given.device == "cuda" else 0
        for name, times in found.items():
            took, extra = median(times), over(found, name)
            samples, share = len(task.targets) / took, count / took / best
            shown = f"{name}{', compiled' if compiled else ''}"
            rows.append([shown, f"{samples:.0f}", f"{share:.1%}", extra, f"{most / 2**30:.2f} GiB"])
        del model, task, steps
    table(title, ["step", "samples/s", "of the peak", "adds to the one above", "most memory"], rows)


def over(found: dict[str, list[float]], name: str) -> str:
    """How much time a way takes more than the one before it, in the same rounds."""
    before = {"dense": "bare", "sparse": "dense"}.get(name)
    if before is None:
        return ""
    return f"{median(one / other for one, other in zip(found[name], found[before], strict=True)) - 1:+.2%}"


def selection(given: Any, weights: int) -> None:
    """The smallest 30 % of one large layer: by counters of the bits, as on a GPU, and in torch's own ways."""
    values, count = torch.randn(weights, device=given.device), int(SPARSITY * weights)
    ways: dict[str, Step] = {
        "counters of the bits (ours)": lambda: all_but_smallest(values, count),
        "kthvalue": lambda: values.abs() > values.abs().kthvalue(count).values,
        "sort": lambda: values.abs() > values.abs().sort().values[count - 1],
    }
    agree = [bool(torch.equal(ways["counters of the bits (ours)"](), way())) for way in ways.values()]
    times = {name: median(seconds(way, given.device, 1) for _ in range(given.rounds)) for name, way in ways.items()}
    rows = [[name, f"{1000 * took:.1f}", str(same)] for (name, took), same in zip(times.items(), agree, strict=True)]
    table(f"Selection in a layer of {weights:,} weights", ["way", "ms", "same mask"], rows)


# ------------------------------------------------------------------------------------------------------------ whole commands


def command(given: Any, model: Path, data: Path, out: Path, *options: str) -> list[str]:
    fixed = ["--device", given.device, "--gate", "none", "--control", "none", "--quiet", "--overwrite", "--batch-size", "32"]
    return [sys.executable, str(ROOT / "cli.py"), str(model), "--data", str(data), "-o", str(out), *fixed, *options]


def report(given: Any, model: Path, data: Path, out: Path, *options: str) -> dict[str, Any]:
    done = subprocess.run(command(given, model, data, out, *options), capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"exit code {done.returncode}: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads((out / "dsd/report.json").read_text())
    return found


def checked(what: str, right: bool, shown: str) -> None:
    print(f"  {'right' if right else 'WRONG'}: {what}: {shown}", flush=True)


def precision(given: Any, model: Path, data: Path, folder: Path) -> None:
    """fp16 (with loss scaling) and bf16 train as float32 does, and their outputs pass verify, which every run asks for."""
    phases = ("--sparse-steps", "30", "--dense-steps", "10", "--lr", "0.02")
    kinds = ("no", "bf16") if given.device == "cpu" else ("no", "bf16", "fp16")
    losses = {}
    for kind in kinds:
        found = report(given, model, data, folder / f"out-{kind}", *phases, "--mixed-precision", kind)
        losses[kind] = [phase["loss_last"] for phase in found["phases"]]
    for kind in kinds[1:]:
        near = all(abs(a - b) <= 0.05 * abs(b) + 0.02 for a, b in zip(losses[kind], losses["no"], strict=True))
        checked(f"{kind} trains as float32 does", near, f"losses {losses[kind]} and {losses['no']}")


def recurrent(given: Any, data: Path, folder: Path) -> None:
    """An LSTM's weights are exactly 0 where masked, through cuDNN, and come back after unmasking."""
    import timm
    from timm.models import save_for_hf

    overlay = {
        "input_size": (3, 32, 32),
        "mean": (0.5,) * 3,
        "std": (0.5,) * 3,
        "crop_pct": 1.0,
        "tag": None,
        "hf_hub_id": None,
    }
    shape: dict[str, Any] = {
        "img_size": 32, "layers": (1, 1, 1, 1), "embed_dims": (32,) * 4, "hidden_sizes": (8,) * 4, "patch_sizes": (4, 2, 1, 1),
    }  # fmt: skip
    torch.manual_seed(0)
    model = timm.create_model("sequencer2d_s", num_classes=10, pretrained_cfg_overlay=overlay, **shape)
    names = {"label_names": [f"c{n}" for n in range(10)]}
    save_for_hf(model, str(folder / "lstm"), model_config=names, model_args=shape, safe_serialization=True)
    options = (
        "--sparse-steps",
        "10",
        "--dense-steps",
        "10",
        "--lr",
        "0.02",
        "--sparsity",
        "0.5",
        "--save-phases",
        "--keep",
        "last",
    )
    report(given, folder / "lstm", data, folder / "out-lstm", *options)
    sparse = load_file(next((folder / "out-lstm/dsd/phases").glob("1-*")) / "model.safetensors")
    dense = load_file(folder / "out-lstm/model.safetensors")
    names_of = [name for name in sparse if "rnn" in name and "weight" in name]
    zeros = [sum(float((held[name] == 0).sum()) for name in names_of) for held in (sparse, dense)]
    total = sum(sparse[name].numel() for name in names_of)
    checked("half of every LSTM's weights are 0 after S", zeros[0] == total / 2, f"{zeros[0]:.0f} of {total}")
    checked("they are trained after unmasking", zeros[1] < 0.02 * total, f"{zeros[1]:.0f} zeros left")


def resumed(given: Any, model: Path, data: Path, folder: Path) -> None:
    """A run that is told to stop and resumed ends near the undisturbed one: kernels of a GPU may add in another order."""
    phases = ("--sparse-steps", "60", "--dense-steps", "20", "--lr", "0.01", "--keep", "last")
    report(given, model, data, folder / "whole", *phases)
    out = folder / "stopped"
    child = subprocess.Popen(command(given, model, data, out, *phases), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    log = out.with_name("stopped.partial") / "log.jsonl"
    while child.poll() is None and not (log.is_file() and log.read_text().count('"step"') > 20):
        time.sleep(0.02)
    child.send_signal(signal.SIGTERM)
    child.communicate()
    checked("a stop ends with exit code 4", child.returncode == 4, str(child.returncode))
    report(given, model, data, out, *phases, "--resume")
    one, other = (load_file(path / "model.safetensors") for path in (folder / "whole", out))
    most = max(float((one[name].float() - other[name].float()).abs().max()) for name in one if "num_batches" not in name)
    checked("resumed as undisturbed", most < 1e-2, f"largest difference of a weight {most:.2e}")


def main() -> None:
    given = arguments(__doc__, 7, device=("cuda", "or cpu, to try this script"), only=("", "speed or commands"))
    if given.device == "cuda" and not torch.cuda.is_available():
        sys.exit("torch sees no CUDA device here")
    print(machine())
    print(torch.cuda.get_device_name() if given.device == "cuda" else "no GPU: figures mean nothing")
    if given.only != "commands":
        speeds(given)
    if given.only != "speed":
        commands(given)


def speeds(given: Any) -> None:
    best = peak(given.device, 512 if given.quick else 8192)
    print(f"bf16 matrix products: {best / 1e12:.3g} TFLOP/s")
    small = given.quick
    pixels, images, length, texts = (64, 4, 16, 2) if small else (224, 128, 128, 64)
    speed(f"ResNet-50, {pixels} px, batch {images}, bf16, channels-last", lambda: resnet50(pixels, images), given, best)
    speed(f"BERT-base, {length} tokens, batch {texts}, bf16", lambda: bert_base(length, texts), given, best)
    selection(given, 1_000_000 if small else 100_000_000)


def commands(given: Any) -> None:
    print("\nWhole commands")
    with place() as folder:
        pictures(folder / "data/train", 640, 40)
        pictures(folder / "data/test", 100, 40, seed=1)
        model = timm_folder(folder / "model", "test_resnet", 10, 32)
        precision(given, model, folder / "data", folder)
        recurrent(given, folder / "data", folder)
        resumed(given, model, folder / "data", folder)


if __name__ == "__main__":
    sys.exit(main())

"""What a mask costs a training step: `python benchmarks/step.py [--quick]`.

Of each model a sparse step is held against a dense step of the same model in the same loop, ours and the peers', all with the
same masks, the same fused SGD, no clipping, and memory that stays with the process (NNCF, in its own, as torch leaves it). Ours
against the bare masked loop and the peers is the whole sparse step. A round is the fastest of three steps of each, in turn, in
a process of its own: on a shared machine steps differ by more than is asked for here, and so do processes, by where their
memory lies. Besides: how long the pass over the masked weights takes within its step, and how long everybody's work for the
mask takes alone, on weights that left the cache: what decides where whole steps do not; the dense step measured against itself
shows what these do not tell apart. Memory: the most that a sparse step's tensors take above a dense one's, each in a process of
its own.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from itertools import accumulate
from statistics import median
from typing import Any

import numpy as np
import torch
from common import CLOCK, PEERS, ROOT, arguments, interleaved, machine, middle, missing, ratio, spread, table, verdict
from made import Fixed, layers_of, loop_of, phase_of, recipe_of, resnet50, small_bert, small_gpt2, stepper
from torch import nn
from torch.profiler import ProfilerActivity, profile

from dsd_refine.masking.masks import MASKED_PER_THREAD, Masks, make_masks, masker
from dsd_refine.masking.selection import flat
from dsd_refine.system import keep_freed_memory
from dsd_refine.training.optimizer import make_optimizer

SPARSITY = 0.3
OF = 3  # steps, of which the fastest counts
MODELS = {"resnet50": resnet50, "bert": small_bert, "gpt2": small_gpt2}
SHOWN = {
    "resnet50": "ResNet-50, 128 px, batch 16",
    "bert": "BERT 6 x 384, 48 tokens, batch 32",
    "gpt2": "GPT-2 small of 2 layers, 256 tokens, batch 4",
}
QUICK: dict[str, dict[str, int]] = {
    "resnet50": {"size": 64, "batch": 4}, "bert": {"batch": 4}, "gpt2": {"length": 32, "batch": 1},
}  # fmt: skip
PEER = {"bare masked": "the bare masked loop", "prune": "torch.nn.utils.prune", "ao": "torch.ao.pruning"}
Step = Callable[[], object]


def masks_of(model: nn.Module) -> Masks:
    first = ["conv1"] if hasattr(model, "conv1") else []
    return make_masks(layers_of(model, first=first), dict(model.named_parameters()), SPARSITY)


def ours(model: nn.Module, task: Fixed, masks: Masks) -> tuple[Step, Step, list[float]]:
    """Dense and sparse step of our loop, on one model and one optimizer; and the seconds that each pass took in its step."""
    loop = loop_of(model, task, recipe_of(len(task.targets), 1))
    optimizer = make_optimizer(loop, phase_of(1))
    model.train()
    batch, apply, spent = [task.batch(task, [])], masker(masks, loop.parameters), []

    def passed() -> None:
        began = CLOCK[-1]()
        apply()
        spent.append(CLOCK[-1]() - began)

    dense = stepper(loop, phase_of(1), batch, {}, lambda: None, optimizer)
    return dense, stepper(loop, phase_of(1), batch, masks, passed, optimizer), spent


def work(model: nn.Module, masks: Masks) -> dict[str, Step]:
    """What each way does for the mask in a step, by name: the peers' own, then other ways to make our pass."""
    plain, prune, ao = (copy.deepcopy(model) for _ in range(3))
    return {
        "dsd-refine": masker(masks, dict(model.named_parameters())),
        PEER["bare masked"]: multiplied(plain, masks),
        PEER["prune"]: reparametrized(pruned(prune, masks), masks),
        PEER["ao"]: reparametrized(sparsified(ao, masks), masks),
        **passes(model, masks),
    }


def reparametrized(model: nn.Module, masks: Masks) -> Step:
    """Make every masked weight, and hand a gradient that is there through to what it was made of, as in a whole step."""
    found = [(module, name) for module, name, _ in owners(model, masks)]
    gradients = [torch.rand_like(getattr(module, name).detach()) for module, name in found]

    def run() -> None:
        for module, _ in found:
            for hook in module._forward_pre_hooks.values():
                hook(module, ())
        torch.autograd.backward([getattr(module, name) for module, name in found], gradients)
        model.zero_grad()

    return run


def passes(model: nn.Module, masks: Masks) -> dict[str, Step]:
    """Other ways to make our pass; the masks are bytes where nothing else is said."""
    parameters = dict(model.named_parameters())
    weights = [flat(parameters[name].detach()) for name in masks]
    flags = [flat(mask) for mask in masks.values()]
    bits = [weight.view(torch.int32) for weight in weights]
    wide = [-flag.int() for flag in flags]
    drop = [~flag for flag in flags]
    zero = torch.zeros(())
    size = MASKED_PER_THREAD * torch.get_num_threads()
    blocks = [(x, y) for a, b in zip(bits, flags, strict=True) for x, y in zip(a.split(size), b.split(size), strict=True)]
    buffer = torch.empty(size, dtype=torch.int32)
    arrays = [(weight.numpy(), flag.numpy()) for weight, flag in zip(weights, flags, strict=True)]

    def each(work: Callable[..., object], *lists: Iterable[Any]) -> Step:
        pairs = list(zip(*lists, strict=True))
        return lambda: [work(*pair) for pair in pairs]

    def buffered(x: torch.Tensor, y: torch.Tensor) -> None:
        x.mul_(buffer[: len(y)].copy_(y))

    return {
        "no mask: read and write the weights": lambda: torch._foreach_mul_(weights, 1.0),
        "bits & masks of 4 bytes": each(torch.Tensor.bitwise_and_, bits, wide),
        "flags widened into one buffer, in blocks": each(buffered, *zip(*blocks, strict=True)),
        "torch.where": each(lambda w, m: torch.where(m, w, zero, out=w), weights, flags),
        "masked_fill_": each(lambda w, m: w.masked_fill_(m, 0), weights, drop),
        "one kernel of torch.compile": each(torch.compile(lambda x, y: x.mul_(y), dynamic=True), bits, flags),
        "numpy, one thread": each(lambda w, m: np.multiply(w, m, out=w), *zip(*arrays, strict=True)),
    }


def alone(ways: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    """Seconds of each way, the cache emptied before."""
    others = torch.zeros(1 << 27)  # 512 MB
    found: dict[str, list[float]] = {}
    for _ in range(rounds):
        for name, run in ways.items():
            others.add_(1)
            began = CLOCK[-1]()
            run()
            found.setdefault(name, []).append(CLOCK[-1]() - began)
    return found


def bare(model: nn.Module, task: Fixed, after: Callable[[], object] = lambda: None) -> Step:
    """A step as one writes it: forward, backward, step, and what comes after."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, fused=True)
    batch = task.batch(task, [])

    def step() -> None:
        optimizer.zero_grad()
        (task.loss(model, batch) / len(task.targets)).backward()
        optimizer.step()
        after()

    return step


def multiplied(model: nn.Module, masks: Masks) -> Callable[[], object]:
    """What a bare masked loop does after its step."""
    pairs = [(dict(model.named_parameters())[name], mask) for name, mask in masks.items()]

    @torch.no_grad()
    def apply() -> None:
        for parameter, mask in pairs:
            parameter.mul_(mask)

    return apply


def owners(model: nn.Module, masks: Masks) -> list[tuple[nn.Module, str, torch.Tensor]]:
    return [(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], mask) for name, mask in masks.items()]


def pruned(model: nn.Module, masks: Masks) -> nn.Module:
    """torch.nn.utils.prune: weight = weight_orig * mask before every forward."""
    from torch.nn.utils import prune

    for module, name, mask in owners(model, masks):
        prune.custom_from_mask(module, name, mask)
    return model


def sparsified(model: nn.Module, masks: Masks) -> nn.Module:
    """torch.ao.pruning: a parametrization that multiplies by the mask; the sparsifier's own masks are replaced by ours."""
    from torch.ao.pruning import WeightNormSparsifier

    sparsifier = WeightNormSparsifier(sparsity_level=SPARSITY, sparse_block_shape=(1, 1), zeros_per_block=1)
    sparsifier.prepare(model, [{"tensor_fqn": name} for name in masks])
    for module, name, mask in owners(model, masks):
        module.parametrizations[name][0].mask.copy_(mask)
    return model


Build = Callable[[nn.Module, Fixed, Masks], Step]
BUILT: dict[str, tuple[Build, Build]] = {
    "ours": (lambda model, task, masks: ours(model, task, {})[0], lambda model, task, masks: ours(model, task, masks)[1]),
    "masked": (lambda m, task, _: bare(m, task), lambda m, task, masks: bare(m, task, multiplied(m, masks))),
    "prune": (lambda m, task, _: bare(m, task), lambda m, task, masks: bare(pruned(m, masks), task)),
    "ao": (lambda m, task, _: bare(m, task), lambda m, task, masks: bare(sparsified(m, masks), task)),
}


def said(mode: str, what: str, given: argparse.Namespace, python: Any = sys.executable, **environment: str) -> Any:
    """What this script answers in a process of its own."""
    flags = [f"--{name}" for name in ("quick", "cpu") if getattr(given, name)]
    command = [str(python), __file__, f"--{mode}", what, *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | environment)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1][:80])
    return json.loads(done.stdout.strip().splitlines()[-1])


def extra(kind: str, way: str, given: argparse.Namespace) -> float:
    """Bytes per masked weight that a sparse step holds above a dense one, at the most."""
    dense, sparse = (said("held", f"{kind},{way},{what}", given) for what in ("dense", "sparse"))
    return float((sparse[0] - dense[0]) / sparse[1])


def held(kind: str, way: str, what: str, quick: bool) -> tuple[int, int]:
    """(the most bytes of tensors in two steps, above the model, as torch itself counts them; weights in masked layers).

    A peer that copies the masks does not count ours. The Python objects of our views, some hundred, are not in it. What the
    system says of the process is no measure of this: from one process to the next it differs by more than a mask.
    """
    model, task = MODELS[kind](**(QUICK[kind] if quick else {}))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        masks = masks_of(model)
        size = sum(mask.numel() for mask in masks.values())
        step = BUILT[way][what == "sparse"](model, task, masks if what == "sparse" else {})
        del masks
        step()
        step()
    assert seen.profiler is not None
    events: Any = seen.profiler.kineto_results
    return max(accumulate(event.nbytes() for event in events.events() if event.name() == "[memory]")), size


def turn(kind: str, given: argparse.Namespace) -> dict[str, float]:
    """Seconds of the fastest step of each way, and what share of ours the pass took."""
    keep_freed_memory()
    model, task = MODELS[kind](**(QUICK[kind] if given.quick else {}))
    masks = masks_of(model)
    model = copy.deepcopy(model)  # as the others have theirs
    copies = {name: copy.deepcopy(model) for name in ("bare", "prune", "ao")}
    ways: dict[str, Step] = {}
    ways["dense"], ways["sparse"], spent = ours(model, task, masks)
    ways["bare dense"] = bare(copies["bare"], task)
    ways["bare masked"] = bare(copies["bare"], task, multiplied(copies["bare"], masks))
    ways["prune"] = bare(pruned(copies["prune"], masks), task)
    ways["ao"] = bare(sparsified(copies["ao"], masks), task)
    ways["again"] = ways["dense"]
    times = interleaved(ways, OF)
    took = median(seconds / step for seconds, step in zip(spent[-OF:], times["sparse"], strict=True))
    return {name: min(found) for name, found in times.items()} | {"pass": took}


def nncf(kind: str, given: argparse.Namespace) -> dict[str, float]:
    """The same of NNCF, in the peers' environment."""
    import nncf

    model, task = MODELS[kind](**(QUICK[kind] if given.quick else {}))
    plain = bare(copy.deepcopy(model), task)
    scopes = {"patterns": ["^conv1.*"]} if kind == "resnet50" else {"types": ["embedding"]}
    model.to(memory_format=torch.contiguous_format)  # it cannot select in channels-last weights
    found = nncf.prune(
        model, mode=nncf.PruneMode.UNSTRUCTURED_MAGNITUDE_LOCAL, ratio=SPARSITY, ignored_scope=nncf.IgnoredScope(**scopes),
        examples_inputs=task.inputs["x"] if "x" in task.inputs else dict(task.inputs),
    )  # fmt: skip
    if kind == "resnet50":
        found.to(memory_format=torch.channels_last)
    times = interleaved({"dense": plain, "sparse": bare(found, task)}, OF)
    return {f"nncf {name}": min(seconds) for name, seconds in times.items()}


def why_no_nncf(kind: str, given: argparse.Namespace) -> str | None:
    if kind == "gpt2":
        return "masks no Conv1D, and the tied embedding"
    if not list(PEERS.glob("lib/*/site-packages/nncf")):
        return missing("nncf")
    try:
        by_nncf(kind, given)
    except RuntimeError as error:
        return f"does not run: {error}"
    return None


def by_nncf(kind: str, given: argparse.Namespace) -> dict[str, float]:
    """A turn of NNCF in the peers' environment, where it is told to send no usage reports (CI)."""
    found: dict[str, float] = said("nncf", kind, given, PEERS / "bin/python", PYTHONPATH=str(ROOT), CI="true")
    return found


def measure(kind: str, given: argparse.Namespace) -> None:
    """One model's table."""
    model, _ = MODELS[kind](**(QUICK[kind] if given.quick else {}))
    masks = masks_of(model)
    weights = sum(mask.numel() for mask in masks.values())
    no_nncf = why_no_nncf(kind, given)
    turns = [said("turn", kind, given) | ({} if no_nncf else by_nncf(kind, given)) for _ in range(given.rounds)]
    times = {name: [one[name] for one in turns] for name in turns[0]}
    took = median(times.pop("pass"))
    memory = {way: extra(kind, way, given) for way in BUILT}
    other = alone(work(model, masks), given.rounds)

    def line(name: str, way: str, base: str, key: str) -> list[str]:
        against = "" if way == "sparse" else ratio(times, "sparse", way)
        return [name, ratio(times, way, base), against, f"{memory[key]:.2f}"]

    table(
        f"{SHOWN[kind]}: {weights / 1e6:.1f} M weights in masked layers, dense step {median(times['dense']):.2f} s",
        ["", "sparse / own dense step", "ours / this one, sparse step", "extra bytes a weight"],
        [
            line("dsd-refine", "sparse", "dense", "ours"),
            *(line(shown, way, "bare dense", "masked" if way == "bare masked" else way) for way, shown in PEER.items()),
            ["NNCF magnitude", no_nncf or ratio(times, "nncf sparse", "nncf dense"), "", ""],
        ],
    )
    itself = ratio(times, "again", "dense")
    print(f"  the dense step against itself, as one way more: {itself}; what whole steps do not tell apart")
    print(f"  the pass over the masked weights takes {took:.2%} of a sparse step, measured within it")
    whole("sparse / dense step", times, "dense", 1.01)
    verdict("sparse step / the same step without its pass", 1 / (1 - took), 1.01)
    verdict("extra bytes a weight", memory["ours"], 1.0)
    for way, shown in PEER.items():
        whole(f"ours / {shown}", times, way, 1.0)
    if not no_nncf:
        verdict(
            "sparse / dense against NNCF's", middle(times, "sparse", "dense") / middle(times, "nncf sparse", "nncf dense"), 1.0
        )
    dense = median(times["dense"])
    rows = [
        [name, f"{median(found) * 1e3:.1f}", f"{median(found) / dense:.2%}", ratio(other, name, "dsd-refine")]
        for name, found in other.items()
    ]
    table("the work for the mask alone, weights not in the cache", ["", "ms", "of a dense step", "/ ours"], rows)
    print("  the limit: every masked weight is read and written once, the row without a mask, and flags of a byte are widened")
    for shown in PEER.values():
        verdict(f"the work for the mask alone, ours / {shown}", middle(other, "dsd-refine", shown), 1.0)


def whole(what: str, times: dict[str, list[float]], base: str, limit: float) -> None:
    """A verdict on whole steps of ours, and whether there were enough rounds on a quiet enough machine for one."""
    verdict(what, middle(times, "sparse", base), limit)
    low, high = spread(times, "sparse", base)
    if low < limit < high:
        print(f"    not decided by these rounds: the quartiles are {low:.3f} and {high:.3f}")


def main() -> None:
    apart = "in a process of its own"
    given = arguments(
        __doc__, 9, models=("resnet50,bert,gpt2", "which, by comma"), turn=("", apart), nncf=("", apart), held=("", apart)
    )
    if given.turn or given.nncf:
        print(json.dumps(turn(given.turn, given) if given.turn else nncf(given.nncf, given)))
    elif given.held:
        print(json.dumps(held(*given.held.split(","), given.quick)))
    else:
        print(machine())
        for kind in given.models.split(","):
            measure(kind, given)


if __name__ == "__main__":
    sys.exit(main())

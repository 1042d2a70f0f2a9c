"""Making masks: `python benchmarks/masks.py [--quick]`.

All masks of ResNet-50, BERT-base and a decoder of a thousand million weights, made layer by layer, at 30 %: seconds, and the
most memory held besides weights and mask, against the peers that are exact too (same masks, ties included): numpy's `partition`
and `argpartition`, torch's `kthvalue`, `topk` and `sort`. The last three are measured on one layer of each shape of the largest
model and scaled by weights, since they take minutes there.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from statistics import median

import numpy as np
import torch
from common import CLOCK, Peak, arguments, interleaved, machine, ratio, table, verdict
from made import EMPTY, layers_of
from torch import nn

from dsd_refine.masking.layers import Layer, TensorSlice, masked_count
from dsd_refine.masking.masks import make_masks

SPARSITY = 0.3
Shape = tuple[int, ...]
Way = Callable[[torch.Tensor, int], torch.Tensor]


def ours(values: torch.Tensor, count: int) -> torch.Tensor:
    """Through `make_masks`, as a run does."""
    layer = Layer("w", tuple(values.shape), (TensorSlice("w", EMPTY, EMPTY),))
    return make_masks([layer], {"w": values}, SPARSITY)["w"]


def partition(values: torch.Tensor, count: int) -> torch.Tensor:
    score = np.abs(values.numpy()).ravel()
    threshold = np.partition(score, count - 1)[count - 1]
    keep = score >= threshold
    keep[np.flatnonzero(score == threshold)[: count - int((~keep).sum())]] = False
    return torch.from_numpy(keep).reshape(values.shape)


def argpartition(values: torch.Tensor, count: int) -> torch.Tensor:
    """Exact where there are no ties at the border, as in random weights."""
    score = np.abs(values.numpy()).ravel()
    keep = np.ones(len(score), dtype=bool)
    keep[np.argpartition(score, count - 1)[:count]] = False
    return torch.from_numpy(keep).reshape(values.shape)


def kthvalue(values: torch.Tensor, count: int) -> torch.Tensor:
    return _from(values, lambda score: torch.kthvalue(score, count).values, count)


def sort(values: torch.Tensor, count: int) -> torch.Tensor:
    return _from(values, lambda score: torch.sort(score).values[count - 1], count)


def topk(values: torch.Tensor, count: int) -> torch.Tensor:
    return _from(values, lambda score: torch.topk(score, count, largest=False, sorted=False).values.max(), count)


def _from(values: torch.Tensor, threshold_of: Callable[[torch.Tensor], torch.Tensor], count: int) -> torch.Tensor:
    score = values.abs().reshape(-1)
    threshold = threshold_of(score)
    keep = score >= threshold
    keep[(score == threshold).nonzero().reshape(-1)[: count - int((~keep).sum())]] = False
    return keep.reshape(values.shape)


WAYS: dict[str, Way] = {
    "dsd-refine": ours, "numpy partition": partition, "numpy argpartition": argpartition, "torch kthvalue": kthvalue,
    "torch topk": topk, "torch sort": sort,
}  # fmt: skip
FAST = ("dsd-refine", "numpy partition", "numpy argpartition")


def shapes_of(model: nn.Module, first: tuple[str, ...] = ()) -> list[Shape]:
    return [layer.shape for layer in layers_of(model, first=first) if layer.excluded is None]


def resnet50() -> list[Shape]:
    import timm

    with torch.device("meta"):
        return shapes_of(timm.create_model("resnet50"), ("conv1",))


def bert_base() -> list[Shape]:
    from transformers import BertConfig, BertForSequenceClassification

    with torch.device("meta"):
        return shapes_of(BertForSequenceClassification(BertConfig()))


def decoder() -> list[Shape]:
    """1.0e9 weights: 20 layers, 2048 wide, 5504 in the middle."""
    return [*[(2048, 2048)] * 4, (5504, 2048), (5504, 2048), (2048, 5504)] * 20


def weights(shape: Shape, seed: int) -> torch.Tensor:
    return torch.empty(shape).normal_(0, 0.02, generator=torch.Generator().manual_seed(seed))


def walk(shapes: list[Shape], way: Way) -> Callable[[], None]:
    """Every layer's mask; the weights are made as they are needed, outside the time."""

    def seconds_of(shape: Shape, seed: int) -> float:
        values = weights(shape, seed)
        began = CLOCK[-1]()
        way(values, masked_count(values.numel(), SPARSITY))
        return CLOCK[-1]() - began

    def run() -> None:
        run.seconds = sum(seconds_of(shape, seed) for seed, shape in enumerate(shapes))  # type: ignore[attr-defined]

    return run


def memory(shapes: list[Shape], way: Way) -> float:
    """The most that is held besides the weights and the mask while the largest layer's is made, as a multiple of that layer."""
    largest = max(shapes, key=lambda shape: torch.Size(shape).numel())
    values = weights(largest, 0)
    count = masked_count(values.numel(), SPARSITY)
    way(values, count)
    with Peak() as peak:
        way(values, count)
    return (peak.bytes - values.numel()) / (4 * values.numel())


def agree(shapes: list[Shape]) -> bool:
    """Do all ways make the same masks, also where many weights are equal?"""
    for shape in dict.fromkeys(shapes):
        for values in (weights(shape, 0), (weights(shape, 1) * 50).round()):
            count = masked_count(values.numel(), SPARSITY)
            exact = [way for name, way in WAYS.items() if name not in ("numpy argpartition", "torch sort", "torch topk")]
            if len({way(values, count).numpy().tobytes() for way in exact}) > 1:
                return False
    return True


def timed(shapes: list[Shape], names: tuple[str, ...], rounds: int) -> dict[str, list[float]]:
    """Seconds of each way over all layers, round by round."""
    walks = {name: walk(shapes, WAYS[name]) for name in names}
    found: dict[str, list[float]] = {name: [] for name in names}

    def recorded(name: str) -> Callable[[], None]:
        def run() -> None:
            walks[name]()
            found[name].append(walks[name].seconds)  # type: ignore[attr-defined]

        return run

    interleaved({name: recorded(name) for name in names}, rounds, warm=0)
    return found


def measure(title: str, shapes: list[Shape], rounds: int, few: list[Shape] | None = None) -> None:
    """One model's table. `few`: layers that stand for all of them, for the slow ways."""
    total = sum(torch.Size(shape).numel() for shape in shapes)
    names = FAST if few else tuple(WAYS)
    times = timed(shapes, names, rounds)
    if few:
        scale = total / sum(torch.Size(shape).numel() for shape in few)
        slow = timed(few, ("dsd-refine", *(name for name in WAYS if name not in FAST)), min(rounds, 3))
        times |= {name: [seconds * scale for seconds in slow[name]] for name in WAYS if name not in FAST}
    rows = []
    for name in WAYS:
        shown = (
            ratio(times, "dsd-refine", name) if name in names else f"{median(times['dsd-refine']) / median(times[name]):.3f}"
        )
        held = f"{memory(shapes, WAYS[name]):.2f}"
        rows.append([name, f"{median(times[name]):.3f}", f"{1e9 * median(times[name]) / total:.2f}", shown, held])
    head = ["", "seconds", "ns a weight", "ours / this one", "memory, x the largest layer"]
    table(f"{title}: {total / 1e6:.0f} M weights, {len(shapes)} layers", head, rows)
    best = max(
        median(a / b for a, b in zip(times["dsd-refine"], times[name], strict=True)) for name in names if name != "dsd-refine"
    )
    verdict("ours / the fastest exact peer", best, 1.0)
    verdict("memory, x the largest layer", memory(shapes, ours), 2.0)


def main() -> None:
    given = arguments(__doc__, 7)
    print(machine())
    small = list(Counter(resnet50()))
    print(f"\nsame masks from all exact ways, many equal weights included: {'yes' if agree(small) else 'NO'}")
    measure("ResNet-50", small if given.quick else resnet50(), given.rounds)
    measure("BERT-base", list(Counter(bert_base())) if given.quick else bert_base(), given.rounds)
    few = list(Counter(decoder()))
    measure("Decoder of a thousand million", few if given.quick else decoder(), given.rounds, few)


if __name__ == "__main__":
    sys.exit(main())

"""Reports, logs and pictures as a run leaves them, made without a run."""

from __future__ import annotations

import copy
import math
from typing import Any

HOSTILE = """<script>alert(1)</script>"'><svg onload=alert(2)><g/></svg>&amp;\u202e{{ 7*7 }}{% raw %}`|[x](http://e.example/)"""


def comparison(delta: float, low: float, high: float, p: float, gained: int | None, lost: int | None) -> dict[str, Any]:
    test = "paired-bootstrap" if gained is None else "mcnemar-exact"
    return {
        "delta": delta, "ci95": [low, high], "p_value": p, "p_adjusted": min(1.0, 2 * p), "gained": gained, "lost": lost,
        "test": test,
    }  # fmt: skip


def layer(name: str, shape: list[int], excluded: str | None = None) -> dict[str, Any]:
    weights = math.prod(shape)
    masked = 0 if excluded else round(0.3 * weights)
    return {
        "name": name, "shape": shape, "weights": weights, "source_zeros": 0, "masked": masked,
        "zeros_in_sparse": masked, "excluded": excluded,
    }  # fmt: skip


def phase(arm: str, kind: str, holdout: dict[str, float] | None) -> dict[str, Any]:
    sparse = kind == "sparse"
    return {
        "arm": arm, "kind": kind, "sparsity": 0.3 if sparse else None, "measured_sparsity": 0.3 if sparse else 0.0,
        "epochs": 2.0, "optimizer_steps": 40, "samples": 2560, "lr_first": 0.01, "lr_peak": 0.01, "lr_last": 1e-05,
        "loss_first": 0.4, "loss_last": 0.2, "seconds": 3.25, "samples_per_second": 787.7, "holdout": holdout, "seed": 0,
        "batchnorm_reestimated": None,
    }  # fmt: skip


def report(**changes: Any) -> dict[str, Any]:
    """report.json of a finished image classification: 1,000 rows, one control, verdict better."""
    holdout = {"accuracy": 0.91, "loss": 0.3}
    made: dict[str, Any] = {
        "schema": 1,
        "argv": ["run", "org/net@v1", "--data", "pictures", "-o", "out dir"],
        "seed": 0,
        "exit_code": 0,
        "environment": {"python": "3.11.7", "torch": "2.14.1", "device": "cpu", "processes": 1},
        "source": {
            "model": "org/net@v1", "resolved": "org/net", "revision": "0123456789abcdef0123456789abcdef01234567",
            "library": "timm", "files": [{"name": "model.safetensors", "sha256": "a" * 64}],
        },
        "output": {"path": "out dir", "files": [{"name": "model.safetensors", "sha256": "b" * 64}]},
        "task": "image-classification",
        "metric": {"name": "accuracy", "higher_is_better": True},
        "labels": {"model": ["cat", "dog"], "data": ["cat", "dog"], "rule": "by name"},
        "data": {
            "train": {"rows": 5000, "skipped": [], "fingerprint": "c" * 64},
            "holdout": {"rows": 500, "skipped": [], "fingerprint": "d" * 64},
            "eval": {"rows": 1000, "skipped": [], "fingerprint": "e" * 64},
        },
        "phases": [phase(arm, kind, holdout) for arm in ("refined", "dense") for kind in ("sparse", "dense")],
        "layers": [
            layer("conv1.weight", [16, 3, 3, 3], "the first layer: it sees the input"),
            layer("conv2.weight", [32, 16, 3, 3]),
            layer("fc.weight", [10, 32]),
            layer("fc.bias", [10], "1-D parameter"),
        ],
        "masked_share": 0.29,
        "maskable_share": 0.91,
        "arms": {
            "baseline": {"accuracy": 0.9, "loss": 0.35},
            "refined": {"accuracy": 0.93, "loss": 0.3},
            "dense": {"accuracy": 0.925, "loss": 0.31},
        },
        "comparison": {
            "refined_vs_baseline": comparison(0.03, 0.015, 0.041, 1e-05, 40, 10),
            "refined_vs_dense": comparison(0.005, -0.006, 0.015, 0.4, 20, 15),
        },
        "verdict": "better",
        "gate": {"rule": "not-worse", "passed": True},
        "selected": {"sparsity": 0.3, "epoch": 2},
        "warnings": [],
        "credit": "training",
        "rows_to_decide": None,
        "seeds": None,
        "cost": {"seconds": 13.0, "samples": 10_240, "energy_joules": 540.0},
    }  # fmt: skip
    return copy.deepcopy(made) | changes


def loss_report(**changes: Any) -> dict[str, Any]:
    """report.json of a language model: a loss, bootstrapped, no holdout, no labels, nothing decided, the gate not met."""
    arms = {
        "baseline": {"loss": 3.2, "perplexity": 24.5},
        "refined": {"loss": 3.25, "perplexity": 25.8},
        "dense": {"loss": 3.1, "perplexity": 22.2},
    }
    made = report(
        task="causal-lm", metric={"name": "loss", "higher_is_better": False}, labels=None, arms=arms, exit_code=3,
        comparison={
            "refined_vs_baseline": comparison(-0.05, -0.12, 0.02, 0.2, None, None),
            "refined_vs_dense": comparison(-0.15, -0.2, -0.1, 0.001, None, None),
        },
        verdict="inconclusive", gate={"rule": "better", "passed": False}, selected={"sparsity": None, "epoch": 0},
        rows_to_decide=5400, warnings=["something is odd"], credit="none",
        phases=[phase("refined", kind, None) for kind in ("sparse", "dense")],
    )  # fmt: skip
    made["source"] |= {"model": "./net", "resolved": "/home/someone/net", "revision": None, "library": "transformers"}
    made["data"]["holdout"] = None
    return made | changes


def seeds_of(report: dict[str, Any], n: int = 3) -> dict[str, Any]:
    """A `seeds` entry that goes with a report."""
    metric = report["metric"]["name"]
    spread = {"mean": 0.92, "deviation": 0.004, "values": [0.92] * n}
    return {
        "n": n,
        "arms": {arm: {metric: spread} for arm in report["arms"] if arm != "baseline"},
        "comparison": {
            name: {"delta": 0.02, "ci95": [0.01, 0.03], "deviation": 0.004} for name in report["comparison"]
        },
    }  # fmt: skip


def log(
    labels: tuple[str, ...] = ("refined", "dense"), steps: int = 40, looks: int = 2, best: str = ""
) -> list[dict[str, Any]]:
    """Lines of log.jsonl: two phases of `steps` steps for each label; the holdout likes `best` most."""
    lines: list[dict[str, Any]] = [
        {"event": "evaluation", "arm": "baseline", "phase": None, "step": None, "epoch": None, "part": "eval", "accuracy": 0.9}
    ]
    for label in labels:
        for number, kind in enumerate(("dense" if label.startswith("dense") else "sparse", "dense"), 1):
            at = {"arm": label, "phase": f"{number}-{kind}"}
            for step in range(1, steps + 1):
                loss = 0.2 + math.exp(-step / steps) + 0.1 * math.sin(7 * step)
                rate = 0.01 * (1 - step / (steps + 1)) / number
                lines.append(
                    {"event": "step", **at, "step": step, "epoch": step / 20, "lr": rate, "loss": loss, "samples": 64, "skipped": False}
                )  # fmt: skip
            for look in range(1, looks + 1):
                found = {"accuracy": 0.9 + 0.01 * look + (0.05 if label == best else 0), "loss": 0.3}
                lines.append(
                    {"event": "evaluation", **at, "step": steps * look // looks, "epoch": 1.0, "part": "holdout", **found}
                )
    return lines


def pictures(names: tuple[str, ...] = ("conv2.weight",), bins: int = 64) -> dict[str, list[dict[str, Any]]]:
    """Histograms at the five moments, as `dsd_refine.masking.histograms` makes them."""
    bell = [round(1000 * math.exp(-(((i - bins / 2 + 0.5) / (bins / 5)) ** 2))) for i in range(bins)]
    cut = [0 if abs(i - bins / 2 + 0.5) < bins / 12 else n for i, n in enumerate(bell)]
    zeros = sum(bell) - sum(cut)
    found = [
        ("start", bell, 0),
        ("pruned", cut, zeros),
        ("after S", cut, zeros),
        ("unmasked", cut, zeros),
        ("after re-D", bell, 0),
    ]
    return {
        name: [
            {"moment": moment, "edges": [-0.2, 0.2], "counts": counts, "mean_abs": 0.05, "zeros": none}
            for moment, counts, none in found
        ]
        for name in names
    }


def recipe(**changes: Any) -> str:
    import yaml

    made = {"name": "net", "data": "/home/someone/pictures", "margin": 0.005, "phases": [{"kind": "sparse", "lr": 0.01}]}
    return yaml.safe_dump(made | changes, sort_keys=False)


def predictions(gained: int = 40, lost: int = 10, rows: int = 1000, text: str = "cat") -> Any:
    """A table as predictions.parquet has it: of `rows` rows, the first are gained, the next lost, the rest are right."""
    import pyarrow as pa

    before = [0.0] * gained + [1.0] * (rows - gained)
    after = [1.0] * gained + [0.0] * lost + [1.0] * (rows - gained - lost)
    columns: dict[str, Any] = {"row": [f"{text}/{row}.png" for row in range(rows)], "target": [text] * rows}
    for arm, scores in (("baseline", before), ("refined", after)):
        columns |= {f"prediction_{arm}": [text if right else f"no {text}" for right in scores]}
        columns |= {f"score_{arm}": scores, f"count_{arm}": [1] * rows}
    return pa.table(columns)

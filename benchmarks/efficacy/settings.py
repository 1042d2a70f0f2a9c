"""The settings that the search tries: changes to the recipe of a task, as data.

A setting is `{name: {field of a recipe: value}}`. Rates are those of the first phase; all phases of a setting together have
the task's length.
"""

from __future__ import annotations

from typing import Any

Changes = dict[str, Any]

TEACHER = {"weight": 0.5, "temperature": 2.0}
EMA_DECAY = 0.98  # the last fifty steps count most
MASK = ("sparsity", "criterion", "threshold", "ramp", "refresh")  # the fields of a phase that speak of its mask
CHOSEN = {"holdout": 0.1, "keep": "best"}  # the end of these is chosen by a holdout of the rows that train
EMA = {"average": "ema", "ema_decay": EMA_DECAY}


def averaged(rate: float | str, length: float, **more: Any) -> Changes:
    """Train on at a constant rate; the result is the mean of the weights at the epochs' ends (SWA)."""
    return {"phases": [{"kind": "dense", "epochs": length, "lr": rate, "schedule": "constant", "average": "swa"} | more]}


def masked(rate: float, length: float, sparsity: float = 0.3, dense: float = 0.1, **last: Any) -> Changes:
    """DSD: half the length under the mask, half without it at `dense` times the rate. `last` changes the last phase."""
    first = {"kind": "sparse", "epochs": length / 2, "lr": rate, "sparsity": sparsity}
    return {"phases": [first, {"kind": "dense", "epochs": length / 2, "lr": dense * rate} | last]}


def masked_average(rate: float, length: float, sparsity: float = 0.3, share: float = 0.5, dense: float = 0.5) -> Changes:
    """DSD whose last phase is averaged at a constant rate. `share` of the length is under the mask."""
    last = {"epochs": length * (1 - share), "schedule": "constant", "average": "swa"}
    changes = masked(rate, length, sparsity, dense, **last)
    changes["phases"][0] |= {"epochs": length * share, "schedule": "constant"}
    return changes


def average_under_mask(rate: float, length: float, sparsity: float = 0.3) -> Changes:
    """The mean is taken under the mask; a short last phase at a low rate lets the masked weights return."""
    first = {
        "kind": "sparse",
        "epochs": 0.75 * length,
        "lr": rate,
        "sparsity": sparsity,
        "schedule": "constant",
        "average": "swa",
    }
    return {"phases": [first, {"kind": "dense", "epochs": 0.25 * length, "lr": 0.1 * rate}]}


def settings(rate: float, length: float, average: str, *, light_crop: bool) -> dict[str, Changes]:
    """Return the settings around a rate, the most telling first.

    Args:
        rate: The rate around which the others lie.
        length: The length of all phases together, in epochs.
        average: How weights are averaged: "swa" or "ema".
        light_crop: Whether a light augmentation of images is tried.
    """
    found = {
        "average, rate auto": averaged("auto", length),
        "dsd 50 % for a quarter + average, rate auto": with_rate(masked_average(1, length, 0.5, 0.25, 1.0), "auto"),
        "average, x1": averaged(rate, length),
        "average, x0.25": averaged(rate / 4, length),
        "average, x4": averaged(4 * rate, length),
        "dsd 30 %, x1": masked(rate, length),
        "dsd 30 %, x0.25": masked(rate / 4, length),
        "dsd 30 %, x4": masked(4 * rate, length),
        "dsd 30 % + average, x1": masked_average(rate, length, 0.3),
        "dsd 50 % + average, x1": masked_average(rate, length, 0.5),
        "dsd 80 % + average, x1": masked_average(rate, length, 0.8),
        "dsd 30 % for a quarter + average at the full rate, x1": masked_average(rate, length, 0.3, 0.25, 1.0),
        "dsd 50 % for a quarter + average at the full rate, x1": masked_average(rate, length, 0.5, 0.25, 1.0),
        "dsd 80 % for a quarter + average at the full rate, x1": masked_average(rate, length, 0.8, 0.25, 1.0),
        "dsd 90 % for a quarter + average at the full rate, x1": masked_average(rate, length, 0.9, 0.25, 1.0),
        "dsd 80 % for half + average at the full rate, x1": masked_average(rate, length, 0.8, 0.5, 1.0),
        "average + distill, x1": taught(averaged(rate, length)),
        "dsd 30 % + average + distill, x1": taught(masked_average(rate, length)),
        "average under the mask 30 %, x1": average_under_mask(rate, length),
        "average under the mask 50 %, x1": average_under_mask(rate, length, 0.5),
        "ema, x1": averaged(rate, length, average="ema", ema_decay=EMA_DECAY),
        "average, x1, half the length": averaged(rate, length / 2),
        "average, x1, twice the length": averaged(rate, 2 * length),
        "dsd 30 % + average, x0.25": masked_average(rate / 4, length),
        "dsd 30 % + average, x4": masked_average(4 * rate, length),
    }
    found |= levers(rate, length)
    if light_crop:
        light = {"augment": {"crop": "random-resized", "scale": [0.75, 1.0], "flip": 0.0}}
        strong = {"augment": {"crop": "random-resized", "flip": 0.5}}
        found["average + strong crop and flips, x1"] = averaged(rate, length) | strong
        found["average + light crop, x1"] = averaged(rate, length) | light
        found["average + light crop, x1, twice the length"] = averaged(rate, 2 * length) | light
        found["dsd 30 % + average + light crop, x1"] = masked_average(rate, length) | light
        found["dsd 50 % for a quarter + average at the full rate + light crop, x1"] = (
            masked_average(rate, length, 0.5, 0.25, 1.0) | light
        )
        found["dsd 80 % for a quarter + average at the full rate + light crop, x1"] = (
            masked_average(rate, length, 0.8, 0.25, 1.0) | light
        )
    return found if average == "swa" else {name: by_steps(changes) for name, changes in found.items()}


def levers(rate: float, length: float) -> dict[str, Changes]:
    """Return the settings that differ from "dsd 50 % for a quarter + average at the full rate, x1" in one thing."""

    def changed(number: int, **more: Any) -> Changes:
        changes = masked_average(rate, length, 0.5, 0.25, 1.0)
        changes["phases"][number] |= more
        return changes

    rounds = [phase for _ in range(3) for phase in masked(rate, length / 3, 0.5, 1.0)["phases"]]
    return {
        "lever: saliency": changed(0, criterion="saliency"),
        "lever: global threshold": changed(0, threshold="global"),
        "lever: masked weights return to the source's values": changed(1, restore="source"),
        "lever: gradual mask": changed(0, ramp=0.8, refresh="every 10 steps"),
        "lever: sharpness-aware average": changed(1, sam=0.05),
        "lever: average of three rounds, holdout": {"phases": rounds, "average": "rounds"} | CHOSEN,
        "lever: interpolated with the source, holdout": changed(1) | {"interpolate": [0.5]} | CHOSEN,
        "lever: soup of three seeds, holdout": changed(1) | {"seeds": 3, "soup": "greedy"} | CHOSEN,
    }


def with_rate(changes: Changes, rate: float | str) -> Changes:
    """Give every phase this rate."""
    return changes | {"phases": [phase | {"lr": rate} for phase in changes["phases"]]}


def by_steps(changes: Changes) -> Changes:
    """Average over the steps in place of the epochs."""
    phases = [phase | EMA if phase.get("average") == "swa" else phase for phase in changes["phases"]]
    return changes | {"phases": phases}


def taught(changes: Changes) -> Changes:
    """Learn from the source beside the labels, in every phase."""
    return changes | {"phases": [phase | {"distill": TEACHER} for phase in changes["phases"]]}


def as_arm(changes: Changes, arm: str) -> Changes:
    """Return the changes of a control: `dense` has no masks, `random` draws them by chance."""
    if arm == "refined":
        return changes
    phases = []
    for phase in changes["phases"]:
        if phase["kind"] == "sparse" and arm == "dense":
            phase = {name: value for name, value in phase.items() if name not in MASK} | {"kind": "dense"}
        elif phase["kind"] == "sparse":
            phase = phase | {"criterion": "random"}
        phases.append(phase)
    return changes | {"phases": phases}


def arms_of(changes: Changes) -> tuple[str, ...]:
    """Return the arms that differ: without a mask there is only one. Rounds are counted by their masks."""
    if not any(phase["kind"] == "sparse" for phase in changes["phases"]):
        return ("dense",)
    return ("refined", "random") if changes.get("average") == "rounds" else ("refined", "dense", "random")

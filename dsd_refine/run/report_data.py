"""Make the fields of report.json and the rows of predictions.parquet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from dsd_refine.checkpoint.safetensors_file import listed
from dsd_refine.evidence.compare import corpus_over_seeds, credit, over_seeds
from dsd_refine.evidence.power import rows_to_decide
from dsd_refine.masking.checkpoint_layers import few_maskable, outside_embeddings
from dsd_refine.recipe import first_sparsity
from dsd_refine.report.places import from_home
from dsd_refine.report.report import environment
from dsd_refine.run.phase import steps_of
from dsd_refine.search import rung_of
from dsd_refine.tasks.registry import parts_of

if TYPE_CHECKING:
    from dsd_refine.checkpoint.source import Source
    from dsd_refine.run.run import Run
    from dsd_refine.run.state import Selected

SCHEMA = 1
GATE_EXIT = 3


def predictions(run: Run) -> pa.Table:
    """Return the table of predictions.parquet, with one row for each evaluation row.

    The columns are `row`, `target`, and for each arm its loss, prediction, score and count (and
    statistics, if the metric sums statistics). With several seeds, each seed has columns too.
    """
    part, task = run.task.eval, run.task
    rows = range(len(part.rows))
    columns: dict[str, Any] = {
        "row": [part.rows.name(row) for row in rows],
        "target": [task.target(part, row) for row in rows],
    }
    arms = dict(run.scores)
    if run.recipe.seeds > 1:
        arms |= {f"{arm}_seed{number}": scores for arm in run.arms for number, scores in enumerate(run.seeds[arm], 1)}
    for arm, scores in arms.items():
        texts = list(scores.text or (task.shown(int(p)) if p >= 0 else None for p in scores.prediction))
        columns[f"loss_{arm}"] = scores.loss
        columns |= {f"prediction_{arm}": texts, f"score_{arm}": scores.score, f"count_{arm}": scores.count.astype(np.int64)}
        if scores.stats is not None:
            columns[f"stats_{arm}"] = list(scores.stats)
    return pa.table(columns)


def report_data(
    run: Run, verdict: str, passed: bool, written: dict[str, str], card_warnings: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Return the content of report.json, schema 1.

    Every result is measured. Only fields that name the request (`argv`, `seed`, the rule of the gate)
    are copied from it.

    Args:
        run: The finished run.
        verdict: The verdict of the published arm against the source.
        passed: Whether the gate is met.
        written: File name -> SHA-256 of the written files.
        card_warnings: Warnings about the model card of the source.
    """
    source, recipe, task = run.checkpoint.source, run.recipe, run.task
    selected = run.selected("refined")
    extra = dict(task.report())
    data = run.given.entry(parts_of(task))
    all_warnings = [*run.checkpoint.warnings, *extra.pop("warnings"), *data["unused"], *run.state.baseline_warnings]
    all_warnings += [*run.state.harm, *_warnings(run), *card_warnings]
    return {
        "schema": SCHEMA,
        "argv": [from_home(arg) for arg in run.options.argv],
        "seed": recipe.seed,
        "exit_code": 0 if passed else GATE_EXIT,
        "environment": environment(str(run.loop.accelerator.device), run.loop.world, run.loop.shards is not None),
        "source": {
            "model": from_home(source.model), "resolved": _resolved(source), "revision": source.revision,
            "library": source.library, "weights_key": run.checkpoint.layout.weights_key, "files": _files(run.source_hashes),
        },
        "output": {"path": from_home(str(run.options.output_dir)), "files": _files(written)},
        "task": task.name,
        "metric": {"name": task.metric, "higher_is_better": task.higher_is_better},
        **extra,
        "data": data,
        "phases": [{name: value for name, value in phase.items() if name != "attempt"} for phase in run.state.phases],
        **_masked(run, selected),
        "arms": {arm: task.metrics(scores) for arm, scores in run.scores.items()},
        "comparison": {name: result.to_dict() for name, result in run.comparisons.items()},
        "verdict": verdict,
        "gate": {"rule": recipe.gate, "passed": passed},
        "selected": {name: getattr(selected, name) for name in ("sparsity", "epoch", *(["seed"] if recipe.seeds > 1 else []))},
        "warnings": [from_home(warning) for warning in dict.fromkeys(all_warnings)],
        "credit": credit(verdict, run.comparisons, recipe.control, run.published),
        **_further(run, verdict),
    }  # fmt: skip


def _masked(run: Run, selected: Selected) -> dict[str, Any]:
    """Return the report's fields about the layers and their masks, of the selected try."""
    maskable = [layer for layer in run.layers if layer.excluded is None]
    zeros, outside = run.state.zeros.get(str(selected.attempt)), outside_embeddings(run.layers)
    first = first_sparsity(run.recipe_of("refined", selected.attempt))
    counts = run.state.masked.get(str(selected.attempt), {})
    if first is None or run.recipe_of("refined", selected.attempt).threshold == "layer":
        counts = {} if first is None else {layer.name: layer.masked(first) for layer in maskable}
    return {
        "layers": [_layer(run, layer, counts, zeros) for layer in run.layers],
        "masked_share": sum(counts.values()) / outside,
        "maskable_share": sum(layer.weights for layer in maskable) / outside,
    }


def _further(run: Run, verdict: str) -> dict[str, Any]:
    """Return the report's fields that stand after those of its first version."""
    return {
        "rows_to_decide": _rows_to_decide(run, verdict),
        "seeds": seeds_data(run) if run.recipe.seeds > 1 else None,
        "holdout": _holdout(run),
        "cost": _cost(run),
        "published": run.published,
        "published_name": published_name(run),
        "lost": run.state.lost,
        "interpolated": {arm: run.selected(arm).share for arm in run.arms} if run.recipe.interpolate else None,
        "search": search_data(run),
        "rate_tests": rate_tests(run),
        "soups": {arm: _soup(run, arm) for arm in run.arms} if run.recipe.soup != "none" else None,
        "rounds": {arm: run.selected(arm).rounds for arm in run.arms} if run.recipe.average == "rounds" else None,
    }


def _resolved(source: Source) -> str:
    """Return the name of a repository or a release, or a local folder as the user gave it.

    The full path of a local folder does not belong into a report.
    """
    if not Path(source.resolved).is_absolute():
        return source.resolved
    has_name = Path(source.model).name not in ("", "..")  # the name of "." is empty
    return from_home(source.model) if has_name else Path(source.resolved).name


def _holdout(run: Run) -> dict[str, dict[str, float]] | None:
    """Return the metrics on the holdout of the source and of the selected weights of each arm.

    None: there is no holdout.
    """
    baseline = run.state.source_holdout
    return {"baseline": baseline} | {arm: run.selected(arm).holdout or {} for arm in run.arms} if baseline else None


def search_data(run: Run) -> dict[str, Any] | None:
    """Return the settings of a search, its rungs, every try, and the chosen setting of each arm.

    None: there was no search. A setting has the fields that differ from the recipe. Rungs count from 1.
    """
    search = run.recipe.search
    if search is None or not run.recipe.searches:
        return None
    tries = [
        {
            "arm": each["arm"], "try": each["attempt"] + 1, "seed": each["seed"], "setting": each["setting"],
            "rung": rung_of(run.rungs, each["attempt"] % run.tries_per_seed) + 1,
            "steps": each["steps"], "holdout": each["holdout"], "lost": each["lost"],
        }
        for each in run.state.tries
    ]  # fmt: skip
    return {
        "n": search.tries,
        "factor": search.factor,
        "space": {path: list(values) for path, values in search.space.items()},
        "settings": [dict(setting.changes) for setting in run.settings],
        "rungs": [{"tries": rung.size, "steps": steps_of(run, rung.first)} for rung in run.rungs],
        "tries": tries,
        "chosen": {arm: run.setting(arm, run.selected(arm).attempt) for arm in run.arms},
    }


def _soup(run: Run, arm: str) -> dict[str, Any] | None:
    """Return the tries that the soup of an arm mixes, its metrics on the holdout, and whether it is the arm's result."""
    found = run.state.soups.get(arm)
    if found is None:
        return None
    tries = [number + 1 for number in found.members]
    return {"tries": tries, "holdout": found.holdout, "chosen": bool(run.selected(arm).members)}


def rate_tests(run: Run) -> list[dict[str, Any]] | None:
    """Return the range tests of the rate: all rates with their losses, and the chosen one. None: none was made."""
    tests = [{"optimizer": name, **asdict(found)} for name, found in run.state.rates.items() if found.rates]
    return [{field: value for field, value in test.items() if field != "seconds"} for test in tests] or None


def published_name(run: Run) -> str:
    """Return what the published arm did, such as "SWA, no mask" or "DSD, 30 % masked"."""
    arm = run.published
    if arm == "baseline":
        return "the source itself"
    phases = run.recipe_of(arm, run.selected(arm).attempt).phases
    masked = " and ".join(f"{100 * phase.sparsity:.3g} %" for phase in phases if phase.sparsity is not None)
    mask = {"refined": f"{masked} masked", "random": f"{masked} masked at random"}.get(arm, "no mask") if masked else "no mask"
    selected = run.selected(arm)
    part = f", mean of {len(selected.members)} tries" if selected.members else ""
    part += f", mean of {selected.rounds} rounds" if selected.rounds > 1 else ""
    part += f", {100 * selected.share:.3g} % of the way from the source" if selected.share < 1 else ""
    average = {"swa": "SWA, ", "ema": "EMA, "}.get(phases[-1].average, "" if mask == "no mask" else "DSD, ")
    return f"{average or 'more training, '}{'distilled, ' if any(phase.distill for phase in phases) else ''}{mask}{part}"


def _cost(run: Run) -> dict[str, Any]:
    """Return the cost of training, all arms, tries and range tests together.

    The energy is that of the whole run, with loading, evaluation and writing.
    """
    phases, tests = run.state.phases, run.state.rates.values()
    return {
        "seconds": sum(phase["seconds"] for phase in phases) + sum(test.seconds for test in tests),
        "samples": sum(phase["samples"] for phase in phases) + sum(test.samples for test in tests),
        "energy_joules": run.meter.joules() if run.meter else None,
    }


def _rows_to_decide(run: Run, verdict: str) -> int | None:
    """Return how many evaluation rows would give a clear verdict, or None if it is clear already."""
    comparison = run.result
    if verdict != "inconclusive":
        return None
    return rows_to_decide(comparison, len(run.task.eval.rows), run.margin, len(run.comparisons))


def seeds_data(run: Run) -> dict[str, Any]:
    """Return the results over all seeds.

    Of each arm, they have the metrics with mean and standard deviation. Of each pair of arms that is
    compared, they have the paired difference with its interval over seeds and rows.
    """
    by_seed = {arm: [run.task.metrics(scores) for scores in run.seeds[arm]] for arm in run.arms}
    arms = {
        arm: {name: _spread([metrics[name] for metrics in of_arm]) for name in of_arm[0]} for arm, of_arm in by_seed.items()
    }
    comparison = {}
    for name in run.comparisons:
        delta, ci95, deviation = _over_seeds(run, *name.split("_vs_"))
        comparison[name] = {"delta": delta, "ci95": list(ci95), "deviation": deviation}
    return {"n": run.recipe.seeds, "arms": arms, "comparison": comparison}


def _over_seeds(run: Run, arm: str, other: str) -> tuple[float, tuple[float, float], float]:
    """Return the mean difference of two arms, its interval, and its deviation."""
    corpus = getattr(run.task, "corpus", None)
    mine = [scores.compared(corpus) for scores in run.seeds[arm]]
    theirs = [scores.compared(corpus) for scores in run.seeds[other]] * (len(mine) if other == "baseline" else 1)
    better, seed = run.task.higher_is_better, run.recipe.seed
    if corpus is not None:
        return corpus_over_seeds(mine, theirs, corpus, higher_is_better=better, seed=seed, groups=run.groups)
    return over_seeds(mine, theirs, run.scores[arm].count, higher_is_better=better, seed=seed, groups=run.groups)


def _spread(values: list[float]) -> dict[str, Any]:
    return {"mean": float(np.mean(values)), "deviation": float(np.std(values, ddof=1)), "values": values}


def _files(hashes: dict[str, str]) -> list[dict[str, str]]:
    return [{"name": name, "sha256": digest} for name, digest in hashes.items()]


def _layer(run: Run, layer: Any, masked: Mapping[str, int], zeros: dict[str, int] | None) -> dict[str, Any]:
    raw = run.checkpoint.layout.tensor(layer.name)
    return {
        "name": layer.name,
        "shape": list(layer.shape),
        "weights": layer.weights,
        "source_zeros": int((raw == 0).sum()),
        "masked": masked.get(layer.name, 0),
        "zeros_in_sparse": zeros.get(layer.name) if zeros else None,
        "excluded": layer.excluded,
    }


def _warnings(run: Run) -> list[str]:
    lines = []
    if run.task.holdout is not None and len(run.tries) * len(run.arms) > 1 and len(run.task.holdout.rows) < 100:
        lines.append(f"the holdout has only {len(run.task.holdout.rows)} rows: its choice is partly chance")
    empty = run.state.empty.get(str(run.selected("refined").attempt), {})
    if empty:
        most = max(empty, key=lambda name: empty[name][0])
        lines.append(
            f"{sum(count for count, _ in empty.values()):,} filters held only zeros at the sparse phase's end, in {len(empty)} "
            f"layers ({most}: {empty[most][0]} of {empty[most][1]}); exclude such layers with --exclude"
        )
    lines += [
        f"{lost['arm']} try {lost['try']} was lost in {lost['phase']}, step {lost['step']}: {lost['reason']}"
        for lost in run.state.lost
    ]
    return lines + _returned_warning(run) + few_maskable(run.layers)


def _returned_warning(run: Run) -> list[str]:
    """Return the warning about masked weights that had no gradient in the dense phase, if any."""
    returned = run.selected("refined").returned
    if not returned:
        return []
    names = [f"{name}: {returned[name]:,}" for name in sorted(returned, key=lambda name: -returned[name])]
    return [
        f"{sum(returned.values()):,} masked weights in {len(names)} layers got no gradient in the dense phase, because their "
        f"whole layer or expert got none. They could not leave 0, so they have the source's values again ({listed(names, 30)})"
    ]

"""Scores of the arms on the evaluation split, and warnings about damage."""

from __future__ import annotations

import torch

from dsd_refine.errors import Interrupted
from dsd_refine.evidence.baseline_checks import check_baseline
from dsd_refine.evidence.compare import Comparison, compare, holm
from dsd_refine.evidence.damage import clearly_worse, harm_warnings, rising_warnings, view_warnings
from dsd_refine.evidence.paired import ALPHA
from dsd_refine.run.run import Run
from dsd_refine.tasks.base import Item, Score, Scores
from dsd_refine.training.evaluate import evaluate, first_items, scored
from dsd_refine.training.packing import load_state
from dsd_refine.training.state import Key, PhaseState

MOST_LOOKED_AT = 256  # training rows that the source is tried on as training shows them
SAMPLED = 16  # of those rows, tried for what augmentation does to a row: one may be left as it is by chance


def load_selected(run: Run, arm: str, seed: int) -> None:
    """Give the model the weights that the holdout chose for an arm's seed, by its number."""
    run.loop.accelerator.wait_for_everyone()
    load_state(run.loop.model, run.workspace.read_tensors(run.state.best[arm][str(seed)].file))


def score_arm(run: Run, arm: str, seed: int = 0) -> None:
    """Score an arm on the evaluation split, which nothing has been selected by: once, also where the run is taken up again."""
    label = f"{arm} seed {seed + 1}" if arm != "baseline" and run.recipe.seeds > 1 else arm
    name = f"scores-{arm}-{seed}.safetensors"
    kept = run.seeds.setdefault(arm, [])
    if label in run.state.judged:
        kept.append(Scores.unpack(run.workspace.read_tensors(name)))
        return
    scores = evaluate(run.loop, run.task.eval)
    found = run.task.metrics(scores)
    if arm == "baseline":
        run.state.baseline_warnings = check_baseline(
            run.task, found, run.recipe, run.checkpoint.source.folder, scores, lambda part: evaluate(run.loop, part)
        )
        for line in run.state.baseline_warnings:
            run.options.say(f"warning: {line}")
    kept.append(scores)
    run.workspace.write_tensors(name, scores.pack())
    place = {"arm": arm, "phase": None, "step": None, "epoch": None, **({"seed": seed + 1} if label != arm else {})}
    run.workspace.log({"event": "evaluation", **place, "part": "eval", **found})
    run.options.say(f"{label}: " + ", ".join(f"{metric} {value:.4f}" for metric, value in found.items()))
    run.state.judged.append(label)
    run.save()
    if run.loop.stopping() and run.loop.world == 1:
        raise Interrupted(f"stopped after the evaluation of {label}; go on with --resume")


def warn(run: Run, lines: list[str]) -> None:
    """Say what harms, at once and in the report; what has been said of a run that is taken up again is not said twice."""
    known = run.state.harm
    for line in lines:
        if line not in known:
            known.append(line)
            run.options.say(f"warning: {line}")


def look_at_source(run: Run) -> None:
    """The source on the holdout, which arms are seen against, and on the first training rows as training shows them."""
    if run.state.looked:
        return
    loop, task, state = run.loop, run.task, run.state
    if task.holdout is not None:
        state.source_holdout = task.metrics(evaluate(loop, task.holdout))
        place = {"arm": "baseline", "phase": None, "step": None, "epoch": None}
        run.workspace.log({"event": "evaluation", **place, "part": "holdout", **state.source_holdout})
    steps = run.recipe.phases_at(run.tries[0])[0].total_steps(loop.steps_per_epoch)
    batch = loop.recipe.batch_size * loop.recipe.gradient_accumulation_steps * loop.world
    items = first_items(loop, Key(run.recipe.seed, 0), min(MOST_LOOKED_AT, steps * batch))
    if items:
        seen = _in_order(scored(loop, task.train, items))
        state.source_loss = task.metrics(Scores.of(enumerate(seen), len(seen))).get("loss")
        if not all(_as_in_evaluation(run, item) for item in items[:SAMPLED]):
            plain = _in_order(scored(loop, task.train, [(unit, None) for unit, _ in items]))
            warn(run, view_warnings(task, plain, seen, run.recipe))
    state.looked = True
    run.save()


def _in_order(found: list[tuple[int, Score]]) -> list[Score]:
    return [score for _, score in sorted(found, key=lambda pair: pair[0])]


def _as_in_evaluation(run: Run, item: Item) -> bool:
    """Does training see a row just as evaluation does, as most tasks have it?"""
    one, two = (run.task.batch(run.task.train, [given]).inputs for given in (item, (item[0], None)))
    return one.keys() == two.keys() and all(torch.equal(value, two[name]) for name, value in one.items())


def warn_of_rising_losses(run: Run, state: PhaseState) -> None:
    """Warn if the losses of an arm's first steps go up."""
    source, place = run.state.source_loss, state.place
    if source is not None and place.attempt == place.phase == 1:
        masked = bool(state.masks)  # a mask raises the loss by itself: what counts then is what follows
        warn(run, rising_warnings(place.arm, state.progress.early, source, masked=masked))


def warn_of_harm(run: Run) -> None:
    """Have all arms become worse than the source, on the evaluation split or else on the holdout that chose them?"""
    task, recipe = run.task, run.recipe
    found = {arm: task.metrics(run.scores[arm]) for arm in ("baseline", *run.arms)}
    lines = harm_warnings(task, recipe, "evaluation split", found, lambda arm: against_source(run, arm).p_value < ALPHA)
    if not lines and task.holdout is not None and run.state.source_holdout:
        chosen = {arm: run.selected(arm).holdout or {} for arm in run.arms}
        held = {"baseline": run.state.source_holdout} | chosen
        rows = len(task.holdout.rows) if any(guess.rows is not None for guess in task.chance_baselines) else None
        lines = harm_warnings(
            task, recipe, "holdout", held, lambda arm: clearly_worse(held[arm], held["baseline"], task, recipe, rows)
        )
    warn(run, lines)


def against_source(run: Run, arm: str) -> Comparison:
    """An arm's scores on the evaluation split beside the source's."""
    if arm == "refined":
        return run.comparisons["refined_vs_baseline"]
    corpus, scores = getattr(run.task, "corpus", None), run.scores
    mine, theirs = (scores[each].compared(corpus) for each in (arm, "baseline"))
    return compare(
        mine, theirs, scores[arm].count,
        higher_is_better=run.task.higher_is_better, seed=run.recipe.seed, corpus=corpus, groups=run.groups,
    )  # fmt: skip


def compare_arms(run: Run) -> None:
    """Each arm's seed that the holdout prefers, against the source and against each control, Holm over all comparisons."""
    run.scores = {"baseline": run.seeds["baseline"][0]}
    run.scores |= {arm: run.seeds[arm][run.preferred(arm)] for arm in run.arms}
    for other in ("baseline", *run.recipe.control):
        mine, theirs = run.scores["refined"], run.scores[other]
        corpus = getattr(run.task, "corpus", None)
        run.comparisons[f"refined_vs_{other}"] = compare(
            mine.compared(corpus), theirs.compared(corpus), mine.count,
            higher_is_better=run.task.higher_is_better, seed=run.recipe.seed, corpus=corpus, groups=run.groups,
        )  # fmt: skip
    run.comparisons = holm(run.comparisons)

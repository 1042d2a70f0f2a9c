"""Score the arms on the evaluation split, compare them, and warn if training damages the model."""

from __future__ import annotations

import torch

from dsd_refine.errors import Interrupted
from dsd_refine.evidence.baseline_checks import check_baseline
from dsd_refine.evidence.compare import Comparison, compare, holm
from dsd_refine.evidence.damage import clearly_worse, harm_warnings, memory_warnings, rising_warnings, view_warnings
from dsd_refine.evidence.paired import ALPHA
from dsd_refine.run.lost import remember_source
from dsd_refine.run.run import Run
from dsd_refine.run.state import Selected
from dsd_refine.tasks.base import Item, Score, Scores
from dsd_refine.training.evaluate import evaluate, first_items, scored
from dsd_refine.training.packing import load_state
from dsd_refine.training.state import Key, PhaseState

MOST_LOOKED_AT = 256  # the most training rows that the source is scored on
# So many of those rows are checked for augmentation. One is not enough, because augmentation may
# leave a row unchanged by chance.
SAMPLED = 16


def load_published(run: Run) -> None:
    """Load the weights that are published: those of an arm, or the source's."""
    if run.published == "baseline":
        load_state(run.loop.state(), run.start)
    else:
        load_weights(run, run.selected(run.published))


def load_selected(run: Run, arm: str, seed: int) -> None:
    """Load the weights that the holdout chose for a seed of an arm. `seed` is its number, from 0."""
    load_weights(run, run.state.best[arm][str(seed)])


def load_weights(run: Run, selected: Selected) -> None:
    """Load weights that the holdout chose."""
    run.loop.accelerator.wait_for_everyone()
    load_state(run.loop.state(), run.workspace.read_weights(selected.file))


def score_soup(run: Run, arm: str) -> None:
    """Score the soup of the seeds of an arm, if it is the arm's result (see `dsd_refine.run.soup`)."""
    selected = run.selected(arm)
    if run.recipe.seeds > 1 and selected is run.state.soups.get(arm):
        load_weights(run, selected)
        score_arm(run, arm, len(run.seeds[arm]))


def score_arm(run: Run, arm: str, seed: int = 0) -> None:
    """Score an arm on the evaluation split, and add the scores to `run.seeds`.

    Nothing is selected on this split. A resumed run reads the saved scores instead.

    Args:
        run: The run. Its model has the weights to score.
        arm: "baseline" or the name of a trained arm.
        seed: The number of the seed, from 0. The one after the last stands for the soup of all.

    Raises:
        UsageError: The source does not reach the recipe's `expect`.
        Interrupted: A signal came. The scores are saved.
    """
    label = f"{arm} seed {seed + 1}" if arm != "baseline" and run.recipe.seeds > 1 else arm
    label = f"{arm} soup" if seed == run.recipe.seeds else label
    file_name = f"scores-{arm}-{seed}.safetensors"
    arm_scores = run.seeds.setdefault(arm, [])
    if label in run.state.judged:
        arm_scores.append(Scores.unpack(run.workspace.read_tensors(file_name)))
        return
    scores = evaluate(run.loop, run.task.eval)
    metrics = run.task.metrics(scores)
    if arm == "baseline":
        run.state.baseline_warnings = check_baseline(
            run.task, metrics, run.recipe, run.checkpoint.source.folder, scores, lambda part: evaluate(run.loop, part)
        )
        for line in run.state.baseline_warnings:
            run.options.say(f"warning: {line}")
    arm_scores.append(scores)
    run.workspace.write_tensors(file_name, scores.pack())
    place = {"arm": arm, "phase": None, "step": None, "epoch": None, **({"seed": seed + 1} if label != arm else {})}
    run.workspace.log({"event": "evaluation", **place, "part": "eval", **metrics})
    run.options.say(f"{label}: " + ", ".join(f"{metric} {value:.4f}" for metric, value in metrics.items()))
    run.state.judged.append(label)
    run.save()
    if run.loop.stopping() and run.loop.world == 1:
        raise Interrupted(f"stopped after the evaluation of {label}; go on with --resume")


def warn(run: Run, lines: list[str]) -> None:
    """Print warnings about damage, and record them for the report.

    A resumed run does not repeat the warnings that it has already recorded.
    """
    known = run.state.harm
    for line in lines:
        if line not in known:
            known.append(line)
            run.options.say(f"warning: {line}")


def look_at_source(run: Run) -> None:
    """Score the source on the holdout and on the first training rows, and save the results.

    The trained arms are compared with them, so that damage shows early. A source that knows the rows of
    the holdout is a warning. The training rows are scored in training form, that is with augmentation. If
    this makes them much harder, that is a warning.
    """
    if run.state.looked:
        return
    loop, task, state = run.loop, run.task, run.state
    if task.holdout is not None:
        scores = evaluate(loop, task.holdout)
        state.source_holdout = task.metrics(scores)
        remember_source(run, scores)
        if task.holdout.rows.table is task.train.rows.table:  # it was carved from the training rows
            warn(run, memory_warnings(task, scores, run.seeds["baseline"][0]))
        place = {"arm": "baseline", "phase": None, "step": None, "epoch": None}
        run.workspace.log({"event": "evaluation", **place, "part": "holdout", **state.source_holdout})
    steps = run.recipe.phases[0].total_steps(loop.steps_per_epoch)
    batch = loop.recipe.batch_size * loop.recipe.gradient_accumulation_steps * loop.world
    items = first_items(loop, Key(run.recipe.seed, 0), min(MOST_LOOKED_AT, steps * batch))
    if items:
        augmented = _in_order(scored(loop, task.train, items))
        state.source_loss = task.metrics(Scores.of(enumerate(augmented), len(augmented))).get("loss")
        if not all(_as_in_evaluation(run, item) for item in items[:SAMPLED]):
            plain = _in_order(scored(loop, task.train, [(unit, None) for unit, _ in items]))
            warn(run, view_warnings(task, plain, augmented, run.recipe))
    state.looked = True
    run.save()


def _in_order(numbered: list[tuple[int, Score]]) -> list[Score]:
    return [score for _, score in sorted(numbered, key=lambda pair: pair[0])]


def _as_in_evaluation(run: Run, item: Item) -> bool:
    """Return whether training and evaluation make the same inputs of a row, as in most tasks."""
    training, evaluation = (run.task.batch(run.task.train, [each]).inputs for each in (item, (item[0], None)))
    return training.keys() == evaluation.keys() and all(
        torch.equal(value, evaluation[name]) for name, value in training.items()
    )


def warn_of_rising_losses(run: Run, state: PhaseState) -> None:
    """Warn if the losses of an arm's first steps rise above the loss of the source."""
    source, place = run.state.source_loss, state.place
    if source is not None and place.attempt == place.phase == 1:
        masked = bool(state.masks)  # a mask alone raises the loss, so only the steps after it count
        warn(run, rising_warnings(place.arm, state.progress.early, source, masked=masked))


def warn_of_harm(run: Run) -> None:
    """Warn if all arms are worse than the source on the evaluation split, or else on the holdout."""
    task, recipe = run.task, run.recipe
    on_eval = {arm: task.metrics(run.scores[arm]) for arm in ("baseline", *run.arms)}
    lines = harm_warnings(task, recipe, "evaluation split", on_eval, lambda arm: against_source(run, arm).p_value < ALPHA)
    if not lines and task.holdout is not None and run.state.source_holdout:
        chosen = {arm: run.selected(arm).holdout or {} for arm in run.arms}
        on_holdout = {"baseline": run.state.source_holdout} | chosen
        rows = len(task.holdout.rows) if any(guess.rows is not None for guess in task.chance_baselines) else None
        lines = harm_warnings(
            task,
            recipe,
            "holdout",
            on_holdout,
            lambda arm: clearly_worse(on_holdout[arm], on_holdout["baseline"], task, recipe, rows),
        )
    warn(run, lines)


def against_source(run: Run, arm: str) -> Comparison:
    """Compare an arm with the source on the evaluation split."""
    return run.comparisons.get(f"{arm}_vs_baseline") or compared(run, arm, "baseline")


def compared(run: Run, arm: str, other: str) -> Comparison:
    """Compare two arms on the evaluation split."""
    corpus, scores = getattr(run.task, "corpus", None), run.scores
    mine, theirs = (scores[each].compared(corpus) for each in (arm, other))
    return compare(
        mine, theirs, scores[arm].count,
        higher_is_better=run.task.higher_is_better, seed=run.recipe.seed, corpus=corpus, groups=run.groups,
    )  # fmt: skip


def compare_arms(run: Run) -> None:
    """Compare the refined arm with the source and with each control, with Holm's correction over all.

    If a control is published, it is compared with the source too. Of each arm, the seed that the
    holdout prefers is compared, or the soup of its seeds. Fills `run.scores` and `run.comparisons`.
    """
    run.scores = {"baseline": run.seeds["baseline"][0]}
    for arm in run.arms:
        has_soup = len(run.seeds[arm]) > run.recipe.seeds
        run.scores[arm] = run.seeds[arm].pop() if has_soup else run.seeds[arm][run.preferred(arm)]
    pairs = [("refined", other) for other in ("baseline", *run.recipe.control)]
    pairs += [(run.published, "baseline")] if run.published in run.recipe.control else []
    run.comparisons = holm({f"{arm}_vs_{other}": compared(run, arm, other) for arm, other in pairs})

"""Would a test notice? Important lines of the package, each made wrong: `python benchmarks/mutate.py [--check] [NUMBER …]`.

Each mutation is applied by itself to a copy of the checkout in a temporary folder, and the tests that are named for it
are run there: one of them must fail. First all of them must pass on the unchanged copy. Ends with a count, and exit code
1 if any mutation is not caught. A line that is no longer found exactly once is an error that says so, and counts as not
caught: write its entry anew below. --check: only whether each line is found, which takes no time.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
COPIED = ("dsd_refine", "recipes", "tests", "docs", "pyproject.toml", "cli.py", "README.md")
TIMEOUT = 300  # seconds of one run of tests
CAUGHT, SURVIVED, BROKEN = "caught", "NOT caught", "ERROR"


@dataclass(frozen=True)
class Mutation:
    """`old` becomes `new` in `dsd_refine/FILE`; one of the `tests` (pytest's names below tests/, by space) must fail then."""

    what: str
    file: str
    old: str
    new: str
    tests: str


MUTATIONS = [
    # ---------------------------------------------------------------- the mask
    Mutation(
        "the count of a mask is cut off, not rounded",
        "masking/layers.py",
        "min(round(sparsity * n), n - 1)",
        "min(int(sparsity * n), n - 1)",
        "test_masks.py::test_the_count_is_round_s_n_and_never_all",
    ),
    Mutation(
        "a mask may take every weight of a layer",
        "masking/layers.py",
        "min(round(sparsity * n), n - 1)",
        "min(round(sparsity * n), n)",
        "test_masks.py::test_the_count_is_round_s_n_and_never_all",
    ),
    Mutation(
        "among equal weights the last go first",
        "masking/selection.py",
        "places = tied.reshape(-1).nonzero().reshape(-1)[:ties]",
        "places = tied.reshape(-1).nonzero().reshape(-1)[-ties:]",
        "test_masks.py::test_exactly_the_smallest_go_and_ties_go_by_lowest_index",
    ),
    Mutation(
        "masked weights are multiplied by 0, which keeps NaN and makes -0.0",
        "masking/masks.py",
        "torch.split(flat(values).view(torch.int32), size)",
        "torch.split(flat(values), size)",
        "test_masks.py::test_masked_weights_are_plus_zero_and_kept_bits_are_untouched",
    ),
    Mutation(
        "a masked weight that is not 0 does not stop the run",
        "masking/masks.py",
        "        if wrong:\n            raise RunError",
        "        if False:\n            raise RunError",
        "test_masks.py::test_a_masked_weight_that_moved_stops_the_run",
    ),
    Mutation(
        "random masks of equal layers are equal",
        "masking/masks.py",
        "(*seed, layer.name, i)",
        "(*seed, i)",
        "test_masks.py::test_random_masks_have_the_same_counts_and_depend_on_seed_and_name",
    ),
    Mutation(
        "DropConnect keeps one mask for all steps",
        "run/phase.py",
        '(*state.key, refresh, "mask")',
        '(*state.key, 0, "mask")',
        "test_methods.py::test_dropconnect_s_masks_are_drawn_independently_of_each_other",
    ),
    # ---------------------------------------------------------------- the step
    Mutation(
        "mask, then step",
        "training/loop.py",
        "    state.optimizer.step()\n    if not is_unmasked:\n        state.apply()\n",
        "    if not is_unmasked:\n        state.apply()\n    state.optimizer.step()\n",
        "test_train.py::test_masked_weights_are_zero_after_every_step",
    ),
    Mutation(
        "masked gradients count in the norm",
        "training/loop.py",
        "mask_gradients(state.masks, loop.parameters)",
        "mask_gradients({}, loop.parameters)",
        "test_train.py::test_masked_gradients_do_not_count_in_the_norm",
    ),
    Mutation(
        "each micro-batch weighs the same",
        "training/loop.py",
        "weight if batch.count",
        "1.0 / (len(group) * batch.count) if batch.count",
        "test_train.py::test_a_step_does_not_depend_on_how_its_rows_are_split",
    ),
    Mutation(
        "a last micro-batch of one row stays alone under BatchNorm",
        "training/state.py",
        "if joins_single and len(groups) > 1 and len(groups[-1]) == 1:",
        "if False:",
        "test_train.py::test_a_last_batch_of_one_row_joins_the_one_before_under_batchnorm",
    ),
    Mutation(
        "biases and norms decay",
        "training/optimizer.py",
        '"weight_decay": 0.0, "factor"',
        '"weight_decay": recipe.weight_decay, "factor"',
        "test_train.py::test_one_dimensional_parameters_do_not_decay",
    ),
    Mutation(
        "the curve of the rate is a step ahead",
        "training/optimizer.py",
        "(step - phase.warmup_steps - 1) /",
        "(step - phase.warmup_steps) /",
        "test_train.py::test_the_rate_follows_the_stated_formula",
    ),
    Mutation(
        "every epoch has the same order",
        "training/batches.py",
        'stable_seed(key.seed, key.phase, epoch, "order")',
        'stable_seed(key.seed, key.phase, 0, "order")',
        "test_train.py::test_order_depends_on_seed_phase_and_epoch_alone",
    ),
    Mutation(
        "every epoch has the same augmentation",
        "training/batches.py",
        'stable_seeds((*self.key, epoch), units, "augment")',
        'stable_seeds((*self.key, 0), units, "augment")',
        "test_train.py::test_augmentation_differs_by_row_and_epoch_and_repeats_with_the_phase",
    ),
    Mutation(
        "dropout hangs on what was drawn before",
        "training/loop.py",
        '                seed_all(stable_seed(*state.key, step, number, loop.accelerator.process_index, "dropout"), device)\n',
        "",
        "test_train.py::test_dropout_is_a_function_of_seed_and_step",
    ),
    # ---------------------------------------------------------------- phases and arms
    Mutation(
        "a phase goes on with the optimizer of the one before",
        "training/state.py",
        "self.optimizer = make_optimizer(loop, phase)\n",
        'self.optimizer = loop.__dict__.setdefault("kept", make_optimizer(loop, phase))\n',
        "test_run.py::test_a_restored_weight_is_minus_rate_times_gradient",
    ),
    Mutation(
        "restored weights start at the source's values",
        "run/phase.py",
        "    elif number == 0:\n        load_state(run.loop.state(), run.start)",
        "    else:\n        load_state(run.loop.state(), run.start)",
        "test_run.py::test_a_restored_weight_is_minus_rate_times_gradient",
    ),
    Mutation(
        "the dense control trains fewer steps",
        "method.py",
        "phase.model_copy(update=without_mask) for phase in phases)",
        "phase.model_copy(update=without_mask) for phase in phases[1:])",
        "test_run.py::test_arms_share_rates_rows_and_steps",
    ),
    Mutation(
        "the random control is masked by magnitude",
        "method.py",
        'update={"criterion": "random"}',
        'update={"criterion": "magnitude"}',
        "test_run.py::test_random_masks_have_the_same_counts",
    ),
    Mutation(
        "all tries of a control have one seed",
        "run/phase.py",
        'return seed if arm == "refined" or not number else',
        "return seed if True else",
        "test_run.py::test_several_sparsities_are_tried_and_the_holdout_picks",
    ),
    Mutation(
        "EMA weighs old and new the other way round",
        "training/average.py",
        "self._add(1 - self.phase.ema_decay if",
        "self._add(self.phase.ema_decay if",
        "test_methods.py::test_ema_follows_its_formula_and_its_state_comes_back",
    ),
    Mutation(
        "SWA is a moving mean",
        "training/average.py",
        "self._add(1 / (self.count + 1))",
        "self._add(1 / 2 if self.count else 1.0)",
        "test_methods.py::test_swa_is_the_mean_of_what_it_was_shown",
    ),
    Mutation(
        "BatchNorm is looked at again on top of its old statistics",
        "training/batchnorm.py",
        "        norm.reset_running_stats()\n        norm.momentum = None\n",
        "        pass\n",
        "test_methods.py::test_statistics_are_those_of_the_rows_and_nothing_else_moves",
    ),
    Mutation(
        "a mask without training after keeps the old statistics",
        "run/phase.py",
        "if state.last and run.state.masked_only:",
        "if False:",
        "test_methods.py::test_a_mask_without_training_after_has_new_statistics",
    ),
    # ---------------------------------------------------------------- selection and evaluation
    Mutation(
        "the evaluation rows select",
        "run/phase.py",
        "evaluate(run.loop, run.task.holdout, state.masks)",
        "evaluate(run.loop, run.task.eval, state.masks)",
        "test_run.py::test_the_evaluation_rows_select_nothing",
    ),
    Mutation(
        "the published arm is chosen among the trained ones alone",
        "run/run.py",
        'arm, metrics = "baseline", self.state.source_holdout',
        'arm, metrics = "refined", self.selected("refined").holdout',
        "test_publish.py::test_the_source_is_a_candidate_and_wins_among_equals",
    ),
    Mutation(
        "the worst settings of a search go on",
        "run/run.py",
        'key=lambda each: self.preference(each["holdout"]), reverse=True)',
        'key=lambda each: self.preference(each["holdout"]))',
        "test_search.py::test_the_holdout_chooses_who_goes_on_and_what_is_published",
    ),
    Mutation(
        "patience stops while the rate is at its peak",
        "run/lost.py",
        "state.progress.lr_last < max(peaks)",
        "state.progress.lr_last <= max(peaks)",
        "test_patience.py::test_a_rate_that_does_not_fall_stops_nothing",
    ),
    Mutation(
        "among equals the later is selected",
        "run/run.py",
        "return self.preference(new) > self.preference(old)",
        "return self.preference(new) >= self.preference(old)",
        "test_run.py::test_among_equals_the_first_is_selected",
    ),
    Mutation(
        "the worse of two is selected",
        "run/run.py",
        "return self.preference(new) > self.preference(old)",
        "return self.preference(new) < self.preference(old)",
        "test_run.py::test_the_holdout_picks_the_best_epoch_of_the_last_phase",
    ),
    Mutation(
        "evaluation with weights that were not rounded",
        "training/evaluate.py",
        "with exact(), loop.as_written(loop.model):",
        "with exact():",
        "test_run.py::test_a_bfloat16_source_is_judged_and_selected_as_it_is_written "
        "test_train.py::test_evaluation_uses_the_weights_as_written_and_augments_nothing",
    ),
    Mutation(
        "rounded weights stay after an evaluation",
        "checkpoint/checkpoint.py",
        "            for key, value in original.items():\n                state[key].copy_(value)\n",
        "            pass\n",
        "test_checkpoint.py::test_rounding_is_undone_exactly",
    ),
    # ---------------------------------------------------------------- the verdict
    Mutation(
        "the bootstrap is not widened for few rows",
        "evidence/compare.py",
        "widening = math.sqrt((degrees + 1) / degrees)",
        "widening = 1.0",
        "test_statistics.py::test_the_interval_of_few_rows_is_widened_to_student_s",
    ),
    Mutation(
        "Bonferroni in place of Holm",
        "evidence/compare.py",
        "(len(ordered) - rank) * comparisons[name].p_value",
        "len(ordered) * comparisons[name].p_value",
        "test_compare.py::test_holm_steps_down",
    ),
    Mutation(
        "McNemar's test is one-sided",
        "evidence/compare.py",
        "p_value, p_value, gained, lost",
        "p_value / 2, p_value / 2, gained, lost",
        "test_compare.py::test_mcnemar_is_the_exact_binomial_test",
    ),
    Mutation(
        "gained and lost are exchanged",
        "evidence/compare.py",
        "gained, lost = ",
        "lost, gained = ",
        "test_compare.py::test_mcnemar_is_the_exact_binomial_test",
    ),
    Mutation(
        "a score that falls counts like one that rises",
        "evidence/compare.py",
        "(first - second).astype(np.float64)",
        "np.abs(first - second).astype(np.float64)",
        "test_compare.py::test_a_lower_loss_is_a_positive_delta_and_the_bootstrap_is_seeded",
    ),
    Mutation(
        "the verdict goes by p before Holm",
        "evidence/compare.py",
        "if comparison.p_adjusted < ALPHA:",
        "if comparison.p_value < ALPHA:",
        "test_compare.py::test_the_verdict",
    ),
    Mutation(
        "beats-control is met by beating one control of several",
        "evidence/compare.py",
        "all(other.p_adjusted < ALPHA",
        "any(other.p_adjusted < ALPHA",
        "test_compare.py::test_every_control_must_be_beaten",
    ),
    Mutation(
        "not-worse refuses what is equal",
        "evidence/compare.py",
        "return result.delta >= 0",
        "return result.delta > 0",
        "test_compare.py::test_the_gates",
    ),
    # ---------------------------------------------------------------- data
    Mutation(
        "carving goes by content without the salt",
        "data/splits.py",
        "return hashlib.sha256(SALT + digest).digest()",
        "return digest",
        "test_data.py::test_carving_takes_the_smallest_salted_hashes",
    ),
    Mutation(
        "carving may take all rows of a class",
        "data/splits.py",
        "if content <= taken:",
        "if False:",
        "test_data.py::test_carving_never_empties_a_class test_data.py::test_equal_rows_stay_together_across_classes",
    ),
    Mutation(
        "evaluation rows that also train are counted once for each content",
        "data/splits.py",
        "sum(digest in seen for digest in judge.digests)",
        "len(seen.intersection(judge.digests))",
        "test_data.py::test_overlap_is_counted_and_warned_of",
    ),
    Mutation(
        "labels go in sorted order where the model has names",
        "data/labels.py",
        "next(iter(owners[text]))",
        "sorted(owners).index(text)",
        "test_data.py::test_labels_go_by_name",
    ),
    Mutation(
        "the pad token's id is no target, wherever it stands",
        "tasks/causal_lm.py",
        "mask = torch.arange(ids.shape[1])[None, :] < torch.tensor([len(w) for w in windows])[:, None]",
        "mask = (ids != 0) & (ids != 7)",
        "test_data.py::test_the_loss_mask_comes_from_lengths_not_from_the_pad_id",
    ),
    # ---------------------------------------------------------------- files and state
    Mutation(
        "a tensor that did not change is written anew",
        "checkpoint/write.py",
        "    if torch.equal(value, start):\n        return start\n",
        "",
        "test_checkpoint.py::test_values_that_did_not_change_keep_the_source_s_bits",
    ),
    Mutation(
        "a value that the file's dtype cannot hold is written",
        "checkpoint/write.py",
        "if value.is_floating_point() and not all_finite(value):",
        "if False:",
        "test_checkpoint.py::test_a_value_that_float16_cannot_hold_is_refused",
    ),
    Mutation(
        "--resume takes another recipe",
        "run/open.py",
        '{"recipe": recipe.model_dump(mode="json"), ',
        "{",
        "test_resume.py::test_resume_of_another_recipe_is_refused",
    ),
    Mutation(
        "--resume takes other data",
        "run/open.py",
        '"data": data} | ',
        "} | ",
        "test_resume.py::test_resume_of_changed_files_is_refused",
    ),
    Mutation(
        "--resume begins the optimizer anew",
        "training/state.py",
        "        unpack_optimizer(self.restored, self.optimizer)\n",
        "",
        "test_resume.py::test_stopped_at_a_step_and_resumed[2]",
    ),
]


def copied(place: Path) -> Path:
    """A copy of the checkout, with what its tests need."""
    checkout = place / "checkout"
    checkout.mkdir()
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, checkout / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
        else:
            shutil.copy(source, checkout / name)
    return checkout


def python(checkout: Path, *args: str) -> subprocess.CompletedProcess[str]:
    """Run python in the copy, which comes before whatever is installed."""
    paths = os.pathsep.join(map(str, (checkout, checkout / "tests")))
    # no bytecode: a file that is mutated twice within a second would be taken for the one before
    env = {**os.environ, "PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *args]
    return subprocess.run(command, cwd=checkout, env=env, capture_output=True, text=True, timeout=TIMEOUT)


def run_tests(checkout: Path, names: list[str]) -> subprocess.CompletedProcess[str]:
    """The named tests one after another, until one fails."""
    options = ["-x", "-q", "-n", "0", "--durations=0", "-p", "no:cacheprovider"]
    return python(checkout, "-m", "pytest", *options, *(f"tests/{name}" for name in names))


def not_found(checkout: Path, mutation: Mutation) -> str:
    """Why a mutation cannot be applied or its tests not run; empty where both can."""
    file = checkout / "dsd_refine" / mutation.file
    times = file.read_text(encoding="utf-8").count(mutation.old) if file.is_file() else 0
    if times != 1:
        return f"{mutation.file}: found {times} times, must be once: {mutation.old.strip()!r:.90}"
    for name in mutation.tests.split():
        test, _, function = name.partition("::")
        held = (checkout / "tests" / test).read_text(encoding="utf-8") if (checkout / "tests" / test).is_file() else ""
        if f"def {function.partition('[')[0]}(" not in held:
            return f"there is no test {name}"
    return ""


def outcome(checkout: Path, mutation: Mutation) -> tuple[str, str]:
    """What came of a mutation, and why where it is not caught. The copy is as before, after."""
    if why := not_found(checkout, mutation):
        return BROKEN, why
    file = checkout / "dsd_refine" / mutation.file
    text = file.read_text(encoding="utf-8")
    file.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
    try:
        ran = run_tests(checkout, mutation.tests.split())
    except subprocess.TimeoutExpired:
        return BROKEN, f"the tests ran for {TIMEOUT} s"
    finally:
        file.write_text(text, encoding="utf-8")
    if ran.returncode == 1 and "\nFAILED tests/" in ran.stdout:
        return CAUGHT, ""
    if ran.returncode == 0:
        return SURVIVED, mutation.tests
    return BROKEN, f"the tests did not run (pytest's exit code {ran.returncode}): {ran.stdout.strip()[-300:]}"


def check_copy(checkout: Path, mutations: list[Mutation]) -> None:
    """The copy is what is imported, and without a mutation its tests pass: else nothing would be proved."""
    where = python(checkout, "-c", "import dsd_refine; print(dsd_refine.__file__)").stdout.strip()
    if Path(where).resolve() != (checkout / "dsd_refine/__init__.py").resolve():
        raise SystemExit(f"the tests would import {where or 'nothing'}, not the copy")
    names = sorted({name for mutation in mutations for name in mutation.tests.split()})
    ran = run_tests(checkout, names)
    if ran.returncode:
        raise SystemExit(f"without a mutation the tests do not pass:\n{ran.stdout[-3000:]}{ran.stderr[-1000:]}")
    print(f"without a mutation the {len(names)} tests that are named pass", flush=True)


def check(mutations: list[tuple[int, Mutation]]) -> int:
    """Say which lines are no longer there, in this checkout."""
    lost = [(number, one, why) for number, one in mutations if (why := not_found(ROOT, one))]
    for number, one, why in lost:
        print(f"{number:>3}  {one.what}\n{'':>5}{why}")
    print(f"{len(mutations) - len(lost)} of {len(mutations)} lines found")
    return int(bool(lost))


def main() -> int:
    chosen = {int(text) for text in sys.argv[1:] if text != "--check"} or set(range(1, len(MUTATIONS) + 1))
    mutations = [(number, one) for number, one in enumerate(MUTATIONS, 1) if number in chosen]
    if "--check" in sys.argv:
        return check(mutations)
    caught = 0
    with tempfile.TemporaryDirectory(prefix="dsd-refine-mutate-") as place:
        checkout = copied(Path(place))
        check_copy(checkout, [one for _, one in mutations])
        for number, mutation in mutations:
            started = time.monotonic()
            said, why = outcome(checkout, mutation)
            caught += said == CAUGHT
            seconds = time.monotonic() - started
            print(f"{number:>3}  {said:<10}  {mutation.file:<24}  {mutation.what}  ({seconds:.0f} s)", flush=True)
            if why:
                print(f"{'':>5}{why}", flush=True)
    print(f"{caught} of {len(mutations)} caught")
    return int(caught < len(mutations))


if __name__ == "__main__":
    sys.exit(main())

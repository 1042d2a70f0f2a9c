"""Publish a finished run: write the checkpoint and the report, verify them, rename the folder to OUT."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pyarrow.parquet as pq

from dsd_refine.checkpoint import verify
from dsd_refine.checkpoint.verify import PROBE, save_probe
from dsd_refine.errors import Interrupted, VerifyError
from dsd_refine.files import copy_file, write_text
from dsd_refine.masking.histograms import mean_abs
from dsd_refine.report.card import SourceCard, card, eval_results, read_card
from dsd_refine.report.examples import contents_of, examples
from dsd_refine.report.page import page, read_lines
from dsd_refine.report.report import Report
from dsd_refine.run.probe import probes
from dsd_refine.run.report_data import predictions, report_data

if TYPE_CHECKING:
    import pyarrow as pa
    import torch

    from dsd_refine.run.run import Run


def publish(run: Run, verdict: str, passed: bool) -> Report:
    """Write the whole output into OUT.partial/, verify it, and make it OUT by one rename.

    Only the main process writes. The others wait.

    Args:
        run: The run. Its model has the weights to publish.
        verdict: The verdict of the published arm against the source.
        passed: Whether the gate is met. If not, the weights are written into `rejected/`.

    Returns:
        The report. It is empty in all processes but the main one.

    Raises:
        VerifyError: The written checkpoint is not the evaluated one. Nothing is published.
        Interrupted: A signal came. Nothing is published.
    """
    accelerator, workspace = run.loop.accelerator, run.workspace
    report = Report({}, run.options.output_dir)
    ready = workspace.ready
    folder = ready if passed else ready / "rejected"
    if accelerator.is_main_process:
        shutil.rmtree(ready, ignore_errors=True)
        folder.mkdir(parents=True)
    written = run.write_checkpoint(folder)
    measured = _measured(run) if accelerator.is_main_process or run.loop.shards is not None else None
    if accelerator.is_main_process and measured is not None:
        _stop_if_asked(run)
        source_card = read_card(run.checkpoint.source.folder)
        report = Report(report_data(run, verdict, passed, written, source_card.warnings), run.options.output_dir)
        _write_card(run, report, source_card, folder)
        _write_dsd(run, report, ready, measured)
        problems = verify(run.checkpoint, ready, computes=run.loop.shards is None)
        if problems:
            lines = "\n  - ".join(problems)
            raise VerifyError(f"the written checkpoint failed its check, nothing was published:\n  - {lines}")
        _stop_if_asked(run)
        workspace.publish()
        run.loop.hooks.on_report(report.data)
    accelerator.wait_for_everyone()
    return report


def _stop_if_asked(run: Run) -> None:
    """Stop if a signal came while the result is written.

    The state is saved, and a resumed run continues with writing the result.
    """
    if run.loop.stopping():
        raise Interrupted("stopped while the result was written; go on with --resume")


def _write_card(run: Run, report: Report, source_card: SourceCard, folder: Path) -> None:
    """Write the model card and, if the gate is met, the results in the format of the Hub."""
    recipe, snippet = run.recipe.dump(), run.checkpoint.library.snippet()
    write_text(folder / "README.md", card(report.data, source_card, recipe, snippet))
    for name, text in eval_results(report.data, recipe).items() if report.data["gate"]["passed"] else ():
        write_text(folder / ".eval_results" / name, text)


class Measured(NamedTuple):
    """What is measured on the published weights: in a sharded run by all processes together.

    Attributes:
        means: Layer -> its mean |w| in the source and in the published weights.
        probes: Inputs and outputs of a few rows, for `verify`.
    """

    means: dict[str, tuple[float, float]]
    probes: list[tuple[dict[str, torch.Tensor], torch.Tensor]]


def _measured(run: Run) -> Measured:
    loop = run.loop
    before, after = mean_abs(run.layers, loop.whole(run.start)), mean_abs(run.layers, loop.whole(loop.parameters))
    computed = probes(loop)
    if loop.shards is not None and loop.shards.policy.half:  # the dtype tells `verify` how near its outputs must be
        computed = [(inputs, outputs.bfloat16()) for inputs, outputs in computed]
    return Measured({name: (before[name], after[name]) for name in before}, computed)


def _page(run: Run, report: Report, log: Path, rows: pa.Table, means: dict[str, tuple[float, float]]) -> str:
    """Return report.html. `rows` are the predictions, and `means` those of `Measured`."""
    attempt = str(run.selected("refined").attempt)
    pictures = run.state.histograms.get(attempt, {})
    changed_rows = examples(
        rows,
        arm=run.published,
        higher_is_better=run.task.higher_is_better,
        decided=run.comparisons["refined_vs_baseline"].gained is not None,
        shown=run.options.report_images,
        content=contents_of(run.task.eval.rows, run.given.columns),
    )
    return page(report.data, read_lines(log), pictures, run.recipe.dump(), means, changed_rows)


def _write_dsd(run: Run, report: Report, ready: Path, measured: Measured) -> None:
    """Write the folder dsd/: report, recipe, log, predictions, page, phases and probe."""
    dsd = ready / "dsd"
    write_text(dsd / "report.json", report.to_json())
    write_text(dsd / "recipe.yaml", run.recipe.dump())
    run.workspace.write_log()
    copy_file(run.workspace.log_file, dsd / "log.jsonl")
    rows = predictions(run)
    pq.write_table(rows, dsd / "predictions.parquet")
    write_text(dsd / "report.html", _page(run, report, dsd / "log.jsonl", rows, measured.means))
    phases = run.workspace.partial / "phases" / str(run.selected("refined").attempt)
    if phases.is_dir():
        for file in (path for path in sorted(phases.rglob("*")) if path.is_file()):
            copy_file(file, dsd / "phases" / file.relative_to(phases))
    save_probe(ready / PROBE, measured.probes)

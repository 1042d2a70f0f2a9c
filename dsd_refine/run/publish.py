"""From a finished run to OUT: write, report, verify, rename."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

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

    from dsd_refine.run.run import Run


def publish(run: Run, verdict: str, passed: bool) -> Report:
    """Write the whole output beside OUT, prove it, and make it OUT by one rename. Other processes wait.

    Raises:
        VerifyError: what was written is not what was evaluated; nothing is published. Interrupted: a signal came.
    """
    accelerator, workspace = run.loop.accelerator, run.workspace
    report = Report({}, run.options.output_dir)
    if accelerator.is_main_process:
        ready = workspace.ready
        shutil.rmtree(ready, ignore_errors=True)
        folder = ready if passed else ready / "rejected"
        folder.mkdir(parents=True)
        written = run.checkpoint.write(run.loop.model, folder)
        _stop_if_asked(run)
        own = read_card(run.checkpoint.source.folder)
        report = Report(report_data(run, verdict, passed, written, own.warnings), run.options.output_dir)
        _write_card(run, report, own, folder)
        _write_dsd(run, report, ready)
        problems = verify(run.checkpoint, ready)
        if problems:
            raise VerifyError("the written checkpoint failed its check, nothing was published:\n  - " + "\n  - ".join(problems))
        _stop_if_asked(run)
        workspace.publish()
    accelerator.wait_for_everyone()
    return report


def _stop_if_asked(run: Run) -> None:
    """A signal while the result is written: what is saved leads back here, so nothing waits for the end."""
    if run.loop.stopping():
        raise Interrupted("stopped while the result was written; go on with --resume")


def _write_card(run: Run, report: Report, own: SourceCard, folder: Path) -> None:
    """The model card and, for a checkpoint that passed its gate, its results in the Hub's form."""
    recipe, snippet = run.recipe.dump(), run.checkpoint.library.snippet()
    write_text(folder / "README.md", card(report.data, own, recipe, snippet))
    for name, text in eval_results(report.data, recipe).items() if report.data["gate"]["passed"] else ():
        write_text(folder / ".eval_results" / name, text)


def _page(run: Run, report: Report, log: Path, rows: pa.Table) -> str:
    """report.html. The model holds what is published; `start` is the source; `rows` are the predictions."""
    attempt = str(run.selected("refined").attempt)
    pictures = run.state.histograms.get(attempt, {})
    before, after = mean_abs(run.layers, run.start), mean_abs(run.layers, run.loop.parameters)
    means = {name: (before[name], after[name]) for name in before}
    found = examples(
        rows,
        higher_is_better=run.task.higher_is_better,
        decided=run.comparisons["refined_vs_baseline"].gained is not None,
        shown=run.options.report_images,
        content=contents_of(run.task.eval.rows, run.given.columns),
    )
    return page(report.data, read_lines(log), pictures, run.recipe.dump(), means, found)


def _write_dsd(run: Run, report: Report, ready: Path) -> None:
    dsd = ready / "dsd"
    write_text(dsd / "report.json", report.to_json())
    write_text(dsd / "recipe.yaml", run.recipe.dump())
    copy_file(run.workspace.log_file, dsd / "log.jsonl")
    rows = predictions(run)
    pq.write_table(rows, dsd / "predictions.parquet")
    write_text(dsd / "report.html", _page(run, report, dsd / "log.jsonl", rows))
    phases = run.workspace.partial / "phases" / str(run.selected("refined").attempt)
    if phases.is_dir():
        for file in (path for path in sorted(phases.rglob("*")) if path.is_file()):
            copy_file(file, dsd / "phases" / file.relative_to(phases))
    save_probe(ready / PROBE, probes(run.loop, run.checkpoint))

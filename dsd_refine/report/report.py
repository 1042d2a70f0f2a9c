"""The report and the plain-text summary of a run."""

from __future__ import annotations

import html
import json
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsd_refine.errors import UsageError
from dsd_refine.extras import is_installed
from dsd_refine.report import words
from dsd_refine.report.data import data_lines
from dsd_refine.report.published import arm_of, true_name

if TYPE_CHECKING:
    import pandas as pd

LIBRARIES = ("torch", "timm", "transformers", "accelerate", "datasets", "safetensors")


@dataclass(frozen=True)
class Compared:
    """The comparison of the refined arm with another one, on the evaluation split.

    Attributes:
        delta: The difference of the metric, refined minus other, with its sign turned for losses and
            error rates: if it is greater than 0, refined is better.
        ci95: The lower and the upper end of the 95 % interval of `delta`.
        p_value: The two-sided p value of the hypothesis that there is no difference.
        p_adjusted: The p value after Holm's correction over all comparisons of the run.
        gained: The number of rows that only refined has right. None if rows are not right or wrong.
        lost: The number of rows that only the other arm has right, or None.
        test: The name of the test.
    """

    delta: float
    ci95: tuple[float, float]
    p_value: float
    p_adjusted: float
    gained: int | None
    lost: int | None
    test: str


@dataclass(frozen=True, repr=False)
class Report:
    """The report of a finished run.

    Attributes:
        data: The content of report.json. All properties read from it.
        output: The output directory.
    """

    data: Mapping[str, Any]
    output: Path

    @classmethod
    def load(cls, folder: str | Path) -> Report:
        """Read the report of a finished run.

        Args:
            folder: The output directory of the run.

        Returns:
            The report. Its `output` is `folder`.

        Raises:
            UsageError: The folder is not an output of dsd-refine.
        """
        file = Path(folder) / "dsd/report.json"
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise UsageError(f"{folder}: is not an output of dsd-refine: {file} cannot be read ({error!s:.100})") from None
        if not isinstance(data, dict) or not {"schema", "verdict", "arms", "comparison"} <= data.keys():
            raise UsageError(f"{folder}: is not an output of dsd-refine: {file} is the report of something else")
        return cls(data, Path(folder))

    @property
    def folder(self) -> Path:
        """The output directory."""
        return self.output

    @property
    def exit_code(self) -> int:
        """The exit code of the command: 0, or 3 if the gate was not met."""
        return int(self.data["exit_code"])

    @property
    def verdict(self) -> str:
        """The result of the published arm compared with the source: better | worse | same | inconclusive."""
        return str(self.data["verdict"])

    @property
    def published(self) -> str:
        """The arm whose weights the output has. "baseline" is the source (only with `publish: best`)."""
        return arm_of(self.data)

    @property
    def credit(self) -> str:
        """What made the result better: mask | training | unknown | none.

        mask: it is better than every control too. training: it is not better than every control.
        unknown: no control was run. none: the verdict is not better.
        """
        return str(self.data["credit"])

    @property
    def gate(self) -> dict[str, Any]:
        """The gate: `rule`, the name of the rule, and `passed`, whether it was met."""
        return dict(self.data["gate"])

    @property
    def cost(self) -> dict[str, Any]:
        """The cost of training, all arms together.

        `seconds` and `samples` are those of the training steps. `energy_joules` is the energy of the
        whole run, None if the machine has no counter for it. Reports of older releases have no
        cost; then the dict is empty.
        """
        return dict(self.data.get("cost") or {})

    @property
    def gate_passed(self) -> bool:
        """Whether the gate was met. If not, the weights are in the folder `rejected/` of the output."""
        return bool(self.data["gate"]["passed"])

    @property
    def source_model(self) -> str:
        """The source as MODEL of a command: with its commit, if it is a repository of the Hub."""
        source = self.data["source"]
        if source["revision"] and source["library"] != "torchvision":
            return f"{source['resolved']}@{source['revision']}"
        return os.path.expanduser(str(source["model" if source["library"] == "torchvision" else "resolved"]))

    @property
    def arms(self) -> dict[str, dict[str, float]]:
        """Arm (baseline, refined, dense, ...) -> metric -> value on the evaluation split.

        Values are fractions, not percent.
        """
        return {arm: dict(metrics) for arm, metrics in self.data["arms"].items()}

    @property
    def comparison(self) -> dict[str, Compared]:
        """Name of the other arm (baseline, dense, ...) -> the comparison of refined with it.

        If a control is published, its comparison with the source is there too, as `dense_vs_baseline`.
        """
        names = [field.name for field in fields(Compared)]
        return {
            name.removeprefix("refined_vs_"): Compared(**{key: values[key] for key in names} | {"ci95": tuple(values["ci95"])})
            for name, values in self.data["comparison"].items()
        }

    @property
    def warnings(self) -> list[str]:
        """The warnings of the run, one text for each."""
        return list(self.data["warnings"])

    def to_json(self) -> str:
        """Return the text of report.json.

        Returns:
            JSON, as the file in the output directory has it.

        Raises:
            ValueError: `data` has NaN or an infinite number, which JSON cannot express.
        """
        return json.dumps(self.data, indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    def to_pandas(self) -> pd.DataFrame:
        """Return the predictions of all arms on the evaluation split, from predictions.parquet.

        Returns:
            One row for each evaluation row. The columns are `row` (its name), `target`, and for each
            arm `prediction_ARM`, `score_ARM`, `count_ARM` and `loss_ARM`. The metric is the sum of
            the scores divided by the sum of the counts. For BLEU there is also `stats_ARM`, the
            statistics that are summed. With several seeds there are the same columns for
            `ARM_seed1`, `ARM_seed2`, ...

        Raises:
            UsageError: predictions.parquet is missing, or is not a parquet file.
        """
        import pandas

        file = self.output / "dsd/predictions.parquet"
        try:
            return pandas.read_parquet(file)
        except (OSError, ValueError) as error:  # the errors of pyarrow derive from these
            raise UsageError(f"{file}: cannot be read ({error!s:.100})") from None

    def __repr__(self) -> str:
        change = self.comparison.get("baseline" if self.published == "refined" else f"{self.published}_vs_baseline")
        metric = self.data["metric"]["name"]
        shown = f", {metric} {change.delta:+.4f} [{change.ci95[0]:+.4f}, {change.ci95[1]:+.4f}]" if change else ""
        return f"<Report of {self.output}: {self.verdict}, credit: {self.credit}{shown}>"

    def _repr_html_(self) -> str:
        """Return report.html for notebooks, in a frame, so that its styles do not change the notebook."""
        page = html.escape((self.output / "dsd/report.html").read_text(encoding="utf-8"), quote=True)
        return f'<iframe srcdoc="{page}" style="width: 100%; height: 800px; border: 0" sandbox></iframe>'


def environment(device: str, processes: int, sharded: bool) -> dict[str, Any]:
    """Return the versions of Python and the libraries, the device, the number of processes, and whether they divide the model.

    The version of a library that is not installed is None.
    """
    versions = {name: version(name) if is_installed(name) else None for name in LIBRARIES}
    return {"python": platform.python_version(), **versions, "device": device, "processes": processes, "sharded": sharded}


def summary(report: Report) -> str:
    """Return the text that the command prints at the end: arms, comparisons, verdict, gate, output."""
    data = report.data
    metric = data["metric"]["name"]
    lines = [f"{data['source']['model']} · {data['task']} · {data['data']['eval']['rows']:,} evaluation rows", ""]
    names = list(next(iter(data["arms"].values())))
    lines.append("  " + "arm".ljust(10) + "".join(name.rjust(12) for name in names))
    lines += [
        "  " + arm.ljust(10) + "".join(f"{value:12.4f}" for value in metrics.values()) for arm, metrics in data["arms"].items()
    ]
    lines.append("")
    for name, result in data["comparison"].items():
        low, high = result["ci95"]
        rows = f", {result['gained']} gained, {result['lost']} lost" if result["gained"] is not None else ""
        lines.append(
            f"  {name.replace('_', ' ')}: {metric} {result['delta']:+.4f} [{low:+.4f}, {high:+.4f}]"
            f", p = {result['p_adjusted']:.3g}{rows}"
        )
    lines += _seed_lines(data, metric)
    selected = data["selected"]
    chosen = f"sparsity {selected['sparsity']:g}" if selected["sparsity"] is not None else "no sparse phase"
    lines += [
        "",
        f"  verdict   {data['verdict']}: {words.headline(data)}",
        *(f"            {sentence}" for sentence in (words.edge(data), words.rows_words(data)) if sentence),
        f"  selected  {chosen}, epoch {selected['epoch']} of the last phase",
        *([f"  published {arm_of(data)}: {true_name(data)}"] if arm_of(data) != "refined" else []),
        f"  gate      {words.gate_words(data)}",
        f"  output    {report.output}",
        *(f"  data      {line}" for line in data_lines({**data["data"], "unused": ()})),
        *(f"  warning   {warning}" for warning in data["warnings"]),
    ]
    return "\n".join(lines)


def _seed_lines(data: Mapping[str, Any], metric: str) -> list[str]:
    if not data.get("seeds"):
        return []
    lines = ["", f"  over {data['seeds']['n']} seeds, mean and deviation:"]
    for arm, metrics in data["seeds"]["arms"].items():
        lines.append(f"  {arm.ljust(10)} {metric} {metrics[metric]['mean']:.4f} ± {metrics[metric]['deviation']:.4f}")
    for name, result in data["seeds"]["comparison"].items():
        low, high = result["ci95"]
        lines.append(f"  {name.replace('_', ' ')}: {result['delta']:+.4f} [{low:+.4f}, {high:+.4f}] over seeds and rows")
    return lines

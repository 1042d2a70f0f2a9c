"""The report and the plain-text summary of a run."""

from __future__ import annotations

import html
import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsd_refine.errors import UsageError
from dsd_refine.report import words
from dsd_refine.report.data import data_lines

if TYPE_CHECKING:
    import pandas as pd

LIBRARIES = ("torch", "timm", "transformers", "accelerate", "datasets", "safetensors")


@dataclass(frozen=True)
class Compared:
    """The refined arm beside another one on the evaluation split.

    `delta` > 0: refined is better, also for losses and error rates; `ci95` is its interval. `p_adjusted` is Holm's over the
    comparisons of the run. `gained` and `lost` count rows, where a row is right or wrong.
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
    """A finished run: report.json as `data`, and the folder `output` that it is about."""

    data: Mapping[str, Any]
    output: Path

    @classmethod
    def load(cls, folder: str | Path) -> Report:
        """The report of a finished run.

        Args:
            folder: the run's output directory.

        Raises:
            UsageError: the folder is no output of dsd-refine.
        """
        file = Path(folder) / "dsd/report.json"
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise UsageError(f"{folder}: is no output of dsd-refine: {file} cannot be read ({error!s:.100})") from None
        if not isinstance(data, dict) or not {"schema", "verdict", "arms", "comparison"} <= data.keys():
            raise UsageError(f"{folder}: is no output of dsd-refine: {file} is another report")
        return cls(data, Path(folder))

    @property
    def folder(self) -> Path:
        """The output directory."""
        return self.output

    @property
    def exit_code(self) -> int:
        """0, or 3 where the gate was not met."""
        return int(self.data["exit_code"])

    @property
    def verdict(self) -> str:
        """Refined against the source: better | worse | same | inconclusive."""
        return str(self.data["verdict"])

    @property
    def credit(self) -> str:
        """Whose doing a better verdict is: mask | training | unknown (no control was run); none: it is not better."""
        return str(self.data["credit"])

    @property
    def gate(self) -> dict[str, Any]:
        """`rule`: what was asked for. `passed`: was it met?"""
        return dict(self.data["gate"])

    @property
    def cost(self) -> dict[str, Any]:
        """What training took, all arms together: `seconds`, `samples`, `energy_joules` (None: no counter)."""
        return dict(self.data.get("cost") or {})

    @property
    def gate_passed(self) -> bool:
        """Was the gate met? The weights are in `rejected/` where it was not."""
        return bool(self.data["gate"]["passed"])

    @property
    def arms(self) -> dict[str, dict[str, float]]:
        """Arm (baseline, refined, dense, ...) -> metric -> value on the evaluation split. Fractions, not percent."""
        return {arm: dict(metrics) for arm, metrics in self.data["arms"].items()}

    @property
    def comparison(self) -> dict[str, Compared]:
        """The other arm (baseline, dense, ...) -> refined compared with it."""
        names = [field.name for field in fields(Compared)]
        return {
            name.removeprefix("refined_vs_"): Compared(**{key: values[key] for key in names} | {"ci95": tuple(values["ci95"])})
            for name, values in self.data["comparison"].items()
        }

    @property
    def warnings(self) -> list[str]:
        """What the run warned of."""
        return list(self.data["warnings"])

    def to_json(self) -> str:
        """report.json as text."""
        return json.dumps(self.data, indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    def to_pandas(self) -> pd.DataFrame:
        """The evaluation rows: `row`, `target`, and per arm `prediction_ARM`, `score_ARM`, `count_ARM`, `loss_ARM`.

        Raises:
            UsageError: the output's predictions.parquet is missing, or is no such file.
        """
        import pandas

        file = self.output / "dsd/predictions.parquet"
        try:
            return pandas.read_parquet(file)
        except (OSError, ValueError) as error:  # what pyarrow raises is one of them
            raise UsageError(f"{file}: cannot be read ({error!s:.100})") from None

    def __repr__(self) -> str:
        change = self.comparison.get("baseline")
        metric = self.data["metric"]["name"]
        shown = f", {metric} {change.delta:+.4f} [{change.ci95[0]:+.4f}, {change.ci95[1]:+.4f}]" if change else ""
        return f"<Report of {self.output}: {self.verdict}, credit: {self.credit}{shown}>"

    def _repr_html_(self) -> str:
        """report.html in a frame of its own, for notebooks: its styles do not reach the notebook's."""
        page = html.escape((self.output / "dsd/report.html").read_text(encoding="utf-8"), quote=True)
        return f'<iframe srcdoc="{page}" style="width: 100%; height: 800px; border: 0" sandbox></iframe>'


def environment(device: str, processes: int) -> dict[str, Any]:
    """Versions and machine, as the report lists them."""
    versions = {name: version(name) for name in LIBRARIES}
    return {"python": platform.python_version(), **versions, "device": device, "processes": processes}


def summary(report: Report) -> str:
    """What the command prints at the end: arms, comparisons, verdict, gate, where the output is."""
    data = report.data
    metric = data["metric"]["name"]
    lines = [f"{data['source']['model']} · {data['task']} · {data['data']['eval']['rows']:,} evaluation rows", ""]
    names = list(next(iter(data["arms"].values())))
    lines.append("  " + "arm".ljust(10) + "".join(name.rjust(12) for name in names))
    lines += [
        "  " + arm.ljust(10) + "".join(f"{value:12.4f}" for value in found.values()) for arm, found in data["arms"].items()
    ]
    lines.append("")
    for name, found in data["comparison"].items():
        low, high = found["ci95"]
        rows = f", {found['gained']} gained, {found['lost']} lost" if found["gained"] is not None else ""
        lines.append(
            f"  {name.replace('_', ' ')}: {metric} {found['delta']:+.4f} [{low:+.4f}, {high:+.4f}]"
            f", p = {found['p_adjusted']:.3g}{rows}"
        )
    lines += _seed_lines(data, metric)
    selected = data["selected"]
    chosen = f"sparsity {selected['sparsity']:g}" if selected["sparsity"] is not None else "no sparse phase"
    lines += [
        "",
        f"  verdict   {data['verdict']}: {words.said(data)}",
        *(f"            {sentence}" for sentence in (words.edge(data), words.rows_words(data)) if sentence),
        f"  selected  {chosen}, epoch {selected['epoch']} of the last phase",
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
    for arm, found in data["seeds"]["arms"].items():
        lines.append(f"  {arm.ljust(10)} {metric} {found[metric]['mean']:.4f} ± {found[metric]['deviation']:.4f}")
    for name, found in data["seeds"]["comparison"].items():
        low, high = found["ci95"]
        lines.append(f"  {name.replace('_', ' ')}: {found['delta']:+.4f} [{low:+.4f}, {high:+.4f}] over seeds and rows")
    return lines

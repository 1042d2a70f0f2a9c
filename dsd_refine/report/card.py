"""The model card of an output: front matter, the measured results, then the source's own card.

The source's card comes from outside. Its front matter may be broken or harmful. If it cannot be read
as a plain mapping, it is left out with a warning. The text after it is copied unchanged.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, eval_result_entries_to_yaml
from huggingface_hub.repocard_data import eval_results_to_model_index

from dsd_refine.files import leads_out
from dsd_refine.report import words
from dsd_refine.report.data import data_lines
from dsd_refine.report.markdown import arms_table, code, comparison_table, fenced, plain
from dsd_refine.report.published import arm_of, true_name
from dsd_refine.task_specs import TASKS
from dsd_refine.yaml_reader import load_card_yaml

LONGEST_FRONT = 1_000_000  # characters. Cards with hundreds of results have a few hundred thousand
FRONT = re.compile(r"\A\ufeff?---[ \t]*\r?\n(.*?)^---[ \t]*\r?$\n?", re.DOTALL | re.MULTILINE)
PAPER = "[Han et al., ICLR 2017](https://arxiv.org/abs/1607.04381)"
LOCAL = "local:"  # prefix of the name of local data. No Hub data set has such a name
SPLITS = ("train", "training", "test", "testing", "validation", "valid", "val", "eval", "evaluation", "dev")


@dataclass(frozen=True)
class SourceCard:
    """The README.md of a source.

    Attributes:
        front: The front matter; empty if there is none, or if it cannot be used.
        body: The text after the front matter, unchanged.
        warnings: What was left out, and why.
    """

    front: Mapping[str, Any]
    body: str
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class DataName:
    """The name of a data set.

    Attributes:
        name: The name for the reader.
        hub: `org/name` on the Hub; None for local data.
        config: The configuration of the Hub data set; None if none is given.
    """

    name: str
    hub: str | None = None
    config: str | None = None


def read_card(folder: Path) -> SourceCard:
    """Read the README.md of a source folder. The result is empty if there is none."""
    file = folder / "README.md"
    if file.is_symlink() and leads_out(file, folder):  # the card is published, and the link may point to a secret
        return SourceCard({}, "", ("the source's README.md is a link that leads out of its folder: left out of the card",))
    try:
        text = file.read_bytes().decode("utf-8", "replace") if file.is_file() else ""
    except OSError as error:
        return SourceCard({}, "", (f"the source's README.md cannot be read ({error.strerror}): left out of the card",))
    match = FRONT.match(text)
    if not match:
        return SourceCard({}, text.removeprefix("\ufeff"))
    front, problem = _read_front(match[1])
    warnings = (f"the front matter of the source's README.md is left out of the card: {problem}",) if problem else ()
    return SourceCard(front, text[match.end() :], warnings)


def _read_front(block: str) -> tuple[dict[str, Any], str | None]:
    """The front matter as a mapping that YAML can write again, and the problem if it has one."""
    try:
        content = read_plain(block)
        if content is None:
            return {}, None
        if not isinstance(content, dict):
            return {}, "it is not a mapping"
        front = {key: value for key, value in content.items() if isinstance(key, str)}
        yaml.safe_load(_dump(front))  # raises if it cannot be written and read again
    except (yaml.YAMLError, ValueError, TypeError, OverflowError, RecursionError) as error:
        return {}, f"{' '.join(str(error).split()):.200}"
    return front, None


def read_plain(text: str) -> Any:
    """Read YAML from outside, as `read_card` reads it.

    Raises:
        yaml.YAMLError: The text is not YAML, or has aliases.
        ValueError: The text is longer than LONGEST_FRONT, or a value is invalid.
        RecursionError: The text is nested too deeply.
    """
    if len(text) > LONGEST_FRONT:
        raise ValueError(f"it has {len(text):,} characters")
    return load_card_yaml(text)


def _dump(value: Any) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True)


def card(report: Mapping[str, Any], own: SourceCard, recipe_yaml: str, snippet: str) -> str:
    """Return the README.md of the output.

    Args:
        report: The content of report.json.
        own: The source's card.
        recipe_yaml: The recipe of the run.
        snippet: Python code that loads the output.
    """
    recipe = yaml.safe_load(recipe_yaml)
    front = _dump(front_matter(report, own.front, recipe))
    parts = [f"---\n{front}---\n\n{_section(report, recipe, snippet)}"]
    if own.body.strip():
        parts.append(
            f"\n---\n\n*The source's own card, unchanged. Its results are those of the source's weights.*\n\n{own.body}"
        )
    text = "".join(parts)
    return text.encode("utf-8", "replace").decode()


def front_matter(report: Mapping[str, Any], own: Mapping[str, Any], recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return the front matter: the source's, with the fields of this run over it.

    The source's results are left out, because they were measured with other weights.
    """
    source, task = report["source"], report["task"]
    front = {key: value for key, value in own.items() if key != "model-index"}
    if is_hub(source):
        front |= {"base_model": source["resolved"], "base_model_relation": "finetune"}
    for key, value in (("library_name", source["library"]), ("pipeline_tag", _pipeline_tag(task))):
        if value and not isinstance(front.get(key), str):
            front[key] = value
    trained = data_name(recipe.get("data"))
    front["tags"] = _listed(front.get("tags"), "dsd")
    if trained.hub or "datasets" in front:
        front["datasets"] = _listed(front.get("datasets"), *([trained.hub] if trained.hub else []))
    return front | {"model-index": _model_index(report, recipe)}


def _pipeline_tag(task: str) -> str | None:
    """The Hub's name of a task; None if this version of the program does not know the task."""
    return TASKS[task].pipeline_tag if task in TASKS else None


def is_hub(source: Mapping[str, Any]) -> bool:
    """Return whether the source is a repository on the Hub, not a directory or a torchvision entry."""
    has_hub_name = re.fullmatch(r"[\w.-]+/[\w.-]+", source["resolved"]) is not None
    return has_hub_name and source["revision"] is not None and source["library"] != "torchvision"


def _listed(value: Any, *more: str) -> list[str]:
    """A list of names for a field of the front matter: the usable names of `value`, then `more`."""
    items = value if isinstance(value, list) else [value]
    names = [str(item) for item in items if isinstance(item, str | int | float) and not isinstance(item, bool)]
    return list(dict.fromkeys([*names, *more]))


def data_name(spec: Any) -> DataName:
    """Return the name of the `data` of a recipe.

    It is the Hub's name, or the last part of a path. If that part is the name of a split
    (test.csv), it is the name of the folder.
    """
    if not isinstance(spec, str) or not spec:
        return DataName("data of one's own")
    path = Path(spec)
    match = re.fullmatch(r"([\w.-]+/[\w.-]+)(?::([\w.-]+))?", spec)
    if match and not spec.startswith(".") and not path.exists():
        return DataName(spec, match[1], match[2])
    inner = path.stem if path.suffix else path.name
    return DataName((path.parent.name if inner.lower() in SPLITS else inner) or inner or "data of one's own")


def evaluated_on(recipe: Mapping[str, Any]) -> DataName:
    """Return the name of the data that a recipe evaluates on: `eval_data`, else `data`."""
    return data_name(recipe.get("eval_data") or recipe.get("data"))


def _model_index(report: Mapping[str, Any], recipe: Mapping[str, Any]) -> Any:
    """The published arm's metrics on the evaluation rows, as the Hub's `model-index`."""
    data, task = evaluated_on(recipe), report["task"]
    results = [
        EvalResult(
            task_type=_pipeline_tag(task) or task, dataset_type=data.hub or data.name, dataset_name=data.name,
            dataset_config=data.config, metric_type=metric, metric_value=value,
        )
        for metric, value in report["arms"][arm_of(report)].items()
    ]  # fmt: skip
    return eval_results_to_model_index(f"{_short_name(report)}-dsd", results)


def eval_results(report: Mapping[str, Any], recipe_yaml: str) -> dict[str, str]:
    """Return the files of `.eval_results/`: file name -> YAML with the measured value of the metric.

    The format is https://huggingface.co/docs/hub/eval-results. It needs the name of a Hub data set.
    Local data are named `local:NAME`, which cannot be one. Otherwise a leaderboard could take a
    local folder for the benchmark of the same name.
    """
    data, metric = evaluated_on(yaml.safe_load(recipe_yaml)), report["metric"]["name"]
    entry = EvalResultEntry(
        dataset_id=data.hub or f"{LOCAL}{data.name}",
        task_id=data.config or "default",
        value=report["arms"][arm_of(report)][metric],
        notes=f"{metric} on {report['data']['eval']['rows']} rows, measured by dsd-refine",
    )
    name = re.sub(r"[^\w.-]+", "-", data.hub or data.name).strip("-.") or "data"
    return {f"{name[:80]}.yaml": _dump(eval_result_entries_to_yaml([entry]))}


def _short_name(report: Mapping[str, Any]) -> str:
    source = report["source"]
    return str(source["resolved"]).rstrip("/").rsplit("/", 1)[-1] or str(source["model"])


def _section(report: Mapping[str, Any], recipe: Mapping[str, Any], snippet: str) -> str:
    source, data = report["source"], report["data"]
    name = code(source["resolved"] if source["revision"] else _short_name(report))
    revision = f" at {code(source['revision'])}" if source["revision"] else ""
    rule, passed = report["gate"]["rule"], report["gate"]["passed"]
    meaning = f": {words.GATES[rule]}" if rule in words.GATES else ""
    gate = (
        f" The gate {code(rule)} was met{meaning}."
        if passed
        else f" The gate {code(rule)} was not met: the checkpoint was set aside."
    )
    lines = [
        "## Refined with dsd-refine",
        "",
        f"{_origin(report, name + revision)} on {data['train']['rows']:,} rows of "
        f"{code(data_name(recipe.get('data')).name)}. Same files, names, shapes and dtypes: it loads as the source does.",
        "",
        f"**Verdict: {report['verdict']}** ({plain(words.headline(report))}).{gate}",
        "",
        plain(" ".join(text for text in (words.measured(report), words.edge(report), words.rows_words(report)) if text)),
        *(f"\n{plain(sentence)}" for sentence in words.credit(report)),
        "",
        *arms_table(report),
        "",
        *comparison_table(report),
        "",
        f"`baseline` is the source; metrics on the evaluation rows of {code(evaluated_on(recipe).name)}. "
        "Everything measured is in `dsd/report.json`, drawn in `dsd/report.html`.",
        "",
        *_data_section(data),
        "### How to load it",
        "",
        *fenced(snippet, "python"),
        "",
        "### Recipe",
        "",
        *fenced(public_recipe(recipe), "yaml"),
        "",
    ]
    return "\n".join(lines)


def _origin(report: Mapping[str, Any], source: str) -> str:
    """How the published weights were made, as the beginning of a sentence about the data."""
    if arm_of(report) == "refined":
        return f"Refined from {source} by Dense-Sparse-Dense training ({PAPER})"
    if arm_of(report) == "baseline":
        return f"The weights of {source}, unchanged: no arm of Dense-Sparse-Dense training ({PAPER}) was preferred to them"
    return f"Trained on from {source} ({plain(true_name(report))}), as a control of Dense-Sparse-Dense training ({PAPER}),"


def _data_section(data: Mapping[str, Any]) -> list[str]:
    lines = data_lines(data)
    return ["### Data", "", *(f"- {plain(line)}" for line in lines), ""] if lines else []


def public_recipe(recipe: Mapping[str, Any]) -> str:
    """Return the recipe as YAML, without the paths of the machine that it ran on."""
    shown = dict(recipe)
    for key in ("data", "eval_data"):
        spec = shown.get(key)
        if isinstance(spec, str) and data_name(spec).hub is None:
            shown[key] = Path(spec).name
    return _dump(shown)

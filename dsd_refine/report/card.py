"""The model card of an output: front matter merged with the source's, what was measured, then the source's own text.

The source's card is a stranger's: its front matter may be broken, or mean harm. What cannot be read as a plain mapping is
left out with a warning; its text is kept as it is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, eval_result_entries_to_yaml
from huggingface_hub.repocard_data import eval_results_to_model_index

from dsd_refine.files import leads_out
from dsd_refine.report import words
from dsd_refine.report.data import data_lines
from dsd_refine.task_specs import TASKS
from dsd_refine.yaml_reader import load_card_yaml

LONGEST_FRONT = 1_000_000  # characters; cards with hundreds of results have a few hundred thousand
FRONT = re.compile(r"\A\ufeff?---[ \t]*\r?\n(.*?)^---[ \t]*\r?$\n?", re.DOTALL | re.MULTILINE)
PAPER = "[Han et al., ICLR 2017](https://arxiv.org/abs/1607.04381)"
LOCAL = "local:"  # before the name of data of one's own, which no data set of the Hub has
SPLITS = ("train", "training", "test", "testing", "validation", "valid", "val", "eval", "evaluation", "dev")


@dataclass(frozen=True)
class SourceCard:
    """A source's README.md: its front matter as a mapping (empty if it has none that can be used), and the rest verbatim."""

    front: Mapping[str, Any]
    body: str
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class DataName:
    """What evaluation data are called: `hub` is the Hub's `org/name` (None: data of one's own), `config` its configuration."""

    name: str
    hub: str | None = None
    config: str | None = None


def read_card(folder: Path) -> SourceCard:
    """The README.md of a source folder; empty where there is none."""
    file = folder / "README.md"
    if file.is_symlink() and leads_out(file, folder):  # the card is published: it may be anybody's file, a token too
        return SourceCard({}, "", ("the source's README.md is a link that leads out of its folder: left out of the card",))
    try:
        text = file.read_bytes().decode("utf-8", "replace") if file.is_file() else ""
    except OSError as error:
        return SourceCard({}, "", (f"the source's README.md cannot be read ({error.strerror}): left out of the card",))
    found = FRONT.match(text)
    if not found:
        return SourceCard({}, text.removeprefix("\ufeff"))
    front, wrong = _front(found[1])
    warnings = (f"the front matter of the source's README.md is left out of the card: {wrong}",) if wrong else ()
    return SourceCard(front, text[found.end() :], warnings)


def _front(block: str) -> tuple[dict[str, Any], str | None]:
    """(the block as a mapping that can be written again, what is wrong with it)."""
    try:
        found = read_plain(block)
        if found is None:
            return {}, None
        if not isinstance(found, dict):
            return {}, "it is no mapping"
        front = {key: value for key, value in found.items() if isinstance(key, str)}
        yaml.safe_load(_dump(front))
    except (yaml.YAMLError, ValueError, TypeError, OverflowError, RecursionError) as error:
        return {}, f"{' '.join(str(error).split()):.200}"
    return front, None


def read_plain(text: str) -> Any:
    """A stranger's YAML as `read_card` reads it.

    Raises:
        yaml.YAMLError, ValueError, RecursionError: it is none, has aliases, or is too long to be a card's.
    """
    if len(text) > LONGEST_FRONT:
        raise ValueError(f"it has {len(text):,} characters")
    return load_card_yaml(text)


def _dump(value: Any) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True)


def card(report: Mapping[str, Any], own: SourceCard, recipe_yaml: str, snippet: str) -> str:
    """README.md of the output. `snippet` is Python that loads it."""
    recipe = yaml.safe_load(recipe_yaml)
    front = _dump(front_matter(report, own.front, recipe))
    parts = [f"---\n{front}---\n\n{_section(report, recipe, snippet)}"]
    if own.body.strip():
        parts.append(f"\n---\n\n*The source's own card, unchanged; its figures are the source's weights'.*\n\n{own.body}")
    text = "".join(parts)
    return text.encode("utf-8", "replace").decode()


def front_matter(report: Mapping[str, Any], own: Mapping[str, Any], recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The source's metadata with ours over it. Of results, those measured here alone: the source's are of other weights."""
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
    """The Hub's name of a task; None for one that a report has from another version of this program."""
    return TASKS[task].pipeline_tag if task in TASKS else None


def is_hub(source: Mapping[str, Any]) -> bool:
    """Is the source a repository on the Hub (and not a directory, or an entry of torchvision's)?"""
    named = re.fullmatch(r"[\w.-]+/[\w.-]+", source["resolved"]) is not None
    return named and source["revision"] is not None and source["library"] != "torchvision"


def _listed(value: Any, *more: str) -> list[str]:
    """A field that is a list of names, whatever a stranger made of it, with ours at the end."""
    items = value if isinstance(value, list) else [value]
    names = [str(item) for item in items if isinstance(item, str | int | float) and not isinstance(item, bool)]
    return list(dict.fromkeys([*names, *more]))


def data_name(spec: Any) -> DataName:
    """What the `data` of a recipe is called: the Hub's name, or the last part of a path (its folder's for test.csv)."""
    if not isinstance(spec, str) or not spec:
        return DataName("data of one's own")
    path = Path(spec)
    found = re.fullmatch(r"([\w.-]+/[\w.-]+)(?::([\w.-]+))?", spec)
    if found and not spec.startswith(".") and not path.exists():
        return DataName(spec, found[1], found[2])
    inner = path.stem if path.suffix else path.name
    return DataName((path.parent.name if inner.lower() in SPLITS else inner) or inner or "data of one's own")


def evaluated_on(recipe: Mapping[str, Any]) -> DataName:
    return data_name(recipe.get("eval_data") or recipe.get("data"))


def _model_index(report: Mapping[str, Any], recipe: Mapping[str, Any]) -> Any:
    """The refined arm's metrics on the evaluation rows, as the Hub's `model-index`."""
    data, task = evaluated_on(recipe), report["task"]
    results = [
        EvalResult(
            task_type=_pipeline_tag(task) or task, dataset_type=data.hub or data.name, dataset_name=data.name,
            dataset_config=data.config, metric_type=metric, metric_value=value,
        )
        for metric, value in report["arms"]["refined"].items()
    ]  # fmt: skip
    return eval_results_to_model_index(f"{_short_name(report)}-dsd", results)


def eval_results(report: Mapping[str, Any], recipe_yaml: str) -> dict[str, str]:
    """File name -> YAML for `.eval_results/` (https://huggingface.co/docs/hub/eval-results): the task's metric, as measured.

    The format wants a data set of the Hub. Data of one's own are called `local:NAME`, which is none, so that no board takes
    a folder that happens to be called like a benchmark for that benchmark.
    """
    data, metric = evaluated_on(yaml.safe_load(recipe_yaml)), report["metric"]["name"]
    entry = EvalResultEntry(
        dataset_id=data.hub or f"{LOCAL}{data.name}",
        task_id=data.config or "default",
        value=report["arms"]["refined"][metric],
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
    at = f" at {code(source['revision'])}" if source["revision"] else ""
    rule, met = report["gate"]["rule"], report["gate"]["passed"]
    asked = f": {words.GATES[rule]}" if rule in words.GATES else ""
    gate = f" The gate {code(rule)} was met{asked}." if met else f" The gate {code(rule)} was not met: it was set aside."
    lines = [
        "## Refined with dsd-refine",
        "",
        f"Refined from {name}{at} by Dense-Sparse-Dense training ({PAPER}) on {data['train']['rows']:,} rows of "
        f"{code(data_name(recipe.get('data')).name)}. Same files, names, shapes and dtypes: it loads as the source does.",
        "",
        f"**Verdict: {report['verdict']}** ({_plain(words.said(report))}).{gate}",
        "",
        _plain(" ".join(text for text in (words.measured(report), words.edge(report), words.rows_words(report)) if text)),
        *(f"\n{_plain(sentence)}" for sentence in words.credit(report)),
        "",
        *_arms_table(report),
        "",
        *_comparison_table(report),
        "",
        f"`baseline` is the source; metrics on the evaluation rows of {code(evaluated_on(recipe).name)}. "
        "Everything measured is in `dsd/report.json`, drawn in `dsd/report.html`.",
        "",
        *_data_section(data),
        "### How to load it",
        "",
        *_fenced(snippet, "python"),
        "",
        "### Recipe",
        "",
        *_fenced(public_recipe(recipe), "yaml"),
        "",
    ]
    return "\n".join(lines)


def _data_section(data: Mapping[str, Any]) -> list[str]:
    lines = data_lines(data)
    return ["### Data", "", *(f"- {_plain(line)}" for line in lines), ""] if lines else []


def _arms_table(report: Mapping[str, Any]) -> list[str]:
    arms, seeds, metric = report["arms"], report.get("seeds"), report["metric"]["name"]
    names = list(arms["baseline"])
    head = [*names, *([f"{metric} over {seeds['n']} seeds"] if seeds else [])]
    rows = []
    for arm, found in arms.items():
        cells = [f"{found[name]:.4f}" for name in names]
        if seeds:
            spread = seeds["arms"].get(arm)
            cells.append(f"{spread[metric]['mean']:.4f} ± {spread[metric]['deviation']:.4f}" if spread else "")
        rows.append([arm, *cells])
    return _table(["arm", *head], rows)


def _comparison_table(report: Mapping[str, Any]) -> list[str]:
    rows = [
        [
            name.replace("_", " "), words.signed(found["delta"]), words.interval(found), f"{found['p_adjusted']:.3g}",
            *("" if found[key] is None else f"{found[key]:,}" for key in ("gained", "lost")),
        ]
        for name, found in report["comparison"].items()
    ]  # fmt: skip
    return _table(["comparison", "difference", "95 % interval", "p, adjusted", "rows gained", "rows lost"], rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [[_plain(text) for text in row] for row in (head, *rows)]
    marks = ["---", *["---:"] * (len(head) - 1)]
    return ["| " + " | ".join(line) + " |" for line in (lines[0], marks, *lines[1:])]


def _plain(text: str) -> str:
    """Text that is nothing but text in Markdown, also in a table."""
    for sign, entity in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;")):
        text = text.replace(sign, entity)
    return re.sub(r"([\\`*_\[\]|~$])", r"\\\1", " ".join(text.split()))


def code(text: str) -> str:
    """A name from outside as a code span: no Markdown or HTML works in it, and no backtick ends it."""
    text = " ".join(text.split())
    fence = "`" * (max(map(len, re.findall(r"`+", text)), default=0) + 1)
    room = " " if text[:1] == "`" or text[-1:] == "`" or not text else ""
    return f"{fence}{room}{text}{room}{fence}"


def _fenced(text: str, language: str) -> list[str]:
    fence = "`" * max(3, max(map(len, re.findall(r"`+", text)), default=0) + 1)
    return [f"{fence}{language}", text.rstrip("\n"), fence]


def public_recipe(recipe: Mapping[str, Any]) -> str:
    """The recipe without the paths of the machine that it ran on."""
    shown = dict(recipe)
    for key in ("data", "eval_data"):
        spec = shown.get(key)
        if isinstance(spec, str) and data_name(spec).hub is None:
            shown[key] = Path(spec).name
    return _dump(shown)

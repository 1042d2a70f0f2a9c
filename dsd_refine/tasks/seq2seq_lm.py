"""Sequence-to-sequence language models on pairs of texts: translations, summaries, answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any, ClassVar

import numpy as np
import torch

from dsd_refine.checkpoint.library import Library
from dsd_refine.data.columns import SOURCE, TARGET, column
from dsd_refine.data.reading import Table
from dsd_refine.data.splits import Examined, Rows, divide, use_rows
from dsd_refine.data.tables import row_blocks
from dsd_refine.errors import DataError
from dsd_refine.recipe import Recipe
from dsd_refine.task_specs import TASKS
from dsd_refine.tasks.base import Tables, choose_metric, require
from dsd_refine.tasks.classification import overlap_warning, skip_warnings
from dsd_refine.tasks.encoder_decoder import Array, EncoderDecoder, TargetPart
from dsd_refine.tasks.inputs.languages import is_multilingual, language_id
from dsd_refine.tasks.inputs.texts import no_text, text_digest
from dsd_refine.tasks.inputs.tokens import Unknown, beyond_warnings, load_tokenizer, or_reason, rows_of_embedding, tokenized
from dsd_refine.tasks.inputs.writer import TextWriter, has_limit, open_writer, shift
from dsd_refine.tasks.text_metrics import (
    BLEU_STATS,
    CHRF_STATS,
    ORDERS,
    ROUGE,
    best_chrf_sums,
    bleu,
    bleu_signature,
    bleu_sums,
    chrf,
    chrf_signature,
    rouge_scores,
)

METRICS = ("chrf", "bleu", "exact_match", *ROUGE, "loss")
PLAIN_STATS = BLEU_STATS + CHRF_STATS + 2  # then: 1 where the text is the target, and 1 for the row
SUMMARIES = ("summary", "highlights", "abstract")  # columns whose task T5's config calls `summarization`


def chrf_of(sums: Array) -> Array:
    """chrF of summed `stats` (…, statistics), in which BLEU's come first."""
    return chrf(sums[..., BLEU_STATS:])


CORPORA = {"chrf": chrf_of, "bleu": bleu}


@dataclass
class Seq2SeqLM(EncoderDecoder):
    """`seq2seq-lm` for transformers models.

    A row may have several right targets: the first one trains, and all judge. `stats` are the sums of BLEU and of
    chrF, 1 where the text is a target, 1 for the row, where ROUGE decides its scores, and the number of targets.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    name: ClassVar[str] = "seq2seq-lm"
    trivial: ClassVar[str] = "writing nothing"

    @property
    def width(self) -> int:
        """The number of sums of a written text."""
        return PLAIN_STATS + (len(ROUGE) if self.metric in ROUGE else 0)

    @property
    def corpus(self) -> Callable[[Array], Array] | None:
        """The metric of summed `stats`, for the bootstrap. None: it is a mean of rows."""
        return CORPORA.get(self.metric)

    def encoder_inputs(self, part: TargetPart, units: Sequence[int]) -> dict[str, torch.Tensor]:
        """Tokens and mask of the sources, int64 of shape rows x longest source."""
        ids = [torch.from_numpy(part.sources[unit].astype(np.int64)) for unit in units]
        # M2M100 counts positions by the id of the pad token, so what fills is that; the mask is made by length
        filler = int(self.writer.tokenizer.pad_token_id or 0)
        padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=filler)
        mask = torch.arange(padded.shape[1]) < torch.tensor([[len(one)] for one in ids])
        return {"input_ids": padded, "attention_mask": mask.long()}

    def measure(self, references: Sequence[str], text: str) -> tuple[float, ...]:
        """BLEU's and chrF's sums, whether the text is a target, 1, and ROUGE's scores where one decides."""
        rouge = rouge_scores(references, text) if self.metric in ROUGE else ()
        return (*bleu_sums(references, text), *best_chrf_sums(references, text), float(text in references), 1.0, *rouge)

    def row_value(self, sums: Sequence[float]) -> tuple[float, float]:
        """For BLEU the matching and the written 4-grams; else the row's own value, and 1."""
        if self.metric == "bleu":
            return sums[1 + ORDERS], sums[BLEU_STATS - 1]
        values = {"chrf": float(chrf_of(np.asarray(sums))), "exact_match": sums[PLAIN_STATS - 2]}
        return (values | dict(zip(ROUGE, sums[PLAIN_STATS:], strict=False)))[self.metric], 1.0

    def written_metrics(self, sums: Array) -> dict[str, float]:
        """chrF, BLEU and the share of exact matches; ROUGE where it decides, as means of rows."""
        rows = max(1.0, float(sums[PLAIN_STATS - 1]))
        rouge = sums[PLAIN_STATS : self.width] / rows
        plain = {"chrf": float(chrf_of(sums)), "bleu": float(bleu(sums)), "exact_match": float(sums[PLAIN_STATS - 2]) / rows}
        return plain | {name: float(value) for name, value in zip(ROUGE, rouge, strict=False)}

    @property
    def preprocessing(self) -> dict[str, Any]:
        """As in `EncoderDecoder`, with prefix, languages and the signatures of the metrics."""
        counts = [len(references) for references in self.eval.rows.texts]
        signatures = {"bleu": bleu_signature(counts), "chrf": chrf_signature(counts)} if self.writes else {}
        rouge = {"rouge": f"rouge-score {version('rouge-score')}, stemmed"} if self.metric in ROUGE else {}
        return {**self.settings, **super().preprocessing, **signatures, **rouge}


def open_task(recipe: Recipe, library: Library, model: torch.nn.Module, tables: Tables, evaluation: Tables | None) -> Seq2SeqLM:
    """The task on these pairs of texts, with the checkpoint's own tokenizer and generation config.

    Raises:
        DataError: no usable pairs, or languages that are not known. CheckpointError: no usable tokenizer.
        UsageError: sacrebleu or rouge-score is not installed.
    """
    metric = choose_metric("seq2seq-lm", recipe.metric, METRICS)
    if metric != "loss":
        require("seq2seq-lm", "seq2seq", "sacrebleu")
    if metric in ROUGE:
        require(f"metric: {metric}", "rouge", "rouge_score")
    first = tables.get("train") or next(iter(tables.values()))
    columns = column(first, recipe.source_column, SOURCE), column(first, recipe.target_column, TARGET)
    tokenizer = load_tokenizer(library.folder, library.trust_remote_code)
    languages = [
        asked or (name if language_id(tokenizer, name) is not None else None)
        for asked, name in zip((recipe.source_language, recipe.target_language), columns, strict=True)
    ]
    default = TASKS["seq2seq-lm"].default_length or 0
    writer = open_writer(library.folder, tokenizer, model, recipe.max_length, default, (languages[0], languages[1]))
    prefix, said = _prefix(recipe.prefix, library.config, columns)
    most = recipe.max_length or _most_sources(tokenizer, library.config, default)
    examiner = _Examiner(writer, columns, prefix, most, rows_of_embedding(model, library.config))
    used = {name: examiner.examine(table) for name, table in tables.items()}
    judged = {name: examiner.examine(table) for name, table in evaluation.items()} if evaluation else None
    divided = divide(used, judged, recipe.holdout)
    train, holdout, judge = (examiner.part(rows, model) for rows in (divided.train, divided.holdout, divided.eval))
    assert train is not None
    assert judge is not None
    if not has_limit(writer.generation):  # the default of transformers is 20 tokens
        writer.generation.update(max_new_tokens=max(len(ids) for part in (train, judge) for ids in part.labels))
    warnings = overlap_warning(divided) + skip_warnings(divided) + said + [*writer.warnings] + examiner.warnings()
    settings = {"prefix": prefix} if prefix else {}
    if is_multilingual(tokenizer):
        settings |= {"source_language": tokenizer.src_lang, "target_language": tokenizer.tgt_lang}
    return Seq2SeqLM(train, holdout, judge, writer, metric, warnings, settings=settings)


def _most_sources(tokenizer: Any, config: Any, default: int) -> int:
    """The most tokens of a source: the least of the limits of tokenizer, position table and task."""
    limits = (tokenizer.model_max_length, getattr(config, "max_position_embeddings", None), default)
    return min(limit for limit in limits if isinstance(limit, int) and limit > 0)


def _prefix(asked: str | None, config: Any, columns: tuple[str, str]) -> tuple[str, list[str]]:
    """What stands before each source, and a warning where the config's prefixes are for other data.

    T5's config has a prefix for each task it was trained on: `translation_en_to_de`, `summarization`.
    """
    if asked is not None:
        return asked, []
    parameters = getattr(config, "task_specific_params", None) or {}
    known = {name: each["prefix"] for name, each in parameters.items() if isinstance(each, dict) and each.get("prefix")}
    source, target = columns
    name = "summarization" if target in SUMMARIES else f"translation_{source}_to_{target}"
    prefix = getattr(config, "prefix", None) or known.get(name, "")
    if prefix or not known:
        return prefix, []
    shown = ", ".join(repr(text) for text in known.values())
    line = f"the config knows prefixes of sources ({shown}), and none for these columns: none is added; --set prefix=… adds one"
    return "", [line]


def _texts(target: Any) -> list[Any]:
    """The targets of a row: one text, or a list of texts that are all right. The first one trains."""
    return list(target) if isinstance(target, list | tuple) else [target]


class _Examiner:
    """Looks through pairs of texts, and keeps the tokens of those that can be used."""

    def __init__(self, writer: TextWriter, columns: tuple[str, str], prefix: str, most: int, size: int | None) -> None:
        self.writer, self.columns, self.prefix, self.most, self.size = writer, columns, prefix, most, size
        self.unknown, self.cut = Unknown(writer.tokenizer), [0, 0]
        self.kept: dict[int, list[tuple[Array, Array] | None]] = {}  # id of a table -> tokens of its rows

    def examine(self, table: Table) -> Rows:
        """The usable rows of a table. Equal sources stay in one part, whatever their targets."""
        kept = self.kept.setdefault(id(table), [])
        rows: list[Examined] = []
        for source, target in (pair for block in row_blocks(table, self.columns) for pair in block):
            tokens, reason = or_reason(self._tokens, source, target)
            kept.append(tokens)
            said = () if tokens is None else tuple(" ".join(text.split()) for text in _texts(target))
            length = 0 if tokens is None else len(tokens[0])
            rows.append(Examined(b"" if tokens is None else text_digest(source), reason=reason, texts=said, length=length))
        return use_rows(table, rows)

    def _tokens(self, source: Any, target: Any) -> tuple[Array, Array]:
        """Tokens of the source and labels of a pair.

        Raises:
            DataError: the pair cannot be used.
        """
        targets = _texts(target)
        for what, text in (("source", source), *(("target", text) for text in targets or [None])):
            if no_text(text):
                raise DataError(f"no {what} text")
        labels, was_cut = self.writer.labels(targets[0])
        ids = list(self._source_ids(self.prefix + source))
        self.unknown.see(ids)
        self.unknown.see(labels)
        if len(ids) > self.most:
            self.cut[0] += 1
            ids = list(self._source_ids(self.prefix + source, truncation=True, max_length=self.most))
        self.cut[1] += was_cut
        return np.asarray(ids, dtype=np.int32), labels

    def _source_ids(self, text: str, **options: Any) -> list[int]:
        return list(tokenized(self.writer.tokenizer, text, size=self.size, verbose=False, **options)["input_ids"])

    def part(self, rows: Rows | None, model: Any) -> TargetPart | None:
        """The rows with their tokens."""
        if rows is None:
            return None
        pairs = [pair for number in rows.numbers if (pair := self.kept[id(rows.table)][int(number)]) is not None]
        labels = [labels for _, labels in pairs]
        return TargetPart(rows, labels, [shift(model, ids) for ids in labels], [source for source, _ in pairs])

    def warnings(self) -> list[str]:
        """What is to be said of the texts."""
        lines = beyond_warnings(self.writer.tokenizer, self.size) + self.unknown.warnings()
        limits = (self.most, self.writer.most_labels)
        for what, count, most in zip(("sources", "targets"), self.cut, limits, strict=True):
            if count:
                lines.append(f"{count:,} {what} are longer than {most:,} tokens: they are cut (--max-length)")
        return lines

"""Image captioning: teacher-forced loss for training and selection, BLEU of generated captions for
evaluation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch.nn import functional as F

from dsd_refine.checkpoint.library import Library
from dsd_refine.checkpoint.preprocessing import Preprocessing
from dsd_refine.data.columns import CAPTION, IMAGE, column
from dsd_refine.data.reading import Table
from dsd_refine.data.splits import Examined, Rows, divide, use_rows
from dsd_refine.data.tables import in_threads
from dsd_refine.forward import logits_of
from dsd_refine.recipe import Augment, Recipe
from dsd_refine.task_specs import TASKS
from dsd_refine.tasks.base import IGNORED, Batch, ChanceBaseline, Forward, Item, Score, Scores, Tables, ratio, require
from dsd_refine.tasks.causal_lm import uniform_baseline
from dsd_refine.tasks.causality import WINDOWS, refuse_foresight
from dsd_refine.tasks.classification import overlap_warning, skip_warnings
from dsd_refine.tasks.image_rows import stacked, with_files
from dsd_refine.tasks.inputs.captioner import CaptionGenerator, open_caption_generator
from dsd_refine.tasks.inputs.images import Seen, examine_picture, look_warnings
from dsd_refine.tasks.inputs.pixels import pixels
from dsd_refine.tasks.inputs.tokens import beyond_warnings, load_tokenizer, or_reason
from dsd_refine.tasks.text_metrics import BLEU_STATS, ORDERS, bleu, bleu_signature, bleu_sums

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class CaptionPart:
    """Images with their captions. Unit u is one caption of the row `row[u]`: `tokens[u]`, from
    start to end.
    """

    rows: Rows
    row: Array
    tokens: list[Array]

    @property
    def units(self) -> int:
        """The number of captions of all images."""
        return len(self.tokens)

    def row_of(self, unit: int) -> int:
        """The index of the image that the caption describes."""
        return int(self.row[unit])

    def leads(self, unit: int) -> bool:
        """Is it its row's first caption?"""
        return unit == 0 or self.row[unit] != self.row[unit - 1]


@dataclass
class ImageCaptioning:
    """`image-captioning` for transformers models. A real target is a token of a caption after the
    start, its end included.

    Captions are generated for the evaluation split alone; the holdout selects by the loss. Per row,
    `stats` are BLEU's ten sums over 1- to 4-grams and the number of targets, `score` the matching
    4-grams and `count` the generated ones; BLEU is no ratio of these two, and is computed from
    `stats`.
    """

    train: CaptionPart
    holdout: CaptionPart | None
    eval: CaptionPart
    preprocessing: Preprocessing
    augment: Augment
    generator: CaptionGenerator
    image_column: str
    warnings: list[str] = field(default_factory=list)
    name: str = "image-captioning"
    metric: str = "bleu4"
    higher_is_better: bool = True
    draws: ClassVar[bool] = True

    @property
    def chance_baselines(self) -> tuple[ChanceBaseline, ...]:
        """The loss of a uniform guess among the tokenizer's tokens, and the BLEU-4 of empty captions, 0."""
        empty = ChanceBaseline("bleu4", 0.0, "writing nothing", higher_is_better=True)
        return (uniform_baseline(len(self.generator.tokenizer)), empty)

    def batch(self, part: CaptionPart, items: Sequence[Item]) -> Batch:
        """Decode the images and pad the captions to the longest one; each position predicts the next token.

        The images have the shape captions x C x H x W. The tokens without the last one, their mask and the
        targets are int64 of shape captions x (longest caption - 1); padding has the target IGNORED.
        `aside["final"]` (bool, one per caption) is True where a caption is to be generated: for the
        first caption of each image of the evaluation part.
        """
        rows, table = [part.row_of(unit) for unit, _ in items], part.rows.table
        images = []
        for row, (_, seed) in zip(rows, items, strict=True):
            number = int(part.rows.numbers[row])
            images.append(pixels(table, self.image_column, number, self.preprocessing, self.augment, seed))
        tokens = [torch.from_numpy(part.tokens[unit]) for unit, _ in items]
        padded = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True)  # what fills is masked by length, never by id
        real = torch.arange(1, padded.shape[1]) < torch.tensor([[len(ids)] for ids in tokens])
        name, mask = self.generator.inputs
        inputs = {self.preprocessing.input_name: stacked(images), name: padded[:, :-1], mask: real.long()}
        final = torch.tensor([part is self.eval and part.leads(unit) for unit, _ in items])
        texts = tuple(part.rows.texts[row] for row in rows)
        return Batch(inputs, torch.where(real, padded[:, 1:], IGNORED), int(real.sum()), {"final": final}, texts)

    def refuse_foresight(self, forward: Forward, device: torch.device) -> None:
        """Raises CheckpointError where the model sees the tokens that it is to predict."""
        units = range(min(WINDOWS, self.train.units))
        windows = [self.batch(self.train, [(unit, None)]).to(device).inputs for unit in units]
        names = self.generator.inputs

        def logits(inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
            return logits_of(forward, inputs)[:, -inputs[names[0]].shape[1] :]

        refuse_foresight(self.name, logits, windows, names)

    def loss(self, forward: Forward, batch: Batch) -> torch.Tensor:
        """The sum of -log p(token) over all tokens after each caption's start, a float32 scalar."""
        return self._nll(forward, batch).sum()

    def logits(self, forward: Forward, batch: Batch) -> torch.Tensor:
        """Targets x vocabulary."""
        return self._text_logits(forward, batch)[batch.targets != IGNORED]

    def _text_logits(self, forward: Forward, batch: Batch) -> torch.Tensor:
        """Of the text's positions; GIT's come after those of the image."""
        return logits_of(forward, batch.inputs)[:, -batch.targets.shape[1] :]

    def _nll(self, forward: Forward, batch: Batch) -> torch.Tensor:
        logits = self._text_logits(forward, batch)
        flat = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORED, reduction="none")
        return flat.reshape(batch.targets.shape)

    def score(self, forward: Forward, batch: Batch) -> list[Score]:
        """For each caption the summed -log p of its tokens; for an image's first one also BLEU's sums.

        These need a generated caption, which only the evaluation part has. See `row_score`.
        """
        losses = self._nll(forward, batch).double().sum(1).tolist()
        targets = (batch.targets != IGNORED).sum(1).tolist()
        final = batch.aside["final"]
        written = iter(
            self.generator.generate(forward, batch.inputs[self.preprocessing.input_name][final]) if final.any() else []
        )
        texts = [next(written) if leads else None for leads in final.tolist()]
        return [row_score(*values) for values in zip(batch.texts, texts, losses, targets, strict=True)]

    def metrics(self, scores: Scores) -> dict[str, float]:
        """BLEU-4 to BLEU-1 of the whole corpus, and the mean loss per token.

        Without generated captions (the holdout) there is only the loss.
        """
        stats = scores.stats if scores.stats is not None else np.zeros((1, BLEU_STATS + 1))
        loss = {"loss": ratio(scores.loss, stats[:, -1])}
        if scores.text is None:
            return loss
        sums = stats.sum(0)
        return {f"bleu{order}": float(bleu(sums, order)) for order in range(ORDERS, 0, -1)} | loss

    def corpus(self, sums: Array) -> Array:
        """The metric of summed `stats`, for the bootstrap."""
        return bleu(sums)

    def target(self, part: CaptionPart, row: int) -> str | None:
        """The references, one a line."""
        return "\n".join(part.rows.texts[row])

    def shown(self, prediction: int) -> str | None:
        """None: this task predicts texts, not classes."""
        return None

    def report(self) -> Mapping[str, Any]:
        """No labels, the warnings, and the preprocessing of images with the way captions are generated.

        The latter is greedy decoding, its limit in tokens, and sacrebleu's signature.
        """
        counts = (len(references) for references in self.eval.rows.texts)
        writing = {"decoding": "greedy", "max_new_tokens": self.generator.max_new_tokens, "bleu": bleu_signature(counts)}
        return {"labels": None, "preprocessing": {**self.preprocessing.shown, **writing}, "warnings": self.warnings}


def row_score(references: Sequence[str], text: str | None, loss: float, targets: int) -> Score:
    """sacrebleu's sums for a generated caption; a unit without one (`text` is None) has only its
    loss.
    """
    if text is None:
        return Score(0.0, 0, loss, stats=(*[0.0] * BLEU_STATS, targets))
    sums = bleu_sums(references, text)
    return Score(sums[1 + ORDERS], sums[-1], loss, text=text, stats=(*sums, targets))


def open_task(
    recipe: Recipe, library: Library, model: torch.nn.Module, tables: Tables, evaluation: Tables | None
) -> ImageCaptioning:
    """The task on these images, with the checkpoint's own image processor, tokenizer and generation
    config.
    """
    preprocessing = library.preprocessing(model)
    tokenizer = load_tokenizer(library.folder, library.trust_remote_code)
    default = TASKS[library.task].default_length or 0
    generator = open_caption_generator(library.folder, tokenizer, model, recipe.max_length, default)
    return prepare_captions(recipe, tables, evaluation, preprocessing, generator)


def prepare_captions(
    recipe: Recipe,
    tables: Tables,
    evaluation: Tables | None,
    preprocessing: Preprocessing,
    generator: CaptionGenerator,
) -> ImageCaptioning:
    """Examine every picture once, tokenize its captions, divide. Captions of one picture stay in
    one part.

    Raises:
        DataError: no image or text column, or no usable rows. UsageError: sacrebleu is not
            installed.
    """
    require("image-captioning", "captions", "sacrebleu")
    first = next(iter(tables.values()))
    image = column(first, recipe.image_column, IMAGE)

    def examined(table: Table) -> Rows:
        text = column(table, recipe.text_column, CAPTION, [image])
        return use_rows(table, _examine(table, image, table.rows[text][:], preprocessing, generator, looked))

    looked: list[tuple[str | int, Seen]] = []
    tables, evaluation = with_files(tables, evaluation, image, preprocessing, recipe.augment)
    used = {name: examined(table) for name, table in tables.items()}
    judged = {name: examined(table) for name, table in evaluation.items()} if evaluation else None
    divided = divide(used, judged, recipe.holdout)
    parts = [_part(rows, generator) if rows else None for rows in (divided.train, divided.holdout, divided.eval)]
    warnings = overlap_warning(divided) + skip_warnings(divided) + _cut_warnings(parts, generator)
    warnings += look_warnings(looked)
    warnings += beyond_warnings(generator.tokenizer, generator.size)
    train, holdout, judge = parts
    return ImageCaptioning(train, holdout, judge, preprocessing, recipe.augment, generator, image, warnings)  # type: ignore[arg-type]


def _examine(
    table: Table,
    image: str,
    texts: Sequence[Any],
    preprocessing: Preprocessing,
    generator: CaptionGenerator,
    looked: list[tuple[str | int, Seen]],
) -> list[Examined]:
    """What each row is; what is odd about its picture goes to `looked`."""
    said = [_captions(text) for text in texts]
    reasons = [_unusable(captions, generator) for captions in said]  # not in threads: tokenizers do not like them

    def examine_row(row: int) -> tuple[Examined, Seen]:
        if reasons[row]:
            return Examined(b"", reason=reasons[row]), Seen()
        digest, seen, reason = examine_picture(table, image, row, preprocessing)
        return (Examined(digest, reason=reason) if reason else Examined(digest, texts=said[row])), seen

    examined = in_threads(examine_row, len(texts))
    looked.extend((table.name(row), seen) for row, (used, seen) in enumerate(examined) if used.reason is None)
    return [used for used, _ in examined]


def _captions(value: Any) -> tuple[str, ...]:
    """A text, or a list of them, without surplus white space; empty ones are no captions."""
    values = value if isinstance(value, list | tuple | np.ndarray) else [value]
    return tuple(" ".join(text.split()) for text in values if isinstance(text, str) and text.strip())


def _unusable(captions: Sequence[str], generator: CaptionGenerator) -> str | None:
    """Why a row's captions cannot be learned."""
    reasons = (or_reason(generator.tokens, text)[1] for text in captions)
    return next((reason for reason in reasons if reason), None) if captions else "no text"


def _part(rows: Rows, generator: CaptionGenerator) -> CaptionPart:
    row_of_unit = [row for row, texts in enumerate(rows.texts) for _ in texts]
    return CaptionPart(
        rows, np.asarray(row_of_unit, dtype=np.int64), [generator.tokens(text) for texts in rows.texts for text in texts]
    )


def _cut_warnings(parts: Sequence[CaptionPart | None], generator: CaptionGenerator) -> list[str]:
    full = [len(tokens) for part in parts if part for tokens in part.tokens if len(tokens) == generator.cut + 1]
    if not full:
        return []
    return [f"{len(full)} captions fill or pass {generator.cut} tokens: what is beyond is not learned; see --max-length"]

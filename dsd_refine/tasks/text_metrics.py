"""Metrics of texts that a model writes, made of sums over rows: BLEU, chrF, ROUGE, word and character errors.

Each function for a row gives the sums that a metric of all rows is made of, so that rows can be resampled.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import numpy as np

ORDERS = 4  # BLEU counts n-grams of 1 to 4 words
BLEU_STATS = 2 + 2 * ORDERS  # lengths of text and reference, matching n-grams, written n-grams
CHRF_ORDERS = 6  # chrF counts n-grams of 1 to 6 characters (Popović 2015)
CHRF_STATS = 3 * CHRF_ORDERS  # for each order: n-grams of the text, of the reference, and of both
BETA = 2.0  # chrF2: recall counts twice as much as precision
ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")
SENTENCE_END = re.compile(r"(?<=[.!?])\s+")

Array = np.ndarray[Any, Any]


def bleu_sums(references: Sequence[str], text: str) -> tuple[int, ...]:
    """sacrebleu's sums for a written text, BLEU_STATS numbers."""
    measured = _sacrebleu().corpus_score([text], [[reference] for reference in references])
    return (measured.sys_len, measured.ref_len, *measured.counts, *measured.totals)


def bleu_signature(counts: Iterable[int]) -> str:
    """sacrebleu's own signature, for rows with so many references each: sacrebleu itself would name
    those of the last row.
    """
    return _signature(_new_metric(), counts)


@cache
def _sacrebleu() -> Any:
    return _new_metric()


def _new_metric() -> Any:
    from sacrebleu.metrics import BLEU

    return BLEU(max_ngram_order=ORDERS, force=True)


def bleu(sums: Array, order: int = ORDERS) -> Array:
    """BLEU-`order` as a fraction, of sums (…, statistics), as sacrebleu makes it: brevity penalty,
    exponential smoothing.
    """
    written, wanted = sums[..., 0], sums[..., 1]
    matching, total = sums[..., 2 : 2 + order], sums[..., 2 + ORDERS : 2 + ORDERS + order]
    with np.errstate(divide="ignore", invalid="ignore"):
        halvings = np.cumsum(matching == 0, axis=-1)
        precision = np.where(matching > 0, matching, 0.5**halvings) / total
        penalty = np.where(written < wanted, np.exp(1 - wanted / written), 1.0)
        value = penalty * np.exp(np.log(precision).mean(-1))
    nothing = (matching.sum(-1) == 0) | (total.min(-1) == 0) | (written == 0)
    return np.where(nothing, 0.0, value)


def chrf_sums(reference: str, text: str) -> tuple[int, ...]:
    """chrF's sums for a written text, CHRF_STATS numbers. Spaces do not count, as in sacrebleu."""
    wanted, written = ("".join(words.split()) for words in (reference, text))
    sums: list[int] = []
    for order in range(1, CHRF_ORDERS + 1):
        of_text, of_reference = _ngrams(written, order), _ngrams(wanted, order)
        # sacrebleu leaves out what is longer than the reference
        sums += [of_text.total() if of_reference else 0, of_reference.total(), (of_text & of_reference).total()]
    return tuple(sums)


def _ngrams(text: str, order: int) -> Counter[str]:
    return Counter(text[start : start + order] for start in range(len(text) - order + 1))


def chrf(sums: Array) -> Array:
    """chrF2 as a fraction, of sums (…, statistics) whose first ones are CHRF_STATS, as sacrebleu makes it.

    Precision and recall are means over the orders that both sides have n-grams of.
    """
    counts = sums[..., :CHRF_STATS].reshape(*sums.shape[:-1], CHRF_ORDERS, 3)
    written, wanted, both = (counts[..., number] for number in range(3))
    known = (written > 0) & (wanted > 0)
    orders = np.maximum(known.sum(-1), 1)
    precision = (np.where(known, both / np.maximum(written, 1), 0.0)).sum(-1) / orders
    recall = (np.where(known, both / np.maximum(wanted, 1), 0.0)).sum(-1) / orders
    parts = BETA**2 * precision + recall
    return np.where(parts > 0, (1 + BETA**2) * precision * recall / np.where(parts > 0, parts, 1.0), 0.0)


def best_chrf_sums(references: Sequence[str], text: str) -> tuple[int, ...]:
    """chrF's sums for the reference that a written text is most like, as sacrebleu takes them."""
    return max((chrf_sums(reference, text) for reference in references), key=lambda sums: float(chrf(np.asarray(sums))))


def chrf_signature(counts: Iterable[int] = (1,)) -> str:
    """sacrebleu's own signature of chrF, for rows with so many references each."""
    from sacrebleu.metrics import CHRF

    return _signature(CHRF(char_order=CHRF_ORDERS, word_order=0, beta=int(BETA)), counts)


def _signature(metric: Any, counts: Iterable[int]) -> str:
    different = {*counts}
    metric.num_refs = different.pop() if len(different) == 1 else -1  # sacrebleu's number for rows that differ
    return str(metric.get_signature().format())


def rouge_scores(references: Sequence[str], text: str) -> tuple[float, ...]:
    """The F1 of each metric in ROUGE for a written text, as rouge-score counts it: English words, stemmed.

    Each is that of the reference with the highest one. For rougeLsum a sentence ends at a line's end, and after
    `.`, `!` or `?` before white space.
    """
    targets = [SENTENCE_END.sub("\n", reference) for reference in references]
    scores = _rouge().score_multi(targets, SENTENCE_END.sub("\n", text))
    return tuple(float(scores[name].fmeasure) for name in ROUGE)


@cache
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(list(ROUGE), use_stemmer=True)


def word_errors(reference: str, text: str) -> tuple[int, int]:
    """(edits, words of the reference) of a written text, as jiwer counts them."""
    import jiwer

    return _edits(jiwer.process_words(reference, text))


def character_errors(reference: str, text: str) -> tuple[int, int]:
    """(edits, characters of the reference) of a written text, as jiwer counts them."""
    import jiwer

    return _edits(jiwer.process_characters(reference, text))


def _edits(measured: Any) -> tuple[int, int]:
    edits = measured.substitutions + measured.deletions + measured.insertions
    return edits, measured.hits + measured.substitutions + measured.deletions

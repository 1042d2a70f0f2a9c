"""Answers to questions in SQuAD's layout: reading them, and judging a predicted one as SQuAD's script does."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dsd_refine.errors import DataError

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class Answers:
    """The right answers of a row. None: the context does not have the answer.

    Attributes:
        texts: All right answers, each of which judges.
        begin: The character of the context where the first one begins, which trains. -1: there is none.
    """

    texts: tuple[str, ...] = ()
    begin: int = -1

    @property
    def end(self) -> int:
        """The character behind the answer that trains."""
        return self.begin + len(self.texts[0]) if self.texts else -1


def read_answers(value: Any, context: str) -> Answers:
    """Read `{"text": […], "answer_start": […]}`, or a list of `{"text", "answer_start"}`.

    The first answer that stands in the context where its start says is the one that trains.

    Raises:
        DataError: it is none of these, or no answer stands in the context at its start.
    """
    pairs = [(text, start) for text, start in _pairs(value) if text.strip()]
    for text, start in pairs:
        if isinstance(start, int) and start >= 0 and context.startswith(text, start):
            others = [other.strip() for other, _ in pairs if other is not text]
            return Answers((text.strip(), *others), start + len(text) - len(text.lstrip()))
    if pairs:
        text, start = pairs[0]
        raise DataError(f"its answer {text[:40]!r} is not in the context at character {start}")
    return Answers()


def _pairs(value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, list):
        texts: list[Any] = [item.get("text") if isinstance(item, dict) else None for item in value]
        starts = [item.get("answer_start") if isinstance(item, dict) else None for item in value]
    elif isinstance(value, dict):
        texts, starts = (_listed(value.get(name)) for name in ("text", "answer_start"))
    else:
        raise DataError("no answers" if value is None else "answers that are no `text` and `answer_start`")
    if len(texts) != len(starts):
        raise DataError(f"{len(texts)} answers and {len(starts)} of `answer_start`")
    if not all(isinstance(text, str) for text in texts):
        raise DataError("an answer is no text")
    return list(zip(texts, starts, strict=True))


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list) else [] if value is None else [value]


def words_of(text: str) -> list[str]:
    """The words that count: in lower case, without punctuation and articles (SQuAD's `normalize_answer`)."""
    return ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split()


def exact_match(answer: str, right: Sequence[str]) -> float:
    """1 if the words of the answer are those of one of the right ones. No right answer: the empty one is right."""
    return float(any(words_of(answer) == words_of(text) for text in right or ("",)))


def f1(answer: str, right: Sequence[str]) -> float:
    """The largest F1 of the answer's words and those of a right answer. Without words: 1 if both have none."""
    return max(_f1_of_words(words_of(answer), words_of(text)) for text in right or ("",))


def _f1_of_words(words: list[str], right: list[str]) -> float:
    if not words or not right:
        return float(words == right)
    common = (Counter(words) & Counter(right)).total()
    return 2 * common / (len(words) + len(right))

"""SQuAD's file: articles with paragraphs, and questions under each paragraph."""

from __future__ import annotations

from typing import Any


def is_squad(rows: list[dict[str, Any]]) -> bool:
    """Return whether the rows are articles of such a file."""
    return all(isinstance(row.get("paragraphs"), list) for row in rows)


def questions(articles: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each question, with `id`, `title`, `context`, `question` and `answers`, as `datasets` has them.

    Where `is_impossible` is true there are no answers. A paragraph or question that is no object is a row without
    values, which a task skips and names.
    """
    rows = []
    for article in articles:
        for paragraph in article["paragraphs"]:
            paragraph = paragraph if isinstance(paragraph, dict) else {}
            for asked in paragraph.get("qas") or [{}]:
                asked = asked if isinstance(asked, dict) else {}
                rows.append(
                    {
                        "id": _text(asked.get("id")),
                        "title": _text(article.get("title")),
                        "context": _text(paragraph.get("context")),
                        "question": _text(asked.get("question")),
                        "answers": _answers(asked),
                    }
                )
    return rows


def _answers(asked: dict[str, Any]) -> dict[str, list[Any]] | None:
    given = [] if asked.get("is_impossible") else asked.get("answers")
    if not isinstance(given, list):
        return None
    given = [answer for answer in given if isinstance(answer, dict)]
    starts = [answer.get("answer_start") for answer in given]
    return {"text": [_text(answer.get("text")) for answer in given],
            "answer_start": [start if isinstance(start, int) else None for start in starts]}  # fmt: skip


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None

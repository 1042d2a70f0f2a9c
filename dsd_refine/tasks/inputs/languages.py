"""The languages of a model for several: which one a text is in, and which one is to be written.

NLLB, mBART and M2M100 put a language's token beside each text, Speech2Text beside each transcript. Whisper has tokens
for the language and for its task.
"""

from __future__ import annotations

from typing import Any

from dsd_refine.errors import DataError
from dsd_refine.tasks.inputs.generation import first_set

SHOWN = 6  # languages that a message lists


def set_languages(tokenizer: Any, generation: Any, source: str | None, target: str | None) -> list[str]:
    """Set tokenizer and generation config to the languages that are asked for, else to those of the checkpoint.

    Returns:
        Warnings: where the checkpoint itself would read or write another language.

    Raises:
        DataError: it knows no such language, or nothing says which one it is to write.
    """
    if hasattr(tokenizer, "set_prefix_tokens"):
        return _set_whisper(tokenizer, generation, target)
    for language in (source, target):
        if language is not None and language_id(tokenizer, language) is None:
            raise DataError(_unknown(tokenizer, language))
    if not is_multilingual(tokenizer):
        return []
    return _set_source(tokenizer, source) + _set_target(tokenizer, generation, target)


def _set_source(tokenizer: Any, asked: str | None) -> list[str]:
    if not hasattr(tokenizer, "src_lang"):
        return []
    if asked is not None:
        tokenizer.src_lang = asked
    elif tokenizer.init_kwargs.get("src_lang") is None:
        said = "the checkpoint does not say of what language the sources are"
        return [f"{said}: they are read as {tokenizer.src_lang}; --set source_language=NAME"]
    return []


def _set_target(tokenizer: Any, generation: Any, asked: str | None) -> list[str]:
    """What generation forces comes before the tokenizer's own setting: an output is used so."""
    forced = _language_of(tokenizer, generation.forced_bos_token_id)
    wanted = first_set(asked, forced, tokenizer.tgt_lang)
    if wanted is None:
        raise DataError(
            "the model writes several languages, and nothing says which one the targets are in: give --set "
            f"target_language=NAME ({_some_languages(tokenizer)})"
        )
    tokenizer.tgt_lang = wanted
    own = language_id(tokenizer, wanted)
    stands_last = list(tokenizer(text_target="a")["input_ids"])[-1] == own  # mBART's decoder starts with it
    generation.update(**{"decoder_start_token_id" if stands_last else "forced_bos_token_id": own})
    if forced in (None, wanted):
        return []
    return [
        f"the checkpoint's generation_config.json begins texts with {forced}, the targets are {wanted}: its users get {forced}"
    ]


def is_multilingual(tokenizer: Any) -> bool:
    """Return whether the tokenizer writes a language's token beside each text (NLLB, mBART, M2M100)."""
    return hasattr(tokenizer, "src_lang") or bool(getattr(tokenizer, "lang_code_to_id", None))


def language_id(tokenizer: Any, language: str) -> int | None:
    """The token of a language; None where the tokenizer has no such language."""
    if hasattr(tokenizer, "get_lang_id"):
        try:
            return int(tokenizer.get_lang_id(language))
        except KeyError:
            return None
    if not is_multilingual(tokenizer):
        return None
    codes: dict[str, int] = getattr(tokenizer, "lang_code_to_id", None) or tokenizer.get_added_vocab()
    return codes.get(language) if language not in _usual(tokenizer) else None


def _usual(tokenizer: Any) -> set[str]:
    """Special tokens that are no language: start, end, padding and the like."""
    return {str(token) for token in (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token,
                                     tokenizer.mask_token, tokenizer.cls_token, tokenizer.sep_token)}  # fmt: skip


def _language_of(tokenizer: Any, token: int | None) -> str | None:
    """The language that a token stands for."""
    if token is None:
        return None
    codes = getattr(tokenizer, "lang_code_to_id", None) or getattr(tokenizer, "lang_code_to_token", None)
    names = list(codes) if codes else [str(tokenizer.convert_ids_to_tokens(token))]
    return next((name for name in names if language_id(tokenizer, name) == token), None)


def _some_languages(tokenizer: Any) -> str:
    codes = getattr(tokenizer, "lang_code_to_id", None) or getattr(tokenizer, "lang_code_to_token", None)
    names = list(codes) if codes else [name for name in tokenizer.get_added_vocab() if language_id(tokenizer, name) is not None]
    return f"such as {', '.join(names[:SHOWN])}" if names else "as its model card says"


def _unknown(tokenizer: Any, language: str) -> str:
    if not is_multilingual(tokenizer):
        return f"the language {language!r}: the tokenizer is not one for several languages: leave it out"
    return f"the tokenizer knows no language {language!r}; it knows some {_some_languages(tokenizer)}"


def _set_whisper(tokenizer: Any, generation: Any, asked: str | None) -> list[str]:
    """Whisper's language and task, in tokenizer and generation config alike."""
    generation.return_timestamps = False
    known = getattr(generation, "lang_to_id", None)
    if not getattr(generation, "is_multilingual", known is not None):
        if asked is not None:
            raise DataError(f"target_language: {asked}: the model is for one language only: leave it out")
        tokenizer.language = tokenizer.task = None
        tokenizer.set_prefix_tokens(predict_timestamps=False)
        return []
    language = first_set(
        asked, getattr(generation, "language", None), tokenizer.language, _forced_language(tokenizer, generation)
    )
    if language is None:
        raise DataError(
            "the model writes several languages, and nothing says which one is spoken: give --set target_language=NAME "
            "(such as english or de)"
        )
    task = first_set(getattr(generation, "task", None), tokenizer.task, "transcribe")
    try:
        tokenizer.set_prefix_tokens(str(language).strip("<|>"), task, predict_timestamps=False)
    except ValueError:
        raise DataError(
            f"Whisper knows no language {language!r}; it knows names such as german, and codes such as de"
        ) from None
    token = tokenizer.convert_ids_to_tokens(tokenizer.prefix_tokens[1])
    if known and token not in known:
        some = ", ".join(sorted(known)[:SHOWN])
        raise DataError(f"the model's generation_config.json has no language {language!r}; it has such as {some}")
    if known:
        generation.language, generation.task = token, task
    return []


def _forced_language(tokenizer: Any, generation: Any) -> str | None:
    """The language in `forced_decoder_ids`, as older generation configs have it."""
    forced = dict(getattr(generation, "forced_decoder_ids", None) or ())
    token = forced.get(1)
    return None if token is None else str(tokenizer.convert_ids_to_tokens(token))

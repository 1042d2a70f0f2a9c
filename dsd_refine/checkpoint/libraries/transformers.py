"""transformers' layout: building and loading go through transformers, with tensors that we read."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from accelerate import init_empty_weights
from transformers.models.auto import modeling_auto

from dsd_refine.checkpoint.placement import other_size
from dsd_refine.checkpoint.safetensors_file import listed, read_json
from dsd_refine.checkpoint.sentence_layout import is_sentence_model
from dsd_refine.data.names import are_placeholders
from dsd_refine.data.names import listed as listed_names
from dsd_refine.errors import CheckpointError
from dsd_refine.task_specs import TASKS

if TYPE_CHECKING:
    from dsd_refine.checkpoint.preprocessing import Preprocessing


# transformers' words for what a class is for, where a reader knows others
SHOWN = {"seq-to-seq-causal-lm": "seq2seq-lm", "speech-seq-2-seq": "speech-seq2seq", "text-to-waveform": "text-to-audio",
         "text-to-spectrogram": "text-to-speech", "audio-xvector": "speaker-verification",
         "": "embeddings (no task's head)"}  # fmt: skip
VAGUE = ("pretraining", "multimodal-lm", "")  # of the kinds that a class is of, those that say least
# families whose …ForPreTraining has the head of masked-lm; others tell real tokens from replaced
# ones, or learn from sounds
WITH_MASKED_LM = ("Albert", "Bert", "BigBird", "Ernie", "FNet", "MegatronBert", "MobileBert", "RoCBert")
OF_TEXTS = ("masked-lm", "causal-lm", "text-encoding")  # lists that have the model types which read texts alone
# families with the heads of text models that read more than text; without it they would be another model
READ_MORE = {
    **dict.fromkeys(("layoutlm", "layoutlmv2", "layoutlmv3", "lilt", "bros"), "document (words with their places on a page)"),
    **dict.fromkeys(("lxmert", "visual_bert", "vilt"), "visual (texts with pictures)"),
    **dict.fromkeys(("markuplm",), "web-page (words with their places in HTML)"),
    **dict.fromkeys(("tapas",), "table"),
}
TEXT_PART = ". Its text part is trained on texts, and on conversations without pictures, with --task causal-lm"
WITH_PICTURES = "AutoModelForImageTextToText"
CAPTIONERS = TASKS["image-captioning"].model_types
# BatchNorm's counter, which older files have not: it starts at 0, as the library lets it
UNCOUNTED = ".num_batches_tracked"


@dataclass(frozen=True)
class TransformersLibrary:
    """A transformers checkpoint folder. `task` is what the user said, else what the config's
    architecture is for.
    """

    folder: Path
    config: Any
    task: str
    trust_remote_code: bool = False
    name: str = "transformers"

    @classmethod
    def open(cls, folder: Path, task: str | None = None, trust_remote_code: bool = False) -> TransformersLibrary:
        """Read config.json.

        Raises:
            CheckpointError: an unusable or quantised config, remote code without leave, no task to
                be seen.
        """
        try:
            config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
        except Exception as error:  # transformers raises whatever a strange config makes it raise
            if "trust_remote_code" in str(error):
                raise CheckpointError(
                    f"{folder}: needs code of its own; read that code, then give --trust-remote-code"
                ) from None
            raise CheckpointError(f"{folder}/config.json: transformers cannot read it: {error!s:.300}") from None
        _refuse_odd(folder, config, trust_remote_code)
        if getattr(config, "quantization_config", None):
            raise CheckpointError(f"{folder}: quantised weights cannot be refined; give the unquantised checkpoint")
        task = task or _infer(folder, config)
        _refuse_problem(folder, config, task)
        _refuse_task(folder, config, task)
        return cls(folder, config, task, trust_remote_code)

    @property
    def names(self) -> list[str]:
        """Return the model type and the class names in `architectures` of the config."""
        return [str(self.config.model_type), *(self.config.architectures or [])]

    @property
    def auto_class(self) -> str:
        """Return the name of transformers' class that builds and loads the model."""
        return WITH_PICTURES if self.task == "causal-lm" and _sees_pictures(self.config) else TASKS[self.task].auto_class

    def build_meta(self, *, buffers: bool = False) -> torch.nn.Module:
        """Build the task's auto class from the config on the meta device, with tied weights tied.

        With `buffers`, only the parameters are on the meta device.

        Raises:
            CheckpointError: transformers cannot build it.
        """
        auto = getattr(transformers, self.auto_class)
        with _building(self), init_empty_weights(include_buffers=False) if buffers else torch.device("meta"):
            model: torch.nn.Module = auto.from_config(self._config(), trust_remote_code=self.trust_remote_code)
        if hasattr(model, "tie_weights"):
            model.tie_weights()  # type: ignore[operator]
        return model

    def load(self, tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> torch.nn.Module:
        """As in `Library`; transformers' renaming and conversion are applied."""
        built = self.build_meta()
        cls = type(built)
        with _building(self):
            model, info = cls.from_pretrained(  # type: ignore[attr-defined]
                None,
                config=self._config(),
                state_dict=dict(tensors),
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused below, by name: the library's error has none
            )
        for name, filed, wanted in sorted(info["mismatched_keys"], key=lambda each: str(each[0])):
            raise CheckpointError(f"{self.folder}: {other_size(name, filed, wanted)}")
        lost = sorted(key for key in info["missing_keys"] if not key.endswith(UNCOUNTED))
        if lost:
            hint = " Is it a base model without its head?" if _is_head(model, lost) else ""
            raise CheckpointError(
                f"{self.folder}: the weights lack what {cls.__name__} needs, and nothing is ever made up: {listed(lost)}.{hint}"
            )
        _freeze_as_built(model, built)
        return model  # type: ignore[no-any-return]

    def load_plain(self, folder: Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
        """By `AutoModelFor….from_pretrained(folder)`."""
        auto = getattr(transformers, self.auto_class)
        with _building(self):
            model: torch.nn.Module = auto.from_pretrained(
                folder, dtype=dtype, trust_remote_code=self.trust_remote_code, local_files_only=True
            )
        return model

    def label_names(self) -> tuple[list[list[str]] | None, int]:
        """Return the class names of the config, and its `num_labels`.

        The names are those of `id2label`, or of `label2id` if `id2label` has placeholders (LABEL_0).
        They are None if neither has names.

        Raises:
            CheckpointError: A name is not a text, or the two disagree.
        """
        return _class_names(self.config), int(self.config.num_labels)

    def preprocessing(self, model: torch.nn.Module) -> Preprocessing:
        """What the checkpoint's image processor does."""
        from dsd_refine.checkpoint.libraries.image_processor import processor_preprocessing  # other tasks do not need it

        return processor_preprocessing(self.folder, self.config, self.trust_remote_code)

    def snippet(self) -> str:
        """Return Python code that loads the model and its processor with `from_pretrained`."""
        if self.task == "embedding" and is_sentence_model(self.folder):
            return (
                "from sentence_transformers import SentenceTransformer\n\n"
                'model = SentenceTransformer("path/to/this/folder")  # or "owner/name"'
            )
        model, inputs = self.auto_class, TASKS[self.task].processor
        return (
            f'from transformers import {model}, {inputs}\n\nplace = "path/to/this/folder"  # or "owner/name"\n'
            f"model = {model}.from_pretrained(place)\nprepare = {inputs}.from_pretrained(place)"
        )

    def warnings(self, model: torch.nn.Module) -> list[str]:
        """Code that came with the model and was run; a head that its config ties to another
        embedding.
        """
        return [*self._code(), *self._untied(model)]

    def _code(self) -> list[str]:
        files = sorted(_code_files(self.folder)) if self.trust_remote_code else []
        return [f"code that came with the model was run (--trust-remote-code): {listed(files)}"] if files else []

    def _untied(self, model: torch.nn.Module) -> list[str]:
        get_in, get_out = getattr(model, "get_input_embeddings", None), getattr(model, "get_output_embeddings", None)
        if not (get_in and get_out and getattr(self.config, "tie_word_embeddings", False)):
            return []
        try:
            embedding, head = get_in(), get_out()
        except NotImplementedError:
            return []
        if embedding is None or head is None or embedding.weight is head.weight:
            return []
        names = {id(value): name for name, value in model.named_parameters()}
        both = " and ".join(names.get(id(module.weight), "?") for module in (head, embedding))
        return [
            f"the config ties the output head to the embedding, but the file holds two different tensors, {both}: kept as two"
        ]

    def _config(self) -> Any:
        config = copy.deepcopy(self.config)
        config.dtype = None
        return config


def _freeze_as_built(model: torch.nn.Module, built: torch.nn.Module) -> None:
    """Freeze what the class itself freezes, such as Whisper's and Marian's sinusoidal positions. transformers' loading
    makes every parameter trainable.
    """
    frozen = {name for name, value in built.named_parameters(remove_duplicate=False) if not value.requires_grad}
    for name, value in model.named_parameters(remove_duplicate=False):
        if name in frozen:
            value.requires_grad_(False)


def _is_head(model: Any, lost: list[str]) -> bool:
    """Are these all the parameters outside of what the library calls the base model?"""
    base = f"{getattr(model, 'base_model_prefix', '')}."
    outside = {name for name, _ in model.named_parameters() if not name.startswith(base)}
    return base != "." and bool(outside) and set(lost) == outside


def _refuse_odd(folder: Path, config: Any, trust_remote_code: bool) -> None:
    """Refuse what the library does not check: code named in place of a setting, class names that
    are none.
    """
    raw = read_json(folder / "config.json")
    architectures, labels = config.architectures or [], getattr(config, "id2label", None)
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        raise CheckpointError(f"{folder}/config.json: `architectures` is not a list of class names")
    if labels is not None and sorted(labels) != list(range(len(labels))):
        raise CheckpointError(f"{folder}/config.json: `id2label` does not name the classes 0 to {len(labels) - 1}")
    named = raw.get("id2label")
    if labels is not None and isinstance(named, dict) and len(named) != len(labels):  # the library drops the names then
        raise CheckpointError(
            f"{folder}/config.json: `id2label` has {len(named)} names, `num_labels` is {len(labels)}; correct the wrong one"
        )
    kernels = sorted(name for name in _implementations(raw) if "/" in name)
    if kernels and not trust_remote_code:  # the library would fetch and run them
        raise CheckpointError(
            f"{folder}: wants the code of {listed(kernels)} from the Hub; look at it, then give --trust-remote-code"
        )


def _refuse_problem(folder: Path, config: Any, task: str) -> None:
    """Refuse a head on pictures or sounds that the config says is trained in a way that is not supported."""
    kind = getattr(config, "problem_type", None)
    allowed = {"image-classification": ("multi_label_classification",), "audio-classification": ()}.get(task)
    if allowed is not None and kind not in (None, "single_label_classification", *allowed):
        content = "sounds" if task == "audio-classification" else "images"
        also = ", and of several (multi_label_classification)" if allowed else ""
        raise CheckpointError(
            f"{folder}: its config's problem_type is {kind!r}, which is not supported yet for {content}: "
            f"{task} is of one label a row (single_label_classification){also}"
        )


def _implementations(value: Any) -> Iterator[str]:
    """The values of settings such as `attn_implementation`, which may name a kernel on the Hub."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        if "implementation" in str(key):
            yield from (text for text in (inner.values() if isinstance(inner, dict) else [inner]) if isinstance(text, str))
        yield from _implementations(inner)


def _code_files(folder: Path) -> set[str]:
    """The modules that the folder's configs ask the library to run (`auto_map`)."""
    files = set()
    for path in folder.glob("*.json"):
        try:
            classes = read_json(path).get("auto_map")
        except CheckpointError:
            continue
        for value in classes.values() if isinstance(classes, dict) else ():
            files |= {str(name).rsplit(".", 1)[0] + ".py" for name in (value if isinstance(value, list) else [value]) if name}
    return files


def _infer(folder: Path, config: Any) -> str:
    """The task that the class named in the config has the head of.

    A folder in sentence-transformers' layout is for embeddings, whatever class its config names.
    """
    if is_sentence_model(folder):
        return "embedding"
    architectures = config.architectures or []
    # an ending may be the end of another one (GitForCausalLM): the longest that fits decides
    endings = sorted(((ending, task) for task in TASKS for ending in TASKS[task].endings), key=lambda pair: -len(pair[0]))
    for architecture in architectures:
        if architecture.endswith("WithLMHeadModel") and not getattr(config, "causal", True):
            return "masked-lm"  # XLM's and Flaubert's one class for both
        for ending, task in endings:
            if architecture.endswith(ending) and _has_head(architecture, config, task):
                return task
    done = {spec.model_list for spec in TASKS.values() if not spec.model_types}
    others = [(name, kind) for name in architectures for kind in _kinds(name) if kind not in done]
    for name, kind in others[:1]:
        shown, hint = SHOWN.get(kind, kind), "; give --task if the weights have a head" if kind in VAGUE else ""
        if shown in TASKS:  # a task for some families only
            _refuse_task(folder, config, shown)
        raise CheckpointError(f"{folder}: {name} is for {shown}, which is not supported yet; {_supported()}{hint}")
    named = ", ".join(architectures)[:200] or "nothing"
    raise CheckpointError(
        f"{folder}: its config names {named} as architecture, which has no task's head that is known here; {_supported()}; "
        "give --task if the weights have one"
    )


def _refuse_task(folder: Path, config: Any, task: str) -> None:
    """Refuse a task that transformers, or this program, does not do with such a model."""
    only = TASKS[task].model_types
    if only and config.model_type not in only:
        reads_both = task in ("image-captioning", "image-text-to-text") and _is_in_list(config, "causal-lm")
        hint = TEXT_PART if reads_both else ""
        raise CheckpointError(f"{folder}: {task} is for {', '.join(only)}; this is {config.model_type}{hint}")
    more = READ_MORE.get(config.model_type)
    if more and TASKS[task].processor == "AutoTokenizer":
        kind, _, what = more.partition(" ")
        raise CheckpointError(
            f"{folder}: {config.model_type} is for {kind}-{task}{f' {what}' if what else ''}, which is not supported yet; "
            f"{_supported()}"
        )
    if not _is_in_list(config, task):
        raise CheckpointError(f"{folder}: transformers has no class that does {task} with {config.model_type}; {_supported()}")


def _is_in_list(config: Any, task: str) -> bool:
    """Has transformers a class for this task and such a config, or does code of the folder bring
    one?
    """
    if task == "causal-lm" and _sees_pictures(config):
        return True
    return config.model_type in _mappings()[TASKS[task].model_list] or bool(getattr(config, "auto_map", None))


def _sees_pictures(config: Any) -> bool:
    """Is it a model that reads pictures and writes text, for which transformers has no class of causal-lm?

    Its class with pictures takes texts alone too.
    """
    lists = _mappings()
    reads = config.model_type in lists["image-text-to-text"] and config.model_type not in lists["causal-lm"]
    return reads and not getattr(config, "is_encoder_decoder", False) and config.model_type not in CAPTIONERS


def _has_head(architecture: str, config: Any, task: str) -> bool:
    """Has the class the task's head? Wav2Vec2ForSequenceClassification, say, is for sounds."""
    if architecture.endswith("ForPreTraining"):
        return architecture.removesuffix("ForPreTraining") in WITH_MASKED_LM
    if TASKS[task].model_types:
        return config.model_type in TASKS[task].model_types
    kinds = _kinds(architecture)
    if task == "embedding" and not (kinds and any(config.model_type in _mappings()[kind] for kind in OF_TEXTS)):
        return False  # the class without a head also exists for pictures and sounds, and many names end in Model
    if _mappings()[TASKS[task].model_list].get(config.model_type) == f"{architecture}Simple":
        return False  # XLNetForQuestionAnswering and its like: another head, which no auto class builds
    return TASKS[task].model_list in kinds if kinds else _is_in_list(config, task)


def _kinds(architecture: str) -> list[str]:
    """What transformers has a class for, in its words, the most specific first; "" for a class
    without a head.
    """
    kinds = {kind for kind, classes in _mappings().items() if architecture in classes.values()} - {"text-encoding"}
    return sorted(kinds, key=lambda kind: (VAGUE.index(kind) if kind in VAGUE else -1, kind))


def _mappings() -> dict[str, dict[str, Any]]:
    """Kind -> model type -> class, as transformers' `Auto…` classes have them."""
    lists = {name: value for name, value in vars(modeling_auto).items() if name.endswith("MAPPING_NAMES")}
    kinds = {name: name.removesuffix("MAPPING_NAMES").removeprefix("MODEL_").removeprefix("FOR_") for name in lists}
    return {kinds[name].strip("_").lower().replace("_", "-"): dict(lists[name]) for name in lists if "CONFIG" not in name}


def _supported() -> str:
    return f"supported are {', '.join(TASKS)}"


def _class_names(config: Any) -> list[list[str]] | None:
    """The class names of a config; LABEL_0 and the like count as none, then `label2id` may name the
    classes.

    Raises:
        CheckpointError: names that are not texts, or `label2id` names the classes in another order.
    """
    values = [config.id2label[i] for i in range(config.num_labels)]
    if not all(isinstance(name, str | int) for name in values):
        raise CheckpointError("config.json: `id2label` has class names that are no texts")
    names, others = [str(name) for name in values], _names_of_label2id(config)
    if not are_placeholders(names):
        if others is not None and others != names and sorted(others) == sorted(names):
            raise CheckpointError(
                f"config.json: `id2label` names the classes {listed_names(names)}, `label2id` {listed_names(others)}: "
                "correct the wrong one"
            )
        return [[name] for name in names]
    return None if others is None else [[name] for name in others]


def _names_of_label2id(config: Any) -> list[str] | None:
    """The names in order of `label2id`, where it has one for each class and they are no
    placeholders.
    """
    numbers = {number: str(name) for name, number in (getattr(config, "label2id", None) or {}).items()}
    names = [numbers[i] for i in range(config.num_labels) if i in numbers]
    return names if len(names) == len(numbers) == config.num_labels and not are_placeholders(names) else None


@contextmanager
def _without_bars() -> Iterator[None]:
    """Within, transformers shows no progress bars of its own."""
    bars: Any = transformers.utils.logging
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()


@contextmanager
def _building(library: TransformersLibrary) -> Iterator[None]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with _without_bars():
                yield
    except CheckpointError:
        raise
    except Exception as error:  # transformers raises whatever a strange config or file makes it raise
        text = "\n".join(str(error).strip().splitlines()[:6])[:800]
        raise CheckpointError(f"{library.folder}: transformers cannot load this for {library.task}: {text}") from None

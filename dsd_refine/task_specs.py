"""The tasks, one entry each: which there are, and how they differ.

This module does not import torch, because `--help` and recipes need it. `docs/adding-a-task.md` says
how to add a task.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class TaskSpec:
    """The properties of a task that are known without its code.

    The default recipe of a task is the shipped recipe of its name, `recipes/NAME.yaml`.

    Attributes:
        name: Its name in `--task`, in recipes and in reports.
        opener: `module:function` that makes the task from its data. `prepare_task` calls it.
        columns: The kinds of columns that it reads, the content first (`tasks.registry.KINDS`).
        auto_class: The class of transformers that builds and loads its models.
        model_list: The list of such models in transformers: the middle of
            `MODEL_FOR_…_MAPPING_NAMES`, in lower case with hyphens. Empty: the models without a head.
        endings: If a class name in a config's `architectures` ends so, the model is for this task.
        processor: The class of transformers that prepares the inputs, for the model card.
        pipeline_tag: The name of the task on the Hub.
        default_length: The most tokens of a text, if neither `--max-length` nor the checkpoint sets
            a limit. None: texts are not cut.
        model_types: The only model types of transformers that it supports. Empty: all of the list.
        libraries: The libraries that have models for it.
        fields: The fields of recipes that it uses, of those that only some tasks use (`OWN_FIELDS`).
        kinds: `module:function`, if the kinds of columns depend on the model. It gives them for a library
            adapter, as a list for each way to train the model.
        corpora: `module:name` of each metric that is no ratio of sums over rows: a function of the summed
            statistics of rows, or a `RowMetric`.
    """

    name: str
    opener: str
    columns: tuple[str, ...]
    auto_class: str
    model_list: str
    endings: tuple[str, ...]
    processor: str
    pipeline_tag: str
    default_length: int | None = None
    model_types: tuple[str, ...] = ()
    libraries: tuple[str, ...] = ("transformers",)
    fields: tuple[str, ...] = ()
    kinds: str = ""
    corpora: Mapping[str, str] = field(default_factory=dict)

    @property
    def has_classes(self) -> bool:
        """Whether each row has a label, or each of its words, which is one of the model's classes."""
        return "label" in self.columns or "tags" in self.columns

    @property
    def sees_signal(self) -> bool:
        """Whether the input is pixels or sound.

        Then the first layer is not masked. For tokens, the first layer is an embedding, which is not
        masked anyway.
        """
        return not {"image", "pictures", "audio"}.isdisjoint(self.columns)


# Fields of recipes that only some tasks use. A task without a field refuses a recipe that sets it.
OWN_FIELDS = (
    "documents", "join", "stride", "loss_on", "group_by_length", "pack", "metric", "pooling", "source_language",
    "target_language", "prefix", "normalizer",
)  # fmt: skip

_CLASS_METRICS = {name: f"dsd_refine.tasks.class_counts:{name}" for name in ("f1", "f1_macro", "balanced_accuracy", "matthews")}
_SET_METRICS = {
    "f1_micro": "dsd_refine.tasks.class_counts:f1_micro", "map": "dsd_refine.tasks.class_counts:average_precision",
}  # fmt: skip

_ALL = (
    TaskSpec(
        name="image-classification",
        opener="dsd_refine.tasks.image_classification:open_task",
        columns=("image", "label"),
        auto_class="AutoModelForImageClassification",
        model_list="image-classification",
        endings=("ForImageClassification", "ForImageClassificationWithTeacher"),
        processor="AutoImageProcessor",
        pipeline_tag="image-classification",
        libraries=("timm", "torchvision", "transformers"),
        fields=("metric",),
        kinds="dsd_refine.tasks.image_classification:kinds",
        corpora=_CLASS_METRICS | _SET_METRICS,
    ),
    TaskSpec(
        name="text-classification",
        opener="dsd_refine.tasks.text_classification:open_task",
        columns=("text", "label"),
        auto_class="AutoModelForSequenceClassification",
        model_list="sequence-classification",
        endings=("ForSequenceClassification",),
        processor="AutoTokenizer",
        pipeline_tag="text-classification",
        default_length=512,
        fields=("metric", "group_by_length"),
        kinds="dsd_refine.tasks.text_classification:kinds",
        corpora=_CLASS_METRICS
        | _SET_METRICS
        | {
            "pearson": "dsd_refine.tasks.text_scores:pearson",
            "spearman": "dsd_refine.tasks.text_scores:SPEARMAN",
        },
    ),
    TaskSpec(
        name="causal-lm",
        opener="dsd_refine.tasks.causal_lm:open_task",
        columns=("dialogue",),
        auto_class="AutoModelForCausalLM",
        model_list="causal-lm",
        endings=("ForCausalLM", "LMHeadModel", "ModelWithLMHead"),
        processor="AutoTokenizer",
        pipeline_tag="text-generation",
        default_length=1024,
        fields=("documents", "join", "stride", "loss_on", "group_by_length", "pack"),
    ),
    TaskSpec(
        name="masked-lm",
        opener="dsd_refine.tasks.masked_lm:open_task",
        columns=("document",),
        auto_class="AutoModelForMaskedLM",
        model_list="masked-lm",
        endings=("ForMaskedLM", "ForPreTraining"),
        processor="AutoTokenizer",
        pipeline_tag="fill-mask",
        default_length=512,
        fields=("documents", "join", "group_by_length"),
    ),
    TaskSpec(
        name="token-classification",
        opener="dsd_refine.tasks.token_classification:open_task",
        columns=("words", "tags"),
        auto_class="AutoModelForTokenClassification",
        model_list="token-classification",
        endings=("ForTokenClassification",),
        processor="AutoTokenizer",
        pipeline_tag="token-classification",
        default_length=512,
        fields=("metric", "group_by_length"),
        corpora={"f1": "dsd_refine.tasks.token_classification:entity_f1"},
    ),
    TaskSpec(
        name="question-answering",
        opener="dsd_refine.tasks.question_answering:open_task",
        columns=("question", "answers"),
        auto_class="AutoModelForQuestionAnswering",
        model_list="question-answering",
        endings=("ForQuestionAnswering", "ForQuestionAnsweringSimple"),
        processor="AutoTokenizer",
        pipeline_tag="question-answering",
        default_length=384,  # of the scripts of BERT and of transformers
        fields=("stride", "metric"),
    ),
    TaskSpec(
        name="audio-classification",
        opener="dsd_refine.tasks.audio_classification:open_task",
        columns=("audio", "label"),
        auto_class="AutoModelForAudioClassification",
        model_list="audio-classification",
        endings=("ForSequenceClassification", "ForAudioClassification"),
        processor="AutoFeatureExtractor",
        pipeline_tag="audio-classification",
        fields=("metric", "group_by_length"),
        corpora=_CLASS_METRICS,
    ),
    TaskSpec(
        name="embedding",
        opener="dsd_refine.tasks.embedding:open_task",
        columns=("together", "score"),
        auto_class="AutoModel",
        model_list="",
        endings=("Model",),
        processor="AutoTokenizer",
        pipeline_tag="sentence-similarity",
        default_length=512,
        fields=("metric", "pooling"),
        kinds="dsd_refine.tasks.embedding:kinds",
        corpora={
            "spearman": "dsd_refine.tasks.text_scores:SPEARMAN",
            "pearson": "dsd_refine.tasks.text_scores:pearson",
        },
    ),
    TaskSpec(
        name="ctc-speech",
        opener="dsd_refine.tasks.ctc_speech:open_task",
        columns=("audio", "transcript"),
        auto_class="AutoModelForCTC",
        model_list="ctc",
        endings=("ForCTC",),
        processor="AutoProcessor",
        pipeline_tag="automatic-speech-recognition",
        fields=("group_by_length",),
    ),
    TaskSpec(
        name="image-captioning",
        opener="dsd_refine.tasks.image_captioning:open_task",
        columns=("image", "caption"),
        auto_class="AutoModelForImageTextToText",
        model_list="image-text-to-text",
        endings=("GitForCausalLM", "VisionEncoderDecoderModel", "ForConditionalGeneration"),
        processor="AutoProcessor",
        pipeline_tag="image-to-text",
        default_length=20,  # the default of transformers' generation
        model_types=("vision-encoder-decoder", "blip", "git"),  # we know how to train these on captions
        corpora={"bleu4": "dsd_refine.tasks.text_metrics:bleu"},
    ),
    TaskSpec(
        name="image-text-to-text",
        opener="dsd_refine.tasks.image_text_to_text:open_task",
        columns=("dialogue", "pictures"),
        auto_class="AutoModelForImageTextToText",
        model_list="image-text-to-text",
        endings=("ForConditionalGeneration",),
        processor="AutoProcessor",
        pipeline_tag="image-text-to-text",
        default_length=4096,  # a picture in tiles takes a thousand and more
        model_types=("idefics3", "smolvlm"),  # others want other inputs of pictures
        fields=("loss_on", "group_by_length"),
        kinds="dsd_refine.tasks.image_text_to_text:kinds",
    ),
    TaskSpec(
        name="seq2seq-lm",
        opener="dsd_refine.tasks.seq2seq_lm:open_task",
        columns=("source", "target"),
        auto_class="AutoModelForSeq2SeqLM",
        model_list="seq-to-seq-causal-lm",
        endings=("ForConditionalGeneration", "MTModel"),
        processor="AutoTokenizer",
        pipeline_tag="text2text-generation",
        default_length=512,
        model_types=(
            "t5",
            "mt5",
            "umt5",
            "longt5",
            "bart",
            "mbart",
            "marian",
            "m2m_100",
            "pegasus",
            "blenderbot",
            "blenderbot-small",
        ),  # others see more than tokens and their mask, or train on losses of their own
        fields=("metric", "group_by_length", "source_language", "target_language", "prefix"),
        corpora={"chrf": "dsd_refine.tasks.seq2seq_lm:chrf_of", "bleu": "dsd_refine.tasks.text_metrics:bleu"},
    ),
    TaskSpec(
        name="speech-seq2seq",
        opener="dsd_refine.tasks.speech_seq2seq:open_task",
        columns=("audio", "transcript"),
        auto_class="AutoModelForSpeechSeq2Seq",
        model_list="speech-seq-2-seq",
        endings=("ForConditionalGeneration",),
        processor="AutoProcessor",
        pipeline_tag="automatic-speech-recognition",
        default_length=448,  # what Whisper's decoder has positions for
        model_types=("whisper", "speech_to_text"),
        fields=("metric", "target_language", "normalizer"),
    ),
)

TASKS: dict[str, TaskSpec] = {spec.name: spec for spec in _ALL}

# Other words for these tasks, besides the Hub's.
ALSO_CALLED = {
    "ner": "token-classification", "pos-tagging": "token-classification", "reward-modeling": "text-classification",
    "reward": "text-classification", "reranking": "text-classification", "text-ranking": "text-classification",
    "sentiment-analysis": "text-classification", "speech-recognition": "ctc-speech", "asr": "ctc-speech",
    "language-modeling": "causal-lm", "sft": "causal-lm",
}  # fmt: skip

# Tasks that people ask for and that are not here, by the names of the Hub and of trainers.
NOT_SUPPORTED = (
    "object-detection", "zero-shot-object-detection", "image-segmentation", "semantic-segmentation",
    "instance-segmentation", "panoptic-segmentation", "mask-generation", "depth-estimation", "keypoint-detection",
    "pose-estimation", "image-to-image", "image-feature-extraction", "zero-shot-image-classification",
    "zero-shot-classification", "text-to-image", "unconditional-image-generation", "image-to-video", "text-to-video",
    "text-to-3d", "image-to-3d", "video-classification", "text-to-speech", "text-to-audio", "audio-to-audio",
    "voice-activity-detection", "visual-question-answering", "document-question-answering", "table-question-answering",
    "audio-text-to-text", "video-text-to-text", "any-to-any", "multiple-choice",
    "next-sentence-prediction", "summarization", "translation", "text2text-generation", "feature-extraction",
    "sentence-similarity", "time-series-forecasting", "tabular-classification", "tabular-regression",
    "reinforcement-learning", "robotics", "graph-ml", "dpo", "ppo", "grpo", "rlhf", "orpo", "kto",
)  # fmt: skip


def unknown_task(name: str) -> str:
    """Say what is to be said of a name that no task here has: another word for a task, or a task that is not supported."""
    plain = name.strip().casefold().replace("_", "-")
    same = next((spec.name for spec in TASKS.values() if spec.pipeline_tag == plain), None) or ALSO_CALLED.get(plain)
    if same:
        return f"{name} is called {same} here"
    known = ", ".join(TASKS)
    return f"{name} is not supported; supported are {known}" if plain in NOT_SUPPORTED else f"not a task; known are {known}"

"""The tasks: one entry each. What asks which tasks there are, or how they differ, reads it here.

Light on purpose: `--help` and a recipe's schema need it, and import no torch.
`docs/adding-a-task.md` says how to add one.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TaskSpec:
    """What differs from one task to another and can be said without its code.

    Its default recipe is the shipped recipe of its name, `recipes/NAME.yaml`.

    Attributes:
        name: as in `--task`, recipe and report.
        opener: `module:function` that makes the task of its data, called as `prepare_task` does.
        columns: the kinds of column that it reads, the content first (`tasks.registry.KINDS`).
        auto_class: transformers' class that builds and loads its models.
        model_list: transformers' list of such models, `MODEL_FOR_…_MAPPING_NAMES` in lower case
            with hyphens.
        endings: endings of class names in a config's `architectures` that tell the task.
        processor: transformers' class that prepares the inputs, for the model card.
        pipeline_tag: the Hub's name of the task.
        default_length: tokens of a text where neither `--max-length` nor the checkpoint has a
            limit; None: it cuts none.
        model_types: the only families of transformers that it is for; empty: all of the list.
        libraries: the libraries whose models do it.
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

    @property
    def has_classes(self) -> bool:
        """Does a row have a label, which is one of the model's classes?"""
        return "label" in self.columns

    @property
    def sees_signal(self) -> bool:
        """Do pixels or sound go in? The first layer that sees them is not masked; of tokens it is
        an embedding.
        """
        return "image" in self.columns or "audio" in self.columns


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
    ),
    TaskSpec(
        name="causal-lm",
        opener="dsd_refine.tasks.causal_lm:open_task",
        columns=("document",),
        auto_class="AutoModelForCausalLM",
        model_list="causal-lm",
        endings=("ForCausalLM", "LMHeadModel", "ModelWithLMHead"),
        processor="AutoTokenizer",
        pipeline_tag="text-generation",
        default_length=1024,
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
        default_length=20,  # as transformers generates where nothing is said
        model_types=("vision-encoder-decoder", "blip", "git"),  # of many, those whose training on captions is known here
    ),
)

TASKS: dict[str, TaskSpec] = {spec.name: spec for spec in _ALL}

"""Which task a checkpoint is for, told by its config alone; what no task here is for is called what it is."""

import json

import pytest

from dsd_refine.checkpoint.libraries.transformers import TEXT_PART, TransformersLibrary
from dsd_refine.errors import CheckpointError
from dsd_refine.task_specs import TASKS, unknown_task

SUPPORTED = f"supported are {', '.join(TASKS)}"
PAIRS = {"encoder": {"model_type": "vit"}, "decoder": {"model_type": "gpt2"}}


def opened(folder, architecture, model_type, task=None, **more):
    (folder / "config.json").write_text(json.dumps({"architectures": [architecture], "model_type": model_type, **more}))
    return TransformersLibrary.open(folder, task)


@pytest.mark.parametrize(
    ("architecture", "model_type", "task"),
    [
        ("BertForPreTraining", "bert", "masked-lm"),
        ("AlbertForPreTraining", "albert", "masked-lm"),
        ("MobileBertForPreTraining", "mobilebert", "masked-lm"),
        ("ElectraForMaskedLM", "electra", "masked-lm"),
        ("XLMWithLMHeadModel", "xlm", "masked-lm"),
        ("FlaubertWithLMHeadModel", "flaubert", "masked-lm"),
        ("BertLMHeadModel", "bert", "causal-lm"),
        ("XLNetLMHeadModel", "xlnet", "causal-lm"),
        ("ReformerModelWithLMHead", "reformer", "causal-lm"),
        ("LLaMAForCausalLM", "llama", "causal-lm"),  # as it was once written
        ("RwkvForCausalLM", "rwkv", "causal-lm"),
        ("BartForSequenceClassification", "bart", "text-classification"),
        ("Wav2Vec2ForCTC", "wav2vec2", "ctc-speech"),
        ("DeiTForImageClassificationWithTeacher", "deit", "image-classification"),
        ("DistilBertForQuestionAnswering", "distilbert", "question-answering"),
        ("XLNetForQuestionAnsweringSimple", "xlnet", "question-answering"),
        ("Wav2Vec2ForSequenceClassification", "wav2vec2", "audio-classification"),
        ("ASTForAudioClassification", "audio-spectrogram-transformer", "audio-classification"),
        ("BertModel", "bert", "embedding"),
        ("MPNetModel", "mpnet", "embedding"),
        ("BlipForConditionalGeneration", "blip", "image-captioning"),
        ("GitForCausalLM", "git", "image-captioning"),
        ("T5ForConditionalGeneration", "t5", "seq2seq-lm"),
        ("BartForConditionalGeneration", "bart", "seq2seq-lm"),
        ("MarianMTModel", "marian", "seq2seq-lm"),
        ("M2M100ForConditionalGeneration", "m2m_100", "seq2seq-lm"),
        ("MBartForConditionalGeneration", "mbart", "seq2seq-lm"),
        ("WhisperForConditionalGeneration", "whisper", "speech-seq2seq"),
        ("Speech2TextForConditionalGeneration", "speech_to_text", "speech-seq2seq"),
        ("Idefics3ForConditionalGeneration", "idefics3", "image-text-to-text"),
        ("SmolVLMForConditionalGeneration", "smolvlm", "image-text-to-text"),
    ],
)
def test_the_task_is_that_of_the_class(tmp_path, architecture, model_type, task):
    assert opened(tmp_path, architecture, model_type).task == task


def test_one_class_for_two_tasks_is_told_apart_by_the_config(tmp_path):
    assert opened(tmp_path, "XLMWithLMHeadModel", "xlm", causal=True).task == "causal-lm"


@pytest.mark.parametrize(
    ("architecture", "model_type", "kind", "more"),
    [
        ("RobertaForMultipleChoice", "roberta", "multiple-choice", {}),
        ("BertForNextSentencePrediction", "bert", "next-sentence-prediction", {}),
        ("DetrForObjectDetection", "detr", "object-detection", {}),
        ("SegformerForSemanticSegmentation", "segformer", "semantic-segmentation", {}),
        ("SamModel", "sam", "mask-generation", {}),
        ("DPTForDepthEstimation", "dpt", "depth-estimation", {}),
        ("VitsModel", "vits", "text-to-audio", {}),
        ("SpeechT5ForTextToSpeech", "speecht5", "text-to-speech", {}),
        ("ViltForQuestionAnswering", "vilt", "visual-question-answering", {}),
        ("TapasForQuestionAnswering", "tapas", "table-question-answering", {}),
        ("LayoutLMForQuestionAnswering", "layoutlm", "document-question-answering", {}),
        ("CLIPModel", "clip", "zero-shot-image-classification", {}),
        ("ElectraForPreTraining", "electra", "pretraining", {}),
        ("FunnelForPreTraining", "funnel", "pretraining", {}),
        ("Wav2Vec2ForPreTraining", "wav2vec2", "pretraining", {}),
        ("ViTMAEForPreTraining", "vit_mae", "pretraining", {}),
    ],
)
def test_what_no_task_is_for_is_called_what_it_is(tmp_path, architecture, model_type, kind, more):
    with pytest.raises(CheckpointError) as refused:
        opened(tmp_path, architecture, model_type, **more)
    says = f"{tmp_path}: {architecture} is for {kind}, which is not supported yet; {SUPPORTED}"
    said = str(refused.value).removesuffix("; give --task if the weights have a head")
    assert said == says


@pytest.mark.parametrize(
    ("architecture", "model_type", "says"),
    [
        ("LayoutLMv3ForQuestionAnswering", "layoutlmv3", "document-question-answering (words with their places on a page)"),
        ("LayoutLMv3ForTokenClassification", "layoutlmv3", "document-token-classification (words with their places on a page)"),
        ("LxmertForQuestionAnswering", "lxmert", "visual-question-answering (texts with pictures)"),
        ("TapasForSequenceClassification", "tapas", "table-text-classification"),
    ],
)
def test_a_text_head_that_reads_more_than_text_is_refused(tmp_path, architecture, model_type, says):
    with pytest.raises(CheckpointError) as refused:
        opened(tmp_path, architecture, model_type)
    assert str(refused.value) == f"{tmp_path}: {model_type} is for {says}, which is not supported yet; {SUPPORTED}"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("object-detection", f"object-detection is not supported; {SUPPORTED}"),
        ("Text_To_Image", f"Text_To_Image is not supported; {SUPPORTED}"),
        ("dpo", f"dpo is not supported; {SUPPORTED}"),
        ("text-generation", "text-generation is called causal-lm here"),
        ("reward-modeling", "reward-modeling is called text-classification here"),
        ("poetry", f"not a task; known are {', '.join(TASKS)}"),
    ],
)
def test_a_task_of_another_name_is_called_by_it(name, says):
    assert unknown_task(name) == says


def test_a_diffusers_pipeline_is_called_so(refused, tmp_path):
    (tmp_path / "unet").mkdir()
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    (tmp_path / "unet/config.json").write_text('{"_class_name": "UNet2DConditionModel", "_diffusers_version": "0.30"}')
    assert "a pipeline of diffusers (model_index.json), such as text-to-image, which is not supported" in refused(tmp_path)
    assert "a part of a diffusers pipeline (UNet2DConditionModel), which is not supported" in refused(tmp_path / "unet")


@pytest.mark.parametrize(
    ("architecture", "model_type", "task", "more"),
    [
        ("EncoderDecoderModel", "encoder-decoder", "seq2seq-lm", PAIRS),
        ("LEDForConditionalGeneration", "led", "seq2seq-lm", {}),
        ("MoonshineForConditionalGeneration", "moonshine", "speech-seq2seq", {}),
    ],
)
def test_a_task_for_some_families_names_them(tmp_path, architecture, model_type, task, more):
    families = ", ".join(TASKS[task].model_types)
    with pytest.raises(CheckpointError, match=f"{task} is for {families}; this is {model_type}$"):
        opened(tmp_path, architecture, model_type, **more)


@pytest.mark.parametrize("model_type", ["gemma3", "llava"])
def test_other_models_that_see_pictures_are_told_of_their_text_part(tmp_path, model_type):
    with pytest.raises(CheckpointError) as refused:
        opened(tmp_path, f"{model_type.title()}ForConditionalGeneration", model_type)
    said = f"{tmp_path}: image-text-to-text is for idefics3, smolvlm; this is {model_type}{TEXT_PART}"
    assert str(refused.value) == said


@pytest.mark.parametrize(
    "architecture", ["XLNetForQuestionAnswering", "Nobody", "GPT2DoubleHeadsModel", "T5WithLMHeadModel", "Wav2Vec2ForMaskedLM"]
)
def test_a_class_that_nobody_knows_leads_to_the_tasks(tmp_path, architecture):
    model_type = {"G": "gpt2", "T": "t5", "W": "wav2vec2", "X": "xlnet"}.get(architecture[0], "bert")
    with pytest.raises(CheckpointError, match=rf"names {architecture} as architecture, .*{SUPPORTED}; give --task if"):
        opened(tmp_path, architecture, model_type)


@pytest.mark.parametrize(
    ("task", "model_type"), [("causal-lm", "t5"), ("masked-lm", "gpt2"), ("ctc-speech", "bert"), ("image-captioning", "gemma3")]
)
def test_a_task_that_is_given_must_be_one_of_the_family_s(tmp_path, task, model_type):
    with pytest.raises(CheckpointError) as refused:
        opened(tmp_path, "Whatever", model_type, task)
    assert task in str(refused.value)
    assert model_type in str(refused.value)
    assert len(str(refused.value)) < 400  # the library lists some hundred classes


def test_another_kind_of_classification_says_which_is_done(tmp_path):
    with pytest.raises(CheckpointError, match="problem_type is 'regression', which is not supported yet for images"):
        opened(tmp_path, "ViTForImageClassification", "vit", problem_type="regression")


def test_what_was_pretrained_with_a_masked_lm_head_trains_so(command, tmp_path):
    import small
    from builders import text_file
    from conftest import SHORT

    folder = small.save_family(tmp_path / "m", "BertForPreTraining", small.WIDE)
    found = command(folder, "--data", text_file(tmp_path / "d.txt", 8), "-o", tmp_path / "out", *SHORT)
    assert found.code == 0, found.err
    report = json.loads((tmp_path / "out/dsd/report.json").read_text())
    assert report["task"] == "masked-lm"
    assert any("seq_relationship" in line for line in report["warnings"])

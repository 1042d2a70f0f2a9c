"""Audio as a speech model takes it: any clip, resampled to the checkpoint's rate, through its own
feature extractor.
"""

from __future__ import annotations

import inspect
import io
import math
import threading
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dsd_refine.data.reading import Table
from dsd_refine.data.tables import in_words, raw_bytes
from dsd_refine.errors import CheckpointError, DataError
from dsd_refine.forward import logits_of
from dsd_refine.tasks.inputs.padding import same_but_for_rounding

# silence compresses well, and a sample a second would be resampled to thousands: a small file may
# ask for any memory
MOST_SAMPLES, RATES = 100_000_000, (1_000, 400_000)

_one_at_a_time = threading.Lock()

MOST_TRIED = 1 << 20  # samples that the search for the shortest clip tries: a minute gives a frame in any model

Samples = np.ndarray[Any, np.dtype[np.float32]]

Lengths = Callable[[torch.Tensor], torch.Tensor]


def decode(raw: bytes) -> tuple[Samples, int]:
    """(samples in -1..1, their rate in Hz) of an audio file; channels are averaged.

    Raises:
        DataError: not audio that libsndfile reads, without samples, of no rate that sound has, too
            long to be an example, or with values that are no numbers.
    """
    import soundfile

    try:
        with soundfile.SoundFile(io.BytesIO(raw)) as file:
            rate, most = int(file.samplerate), MOST_SAMPLES // int(file.channels)
            if not RATES[0] <= rate <= RATES[1]:
                raise DataError(f"audio of {rate:,} Hz; {RATES[0]:,} to {RATES[1]:,} are resampled")
            with _one_at_a_time if file.frames > most // 10 else nullcontext():
                samples = file.read(most + 1, dtype="float32", always_2d=True)
    except DataError:
        raise
    except Exception as error:  # libsndfile and its wrapper raise whatever a broken file makes them raise
        raise DataError(f"unreadable audio ({in_words(error)[-80:]})") from None
    if not len(samples):
        raise DataError("audio without samples")
    if len(samples) > most:
        raise DataError(f"audio of more than {most:,} samples: too long to be one example")
    if not np.isfinite(samples).all():
        raise DataError("audio with values that are not finite")
    return samples.mean(axis=1, dtype=np.float32), rate


def resample(samples: Samples, rate: int, wanted: int) -> Samples:
    """The same sound at another rate, by scipy's polyphase filter: the exact ratio, ceil(n * wanted
    / rate) samples.
    """
    from scipy.signal import resample_poly

    if rate == wanted:
        return samples
    divisor = math.gcd(rate, wanted)
    resampled: Samples = resample_poly(samples, wanted // divisor, rate // divisor).astype(np.float32)
    return resampled


def hear(table: Table, column: str, row: int, rate: int) -> tuple[bytes, Samples]:
    """The bytes of a row's sound file, and its samples at `rate`.

    Raises:
        DataError: the row has no sound that can be used; the message is the reason.
    """
    try:
        raw = raw_bytes(table, column, row)
    except OSError as error:
        raise DataError(f"unreadable file ({error.strerror or error})") from None
    except TypeError:
        raise DataError("no audio") from None
    return raw, resample(*decode(raw), rate)


def hear_again(table: Table, column: str, row: int, rate: int) -> Samples:
    """The samples of a row that was heard before, from where they are held."""
    held = table.decoded.get(row) if table.decoded is not None else None
    if held is not None:
        return np.frombuffer(bytearray(held[0]), dtype=np.float32)
    return resample(*decode(raw_bytes(table, column, row)), rate)


@dataclass(frozen=True)
class FeatureExtractor:
    """A checkpoint's own feature extractor, and how this model takes its features.

    `rate` is in Hz; `name` is the model's input. `masked`: the model is given an attention mask,
    with which its logits of a clip are the same with padding and without. `shortest` is the least
    number of samples that gives a frame, `axis` the input's dimension of time (2 where a channel
    comes before it).
    """

    extractor: Any
    rate: int
    name: str
    masked: bool = False
    shortest: int = 1
    axis: int = 1

    def features(self, samples: Samples) -> torch.Tensor:
        """One clip's features, time first, without those that the extractor itself marks as
        padding.
        """
        if len(samples) < self.shortest:
            samples = np.pad(samples, (0, self.shortest - len(samples)))
        with np.errstate(invalid="ignore", divide="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a clip too short for a spectrogram's statistics
            extracted = self.extractor(samples, sampling_rate=self.rate, return_tensors="pt")
        values: torch.Tensor = extracted[self.name][0].to(torch.float32)
        values = values[0] if self.axis == 2 else values
        mask = extracted.get("attention_mask")
        return values if mask is None else values[: int(mask[0].sum())]

    def padded(self, clips: Sequence[torch.Tensor]) -> torch.Tensor:
        """The features of several clips in one tensor, as the model takes them: padded to the
        longest.
        """
        value = float(getattr(self.extractor, "padding_value", 0.0))
        padded = torch.nn.utils.rnn.pad_sequence(list(clips), batch_first=True, padding_value=value)
        return padded.unsqueeze(1) if self.axis == 2 else padded


@dataclass(frozen=True)
class SpecAugment:
    """Masks in time as the checkpoint's config says (Park et al. 2019), drawn for each row
    separately.
    """

    share: float
    length: int
    least: int

    def draw(self, frames: int, seed: int) -> torch.Tensor:
        """Frames to mask, bool. A clip shorter than one mask has none.

        The same masks as transformers' wav2vec2 draws after this seed, but from a generator of its
        own: the model uses numpy's and torch's at the same time.
        """
        masked = torch.zeros(frames, dtype=torch.bool)
        if frames < self.length:
            return masked
        draw = np.random.RandomState(seed % 2**32)
        masks = max(int(self.share * frames / self.length + draw.rand()), self.least)
        masks = min(masks, frames // self.length)
        for start in draw.choice(frames - self.length + 1, masks, replace=False) if masks else ():
            masked[start : start + self.length] = True
        return masked


def open_feature_extractor(
    folder: Path, model: torch.nn.Module, trust_remote_code: bool = False, *, one_answer: bool = False
) -> FeatureExtractor:
    """The checkpoint's feature extractor, and how this model takes its features.

    `one_answer`: the model gives one answer a clip. Then it need not say how many frames it makes: the
    extractor may make inputs of one size of all clips, as those of spectrogram transformers do.

    Raises:
        CheckpointError: the folder has no usable feature extractor, or the model says no lengths.
    """
    extractor, gives_mask = load_feature_extractor(folder, trust_remote_code)
    frames, _ = lengths_of(model, one_answer=one_answer)
    extractor = replace(extractor, shortest=shortest_clip(extractor, frames))
    # convolutions with one norm over a whole clip were trained without a mask (wav2vec2-base), and
    # must not be given one
    whole_clip = getattr(model.config, "feat_extract_norm", None) == "group"
    return replace(extractor, masked=gives_mask and not whole_clip and _ignores_padding(model, extractor, frames))


def load_feature_extractor(folder: Path, trust_remote_code: bool = False) -> tuple[FeatureExtractor, bool]:
    """The checkpoint's feature extractor, and whether it gives an attention mask beside the features.

    Raises:
        CheckpointError: the folder has no usable feature extractor.
    """
    from transformers import AutoFeatureExtractor

    try:
        theirs = AutoFeatureExtractor.from_pretrained(  # type: ignore[no-untyped-call]
            folder, local_files_only=True, trust_remote_code=trust_remote_code
        )
        rate = int(theirs.sampling_rate)
        if not RATES[0] <= rate <= RATES[1]:
            raise ValueError(f"a sampling_rate of {rate:,} Hz")
        silence = theirs(np.zeros(rate, dtype=np.float32), sampling_rate=rate, return_tensors="pt")
    except Exception as error:  # transformers raises whatever a strange config makes it raise
        raise CheckpointError(f"{folder}: its feature extractor cannot be used: {' '.join(str(error).split())[:200]}") from None
    name = str(theirs.model_input_names[0])
    extractor = FeatureExtractor(theirs, rate, name, axis=2 if silence[name].shape[:2] == (1, 1) else 1)
    return extractor, "attention_mask" in silence


@torch.no_grad()
def _ignores_padding(model: torch.nn.Module, extractor: FeatureExtractor, frames: Lengths) -> bool:
    """Are a model's logits of a clip the same with masked padding? Some let it leak in (adapters,
    stacked position layers).
    """
    if next(model.parameters()).is_meta or model.training:
        return False
    noise = np.random.default_rng(0).normal(0, 0.1, max(extractor.rate, 8 * extractor.shortest)).astype(np.float32)
    full = extractor.features(noise)
    # several lengths: a leak may show at some remainders of the strides only
    clips = [full, *(full[: len(full) // 2 + i + len(full) // 50 * i] for i in range(8))]
    mask = (torch.arange(len(full)) < torch.tensor([[len(clip)] for clip in clips])).long()
    together = logits_of(model, {extractor.name: extractor.padded(clips), "attention_mask": mask})
    for clip, logits in zip(clips, together, strict=True):  # frames x labels, or the classes of one answer
        whole = torch.ones(1, len(clip), dtype=torch.int64)
        alone = logits_of(model, {extractor.name: extractor.padded([clip]), "attention_mask": whole})[0]
        count = count_frames(frames, clip) if logits.dim() == 2 else len(logits)
        if not same_but_for_rounding(logits[:count], alone[:count]):
            return False
    return True


def most_samples(extractor: FeatureExtractor) -> int | None:
    """The longest clip, in samples, that the extractor takes whole. None: it cuts none."""
    theirs, seconds = extractor.extractor, (1, 2)
    if len({len(extractor.features(np.zeros(n * extractor.rate, dtype=np.float32))) for n in seconds}) > 1:
        return None
    if hasattr(theirs, "n_samples"):  # Whisper's
        return int(theirs.n_samples)
    frames = int(getattr(theirs, "max_length", 0))  # of 25 ms, one each 10 ms
    return (10 * (frames - 1) + 25) * extractor.rate // 1000 if frames else None


def count_frames(lengths: Lengths, values: torch.Tensor) -> int:
    """The number of output frames that `lengths` gives for the features of one clip (length first)."""
    return int(lengths(torch.tensor([len(values)]))[0])


def shortest_clip(extractor: FeatureExtractor, frames: Lengths) -> int:
    """The least number of samples that gives finite features and an output frame.

    Raises:
        CheckpointError: no length of noise does.
    """
    # no silence: Speech2Text divides by its deviation
    noise = np.random.default_rng(0).normal(0, 0.1, MOST_TRIED).astype(np.float32)

    def gives_a_frame(samples: int) -> bool:
        try:
            values = extractor.features(noise[:samples])
        except (ValueError, RuntimeError, IndexError, ZeroDivisionError):  # too short for a window of the spectrogram
            return False
        return bool(values.isfinite().all()) and count_frames(frames, values) > 0

    low, high = 0, 1
    while not gives_a_frame(high):
        low, high = high, 2 * high
        if high > MOST_TRIED:
            raise CheckpointError("the model's frames cannot be counted: no length of sound gives one")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if gives_a_frame(middle) else (middle, high)
    return high


def lengths_of(model: Any, *, one_answer: bool = False) -> tuple[Lengths, Lengths]:
    """Functions from the input's lengths to those of the output, and of what SpecAugment masks,
    both in frames. A model that has none may have `one_answer` a clip: then the lengths stay as they are.

    Raises:
        CheckpointError: the model has none.
    """
    for owner in (model, getattr(model, "encoder", None)):
        for name in ("_get_feat_extract_output_lengths", "_get_subsampling_output_length"):
            method = getattr(owner, name, None)
            if method is not None and "add_adapter" in inspect.signature(method).parameters:
                return method, lambda lengths, count=method: count(lengths, add_adapter=False)
            if method is not None:
                return method, method
    if one_answer:
        return torch.Tensor.clone, torch.Tensor.clone
    raise CheckpointError(f"{type(model).__name__}: does not say how many frames it makes of a clip, as CTC needs")


def spec_augment(model: Any) -> SpecAugment | None:
    """What the config asks for, where the model takes masks from outside; None where there is
    nothing to mask in time.
    """
    config = model.config
    takes = "mask_time_indices" in inspect.signature(type(model.base_model).forward).parameters
    share = float(getattr(config, "mask_time_prob", 0.0) or 0.0)
    if not takes or not share or not getattr(config, "apply_spec_augment", True):
        return None
    return SpecAugment(share, int(config.mask_time_length), int(getattr(config, "mask_time_min_masks", 0)))

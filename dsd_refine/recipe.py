"""A recipe: a list of phases and everything else that decides a result.

It is immutable, validated, and can be written as YAML. This module imports nothing heavy, so that a
mistake in a recipe shows at once.
"""

from __future__ import annotations

import codecs
import difflib
import math
import re
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    field_serializer,
    field_validator,
    model_validator,
)

from dsd_refine.errors import RecipeError
from dsd_refine.task_specs import TASKS
from dsd_refine.yaml_reader import dump_recipe_yaml, load_recipe_yaml

Rate = Annotated[float, Field(ge=0)]


class AutoRate(float):
    """A learning rate that is a multiple of the one that the range test finds: `auto*0.3` is AutoRate(0.3).

    `dsd_refine.run.rates` makes plain numbers of them before the first phase.
    """

    def __str__(self) -> str:
        factor = float(self)
        return "auto" if factor == 1 else f"auto*{factor:.12g}"

    __repr__ = __str__

    def __format__(self, spec: str) -> str:
        return str(self)


def read_rate(value: Any) -> Any:
    """Return an `AutoRate` for a text such as `auto`, `auto*0.3` or `auto/10`. Every other value is returned as it is."""
    match = re.fullmatch(r"auto(?:\s*([*/])\s*(\d[\d.e+-]*))?", value) if isinstance(value, str) else None
    try:
        factor = float(match[2] or 1) if match else math.nan
    except ValueError:
        return value
    if not match or not 0 < factor < math.inf:
        return value
    return AutoRate(1 / factor if match[1] == "/" else factor)


def times(rate: float, factor: float) -> float:
    """Return a multiple of a rate, rounded to three digits. It is an `AutoRate` if the rate is one."""
    rounded = float(f"{factor * rate:.3g}")
    return AutoRate(rounded) if isinstance(rate, AutoRate) else rounded


Share = Annotated[float, Field(ge=0, lt=1)]

# No run with more steps would end. A larger number is a typing error.
Count = Annotated[int, Field(ge=0, le=10**9)]

Seed = Annotated[int, Field(ge=0, lt=2**63)]  # the range of torch's generators

Positive = Annotated[int, Field(gt=0, le=10**9)]

Names = Annotated[tuple[str, ...], Field(strict=False)]

MOST_MISTAKES = 9  # mistakes that a message lists; the others are counted
LONGEST_RECIPE = 100_000  # characters; the YAML loader is slow, and no real recipe is longer


class Strict(BaseModel):
    """A model that refuses unknown keys, does not convert values (`"0.3"` is no number), and is immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


Kind = TypeVar("Kind", bound=Strict)


class Distill(Strict):
    """Distillation: the model also learns from the outputs of the source.

    The loss is (1 - weight) * task loss + weight * T^2 * KL(source || model) at temperature T.

    Attributes:
        weight: The share of the distillation in the loss.
        temperature: What the outputs of both are divided by before the softmax.
    """

    weight: Annotated[float, Field(gt=0, le=1)] = 0.5
    temperature: Annotated[float, Field(gt=0)] = 1.0


class Phase(Strict):
    """One phase of training, with its own optimizer: `sparse` under a mask, or `dense` without a mask.

    Attributes:
        kind: "sparse" or "dense".
        epochs: The length in epochs: max(1, ceil(epochs * steps per epoch)) steps. 0 is allowed.
        steps: The length in optimizer steps, instead of `epochs`. 0 is allowed.
        lr: The peak learning rate. `auto`, `auto*0.3` and `auto/10` are multiples of the rate that the
            range test finds on the source before the first phase.
        schedule: How the learning rate falls.
        warmup_steps: The number of steps in which the learning rate rises.
        sparsity: The share of zeros in each layer (paper, section 3). Only for a sparse phase.
        criterion: "magnitude" masks the smallest absolute values, "saliency" the smallest |weight *
            gradient| on a few batches (Lee et al. 2019), "random" draws by chance.
        threshold: "layer" masks the same share of each layer. "global" masks the smallest values of the
            whole model, so that layers differ; each layer and expert keeps at least one weight.
        ramp: Share of the phase in which the sparsity rises from 0 (Zhu and Gupta 2017), at each new mask.
        restore: With what the masked weights begin a dense phase: "zero", or "source", their values in
            the source.
        lr_scale: Glob of parameter names in the model -> factor of their learning rate. The first
            glob that matches counts.
        sam: The radius of sharpness-aware minimization (Foret et al. 2021): the gradient is that at
            weights moved so far uphill. A step takes twice as long.
        refresh: When a new mask is made: `once` (the paper), `every step`, `every N steps`. With
            magnitude, the step before a new mask is made without a mask, so that a masked weight can
            return by its gradient (iterative hard thresholding, Jin et al. 2016). With random, the
            masked weights get their old values back, and others are masked (DropConnect, Wan et al.
            2013).
        average: "swa" gives the mean of the weights at the ends of the epochs (Izmailov et al. 2018),
            "ema" a moving average over the steps.
        ema_decay: The decay of the moving average.
        distill: Learn from the source too.
        dropout: The rate of every dropout layer of the model (see `dsd_refine.training.dropout`).
            Stochastic depth does not count as dropout.
        frozen: Globs of parameters that are neither trained nor masked, by their names in the model or
            in the file.
    """

    kind: Literal["sparse", "dense"]
    epochs: Annotated[float, Field(ge=0, le=10**6)] | None = None
    steps: Count | None = None
    lr: Rate
    schedule: Literal["cosine", "linear", "constant", "step"] = "cosine"
    warmup_steps: Count = 0
    sparsity: Share | None = None
    criterion: Literal["magnitude", "saliency", "random"] = "magnitude"
    threshold: Literal["layer", "global"] = "layer"
    ramp: Annotated[float, Field(gt=0, le=1)] | None = None
    restore: Literal["zero", "source"] = "zero"
    lr_scale: dict[str, Annotated[float, Field(gt=0)]] = {}
    sam: Annotated[float, Field(gt=0)] | None = None
    refresh: Positive | None = None
    average: Literal["none", "swa", "ema"] = "none"
    ema_decay: Share = 0.999
    distill: Distill | None = None
    dropout: Share | None = None
    frozen: Names = ()

    @field_validator("lr", mode="wrap")
    @classmethod
    def _number_or_auto(cls, value: Any, number: ValidatorFunctionWrapHandler) -> Any:
        rate = read_rate(value)
        return rate if isinstance(rate, AutoRate) else number(value)

    @field_serializer("lr", when_used="json")
    def _as_given(self, lr: float) -> float | str:
        return str(lr) if isinstance(lr, AutoRate) else lr

    @field_validator("refresh", mode="before")
    @classmethod
    def _refresh_words(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        match = re.fullmatch(r"every (?:(\d+) )?steps?", value)
        if value != "once" and not match:
            raise ValueError("refresh is `once`, `every step` or `every N steps`")
        return int(match[1] or 1) if match else None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("a phase needs either epochs or steps, and not both")
        if self.kind == "sparse" and self.sparsity is None:
            raise ValueError("a sparse phase needs a sparsity")
        if self.kind == "dense" and (self.sparsity is not None or self.refresh is not None):
            raise ValueError("a dense phase has no mask: leave out sparsity and refresh")
        if self.kind == "dense" and (self.ramp is not None or self.threshold != "layer"):
            raise ValueError("a dense phase has no mask: leave out ramp and threshold")
        if self.kind == "sparse" and self.restore != "zero":
            raise ValueError("restore belongs to the dense phase after the sparse one")
        if self.ramp is not None and not self.refresh:
            raise ValueError("ramp needs new masks on the way: give refresh, such as `every 50 steps`")
        if self.criterion == "saliency" and self.refresh:
            raise ValueError("saliency has one mask a phase: use refresh: once, or criterion: magnitude")
        if self.refresh and self.average != "none":
            raise ValueError("an average over changing masks would have no zeros: use refresh: once, or average: none")
        return self

    def sparsity_at(self, step: int, steps: int) -> float:
        """Return the sparsity of the mask that is made after a step: s * (1 - (1 - x)^3) with `ramp`.

        The last mask has the whole sparsity.

        Args:
            step: The number of steps that are done, from 0.
            steps: The number of steps of the phase.
        """
        sparsity, every = self.sparsity or 0.0, self.refresh or 1
        last = max(0, steps - 1) // every * every  # the step after which the last mask is made
        if self.ramp is None or not last:
            return sparsity
        return sparsity * (1 - (1 - min(1.0, step / (self.ramp * last))) ** 3)

    def total_steps(self, steps_per_epoch: int) -> int:
        """Return the number of optimizer steps of this phase.

        Args:
            steps_per_epoch: The optimizer steps of one epoch.
        """
        if self.steps is not None:
            return self.steps
        if not self.epochs:
            return 0
        return max(1, math.ceil(self.epochs * steps_per_epoch))


class Augment(Strict):
    """The augmentation of images in training, in addition to the checkpoint's own preprocessing.

    Attributes:
        crop: "random-resized" takes a random part of the image, "none" what the checkpoint's preprocessing takes.
        scale: The smallest and the largest area of a random part, as shares of the image.
        ratio: The smallest and the largest width of a random part, divided by its height.
        flip: The share of images that are mirrored.
    """

    crop: Literal["none", "random-resized"] = "none"
    scale: Annotated[tuple[Rate, Rate], Field(strict=False)] = (0.35, 1.0)
    ratio: Annotated[tuple[Rate, Rate], Field(strict=False)] = (0.75, 4 / 3)
    flip: Annotated[float, Field(ge=0, le=1)] = 0.0


class Search(Strict):
    """A search over settings (see `dsd_refine.search`). Without `tries` the space is there, but not searched.

    Attributes:
        tries: How many settings each arm tries.
        factor: After each rung, 1 / `factor` of the settings go on, with `factor` times as many steps.
        space: Field of the recipe, such as `phases.0.lr` -> the values to choose from. Empty: the
            default space.
    """

    tries: Annotated[int, Field(gt=0, le=1000)] | None = None
    factor: Annotated[int, Field(gt=1, le=10)] = 3
    space: dict[str, Annotated[tuple[Any, ...], Field(strict=False, min_length=1)]] = {}


def _has_list(phase: Any) -> bool:
    listed = phase.get("sparsity") if isinstance(phase, dict) else None
    return isinstance(listed, list | tuple) and len(listed) > 0


class Recipe(Strict):
    """Everything that decides a result. The file dsd/recipe.yaml of an output repeats its run.

    `name` is shown in reports; without it, it is the name of the file.
    `models` are globs of model names. A shipped recipe is chosen for a model that one of them matches.
    `phases` are trained one after the other.
    `augment` says how images are changed in training.
    `sparsities` are tried one after the other in the only sparse phase, and the holdout selects one.
    In a file they may also be a list in that phase.
    `weights_key` names the set of weights to use, if a pickle has several.
    `label_names` are the names of integer labels, in order: a list, or `imagenet-1k`. They replace the
    names in the data.
    `label_map` maps labels of the data to classes of the model (by name, or by number if the model has
    no names). null leaves out the rows of a label.
    `encoding` is the encoding of text files without a byte order mark.
    `documents` says what is a document in a .txt file: a paragraph, a line, or the file.
    `join` makes documents of neighbouring rows: `all` of a split, those from one heading to the next
    (`headings`, as in WikiText), or those with the same value in the column of this name.
    `join_with` stands between the rows that are joined (two line ends).
    `stride` evaluates a language model on windows that begin so many tokens apart, so that each token
    is scored once, with the tokens before it as context. In question answering it is the same of the windows of
    a context, in training too.
    `eval_batch_size` is the number of rows that each process evaluates together (None: as many as it trains on, and on a GPU
    more, as its memory allows).
    `loss_on` says which tokens of conversations are targets: those of the answers, or all.
    `group_by_length` trains on batches of rows of about one length, so that little is padding.
    `pack` puts several windows of a language model, as many as `max_length` holds, into one row of a training batch. They
    do not see each other. Such a row counts as one of `batch_size`.
    `metric` is what decides, of the metrics that the task measures (the task's first one).
    `pooling` makes one embedding of an encoder's outputs, if the checkpoint's own files do not say how.
    `source_column` and `target_column` name the texts that a sequence-to-sequence model reads and writes. In a column
    of translations they are languages, such as `en` and `de`.
    `source_language` and `target_language` are the languages of these texts, or of what is said, as the tokenizer of a
    model for several languages calls them (what the checkpoint says).
    `prefix` stands before each source (what the checkpoint's config says for such data; "" for none).
    `normalizer` is applied to transcripts before their errors are counted: Whisper's `basic` or `english` one.
    `eval_split` and `holdout_split` name the splits of the data for evaluation and selection.
    `publish` says whose weights the output has: `refined`, or `best`, the arm that the holdout prefers. With `best`
    the source itself is a candidate.
    `patience` stops a hopeless try after so many evaluations on the holdout in a row (see
    `dsd_refine.run.lost`). None: no try is stopped.
    `interpolate` lists shares of the way from the source to the trained weights, such as [0.5]. The holdout decides
    whether such weights are the result of an arm.
    `soup` mixes the weights of the finished tries of an arm (`uniform`: of all; `greedy`: of those that improve the mean).
    `average: rounds` mixes the weights at the ends of several sparse-dense rounds of a try. For both, the holdout
    decides whether such weights are the result.
    `search` tries several settings in each arm. `search: 8` is `search: {tries: 8}`.
    """

    name: str = "recipe"
    task: str | None = None
    models: Names = ()
    weights_key: str | None = None
    data: str | None = None
    eval_data: str | None = None
    eval_split: str | None = None
    holdout_split: str | None = None
    phases: Annotated[tuple[Phase, ...], Field(strict=False, min_length=1)]
    sparsities: Annotated[tuple[Share, ...], Field(strict=False)] = ()
    optimizer: Literal["sgd", "adamw"] = "sgd"
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: Rate = 0.0
    batch_size: Positive = 32
    eval_batch_size: Positive | None = None
    gradient_accumulation_steps: Positive = 1
    max_grad_norm: Annotated[float, Field(gt=0)] | None = None
    augment: Augment = Augment()
    include: Names = ()
    exclude: Names = ()
    control: Annotated[tuple[Literal["dense", "random"], ...], Field(strict=False)] = ("dense",)
    holdout: Share = 0.1
    keep: Literal["best", "last", "sparse"] = "best"
    gate: Literal["none", "not-worse", "non-inferior", "better", "beats-control"] = "not-worse"
    margin: Annotated[float, Field(ge=0)] = 0.005
    publish: Literal["refined", "best"] = "refined"
    patience: Positive | None = None
    search: Search | None = None
    interpolate: Annotated[tuple[Annotated[float, Field(gt=0, lt=1)], ...], Field(strict=False)] = ()
    soup: Literal["none", "uniform", "greedy"] = "none"
    average: Literal["none", "rounds"] = "none"
    seed: Seed = 0
    seeds: Annotated[int, Field(gt=0, le=1000)] = 1
    expect: dict[str, float] = {}
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    image_column: str | None = None
    label_column: str | None = None
    label_names: Literal["imagenet-1k"] | Names | None = None
    label_map: dict[str, str | None] = {}
    text_column: str | None = None
    audio_column: str | None = None
    max_length: Annotated[int, Field(gt=1)] | None = None
    encoding: str = "utf-8"
    documents: Literal["paragraphs", "lines", "file"] | None = None
    join: str | None = None
    join_with: str | None = None
    stride: Positive | None = None
    loss_on: Literal["answers", "all"] | None = None
    group_by_length: bool | None = None
    pack: bool | None = None
    metric: str | None = None
    pooling: Literal["cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"] | None = None
    source_column: str | None = None
    target_column: str | None = None
    source_language: str | None = None
    target_language: str | None = None
    prefix: str | None = None
    normalizer: Literal["basic", "english"] | None = None

    @field_validator("task")
    @classmethod
    def _known_task(cls, value: str | None) -> str | None:
        if value is not None and value not in TASKS:
            raise ValueError(f"no task; known are {', '.join(TASKS)}")
        return value

    @field_validator("encoding")
    @classmethod
    def _known_encoding(cls, value: str) -> str:
        try:
            "x".encode(value)  # must be an encoding of text, unlike hex
            return codecs.lookup(value).name
        except (LookupError, UnicodeError):
            raise ValueError("not a known encoding; known are for example utf-8, latin-1, cp1252, utf-16") from None

    @field_validator("label_names", mode="before")
    @classmethod
    def _distinct_names(cls, value: Any) -> Any:
        listed = isinstance(value, list | tuple) and value and all(isinstance(name, str) for name in value)
        if value not in (None, "imagenet-1k") and not (listed and len(set(value)) == len(value)):
            raise ValueError("expected `imagenet-1k`, or a list of names, no two of them the same")
        return value

    @field_validator("label_map", mode="before")
    @classmethod
    def _numbers_too(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            raise ValueError("expected a mapping of the data's labels to the model's classes, such as {neg: NEGATIVE}")
        odd = next((name for name in value.values() if not isinstance(name, str | int | None) or isinstance(name, bool)), None)
        if odd is not None:
            raise ValueError(
                f"the class {odd!r:.40} is not text; put it into quotes (YAML reads yes, no and dates as other types)"
            )
        return {label: None if name is None else str(name) for label, name in value.items()}

    @field_validator("search", mode="before")
    @classmethod
    def _number_of_tries(cls, value: Any) -> Any:
        return {"tries": value} if isinstance(value, int) else value

    @model_validator(mode="before")
    @classmethod
    def _listed_in_the_phase(cls, raw: Any) -> Any:
        """`sparsity: [0.25, 0.3]` in the sparse phase is what `sparsities` says."""
        phases = raw.get("phases") if isinstance(raw, dict) else None
        listed = [n for n, phase in enumerate(phases) if _has_list(phase)] if isinstance(phases, list | tuple) else []
        if not listed or not isinstance(phases, list | tuple):
            return raw
        if len(listed) > 1 or raw.get("sparsities"):
            raise ValueError("a list of sparsities goes with exactly one sparse phase")
        tried = phases[listed[0]]["sparsity"]
        single = [{**phase, "sparsity": tried[0]} if n == listed[0] else phase for n, phase in enumerate(phases)]
        return {**raw, "phases": single, "sparsities": tried}

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        sparse = [p for p in self.phases if p.kind == "sparse"]
        if self.sparsities and len(sparse) != 1:
            raise ValueError("a list of sparsities goes with exactly one sparse phase")
        if self.keep == "sparse" and not sparse:
            raise ValueError("keep: sparse needs a sparse phase")
        if self.holdout == 0 and (self.keep == "best" or len(self.tried) > 1):
            raise ValueError("holdout 0 leaves no rows for the selection: use keep: last and one sparsity")
        if self.holdout == 0 and self.publish == "best":
            raise ValueError("publish: best needs a holdout that chooses: give --holdout F, such as 0.1")
        if self.searches:
            if self.holdout == 0:
                raise ValueError("a search needs a holdout that chooses: give --holdout F, such as 0.1")
            if self.sparsities:
                raise ValueError("a search and a list of sparsities exclude each other: put the sparsities into search.space")
        if self.holdout == 0 and self.interpolate:
            raise ValueError("interpolate needs a holdout that chooses: give --holdout F, such as 0.1")
        self._check_mixing()
        if self.holdout == 0 and self.patience:
            raise ValueError("patience needs a holdout that shows what is hopeless: give --holdout F, such as 0.1")
        if self.gate == "beats-control" and not self.control:
            raise ValueError("gate beats-control needs a control")
        if len(set(self.control)) != len(self.control):
            raise ValueError("a control is named twice")
        if self.group_by_length and self.pack:
            raise ValueError("pack makes rows of about one length already: leave out group_by_length")
        if self.join_with is not None and self.join is None:
            raise ValueError("join_with stands between the rows that join puts together: give join too")
        return self

    def _check_mixing(self) -> None:
        """Check `soup` and `average`."""
        for name in ("soup", "average"):
            asked = getattr(self, name)
            if asked != "none" and self.holdout == 0:
                raise ValueError(f"{name}: {asked} needs a holdout that chooses: give --holdout F, such as 0.1")
            if asked != "none" and self.keep == "sparse":
                raise ValueError(f"{name}: {asked} gives weights without the zeros of one mask: use keep: best")
        tries = max(len(self.sparsities), self.search.tries or 1 if self.search else 1) * self.seeds
        if self.soup != "none" and tries == 1:
            raise ValueError(
                f"soup: {self.soup} mixes several tries, and here is one: give --search N, --seeds N or sparsities"
            )
        if self.average == "rounds" and len(self.round_ends) < 2:
            raise ValueError("average: rounds needs two or more rounds of a sparse and a dense phase")

    @property
    def round_ends(self) -> tuple[int, ...]:
        """The numbers of the phases with which a round of sparse and dense phases ends, from 0."""
        kinds = [phase.kind for phase in self.trained_phases]
        ends = [n for n, kind in enumerate(kinds) if kind == "dense" and (n + 1 == len(kinds) or kinds[n + 1] == "sparse")]
        return tuple(number for number in ends if "sparse" in kinds[:number])

    @property
    def tried(self) -> tuple[float | None, ...]:
        """The sparsities to try, or (None,) if every phase has only its own."""
        return self.sparsities or (None,)

    @property
    def searches(self) -> bool:
        """Whether several settings are searched."""
        return self.search is not None and self.search.tries is not None

    @property
    def trained_phases(self) -> tuple[Phase, ...]:
        """The phases that are trained. With `keep: sparse` they end with the last sparse phase."""
        if self.keep != "sparse":
            return self.phases
        return self.phases[: max(i for i, phase in enumerate(self.phases) if phase.kind == "sparse") + 1]

    @property
    def asks_for_rates(self) -> bool:
        """Whether a phase has a rate that the range test must find."""
        return any(isinstance(phase.lr, AutoRate) for phase in self.phases)

    def at_rates(self, rates: Mapping[str, float]) -> Self:
        """Return the recipe with a number for each `auto`.

        Args:
            rates: Optimizer -> the rate that the range test found.
        """
        if not self.asks_for_rates:
            return self
        tested = rates[self.optimizer]
        numbers = [float(f"{phase.lr * tested:.9g}") if isinstance(phase.lr, AutoRate) else phase.lr for phase in self.phases]
        phases = [phase.model_copy(update={"lr": lr}) for phase, lr in zip(self.phases, numbers, strict=True)]
        return self.model_copy(update={"phases": tuple(phases)})

    @property
    def threshold(self) -> str:
        """The threshold of the first sparse phase: "layer" or "global"."""
        return next((phase.threshold for phase in self.phases if phase.kind == "sparse"), "layer")

    def phases_at(self, sparsity: float | None) -> tuple[Phase, ...]:
        """Return the phases of one try.

        Args:
            sparsity: One of `tried`. It replaces the sparsity of the sparse phase, unless it is None.
        """
        if sparsity is None:
            return self.phases
        return tuple(p.model_copy(update={"sparsity": sparsity}) if p.kind == "sparse" else p for p in self.phases)

    def dump(self) -> str:
        """Return the recipe as YAML. `read_recipe` and `validate` make an equal recipe of it."""
        fields = self.model_dump(mode="json", exclude_none=True)
        # A recipe that does not use these fields reads as before.
        for name in ("publish", "interpolate", "soup", "average"):
            if getattr(self, name) == Recipe.model_fields[name].default:
                del fields[name]
        for phase in fields["phases"]:
            for name in ("threshold", "restore", "lr_scale"):
                if phase[name] == Phase.model_fields[name].default:
                    del phase[name]
        if tried := fields.pop("sparsities"):
            next(phase for phase in fields["phases"] if phase["kind"] == "sparse")["sparsity"] = tried
        return dump_recipe_yaml(fields)


def first_sparsity(recipe: Recipe) -> float | None:
    """Return the sparsity of the first sparse phase; None if there is none."""
    return next((phase.sparsity for phase in recipe.phases if phase.kind == "sparse"), None)


def parse_yaml(text: str, where: str) -> dict[str, Any]:
    """Read a YAML mapping as a dict. `where` is the name of the text in messages.

    Raises:
        RecipeError: The text is not YAML or not a mapping, or has a key twice, or an alias.
    """
    if len(text) > LONGEST_RECIPE:
        raise RecipeError(f"{where}: has {len(text):,} characters; a recipe has a few dozen lines")
    try:
        raw = load_recipe_yaml(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RecipeError(f"{where}: not a usable YAML file: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise RecipeError(f"{where}: a recipe is a mapping of fields such as `phases:`; see `dsd-refine recipes show`")
    return raw


def read_recipe(path: Path) -> dict[str, Any]:
    """Return the fields of a recipe file, not validated.

    Relative paths of data are relative to the folder of the file.

    Raises:
        RecipeError: The file cannot be read or is not a YAML mapping.
    """
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(LONGEST_RECIPE + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read: {error}") from None
    raw = parse_yaml(text, str(path))
    raw.setdefault("name", path.stem)
    for key in ("data", "eval_data"):
        beside = path.parent / str(raw.get(key))
        if isinstance(raw.get(key), str) and beside.exists():
            raw[key] = str(beside.resolve())
    return raw


def match_recipe(model_names: list[str], task: str) -> tuple[Path, str]:
    """Return the file of the shipped recipe for a model, and why it was chosen.

    It is the recipe of the task whose `models` globs match a name of the model, else the default of
    the task.
    """
    for path, of_task, globs in _models_of_shipped():
        hit = next((m for m in model_names for glob in globs if fnmatch(m, glob)), None) if of_task == task else None
        if hit:
            return path, f"its models match {hit!r}"
    return find_recipe(task), f"the default of {task}"


@cache
def _models_of_shipped() -> list[tuple[Path, str | None, list[str]]]:
    """Return file, task and globs of models of every shipped recipe, read once in a process."""
    read = {path: read_recipe(path) for path in shipped().values()}
    return [(path, raw.get("task"), raw.get("models") or []) for path, raw in read.items()]


def validate(raw: Mapping[str, Any], where: str = "recipe") -> Recipe:
    """Validate a mapping as a Recipe. `where` is its name in messages.

    Raises:
        RecipeError: There are mistakes. The message lists them, and for an unknown key the nearest
            known one.
    """
    return validated(Recipe, raw, where)


def validated(model: type[Kind], raw: Mapping[str, Any], where: str) -> Kind:
    """Validate a mapping as `model`, with the messages of `validate`.

    Raises:
        RecipeError: There are mistakes. The message lists them.
    """
    try:
        return model.model_validate(dict(raw))
    except ValidationError as error:
        lines = [f"{where}: {line}" for line in _mistakes(error)]
        more = [f"{where}: and {len(lines) - MOST_MISTAKES} more mistakes"] if len(lines) > MOST_MISTAKES else []
        raise RecipeError("\n".join([*lines[:MOST_MISTAKES], *more])) from None


def _mistakes(error: ValidationError) -> Iterator[str]:
    seen = set()
    errors = error.errors()
    for item in errors:
        if _is_echo(item, errors):
            continue
        # pydantic puts the branch of a union ("float", "tuple[...]") into the path. It does not help the reader.
        loc = [str(part) for part in item["loc"] if re.fullmatch(r"\d+|[a-z_]+\w*", str(part)) and part not in _UNIONS]
        place = ".".join(loc)
        if item["type"] == "extra_forbidden":
            line = f"{place}: unknown key{_nearest(item['loc'])}"
        else:
            message = "a list is expected" if item["type"] == "tuple_type" else item["msg"].removeprefix("Value error, ")
            line = f"{place}: {message} (got {item['input']!r:.60})" if place else message
        if line not in seen:
            seen.add(line)
            yield line


_UNIONS = {"float", "int", "str", "tuple"}


def _is_echo(item: Any, errors: list[Any]) -> bool:
    """Return whether an error only repeats another one.

    It may be about the other branch of a union, or about a list that is too short because its items
    are wrong.
    """
    if item["type"] == "too_short":
        return any(other["loc"][: len(item["loc"])] == item["loc"] for other in errors if other is not item)
    is_list = isinstance(item["input"], list | tuple)
    branch = str(item["loc"][-1]) if item["loc"] else ""
    of_union = "[" in branch or branch in _UNIONS
    return of_union and ((item["type"] == "tuple_type" and not is_list) or (item["type"] == "float_type" and is_list))


def _nearest(loc: tuple[int | str, ...]) -> str:
    inner: dict[str, type[Strict]] = {"distill": Distill, "augment": Augment, "phases": Phase, "search": Search}
    owner: type[Strict] = next((model for key, model in inner.items() if key in loc[:-1]), Recipe)
    close = difflib.get_close_matches(str(loc[-1]), owner.model_fields, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(owner.model_fields)}"


def set_field(raw: dict[str, Any], assignment: str) -> None:
    """Apply one `--set a.b=v` in place.

    `v` is read as YAML. Items of lists are named by their number (`phases.0.lr=0.1`).

    Raises:
        RecipeError: The text has no `=`, or a field on the path does not exist.
    """
    path, equals, text = assignment.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise RecipeError(f"--set {assignment}: expected FIELD=VALUE, such as phases.0.lr=0.01")
    put_field(raw, path.strip(), parse_yaml(f"value: {text}", f"--set {assignment}").get("value"), f"--set {assignment}")


def put_field(raw: dict[str, Any], path: str, value: Any, where: str) -> None:
    """Set the field `path`, such as `phases.0.lr`, in place. `where` is its name in messages.

    Raises:
        RecipeError: A field on the path does not exist.
    """
    keys, place = path.split("."), raw
    for key in keys[:-1]:
        place = _item(place, key, where, create=True)
    if isinstance(place, list):
        place[_index(place, keys[-1], where)] = value
    elif isinstance(place, dict):
        place[keys[-1]] = value
    else:
        raise RecipeError(f"{where}: {'.'.join(keys[:-1])} has no fields")


def _item(place: Any, key: str, where: str, create: bool) -> Any:
    if isinstance(place, list):
        return place[_index(place, key, where)]
    if isinstance(place, dict):
        return place.setdefault(key, {}) if create else place[key]
    raise RecipeError(f"{where}: there is no field {key!r}")


def _index(items: list[Any], key: str, where: str) -> int:
    if not key.isdecimal() or int(key) >= len(items):
        raise RecipeError(f"{where}: {key!r} is not a number from 0 to {len(items) - 1}")
    return int(key)


def apply_flags(raw: dict[str, Any], flags: Mapping[str, Any]) -> None:
    """Apply command-line flags in place. Flags for phases apply to every phase of their kind.

    `--lr` without `--dense-lr` sets the dense phases to a tenth of it (paper, section 3).

    Raises:
        RecipeError: Both epochs and steps are given for the same kind of phase.
    """
    flags = {key: value for key, value in flags.items() if value is not None and not (isinstance(value, tuple) and not value)}
    for kind in ("sparse", "dense"):
        if f"{kind}_epochs" in flags and f"{kind}_steps" in flags:
            raise RecipeError(f"--{kind}-epochs and --{kind}-steps: give one of them")
    lr = read_rate(flags.get("lr"))
    # An `lr` that is not a rate is refused by the validation.
    tenth = str(times(lr, 0.1)) if isinstance(lr, AutoRate) else lr / 10 if isinstance(lr, int | float) else None
    dense_lr = flags.get("dense_lr", tenth)
    by_kind: dict[str, dict[str, Any]] = {
        "sparse": {"lr": flags.get("lr"), "sparsity": flags.get("sparsity")},
        "dense": {"lr": dense_lr},
    }
    for kind, fields in by_kind.items():
        fields.update(schedule=flags.get("schedule"), warmup_steps=flags.get("warmup_steps"))
        for unit, other in (("epochs", "steps"), ("steps", "epochs")):
            if f"{kind}_{unit}" in flags:
                fields.update({unit: flags[f"{kind}_{unit}"], other: _REMOVE})
    if "sparsity" in flags:
        raw.pop("sparsities", None)
    phases = raw.get("phases")
    for phase in phases if isinstance(phases, list) else []:
        named = phase.get("kind") if isinstance(phase, dict) else None
        if isinstance(named, str) and named in by_kind:  # the validation refuses other kinds
            _update(phase, by_kind[named])
    if "search" in flags and isinstance(own := raw.get("search"), dict):
        flags["search"] = own | {"tries": flags["search"]}  # the space stays that of the recipe
    plain = set(Recipe.model_fields) - {"phases"}
    raw.update({key: value for key, value in flags.items() if key in plain})


_REMOVE = object()


def _update(phase: dict[str, Any], fields: Mapping[str, Any]) -> None:
    for key, value in fields.items():
        if value is _REMOVE:
            phase.pop(key, None)
        elif value is not None:
            phase[key] = value


def recipes_folder() -> Path:
    """Return the folder of the shipped recipes: in the installed package, or beside it in a checkout."""
    inside = Path(__file__).parent / "recipes"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "recipes"


def shipped() -> dict[str, Path]:
    """Return name -> file of every shipped recipe, sorted by name."""
    return {path.stem: path for path in sorted(recipes_folder().rglob("*.yaml"))}


def find_recipe(name: str) -> Path:
    """Return the file of a recipe that is given by its shipped name or its path.

    Raises:
        RecipeError: There is neither a shipped recipe nor a file of this name.
    """
    known = shipped()
    if name in known:
        return known[name]
    path = Path(name)
    if path.is_file():
        return path
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise RecipeError(f"{hint}no recipe {name!r}: not a file, and not one of {', '.join(known)}")

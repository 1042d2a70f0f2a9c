"""The options of the verbs, in groups, and how `--help` shows them.

This module imports little more than click, so that `--help` is fast.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from dsd_refine.cli.suggest import one_dash, suggestion
from dsd_refine.report.words import GATES
from dsd_refine.task_specs import TASKS

NEAREST_VERB = "dsd_refine.nearest_verb"  # key of click's `ctx.meta`: the verb that the first word may have meant
Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]
GATE_HELP = "; ".join(f"{rule}: {meaning}" for rule, meaning in GATES.items()) + "."


class GroupedOption(click.Option):
    """An option that `--help` shows under the heading `group`."""

    def __init__(self, *names: Any, group: str, **more: Any) -> None:
        super().__init__(*names, **more)
        self.group = group


class GroupedCommand(click.Command):
    """A command that shows its options in groups, and answers an unknown option with the one to use."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options for `--help`, each group under its heading."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and isinstance(parameter, click.Option):
                groups.setdefault(getattr(parameter, "group", "Help"), []).append(record)
        for name, records in groups.items():
            with formatter.section(name):
                formatter.write_dl(records)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the arguments.

        Raises:
            click.UsageError: They are wrong. The message first says what to type instead.
        """
        known = _options(self, ctx)
        if message := one_dash(args, known):
            raise click.UsageError(message, ctx)
        try:
            return super().parse_args(ctx, args)
        except click.UsageError as error:
            raise click.UsageError(_answer(error, ctx, known), ctx) from None


def _answer(error: click.UsageError, ctx: click.Context, known: list[str]) -> str:
    """Return the message for wrong arguments. It begins with a suggestion: of a verb, else of an option."""
    unknown = error.option_name if isinstance(error, click.NoSuchOption) else None
    if verb := ctx.meta.get(NEAREST_VERB):
        return f"did you mean `{verb}`? {f'{unknown}: no such option' if unknown else error.format_message()}"
    return suggestion(unknown, known, _options_elsewhere(ctx)) if unknown else error.format_message()


def _options(command: click.Command, ctx: click.Context) -> list[str]:
    return [name for parameter in command.get_params(ctx) for name in parameter.opts if name.startswith("-")]


def _options_elsewhere(ctx: click.Context) -> dict[str, list[str]]:
    """Return the options of the other verbs, by verb."""
    group = ctx.parent.command if ctx.parent else None
    others = group.commands if isinstance(group, click.Group) else {}
    return {name: _options(other, ctx) for name, other in others.items() if other is not ctx.command}


class Shares(click.ParamType):  # type: ignore[type-arg]
    """The type of --sparsity: one number (`0.3`) or several (`0.25,0.3,0.5`)."""

    name = "S[,S…]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the text as a float, or as a tuple of floats if it has several.

        Raises:
            click.BadParameter: The text has something else than numbers, or a number is out of range.
        """
        try:
            shares = tuple(float(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} is not a number or a list of numbers", param, ctx)
        if not all(0 <= share < 1 for share in shares):
            self.fail(f"{value}: a sparsity is at least 0 and less than 1", param, ctx)
        return shares[0] if len(shares) == 1 else shares


class RateOrAuto(click.ParamType):  # type: ignore[type-arg]
    """The type of --lr: a number, or a text that begins with `auto`, which the recipe reads."""

    name = "X|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the text as a float, or as it is if it begins with `auto`.

        Raises:
            click.BadParameter: The text is neither.
        """
        if isinstance(value, str) and value.startswith("auto"):
            return value
        return click.FLOAT.convert(value, param, ctx)


def in_group(name: str, *options: tuple[tuple[str, ...], dict[str, Any]]) -> Decorator:
    """Return a decorator that adds options to a command, under the heading `name`, in this order."""

    def apply(function: Callable[..., Any]) -> Callable[..., Any]:
        for names, more in reversed(options):
            function = click.option(*names, cls=GroupedOption, group=name, **more)(function)
        return function

    return apply


def option(*names: str, **more: Any) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Return an option for `in_group`, from the arguments of `click.option`."""
    return names, more


def together(*decorators: Decorator) -> Decorator:
    """Return one decorator that applies several. The first is the outermost one."""

    def apply(function: Callable[..., Any]) -> Callable[..., Any]:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return apply


RECIPE_OPTIONS = together(
    in_group(
        "Data",
        option("--data", metavar="D", help="Hub data set, directory or file to train on."),
        option("--eval-data", metavar="D", help="A file or directory used for evaluation only."),
        option("--eval-split", metavar="NAME", help="The split of the data that evaluates."),
        option("--holdout-split", metavar="NAME", help="The split of --data that selects."),
        option("--holdout", type=float, metavar="F", help="Share of the training rows that selects (0.1)."),
        option("--image-column", metavar="NAME", help="The column of pictures (found by its name)."),
        option("--label-column", metavar="NAME", help="The column of labels (found by its name)."),
        option("--text-column", metavar="NAME", help="The column of texts, or two, as A,B (found by its name)."),
        option("--audio-column", metavar="NAME", help="The column of sounds (found by its name)."),
        option("--max-length", type=int, metavar="N", help="Most tokens of a text, or of a window of one (the model's)."),
        option("--documents", type=click.Choice(["paragraphs", "lines", "file"]),
               help="What is a document in a .txt file (paragraphs)."),
        option("--stride", type=int, metavar="N", help="Evaluate texts in windows that begin N tokens apart."),
        option("--encoding", metavar="E", help="Of text files that are not UTF-8: latin-1, cp1252, utf-16, …"),
    ),
    in_group(
        "Recipe and task",
        option("--recipe", metavar="NAME|FILE", help="Shipped name or file (what matches model or task)."),
        option("--set", "sets", metavar="A.B=V", multiple=True, help="Override one recipe field; repeatable."),
        option("--task", metavar="T", help=f"{', '.join(TASKS)} (inferred from the model's config)."),
    ),
    in_group(
        "Sparsity and phases",
        option("--sparsity", type=Shares(), help="Share of zeros per layer; of several, the holdout picks (recipe; 0.3)."),
        option("--sparse-epochs", type=float, metavar="X", help="Length of the sparse phases; 0 masks only (recipe)."),
        option("--dense-epochs", type=float, metavar="X", help="Length of the dense phases; 0 is allowed (recipe)."),
        option("--sparse-steps", type=int, metavar="N", help="Length of the sparse phases in optimizer steps."),
        option("--dense-steps", type=int, metavar="N", help="Length of the dense phases in optimizer steps."),
        option("--include", metavar="GLOB", multiple=True, help="Parameters to mask besides the default set."),
        option("--exclude", metavar="GLOB", multiple=True, help="Parameters not to mask; wins."),
        option("--search", type=int, metavar="N", help="Try N settings in each arm; the holdout chooses (off)."),
        option("--keep", type=click.Choice(["best", "last", "sparse"]),
               help="The result: the epoch that the holdout prefers, the last one, the sparse phase (best)."),
    ),
    in_group(
        "Optimizer",
        option("--lr", type=RateOrAuto(), metavar="X|auto",
               help="Peak rate of the sparse phases; auto tests it on the source, and auto*0.3 is a part of that (recipe)."),
        option("--dense-lr", type=RateOrAuto(), metavar="X|auto", help="Peak rate of the dense phases (a tenth of --lr)."),
        option("--schedule", type=click.Choice(["cosine", "linear", "constant", "step"]), help="How the rate falls (recipe)."),
        option("--warmup-steps", type=int, metavar="N", help="Steps of each phase in which the rate rises (recipe; 0)."),
        option("--optimizer", type=click.Choice(["sgd", "adamw"]), help="SGD without Nesterov, or AdamW (recipe)."),
        option("--momentum", type=float, metavar="X", help="Of SGD (recipe; 0.9)."),
        option("--weight-decay", type=float, metavar="X", help="Of weights of two and more dimensions (recipe)."),
        option("--batch-size", type=int, metavar="N", help="Rows of a batch, per process (recipe; 32)."),
        option("--eval-batch-size", type=int, metavar="N", help="Rows of a batch in evaluation, per process (--batch-size; on "
               "a GPU more, as its memory allows)."),
        option("--gradient-accumulation-steps", type=int, metavar="N", help="Batches of an optimizer step (1)."),
        option("--max-grad-norm", type=float, metavar="X", help="Clip the norm over all gradients (off)."),
        option("--patience", type=int, metavar="N", help="Stop a try that is worse than the source on the holdout, beyond its "
               "noise, N times in a row while the rate falls (off)."),
    ),
    in_group(
        "Arms and judgement",
        option("--control", type=click.Choice(["dense", "random", "none"]), multiple=True, help="Same-budget arms (dense)."),
        option("--gate", type=click.Choice(list(GATES)), help="What exit code 0 requires (not-worse). " + GATE_HELP),
        option("--margin", type=float, metavar="M", help="What counts as the same (0.005)."),
        option("--publish", type=click.Choice(["refined", "best"]),
               help="Whose weights the output has: the refined arm's, or of all arms and the source those that the holdout "
               "prefers (refined)."),
        option("--seed", type=int, metavar="N", help="Of order, augmentation, dropout and random masks (0)."),
        option("--seeds", type=int, metavar="N", help="Repeat every arm with this many seeds; the holdout picks (1)."),
        option("--expect", multiple=True, metavar="METRIC=VALUE", help="Stop unless the source reaches this."),
    ),
)  # fmt: skip

RUN_OPTIONS = together(
    in_group(
        "Output and resume",
        option("--output-dir", "-o", metavar="DIR", help="Where the result goes (./NAME-dsd)."),
        option("--resume", is_flag=True, help="Go on with a stopped run."),
        option("--overwrite", is_flag=True, help="Replace an output of ours."),
        option("--save-every", type=click.FloatRange(min=0), default=10, metavar="MINUTES", help="Save within phases (10)."),
        option("--cache-gb", type=click.FloatRange(min=0), metavar="GB",
               help="Most disk space for decoded pictures or sounds, which saves time (a quarter of what is free)."),
        option("--save-phases", is_flag=True, help="Also write each phase's end of the refined arm."),
        option("--report-images", type=click.IntRange(0, 100), default=0, metavar="N",
               help="report.html shows N rows gained and N lost with their content (0)."),
        option("--quiet", is_flag=True, help="No progress; the result alone."),
    ),
    in_group(
        "Results for CI and trackers",
        option("--summary", metavar="FILE", help="Also write the result as Markdown."),
        option("--junit", metavar="FILE", help="Also write the result as JUnit XML: the gate is a test case."),
        option("--report-to", default="", metavar="NAME[,NAME]",
               help="Log losses, rates, holdout and results: tensorboard, wandb, mlflow, trackio."),
    ),
    in_group(
        "Device",
        option("--device", type=click.Choice(["auto", "cpu", "cuda", "mps"]), default="auto", help="Where to train (auto)."),
        option("--mixed-precision", type=click.Choice(["no", "fp16", "bf16"]), help="For training (accelerate's own setting)."),
        option("--compile", is_flag=True, help="torch.compile the training forward."),
        option("--shard", is_flag=True, help="Divide the model among the processes (FSDP2); for models too large for one GPU."),
        option("--activation-checkpointing", is_flag=True, help="Compute activations twice in place of storing them."),
        option("--cpu-offload", is_flag=True, help="With --shard: keep weights and optimizer state in the host's memory."),
        option("--spread", type=click.Choice(["tries"]), help="Under a launcher: each process trains whole tries."),
        option("--workers", type=click.IntRange(min=0), metavar="N", help="Processes that load data (0 on a CPU)."),
    ),
)  # fmt: skip

TRUST_OPTIONS = in_group(
    "Trust and downloads",
    option("--trust-remote-code", is_flag=True, help="Run code that the model brings along."),
    option("--allow-pickle", is_flag=True, help="Read .bin/.pth weights, weights-only even so."),
    option("--weights-key", metavar="KEY", help="Which of a pickle's sets of weights (timm's choice: EMA first)."),
)
YES_OPTION = in_group("Trust and downloads", option("--yes", is_flag=True, help="Agree to large downloads."))
JSON_OPTION = in_group("Output and resume", option("--json", "as_json", is_flag=True, help="Print JSON instead of text."))
PUSH_OPTIONS = together(
    in_group(
        "Push",
        option("--create-pr/--no-create-pr", default=None,
               help="Open a pull request, or commit directly (a pull request where the repository holds weights)."),
        option("--dry-run", is_flag=True, help="Send nothing; print what would be sent."),
        option("--force", is_flag=True, help="Push although the gate, `verify` or the repository says no."),
        option("--with-rows", is_flag=True, help="Also send the files that hold evaluation rows."),
        option("--public", is_flag=True, help="Make a new repository public (it is private)."),
        option("--source", metavar="MODEL", help="The source, if it is no longer where the report says."),
    ),
)  # fmt: skip
QUIET_OPTION = in_group("Output and resume", option("--quiet", is_flag=True, help="The result alone (there is nothing else)."))
MEASURE_OPTION = in_group(
    "Plan",
    option("--measure", is_flag=True, help="Train a few real steps, for memory and time; needs the weights and the data."),
    option("--layers", is_flag=True, help="Show every layer with its masked weights, or why it has none."),
)

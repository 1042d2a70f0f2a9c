"""The command: it turns arguments into a recipe, and errors into exit codes.

A heavy library is imported only when a verb needs it.
"""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import click

from dsd_refine import __version__
from dsd_refine.cli.options import (
    JSON_OPTION,
    MEASURE_OPTION,
    NEAREST_VERB,
    PUSH_OPTIONS,
    QUIET_OPTION,
    RECIPE_OPTIONS,
    RUN_OPTIONS,
    TRUST_OPTIONS,
    YES_OPTION,
    GroupedCommand,
)
from dsd_refine.cli.outcome import WriteOutcome, outcome_files
from dsd_refine.cli.streams import fill_streams
from dsd_refine.cli.suggest import nearest, nearest_verb
from dsd_refine.errors import AgreedError, CheckpointError, DsdError, Interrupted, RunError, UsageError, is_full_memory
from dsd_refine.quiet import quiet_libraries
from dsd_refine.run.signals import Signals
from dsd_refine.task_specs import TASKS, unknown_task

BUG = 1
# Libraries shall print only errors, show no progress bars and send nothing. They read these variables
# when they are imported.
ENVIRONMENT = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DISABLE_TELEMETRY": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "DATASETS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}


class DefaultRun(click.Group):
    """A group whose default verb is `run`: `dsd-refine resnet50 …` is `dsd-refine run resnet50 …`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Insert the verb `run` if the first argument is not a verb.

        It may be a misspelled verb. Then the nearest verb is stored in `ctx.meta`, for the message of
        a later error.
        """
        if args and args[0] not in self.commands and args[0] not in ("--help", "-h", "--version"):
            if args[0] == "merge" and not Path("merge").exists():
                from dsd_refine.checkpoint.copies import MERGE

                raise click.UsageError(f"merge is no verb here: peft merges an adapter into its base, {MERGE}", ctx)
            ctx.meta[NEAREST_VERB] = nearest_verb(args[0], [*self.commands])
            args = ["run", *args]
        return super().parse_args(ctx, args)


@click.group(cls=DefaultRun, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="dsd-refine")
def cli() -> None:
    """Refine a released checkpoint by Dense-Sparse-Dense training, beside a control of the same budget.

    MODEL is a timm name, a Hub repository or a local directory. The result has the source's files, names and
    shapes, and a report that says whether it is better, and what made it so.

    \b
    Examples:
      dsd-refine resnet50 --data imgs/ --sparsity 0.3      refine, the default verb
      dsd-refine plan org/model --data org/dataset         what a run would do and cost
      dsd-refine verify resnet50 resnet50-dsd              the same-shape proof of an output

    `dsd-refine run --help` lists the options of a run.
    """


@cli.command(cls=GroupedCommand, short_help="Refine MODEL, write checkpoint and report (the default verb).")
@click.argument("model")
@RECIPE_OPTIONS
@RUN_OPTIONS
@TRUST_OPTIONS
@YES_OPTION
@JSON_OPTION
def run(model: str, **given: Any) -> int:
    """Refine MODEL and write a same-shape checkpoint with its report (the default verb)."""
    from dsd_refine.run.progress import Display

    _check_task(given)
    display = Display(quiet=given["quiet"] or not _is_main())
    with outcome_files(given["summary"], given["junit"], writes=_is_main()) as write_outcome:
        if given["output_dir"] and _finished(Path(given["output_dir"]), given, display, write_outcome):
            return 0
        prepared = _prepared(model, given, display, write_outcome)
        if prepared is None:
            return 0
        from dsd_refine.method import refine

        tracking, *arguments = prepared
        with display, tracking:
            report = refine(*arguments)
        if _is_main():
            from dsd_refine.report.report import summary

            write_outcome(report.data)
            _result(report.to_json().rstrip("\n") if given["as_json"] else summary(report))
        return report.exit_code if _is_main() else 0


def _prepared(model: str, given: dict[str, Any], display: Any, write_outcome: WriteOutcome) -> tuple[Any, ...] | None:
    """Return the trackers and the arguments of `refine`, or None if --resume finds a finished run in the default folder."""
    quiet_libraries()
    from dsd_refine.checkpoint.libraries.open import open_library
    from dsd_refine.checkpoint.source import find_source
    from dsd_refine.choice import choose_recipe
    from dsd_refine.run.run import PASSED_ON, Options, default_workers
    from dsd_refine.run.tracking import Tracking, check_trackers, settings_of

    trackers = check_trackers(name.strip() for name in given["report_to"].split(",") if name.strip())
    try:
        source = find_source(model, allow_pickle=given["allow_pickle"])
    except DsdError as error:
        verb = click.get_current_context().meta.get(NEAREST_VERB)
        raise type(error)(f"did you mean `{verb}`? {error}") if verb else error from None
    library = open_library(source, given["task"], given["trust_remote_code"])
    out = Path(given["output_dir"] or f"{Path(source.resolved).name}-dsd")
    if not given["output_dir"] and _finished(out, given, display, write_outcome):
        return None
    recipe = choose_recipe(library, given, display.say)
    config = settings_of(model, recipe.model_dump(), out) if trackers else {}
    tracking = Tracking(trackers, out.name, config, display.say)
    options = Options(
        output_dir=out,
        argv=tuple(sys.argv[1:]),
        say=display.say,
        hooks=(display, *([tracking] if trackers else [])),
        download=_asker(given["yes"]),
        workers=default_workers(given["workers"]),
        **{name: given[name] for name in PASSED_ON},
    )
    return tracking, source, library, recipe, options


@cli.command(cls=GroupedCommand)
@click.argument("model")
@RECIPE_OPTIONS
@MEASURE_OPTION
@RUN_OPTIONS
@TRUST_OPTIONS
@YES_OPTION
@JSON_OPTION
def plan(model: str, **given: Any) -> int:
    """Show what a run would do: weights, steps, memory, disk. Fetches no weights, trains nothing.

    It takes the options of `run`, so that a command becomes its plan by one word.
    """
    import json

    _check_task(given)
    quiet_libraries()
    from dsd_refine.checkpoint.libraries.open import open_library
    from dsd_refine.checkpoint.source import find_source
    from dsd_refine.choice import choose_recipe
    from dsd_refine.planning.plan import make_plan
    from dsd_refine.planning.text import plan_text
    from dsd_refine.run.progress import Display

    source = find_source(model, weights=given["measure"], allow_pickle=given["allow_pickle"])
    library = open_library(source, given["task"], given["trust_remote_code"])
    recipe = choose_recipe(library, given, Display(quiet=not _is_main()).say)
    planned = make_plan(source, library, recipe, allow_pickle=given["allow_pickle"], shard=given["shard"])
    if given["measure"]:
        from dsd_refine.planning.measure import HOW, add_measured, measure
        from dsd_refine.run.run import Options

        options = Options(output_dir=Path(given["output_dir"] or "measured"), **{name: given[name] for name in HOW})
        planned = add_measured(planned, measure(source, library, recipe, options))
    if _is_main():
        as_json = given["as_json"]
        _result(json.dumps(planned, indent=1, ensure_ascii=False) if as_json else plan_text(planned, layers=given["layers"]))
    return 0


@cli.command(cls=GroupedCommand, short_help="Prove that OUTPUT has SOURCE's shape.")
@click.argument("source")
@click.argument("output")
@TRUST_OPTIONS
@JSON_OPTION
@QUIET_OPTION
def verify(
    source: str,
    output: str,
    trust_remote_code: bool,
    allow_pickle: bool,
    weights_key: str | None,
    as_json: bool,
    quiet: bool,
) -> int:
    """Prove that OUTPUT has SOURCE's shape, and that its report's hashes and outputs hold."""
    import json

    from dsd_refine.api import verify as problems_of
    from dsd_refine.checkpoint.verify import report_lines

    problems = problems_of(
        source, output, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle, weights_key=weights_key
    )
    _result(json.dumps({"ok": not problems, "problems": problems}) if as_json else report_lines(problems, Path(output)))
    return 3 if problems else 0


@cli.command(cls=GroupedCommand, short_help="Push OUTPUT to REPO on the Hub, if it is proven.")
@click.argument("output")
@click.argument("repo")
@PUSH_OPTIONS
@TRUST_OPTIONS
@JSON_OPTION
@QUIET_OPTION
def push(
    output: str,
    repo: str,
    source: str | None,
    trust_remote_code: bool,
    allow_pickle: bool,
    weights_key: str | None,
    as_json: bool,
    quiet: bool,
    **wishes: Any,
) -> int:
    """Push OUTPUT to the repository REPO on the Hub, as one commit or as a pull request.

    It is refused if the gate was not met, if `verify` finds a problem, or if the weights of REPO are
    no longer those that the run started from.
    """
    import json

    from dsd_refine.api import verify as problems_of
    from dsd_refine.release.push import Wishes, pushed_text, readable
    from dsd_refine.release.push import push as push_output
    from dsd_refine.report.report import Report
    from dsd_refine.run.progress import Display

    report = Report.load(output)
    trusted: dict[str, Any] = {"trust_remote_code": trust_remote_code, "allow_pickle": allow_pickle, "weights_key": weights_key}
    with readable(report):
        source_model = source or report.source_model
    try:
        problems = problems_of(source_model, output, **trusted)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; --source MODEL says where the run's source is now") from None
    pushed = push_output(report, repo, problems, Wishes(**wishes), Display(quiet).say)
    _result(json.dumps(pushed.to_dict(), ensure_ascii=False) if as_json else pushed_text(pushed))
    return 0


class Recipes(click.Group):
    """The verbs `recipes` and `recipes show NAME`. For `recipes NAME` it suggests the second."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the verb below `recipes`.

        Raises:
            click.UsageError: There is no such verb. The message says what to type instead.
        """
        if args[0] not in self.commands:
            close = nearest(args[0], [*self.commands])
            raise click.UsageError(f"did you mean `recipes {close or f'show {args[0]}'}`?", ctx)
        return super().resolve_command(ctx, args)


@cli.group(cls=Recipes, invoke_without_command=True)
@click.pass_context
def recipes(context: click.Context) -> None:
    """List the shipped recipes, or `show` one."""
    if context.invoked_subcommand is None:
        from dsd_refine.recipe import shipped

        known = shipped()
        width = max(map(len, known))
        for title, names in _groups_of_recipes(known).items():
            _result(f"{title}:")
            for name in names:
                first = known[name].read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
                _result(f"  {name.ljust(width)}  {first}")


def _groups_of_recipes(known: dict[str, Path]) -> dict[str, list[str]]:
    """Defaults of the tasks, models of the paper, other models with the demo, and the methods that DSD is compared with."""
    titles = {"paper": "Models of the paper", "methods": "Methods"}
    groups: dict[str, list[str]] = {
        title: [] for title in ("Defaults of the tasks", "Models of the paper", "Other models", "Methods")
    }
    for name, path in known.items():
        title = "Defaults of the tasks" if name in TASKS else titles.get(path.parent.name, "Other models")
        groups[title].append(name)
    return groups


@recipes.command()
@click.argument("name")
def show(name: str) -> None:
    """Print a shipped recipe."""
    from dsd_refine.recipe import find_recipe

    _result(find_recipe(name).read_text(encoding="utf-8").rstrip("\n"))


def _check_task(given: dict[str, Any]) -> None:
    if given["task"] not in (None, *TASKS):
        said, close = unknown_task(given["task"]), nearest(given["task"], [*TASKS])
        hint = f"did you mean {close}? " if close and said.startswith("not a task") else ""
        raise UsageError(f"{hint}--task {given['task']}: {said}")


def _finished(out: Path, given: dict[str, Any], display: Any, write_outcome: WriteOutcome) -> bool:
    """Return whether --resume is given for a finished run. Then say so; nothing is changed."""
    report = out / "dsd/report.json"
    if not given["resume"] or not report.is_file():
        return False
    note = f"{out}: this run is finished already; there is nothing to resume"
    if out.with_name(out.name + ".partial").is_dir():
        from dsd_refine.run.workspace import Workspace

        if not Workspace(out, writes=_is_main()).settle():
            if given["overwrite"]:
                return False
            note += f". {out}.partial has an unfinished run that will replace it: go on with --resume --overwrite"
    display.say(note)
    if given["summary"] or given["junit"]:
        from dsd_refine.report.report import Report

        write_outcome(Report.load(out).data)
    if given["as_json"] and _is_main():
        _result(report.read_text(encoding="utf-8").rstrip("\n"))
    return True


def _asker(yes: bool) -> Callable[[str, int], bool]:
    """Return a function that asks the user whether to download `size` bytes.

    With --yes it answers yes, and without a terminal no, without asking.
    """

    def ask(name: str, size: int) -> bool:
        if yes or not (sys.stdin and sys.stdin.isatty() and sys.stderr.isatty()):
            return yes
        return click.confirm(f"{name}: {size / 1e9:.0f} GB to download. Go on?", err=True)

    return ask


def _is_main() -> bool:
    """Return whether this is the main process of the run, by the variable that launchers set."""
    return os.environ.get("RANK", "0") == "0"


_STDOUT: list[TextIO] = []


def _result(text: str) -> None:
    """Write the result to the real stdout. All other output goes to stderr, also that of libraries."""
    out = _STDOUT[-1] if _STDOUT else sys.stdout
    encoding = out.encoding or "utf-8"  # names in files may have characters that this encoding does not have
    out.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")
    out.flush()


def main(args: list[str] | None = None) -> None:
    """Run the command, and end the process with its exit code.

    Args:
        args: The arguments. None: those of the process.

    Raises:
        SystemExit: Always, with the exit code.
    """
    fill_streams()
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    _STDOUT.append(sys.stdout)
    sys.stdout = sys.stderr if args is None and not _shows_help() else sys.stdout
    code, message = _guarded(args)
    if message and (_is_main() or code in (BUG, RunError.exit_code)):
        click.echo(message, err=True)
    if code and "WORLD_SIZE" in os.environ and _is_main():
        click.echo(f"dsd-refine: exit code {code}", err=True)  # launchers end with an exit code of their own
    sys.stdout = _STDOUT.pop()
    sys.exit(code)


def _shows_help() -> bool:
    return any(flag in sys.argv[1:] for flag in ("--help", "-h", "--version")) or len(sys.argv) < 2


def _lost_another(error: Exception) -> bool:
    """Return whether an error only says that another process of the run has ended.

    It is known by the type of the error (NCCL and the store) or by its text (gloo).
    """
    distributed = type(error).__name__ in ("DistBackendError", "DistNetworkError", "DistStoreError")
    return "WORLD_SIZE" in os.environ and (distributed or "gloo" in str(error))


def _guarded(args: list[str] | None) -> tuple[int, str]:
    """Run the command. Return its exit code, and the message if it failed."""
    try:
        with Signals():
            return int(cli.main(args, prog_name="dsd-refine", standalone_mode=False) or 0), ""
    except click.exceptions.NoArgsIsHelpError as error:
        return UsageError.exit_code, error.format_message()
    except click.ClickException as error:
        return UsageError.exit_code, f"Error: {error.format_message()}"
    except click.Abort:
        return Interrupted.exit_code, "Error: stopped before the first step; nothing was lost"
    except DsdError as error:
        return error.exit_code, f"Error: {error}" if _is_main() or not isinstance(error, AgreedError) else ""
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG):
            return (
                RunError.exit_code,
                f"Error: {error.filename or 'disk'}: {error.strerror}; correct this, then go on with --resume",
            )
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            return UsageError.exit_code, f"Error: {error.filename!s:.200}: {error.strerror}"
        return BUG, traceback.format_exc()
    except Exception as error:
        if is_full_memory(error):
            return RunError.exit_code, "Error: out of memory; try a smaller --batch-size with --gradient-accumulation-steps"
        if _lost_another(error):
            return RunError.exit_code, "Error: another process of this run has ended; see its message, then go on with --resume"
        return BUG, traceback.format_exc()

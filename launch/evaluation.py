"""What `riverrun eval` does around its tasks: one or several by their names, on one or several ranks.

A task is a sub-command with an option --model.
"""

import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from riverrun.launch import console

NOT_FINITE = 1  # exit status
PATIENCE = 7 * 24 * 60.0  # minutes that ranks wait for one another: one may have much more to read than the others


def results_folder(model: str, *parts: str, num_steps: int | None = None) -> Path:
    """Where results go without --out: in the run, or in the working directory; those of a depth in a folder of it."""
    depth = () if num_steps is None else (f"r{num_steps}",)
    return Path(model if (Path(model) / "checkpoints").is_dir() else ".", "eval", *parts, *depth)


class Tasks(TyperGroup):
    """Sub-commands of which several can be named, with commas between them."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        if args[0].startswith("-") or (args[0] in self.commands and not _is_task(self.commands[args[0]])):
            return super().resolve_command(ctx, args)
        tasks = {name: command for name, command in self.commands.items() if _is_task(command)}
        names = [name.strip() for name in args[0].split(",")]
        for name in names:
            if name not in tasks:
                near = get_close_matches(name, self.commands, 1)
                hint = f", did you mean {near[0]}?" if near else ":"
                others = ", ".join(name for name in self.commands if name not in tasks)
                raise ValueError(
                    f"there is no task {name!r}{hint} choose among {', '.join(tasks)} (commas between several)"
                    + (f"; the other commands are {others}" if others else "")
                )
        if len(set(names)) < len(names):
            raise ValueError(f"{args[0]}: name each task once")
        return args[0], Evaluation(args[0], {name: tasks[name] for name in names}), args[1:]


class Evaluation(TyperCommand):
    """One or several tasks, with the options of all of them."""

    def __init__(self, name: str, tasks: dict[str, Any]):
        super().__init__(name)
        self.tasks = tasks

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """Reads the options: those of a single task as if there were no others."""
        context = typer.Context(self, parent, info_name)
        base = None
        if len(self.tasks) == 1:
            options = dict.fromkeys(self.tasks, args)
        elif {"-h", "--help"} & set(args):
            for name, command in self.tasks.items():
                print(command.make_context(name, [], parent=parent, resilient_parsing=True).get_help())
            raise typer.Exit
        else:
            options, base = share_out(args, self.tasks)
        contexts = [command.make_context(name, options[name], parent=parent) for name, command in self.tasks.items()]
        context.obj = contexts, base
        return context

    def invoke(self, ctx: Any) -> None:
        contexts, base = ctx.obj
        written = run(contexts, ctx.parent.params.get("overwrite", False))
        if written and base is not None:
            written.append(_report_together(base, written))
        if written and (bad := written[-1][1].get("non_finite")):
            console.print_error(f"not finite: {', '.join(bad)}; see {written[-1][0]}")
            raise typer.Exit(NOT_FINITE)


def run(contexts: Sequence[Any], overwrite: bool) -> list[tuple[Path, dict[str, Any]]]:
    """Runs the tasks; path and contents of their results, none on other ranks than the first."""
    import random

    import numpy as np
    import torch

    from riverrun.eval import harness, models, samples

    with ExitStack() as stack:
        stack.enter_context(_joined({context.params.get("device") for context in contexts}))
        stack.enter_context(models.sharing_models())
        written = stack.enter_context(harness.recording(shlex.join(["riverrun", *sys.argv[1:]])))
        if overwrite:
            stack.enter_context(samples.overwriting())
        for context in contexts:
            seed = context.params.get("seed") or 0
            random.seed(seed)
            np.random.seed(seed)  # noqa: NPY002 - what libraries draw from, if any do
            torch.manual_seed(seed)
            try:
                with context:
                    context.command.invoke(context)
            except harness.ReportedElsewhere:
                pass
            except ValueError as error:
                if len(contexts) == 1:
                    raise
                raise ValueError(f"{context.info_name}: {error}") from error
        return written


def share_out(args: Sequence[str], tasks: dict[str, Any]) -> tuple[dict[str, list[str]], Path]:
    """The arguments of each task: the options that it has, --out being a folder of its own below the second result.

    Raises:
        ValueError: an option that no task has or that they read differently, a missing one, or what is no option.
    """
    found: dict[str, list[str]] = {name: [] for name in tasks}
    given, model = None, None
    rest = list(args)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise ValueError(f"{word!r} is not an option: several tasks are named with commas between them")
        option, equals, value = word.partition("=")
        takers = {name: o for name, command in tasks.items() if (o := _option(command, option)) is not None}
        if not takers:
            near = get_close_matches(option, {o for command in tasks.values() for o in _options(command)}, 1)
            hint = f", did you mean {near[0]}?" if near else f": `riverrun eval {','.join(tasks)} --help` lists them"
            raise ValueError(f"none of {', '.join(tasks)} has an option {option}{hint}")
        if len({o.is_flag for o in takers.values()}) > 1:
            raise ValueError(f"{option} means something else in each of {', '.join(takers)}: evaluate them one by one")
        words = [word]
        if not next(iter(takers.values())).is_flag:
            if not equals:
                if not rest:
                    raise ValueError(f"{option} needs a value")
                value = rest.pop(0)
            if option == "--out":
                given = value
                continue
            model = value if option == "--model" else model
            words = [option, value]
        for name in takers:
            found[name] += words
    missing = {
        name: [o.opts[0] for o in command.params if o.required and not set(o.opts) & set(found[name])]
        for name, command in tasks.items()
    }
    if any(missing.values()):
        raise ValueError("; ".join(f"{name} needs {', '.join(some)}" for name, some in missing.items() if some))
    base = results_folder(str(model)) if given is None else Path(given)
    for name, command in tasks.items():
        if _option(command, "--out") is not None:
            found[name] += ["--out", str(base / name)]
    return found, base


def _report_together(base: Path, written: Sequence[tuple[Path, dict[str, Any]]]) -> tuple[Path, dict[str, Any]]:
    """Writes and shows the results of all tasks as one."""
    from rich.text import Text

    from riverrun.eval.harness import merge, write_document
    from riverrun.eval.report import summary_table

    document = merge({os.path.relpath(path.parent, base): document for path, document in written})
    path = write_document(base, document)
    console.out.print(summary_table(document))
    console.out.print(Text(f"{path}, and a folder for each of {', '.join(document['merged'])}"), soft_wrap=True)
    return path, document


@contextmanager
def _joined(devices: set[str | None]) -> Iterator[None]:
    """Among the ranks that torchrun started, if it did; the first one alone prints.

    Raises:
        ValueError: fewer GPUs than ranks.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world_size == 1:
        yield
        return
    import torch

    from riverrun.train import distributed

    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if devices != {"cpu"} and torch.cuda.is_available():
        torch.cuda.set_device(distributed.resolve_device("cuda", local_rank))
    distributed.start("cpu", rank, world_size, local_rank, PATIENCE)
    quiet = console.out.quiet, console.err.quiet
    console.out.quiet = console.err.quiet = rank > 0
    try:
        yield
    finally:
        console.out.quiet, console.err.quiet = quiet
        distributed.stop()


def _is_task(command: Any) -> bool:
    return "--model" in _options(command)


def _options(command: Any) -> list[str]:
    return [name for option in command.params for name in (*option.opts, *option.secondary_opts)]


def _option(command: Any, name: str) -> Any:
    return next((o for o in command.params if name in (*o.opts, *o.secondary_opts)), None)

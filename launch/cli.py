"""`riverrun`: the command line. Sub-commands live in `launch/commands/`, one file each."""

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from riverrun import __version__
from riverrun.launch import console
from riverrun.launch.commands import (
    bench,
    bench_checkpoint,
    bench_context,
    bench_samplers,
    cola,
    compare,
    config,
    data,
    doctor,
    export,
    generate,
    jrt,
    launch,
    length,
    plan,
    quickstart,
    recipes,
    repetition,
    report,
    reshard,
    retrofit,
    status,
    stop,
    study,
    train,
)
from riverrun.launch.commands import eval as evaluation

USER_ERROR, INTERRUPTED = 2, 130


class Shell(TyperGroup):
    """Turns errors that the user can mend into a short message and an exit code. Defects keep their traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            if console.traceback_wanted():
                raise
            console.print_error("interrupted")
            raise typer.Exit(INTERRUPTED) from None
        except (ValueError, OSError) as error:
            message = console.user_message(error)
            if message is None or console.traceback_wanted():
                raise
            console.print_error(message)
            raise typer.Exit(USER_ERROR) from None


app = typer.Typer(
    cls=Shell,
    name="riverrun",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Environment: RIVERRUN_TRACEBACK=1 shows where an error was raised.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"riverrun {__version__}")
        raise typer.Exit


@app.callback()
def riverrun(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Pretrain recurrent and hybrid language models: ParaRNN, Mamba-2, gated DeltaProduct, attention.

    A run starts from a recipe: [bold]riverrun recipes[/bold] lists them, [bold]riverrun config NAME[/bold] shows one.
    """


TRAINING, MODELS, MACHINE = "Recipes and training", "Trained models", "This machine"
app.command("recipes", rich_help_panel=TRAINING)(recipes.recipes)
app.command("config", rich_help_panel=TRAINING)(config.config)
app.add_typer(data.app, name="data", rich_help_panel=TRAINING)
app.command("plan", rich_help_panel=TRAINING)(plan.plan)
app.command("train", rich_help_panel=TRAINING)(train.train)
app.command("launch", rich_help_panel=TRAINING)(launch.launch)
app.command("status", rich_help_panel=TRAINING)(status.status)
app.command("stop", rich_help_panel=TRAINING)(stop.stop)
evaluation.app.command("length")(length.length)
evaluation.app.command("needle")(length.needle)
evaluation.app.command("compare")(compare.compare)
evaluation.app.command("repetition")(repetition.repetition)
evaluation.app.command("jrt")(jrt.jrt)
evaluation.app.command("cola")(cola.cola)
app.add_typer(evaluation.app, name="eval", rich_help_panel=MODELS)
app.command("study", rich_help_panel=MODELS)(study.study)
app.command("report", rich_help_panel=MODELS)(report.report)
app.command("generate", rich_help_panel=MODELS)(generate.generate)
app.command("reshard", rich_help_panel=MODELS)(reshard.reshard)
app.command("retrofit", rich_help_panel=MODELS)(retrofit.retrofit)
app.command("export", rich_help_panel=MODELS)(export.export)
app.command("import", rich_help_panel=MODELS)(export.import_)
app.command("doctor", rich_help_panel=MACHINE)(doctor.doctor)
app.command("bench", rich_help_panel=MACHINE)(bench.bench)
app.command("bench-checkpoint", rich_help_panel=MACHINE)(bench_checkpoint.bench_checkpoint)
app.command("bench-context", rich_help_panel=MACHINE)(bench_context.bench_context)
app.command("bench-samplers", rich_help_panel=MACHINE)(bench_samplers.bench_samplers)
app.command("quickstart", rich_help_panel=MACHINE)(quickstart.quickstart)


def main() -> None:
    app(prog_name="riverrun")


if __name__ == "__main__":
    main()

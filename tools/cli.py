"""The command line.

A command is loaded when it is called: help, version and completion of names answer before torch is
loaded.

Exit codes: 0 done, 1 the job failed, 2 the request was wrong and nothing was begun, 3 a dry run
    found that the run would be refused, 70 a fault of secateur itself, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.main import get_command

import secateur

INTERRUPTED = 130
COMMANDS: dict[str, tuple[str, str, str]] = {
    "bench": ("bench", "bench_command", "Measure speed, size and memory of models side by side."),
    "compress": (
        "compress",
        "compress_command",
        "Run a pipeline of passes on a model and write a stock checkpoint.",
    ),
    "demo": ("demo", "demo_command", "Compress a real model, and measure before and after."),
    "evaluate": (
        "evaluate",
        "evaluate_command",
        "Perplexity, distance from a reference model, and tasks, with intervals.",
    ),
    "generate": ("generate", "generate_command", "Go on from a prompt."),
    "inspect": (
        "inspect",
        "inspect_command",
        "What a model consists of: sizes, and what may be pruned.",
    ),
    "package": ("generate", "package_command", "Compile a model ahead of time for this machine."),
    "passes": ("listing", "passes_command", "The passes and importances, with their options."),
    "recipes": ("listing", "recipes_command", "The recipes that --recipe knows by name."),
    "verify": ("verify", "verify_command", "Check a folder: every claim that it makes."),
}
"""Module below ``tools.commands``, function and summary of each command."""


class LazyGroup(TyperGroup):
    """A group whose commands are loaded when they are called."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names, in the order of the help."""
        return sorted(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Load a command; None where there is none of this name."""
        if cmd_name not in COMMANDS:
            return None
        module, function, _ = COMMANDS[cmd_name]
        app = typer.Typer(
            add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False
        )
        app.command(cmd_name)(getattr(import_module(_module_path(module)), function))
        command = get_command(app)
        command.name = cmd_name
        return command

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the names and summaries, from the table alone."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, COMMANDS[name][2]) for name in self.list_commands(ctx)])

    def invoke(self, ctx: Any) -> Any:
        """Run a command; an interrupt ends in a sentence and in the exit code of its signal."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            sys.stderr.write(
                "interrupted: no output folder was touched. Where parts of the work were kept, the "
                "lines above name them, and the same command goes on from there\n"
            )
            ctx.exit(INTERRUPTED)


def _module_path(module: str) -> str:
    if module == "demo":
        return "secateur.tools.demo.command"
    return f"secateur.tools.commands.{module}"


app = typer.Typer(
    cls=LazyGroup,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """The entry point of the console script."""
    raise SystemExit(run_command())


def run_command(arguments: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: words after the program's name; None takes those of the process.

    Returns:
        The exit code.
    """
    if arguments is None:
        words = sys.argv[1:]
    else:
        words = arguments
    try:
        app(args=words, prog_name="secateur")
    except SystemExit as stop:
        if isinstance(stop.code, int):
            return stop.code
        return int(stop.code is not None)
    except Exception as error:
        debug = "--debug" in words or os.environ.get("SECATEUR_DEBUG", "") not in ("", "0")
        return _report(error, as_json="--json" in words, debug=debug)
    return 0


def _report(error: Exception, *, as_json: bool, debug: bool) -> int:
    console = import_module("secateur.tools.report.console")
    expected = (secateur.SecateurError, OSError, MemoryError)
    report: Any = console.report_internal
    if isinstance(error, expected):
        report = console.report_error
    code: int = report(error, as_json=as_json, debug=debug)
    return code


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"secateur {secateur.__version__}")
        raise typer.Exit


@app.callback()
def set_up(
    plugin: Annotated[
        list[str] | None, typer.Option(help="A pass or importance of yours: module:Class.")
    ] = None,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Say which.")
    ] = False,
) -> None:
    """Compress language models by pruning."""
    if plugin:
        registry = import_module("secateur.passes.registry")
        console = import_module("secateur.tools.report.console")
        with console.before_work():
            for where in plugin:
                registry.add_plugin(where)


if __name__ == "__main__":
    main()

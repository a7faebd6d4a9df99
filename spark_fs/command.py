"""What all commands of the command line share: their options, opening the store, submitting a job, the exit code."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from spark_fs import console
from spark_fs.errors import ExitCode, InvalidError

if TYPE_CHECKING:
    from spark_fs.store import FeatureStore

F = TypeVar("F", bound=Callable[..., Any])


def open_store(context: click.Context) -> FeatureStore:
    """The store of the project and environment that the command line names."""
    from spark_fs.store import FeatureStore

    return FeatureStore(context.obj["repo"], context.obj["env"])


def run(context: click.Context, act: Callable[[], ExitCode | None]) -> None:
    """Do what the command does and leave with its exit code."""
    sys.exit(console.run(act, debug=context.obj["debug"]))


def output_option(command: F) -> F:
    """The option ``--output`` of every command that gives results."""
    return click.option(
        "--output",
        type=click.Choice(["table", "json"]),
        default="table",
        show_default=True,
        help="How results are printed.",
    )(command)


def submitted(command: F) -> F:
    """The options of every command that runs as a Spark job."""
    command = click.option("--print", "print_only", is_flag=True, help="Print the spark-submit command, do not run it.")(
        command
    )
    return output_option(command)


def ask(question: str, *, fix: str = "use --yes") -> None:
    """Go on only if the person says yes; InvalidError SFS-311 where nobody is there to be asked."""
    if not sys.stdin.isatty():
        raise InvalidError.of("SFS-311", "Nobody is here to confirm.", fix=fix)
    click.confirm(question, abort=True, err=True)


def submit_job(
    context: click.Context, job: str, arguments: Iterable[str], output: str, *, print_only: bool, question: str = ""
) -> None:
    """Run one of our jobs by spark-submit, once the person has said yes to the ``question``; or print the command."""

    def act() -> ExitCode | None:
        from spark_fs.config import load_environment
        from spark_fs.submit import job_file, submit_command

        environment = load_environment(context.obj["repo"], context.obj["env"])
        common = ["--repo", str(environment.root), "--env", environment.name, "--output", output]
        common += ["--debug"] if context.obj["debug"] else []
        command = submit_command(environment, job_file(job), [*common, *arguments])
        if print_only:
            click.echo(str(command))
            return ExitCode.OK
        if question:
            ask(question)
        sys.exit(command.run_job())

    run(context, act)


def repeated(option: str, values: Iterable[str]) -> list[str]:
    """The option once for each value, as arguments of a job."""
    return [text for value in values for text in (f"--{option}", value)]

"""Commands about the machine rather than the features: the embedded online store, the jars, doctor, submitting a file."""

from __future__ import annotations

import os
import re
import sys

import click

from spark_fs import console
from spark_fs.command import open_store, output_option, run
from spark_fs.errors import ExitCode, InvalidError


@click.group()
def online() -> None:
    """The online store: start, stop and status of the embedded one, users of any other."""


@online.command("start")
@output_option
@click.pass_context
def online_start(context: click.Context, output: str) -> None:
    r"""Start the embedded server if it does not run.

    \b
    Example:  spark-fs online start
    """
    run(context, lambda: _show_online(context, "start", output))


@online.command("stop")
@output_option
@click.pass_context
def online_stop(context: click.Context, output: str) -> None:
    r"""Stop the embedded server; its data is kept for the next start.

    \b
    Example:  spark-fs online stop
    """
    run(context, lambda: _show_online(context, "stop", output))


@online.command("status")
@output_option
@click.pass_context
def online_status(context: click.Context, output: str) -> None:
    r"""Show whether the online store answers, and where.

    \b
    Example:  spark-fs online status
    """
    run(context, lambda: _show_online(context, "status", output))


def _show_online(context: click.Context, verb: str, output: str) -> None:
    from spark_fs.errors import without_secrets
    from spark_fs.online import server
    from spark_fs.online.connect import check_server

    environment = open_store(context).environment
    configured = environment.config.online
    if configured.url != "embedded":
        if verb != "status":
            raise InvalidError.of(
                "SFS-620",
                "The online store of this environment is not the embedded one.",
                why=f"online.url is {without_secrets(configured.url)}.",
            )
        report = check_server(environment.online_url, socket_timeout_seconds=configured.timeout_seconds)
        console.show([{"url": without_secrets(configured.url), "running": True, "version": report.version}], output)
        return
    if verb == "start":
        state = server.start(environment.state_dir, port=configured.port)
    elif verb == "stop":
        server.stop(environment.state_dir)
        state = None
    else:
        state = server.status(environment.state_dir)
    shown = {"url": without_secrets(state.url), "running": True, "pid": str(state.pid)} if state else {"running": False}
    console.show([shown], output)


def _user_name(_context: click.Context, option: click.Parameter, value: str | None) -> str | None:
    if value is not None and (value == "default" or not re.fullmatch(r"[\w.@-]{1,64}", value, re.ASCII)):
        raise click.BadParameter(f"{value!r} names no new user: letters, digits and ._@-, and not 'default'.", param=option)
    return value


@online.command("acl")
@click.option("--redis", "release", type=click.Choice(["6.2", "7", "7.2"]), default="7", show_default=True,
              help="The server's version, or the newest before it; Valkey and Redis 8 are 7.2.")  # fmt: skip
@click.option("--writer", callback=_user_name, help="The user that runs the jobs. Default: <project>_writer.")
@click.option("--reader", callback=_user_name, help="The user that serves. Default: <project>_reader.")
@click.option("--writer-password-env", metavar="NAME", help="Take the writer's password from this environment variable.")
@click.option("--reader-password-env", metavar="NAME", help="Take the reader's password from this environment variable.")
@output_option
@click.pass_context
def online_acl(
    context: click.Context, release: str, writer: str | None, reader: str | None, writer_password_env: str | None,
    reader_password_env: str | None, output: str,
) -> None:  # fmt: skip
    r"""Print what an administrator gives to redis-cli, so that two users exist who may do no more than spark_fs does.

    Connects to nothing. Commands go to stdout, what they are for to stderr. Passwords are printed as SHA-256 only.

    \b
    Examples:
      spark-fs --env prod online acl | redis-cli --tls -h redis.example.com
      WRITER=… spark-fs --env prod online acl --writer-password-env WRITER --output json
    """

    def act() -> None:
        from spark_fs.config import load_environment
        from spark_fs.online import acl

        project = load_environment(context.obj["repo"], context.obj["env"]).config.project
        users = (
            acl.User(writer or f"{project}_writer", _digest(writer_password_env)),
            acl.User(reader or f"{project}_reader", _digest(reader_password_env)),
        )
        statements = acl.statements(project, *users, release=release)
        if output == "json":
            console.show([{"for": statement.purpose, "command": str(statement)} for statement in statements], output)
            return
        for statement in statements:
            console.say(f"# {statement.purpose}")
            click.echo(str(statement))
        console.say(f"# {acl.AFTERWARDS}")

    run(context, act)


def _digest(variable: str | None) -> str | None:
    """The SHA-256 of the password in an environment variable, as Redis takes it."""
    from spark_fs.online.acl import password_digest

    if variable is None:
        return None
    password = os.environ.get(variable)
    if not password:
        raise InvalidError.of("SFS-204", f"The variable {variable} is not set.", fix=f"export {variable}=…")
    return password_digest(password)


@click.command()
@output_option
@click.pass_context
def doctor(context: click.Context, output: str) -> None:
    r"""Check Java, Spark, Delta, the online store, folders and clock, and say how to mend what is wrong.

    \b
    Example:  spark-fs doctor
    """

    def act() -> ExitCode:
        from spark_fs.doctor import run
        from spark_fs.online import server

        store = open_store(context)
        place = store.environment
        url: str | None = place.online_url
        if url == "embedded":
            running = server.status(place.state_dir)
            url = running.url if running else None
        checks = run(
            state_dir=place.state_dir, offline_root=place.offline_root, registry_url=place.registry_url, online_url=url
        )
        console.show([{"check": c.name, "ok": c.ok, "found": c.found, "fix": c.fix} for c in checks], output)
        return ExitCode.FAILED if any(check.ok is False for check in checks) else ExitCode.OK

    run(context, act)


@click.group()
def jars() -> None:
    """The Delta Lake jars of the project."""


@jars.command("fetch")
@click.pass_context
def jars_fetch(context: click.Context) -> None:
    r"""Fetch the jars that are missing, once; later starts of Spark need no network.

    \b
    Example:  spark-fs jars fetch
    """

    def act() -> None:
        from spark_fs.jars import fetch

        fetch(open_store(context).environment.state_dir / "jars")

    run(context, act)


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("file", type=click.Path(exists=True, dir_okay=False))
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@click.option("--print", "print_only", is_flag=True, help="Print the spark-submit command, do not run it.")
@click.pass_context
def submit(context: click.Context, file: str, arguments: tuple[str, ...], print_only: bool) -> None:
    r"""Run a PySpark FILE of your own with this environment's Spark settings.

    \b
    Example:  spark-fs --env prod submit my_job.py --day 2013-07-01
    """

    def act() -> ExitCode | None:
        from spark_fs.config import load_environment
        from spark_fs.submit import submit_command

        command = submit_command(load_environment(context.obj["repo"], context.obj["env"]), file, arguments)
        if print_only:
            click.echo(str(command))
            return ExitCode.OK
        sys.exit(command.run())

    run(context, act)

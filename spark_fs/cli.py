"""The command line: parse, one call, print, exit code. Never imports pyspark: Spark commands are submitted.

Imports stand inside the commands, so that ``--help`` answers at once.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from spark_fs import console, machine, publishing
from spark_fs.command import ask, open_store, output_option, repeated, run, submit_job, submitted
from spark_fs.errors import ExitCode, InvalidError, Problem

if TYPE_CHECKING:
    from spark_fs.store import FeatureStore

F = TypeVar("F", bound=Callable[..., Any])


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--repo", default=".", show_default=True, help="The project folder (with conf/ and feature_repo/).")
@click.option("--env", default=None, help="The environment: conf/<env>.yml. Default: $SPARK_FS_ENV, else local.")
@click.option("--debug", is_flag=True, help="Print whole traces of errors.")
@click.version_option(package_name="spark-fs")
@click.pass_context
def main(context: click.Context, repo: str, env: str | None, debug: bool) -> None:
    r"""A feature store for Spark, Delta Lake and Redis.

    \b
    A first tour:
      spark-fs init my_features && cd my_features
      spark-fs jars fetch
      spark-fs plan
      spark-fs apply --yes
      spark-fs build
      spark-fs materialize-incremental

    Results go to stdout, progress and messages to stderr. Exit codes: 0 ok, 1 failed, 2 invalid, 3 changes present,
    4 quality gate, 5 drift, 6 conflict, 7 partly done, 130 interrupted.
    """
    context.obj = {"repo": repo, "env": env, "debug": debug}


@main.command()
@click.argument("folder", default=".", type=click.Path(path_type=Path))
@click.pass_context
def init(context: click.Context, folder: Path) -> None:
    r"""Create a new project in FOLDER: conf/ and feature_repo/ with a first entity, source and view.

    \b
    Example:  spark-fs init my_features
    """

    def act() -> None:
        from spark_fs.template import create

        for file in create(folder):
            click.echo(file)

    run(context, act)


@main.command()
@output_option
@click.pass_context
def validate(context: click.Context, output: str) -> None:
    r"""Check all definitions and settings; every problem is listed, with file and line.

    \b
    Example:  spark-fs validate
    """

    def act() -> ExitCode:
        try:
            repository = open_store(context).load_repository()
        except InvalidError as error:
            if output == "table":
                raise
            console.show([_problem_row(problem) for problem in error.problems], output)
            return error.exit_code
        counts = {kind: len(getattr(repository, kind)) for kind in ("entities", "sources", "views", "services")}
        console.show([counts], output, title="Valid")
        return ExitCode.OK

    run(context, act)


def _problem_row(problem: Problem) -> dict[str, str]:
    return {name: getattr(problem, name) for name in ("code", "what", "why", "where", "fix")}


@main.command()
@click.option("--output", type=click.Choice(["text", "json", "markdown"]), default="text", show_default=True)
@click.option(
    "--out", type=click.Path(dir_okay=False, writable=True, path_type=Path), help="Also write the plan to a file for apply."
)
@click.option("--detailed-exitcode", is_flag=True, help="Exit with 3 when there are changes.")
@click.pass_context
def plan(context: click.Context, output: str, out: Path | None, detailed_exitcode: bool) -> None:
    r"""Show what apply would change, and why; changes nothing.

    \b
    Examples:
      spark-fs plan
      spark-fs plan --output markdown          for a review comment
      spark-fs plan --out plan.json && spark-fs apply plan.json
    """

    def act() -> ExitCode:
        made = open_store(context).plan()
        document = json.dumps(made.to_json(), indent=2, ensure_ascii=False)
        if out:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(document + "\n", encoding="utf-8")
        click.echo({"text": str(made), "json": document, "markdown": made.to_markdown()}[output])
        return ExitCode.CHANGES_PRESENT if made and detailed_exitcode else ExitCode.OK

    run(context, act)


@main.command()
@click.argument("plan_file", required=False, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--yes", is_flag=True, help="Do not ask; needed where nobody can answer.")
@click.pass_context
def apply(context: click.Context, plan_file: Path | None, yes: bool) -> None:
    r"""Bring the registry to what feature_repo/ declares, or carry out exactly a PLAN_FILE.

    \b
    Examples:
      spark-fs apply
      spark-fs apply --yes
      spark-fs apply plan.json
    """

    def act() -> None:
        from spark_fs.plan import Plan

        store = open_store(context)
        made = Plan.from_json(_read_json(plan_file)) if plan_file else store.plan()
        click.echo(str(made))
        if not made:
            return
        if not (yes or plan_file):
            ask("Apply?", fix="use --yes, or apply a plan file")
        store.apply(made)
        click.echo(f"Applied: {made.summary}.")

    run(context, act)


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InvalidError.of("SFS-308", "This is not a plan.", why=f"{error}.", where=str(file)) from error


@main.command()
@click.option("--view", multiple=True, help="Only this feature view (name or name@version); may be repeated.")
@click.option("--start", help="Rebuild from here (inclusive, ISO 8601, UTC) instead of what is missing.")
@click.option("--end", help="Up to here (exclusive). Default: now.")
@click.option("--missing", is_flag=True, help="Only list the intervals that are not built yet; starts no Spark.")
@submitted
@click.pass_context
def build(
    context: click.Context, view: tuple[str, ...], start: str | None, end: str | None, missing: bool, output: str,
    print_only: bool,
) -> None:  # fmt: skip
    r"""Bring feature tables up to date from their sources; with --start rebuild that interval.

    \b
    Examples:
      spark-fs build
      spark-fs build --missing
      spark-fs build --view weather --start 2013-07-01 --end 2013-08-01
    """
    if missing:
        run(context, lambda: _show_missing(open_store(context), view, end, output))
    arguments = repeated("view", view) + repeated("start", filter(None, [start])) + repeated("end", filter(None, [end]))
    submit_job(context, "build", arguments, output, print_only=print_only)


def _show_missing(store: FeatureStore, views: tuple[str, ...], end: str | None, output: str) -> None:
    from spark_fs.intervals import text

    gaps = store.missing(views or None, _instant(end) if end else None)
    rows = [{"view": view, "start": text(gap.start), "end": text(gap.end)} for view, found in gaps.items() for gap in found]
    console.show(rows, output, title="Not built yet")


def _instant(value: str) -> Any:
    from spark_fs.intervals import parse_instant

    try:
        return parse_instant(value)
    except ValueError as error:
        raise InvalidError.of("SFS-207", f"{error}.") from error


def _bucket_count(_context: click.Context, option: click.Parameter, value: int | None) -> int | None:
    from spark_fs.config import MOST_BUCKETS, is_bucket_count

    if value is not None and not is_bucket_count(value):
        raise click.BadParameter(f"{value} is no power of two from 1 to {MOST_BUCKETS}.", param=option)
    return value


@main.command()
@click.argument("views", nargs=-1)
@click.option("--buckets", type=int, callback=_bucket_count, help="Redistribute the rows to so many buckets (a power of two).")
@submitted
@click.pass_context
def optimize(context: click.Context, views: tuple[str, ...], buckets: int | None, output: str, print_only: bool) -> None:
    r"""Rewrite feature tables (default: all) with one sorted file a bucket, where builds have left many; changes no row.

    \b
    Examples:
      spark-fs optimize
      spark-fs optimize weather --buckets 64
    """
    arguments = repeated("view", views) + repeated("buckets", [str(buckets)] if buckets else [])
    submit_job(context, "optimize", arguments, output, print_only=print_only)


@main.group()
def dataset() -> None:
    """Training datasets: create, list, show, verify, diff, export, delete."""


@dataset.command("create")
@click.argument("name")
@click.option("--entities", required=True, help="The entity DataFrame: SQL text, a path (Delta, Parquet, CSV) or a table.")
@click.option("--features", "features", multiple=True, required=True, help="view:feature (repeat it), or one service.")
@click.option("--full-feature-names", is_flag=True, help="Name columns view__feature.")
@click.option("--known-at", is_flag=True, help="A value counts only from its created time on.")
@click.option("--strategy", type=click.Choice(("auto", "window", "colocated")), default="auto", show_default=True,
              help="How feature rows are found; the result is the same.")  # fmt: skip
@click.option("--explain", is_flag=True, help="Only print how the join would run.")
@click.option("--split", help="time=2013-07-01,2013-10-01, random=0.8,0.1,0.1 or kfold=5: adds the column split.")
@click.option(
    "--split-by", multiple=True, metavar="COLUMN", help="All rows with one value are of one part. Default: join keys."
)
@click.option("--seed", type=int, default=0, help="Of a random split or folds.")
@click.option("--gap-days", type=float, default=0.0, help="Leave out so many days before each cut-off of a split by time.")
@click.option("--stratify", metavar="COLUMN", help="Cut each of this column's values in the shares of a random split.")
@click.option("--label", "labels", multiple=True, help="A column to be predicted; features that tell it are reported.")
@click.option("--description", default="", help="What the dataset is for.")
@click.option("--tag", "tags", multiple=True, metavar="KEY=VALUE", help="A tag; may be repeated.")
@click.option(
    "--strict", is_flag=True, help="Exit code 4 where the report warns of something; the dataset is saved all the same."
)
@submitted
@click.pass_context
def dataset_create(
    context: click.Context, name: str, entities: str, features: tuple[str, ...], full_feature_names: bool, known_at: bool,
    strategy: str, explain: bool, split: str | None, split_by: tuple[str, ...], seed: int, gap_days: float,
    stratify: str | None, labels: tuple[str, ...], description: str, tags: tuple[str, ...], strict: bool,
    output: str, print_only: bool,
) -> None:  # fmt: skip
    r"""Join features to entities as of each row's event_timestamp, and save the next version of dataset NAME.

    \b
    Examples:
      spark-fs dataset create delays --entities spine.parquet --features departure_delay_v1
      spark-fs dataset create delays --entities "SELECT …" --features weather:wind_mph --features plane_facts:seats
      spark-fs dataset create delays --entities spine.parquet --features departure_delay_v1 --split time=2013-10-01 --gap-days 1
    """
    kind = "service" if len(features) == 1 and ":" not in features[0] else "feature"
    arguments = ["--name", name, "--entities", entities, "--description", description, "--strategy", strategy]
    arguments += [
        *repeated(kind, features),
        *repeated("split-by", split_by),
        *repeated("label", labels),
        *repeated("tag", tags),
    ]
    given = {"split": split, "stratify": stratify, "seed": seed or None, "gap-days": gap_days or None}
    arguments += [text for name, value in given.items() if value is not None for text in (f"--{name}", str(value))]
    flags = {"full-feature-names": full_feature_names, "known-at": known_at, "explain": explain, "strict": strict}
    arguments += [f"--{flag}" for flag, given in flags.items() if given]
    submit_job(context, "dataset_create", arguments, output, print_only=print_only)


@dataset.command("list")
@output_option
@click.pass_context
def dataset_list(context: click.Context, output: str) -> None:
    r"""List saved datasets and their versions.

    \b
    Example:  spark-fs dataset list
    """

    def act() -> None:
        names = ("name", "version", "rows", "created_at", "checksum", "path", "delta_version")
        saved = open_store(context).registry.datasets.all()
        console.show([{name: manifest[name] for name in names} for manifest in saved], output, empty="No datasets yet.")

    run(context, act)


@dataset.command("show")
@click.argument("name")
@click.option("--version", type=int, help="Default: the newest.")
@output_option
@click.pass_context
def dataset_show(context: click.Context, name: str, version: int | None, output: str) -> None:
    r"""Show a dataset's manifest: rows, columns, nulls, where its features came from.

    \b
    Example:  spark-fs dataset show delays --version 3
    """
    run(context, lambda: console.show_manifest(open_store(context).registry.datasets.require(name, version), output))


@dataset.command("verify")
@click.argument("name")
@click.option("--version", type=int, help="Default: the newest.")
@click.option("--stored-only", is_flag=True, help="Only compare the stored rows with the manifest; do not join again.")
@click.option("--strict", is_flag=True, help="Exit code 4 also where the dataset cannot be joined again.")
@submitted
@click.pass_context
def dataset_verify(
    context: click.Context, name: str, version: int | None, stored_only: bool, strict: bool, output: str, print_only: bool
) -> None:
    r"""Check that a dataset is what its manifest signs, and comes out the same when joined again; exit code 4 if not.

    The join is from the versions of the feature tables that the manifest names. Where they are gone, it says so.

    \b
    Examples:  spark-fs dataset verify delays --version 3
               spark-fs dataset verify delays --stored-only
    """
    arguments = ["--name", name, *repeated("version", [str(version)] if version else [])]
    arguments += [f"--{flag}" for flag, given in {"stored-only": stored_only, "strict": strict}.items() if given]
    submit_job(context, "dataset_verify", arguments, output, print_only=print_only)


@dataset.command("diff")
@click.argument("name")
@click.argument("old", type=int)
@click.argument("new", type=int, required=False)
@submitted
@click.pass_context
def dataset_diff(context: click.Context, name: str, old: int, new: int | None, output: str, print_only: bool) -> None:
    r"""Show what version NEW (default: the newest) of a dataset has otherwise than OLD; exit code 3 if anything.

    Definitions, versions of tables, the spine; rows that were added, are gone or have changed, and in which columns.

    \b
    Examples:  spark-fs dataset diff delays 1 2
               spark-fs dataset diff delays 1 --output json
    """
    arguments = ["--name", name, "--old", str(old), *repeated("new", [str(new)] if new else [])]
    submit_job(context, "dataset_diff", arguments, output, print_only=print_only)


@dataset.command("export")
@click.argument("name")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--version", type=int, help="Default: the newest.")
@click.option("--part", help="Only this part of the split.")
@output_option
@click.pass_context
def dataset_export(context: click.Context, name: str, folder: Path, version: int | None, part: str | None, output: str) -> None:
    r"""Write a dataset's rows as Parquet files, and its manifest, into a new FOLDER. Needs no Spark.

    \b
    Examples:  spark-fs dataset export delays delays-3 --version 3
               spark-fs dataset export delays delays-train --part train
    """

    def act() -> None:
        found = open_store(context).get_dataset(name, version)
        written = (found[part] if part else found).export(str(folder))
        console.show([{"file": file} for file in written], output)

    run(context, act)


@dataset.command("delete")
@click.argument("name")
@click.argument("version", type=int)
@click.option("--yes", is_flag=True, help="Do not ask.")
@submitted
@click.pass_context
def dataset_delete(context: click.Context, name: str, version: int, yes: bool, output: str, print_only: bool) -> None:
    r"""Delete VERSION of a dataset for good, with its rows. Its number is not given again.

    \b
    Example:  spark-fs dataset delete delays 2
    """
    arguments, question = ["--name", name, "--version", str(version)], "" if yes else f"Delete {name}@{version} for good?"
    submit_job(context, "dataset_delete", arguments, output, print_only=print_only, question=question)


@main.group(invoke_without_command=True)
@click.option("--limit", default=20, show_default=True, help="How many.")
@output_option
@click.pass_context
def runs(context: click.Context, limit: int, output: str) -> None:
    r"""List the latest builds and materializations and how they ended; ``runs show`` shows one of them.

    \b
    Examples:  spark-fs runs --limit 5
               spark-fs runs show 3f9c2a1b7d40
    """
    if context.invoked_subcommand:
        return

    def act() -> None:
        names = ("run_id", "kind", "subject", "state", "started_at", "finished_at")
        found = open_store(context).registry.runs(limit)
        if output == "table":
            found = [{name: run[name] for name in names} for run in found]
        console.show(found, output, empty="No runs yet.")

    run(context, act)


@runs.command("show")
@click.argument("run_id")
@output_option
@click.pass_context
def runs_show(context: click.Context, run_id: str, output: str) -> None:
    r"""Show one run: what it published of which table version, and what became of the rows, bucket by bucket.

    \b
    Example:  spark-fs runs show 3f9c2a1b7d40
    """

    def act() -> None:
        found, publications = open_store(context).run(run_id)
        if output == "json":
            click.echo(json.dumps({**found, "publications": publications}, indent=2, ensure_ascii=False, default=str))
            return
        console.show([{"run": name, "value": str(value)} for name, value in found.items() if name != "details"], output)
        for publication in publications:
            told = {name: str(value) for name, value in publication.items() if name != "buckets"}
            console.show([{"publication": name, "value": value} for name, value in told.items()], output)
            console.show(publication["buckets"], output, empty="No bucket is confirmed yet.")

    run(context, act)


@main.command()
@click.argument("view")
@click.option("--yes", is_flag=True, help="Do not ask.")
@output_option
@click.pass_context
def destroy(context: click.Context, view: str, yes: bool, output: str) -> None:
    r"""Delete the feature table and the online values of a VIEW (or view@version) that nothing uses any more.

    \b
    Example:  spark-fs destroy weather@1
    """

    def act() -> None:
        from spark_fs.names import parse_reference

        name, version = parse_reference(view)
        if not yes:
            ask(f"Delete the table and online values of {view} for good?")
        console.show([open_store(context).destroy(name, version)], output)

    run(context, act)


for _command in (*publishing.COMMANDS, machine.online, machine.jars, machine.doctor, machine.submit):
    main.add_command(_command)

"""Commands about the online store: publish, look up, audit, repair, erase."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from spark_fs import console
from spark_fs.command import open_store, output_option, repeated, run, submit_job, submitted
from spark_fs.errors import InvalidError

if TYPE_CHECKING:
    from spark_fs.online.read import OnlineResponse
    from spark_fs.types import ValueType


budget_option = click.option(
    "--max-rows-per-second",
    type=click.IntRange(min=0),
    help="Write at most so many rows a second, and fewer while the server is slow; 0: no limit.  "
    "[default: online.max_rows_per_second]",
)


def _budget(max_rows_per_second: int | None) -> list[str]:
    return [] if max_rows_per_second is None else ["--max-rows-per-second", str(max_rows_per_second)]


@click.command()
@click.argument("start")
@click.argument("end")
@click.option("--view", multiple=True, help="Only this feature view; may be repeated.")
@click.option("--restate", is_flag=True, help="Let these values replace newer ones.")
@click.option("--all", "everything", is_flag=True, help="Send also what was published before and has not changed.")
@click.option("--full", is_flag=True, help="Write all anew beside what is served, then switch; spark-fs rollback goes back.")
@budget_option
@submitted
@click.pass_context
def materialize(
    context: click.Context,
    start: str,
    end: str,
    view: tuple[str, ...],
    restate: bool,
    everything: bool,
    full: bool,
    max_rows_per_second: int | None,
    output: str,
    print_only: bool,
) -> None:
    r"""Publish the newest values with event times in [START, END) to the online store; builds what is missing first.

    \b
    Examples:  spark-fs materialize 2013-01-01 2014-01-01
               spark-fs materialize 2013-01-01 2013-07-01 --view weather --restate
               spark-fs materialize 2013-01-01 2014-01-01 --view weather --full
    """
    arguments = ["--start", start, "--end", end, *repeated("view", view)]
    flags = {"--restate": restate, "--everything": everything, "--full": full}
    arguments += [*(flag for flag, wanted in flags.items() if wanted), *_budget(max_rows_per_second)]
    submit_job(context, "materialize", arguments, output, print_only=print_only)


@click.command("materialize-incremental")
@click.argument("end", required=False)
@click.option("--view", multiple=True, help="Only this feature view; may be repeated.")
@budget_option
@submitted
@click.pass_context
def materialize_incremental(
    context: click.Context,
    end: str | None,
    view: tuple[str, ...],
    max_rows_per_second: int | None,
    output: str,
    print_only: bool,
) -> None:
    r"""Publish what builds have added, corrected or removed since the last run, however old, up to END (default: now).

    \b
    Examples:  spark-fs materialize-incremental
               spark-fs materialize-incremental --max-rows-per-second 20000
    """
    arguments = repeated("end", [end] if end else []) + repeated("view", view) + _budget(max_rows_per_second)
    submit_job(context, "materialize", arguments, output, print_only=print_only)


@click.command("get-online-features")
@click.option("--features", "features", multiple=True, required=True, help="view:feature (repeat it), or one service.")
@click.option("--entity", "entities", multiple=True, required=True, help="One entity: key=value[,key=value]; repeat it.")
@click.option("--full-feature-names", is_flag=True, help="Name columns view__feature.")
@output_option
@click.pass_context
def get_online_features(
    context: click.Context, features: tuple[str, ...], entities: tuple[str, ...], full_feature_names: bool, output: str
) -> None:
    r"""Read the newest published values; starts no Spark.

    \b
    Example:  spark-fs get-online-features --features weather:wind_mph --entity origin=JFK --entity origin=EWR
    """

    def act() -> None:
        store = open_store(context)
        wanted = features[0] if len(features) == 1 and ":" not in features[0] else list(features)
        types = {
            spine_key: key.type
            for selection in store.resolve_features(wanted)
            for spine_key, key in zip(selection.spine_keys, selection.view.keys, strict=True)
        }
        rows = _entity_rows(types, entities)
        response = store.get_online_features(wanted, rows, full_feature_names=full_feature_names)
        if output == "json":
            click.echo(json.dumps(response.to_json(), indent=2, ensure_ascii=False, default=str))
        else:
            console.show(_online_rows(response), output)

    run(context, act)


def _online_rows(response: OnlineResponse) -> list[dict[str, Any]]:
    """One row per entity: its values, and where there is none the status that says why."""
    columns, statuses = response.to_dict(), response.statuses
    for name, states in statuses.items():
        columns[name] = [value if state == "PRESENT" else state for value, state in zip(columns[name], states, strict=True)]
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _entity_rows(types: Mapping[str, ValueType], entities: tuple[str, ...]) -> list[dict[str, Any]]:
    """Entity rows from ``key=value,key=value`` texts, each value in its join key's type."""
    rows = []
    for entity in entities:
        pairs = dict(part.partition("=")[::2] for part in entity.split(","))
        rows.append({name: _key_value(name, value, types) for name, value in pairs.items()})
    return rows


def _key_value(name: str, value: str, types: Mapping[str, ValueType]) -> Any:
    if name not in types:
        return value  # other columns come back as they are
    try:
        return types[name].from_text(value)
    except ValueError as error:
        raise InvalidError.of("SFS-606", f"'{name}={value}' is no {types[name]}.", why=f"{error}.") from error


@click.command()
@click.argument("views", nargs=-1)
@click.option("--all", "every_key", is_flag=True, help="Look at every key, and for rows that should not be there: the default.")
@click.option("--sample", type=click.IntRange(min=1), help="Look at so many keys of each view only, at random.")
@submitted
@click.pass_context
def audit(
    context: click.Context, views: tuple[str, ...], every_key: bool, sample: int | None, output: str, print_only: bool
) -> None:
    r"""Compare every value in the online store with what was published; all views, or these VIEWS.

    Exit code 4 where a value is missing, stale, wrong or should not be there; each is a row in a Delta table.

    \b
    Examples:  spark-fs audit --all
               spark-fs audit weather --sample 10000
    """
    if every_key and sample:
        raise click.UsageError("--all looks at every key, --sample at some: give one of them.", context)
    arguments = repeated("view", views) + repeated("sample", [str(sample)] if sample else [])
    submit_job(context, "audit", arguments, output, print_only=print_only)


@click.command()
@click.argument("views", nargs=-1)
@budget_option
@submitted
@click.pass_context
def repair(
    context: click.Context, views: tuple[str, ...], max_rows_per_second: int | None, output: str, print_only: bool
) -> None:
    r"""Write all that was published to the online store again, whatever is there; all views, or these VIEWS.

    For a server that has lost data, and after an audit that has found faults.

    \b
    Example:  spark-fs repair weather
    """
    submit_job(context, "repair", repeated("view", views) + _budget(max_rows_per_second), output, print_only=print_only)


@click.command()
@click.argument("view")
@output_option
@click.pass_context
def rollback(context: click.Context, view: str, output: str) -> None:
    r"""Let readers see again what they saw before the last full refresh of a VIEW; once more undoes that. Starts no Spark.

    The next run brings the view up to the newest version of its table: correct that first, or stop the schedule.

    \b
    Example:  spark-fs rollback weather
    """
    run(context, lambda: console.show([open_store(context).roll_back(view)], output))


@click.command()
@click.argument("view")
@click.argument("entities", nargs=-1, required=True)
@click.option("--undo", is_flag=True, help="Allow these entities to be published again.")
@output_option
@click.pass_context
def erase(context: click.Context, view: str, entities: tuple[str, ...], undo: bool, output: str) -> None:
    r"""Remove ENTITIES (key=value[,key=value]) of a VIEW from the online store, for good: no later run brings them back.

    All versions of the view with the same join keys lose them. VIEW may be view@version, and a view that is no longer declared.
    Feature tables, sources and what audits have noted are not touched: delete the rows there as well.

    \b
    Examples:  spark-fs erase user_spend user_id=4711 user_id=4712
               spark-fs erase user_spend@1 user_id=4711
               spark-fs erase user_spend user_id=4711 --undo
    """

    def act() -> None:
        from spark_fs.names import parse_reference
        from spark_fs.online.erase import versions_alike

        store = open_store(context)
        state = store.registry.state()
        spec = versions_alike(state, *parse_reference(view))[0]
        rows = _entity_rows({key.name: key.type for key in spec.keys}, entities)
        console.show([store.erase(view, rows, undo=undo)], output)
        others = [other.reference for other in state.versions.values() if other.name == spec.name and other.keys != spec.keys]
        if others:
            console.say(f"Left as they are, for they have other join keys: {', '.join(sorted(others))}.")

    run(context, act)


COMMANDS = (materialize, materialize_incremental, get_online_features, audit, repair, rollback, erase)

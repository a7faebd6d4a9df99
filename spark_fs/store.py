"""FeatureStore: what a notebook or a job uses; each method hands on to the module that does the work."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from functools import cached_property
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from spark_fs.config import MOST_BUCKETS, is_bucket_count, load_environment
from spark_fs.errors import InterruptedRunError, InvalidError, PartlyDoneError, SparkFSError, summary, translate
from spark_fs.intervals import BEGINNING, Interval, missing
from spark_fs.names import RecentRequests, choose_views, parse_reference, refuse_in_use, resolve
from spark_fs.plan import Plan, apply_plan, make_plan
from spark_fs.registry import Registry
from spark_fs.repo import Repository, load
from spark_fs.spec import Selection, ViewSpec

if TYPE_CHECKING:
    import pandas
    from pyspark.sql import DataFrame, SparkSession

    from spark_fs.audit import AuditResult
    from spark_fs.build import BuildResult, OptimizeResult
    from spark_fs.datasets.catalog import Datasets
    from spark_fs.datasets.dataset import Dataset
    from spark_fs.datasets.origins import OfflineStore
    from spark_fs.datasets.retrieval import RetrievalJob
    from spark_fs.definitions import FeatureService
    from spark_fs.materialize import MaterializeResult
    from spark_fs.online.read import OnlineReader, OnlineResponse
    from spark_fs.online.redis_store import OnlineTarget

R = TypeVar("R")


class FeatureStore:
    """One project in one environment.

    ``repo_path`` is the folder with ``conf/`` and ``feature_repo/``; ``env`` names conf/<env>.yml (default: $SPARK_FS_ENV,
    else ``local``). ``spark`` is used where given, else the active session, else one is started when first needed; a
    session that was there is never changed or stopped.
    """

    def __init__(self, repo_path: str | Path = ".", env: str | None = None, spark: SparkSession | None = None) -> None:
        self.environment = load_environment(repo_path, env)
        self._given_spark = spark

    @property
    def project(self) -> str:
        """The project's name."""
        return self.environment.config.project

    @cached_property
    def registry(self) -> Registry:
        """The applied definitions and the record of what was done."""
        return Registry(self.environment.registry_url, self.project)

    @cached_property
    def spark(self) -> SparkSession:
        """The Spark session; started when first used if there was none."""
        from spark_fs.session import get_session

        return self._given_spark or get_session(self.environment)

    # Definitions.

    def load_repository(self) -> Repository:
        """The definitions in feature_repo/, checked. Raises InvalidError with all problems."""
        return load(self.environment.feature_repo, self.project)

    def plan(self) -> Plan:
        """What ``apply`` would change; changes nothing."""
        repository = self.load_repository()  # first: what is invalid must not even create a registry
        return make_plan(self.registry.state(), repository)

    def apply(self, plan: Plan | None = None) -> Plan:
        """Carry out a plan (default: a new one) and return it. ConflictError if the registry has moved since it was made."""
        plan = plan or self.plan()
        apply_plan(plan, self.registry)
        self._requests.forget()
        return plan

    # Feature tables.

    def build(
        self, views: Iterable[str] | None = None, start: datetime | None = None, end: datetime | None = None
    ) -> list[BuildResult]:
        """Bring feature tables up to ``end`` (exclusive; default: now), or rebuild ``[start, end)`` where a start is given.

        A view whose source has drifted or cannot be read is refused before anything of it is written, with all its
        problems. It does not stop the others: PartlyDoneError then holds their results. A table that has got too many files
        a bucket (``build.max_files_per_bucket``) is optimized.
        """
        from spark_fs.build import build_interval, intervals_to_build, keep_layout, note_unchanged

        now, settings = datetime.now(timezone.utc), self.environment.config
        allowed = timedelta(seconds=settings.build.max_future_seconds)
        buckets = None if settings.offline.buckets == "auto" else settings.offline.buckets

        def build_one(view: ViewSpec, _: str) -> list[BuildResult]:
            todo = intervals_to_build(self.registry.built(view), start, end, now, allowed)
            # The state first: what is committed in between is then seen as new by the next build.
            source_state = self._offline.source_state(view)
            frame = self._offline.computed(view)

            def build(interval: Interval) -> BuildResult:
                noted = note_unchanged(self.registry, view, interval, source_state) if start is None else None
                return noted or build_interval(
                    self.registry, self._offline.table(view), frame, interval,
                    buckets=buckets, latest=now + allowed, source_state=source_state,
                )  # fmt: skip

            done = [build(interval) for interval in todo]
            kept = [keep_layout(self._offline.table(view), last, settings.build.max_files_per_bucket) for last in done[-1:]]
            return [*done[:-1], *kept]

        chosen = choose_views(self.registry.state(), views)
        return self._each("build", chosen, build_one)

    def optimize(self, views: Iterable[str] | None = None, buckets: int | None = None) -> list[OptimizeResult]:
        """Leave one sorted file in each bucket of the feature tables; with ``buckets`` redistribute them to so many.

        No row changes, so nothing becomes new to publish. Views without a table are passed over; tables with nothing to do are
        left alone. Joins and builds may run meanwhile. InvalidError SFS-411 for a number that is no power of two up to 1024.
        """
        from spark_fs.build import optimize_table

        if buckets is not None and not is_bucket_count(buckets):
            fix = f"a power of two from 1 to {MOST_BUCKETS}"
            raise InvalidError.of("SFS-411", f"A feature table cannot have {buckets} buckets.", fix=fix)

        def optimize_one(view: ViewSpec, _: str) -> list[OptimizeResult]:
            table = self._offline.table(view)
            return [optimize_table(table, buckets)] if table.exists() else []

        return self._each("optimize", choose_views(self.registry.state(), views), optimize_one)

    def missing(self, views: Iterable[str] | None = None, end: datetime | None = None) -> dict[str, list[Interval]]:
        """The intervals up to ``end`` (default: now) that no build has covered yet, by view."""
        whole = Interval(BEGINNING, end or datetime.now(timezone.utc))
        return {v.reference: missing(whole, self.registry.built(v)) for v in choose_views(self.registry.state(), views)}

    # Training sets.

    def get_historical_features(
        self,
        entity_df: DataFrame | pandas.DataFrame | str,
        features: Sequence[str] | str | FeatureService,
        *,
        full_feature_names: bool = False,
        known_at: bool = False,
        strategy: str = "auto",
    ) -> RetrievalJob:
        """The features as they were at each row's ``event_timestamp``; see ``RetrievalJob``. Wrong names are refused now.

        ``entity_df``: a Spark or pandas DataFrame, SQL text, a path (Delta or Parquet) or a table name, with the join keys and
        ``event_timestamp``. ``features``: ``["view:feature", "view@2:feature"]`` or a service. With ``known_at`` a value counts
        only from its created time on. ``strategy``: ``auto`` reads feature tables where they lie and joins other rows by one
        window; ``window`` or ``colocated`` asks for one of the two. The result is the same.
        """
        from spark_fs.datasets.retrieval import RetrievalJob
        from spark_fs.offline.spines import read_spine

        selections = self.resolve_features(features)
        spine, origin = read_spine(self.spark, entity_df, self.environment.resolve)
        return RetrievalJob(
            self._offline, spine, origin, selections,
            full_feature_names=full_feature_names, known_at=known_at, strategy=strategy,
        )  # fmt: skip

    def get_dataset(self, name: str, version: int | None = None) -> Dataset:
        """A saved training dataset (default: its newest version); reading it needs no Spark. SFS-303 where there is none."""
        return self.datasets.get(name, version)

    @property
    def datasets(self) -> Datasets:
        """The saved training datasets: listed, verified, compared, deleted."""
        from spark_fs.datasets.catalog import Datasets
        from spark_fs.session import active_session

        return Datasets(self.registry, lambda: self._offline, self._given_spark or active_session())

    # Online.

    def materialize(
        self,
        start: datetime,
        end: datetime,
        views: Iterable[str] | None = None,
        *,
        restate: bool = False,
        everything: bool = False,
        full: bool = False,
        max_rows_per_second: int | None = None,
    ) -> list[MaterializeResult]:
        """Publish the newest row of each key with an event time in ``[start, end)``; builds what is missing of it first.

        What was published before is not sent again, except where it has changed since, or with ``everything``. ``restate``
        lets each key with a row in the interval serve the newest of those, also in the place of a newer one. ``full`` writes
        all of the view anew, beside what is served, then lets readers see it all at once; ``roll_back`` undoes that. It takes
        the memory of both. InvalidError SFS-619 for ``full`` together with ``restate``.
        ``max_rows_per_second`` (None: as ``online.max_rows_per_second``; 0: no limit) keeps reads fast meanwhile.
        """
        if full and restate:
            raise InvalidError.of(
                "SFS-619", "A full refresh restates nothing: each key serves its newest row.", fix="choose one of the two"
            )
        how = {"restate": restate, "everything": everything, "full": full}
        return self._materialize(_interval(start, end), views, max_rows_per_second, **how)

    def materialize_incremental(
        self, end: datetime | None = None, views: Iterable[str] | None = None, *, max_rows_per_second: int | None = None
    ) -> list[MaterializeResult]:
        """Publish what is new since the last run, up to ``end`` (exclusive; default: now); builds first."""
        return self._materialize(_interval(BEGINNING, end or datetime.now(timezone.utc)), views, max_rows_per_second)

    def audit(self, views: Iterable[str] | None = None, *, sample: int | None = None) -> list[AuditResult]:
        """Compare every value online, or those of ``sample`` keys a view, with what was published; changes nothing online.

        Views that were never published are passed over. See ``AuditResult``.
        """
        from spark_fs.audit import audit_view

        def audit_one(view: ViewSpec, _: str) -> list[AuditResult]:
            path = f"{self.environment.offline_root}/{self.project}/_audits/{view.name}/v{view.version}"
            found = audit_view(self.registry, self._offline.table(view), self._target(view), path, sample=sample)
            return [] if found is None else [found]

        return self._each_online("audit", views, audit_one)

    def repair(self, views: Iterable[str] | None = None, *, max_rows_per_second: int | None = None) -> list[MaterializeResult]:
        """Write all that was published again, in the place of whatever is online, and remove what should not be there.

        Values that were restated on purpose become the newest again. Views that were never published are passed over.
        ``max_rows_per_second`` as for ``materialize``.
        """
        from spark_fs.materialize import materialize_view

        def repair_one(view: ViewSpec, run_id: str) -> list[MaterializeResult]:
            with self._lease(view, run_id):
                known = self.registry.published(view)
                if known is None:
                    return []
                whole = Interval(known.intervals[0].start, known.intervals[-1].end)
                table, target = self._offline.table(view), self._target(view, max_rows_per_second)
                return [materialize_view(self.registry, table, target, whole, repair=True, run_id=run_id)]

        return self._each_online("repair", views, repair_one)

    def roll_back(self, view: str) -> dict[str, Any]:
        """Let readers see again what they saw before the last full refresh of a view, or before the last roll-back.

        From one moment to the next; starts no Spark. The next run brings the view up to the newest version of its table. Raises
        SFS-618 where there is nothing to go back to, SFS-616 where the online store has lost it.
        """
        from spark_fs.rollback import roll_back

        (spec,) = choose_views(self.registry.state(), [view], online=True)
        with self._run("roll back", spec.reference) as (run_id, _), self._lease(spec, run_id):
            before = roll_back(self.registry, spec, self._target(spec))
        return {"view": spec.reference, "table_version": before.table_version, "epoch": before.epoch}

    def erase(
        self, view: str, entity_rows: Sequence[Mapping[str, Any]] | Mapping[str, Sequence[Any]], *, undo: bool = False
    ) -> dict[str, Any]:
        """Remove entities of a view from the online store, and keep all later runs from writing them.

        ``view`` may be ``view@2``, or one that is no longer declared; all its versions with the same join keys lose them. Those
        with others do not have these entities: erase theirs by a version. ``entity_rows`` as for ``get_online_features``. With
        ``undo`` they may be published again, and are absent until ``materialize`` does so with ``everything``. Feature tables
        and sources are not touched. The registry keeps digests of the keys. Raises SFS-303 for an unknown view, SFS-606 and
        SFS-607 for unfit rows.
        """
        from spark_fs.online.erase import erase_entities, versions_alike

        same = versions_alike(self.registry.state(), *parse_reference(view))
        url, timeout = self.online_url(), self.environment.config.online.timeout_seconds
        return erase_entities(self.registry, same, entity_rows, url, undo=undo, socket_timeout_seconds=timeout)

    def get_online_features(
        self,
        features: Sequence[str] | str | FeatureService,
        entity_rows: Sequence[Mapping[str, Any]] | Mapping[str, Sequence[Any]],
        *,
        full_feature_names: bool = False,
    ) -> OnlineResponse:
        """The newest published values for each entity row, in one round trip; never starts Spark.

        What others apply meanwhile is seen after a second at the latest, what this store applies at once.
        """
        return self._reader.read(self._requests.resolve(features), entity_rows, full_feature_names=full_feature_names)

    def resolve_features(self, features: Sequence[str] | str | FeatureService) -> list[Selection]:
        """The views and features that a request names; InvalidError with every name that is not known."""
        return resolve(self.registry.state(), features)

    def online_url(self) -> str:
        """The online store's address; starts the embedded server if that is what the environment uses."""
        if self.environment.online_url != "embedded":
            return self.environment.online_url
        from spark_fs.online import server

        return server.start(self.environment.state_dir, port=self.environment.config.online.port).url

    def check_online(self) -> None:
        """Refuse an online store that cannot be reached or would drop values (SFS-601 to 604); starts no Spark."""
        from spark_fs.online.connect import check_server

        check_server(self.online_url(), socket_timeout_seconds=self.environment.config.online.timeout_seconds)

    def run(self, run_id: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """One run as the registry has it, and what it has published: table version, intervals, state, confirmed buckets."""
        found = self.registry.require_run(run_id)
        return found, [intent.to_json() for intent in self.registry.ledger.of_run(run_id)]

    def destroy(self, view: str, version: int | None = None) -> dict[str, Any]:
        """Delete the feature table and online values of a view version that is neither current nor used by a service."""
        from spark_fs.files import delete_folder, feature_table_path
        from spark_fs.online.codec import epoch_name, epoch_prefix, key_prefix
        from spark_fs.online.connect import delete_prefix, remove_key

        state = self.registry.state()
        newest = max((n for name, n in state.versions if name == view), default=None)
        spec = state.require_view(view, version or newest)
        refuse_in_use(state, spec)
        url, prefix = self.online_url(), key_prefix(spec)
        keys = sum(delete_prefix(url, epoch_prefix(prefix, epoch)) for epoch in self.registry.epochs(spec))
        remove_key(url, epoch_name(prefix))
        path = feature_table_path(self.environment.offline_root, spec)
        deleted = delete_folder(path)
        self.registry.forget_builds(spec)
        return {"view": spec.reference, "online_keys": keys, "feature_table": path if deleted else None}

    # What the methods above share.

    @cached_property
    def _reader(self) -> OnlineReader:
        from spark_fs.online.read import OnlineReader

        return OnlineReader(self.online_url(), socket_timeout_seconds=self.environment.config.online.timeout_seconds)

    @cached_property
    def _requests(self) -> RecentRequests:
        return RecentRequests(self.resolve_features)

    @cached_property
    def _offline(self) -> OfflineStore:
        from spark_fs.datasets.origins import OfflineStore

        environment = self.environment
        return OfflineStore(self.spark, self.registry, environment.offline_root, self._transform, environment.resolve)

    @cached_property
    def _repository(self) -> Repository:
        return self.load_repository()

    def _transform(self, view: ViewSpec) -> Callable[[DataFrame], DataFrame] | None:
        """The function of a view that has one, from the repository, if it is still the one that was applied."""
        if view.transformation is None or view.transformation.kind != "python":
            return None
        declared = self._repository.views.get(view.name)
        if declared is None or declared.transformation is None or declared.transformation.digest != view.transformation.digest:
            raise InvalidError.of(
                "SFS-405",
                f"The function of feature view '{view.reference}' is not the one that was applied.",
                why=f"It was applied from {view.transformation.function}; the registry keeps its text, but never runs it.",
                fix="apply the repository, or run where the repository is as it was applied",
            )
        return self._repository.functions[view.name]

    def _each(self, kind: str, views: Sequence[ViewSpec], act: Callable[[ViewSpec, str], list[R]]) -> list[R]:
        """Do one thing for each view, given the number of its run; failures are collected, each run is noted."""
        results: list[R] = []
        failures: list[SparkFSError] = []
        unfinished: list[dict[str, Any]] = []
        for number, view in enumerate(views):
            try:
                with self._run(kind, view.reference) as (run_id, done):
                    done += act(view, run_id)
                results += done
            except Exception as error:  # noqa: BLE001  # whatever stops one view must not stop the others
                failures.append(_of_view(view, error))
                unfinished.append(self._unfinished(view, "failed", failures[-1].code))
            except KeyboardInterrupt as error:
                unfinished.append(self._unfinished(view, "interrupted"))
                unfinished += [self._unfinished(left, "left") for left in views[number + 1 :]]
                raise InterruptedRunError(results, unfinished) from error
        problems = [problem for failure in failures for problem in failure.problems]
        if failures:
            raised = PartlyDoneError(*problems, results=results) if results else type(failures[0])(*problems)
            raised.unfinished = unfinished
            raise raised
        return results

    def _unfinished(self, view: ViewSpec, state: str, code: str = "") -> dict[str, Any]:
        """What a run tells of a view that it did not finish; buckets are those of its newest publication."""
        left = self.registry.ledger.unfinished(view)[-1:]
        buckets = (len(left[0].parts), left[0].buckets_left) if left else (None, None)
        told = dict(zip(("buckets_done", "buckets_left"), buckets, strict=True))
        return {"view": view.reference, "state": state, **told, "error": code or None}

    @contextmanager
    def _run(self, kind: str, subject: str) -> Iterator[tuple[str, list[Any]]]:
        """Note a run: gives its number, and a list into which the block puts its results."""
        run_id, done = uuid.uuid4().hex[:12], []  # type: tuple[str, list[Any]]
        self.registry.begin_run(run_id, kind, subject)
        try:
            yield run_id, done
        except BaseException as error:
            state = "failed" if isinstance(error, Exception) else "interrupted"
            self.registry.finish_run(run_id, state, {"error": str(translate(error) or type(error).__name__)})
            raise
        self.registry.finish_run(run_id, "done", {"results": [result.to_json() for result in done]})

    def _materialize(
        self, interval: Interval, views: Iterable[str] | None, budget: int | None, **how: bool
    ) -> list[MaterializeResult]:
        from spark_fs.materialize import materialize_view

        def publish(view: ViewSpec, run_id: str) -> list[MaterializeResult]:
            with self._lease(view, run_id):
                self._build_missing(view, interval)
                table, target = self._offline.table(view), self._target(view, budget)
                return [materialize_view(self.registry, table, target, interval, run_id=run_id, **how)]

        return self._each_online("materialize", views, publish)

    def _each_online(self, kind: str, views: Iterable[str] | None, act: Callable[[ViewSpec, str], list[R]]) -> list[R]:
        """As ``_each``, for views that are for online use, once the online store was looked at."""
        chosen = choose_views(self.registry.state(), views, online=True)
        self.check_online()
        return self._each(kind, chosen, act)

    def _lease(self, view: ViewSpec, run_id: str) -> AbstractContextManager[None]:
        return self.registry.ledger.held(view, run_id, self.environment.config.online.lease_wait_seconds)

    def _target(self, view: ViewSpec, max_rows_per_second: int | None = None) -> OnlineTarget:
        from spark_fs.online.redis_store import OnlineTarget

        online = self.environment.config.online
        budget = online.max_rows_per_second if max_rows_per_second is None else max_rows_per_second
        url, timeout = self.online_url(), online.timeout_seconds
        target = OnlineTarget.of(url, view, socket_timeout_seconds=timeout, max_rows_per_second=budget)
        return replace(target, wait_replicas=online.wait_replicas)

    def _build_missing(self, view: ViewSpec, interval: Interval) -> None:
        """Build all up to the interval's end if no build has covered some of the interval."""
        if missing(interval, self.registry.built(view)):
            self.build([view.reference], end=interval.end)

    def __repr__(self) -> str:
        return f"FeatureStore(project={self.project!r}, env={self.environment.name!r}, registry={self.registry!r})"

    def _repr_html_(self) -> str:
        state = self.registry.state()
        rows = "".join(
            f"<tr><td>{escape(v.reference)}</td><td>{escape(', '.join(v.key_names))}</td><td>{len(v.features)}</td>"
            f"<td>{escape(v.description)}</td></tr>"
            for v in state.views.values()
        )
        head = "<tr><th>feature view</th><th>join keys</th><th>features</th><th>description</th></tr>"
        return (
            f"<b>{escape(self.project)}</b> ({escape(self.environment.name)}), serial {state.serial}<table>{head}{rows}</table>"
        )


def _interval(start: datetime, end: datetime) -> Interval:
    try:
        return Interval(start, end)
    except ValueError as error:
        raise InvalidError.of("SFS-409", f"This is no interval: {error}.") from error


def _of_view(view: ViewSpec, error: Exception) -> SparkFSError:
    """The failure of one view among others, naming it."""
    ours = translate(error)
    if ours is None:
        fix = "the whole error is in the log; run the same command again to resume"
        ours = SparkFSError.of("SFS-701", "The job failed.", why=summary(error), fix=fix)
    prefix = f"{view.reference}: "  # there already where a step of the same view has failed
    named = (replace(problem, what=prefix + problem.what.removeprefix(prefix)) for problem in ours.problems)
    return type(ours)(*named)

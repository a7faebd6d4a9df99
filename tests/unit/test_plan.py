"""What an apply would do: which changes make a new version, what is printed, and what a plan file is good for."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from spark_fs.errors import ConflictError, InvalidError
from spark_fs.plan import Action, Plan, apply_plan, make_plan
from spark_fs.registry import Registry
from spark_fs.repo import Repository
from spark_fs.spec import Column, ServiceSpec, ServiceView, SourceSpec, TransformationSpec, ViewSpec
from spark_fs.types import Float64, Int64, String

SOURCE = SourceSpec("payments", "delta", "paid_at", path="data/payments")
USER = {"name": "user", "join_keys": [{"name": "user_id", "type": "int64"}], "description": "", "owner": "", "tags": {}}
VIEW = ViewSpec(
    project="shop",
    name="spending",
    version=0,
    entities=("user",),
    keys=(Column("user_id", Int64),),
    features=(Column("amount", Float64), Column("city", String)),
    source=SOURCE,
    ttl=timedelta(days=7),
    transformation=TransformationSpec("sql", "SELECT * FROM {source}", "d1"),
)
CHURN = ServiceSpec("churn", (ServiceView("spending"),))


def repository(*views: ViewSpec, services: tuple[ServiceSpec, ...] = (CHURN,), source: SourceSpec = SOURCE) -> Repository:
    return Repository(
        project="shop",
        entities={"user": USER},
        sources={source.name: source},
        views={view.name: view for view in views},
        services={service.name: service for service in services},
    )


@pytest.fixture
def registry(tmp_path) -> Registry:
    return Registry(f"sqlite:///{tmp_path}/registry.db", "shop")


@pytest.fixture
def apply(registry) -> Callable[[Repository], Plan]:
    """Plan and apply a repository; gives the plan."""

    def applied(declared: Repository) -> Plan:
        plan = make_plan(registry.state(), declared)
        apply_plan(plan, registry)
        return plan

    return applied


def steps(plan: Plan) -> list[tuple[str, str]]:
    return [(step.action.value, step.title) for step in plan.steps]


def test_a_first_plan_adds_everything_in_the_order_of_use(registry):
    """What is used comes before what uses it; views begin with version 1."""
    plan = make_plan(registry.state(), repository(VIEW))
    assert steps(plan) == [("+", "entity user"), ("+", "source payments"), ("+", "view spending@1"), ("+", "service churn")]
    assert plan.summary == "4 to add, 0 to change, 0 to replace, 0 to remove"


def test_after_an_apply_there_is_nothing_to_do(registry, apply):
    """A plan of the same repository is empty, false, and applying it moves nothing."""
    apply(repository(VIEW))
    plan = make_plan(registry.state(), repository(VIEW))
    assert not plan
    assert apply_plan(plan, registry) == 1
    assert registry.state().serial == 1
    assert "no changes" in str(plan)
    assert "no changes" in plan.to_markdown()


def test_planning_changes_nothing(registry):
    """However often it is done."""
    make_plan(registry.state(), repository(VIEW))
    assert registry.state().serial == 0
    assert registry.state().views == {}


NEW_VERSION = {
    "key type": (replace(VIEW, keys=(Column("user_id", String),)), "join key 'user_id': int64 → string"),
    "other key": (replace(VIEW, keys=(Column("payer_id", Int64),)), "join key 'payer_id' added (int64)"),
    "more features": (
        replace(VIEW, features=(*VIEW.features, Column("items", Int64))),
        "feature 'items' added (int64)",
    ),
    "fewer features": (replace(VIEW, features=VIEW.features[:1]), "feature 'city' removed"),
    "feature type": (
        replace(VIEW, features=(Column("amount", Int64), VIEW.features[1])),
        "feature 'amount': float64 → int64",
    ),
    "order of features": (replace(VIEW, features=VIEW.features[::-1]), "features reordered"),
    "transformation": (
        replace(VIEW, transformation=TransformationSpec("sql", "SELECT 2 FROM {source}", "d2")),
        "transformation changed",
    ),
    "no transformation": (replace(VIEW, transformation=None), "transformation removed"),
    "time column": (
        replace(VIEW, source=replace(SOURCE, timestamp_field="seen_at")),
        "source timestamp_field: paid_at → seen_at",
    ),
    "zone": (replace(VIEW, source=replace(SOURCE, timezone="Asia/Tokyo")), "source timezone: — → Asia/Tokyo"),
}


@pytest.mark.parametrize("case", NEW_VERSION)
def test_a_change_of_keys_schema_or_transformation_replaces_the_view(registry, apply, case):
    """``-/+`` with the reason, the cost and what depends on it; the old version stays readable."""
    changed, reason = NEW_VERSION[case]
    apply(repository(VIEW))
    plan = apply(repository(changed, source=changed.source))
    step = next(step for step in plan.steps if step.kind == "view")
    assert (step.action, step.title) == (Action.REPLACE, "view spending@2")
    assert reason in step.reasons
    assert "a new table is built from source 'payments'; spending@1 stays as it is" in step.reasons
    assert step.dependents == ("service churn keeps spending@1 until it is changed itself",)
    state = registry.state()
    assert state.views["spending"].version == 2
    assert state.require_view("spending", 1).features == VIEW.features


SAME_VERSION = {
    "description": (replace(VIEW, description="What they spend"), "description: — → What they spend"),
    "owner": (replace(VIEW, owner="me"), "owner: — → me"),
    "tags": (replace(VIEW, tags={"team": "growth"}), "tags.team: — → growth"),
    "ttl": (replace(VIEW, ttl=timedelta(days=1)), "ttl_seconds: 604800.0 → 86400.0"),
    "online": (replace(VIEW, online=False), "online: True → False"),
    "path": (replace(VIEW, source=replace(SOURCE, path="moved")), "source.path: data/payments → moved"),
}


@pytest.mark.parametrize("case", SAME_VERSION)
def test_a_change_of_anything_else_changes_the_view_in_place(registry, apply, case):
    """``~`` with the old and the new value; the version stays, its content is the new one."""
    changed, reason = SAME_VERSION[case]
    apply(repository(VIEW))
    plan = apply(repository(changed, source=changed.source))
    step = next(step for step in plan.steps if step.kind == "view")
    assert (step.action, step.title, step.reasons) == (Action.CHANGE, "view spending@1", (reason,))
    assert registry.state().views == {"spending": replace(changed, version=1)}
    assert registry.state().services["churn"].views[0].version == 1


def test_a_change_of_ttl_names_the_services_that_it_reaches(apply):
    """It changes what they read, at once and without a new version."""
    apply(repository(VIEW))
    plan = apply(repository(replace(VIEW, ttl=None)))
    assert any("churn" in dependent for dependent in plan.steps[0].dependents)


def test_a_change_of_a_source_or_entity_names_the_views_that_use_it(apply):
    """The reader sees how far it reaches."""
    apply(repository(VIEW))
    moved = replace(SOURCE, path="moved")
    plan = apply(repository(replace(VIEW, source=moved), source=moved))
    assert [(s.title, s.dependents) for s in plan.steps if s.kind == "source"] == [("source payments", ("view spending@1",))]
    declared = repository(replace(VIEW, source=moved), source=moved)
    plan = apply(replace(declared, entities={"user": {**USER, "owner": "me"}}))
    assert [(s.action, s.reasons, s.dependents) for s in plan.steps] == [
        (Action.CHANGE, ("owner: — → me",), ("view spending@1",))
    ]


def test_going_back_to_an_old_definition_makes_a_new_version(registry, apply):
    """Numbers are never used twice: the table of version 1 may be long behind."""
    for view in (VIEW, replace(VIEW, transformation=None), VIEW):
        apply(repository(view))
    assert registry.state().views["spending"].version == 3


def test_a_removed_view_that_comes_back_gets_the_next_number(registry, apply):
    """Its old table may still be there."""
    apply(repository(VIEW))
    plan = apply(repository(services=()))
    assert [step for step in steps(plan) if "spending" in step[1]] == [("-", "view spending@1")]
    apply(repository(VIEW))
    assert registry.state().views["spending"].version == 2


def test_removals_come_last_and_users_before_what_they_use(apply):
    """The reverse of the order of additions."""
    apply(repository(VIEW))
    plan = apply(Repository("shop", {}, {}, {}, {}))
    assert steps(plan) == [("-", "service churn"), ("-", "view spending@1"), ("-", "source payments"), ("-", "entity user")]


def test_a_removal_is_from_the_current_definitions_only(registry, apply):
    """A removed view's versions stay readable, for datasets that were made of them."""
    apply(repository(VIEW))
    apply(repository(services=()))
    state = registry.state()
    assert state.views == {}
    assert state.require_view("spending", 1).name == "spending"
    with pytest.raises(InvalidError, match="SFS-303"):
        state.require_view("spending")


def test_a_view_that_a_service_still_uses_cannot_be_removed(registry, apply):
    """SFS-304 names both; nothing changes."""
    apply(repository(VIEW))
    with pytest.raises(InvalidError, match=r"SFS-304.*'spending' was removed, but service 'churn' uses it"):
        apply(repository())
    assert registry.state().serial == 1


def test_a_service_keeps_its_versions_until_it_is_changed_itself(registry, apply):
    """Then it moves to the current ones, and the plan says so."""
    apply(repository(VIEW))
    two = replace(VIEW, features=(*VIEW.features, Column("items", Int64)))
    apply(repository(two))
    assert registry.state().services["churn"].views[0].version == 1
    apply(repository(two))
    assert registry.state().services["churn"].views[0].version == 1
    changed = replace(CHURN, description="Will they leave?")
    plan = apply(repository(two, services=(changed,)))
    assert steps(plan) == [("~", "service churn")]
    assert "spending@1 → spending@2" in plan.steps[0].reasons
    assert registry.state().services["churn"].views[0].version == 2


def test_a_service_changed_with_its_view_moves_with_it(registry, apply):
    """In one plan: the view's step says where the service goes."""
    apply(repository(VIEW))
    two = replace(VIEW, features=(*VIEW.features, Column("items", Int64)))
    plan = apply(repository(two, services=(replace(CHURN, owner="me"),)))
    assert plan.steps[0].dependents == ("service churn moves to spending@2",)
    assert registry.state().services["churn"].views[0].version == 2


# How a plan is shown.


@pytest.fixture
def every_action(apply, registry) -> Plan:
    """A plan with an addition, a change, a replacement and a removal."""
    other = replace(VIEW, name="visits")
    apply(repository(VIEW, other, replace(VIEW, name="gone")))
    return make_plan(
        registry.state(),
        repository(
            replace(VIEW, features=VIEW.features[:1]),
            replace(
                other,
                description="How often | and\nwhen",
                transformation=TransformationSpec("sql", "SELECT *\nFROM {source}", "d1"),
            ),
            replace(VIEW, name="fresh"),
        ),
    )


def test_the_text_shows_sign_object_reasons_and_dependents(every_action):
    """One block per step, and a summary at the end."""
    lines = str(every_action).splitlines()
    assert lines[0] == "Project shop, registry serial 1:"
    assert "    + view fresh@1" in lines
    assert "    ~ view visits@1" in lines
    assert "    - view gone@1" in lines
    place = lines.index("  -/+ view spending@2")
    assert lines[place + 1].strip() == "feature 'city' removed"
    assert lines[place + 3].strip() == "→ service churn keeps spending@1 until it is changed itself"
    assert lines[-1] == "Plan: 1 to add, 1 to change, 1 to replace, 1 to remove."


def test_the_markdown_is_one_table_row_per_step(every_action):
    """Whatever stands in descriptions and transformations: four cells, one line."""
    table = [line for line in every_action.to_markdown().splitlines() if line.startswith("|")]
    rows = every_action.to_markdown().splitlines()[4:]
    assert table[1] == "|---|---|---|---|"
    assert len(rows) == len(every_action.steps)
    assert all(row.startswith("| `") and row.replace(r"\|", "").count("|") == 5 for row in rows)


def test_the_json_reads_back_as_the_same_plan(every_action):
    """Through real text; it names the steps a program looks for."""
    text = json.dumps(every_action.to_json())
    assert Plan.from_json(json.loads(text)) == every_action
    assert {step["action"] for step in json.loads(text)["steps"]} == {"+", "~", "-", "-/+"}


def test_a_notebook_shows_the_text_escaped(every_action):
    """A description cannot smuggle markup in."""
    assert every_action._repr_html_().startswith("<pre>Project shop")
    assert "<script>" not in replace(every_action, project="<script>")._repr_html_()


def test_no_secret_is_in_a_plan(registry, monkeypatch):
    """A reference to one is shown as it is written, its value nowhere."""
    monkeypatch.setenv("DB_PASSWORD", "hunter2")
    source = SourceSpec("payments", "spark", "paid_at", format="jdbc", options={"password": "${DB_PASSWORD}"})
    plan = make_plan(registry.state(), repository(replace(VIEW, source=source), source=source))
    apply_plan(plan, registry)
    shown = f"{plan} {plan.to_markdown()} {plan!r} {json.dumps(plan.to_json())} {registry.state()}"
    assert "hunter2" not in shown
    assert "${DB_PASSWORD}" in shown


# A plan as a file.


def test_a_plan_from_a_file_does_exactly_what_it_shows(registry):
    """The registry afterwards matches the repository it was made from."""
    plan = Plan.from_json(json.loads(json.dumps(make_plan(registry.state(), repository(VIEW)).to_json())))
    assert apply_plan(plan, registry) == 1
    assert not make_plan(registry.state(), repository(VIEW))
    assert registry.history()[0]["summary"] == plan.summary


def test_a_stale_plan_changes_nothing(registry, apply):
    """SFS-305, exit code 6: somebody applied since it was made; the fix is to plan again."""
    stale = make_plan(registry.state(), repository(VIEW))
    apply(repository(replace(VIEW, owner="somebody else")))
    before = registry.state()
    with pytest.raises(ConflictError, match=r"SFS-305.*planned against serial 0.*Fix: plan again") as caught:
        apply_plan(stale, registry)
    assert caught.value.exit_code == 6
    assert registry.state() == before
    assert len(registry.history()) == 1


def test_a_plan_cannot_be_applied_twice(registry):
    """The first apply makes it stale."""
    plan = make_plan(registry.state(), repository(VIEW))
    apply_plan(plan, registry)
    with pytest.raises(ConflictError, match="SFS-305"):
        apply_plan(plan, registry)


def test_a_plan_of_another_project_is_refused(registry, tmp_path):
    """SFS-309, also where both share a database and a serial."""
    other = Registry(f"sqlite:///{tmp_path}/registry.db", "bank")
    with pytest.raises(InvalidError, match=r"SFS-309.*project 'shop', not 'bank'"):
        apply_plan(make_plan(registry.state(), repository(VIEW)), other)
    assert other.state().serial == registry.state().serial == 0


EDITS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "serial": lambda plan: {**plan, "serial": 7},
    "project": lambda plan: {**plan, "project": "bank"},
    "step left out": lambda plan: {**plan, "steps": plan["steps"][1:]},
    "order": lambda plan: {**plan, "steps": plan["steps"][::-1]},
    "body": lambda plan: {**plan, "steps": [{**plan["steps"][0], "body": {}}, *plan["steps"][1:]]},
    "checksum": lambda plan: {**plan, "checksum": "0" * 64},
    "no checksum": lambda plan: {name: value for name, value in plan.items() if name != "checksum"},
    "newer format": lambda plan: {**plan, "format": 2},
    "empty": lambda _: {},
    "list": lambda _: [],
    "text": lambda _: "plan",
    "null": lambda _: None,
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_plan_is_refused(registry, edit):
    """SFS-308, exit code 2, whatever was changed; so is JSON that is no plan at all."""
    document = make_plan(registry.state(), repository(VIEW)).to_json()
    with pytest.raises(InvalidError, match="SFS-308") as caught:
        Plan.from_json(EDITS[edit](document))
    assert caught.value.exit_code == 2

"""Specs: their JSON, what makes a new version, and selections of features."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spark_fs.errors import InvalidError
from spark_fs.spec import (
    Column,
    ServiceSpec,
    ServiceView,
    SourceSpec,
    TransformationSpec,
    ViewSpec,
    canonical_json,
    merge_selections,
    output_names,
    select,
)
from spark_fs.types import Array, Decimal, Embedding, Float64, Int64, String, Timestamp

texts = st.text(max_size=12)
mappings = st.dictionaries(texts, texts, max_size=3)
columns = st.builds(Column, texts, st.sampled_from([Int64, String, Timestamp, Decimal(10, 2), Array(String), Embedding(3)]))
sources = st.builds(
    SourceSpec,
    texts,
    st.sampled_from(["delta", "file", "spark"]),
    texts,
    created_timestamp_field=st.none() | texts,
    field_mapping=mappings,
    timezone=st.none() | texts,
    path=st.none() | texts,
    table=st.none() | texts,
    query=st.none() | texts,
    format=st.none() | texts,
    options=mappings,
)
transformations = st.builds(TransformationSpec, st.sampled_from(["sql", "python"]), texts, texts, st.none() | texts)
views = st.builds(
    ViewSpec,
    project=texts,
    name=texts,
    version=st.integers(0, 99),
    entities=st.lists(texts, max_size=3).map(tuple),
    keys=st.lists(columns, max_size=3).map(tuple),
    features=st.lists(columns, max_size=3).map(tuple),
    source=sources,
    ttl=st.none() | st.timedeltas(timedelta(microseconds=1), timedelta(days=36_500)),
    transformation=st.none() | transformations,
    online=st.booleans(),
    description=texts,
    owner=texts,
    tags=mappings,
)
uses = st.builds(ServiceView, texts, st.integers(0, 9), st.lists(texts, max_size=3).map(tuple), st.none() | texts, mappings)
services = st.builds(ServiceSpec, texts, st.lists(uses, max_size=3).map(tuple), texts, texts, mappings)

VIEW = ViewSpec(
    project="shop",
    name="spending",
    version=3,
    entities=("user",),
    keys=(Column("user_id", Int64),),
    features=(Column("amount", Float64), Column("city", String)),
    source=SourceSpec("payments", "file", "paid_at", "loaded_at", path="payments.csv", format="csv"),
    ttl=timedelta(days=7),
    transformation=TransformationSpec("sql", "SELECT * FROM {source}", "d1"),
)


@settings(deadline=None)  # a busy machine is no failure
@given(views)
def test_a_view_reads_back_from_its_json(view):
    """Through real JSON text; hashes are equal too."""
    again = ViewSpec.from_json(json.loads(canonical_json(view.to_json())))
    assert again == view
    assert (again.definition_hash, again.content_hash) == (view.definition_hash, view.content_hash)


@settings(deadline=None)  # a busy machine is no failure
@given(services)
def test_a_service_reads_back_from_its_json(service):
    """Through real JSON text; the declared hash is equal too."""
    again = ServiceSpec.from_json(json.loads(canonical_json(service.to_json())))
    assert again == service
    assert again.declared_hash == service.declared_hash


@settings(deadline=None)  # a busy machine is no failure
@given(mappings)
def test_canonical_json_is_equal_for_equal_content(mapping):
    """The order in which keys were added leaves no trace."""
    assert canonical_json(dict(reversed(mapping.items()))) == canonical_json(mapping)


@pytest.mark.parametrize(
    "changed",
    [
        replace(VIEW, keys=(Column("user_id", String),)),
        replace(VIEW, keys=(Column("account_id", Int64),)),
        replace(VIEW, features=(Column("amount", Float64),)),
        replace(VIEW, features=(Column("amount", Decimal(10, 2)), Column("city", String))),
        replace(VIEW, features=tuple(reversed(VIEW.features))),
        replace(VIEW, transformation=None),
        replace(VIEW, transformation=TransformationSpec("sql", "SELECT 1 FROM {source}", "d2")),
        replace(VIEW, source=replace(VIEW.source, timestamp_field="seen_at")),
        replace(VIEW, source=replace(VIEW.source, created_timestamp_field=None)),
        replace(VIEW, source=replace(VIEW.source, timezone="America/New_York")),
        replace(VIEW, source=replace(VIEW.source, field_mapping={"amt": "amount"})),
    ],
)
def test_what_values_depend_on_makes_another_definition(changed):
    """Keys, schema and its order, transformation, time columns and renamed columns."""
    assert changed.definition_hash != VIEW.definition_hash
    assert changed.content_hash != VIEW.content_hash


@pytest.mark.parametrize(
    "changed",
    [
        replace(VIEW, description="new"),
        replace(VIEW, owner="new"),
        replace(VIEW, tags={"team": "new"}),
        replace(VIEW, ttl=None),
        replace(VIEW, online=False),
        replace(VIEW, source=replace(VIEW.source, path="moved.csv")),
        replace(VIEW, transformation=TransformationSpec("sql", "SELECT *\nFROM {source}", "d1")),
    ],
)
def test_what_values_do_not_depend_on_is_the_same_definition(changed):
    """Description, owner, tags, ttl, a moved source, the layout of a transformation: changed, but no new version."""
    assert changed.definition_hash == VIEW.definition_hash
    assert changed.content_hash != VIEW.content_hash


def test_hashes_stay_the_same_from_release_to_release():
    """Otherwise an upgrade would give every view a new version: change these values only with a migration."""
    assert VIEW.definition_hash == "771fcb7ffd304a469a070f7928005d37ca7dc324c0d8a4291f34265e57cf8c72"
    assert VIEW.content_hash == "84746d5131f89295681db346ff0b436dc2fd065579821941cdec5bd9f6d531a4"


def test_the_version_is_no_content():
    """A declared view, which has version 0, equals the applied one."""
    assert replace(VIEW, version=0).content_hash == VIEW.content_hash
    assert VIEW.reference == "spending@3"


def test_a_services_declaration_does_not_hold_the_versions():
    """Only what the user wrote decides whether it is pinned anew."""
    declared = ServiceSpec("churn", (ServiceView("spending", 0, ("amount",)),))
    applied = ServiceSpec("churn", (ServiceView("spending", 3, ("amount",)),))
    other = ServiceSpec("churn", (ServiceView("spending", 3, ("city",)),))
    assert declared.declared_hash == applied.declared_hash != other.declared_hash


def test_a_selection_without_features_has_all_in_declared_order():
    """And one with features keeps the order asked for."""
    assert select(VIEW).features == ("amount", "city")
    chosen = select(VIEW, ["city", "amount"], "s", {"user_id": "payer_id"})
    assert [column.type for column in chosen.columns] == [String, Float64]
    assert chosen.spine_keys == ("payer_id",)


def test_a_selection_names_all_that_the_view_does_not_have():
    """Unknown features and unknown keys, each with the closest known one."""
    with pytest.raises(InvalidError) as caught:
        select(VIEW, ["amuont", "city", "zip"], join_key_map={"usr_id": "payer_id"})
    assert [problem.code for problem in caught.value.problems] == ["SFS-501", "SFS-501", "SFS-502"]
    message = str(caught.value)
    assert "Did you mean 'amount'?" in message
    assert "Did you mean 'user_id'?" in message


def test_selections_of_one_view_are_joined_once():
    """Features add up in the order asked for, without doubles; another alias, key map or version stays apart."""
    merged = merge_selections(
        [select(VIEW, ["city"]), select(VIEW, ["amount", "city"]), select(VIEW, ["city"], "other"),
         select(VIEW, ["city"], join_key_map={"user_id": "payer_id"}), select(replace(VIEW, version=2), ["city"])]
    )  # fmt: skip
    assert [s.features for s in merged] == [("city", "amount"), ("city",), ("city",), ("city",)]


def test_output_columns_are_features_or_carry_the_alias():
    """``alias__feature`` with full names."""
    selections = [select(VIEW, ["amount"]), select(VIEW, ["amount"], "payer")]
    full = output_names(selections, full_feature_names=True)
    assert full == {(0, "amount"): "spending__amount", (1, "amount"): "payer__amount"}
    assert output_names(selections[:1], full_feature_names=False) == {(0, "amount"): "amount"}


def test_clashing_output_columns_are_refused_with_their_owners():
    """Between two features, and with a column of the entity DataFrame; all are named."""
    selections = [select(VIEW), select(VIEW, ["amount"], "payer")]
    with pytest.raises(InvalidError) as caught:
        output_names(selections, full_feature_names=False, taken=["city", "user_id"])
    assert [problem.code for problem in caught.value.problems] == ["SFS-503", "SFS-503"]
    message = str(caught.value)
    assert "'amount' is claimed by spending:amount and payer:amount" in message
    assert "'city' is claimed by the entity DataFrame and spending:city" in message

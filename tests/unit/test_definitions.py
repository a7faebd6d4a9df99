"""Definitions as Python objects: what is refused at once, and what a repository collects instead."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
from pydantic import ValidationError

import spark_fs
from spark_fs import Array, DeltaSource, Entity, FeatureService, FeatureView, Field, FileSource, Float64, Int64, String
from spark_fs.definitions import collecting
from spark_fs.errors import InvalidError

USER = Entity("user", [Field("user_id", Int64)])
SOURCE = DeltaSource("payments", path="payments", timestamp_field="paid_at")


def view(**changes) -> FeatureView:
    arguments = {"name": "spending", "entities": [USER], "schema": [Field("amount", Float64)], "source": SOURCE}
    return FeatureView(**{**arguments, **changes})


def test_leading_arguments_may_be_positional():
    """In the order in which people say them."""
    spending = FeatureView("spending", [USER], [Field("amount", Float64)], SOURCE, ttl=timedelta(days=7))
    assert (spending.name, spending.entities, spending.source) == ("spending", (USER,), SOURCE)
    assert spending.ttl == timedelta(days=7)


def test_a_single_entity_or_field_needs_no_list():
    """A view of one entity and one feature is the usual case."""
    assert FeatureView("spending", USER, Field("amount", Float64), SOURCE).entities == (USER,)


def test_a_type_may_be_written_as_text():
    """As it is stored."""
    assert Field("tags", "array<string>").dtype == Array(String)


def test_a_definition_cannot_be_changed():
    """It is a value: what was checked stays so."""
    with pytest.raises(ValidationError):
        USER.name = "other"


def test_too_many_positional_arguments_are_a_type_error():
    """As with any Python call."""
    with pytest.raises(TypeError, match="positional arguments"):
        Entity("user", [Field("user_id", Int64)], "A customer")


def test_an_argument_given_twice_is_a_type_error():
    """As with any Python call: one of the two would be lost in silence."""
    with pytest.raises(TypeError, match="name"):
        Entity("user", name="customer", join_keys=[Field("user_id", Int64)])


def test_an_unknown_argument_names_the_closest_one_with_file_and_line():
    """SFS-102, and the file is the user's, not ours."""
    with pytest.raises(InvalidError) as caught:
        view(descripton="A typo")
    (problem,) = caught.value.problems
    assert problem.code == "SFS-102"
    assert "Did you mean 'description'?" in problem.why
    assert problem.where.startswith(f"{__file__}:")


@pytest.mark.parametrize(
    ("make", "argument"),
    [
        (lambda: Field("amount", "int46"), "dtype"),
        (lambda: Field("amount", int), "dtype"),
        (lambda: Field(7, Int64), "name"),
        (lambda: Entity("user"), "join_keys"),
        (lambda: Entity("user", ["user_id"]), "join_keys.0"),
        (lambda: view(ttl="a week"), "ttl"),
        (lambda: view(transformation=5), "transformation"),
        (lambda: view(tags={"team": 5}), "tags.team"),
        (lambda: FileSource("f", path="x", timestamp_field="t", format="xlsx"), "format"),
        (lambda: FeatureService("churn", []), "features"),
        (lambda: FeatureService("churn", "spending"), "features"),
    ],
)
def test_a_wrong_argument_is_refused_by_name(make, argument):
    """SFS-101 names the definition's argument; exit code 2."""
    with pytest.raises(InvalidError) as caught:
        make()
    problem = caught.value.problems[0]
    assert problem.code == "SFS-101"
    assert argument in problem.what
    assert caught.value.exit_code == 2


def test_all_wrong_arguments_of_a_definition_come_together():
    """One run shows them all."""
    with pytest.raises(InvalidError) as caught:
        view(ttl="a week", online="maybe", colour="red")
    assert len(caught.value.problems) == 3


def test_a_reference_to_a_view_narrows_renames_and_maps_keys():
    """In any order, each step leaving the view itself as it was."""
    spending = view()
    one = spending[["amount"]].with_name("payer").with_join_key_map({"user_id": "payer_id"})
    other = spending.with_join_key_map({"user_id": "payer_id"}).with_name("payer")["amount"]
    assert one == other
    assert (one.view, one.features, one.alias) == ("spending", ("amount",), "payer")
    assert spending.with_name("x").join_key_map == {}


def test_a_service_takes_views_and_references():
    """A whole view stands for all its features."""
    service = FeatureService("churn", [view(), view(name="other")[["amount"]]])
    assert [(item.view, item.features) for item in service.features] == [("spending", None), ("other", ("amount",))]


def test_while_collecting_a_wrong_argument_is_a_problem_and_the_name_stays_known():
    """So what refers to it is not blamed too; fields alone are no definitions."""
    with collecting() as collected:
        user = Entity("user", [Field("user_id", Int64)], colour="red")
        spending = FeatureView("spending", user, [Field("amount", "int46")], SOURCE)
    assert [problem.code for problem in collected.problems] == ["SFS-102", "SFS-101"]
    assert [definition.name for definition in collected.definitions] == ["user", "spending"]
    assert user.rejected
    assert not spending.rejected


def test_collecting_ends_with_its_block():
    """Afterwards wrong arguments are refused at once again."""
    with collecting() as collected:
        pass
    with pytest.raises(InvalidError):
        Entity("user", colour="red")
    assert collected.definitions == []


def test_the_line_is_the_users_also_beside_the_package():
    """A project folder whose path merely begins like the package's is still the user's."""
    file = f"{Path(spark_fs.__file__).parent}_demo/feature_repo/views.py"
    names = {"Entity": Entity, "Field": Field, "Int64": Int64}
    exec(compile("\n\nuser = Entity('user', [Field('user_id', Int64)])\n", file, "exec"), names)  # noqa: S102  # our own text
    assert names["user"].where == f"{file}:3"

"""What a saved dataset says of itself: a frozen pydantic model, and so a JSON Schema (docs/manifest.schema.json)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from spark_fs.errors import InvalidError

#: The column that tells a row's part of the split; null for rows of none.
SPLIT = "split"
#: The form of manifests that this release writes and reads.
FORMAT: Literal[2] = 2

Role = Literal["spine", "label", "feature", "split"]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ColumnInfo(_Part):
    """One column of a dataset."""

    name: str
    type: str = Field(description="Spark's name of the type")
    role: Role
    nulls: int


class SpineInfo(_Part):
    """The entity DataFrame. Its rows are in the dataset itself."""

    source: str
    columns: tuple[str, ...]
    rows: int
    checksum: str = Field(description="of its columns alone")


class FeatureInfo(_Part):
    """One feature and the column that holds it."""

    feature: str
    column: str


class OriginInfo(_Part):
    """A view of the request, and where its rows were taken from: a version of its feature table, or its source."""

    alias: str
    view: str = Field(description="name@version")
    definition_hash: str
    join_keys: Mapping[str, str] = Field(description="the view's key → the spine's column")
    features: tuple[FeatureInfo, ...]
    table: str | None = Field(description="the feature table; null: computed from the source")
    table_version: int | None
    source: str
    source_state: str | None = Field(description="which state of the source; null where that cannot be told")


class TimeRule(_Part):
    """What counts as visible at a row's time."""

    upper_bound: Literal["inclusive"] = "inclusive"
    lower_bound: Literal["inclusive"] = "inclusive"
    known_at: bool
    ties: str = "event_timestamp, created_timestamp, row hash"


class SplitInfo(_Part):
    """The rule of the split, settled, and how many rows each part has; ``none``: rows of no part."""

    rule: Mapping[str, Any]
    rows: Mapping[str, int]
    none: int


class Manifest(_Part):
    """All that is known of one version of a dataset."""

    format: Literal[2] = FORMAT
    project: str
    name: str
    version: int
    path: str
    delta_version: int | None = Field(None, description="null in the commit itself, which is that version")
    save_id: str
    created_at: str
    description: str
    tags: Mapping[str, str]
    rows: int
    checksum: str = Field(description="sum over all rows of a 64-bit hash of the row, modulo 2^64, as 16 hexadecimal digits")
    columns: tuple[ColumnInfo, ...]
    spine: SpineInfo
    origins: tuple[OriginInfo, ...]
    full_feature_names: bool
    time_rule: TimeRule
    split: SplitInfo | None
    report: Mapping[str, Any]
    packages: Mapping[str, str]

    @property
    def reference(self) -> str:
        """``name@version``."""
        return f"{self.name}@{self.version}"

    @property
    def features(self) -> tuple[str, ...]:
        """``view@version:feature`` of each feature, in the order of their columns."""
        return tuple(f"{origin.view}:{feature.feature}" for origin in self.origins for feature in origin.features)

    @property
    def committed(self) -> int:
        """The version of the Delta table that has the rows; every manifest has it that was read from there."""
        assert self.delta_version is not None
        return self.delta_version

    def columns_of(self, *roles: Role) -> tuple[str, ...]:
        """The names of the columns that play one of these roles, in order."""
        return tuple(column.name for column in self.columns if column.role in roles)

    def to_json(self) -> dict[str, Any]:
        """The manifest as JSON values."""
        return self.model_dump(mode="json")

    @property
    def identity(self) -> dict[str, Any]:
        """What two saves of the same have in common: all but when, where, as which version and by what they were made."""
        made = {"version", "path", "delta_version", "save_id", "created_at", "packages"}
        return {name: value for name, value in self.to_json().items() if name not in made}


def read_manifest(body: Mapping[str, Any]) -> Manifest:
    """The manifest that ``to_json`` has given; InvalidError SFS-516 for one of another format."""
    try:
        return Manifest.model_validate(body)
    except ValidationError as error:
        named = f"{body.get('name')}@{body.get('version')}"
        raise InvalidError.of(
            "SFS-516",
            f"The manifest of dataset '{named}' cannot be read.",
            why=f"Its format is {body.get('format')}; this release reads {FORMAT}. {error.error_count()} fields do not fit.",
            fix="save the dataset again, or open it with the release that saved it",
        ) from None

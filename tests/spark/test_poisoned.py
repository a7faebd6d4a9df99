"""A row that cannot be written, from the source to what a person reads: the entity is named there."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyspark.sql import SparkSession

from jobs.materialize import main
from spark_fs.errors import ExitCode
from spark_fs.online import server
from tests.project import open_project, write

END = datetime.now(timezone.utc).replace(minute=0, second=0, microsecond=0)
DOCUMENTS = """
    user = Entity("user", [Field("user_id", String)])
    views = [
        FeatureView(name, user, [Field("document", Bytes)],
                    FileSource(f"{name}_rows", path=f"data/{name}", timestamp_field="at"))
        for name in ("letters", "books")
    ]
"""
ROWS = pa.schema([("user_id", pa.string()), ("at", pa.timestamp("us", tz="UTC")), ("document", pa.binary())])


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """The folder of a project whose embedded server is stopped afterwards."""
    yield tmp_path
    server.stop(tmp_path / ".spark_fs")


def put(folder: Path, source: str, sizes: dict[str, int], at: datetime) -> None:
    """Make documents of these sizes, by user, all that the source holds."""
    write(folder / "data" / source / "_SUCCESS", "")
    columns = [list(sizes), [at] * len(sizes), [b"x" * size for size in sizes.values()]]
    table = pa.table([pa.array(values, field.type) for values, field in zip(columns, ROWS, strict=True)], schema=ROWS)
    pq.write_table(table, folder / "data" / source / "part.parquet")


@pytest.mark.parametrize("published", [False, True], ids=["read in place", "compared"])
def test_a_person_reads_which_entity_is_at_fault(
    folder: Path, spark: SparkSession, capsys: pytest.CaptureFixture[str], published: bool
) -> None:
    """A value over 512 KB in an executor: exit code 7, the other view is done; alone it is exit code 2."""
    fs = open_project(folder, DOCUMENTS, spark)
    fs.apply()
    before = END - timedelta(days=2)
    arguments = ["--repo", str(folder), "--env", "test", "--end", END.isoformat(), "--output", "json"]
    if published:
        for source in ("letters", "books"):
            put(folder, source, {"ada": 10, "bob": 10}, before)
        assert main(arguments) == ExitCode.OK
    put(folder, "letters", {"ada": 10, "bob": 20}, before)
    put(folder, "books", {"ada": 10, "bob": 600_000, "cy": 20}, before)
    fs.build(start=before, end=END)
    capsys.readouterr()
    assert main(arguments) == ExitCode.PARTLY_DONE
    shown = capsys.readouterr()
    assert "[SFS-608] books@1: The value of entity 'bob' takes 600,0" in shown.err
    assert "1 of " in shown.err
    assert "Fix: keep large values elsewhere" in shown.err
    assert '"view": "letters@1"' in shown.out
    assert main([*arguments, "--view", "books"]) == ExitCode.INVALID

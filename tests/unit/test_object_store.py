"""Files of feature tables by ``s3a://``, as builds write and joins read them, against a server that speaks S3. No Spark."""

from __future__ import annotations

import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import write_deltalake

from spark_fs.files import create_file, delete_file, delete_folder, listing_digest, open_file, write_text
from spark_fs.offline.layout import read_layout
from spark_fs.spec import Column
from spark_fs.types import Int64
from tests.table_files import EVENT, INSTANT, join, residues, scan

ID = Column("id", Int64)


def test_files_come_and_go(s3: str) -> None:
    """Written whole, listed, read at any place, deleted; what is not there is told apart from what is."""
    assert listing_digest(f"{s3}/notes") is None
    write_text(f"{s3}/notes/a.json", "one")
    first = listing_digest(f"{s3}/notes")
    write_text(f"{s3}/notes/a.json", "second")
    assert first is not None
    assert listing_digest(f"{s3}/notes") not in (None, first)
    with open_file(f"{s3}/notes/a.json") as stream:
        stream.seek(3)
        assert stream.read() == b"ond"
    with create_file(f"{s3}/notes/deeper/b") as stream:
        stream.write(b"rows")
    delete_file(f"{s3}/notes/deeper/b")
    delete_file(f"{s3}/notes/deeper/b")
    with pytest.raises(FileNotFoundError):
        open_file(f"{s3}/notes/deeper/b")
    assert delete_folder(f"{s3}/notes")
    assert not delete_folder(f"{s3}/notes")
    assert listing_digest(f"{s3}/notes") is None


def test_a_join_reads_a_delta_table_where_it_lies(s3: str) -> None:
    """The log is read by delta-rs, the files by Arrow; both know Hadoop's name of the scheme."""
    rows = pa.table(
        {
            "id": pa.array([1, 1, 2, 3]),
            EVENT: pa.array([10, 20, 10, 30], INSTANT),
            "created_timestamp": pa.array([None] * 4, INSTANT),
            "value": pa.array([1.0, 2.0, 3.0, 4.0]),
        }
    )
    buckets = pa.array(residues(rows, [ID], 2), pa.int32())
    numbered = pa.field("_bucket", pa.int32(), metadata={"buckets": "2"})
    path = f"{s3}/offline/shop/spend/v1"
    write_deltalake(path, rows.append_column(numbered, buckets), partition_by=["_bucket"])
    version, layout, why = read_layout(path)
    assert (version, why) == (0, "")
    assert layout is not None
    assert all(file.path.startswith(f"{path}/_bucket=") for file in layout.files)
    spine = pa.table({"id": pa.array([1, 2, 3, 4]), EVENT: pa.array([15, 15, 15, 15], INSTANT)})
    joined = join(spine, [scan(layout.files, {"id": "id"}, {"value": pa.float64()}, 2)], [ID])
    assert dict(zip(joined["id"].to_pylist(), joined["0"].to_pylist(), strict=True)) == {1: 1.0, 2: 3.0, 3: None, 4: None}


def test_a_store_that_cannot_be_reached_is_told_with_its_cause(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that ``explain`` says why the window was taken."""
    monkeypatch.delenv("AWS_ALLOW_HTTP")
    version, layout, why = read_layout(f"{s3}/offline/shop/spend/v1")
    assert (version, layout) == (None, None)
    assert why.startswith("files by s3a:// cannot be opened without Spark: ")
    assert why.endswith("URL scheme is not allowed")
    assert "\x1b" not in why


def test_the_server_is_no_part_of_this_machine(s3: str) -> None:
    """A check of the check: nothing was written to a local folder of that name."""
    with create_file(f"{s3}/seen.parquet") as stream:
        pq.write_table(pa.table({"a": [1]}), stream)
    assert not os.path.exists(s3)

"""Paths and plain files, local or by URI, and where feature tables lie. Needs neither Spark nor Delta."""

from __future__ import annotations

import hashlib
import re
from contextlib import suppress
from pathlib import PurePosixPath

import pyarrow
from pyarrow import fs

from spark_fs.spec import ViewSpec

#: Hadoop's names of S3, which Arrow does not know.
_SCHEMES = {"s3a": "s3", "s3n": "s3"}
#: URIs as Hadoop also takes them, such as file:/data.
_ONE_SLASH = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")


def feature_table_path(root: str, view: ViewSpec) -> str:
    """Where the feature table of a view version lies."""
    return f"{root}/{view.project}/{view.name}/v{view.version}"


def listing_digest(path: str) -> str | None:
    """A text that differs whenever a file at or below ``path`` was added, removed or written, by names, sizes and times.

    None where there is nothing at the path, which may also be one with wildcards.
    """
    system, inner = _file_system(path)
    info = system.get_file_info(inner)
    if info.type == fs.FileType.NotFound:
        return None
    files = system.get_file_info(fs.FileSelector(inner, recursive=True)) if info.type == fs.FileType.Directory else [info]
    lines = sorted(f"{file.path} {file.size} {file.mtime_ns}" for file in files)
    return f"{len(lines)} files {hashlib.sha256(chr(10).join(lines).encode()).hexdigest()}"


def write_text(path: str, content: str) -> None:
    """Write a small text file; it appears whole or not at all."""
    system, inner = _file_system(path)
    system.create_dir(str(PurePosixPath(inner).parent), recursive=True)
    partial = f"{inner}.partial"
    with system.open_output_stream(partial) as stream:
        stream.write(content.encode())
    system.move(partial, inner)


def is_empty_folder(path: str) -> bool:
    """Whether nothing lies at this path, or an empty folder."""
    system, inner = _file_system(path)
    found = system.get_file_info(inner).type
    if found == fs.FileType.Directory:
        return not system.get_file_info(fs.FileSelector(inner))
    return bool(found == fs.FileType.NotFound)


def delete_folder(path: str) -> bool:
    """Delete the folder; False if there is none."""
    system, inner = _file_system(path)
    if system.get_file_info(inner).type == fs.FileType.NotFound:
        return False
    system.delete_dir(inner)
    return True


def open_file(path: str) -> pyarrow.NativeFile:
    """The file for reading anywhere in it. Not mapped into memory: its pages would count as the worker's."""
    system, inner = _file_system(path)
    return system.open_input_file(inner)


def create_file(path: str) -> pyarrow.NativeFile:
    """A new file to be written from its start; a local one's folder is made."""
    system, inner = _file_system(path)
    if isinstance(system, fs.LocalFileSystem):
        system.create_dir(str(PurePosixPath(inner).parent), recursive=True)
    return system.open_output_stream(inner)


def delete_file(path: str) -> None:
    """Delete the file; nothing happens if there is none."""
    system, inner = _file_system(path)
    with suppress(FileNotFoundError):
        system.delete_file(inner)


def check_readable(path: str) -> None:
    """Raise OSError, ValueError or NotImplementedError where files at or below this path or URI cannot be opened without Spark.

    Asks the store once, so that a login which is missing or refused is found too. Nothing need be there.
    """
    system, inner = _file_system(path)
    system.get_file_info(inner)


def _file_system(path: str) -> tuple[fs.FileSystem, str]:
    """The file system of a local path or URI, and the path inside it."""
    if path.startswith("file:/") and not path.startswith("file://"):
        path = f"file://{path.removeprefix('file:')}"  # as Hadoop writes it
    if "://" not in path:
        if _ONE_SLASH.match(path):
            raise ValueError(f"{path} is neither a path nor a URI with two slashes")
        return fs.LocalFileSystem(), path
    scheme, _, rest = path.partition("://")
    found, inner = fs.FileSystem.from_uri(f"{_SCHEMES.get(scheme, scheme)}://{rest}")
    return found, inner

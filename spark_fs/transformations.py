"""What a transformation is made of: the text that is kept of it, and the digest that tells whether it has changed.

Comments and layout do not count. The functions and constants of the repository that it uses do.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping
from datetime import date, time, timedelta
from decimal import Decimal
from enum import Enum
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

from spark_fs.spec import TransformationSpec


def transformation_spec(transformation: str | Callable[..., Any] | None, folder: Path) -> TransformationSpec | None:
    """The plain form of a view's transformation; ``folder`` holds the repository whose functions count as its own."""
    if transformation is None:
        return None
    if isinstance(transformation, str):
        text = textwrap.dedent(transformation).strip()
        return TransformationSpec("sql", text, _sha256(_plain_sql(text)))
    assert isinstance(transformation, FunctionType)
    functions, constants = _used_by(transformation, folder)
    # Parsed and written again: without comments and layout. (The text of ast.dump differs between versions of Python.)
    digest = _sha256("\n".join([*(ast.unparse(ast.parse(source)) for source in functions), *constants]))
    address = f"{Path(inspect.getfile(transformation)).name}:{transformation.__qualname__}"
    return TransformationSpec("python", "\n\n".join([*functions, *constants]), digest, address)


_SQL_TOKEN = re.compile(r"""('(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*"|`[^`]*`)|(?:\s|--[^\n]*|/\*.*?\*/)+""", re.DOTALL)


def _plain_sql(text: str) -> str:
    """SQL without comments, and with one blank for all space outside of quotes."""
    return _SQL_TOKEN.sub(lambda found: found.group(1) or " ", text).strip()


def _used_by(function: FunctionType, folder: Path) -> tuple[list[str], list[str]]:
    """The sources of the function and of all functions of the repository that it uses; their constants as text.

    Follows names, modules of the repository (``cleaning.clean``), and containers such as a table of functions.
    """
    sources: dict[str, str] = {}
    constants: dict[str, str] = {}

    def ours(value: Any) -> bool:
        return isinstance(value, FunctionType) and Path(value.__code__.co_filename).parent == folder

    def visit(function: FunctionType) -> None:
        address = f"{function.__module__}.{function.__qualname__}"
        if address in sources:
            return
        sources[address] = textwrap.dedent(inspect.getsource(function))
        names = sorted(_global_names(function))
        for name in names:
            if name in function.__globals__:
                use(function.__module__, name, function.__globals__[name], names)

    def use(module: str, name: str, value: Any, names: list[str]) -> None:
        if isinstance(value, ModuleType):
            if Path(getattr(value, "__file__", None) or "").parent == folder:
                for attribute in (attribute for attribute in names if attribute in vars(value)):
                    use(value.__name__, attribute, vars(value)[attribute], names)
        elif ours(value):
            visit(value)
        elif not callable(value):
            for item in filter(ours, _items(value)):
                visit(item)
            constants[f"{module}.{name}"] = f"{module}.{name} = {_literal(value)}"

    visit(function)
    return list(sources.values()), [constants[name] for name in sorted(constants)]


def _items(value: Any) -> Iterator[Any]:
    """What a container holds, containers in it included."""
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, list | tuple | set | frozenset):
        return
    for item in value:
        yield item
        yield from _items(item)


def _literal(value: Any) -> str:
    """Text that is equal for equal data, in every process; of anything that is no plain data only its type."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(sorted(f"{_literal(key)}: {_literal(item)}" for key, item in value.items())) + "}"
    if isinstance(value, set | frozenset):
        return "{" + ", ".join(sorted(map(_literal, value))) + "}"
    if isinstance(value, list | tuple):
        return f"{type(value).__name__}({', '.join(map(_literal, value))})"
    if value is None or isinstance(value, str | bytes | int | float | complex | date | time | timedelta | Decimal | Enum):
        return repr(value)
    return getattr(value, "__qualname__", type(value).__qualname__)


def _global_names(function: FunctionType) -> set[str]:
    """Names of globals that the function's code, nested functions included, refers to."""
    names: set[str] = set()
    codes = [function.__code__]
    while codes:
        code = codes.pop()
        names |= set(code.co_names)
        codes += [constant for constant in code.co_consts if inspect.iscode(constant)]
    return names


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()

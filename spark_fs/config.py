"""Settings: conf/base.yml, then conf/<env>.yml over it, then ``${VARIABLE}`` from the environment.

Every wrong line is reported at once, with file and line. A value that comes from the environment may be a secret: it is
resolved when the configuration is read, is held in memory only, and no setting with one is ever printed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator, model_validator
from pydantic import Field as Setting

from spark_fs.errors import InvalidError, Problem, did_you_mean

#: Names of settings and options whose values are secrets.
SECRET_NAME = re.compile(
    r"password|passwd|passphrase|pwd|secret|token|credential|(private|access|api|account|shared).?key", re.IGNORECASE
)

#: As many as the online store has tags: more buckets than this gain nothing.
MOST_BUCKETS = 1024


def is_bucket_count(value: object) -> bool:
    """Whether a feature table may have so many buckets: a power of two from 1 to 1024."""
    return type(value) is int and 1 <= value <= MOST_BUCKETS and value & (value - 1) == 0


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class RegistryConfig(_Section):
    """Where definitions, runs and intervals are kept."""

    url: str = Setting(
        "sqlite", repr=False, description="'sqlite' (a file in state_dir) or postgresql://user:${PASSWORD}@host/db"
    )


class OfflineConfig(_Section):
    """Where feature tables and training datasets lie."""

    root: str = Setting(".spark_fs/offline", description="folder or URI; relative to the project")
    buckets: Literal["auto"] | int = Setting(
        "auto", description="buckets of a new feature table: 'auto' (by the size of its source), or a power of two"
    )

    @field_validator("buckets", mode="before")
    @classmethod
    def _auto_or_a_power_of_two(cls, value: Any) -> Any:
        if isinstance(value, str) and value.isascii() and value.isdigit():
            value = int(value)
        if value != "auto" and not is_bucket_count(value):
            raise ValueError(f"It must be 'auto' or a power of two from 1 to {MOST_BUCKETS}")
        return value


class OnlineConfig(_Section):
    """The online store."""

    url: str = Setting(
        "embedded",
        repr=False,
        description="'embedded', redis://host:port/0, redis+sentinel://host:port,host:port/service/0 or "
        "redis+cluster://host:port,host:port; rediss instead of redis for TLS, user:${PASSWORD}@ before the hosts",
    )
    password_file: str | None = Setting(
        None,
        description="file with the password for online.url, read again at each new connection; relative to the project, and at "
        "the same place on every machine that connects",
    )
    port: int = Setting(0, ge=0, le=65535, description="port of the embedded server; 0 takes a free one")
    timeout_seconds: float = Setting(5.0, gt=0, description="longest wait for an answer of the server")
    wait_replicas: int = Setting(
        0, ge=0, description="at its end a task waits, up to two seconds, for so many replicas to have its rows; 0: for none"
    )
    lease_wait_seconds: float = Setting(300.0, ge=0, description="longest wait for another run of the same view")

    @model_validator(mode="after")
    def _one_password(self) -> OnlineConfig:
        if self.password_file is not None:
            if self.url == "embedded":
                raise ValueError("password_file is for a server of your own: the embedded one keeps its password itself")
            if re.search(r"://[^/]*:[^/]+@|[?&]password=", self.url):
                raise ValueError("The url has a password, and there is a password_file: drop one of them")
        return self


class BuildConfig(_Section):
    """How feature tables are built."""

    max_future_seconds: int = Setting(86_400, ge=0, description="an interval may end at most this far in the future")
    max_files_per_bucket: int = Setting(
        32, ge=0, description="with more data files a bucket, on average, a build also optimizes the table; 0: never"
    )


class SparkConfig(_Section):
    """How Spark is started. ``conf`` holds any Spark setting."""

    master: str = Setting("local[*]", description="local[*], spark://…, yarn, k8s://…")
    deploy_mode: Literal["client", "cluster"] = "client"
    conf: dict[str, str | int | float | bool] = Setting({}, repr=False)


class Config(_Section):
    """All settings of one environment."""

    project: str = Setting(pattern=r"^[A-Za-z][A-Za-z0-9_]{0,63}$", description="first part of every online key and table path")
    state_dir: str = Setting(".spark_fs", description="registry file, jars, embedded server; relative to the project")
    feature_repo: str = Setting("feature_repo", description="folder of the definitions; relative to the project")
    registry: RegistryConfig = RegistryConfig()
    offline: OfflineConfig = OfflineConfig()
    online: OnlineConfig = OnlineConfig()
    build: BuildConfig = BuildConfig()
    spark: SparkConfig = SparkConfig()


@dataclass(frozen=True)
class Environment:
    """A project folder with the settings of one environment; resolves the project's relative paths."""

    root: Path
    name: str
    config: Config = field(repr=False)

    @property
    def state_dir(self) -> Path:
        """The folder for everything that is not source code."""
        return self.root / self.config.state_dir

    @property
    def feature_repo(self) -> Path:
        """The folder of the definitions."""
        return self.root / self.config.feature_repo

    @property
    def offline_root(self) -> str:
        """The folder or URI of the offline store."""
        return self.resolve(self.config.offline.root)

    @property
    def registry_url(self) -> str:
        """The registry's SQLAlchemy URL (may hold a secret)."""
        url = self.config.registry.url
        if url == "sqlite":
            return f"sqlite:///{self.state_dir / 'registry.db'}"
        return url.replace("postgresql://", "postgresql+psycopg://", 1)

    @property
    def online_url(self) -> str:
        """The online store's URL (may hold a secret), with the password file as its parameter; or ``embedded``."""
        online = self.config.online
        if online.password_file is None:
            return online.url
        return f"{online.url}{'&' if '?' in online.url else '?'}password_file={quote(self.resolve(online.password_file))}"

    def resolve(self, path: str) -> str:
        """An absolute path or URI: relative paths are relative to the project folder."""
        return path if re.match(r"^[a-z][a-z0-9+.-]*:", path) or path.startswith("/") else str(self.root / path)


def load_environment(root: Path | str = ".", name: str | None = None) -> Environment:
    """The environment ``name`` (default: $SPARK_FS_ENV, else ``local``) of the project in ``root``.

    Raises InvalidError with every problem: no project here (SFS-201), YAML that cannot be read (SFS-202), duplicate keys
    (SFS-203), undefined variables (SFS-204), unknown keys (SFS-205), wrong values (SFS-206), secrets for Spark (SFS-209).
    """
    root = Path(root).resolve()
    name = name or os.environ.get("SPARK_FS_ENV") or "local"
    base, overlay = root / "conf" / "base.yml", root / "conf" / f"{name}.yml"
    for file in (base, overlay):
        if not file.is_file():
            known = ", ".join(sorted(f.stem for f in file.parent.glob("*.yml") if f.stem != "base")) or "none"
            raise InvalidError.of(
                "SFS-201",
                f"There is no {file.relative_to(root)} in {root}.",
                why=f"Environments here: {known}.",
                fix="run spark-fs in a project folder, name it with --repo, or create one with spark-fs init",
            )
    reader = _YamlReader(root)
    merged = _merge(reader.read(base), reader.read(overlay))
    try:
        config = None if reader.problems else Config.model_validate(merged)
    except ValidationError as error:
        reader.problems += [_problem(detail, reader.positions) for detail in error.errors()]
        config = None
    reader.problems += [
        Problem(
            "SFS-209",
            f"Setting 'spark.conf.{name}' holds a secret.",
            "Spark's settings show in process lists and in its own pages.",
            reader.positions.get(("spark", "conf", name), ""),
            "let Spark find it by itself: a credential provider, or a variable that the cluster sets",
        )
        for name in (config.spark.conf if config else ())
        if SECRET_NAME.search(name) and not name.endswith(".provider")
    ]
    if config is None or reader.problems:
        raise InvalidError(*reader.problems)
    return Environment(root, name, config)


def resolve_variables(text: str, variables: Mapping[str, str]) -> str:
    """The text with ``${NAME}`` and ``${NAME:-default}`` replaced; KeyError names a variable that is not set."""

    def value(match: re.Match[str]) -> str:
        name, default = match.group(1), match.group(2)
        return variables[name] if default is None else variables.get(name, default)

    return re.sub(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}", value, text)


def _merge(base: Mapping[str, Any], overlay: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in overlay.items():
        nested = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if nested else value
    return merged


def _problem(detail: Any, positions: Mapping[tuple[str, ...], str]) -> Problem:
    path = tuple(str(part) for part in detail["loc"])
    where = next((positions[path[:n]] for n in range(len(path), 0, -1) if path[:n] in positions), "conf/base.yml")
    if detail["type"] == "extra_forbidden":
        section: Any = Config
        for part in path[:-1]:
            section = section.model_fields[part].annotation
        return Problem("SFS-205", f"Unknown setting '{'.'.join(path)}'.", did_you_mean(path[-1], section.model_fields), where)
    return Problem("SFS-206", f"Setting '{'.'.join(path)}' is wrong.", f"{detail['msg']}.", where)


#: What plain data is made of.
_PLAIN_TAGS = frozenset(
    f"tag:yaml.org,2002:{kind}" for kind in ("map", "seq", "str", "int", "float", "bool", "null", "timestamp")
)


class _YamlReader:
    """Reads YAML as plain data, and remembers where each key stands."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.positions: dict[tuple[str, ...], str] = {}
        self.problems: list[Problem] = []
        self._open: list[yaml.Node] = []

    def read(self, file: Path) -> dict[str, Any]:
        """The mapping in the file; problems are noted, not raised."""
        shown = str(file.relative_to(self.root))
        try:
            node = yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark
            tab = "'\\t'" in str(error.problem)
            self.problems.append(
                Problem(
                    "SFS-202",
                    "A tab stands where YAML wants spaces." if tab else f"The YAML cannot be read: {error.problem}.",
                    where=f"{shown}:{mark.line + 1 if mark else 1}",
                    fix="indent with spaces" if tab else "",
                )
            )
            return {}
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            why = f"{next(iter(str(error).splitlines()))}."
            self.problems.append(Problem("SFS-202", "The file is no text in UTF-8 that YAML can hold.", why, shown))
            return {}
        if node is None:
            return {}
        if not isinstance(node, yaml.MappingNode):
            self.problems.append(Problem("SFS-202", "The file must hold settings as 'name: value'.", where=f"{shown}:1"))
            return {}
        value = self._value(node, (), shown)
        return value if isinstance(value, dict) else {}

    def _mapping(self, node: yaml.MappingNode, path: tuple[str, ...], shown: str) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key, where = str(key_node.value), f"{shown}:{key_node.start_mark.line + 1}"
            if key in values:
                self.problems.append(Problem("SFS-203", f"'{key}' stands twice in one section.", where=where))
            here = (*path, key)
            self.positions[here] = where
            values[key] = self._value(value_node, here, shown)
        return values

    def _value(self, node: yaml.Node, path: tuple[str, ...], shown: str) -> Any:
        where = f"{shown}:{node.start_mark.line + 1}"
        if node.tag not in _PLAIN_TAGS:
            self.problems.append(Problem("SFS-202", f"The YAML tag {node.tag} is not allowed.", where=where))
            return None
        if any(node is outer for outer in self._open):
            self.problems.append(Problem("SFS-202", "An alias stands inside of what it refers to.", where=where))
            return None
        self._open.append(node)
        try:
            if isinstance(node, yaml.MappingNode):
                return self._mapping(node, path, shown)
            if isinstance(node, yaml.SequenceNode):
                return [self._value(item, path, shown) for item in node.value]
            return self._scalar(node, where)
        finally:
            self._open.pop()

    def _scalar(self, node: yaml.Node, where: str) -> Any:
        try:
            resolved = resolve_variables(node.value, os.environ)
        except KeyError as error:
            fix = f"export {error.args[0]}=…, or give a default: ${{{error.args[0]}:-value}}"
            self.problems.append(Problem("SFS-204", f"The variable {error.args[0]} is not set.", where=where, fix=fix))
            return None
        if resolved != node.value:
            # Unquoted, a variable may hold a number or a switch; nothing that could be more than a plain word is parsed.
            plain = isinstance(node, yaml.ScalarNode) and node.style is None and re.fullmatch(r"[\w.+-]*", resolved)
            return yaml.safe_load(resolved) if plain else resolved
        try:
            return yaml.SafeLoader("").construct_object(node)
        except (yaml.YAMLError, ValueError) as error:
            self.problems.append(Problem("SFS-202", f"'{node.value}' cannot be read.", f"{error}.", where))
            return None

"""Settings: layers, variables, and every wrong line at once with file and line."""

from __future__ import annotations

from pathlib import Path

import pytest

from spark_fs.config import Environment, load_environment, resolve_variables
from spark_fs.errors import InvalidError, without_secrets


def project(root: Path, base: str = "", local: str = "") -> Path:
    """A project whose base.yml has the settings after ``project:``."""
    (root / "conf").mkdir(exist_ok=True)
    (root / "conf" / "base.yml").write_text(f"project: shop\n{base}", encoding="utf-8")
    (root / "conf" / "local.yml").write_text(local, encoding="utf-8")
    return root


def problems_of(root: Path) -> list[tuple[str, str]]:
    """Code and place of every problem."""
    with pytest.raises(InvalidError) as caught:
        load_environment(root)
    assert caught.value.exit_code == 2
    return [(problem.code, problem.where) for problem in caught.value.problems]


def message_of(root: Path) -> str:
    with pytest.raises(InvalidError) as caught:
        load_environment(root)
    return str(caught.value)


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    """Whatever the shell has set."""
    monkeypatch.delenv("SPARK_FS_ENV", raising=False)


def test_an_empty_environment_file_means_the_defaults(tmp_path):
    """Only the project's name must be given."""
    config = load_environment(project(tmp_path)).config
    assert config.project == "shop"
    assert config.registry.url == "sqlite"
    assert config.online.url == "embedded"
    assert config.offline.buckets == "auto"
    assert config.build.max_files_per_bucket == 32


def test_the_environment_is_laid_over_the_base_setting_by_setting(tmp_path):
    """Sections are merged in depth, values replaced."""
    base = "offline:\n  root: a\n  buckets: 4\nspark:\n  conf:\n    x: 1\n    y: 2\n"
    config = load_environment(project(tmp_path, base, "offline:\n  buckets: 16\nspark:\n  conf:\n    y: 3\n")).config
    assert (config.offline.root, config.offline.buckets) == ("a", 16)
    assert config.spark.conf == {"x": 1, "y": 3}


def test_the_environments_name_is_given_else_taken_from_the_shell_else_local(tmp_path, monkeypatch):
    """In this order."""
    project(tmp_path)
    for name in ("prod", "test"):
        (tmp_path / "conf" / f"{name}.yml").write_text("")
    assert load_environment(tmp_path).name == "local"
    monkeypatch.setenv("SPARK_FS_ENV", "test")
    assert load_environment(tmp_path).name == "test"
    assert load_environment(tmp_path, "prod").name == "prod"


def test_relative_paths_are_the_projects(tmp_path, monkeypatch):
    """Wherever the command is run; URIs and absolute paths stay as they are."""
    monkeypatch.chdir("/")
    environment = load_environment(project(tmp_path))
    assert environment.state_dir == tmp_path / ".spark_fs"
    assert environment.feature_repo == tmp_path / "feature_repo"
    assert environment.offline_root == str(tmp_path / ".spark_fs/offline")
    assert environment.registry_url == f"sqlite:///{tmp_path}/.spark_fs/registry.db"
    assert environment.resolve("s3a://bucket/x") == "s3a://bucket/x"
    assert environment.resolve("/x") == "/x"


def test_postgresql_is_reached_through_psycopg(tmp_path):
    """The user writes the address that every PostgreSQL tool takes."""
    environment = load_environment(project(tmp_path, "registry:\n  url: postgresql://me@host/db\n"))
    assert environment.registry_url == "postgresql+psycopg://me@host/db"


def test_a_folder_without_project_is_told_with_the_fix(tmp_path):
    """SFS-201."""
    message = message_of(tmp_path)
    assert message.startswith("[SFS-201] There is no conf/base.yml")
    assert "spark-fs init" in message


def test_an_unknown_environment_lists_the_known_ones(tmp_path):
    """SFS-201; base is none."""
    project(tmp_path)
    with pytest.raises(InvalidError, match=r"no conf/prd\.yml .* Environments here: local\."):
        load_environment(tmp_path, "prd")


# Variables.


def test_variables_are_filled_in_with_defaults_where_not_set(tmp_path, monkeypatch):
    """In the middle of text too."""
    monkeypatch.setenv("HOST", "db.example.com")
    monkeypatch.delenv("DB", raising=False)
    url = "registry:\n  url: postgresql://${USER_NAME:-me}@${HOST}/${DB:-features}\n"
    assert load_environment(project(tmp_path, url)).config.registry.url == "postgresql://me@db.example.com/features"


def test_an_unquoted_variable_may_hold_a_number_or_a_switch(tmp_path, monkeypatch):
    """A quoted one is text."""
    monkeypatch.setenv("PORT", "7000")
    monkeypatch.setenv("FLAG", "true")
    base = "online:\n  port: ${PORT}\nspark:\n  conf:\n    a: ${FLAG}\n    b: '${FLAG}'\n    c: ${MISSING:-0.5}\n"
    config = load_environment(project(tmp_path, base)).config
    assert config.online.port == 7000
    assert config.spark.conf == {"a": True, "b": "true", "c": 0.5}


def test_the_value_of_a_variable_is_never_read_as_yaml(tmp_path, monkeypatch):
    """Whatever it holds, it stays text."""
    monkeypatch.setenv("ODD", "{a: !!python/name:os.system } # [x]")
    assert (
        load_environment(project(tmp_path, "offline:\n  root: ${ODD}\n")).config.offline.root
        == "{a: !!python/name:os.system } # [x]"
    )


def test_every_undefined_variable_is_told_with_file_line_and_fix(tmp_path, monkeypatch):
    """SFS-204, all at once, from both files."""
    monkeypatch.delenv("ONE", raising=False)
    monkeypatch.delenv("TWO", raising=False)
    root = project(tmp_path, "registry:\n  url: postgresql://${ONE}@h/d\n", "online:\n  url: ${TWO}\n")
    assert problems_of(root) == [("SFS-204", "conf/base.yml:3"), ("SFS-204", "conf/local.yml:2")]
    assert "export ONE=…, or give a default: ${ONE:-value}" in message_of(root)


def test_resolving_names_the_variable_that_is_not_set():
    """KeyError for the caller to turn into its own message; other dollars are left alone."""
    assert resolve_variables("$5 ${A} ${B:-} $A ${}", {"A": "x"}) == "$5 x  $A ${}"
    with pytest.raises(KeyError, match="NOPE"):
        resolve_variables("${NOPE}", {})


# Bad files.


def test_a_tab_is_told_in_words(tmp_path):
    """SFS-202 with the line and what to do."""
    root = project(tmp_path, "online:\n\tport: 1\n")
    assert problems_of(root) == [("SFS-202", "conf/base.yml:3")]
    assert "A tab stands where YAML wants spaces." in message_of(root)
    assert "Fix: indent with spaces" in message_of(root)


def test_duplicate_keys_are_refused(tmp_path):
    """SFS-203: YAML itself would keep the last in silence. Sections too; the same name in two sections is fine."""
    root = project(tmp_path, "online:\n  url: a\n  port: 1\n  url: b\nregistry:\n  url: c\nonline:\n  port: 2\n")
    assert problems_of(root) == [("SFS-203", "conf/base.yml:5"), ("SFS-203", "conf/base.yml:8")]


def test_unknown_and_wrong_settings_come_together_with_lines_and_hints(tmp_path):
    """SFS-205 with the closest name, SFS-206 with what is expected; the line is that of the file that holds it."""
    root = project(tmp_path, "online:\n  prot: 1\n  timeout_seconds: 0\n", "offline:\n  buckets: 2000\nsparc: {}\n")
    assert sorted(problems_of(root)) == [
        ("SFS-205", "conf/base.yml:3"),
        ("SFS-205", "conf/local.yml:3"),
        ("SFS-206", "conf/base.yml:4"),
        ("SFS-206", "conf/local.yml:2"),
    ]
    message = message_of(root)
    assert "Unknown setting 'online.prot'. Did you mean 'port'?" in message
    assert "Unknown setting 'sparc'. Did you mean 'spark'?" in message
    assert "from 1 to 1024" in message


@pytest.mark.parametrize("buckets", ["12", "0", "2048", "1.5", "true", "many", "[8]"])
def test_buckets_are_a_power_of_two(tmp_path, buckets):
    """A table may later be split in halves."""
    root = project(tmp_path, f"offline:\n  buckets: {buckets}\n")
    assert problems_of(root) == [("SFS-206", "conf/base.yml:3")]
    assert "power of two" in message_of(root)


@pytest.mark.parametrize(("given", "read"), [("1", 1), ("1024", 1024), ("'16'", 16), ("auto", "auto")])
def test_buckets_are_a_number_or_left_to_the_size(tmp_path, given, read):
    """`auto` takes the number from the size of the source when the table is made."""
    assert load_environment(project(tmp_path, f"offline:\n  buckets: {given}\n")).config.offline.buckets == read


@pytest.mark.parametrize("name", ["2fast", "my-shop", "shop:eu", "s/h", "café", "", "x" * 65, "null", "[a]"])
def test_a_project_name_is_plain_letters_digits_and_underscores(tmp_path, name):
    """It becomes part of paths and keys."""
    root = project(tmp_path)
    (root / "conf" / "base.yml").write_text(f"project: {name}\n", encoding="utf-8")
    assert problems_of(root) == [("SFS-206", "conf/base.yml:1")]


def test_a_project_without_name_is_told(tmp_path):
    """There is no default: keys and tables of two projects must not meet."""
    root = project(tmp_path)
    (root / "conf" / "base.yml").write_text("state_dir: x\n")
    assert problems_of(root) == [("SFS-206", "conf/base.yml")]


@pytest.mark.parametrize("content", ["- a\n- b\n", "just text\n", "42\n"])
def test_a_file_that_is_no_mapping_is_told(tmp_path, content):
    """SFS-202."""
    root = project(tmp_path)
    (root / "conf" / "local.yml").write_text(content)
    assert problems_of(root) == [("SFS-202", "conf/local.yml:1")]


@pytest.mark.parametrize(
    "content",
    [
        b"online: [\n",
        b"a: b: c\n",
        b"state_dir: 'open\n",
        b"state_dir: *nowhere\n",
        b"state_dir: \x00\n",
        b"state_dir: caf\xe9\n",
        b"spark: &a\n  conf: *a\n",
        b"online:\n  port: !!int seven\n",
        b"state_dir: 2013-13-45\n",
    ],
    ids=["open list", "two colons", "open quote", "unknown alias", "control character", "not UTF-8", "alias of itself",
         "wrong int", "no such day"],
)  # fmt: skip
def test_a_damaged_file_is_told_with_its_name(tmp_path, content):
    """SFS-202, whatever is wrong with it."""
    root = project(tmp_path)
    (root / "conf" / "local.yml").write_bytes(content)
    ((code, where),) = problems_of(root)
    assert code == "SFS-202"
    assert where.startswith("conf/local.yml")


@pytest.mark.parametrize(
    "setting",
    [
        "state_dir: !!python/object/apply:os.mkdir [MARKER]",
        "state_dir: !!python/object/new:os.mkdir [MARKER]",
        "state_dir: !!python/name:os.mkdir",
        "state_dir: !!python/module:os",
        "spark: !!python/object:pathlib.Path {}",
        "spark: !mine {}",
        "state_dir: !mine x",
    ],
)
def test_yaml_tags_are_refused_and_run_nothing(tmp_path, setting):
    """SFS-202 with the line: the file is data, never code."""
    marker = tmp_path / "marker"
    root = project(tmp_path, f"\n{setting.replace('MARKER', str(marker))}\n")
    problems = problems_of(root)
    assert not marker.exists()
    assert problems == [("SFS-202", "conf/base.yml:3")]
    assert "tag" in message_of(root)


# Secrets.

SECRET = "hunter2"


@pytest.mark.parametrize("password", [SECRET, f"@{SECRET}", f"{SECRET}@{SECRET}", f"a:{SECRET}", f"%40{SECRET}", f"{SECRET}?#"])
def test_an_address_is_shown_without_user_and_password(password):
    """Whatever the password holds; the rest of the text stays."""
    shown = without_secrets(f"cannot reach redis://me:{password}@host:6379/0 nor http://example.com/a@b")
    assert shown == "cannot reach redis://***@host:6379/0 nor http://example.com/a@b"


@pytest.fixture
def with_secrets(tmp_path, monkeypatch) -> Environment:
    """An environment with a secret in every place that usually has one."""
    monkeypatch.setenv("PASSWORD", SECRET)
    base = (
        "registry:\n  url: postgresql://me:${PASSWORD}@host/db\nonline:\n  url: rediss://me:${PASSWORD}@host:6379/0\n"
        "spark:\n  conf:\n    spark.example.address: jdbc:example://me:${PASSWORD}@host\n"
    )
    return load_environment(project(tmp_path, base))


def test_no_secret_is_printed_with_an_environment(with_secrets):
    """Nor is anything else of its configuration."""
    assert SECRET not in repr(with_secrets)
    assert SECRET not in str(with_secrets)


def test_no_secret_is_printed_with_a_configuration(with_secrets):
    """Addresses and Spark settings are where people put them."""
    assert SECRET in str(with_secrets.config.spark.conf["spark.example.address"])
    assert SECRET not in repr(with_secrets.config)
    assert SECRET not in str(with_secrets.config)


def test_no_secret_is_printed_with_a_problem(tmp_path, monkeypatch):
    """Also where the secret itself is the wrong value, and along the chain of causes."""
    monkeypatch.setenv("PASSWORD", SECRET)
    base = "online:\n  port: ${PASSWORD}\n  timeout_seconds: '${PASSWORD}'\noffline:\n  buckets: ${PASSWORD}\n"
    base += "project: ${PASSWORD}!\n"
    root = project(tmp_path)
    (root / "conf" / "base.yml").write_text(base)
    with pytest.raises(InvalidError) as caught:
        load_environment(root)
    assert len(caught.value.problems) == 4
    error: BaseException | None = caught.value
    while error is not None:
        assert SECRET not in str(error)
        error = error.__cause__ or error.__context__


@pytest.mark.parametrize("name", ["spark.hadoop.fs.s3a.secret.key", "spark.ssl.keyPassword", "spark.example.authToken"])
def test_a_secret_among_the_settings_of_spark_is_refused_without_showing_it(tmp_path, monkeypatch, name):
    """SFS-209: such settings end up on command lines, in logs and in Spark's own pages."""
    monkeypatch.setenv("PASSWORD", SECRET)
    root = project(tmp_path, f"spark:\n  conf:\n    {name}: ${{PASSWORD}}\n")
    assert problems_of(root) == [("SFS-209", "conf/base.yml:4")]
    assert name in message_of(root)
    assert SECRET not in message_of(root)


def test_the_name_of_a_credential_provider_is_no_secret(tmp_path):
    """It says how Spark finds the secret by itself."""
    name = "spark.hadoop.fs.s3a.aws.credentials.provider"
    assert load_environment(project(tmp_path, f"spark:\n  conf:\n    {name}: com.example.P\n")).config.spark.conf == {
        name: "com.example.P"
    }

"""Settings come from the environment; one that does not fit stops the start and is named."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from django.core.exceptions import ImproperlyConfigured

from orchestrator_site import settings
from orchestrator_site.env import Environment
from tests.server import ROOT

SOUND = {"PATH": os.environ["PATH"], "SECRET_KEY": "s" * 50, "DATABASE_URL": "sqlite:///:memory:"}


def check(folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "manage.py", "check"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=30)


@pytest.fixture
def installation(tmp_path: Path) -> Path:
    """As much of this checkout as reading the settings takes, without anybody's .env."""
    shutil.copy(ROOT / "manage.py", tmp_path)
    shutil.copytree(ROOT / "orchestrator_site", tmp_path / "orchestrator_site")
    return tmp_path


def assert_refused_in_one_line(outcome: subprocess.CompletedProcess[str], *words: str) -> None:
    assert outcome.returncode != 0
    (line,) = outcome.stderr.strip().splitlines()
    assert line.startswith("Countersign does not start: ")
    assert all(word in line for word in words)


def test_a_sound_environment_starts() -> None:
    outcome = check(ROOT, SOUND)

    assert outcome.returncode == 0, outcome.stderr


def test_without_a_secret_key_nothing_starts(installation: Path) -> None:
    without = {name: value for name, value in SOUND.items() if name != "SECRET_KEY"}

    assert_refused_in_one_line(check(installation, without), "SECRET_KEY", "32 characters")


def test_a_malformed_setting_stops_the_start_and_is_named(installation: Path) -> None:
    outcome = check(installation, {**SOUND, "MAX_BODY_BYTES": "2 MiB"})

    assert_refused_in_one_line(outcome, "MAX_BODY_BYTES", "has to be a whole number")
    assert "2 MiB" not in outcome.stderr  # it could be a secret in the wrong place


def test_an_address_that_cannot_be_read_does_not_show_the_password_in_it(installation: Path) -> None:
    outcome = check(installation, {**SOUND, "DATABASE_URL": "postgres://user:open/sesame@host/name"})

    assert_refused_in_one_line(outcome, "DATABASE_URL", "%-escapes")
    assert "open" not in outcome.stderr and "sesame" not in outcome.stderr


def test_an_env_file_is_read_and_what_is_wrong_in_it_is_named(installation: Path) -> None:
    (installation / ".env").write_text(f"SECRET_KEY={'s' * 50}\nINTERNAL_API_KEY=too-short\n")
    without = {name: value for name, value in SOUND.items() if name != "SECRET_KEY"}

    assert_refused_in_one_line(check(installation, without), "INTERNAL_API_KEY", "32 ASCII characters")


Read = Callable[[Environment], Any]
KINDS: dict[str, tuple[Read, list[str], list[tuple[str, Any]]]] = {
    "text": (lambda env: env.text("NAME", "x"), [], [("a b", "a b"), ("$PATH", "$PATH"), ("", "x")]),
    "words": (lambda env: env.words("NAME", ["x"]), [], [("a, b,,c ", ["a", "b", "c"]), ("", ["x"])]),
    "flag": (
        lambda env: env.flag("NAME", True),
        ["maybe", "2", "tru", "true false"],
        [("false", False), ("OFF", False), ("0", False), ("no", False), ("1", True), (" Yes ", True), ("", True)],
    ),
    "integer": (
        lambda env: env.integer("NAME", 5, at_least=1, at_most=10),
        ["x", "1.5", "1e1", "0", "11", "-1", "0x5", "NaN", "9" * 5000],
        [("1", 1), ("10", 10), ("", 5)],
    ),
    "seconds": (
        lambda env: env.seconds("NAME", 5),
        ["x", "0", "-1", "nan", "inf", "-inf", "1e12", "5s"],
        [("0.001", 0.001), ("2", 2.0), ("", 5)],
    ),
    "choice": (
        lambda env: env.choice("NAME", "INFO", {"INFO", "DEBUG"}),
        ["loud", "info", "INFO DEBUG"],
        [("DEBUG", "DEBUG"), ("", "INFO")],
    ),
    "url": (
        lambda env: env.url("NAME", schemes={"http", "https"}, suffix="/v1"),
        ["ftp://host/v1", "host/v1", "http://", "http://host/v2", "https:host/v1", "javascript:alert(1)/v1"],
        [("http://host:8/v1/", "http://host:8/v1"), ("", "")],
    ),
    "database": (
        lambda env: env.database("NAME", "sqlite:///d")["NAME"],
        ["mysql://host/x", "x.sqlite3", "sqlite", "postgres://host", "postgres://u:pass/word@h/x", "postgres://h:x/n"],
        [
            ("sqlite:////tmp/x.sqlite3", "/tmp/x.sqlite3"),  # noqa: S108 (nothing is opened)
            ("postgres://user:p%40ss@host:5432/name?sslmode=require", "name"),
            ("postgresql:///name", "name"),
            ("", "d"),
        ],
    ),
}
BAD = [pytest.param(read, raw, id=f"{kind} {raw[:20]}") for kind, (read, bad, _) in KINDS.items() for raw in bad]
GOOD = [
    pytest.param(read, raw, value, id=f"{kind} {raw or 'empty'}")
    for kind, (read, _, good) in KINDS.items()
    for raw, value in good
]


@pytest.mark.parametrize(("read", "raw"), BAD)
def test_a_value_that_does_not_fit_names_its_variable(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, read: Read, raw: str
) -> None:
    monkeypatch.setenv("NAME", raw)

    with pytest.raises(ImproperlyConfigured, match="^NAME has to "):
        read(Environment(tmp_path / "none"))


@pytest.mark.parametrize(("read", "raw", "value"), GOOD)
def test_a_value_that_fits_is_taken_and_an_empty_one_is_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, read: Read, raw: str, value: Any
) -> None:
    monkeypatch.setenv("NAME", raw)

    assert read(Environment(tmp_path / "none")) == value


def test_the_environment_goes_before_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("HERE=file\nTHERE=file\nEMPTY=file\n")
    monkeypatch.setenv("HERE", "environment")
    monkeypatch.setenv("EMPTY", "")

    env = Environment(tmp_path / ".env")

    assert [env.text(name, "default") for name in ("HERE", "THERE", "EMPTY", "NOWHERE")] == [
        "environment",
        "file",
        "file",
        "default",
    ]
    assert env.names == ["HERE", "THERE", "EMPTY", "NOWHERE"]


def test_every_setting_stands_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()

    assert settings.env.names
    assert [name for name in settings.env.names if not re.search(rf"\b{name}\b", readme)] == []

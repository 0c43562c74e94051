"""The shape of the project: imports go one way, no migration is missing."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from django.core.management import call_command

ROOT = Path(__file__).resolve().parent.parent
# Each app may import those to its right.
APPS = ["orchestrator_site", "messages_app", "agents_app", "sessions_app", "events_app"]
LEAVES = {"orchestrator_site.errors", "orchestrator_site.http"}


def imported(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


@pytest.mark.parametrize("app", APPS)
def test_imports_go_one_way(app: str) -> None:
    forbidden = {
        f"{file.relative_to(ROOT)} imports {name}"
        for file in (ROOT / app).rglob("*.py")
        for name in imported(file)
        for left in APPS[: APPS.index(app)]
        if (name == left or name.startswith(f"{left}."))
        and not any(name == leaf or name.startswith(f"{leaf}.") for leaf in LEAVES)
        and name != "orchestrator_site"
    }

    assert forbidden == set()


@pytest.mark.parametrize("leaf", ["errors", "http"])
def test_the_leaves_import_nothing_of_ours_but_each_other(leaf: str) -> None:
    ours = {name for name in imported(ROOT / f"orchestrator_site/{leaf}.py") if name.split(".")[0] in APPS}

    assert {name for name in ours if not any(name.startswith(each) for each in LEAVES)} <= {"orchestrator_site"}


@pytest.mark.django_db
def test_no_migration_is_missing() -> None:
    call_command("makemigrations", check=True, dry_run=True, verbosity=0)


def test_a_start_imports_no_heavy_library_that_it_does_not_need() -> None:
    program = (
        "import sys, django; django.setup(); from django.core.management import call_command; call_command('check');"
        "heavy = ('aiohttp', 'twisted', 'uvicorn', 'channels', 'drf_spectacular');"
        "print([name for name in heavy if name in sys.modules])"
    )
    environment = {**os.environ, "DJANGO_SETTINGS_MODULE": "orchestrator_site.settings"}
    outcome = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )

    assert outcome.stdout.strip().splitlines()[-1] == "[]"


def test_tests_that_commit_are_in_files_of_their_own() -> None:
    """The rows that migrations seed are gone after them, so they come last, and a file is run as a whole."""
    for file in sorted((ROOT / "tests").glob("test_*.py")):
        marks = re.findall(r"pytest\.mark\.django_db\b(?:\(([^)]*)\))?", file.read_text())
        assert len({"transaction=True" in mark for mark in marks}) <= 1, file

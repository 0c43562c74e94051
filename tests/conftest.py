import gc
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from django.test import Client
from playwright.sync_api import Browser, sync_playwright

from orchestrator_site.local_services import Redis, find
from tests import databases, scaled
from tests.databases import ON_POSTGRESQL
from tests.faults import table
from tests.scripted_llm import ScriptedLLM
from tests.server import Server, eventually, running


@pytest.fixture
def llm() -> Iterator[ScriptedLLM]:
    """A real HTTP server that plays the model."""
    with ScriptedLLM() as scripted:
        yield scripted


@pytest.fixture
def server(tmp_path: Path, llm: ScriptedLLM, migrated: Path) -> Iterator[Server]:
    """A real server process of this test's own, with the scripted model behind it; its lease is short."""
    with running(tmp_path, migrated, LLM_BASE_URL=llm.url, TURN_LEASE_SECONDS="2") as started:
        yield started


@pytest.fixture(scope="session")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The database of a fresh installation with people in it, made once and copied for every server."""
    fresh = Server(tmp_path_factory.mktemp("migrated"))
    databases.create(fresh.database)
    fresh.http.close()
    # In one process, because a process takes longer to start than to do either.
    made = "from django.core.management import call_command; from tests.staff import hire"
    outcome = fresh.manage("shell", "-c", f"{made}; call_command('migrate', verbosity=0); hire()")
    assert outcome.returncode == 0, outcome.stderr
    return fresh.database


@pytest.fixture(scope="session")
def scaled_template(tmp_path_factory: pytest.TempPathFactory, migrated: Path) -> Path:
    """The same with the tables of a scaled installation; on PostgreSQL alone."""

    place = tmp_path_factory.mktemp("scaled") / "test.sqlite3"
    scaled.migrate(migrated, place)
    return place


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Redis]:
    server = Redis(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def shared_llm() -> Iterator[ScriptedLLM]:
    with ScriptedLLM() as scripted:
        yield scripted


@pytest.fixture(scope="module")
def shared_server(
    tmp_path_factory: pytest.TempPathFactory, shared_llm: ScriptedLLM, migrated: Path
) -> Iterator[Server]:
    """One real server process for the tests of a module that leave it as they found it."""
    with running(tmp_path_factory.mktemp("shared"), migrated, LLM_BASE_URL=shared_llm.url) as started:
        yield started


@pytest.fixture(scope="module")
def mortal_server(
    tmp_path_factory: pytest.TempPathFactory, shared_llm: ScriptedLLM, migrated: Path
) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("mortal")
    with running(folder, migrated, LLM_BASE_URL=shared_llm.url, TURN_LEASE_SECONDS="2") as started:
        yield started


@pytest.fixture
def mortal(mortal_server: Server, played: ScriptedLLM) -> Iterator[Server]:
    """A module's server that tests kill. A turn that it leaves behind is taken over after two seconds."""
    yield mortal_server
    if mortal_server.process is None or mortal_server.process.poll() is not None:
        mortal_server.start()


@pytest.fixture
def played(request: pytest.FixtureRequest, shared_llm: ScriptedLLM) -> Iterator[ScriptedLLM]:
    """The module's model for one test: its script has to be played to the end, and no history may be refused.

    What a test leaves of its script, when it fails, or sets by default is not played to the next; nor does a turn that
    it leaves running play the next one's script.
    """
    seen, default = len(shared_llm.refused), shared_llm.default
    shared_llm.route_to = "coder"
    servers = [
        request.getfixturevalue(name) for name in ("shared_server", "mortal_server") if name in request.fixturenames
    ]
    yield shared_llm
    try:
        for server in servers:
            eventually(lambda server=server: is_idle(server))
    finally:
        left = shared_llm.unplayed
        shared_llm.forget()
        shared_llm.default = default
    assert left == 0
    assert shared_llm.refused[seen:] == []


def is_idle(server: Server) -> bool:
    busy = "SELECT count(*) FROM sessions_app_turn WHERE status IN ('queued', 'running')"
    return databases.rows(server.database, busy) == [(0,)]


# --- People in Django's own client ---------------------------------------------------------------------------------


@pytest.fixture(autouse=True, scope="session")
def no_static_files() -> None:
    """Each client of Django's own loads the middleware anew, which would look for 220 files. Real servers have them."""
    from django.conf import settings

    settings.SERVESTATIC_USE_FINDERS = settings.SERVESTATIC_USE_STATIC_ROOT = False


@pytest.fixture
def quick_passwords(settings: Any) -> None:
    settings.PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]


@pytest.fixture
def superuser(quick_passwords: None, db: None) -> Client:
    # Imported late: there are no apps yet when this file is read.
    from django.contrib.auth.models import User

    from tests.pages import PASSWORD, logged_in

    return logged_in(User.objects.create_superuser("root", password=PASSWORD))


@pytest.fixture
def operator(quick_passwords: None, db: None) -> Client:
    from tests.pages import logged_in, staff

    return logged_in(staff("olga", "operators"))


@pytest.fixture
def auditor(quick_passwords: None, db: None) -> Client:
    from tests.pages import logged_in, staff

    return logged_in(staff("alan", "auditors"))


# --- What is left out where it cannot run ----------------------------------------------------------------------------

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# Each marker, what a test with it needs, and whether that is missing.
NEEDS = {
    "browser": ("an installed Chromium", CHROMIUM is None),
    "redis": ("an installed redis-server", shutil.which("redis-server") is None),
    "nginx": ("an installed nginx", find("nginx") is None),
    "sqlite": ("SQLite as its database (`make test`)", ON_POSTGRESQL),
    "postgresql": ("PostgreSQL as its database (`make test-postgres`)", not ON_POSTGRESQL),
}
INSTALLED_ON_CI = {"browser", "redis", "nginx"}
# How many tests each marker left out; with xdist what the workers counted, the same each.
left_out: dict[str, int] = {}
# The trials of faults, each with its seed; with xdist those of all workers.
trials: list[str] = []


def pytest_configure(config: pytest.Config) -> None:
    for marker, (needed, is_missing) in NEEDS.items():
        config.addinivalue_line("markers", f"{marker}: needs {needed}")
        if is_missing and marker in INSTALLED_ON_CI and os.environ.get("CI"):
            raise pytest.UsageError(f"On CI the tests have to run that need {needed}.")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Four thousand tests and what they import stay to the end; walking all of it again and again took a fifth of the
    processor's time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


# The files that take longest by the clock. They begin first: one that begins as the last is waited for alone.
BEGIN_FIRST = [
    "test_scaled",
    "test_tool_survival",
    "test_scaled_load",
    "test_bad_input",
    "test_scaled_stop",
    "test_bad_calls",
    "test_survival",
    "test_operators_live",
    "test_scenarios",
]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(BEGIN_FIRST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))
    for marker, (_, is_missing) in NEEDS.items():
        without = [item for item in items if is_missing and item.get_closest_marker(marker)]
        if without:
            left_out[marker] = len(without)
            config.hook.pytest_deselected(items=without)
            items[:] = [item for item in items if item not in without]


def pytest_sessionfinish(session: pytest.Session) -> None:
    trials.extend(row.summary for row in table.judged)
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = left_out
        session.config.workeroutput["trials"] = trials


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    told = getattr(node, "workeroutput", {})
    left_out.update(told.get("left_out", {}))
    trials.extend(told.get("trials", []))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for marker, number in left_out.items():
        terminalreporter.write_line(f"{number} tests were left out: they need {NEEDS[marker][0]}.")
    for trial in trials:
        terminalreporter.write_line(trial)


# --- A real browser ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """For modules without a database of their own: an event loop runs in this thread as long as it is open."""
    with sync_playwright() as playwright:
        # Its own sandbox needs rights that a container does not have; it opens pages of ours alone.
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield started
        started.close()

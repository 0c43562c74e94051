import gc
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from django.test import Client
from playwright.sync_api import Browser, sync_playwright

from tests.scripted_llm import ScriptedLLM
from tests.server import Server, running


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
    """The database file of a fresh installation with people in it, made once and copied for every server."""
    fresh = Server(tmp_path_factory.mktemp("migrated"))
    fresh.http.close()
    # In one process, because a process takes longer to start than to do either.
    made = "from django.core.management import call_command; from tests.staff import hire"
    outcome = fresh.manage("shell", "-c", f"{made}; call_command('migrate', verbosity=0); hire()")
    assert outcome.returncode == 0, outcome.stderr
    return fresh.database


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
    with running(folder, migrated, LLM_BASE_URL=shared_llm.url, TURN_LEASE_SECONDS="1") as started:
        yield started


@pytest.fixture
def mortal(mortal_server: Server, played: ScriptedLLM) -> Iterator[Server]:
    """A module's server that tests kill. A turn that it leaves behind is taken over after a second."""
    yield mortal_server
    if mortal_server.process is None or mortal_server.process.poll() is not None:
        mortal_server.start()


@pytest.fixture
def played(shared_llm: ScriptedLLM) -> Iterator[ScriptedLLM]:
    """The module's model for one test: its script has to be played to the end, and no history may be refused.

    What a test leaves of its script, when it fails, or sets by default is not played to the next.
    """
    seen, default = len(shared_llm.refused), shared_llm.default
    shared_llm.route_to = "coder"
    yield shared_llm
    left = shared_llm.unplayed
    shared_llm.forget()
    shared_llm.default = default
    assert left == 0
    assert shared_llm.refused[seen:] == []


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


# --- A real browser ------------------------------------------------------------------------------------------------

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "browser: needs an installed Chromium")
    if CHROMIUM is None and os.environ.get("CI"):
        raise pytest.UsageError("There is no Chromium, and on CI the tests with a browser have to run.")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Four thousand tests and what they import stay to the end; walking all of it again and again took a fifth of the
    processor's time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if CHROMIUM is None:
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("browser")])
        items[:] = [item for item in items if not item.get_closest_marker("browser")]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if CHROMIUM is None:
        terminalreporter.write_line("There is no Chromium: the tests with a browser were left out.")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """For modules without a database of their own: an event loop runs in this thread as long as it is open."""
    with sync_playwright() as playwright:
        # Its own sandbox needs rights that a container does not have; it opens pages of ours alone.
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield started
        started.close()

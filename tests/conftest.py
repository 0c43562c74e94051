from collections.abc import Iterator
from pathlib import Path

import pytest

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
    """The database file of a fresh installation, made once and copied for every server."""
    fresh = Server(tmp_path_factory.mktemp("migrated"))
    fresh.http.close()
    for command in (["migrate", "-v0"], ["createsuperuser", "--noinput", "--username=admin", "--email="]):
        outcome = fresh.manage(*command)
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

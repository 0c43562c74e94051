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
    """A real server process of this test's own, with the scripted model behind it."""
    with running(tmp_path, migrated, LLM_BASE_URL=llm.url) as started:
        yield started


@pytest.fixture(scope="session")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty, migrated database file, made once and copied for every server."""
    fresh = Server(tmp_path_factory.mktemp("migrated"))
    outcome = fresh.manage("migrate", "-v0")
    assert outcome.returncode == 0, outcome.stderr
    return fresh.database

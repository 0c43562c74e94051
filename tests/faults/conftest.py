from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults import table
from tests.faults.harness import IN_FULL, FaultyServer, Judge, Trial, faulty
from tests.scripted_llm import ScriptedLLM


@pytest.fixture
def server(tmp_path: Path, migrated: Path, llm: ScriptedLLM) -> Iterator[FaultyServer]:
    """A server of this test's own that can be told to fail."""
    with faulty(tmp_path, migrated, llm) as started:
        yield started


@pytest.fixture(scope="session")
def judge() -> Judge:
    """Ends a trial of so many tries: what it found is kept for the table, and has to be nothing."""

    def judge(trial: Trial, tries: int) -> None:
        judged = trial.judged(tries)
        table.judged.append(judged.row)
        said = "\n".join(map(str, judged.complaints[:20]))
        assert judged.complaints == [], f"{trial.fault}, seed {trial.seed}:\n{said}"

    return judge


def pytest_sessionfinish(session: pytest.Session) -> None:
    if IN_FULL and table.judged:
        table.write(table.judged)

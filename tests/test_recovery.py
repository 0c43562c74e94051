"""Start-up recovery with real processes: everything is taken up once, and what kills the server is found."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests import databases
from tests.scripted_llm import Gate, Reply, ScriptedLLM, hold, silence
from tests.server import Server, eventually, running

POISON = "What kills whoever works on it"
SEED = """
from tests.factories import make_session, make_turn
for number in range({count}):
    make_turn(make_session(f"s{{number:03}}"), "{poison}" if number == {poisoned} else "hello")
"""


def with_turns(server: Server, count: int, *, poisoned: int = -1) -> None:
    """Queue turns, each in a session of its own, while no server runs."""
    outcome = server.manage("shell", "-v0", "-c", SEED.format(count=count, poisoned=poisoned, poison=POISON))
    assert outcome.returncode == 0, outcome.stderr


def ended(server: Server) -> Counter[tuple[Any, ...]]:
    return Counter(databases.rows(server.database, "SELECT status, code FROM sessions_app_turn"))


def held(server: Server) -> int:
    (number,) = databases.rows(server.database, "SELECT count(*) FROM sessions_app_turn WHERE status = 'running'")[0]
    return int(number)


def is_poisoned(request: dict[str, Any]) -> bool:
    return any(message["content"] == POISON for message in request["messages"])


def test_a_turn_that_kills_the_server_is_parked_by_its_third_death_and_its_neighbours_complete(
    tmp_path: Path, migrated: Path, llm: ScriptedLLM
) -> None:
    neighbours = Gate()

    def answer(request: dict[str, Any]) -> Reply:
        return silence(60) if is_poisoned(request) else hold("", "All is well.", gate=neighbours)

    def poisons() -> int:
        return sum(map(is_poisoned, llm.answers))

    llm.default = answer
    with running(tmp_path, migrated, LLM_BASE_URL=llm.url, TURN_LEASE_SECONDS="2") as server:
        server.kill()
        with_turns(server, 21, poisoned=7)
        for death in (1, 2):
            server.start()
            # The hardest case: each time all are in the middle of the same step.
            eventually(lambda times=death: len(llm.answers) == 21 * times, seconds=30)
            server.kill()
        neighbours.open()
        server.start()
        eventually(lambda: poisons() == 3, seconds=30)
        server.kill()
        server.start()
        eventually(lambda: ended(server) == {("completed", ""): 20, ("failed", "runner_lost"): 1}, seconds=60)

        assert poisons() == 3
        llm.default = hold("", "Here again.", gate=neighbours)
        assert server.say("s007", "and now?")[-2].data["status"] == "completed"
        by_session = "SELECT count(*) FROM messages_app_message WHERE role = 'assistant' GROUP BY session_id"
        assert databases.rows(server.database, by_session) == [(1,)] * 21


@pytest.mark.parametrize("processes", [1, 2])
def test_a_hundred_open_turns_are_each_taken_up_once_by_one_process_or_two(
    tmp_path: Path, migrated: Path, llm: ScriptedLLM, processes: int
) -> None:
    gate = Gate()
    llm.default = hold("Half a ", "sentence.", gate=gate)
    settings = {"LLM_BASE_URL": llm.url, "TURN_LEASE_SECONDS": "5"}
    with running(tmp_path, migrated, TURNS_AT_ONCE="60", **settings) as server:
        server.kill()
        with_turns(server, 100)
        server.start()
        eventually(lambda: len(llm.answers) == 60, seconds=30)
        assert held(server) == 60
        server.kill()
        gate.open()
        others = [Server(tmp_path, **settings) for _ in range(processes - 1)]
        try:
            for each in (server, *others):
                each.start()
            eventually(lambda: ended(server) == {("completed", ""): 100}, seconds=60)
        finally:
            for other in others:
                other.http.close()
                other.kill()

        claimed = Counter(databases.rows(server.database, "SELECT attempt FROM sessions_app_turn"))
        assert claimed == {(2,): 60, (1,): 40}, "those that were interrupted once more, the others for the first time"
        said = databases.rows(server.database, "SELECT content FROM messages_app_message WHERE role = 'assistant'")
        assert said == [("Half a sentence.",)] * 100
        assert len(llm.answers) == 160

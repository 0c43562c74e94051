"""F16: the same request again and again at the same moment, with an Idempotency-Key and without."""

import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from threading import Barrier
from typing import Any

import httpx

from tests.faults.harness import IN_FULL, FaultyServer, Judge, Trial, seed
from tests.faults.record import Decided, Reported, Said
from tests.faults.talker import AGENT, WRITE
from tests.scripted_llm import Reply, ScriptedLLM, call, say
from tests.server import AUTH, Frame, eventually, parse_frames

ROUNDS = 20 if IN_FULL else 2
AT_ONCE = 50


def writes(request: dict[str, Any]) -> Reply:
    return say("Written.") if request["messages"][-1]["role"] == "tool" else call("write_file", WRITE, id="1")


def test_the_same_decision_and_the_same_result_fifty_times_at_once(
    server: FaultyServer, llm: ScriptedLLM, judge: Judge
) -> None:
    trial = Trial("F16", [server], llm, seed=seed())
    llm.default = writes
    with many_connections(server) as http:
        for number in range(ROUNDS):
            session_id = f"f16-{number}"
            frames = server.say(session_id, "write", agent_type=AGENT)
            (call_id,) = [frame.data["call_id"] for frame in frames if frame.type == "tool_call"]
            verdict = trial.chance.choice(("approve", "reject"))
            decide = partial(http.post, f"/approvals/{call_id}/decision", json={"decision": verdict})
            answers = at_once(decide)
            for answer in answers:
                assert answer.status_code in (200, 409), answer.text
                trial.record.add(confirmed(session_id, call_id, answer.json()))
            assert [answer.status_code for answer in answers].count(200) == 1
            if verdict == "approve":
                message = {"type": "tool_result", "call_id": call_id, "result": "done"}
                body = {"session_id": session_id, "message": message}
                answers = at_once(partial(http.post, "/agent/message/stream", json=body))
                assert {answer.status_code for answer in answers} == {200}
                reported = Reported(session_id=session_id, call_id=call_id, text="done", is_acknowledged=True)
                trial.record.add(reported)
                assert sum("turn_finished" in answer.text for answer in answers) == 1

    trial.settle()
    assert len(llm.answers) == 2 * ROUNDS, "the model was asked once with each result"
    judge(trial, 2 * ROUNDS * AT_ONCE)


def test_the_same_request_fifty_times_at_once_under_one_key(
    server: FaultyServer, llm: ScriptedLLM, judge: Judge
) -> None:
    trial = Trial("F16 with a key", [server], llm, seed=seed())
    llm.default = writes
    with many_connections(server) as http:

        def repeated(path: str, body: dict[str, Any]) -> list[httpx.Response]:
            """Whoever is told to come back does so, with the same key."""
            post = partial(http.post, path, json=body, headers={"Idempotency-Key": str(uuid.uuid4())})
            return at_once(lambda: eventually(lambda: taken(post()), seconds=60))

        def told(session_id: str, message: dict[str, Any]) -> list[Frame]:
            """What each of those who sent it reads."""
            answers = repeated("/agent/message/stream", {"session_id": session_id, "message": message})
            assert {answer.status_code for answer in answers} == {200}
            first, *others = [list(parse_frames(answer.iter_lines())) for answer in answers]
            assert all(other == first for other in others)
            trial.record.saw(session_id, first)
            return first

        for _ in range(ROUNDS):
            created = repeated("/sessions", {})
            assert {answer.status_code for answer in created} == {201}
            (session_id,) = {answer.json()["session_id"] for answer in created}

            frames = told(session_id, {"type": "user_message", "content": "write", "agent_type": AGENT})
            trial.record.add(Said(session_id=session_id, content="write"))
            (call_id,) = [frame.data["call_id"] for frame in frames if frame.type == "tool_call"]

            verdict = trial.chance.choice(("approve", "reject"))
            decided = repeated(f"/approvals/{call_id}/decision", {"decision": verdict})
            assert {answer.status_code for answer in decided} == {200}
            assert len({answer.content for answer in decided}) == 1
            trial.record.add(confirmed(session_id, call_id, decided[0].json()))

            if verdict == "approve":
                frames = told(session_id, {"type": "tool_result", "call_id": call_id, "result": "done"})
                trial.record.add(Reported(session_id=session_id, call_id=call_id, text="done", is_acknowledged=True))
                assert [frame.type for frame in frames].count("turn_finished") == 1

    trial.settle()
    assert len(llm.answers) == 2 * ROUNDS, "the model was asked once with each message and each result"
    judge(trial, 4 * ROUNDS * AT_ONCE)


@contextmanager
def many_connections(server: FaultyServer) -> Iterator[httpx.Client]:
    limits = httpx.Limits(max_connections=AT_ONCE, keepalive_expiry=2)
    with httpx.Client(base_url=server.url, headers=AUTH, timeout=30, limits=limits) as http:
        yield http


def taken(answer: httpx.Response) -> httpx.Response | None:
    return None if answer.status_code == 503 else answer


def confirmed(session_id: str, call_id: str, made: dict[str, Any]) -> Decided:
    return Decided(
        session_id=session_id,
        call_id=call_id,
        verdict=made["decision"],
        by=made["decided_by"],
        made_at=made["decided_at"],
    )


def at_once(act: Callable[[], httpx.Response]) -> list[httpx.Response]:
    barrier = Barrier(AT_ONCE)

    def together(_: int) -> httpx.Response:
        barrier.wait(30)
        return act()

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(together, range(AT_ONCE)))

"""F16: the same result and the same decision, again and again at the same moment."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Barrier
from typing import Any

import httpx

from tests.faults.harness import IN_FULL, FaultyServer, Judge, Trial, seed
from tests.faults.record import Decided, Reported
from tests.faults.talker import AGENT, WRITE
from tests.scripted_llm import Reply, ScriptedLLM, call, say
from tests.server import AUTH

ROUNDS = 20 if IN_FULL else 2
AT_ONCE = 50


def writes(request: dict[str, Any]) -> Reply:
    return say("Written.") if request["messages"][-1]["role"] == "tool" else call("write_file", WRITE, id="1")


def test_the_same_decision_and_the_same_result_fifty_times_at_once(
    server: FaultyServer, llm: ScriptedLLM, judge: Judge
) -> None:
    trial = Trial("F16", [server], llm, seed=seed())
    llm.default = writes
    limits = httpx.Limits(max_connections=AT_ONCE)
    with httpx.Client(base_url=server.url, headers=AUTH, timeout=30, limits=limits) as http:
        for number in range(ROUNDS):
            session_id = f"f16-{number}"
            frames = server.say(session_id, "write", agent_type=AGENT)
            (call_id,) = [frame.data["call_id"] for frame in frames if frame.type == "tool_call"]
            verdict = trial.chance.choice(("approve", "reject"))
            decide = partial(http.post, f"/approvals/{call_id}/decision", json={"decision": verdict})
            answers = at_once(decide)
            for answer in answers:
                assert answer.status_code in (200, 409), answer.text
                made = answer.json()
                trial.record.add(
                    Decided(
                        session_id=session_id,
                        call_id=call_id,
                        verdict=made["decision"],
                        by=made["decided_by"],
                        made_at=made["decided_at"],
                    )
                )
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


def at_once(act: Callable[[], httpx.Response]) -> list[httpx.Response]:
    barrier = Barrier(AT_ONCE)

    def together(_: int) -> httpx.Response:
        barrier.wait(30)
        return act()

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(together, range(AT_ONCE)))

"""F12: whatever a model does, a turn ends with a code or goes on, the session takes the next message, others go on."""

import socket
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.faults.harness import IN_FULL, ON_ONE_DATABASE, FaultyServer, Judge, Trial, faulty, seed
from tests.faults.record import Said
from tests.faults.talker import AGENT, READ, agent
from tests.scripted_llm import (
    Reply,
    ScriptedLLM,
    bad_json,
    call,
    calls,
    drop,
    empty,
    endless,
    endless_calls,
    html,
    raw,
    say,
    silence,
    slow_bytes,
    status,
)
from tests.server import Frame

pytestmark = ON_ONE_DATABASE

TEXT = b'data: {"choices": [{"index": 0, "delta": {"content": "%s"}, "finish_reason": null}]}\n\n'
END = b'data: {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}\n\ndata: [DONE]\n\n'
PIECE = {"index": 0, "id": "1", "type": "function", "function": {"name": "read_file", "arguments": "x" * 1_000}}

# What the model does, and the code with which the turn fails.
FAILS: dict[str, tuple[Reply, str]] = {
    "429 again and again": (status(429), "model_rate_limited"),
    "429 that asks for an hour": (status(429, retry_after=3600), "model_rate_limited"),
    "500 again and again": (status(500), "model_unavailable"),
    "502 again and again": (status(502), "model_unavailable"),
    "400": (status(400), "model_rejected"),
    "401": (status(401), "model_rejected"),
    "nothing": (silence(10), "model_timeout"),
    "silence in its text": (silence(10, after="Half a "), "model_timeout"),
    "one byte at a time": (slow_bytes(b": a comment that says nothing at all", 0.3), "model_timeout"),
    "a drop in its text": (drop("Half a "), "model_interrupted"),
    "a drop in a call": (drop("I ", call=call("read_file", READ)), "model_interrupted"),
    "drops again and again": (drop(), "model_interrupted"),
    "HTML": (html(), "model_bad_response"),
    "no JSON": (bad_json(), "model_bad_response"),
    "no JSON in its text": (bad_json(after="Half a "), "model_bad_response"),
    "half a character": (raw(TEXT % b"\xf0\x9f", END), "model_bad_response"),
    "an empty answer": (empty(), "model_empty_answer"),
    "blanks": (say("  \n "), "model_empty_answer"),
    "text without end": (endless("and on "), "output_limit"),
    "calls without end": (endless_calls(PIECE), "output_limit"),
}
# What it does once, and then says what it was asked for.
RECOVERS: dict[str, Reply] = {
    "429": status(429),
    "429 that asks for a moment": status(429, retry_after=0.1),
    "500": status(500),
    "503": status(503),
    "a drop before its text": drop(),
    "an unknown tool": call("no_such_tool"),
    "two calls under one id": calls(call("no_such_tool", id="1"), call("no_such_tool", id="1")),
    "a tool of other agents": call("execute_command", {"command": "make"}),
    "arguments that are no JSON": call("read_file", '{"path": '),
    "arguments that do not fit": call("read_file", {"path": 7}),
    "arguments of a megabyte": call("write_file", {"path": "a.md", "content": "x" * 2**20}),
}
# What it says, and what is kept of it.
KEPT: dict[str, tuple[Reply, str]] = {
    "NUL": (raw(TEXT % rb"a\u0000b", END), "a\ufffdb"),
    "half a surrogate": (raw(TEXT % rb"a\ud800b", END), "a\ufffdb"),
    "another end of lines": (raw((TEXT % b"a b").replace(b"\n", b"\r\n"), END), "a b"),
}


# Longer than a name may be: it is looked up nowhere.
NAMELESS = ".".join(["nowhere"] * 40)
LOOPS = {"calls again and again": (call("no_such_tool"), "too_many_rounds")}
NEXT = "and now?"


class Moody:
    """A model that does what the last message asks of it."""

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()

    def __call__(self, request: dict[str, Any]) -> Reply:
        said = [one["content"] for one in request["messages"] if one["role"] == "user"][-1]
        if said.endswith(NEXT):
            return say("Here again.")
        what = said.rpartition("do: ")[2]
        self.asked[what] += 1
        if what in FAILS:
            return FAILS[what][0]
        if what in LOOPS:
            return LOOPS[what][0]
        if what in KEPT:
            return KEPT[what][0]
        if what in RECOVERS:
            return RECOVERS[what] if self.asked[what] == 1 else say("As I was asked.")
        return agent(request)


@pytest.fixture
def hurried(tmp_path: Path, migrated: Path, llm: ScriptedLLM) -> Iterator[FaultyServer]:
    # Not so short that a busy machine takes the good answers for silence, or loses the lease of an answer without end.
    limits = {
        "LLM_CONNECT_TIMEOUT": "2",
        "LLM_FIRST_TOKEN_TIMEOUT": "3",
        "LLM_TOKEN_TIMEOUT": "3",
        "LLM_RETRIES": "1",
        "TURN_MAX_ROUNDS": "4",
        "TURN_LEASE_SECONDS": "10",
    }
    with faulty(tmp_path, migrated, llm, **limits) as started:
        yield started


def test_whatever_a_model_does_the_session_takes_the_next_message(
    hurried: FaultyServer, llm: ScriptedLLM, judge: Judge
) -> None:
    trial = Trial("F12", [hurried], llm, seed=seed())
    llm.default = Moody()
    every = [*FAILS, *LOOPS, *RECOVERS, *KEPT]
    script = trial.chance.sample(every, len(every) if IN_FULL else 6)

    with trial.conversations(1):
        wrong = {what: said for number, what in enumerate(script) if (said := misbehaving(trial, number, what))}

    judge(trial, len(script))
    assert wrong == {}, f"seed {trial.seed}"


def test_a_model_that_is_gone_and_comes_back(hurried: FaultyServer, llm: ScriptedLLM, judge: Judge) -> None:
    trial = Trial("F12 gone", [hurried], llm, seed=seed())
    llm.default = say("Here again.")
    llm.stop()
    refused = said(trial, "s", "Are you there?")
    with deaf(llm.port):
        unanswered = said(trial, "s", "And now?")
    llm.start()
    back = said(trial, "s", "At last?")

    judge(trial, 2)
    assert [frames[-2].data["code"] for frames in (refused, unanswered)] == ["model_unreachable"] * 2
    assert back[-2].data["status"] == "completed"


def test_a_host_name_that_does_not_resolve(tmp_path: Path, migrated: Path, llm: ScriptedLLM, judge: Judge) -> None:
    with faulty(tmp_path, migrated, llm, LLM_BASE_URL=f"http://{NAMELESS}/v1", LLM_RETRIES="1") as server:
        trial = Trial("F12 name", [server], llm, seed=seed())
        frames = said(trial, "s", "Are you there?")

        judge(trial, 1)
        assert frames[-2].data["code"] == "model_unreachable"


@contextmanager
def deaf(port: int) -> Iterator[None]:
    """Somebody listens there and never takes a connection; those that wait to be taken are as many as may."""
    with socket.create_server(("127.0.0.1", port), backlog=0), ExitStack() as waiting:
        with suppress(TimeoutError):
            while True:
                waiting.enter_context(socket.create_connection(("127.0.0.1", port), timeout=0.5))
        yield


def misbehaving(trial: Trial, number: int, what: str) -> str:
    """Have the model do this in a session of its own; what is wrong with the answer to it, or to the next message."""
    session_id = f"f12-model-{number}"
    frames = said(trial, session_id, f"do: {what}")
    code, expected = frames[-2].data["code"], (FAILS | LOOPS).get(what, (None, None))[1]
    if code != expected:
        return f"it ended with {code}"
    if what in KEPT and frames[-3].data["content"] != KEPT[what][1]:
        return f"{frames[-3].data} was kept"
    if any(frame.type == "tool_call" for frame in frames):
        return "a call was released"
    code = said(trial, session_id, NEXT)[-2].data["code"]
    return "" if code is None else f"the next message ended with {code}"


def said(trial: Trial, session_id: str, content: str) -> list[Frame]:
    frames = trial.server.say(session_id, content, agent_type=AGENT)
    trial.record.add(Said(session_id=session_id, content=content))
    trial.record.saw(session_id, frames)
    return frames

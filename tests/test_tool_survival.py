"""What open calls survive: kills, stops, cancels, deletes, and everybody answering at once (R1, R4, R5, F1, F16)."""

import json
import random
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Barrier, Event
from typing import Any

import httpx
import pytest

from tests import databases
from tests.scripted_llm import Gate, Reply, Say, ScriptedLLM, call, calls, gated, hold, say
from tests.server import AUTH, BRIEF, Frame, Server, eventually, parse_frames, running, until

Object = dict[str, Any]
Death = Callable[[Server], object]

READ = {"path": "a.md"}
WRITE = {"path": "a.md", "content": "as asked"}
EDITED = {"path": "a.md", "content": "as edited"}
EDITS = {"write_file": EDITED, "execute_command": {"command": "make test"}}
VERDICTS = ("approve", "edit", "reject")
BECOMES = {"approve": "approved", "edit": "edited", "reject": "rejected"}
LEASE = 1.0
PATIENCE = 20.0

by_death = pytest.mark.parametrize("die", [Server.kill, Server.stop], ids=["kill -9", "SIGTERM"])


@pytest.fixture
def server(mortal: Server) -> Server:
    return mortal


@pytest.fixture
def session_id(server: Server) -> str:
    return on_coder(server)


def on_coder(server: Server, session_id: str | None = None) -> str:
    session_id = session_id or str(uuid.uuid4())
    server.post({"type": "switch_agent", "agent_type": "coder"}, session_id)
    return session_id


def user(content: str) -> Object:
    return {"type": "user_message", "content": content}


def result(asked: Object, content: Any = "done") -> Object:
    return {"type": "tool_result", "call_id": asked["call_id"], "result": content}


def decision(asked: Object, verdict: str) -> Object:
    edited = {"modified_arguments": EDITS[asked["tool_name"]]} if verdict == "edit" else {}
    return {"type": "hitl_decision", "call_id": asked["call_id"], "decision": verdict, **edited}


def decide(http: httpx.Client, asked: Object, verdict: str) -> httpx.Response:
    """The same over REST."""
    return http.post(f"/approvals/{asked['call_id']}/decision", json=decision(asked, verdict))


def calls_in(frames: list[Frame]) -> list[Object]:
    return [frame.data for frame in frames if frame.type == "tool_call"]


def is_done_only(frames: list[Frame]) -> bool:
    return [frame.event for frame in frames] == ["done"]


def is_completed(frames: list[Frame]) -> bool:
    return frames[-2].type == "turn_finished" and frames[-2].data["status"] == "completed"


def refusal_in(frames: list[Frame]) -> Object:
    """What the one error of an answer says for programs."""
    (error,) = [frame.data["metadata"] for frame in frames if frame.type == "error"]
    return error


def resolutions_in(frames: list[Frame]) -> list[tuple[str, str]]:
    resolved = [frame.data for frame in frames if frame.type == "approval_resolved"]
    return [(one["call_id"], one["metadata"]["decision"]) for one in resolved]


def messages(server: Server, session_id: str) -> list[Object]:
    return server.http.get(f"/sessions/{session_id}/history").json()["messages"]


def results(server: Server, session_id: str) -> list[tuple[str, str]]:
    """Every answer of a call, in the order of history."""
    return [(one["tool_call_id"], one["content"]) for one in messages(server, session_id) if one["role"] == "tool"]


def open_calls(server: Server, session_id: str) -> list[Object]:
    return server.http.get(f"/sessions/{session_id}/open-calls").json()["open_calls"]


def states(server: Server, session_id: str) -> dict[str, str]:
    return {one["call_id"]: one["state"] for one in open_calls(server, session_id)}


def rows(server: Server, query: str, *parameters: str) -> list[tuple[Any, ...]]:
    return databases.rows(server.database, query, *parameters)


def turns(server: Server, session_id: str) -> list[tuple[str, str]]:
    return rows(server, "SELECT status, code FROM sessions_app_turn WHERE session_id = ? ORDER BY position", session_id)


def all_ended(server: Server, session_id: str) -> bool:
    return {status for status, _ in turns(server, session_id)} <= {"completed", "failed", "cancelled"}


def decisions(server: Server, session_id: str) -> list[tuple[str, str]]:
    """Every decision that was stored, with the call that it is about."""
    query = (
        "SELECT approval.call_id, made.verdict FROM agents_app_decision made"
        " JOIN agents_app_approvalrequest approval ON approval.id = made.request_id"
        " WHERE approval.session_id = ? ORDER BY made.id"
    )
    return rows(server, query, session_id)


def told(server: Server, session_id: str) -> list[tuple[str, str]]:
    """Every decision that events tell of."""
    query = "SELECT data FROM events_app_event WHERE session_id = ? AND event_type = 'hitl.decision.made' ORDER BY id"
    facts = [json.loads(data) for (data,) in rows(server, query, session_id)]
    return [(fact["call_id"], fact["decision"]) for fact in facts]


def audited(server: Server, session_id: str) -> list[tuple[str, str]]:
    """Every decision in the audit trail."""
    query = (
        "SELECT target, action FROM events_app_auditentry"
        " WHERE session_id = ? AND outcome = 'done' AND action LIKE 'approval.%' ORDER BY id"
    )
    return [(call_id, action.removeprefix("approval.")) for call_id, action in rows(server, query, session_id)]


def assert_answered_once(server: Server, session_id: str) -> None:
    """Every call of the history has exactly one answer, and nothing is open."""
    history = messages(server, session_id)
    made = [one["id"] for message in history for one in message.get("tool_calls", ())]
    assert Counter(made) == Counter(message["tool_call_id"] for message in history if message["role"] == "tool")
    assert len(made) == len(set(made))
    assert open_calls(server, session_id) == []


# --- killed --------------------------------------------------------------------------------------------------------


@by_death
def test_calls_that_were_told_of_are_open_under_the_same_ids_after_a_restart(
    server: Server, played: ScriptedLLM, session_id: str, die: Death
) -> None:
    asked = len(played.answers)
    played.script(calls(call("read_file", READ), call("write_file", WRITE), text="Two things."))
    with server.streaming(user("go"), session_id) as answer:
        seen = [*until(answer, "tool_call"), *until(answer, "tool_call")]
        die(server)
    down_since = time.monotonic()
    eventually(lambda: time.monotonic() > down_since + LEASE)  # nobody waits for a lease of a turn that waits
    server.start()

    reading, writing = calls_in(seen)
    assert states(server, session_id) == {reading["call_id"]: "released", writing["call_id"]: "waiting"}
    (pending,) = server.http.get(f"/sessions/{session_id}/pending-approvals").json()["pending_approvals"]
    assert (pending["call_id"], pending["arguments"]) == (writing["call_id"], WRITE)
    played.script(say("Both done."))
    assert is_done_only(server.post(result(reading), session_id))
    resolved = server.post(decision(writing, "approve"), session_id)
    assert resolutions_in(resolved) == [(writing["call_id"], "approve")]
    assert is_completed(server.post(result(writing), session_id))

    assert len(played.answers) == asked + 2
    assert results(server, session_id) == [(reading["call_id"], "done"), (writing["call_id"], "done")]
    with server.following(session_id, after=seen[-1].seq) as stream:
        rest = until(stream, "turn_finished")
    assert [frame.type for frame in rest if "token" not in frame.data] == [
        "approval_resolved",
        "assistant_message",
        "turn_finished",
    ], "nothing is told again, and nothing was void"


@by_death
def test_a_decision_that_was_acknowledged_stands_after_a_restart(
    server: Server, played: ScriptedLLM, session_id: str, die: Death
) -> None:
    asked = len(played.answers)
    played.script(call("write_file", WRITE))
    (writing,) = calls_in(server.say(session_id, "go"))
    with server.streaming(decision(writing, "edit"), session_id) as answer:
        until(answer, "approval_resolved")
        die(server)
    server.start()

    (released,) = open_calls(server, session_id)
    again = server.post(decision(writing, "reject"), session_id)
    played.script(say("Written."))
    finished = server.post(result(released), session_id)

    assert (released["call_id"], released["state"]) == (writing["call_id"], "released")
    assert released["arguments"] == EDITED
    assert (refusal_in(again)["code"], refusal_in(again)["decision"]) == ("already_decided", "edit")
    assert is_completed(finished)
    assert len(played.answers) == asked + 2
    ((_, told_to_the_model),) = results(server, session_id)
    assert json.loads(told_to_the_model) == {
        "status": "approved_with_edits",
        "tool_name": "write_file",
        "arguments": EDITED,
        "result": "done",
    }
    once = [(writing["call_id"], "edit")]
    assert decisions(server, session_id) == told(server, session_id) == audited(server, session_id) == once


@by_death
def test_results_that_were_acknowledged_are_not_asked_for_again_when_the_model_has_to_be(
    server: Server, played: ScriptedLLM, session_id: str, die: Death
) -> None:
    gate = Gate()
    asked = len(played.answers)
    played.script(call("read_file", READ), hold("Half a ", "lost answer.", gate=gate), say("A whole answer."))
    (reading,) = calls_in(server.say(session_id, "go"))
    with server.streaming(result(reading, "text of a.md"), session_id) as answer:
        seen = until(answer, "assistant_message")
        gate.reached.wait()
        die(server)
    gate.open()
    server.start()

    with server.following(session_id, after=seen[-1].seq) as stream:
        rest = until(stream, "turn_finished")

    restarted = next(frame for frame in rest if frame.type == "restarted")
    assert restarted.data["metadata"]["discard_after"] < seen[0].seq, "what was streamed of the answer is void"
    whole = [frame.data["content"] for frame in rest if frame.type == "assistant_message" and "content" in frame.data]
    assert whole == ["A whole answer."]
    assert is_done_only(server.post(result(reading, "another text"), session_id))
    assert results(server, session_id) == [(reading["call_id"], "text of a.md")]
    assert len(played.answers) == asked + 3
    assert played.answers[-1] == played.answers[-2], "the same step once more"
    assert turns(server, session_id) == [("completed", "")]


@pytest.mark.parametrize(
    ("verdict", "die"),
    [("approve", Server.kill), ("edit", Server.stop), ("reject", Server.kill), ("reject", Server.stop)],
)
def test_a_decision_stands_as_soon_as_its_request_is_answered(
    server: Server, played: ScriptedLLM, session_id: str, verdict: str, die: Death
) -> None:
    played.script(call("write_file", WRITE))
    (writing,) = calls_in(server.say(session_id, "go"))
    played.default = say("Understood.")

    decided = decide(server.http, writing, verdict)
    die(server)
    server.start()

    assert (decided.status_code, decided.json()["status"]) == (200, BECOMES[verdict])
    again = decide(server.http, writing, "approve")
    assert (again.status_code, again.json()["decision"]) == (409, verdict)
    if verdict != "reject":
        (released,) = open_calls(server, session_id)
        assert released["arguments"] == (EDITED if verdict == "edit" else WRITE)
        server.post(result(released), session_id)
    eventually(lambda: turns(server, session_id) == [("completed", "")])
    assert_answered_once(server, session_id)
    once = [(writing["call_id"], verdict)]
    assert decisions(server, session_id) == told(server, session_id) == audited(server, session_id) == once
    assert messages(server, session_id)[-1]["content"] == "Understood."


KILLS = 8
CLIENTS = 5


class PersistentClient:
    """Drives a session over and over: repeats whatever was not acknowledged, and remembers what was."""

    def __init__(self, server: Server, session_id: str, chance: random.Random) -> None:
        self.server = server
        self.session_id = session_id
        self.chance = chance
        self.http = httpx.Client(base_url=server.url, headers=AUTH, timeout=PATIENCE, limits=BRIEF)
        self.steps = 0
        self.position = 0
        self.said: list[str] = []
        self.decided: dict[str, str] = {}  # by call: the decision that the server first confirmed
        self.tried: dict[str, set[str]] = {}
        self.reported: dict[str, set[str]] = {}  # by call: every result that was sent, acknowledged or not

    def drive(self, enough: Event) -> None:
        while not enough.is_set() or not self.said:
            self._take_a_turn(f"message {len(self.said)}")

    def _take_a_turn(self, content: str) -> None:
        deadline = time.monotonic() + 2 * PATIENCE
        while not self._has_said(content):
            self._send(user(content))
        self.said.append(content)
        while not self._is_answered():
            assert time.monotonic() < deadline, f"{content} is stuck: {turns(self.server, self.session_id)}"
            to_do = self._patiently("/open-calls")["open_calls"]
            for asked in to_do:
                self._deal_with(asked)
            if not to_do:
                self._read_on()

    def _has_said(self, content: str) -> bool:
        return any(one["content"] == content for one in self._patiently("/history")["messages"])

    def _is_answered(self) -> bool:
        last = self._patiently("/history")["messages"][-1]
        return last["role"] == "assistant" and "tool_calls" not in last

    def _read_on(self) -> None:
        """Follow the session's stream to the next call, or to the end of the turn."""
        headers = {"Last-Event-ID": str(self.position)}
        try:
            with self.http.stream("GET", f"/sessions/{self.session_id}/stream", headers=headers) as response:
                for frame in parse_frames(response.iter_lines()):
                    self.steps += 1
                    self.position = frame.seq
                    if frame.type in ("tool_call", "turn_finished"):
                        return
        except httpx.TransportError:
            return

    def _deal_with(self, asked: Object) -> None:
        call_id = asked["call_id"]
        if asked["state"] == "waiting" and self.chance.random() < 0.8:
            # Another verdict than the one that may have been lost: whichever came first has to stand.
            verdict = self.chance.choice(VERDICTS)
            self.tried.setdefault(call_id, set()).add(verdict)
            if self.chance.random() < 0.5:
                self._decide_over_rest(asked, verdict)
            else:
                self._decide_in_the_stream(asked, verdict)
            return
        if asked["state"] == "waiting":
            self.tried.setdefault(call_id, set()).add("approve")
        content = f"result {self.chance.random()}"
        self.reported.setdefault(call_id, set()).add(content)
        acknowledged = self._send(result(asked, content))
        if acknowledged is None:
            return
        if self.chance.random() < 0.3:
            repeated = self._send(result(asked, "too late"))
            assert repeated is None or is_done_only(repeated), repeated

    def _decide_over_rest(self, asked: Object, verdict: str) -> None:
        try:
            answer = decide(self.http, asked, verdict)
        except httpx.TransportError:
            return
        if answer.status_code == 503:
            return
        assert answer.status_code in (200, 409), answer.text
        assert answer.status_code == 200 or answer.json()["code"] == "already_decided"
        self._confirmed(asked, answer.json()["decision"])

    def _decide_in_the_stream(self, asked: Object, verdict: str) -> None:
        frames = self._send(decision(asked, verdict))
        if not frames:
            return
        if resolved := resolutions_in(frames):
            assert resolved[0] == (asked["call_id"], verdict)
            self._confirmed(asked, verdict)
        else:
            assert refusal_in(frames)["code"] == "already_decided"
            self._confirmed(asked, refusal_in(frames)["decision"])

    def _confirmed(self, asked: Object, verdict: str) -> None:
        call_id = asked["call_id"]
        assert verdict in self.tried[call_id], "only its own earlier try may have been faster"
        assert self.decided.setdefault(call_id, verdict) == verdict, "a decision that was confirmed stands"
        self.steps += 1

    def _send(self, message: Object) -> list[Frame] | None:
        """The frames that came back, as far as they came; None when the message was not acknowledged."""
        frames: list[Frame] | None = None
        body = {"session_id": self.session_id, "message": message}
        try:
            with self.http.stream("POST", "/agent/message/stream", json=body) as response:
                if response.status_code == 503:
                    return None
                assert response.status_code == 200, response.read()
                frames = []
                self.steps += 1
                for frame in parse_frames(response.iter_lines()):
                    frames.append(frame)
                    self.steps += 1
        except httpx.TransportError:
            pass
        return frames

    def _patiently(self, path: str) -> Object:
        """A read, repeated until the server is back."""
        answers: list[Object] = []

        def read() -> bool:
            try:
                response = self.http.get(f"/sessions/{self.session_id}{path}")
            except httpx.TransportError:
                return False
            if response.status_code == 200:
                answers.append(response.json())
            return bool(answers)

        eventually(read, seconds=30)
        return answers[0]


def two_rounds_of_calls(request: Object) -> Reply:
    """A model that asks for two calls, then for one, then says that it has finished."""
    asked = [message for message in request["messages"] if message["role"] in ("user", "assistant")]
    rounds = next(number for number, message in enumerate(reversed(asked)) if message["role"] == "user")
    text = "Step by step, word by word. "
    both: Say = calls(call("read_file", READ, id="1"), call("write_file", WRITE, id="1"), text=text)
    last: Say = call("execute_command", {"command": "make"}, text=text)
    step = {0: both, 1: last}.get(rounds, say(f"{text}Finished."))
    return Say(step.text, calls=step.calls, pause=0.002)


def test_random_kills_lose_no_decision_and_no_result_and_repeat_none(
    tmp_path: Path, migrated: Path, llm: ScriptedLLM
) -> None:
    seed = random.randrange(10**6)
    chance = random.Random(seed)
    llm.default = two_rounds_of_calls
    enough = Event()

    with (
        # No turn is to blame for these deaths, however many meet the same one.
        running(
            tmp_path, migrated, LLM_BASE_URL=llm.url, TURN_MAX_LOSSES="100", TURN_LEASE_SECONDS=str(LEASE)
        ) as server,
        ThreadPoolExecutor(CLIENTS) as pool,
    ):
        clients = [
            PersistentClient(server, on_coder(server, f"session-{number}"), random.Random(seed + number))
            for number in range(CLIENTS)
        ]
        driving = [pool.submit(client.drive, enough) for client in clients]
        try:
            for _ in range(KILLS):
                target = sum(client.steps for client in clients) + chance.randrange(1, 70)
                eventually(
                    lambda target=target: (
                        sum(client.steps for client in clients) >= target or any(each.done() for each in driving)
                    ),
                    seconds=30,
                )
                server.kill()
                server.start()
        finally:
            enough.set()
        for each in driving:
            each.result(60)

        for client in clients:
            what = f"seed {seed}, {client.session_id}"
            session_id = client.session_id
            assert set(turns(server, session_id)) == {("completed", "")}, what
            assert_answered_once(server, session_id)
            history = messages(server, session_id)
            assert [one["content"] for one in history if one["role"] == "user"] == client.said, what
            assert [one["role"] for one in history] == [
                "user",
                *("assistant", "tool", "tool"),
                *("assistant", "tool"),
                "assistant",
            ] * len(client.said), what
            # One decision for each approval, and it is the one that was confirmed first.
            made = decisions(server, session_id)
            assert len(made) == 2 * len(client.said), what
            assert Counter(call_id for call_id, _ in made).most_common(1)[0][1] == 1, what
            assert {call_id: verdict for call_id, verdict in made if call_id in client.decided} == client.decided, what
            assert all(verdict in client.tried[call_id] for call_id, verdict in made), what
            assert made == told(server, session_id) == audited(server, session_id), what
            # A result is one that was sent; what came too late is nowhere.
            for call_id, content in results(server, session_id):
                assert any(sent in content for sent in client.reported.get(call_id, ())) or "rejected" in content, what
                assert "too late" not in content, what
            # Each call was told of once, and each approval resolved once.
            frames = whole_stream(server, session_id, len(client.said))
            numbers = [frame.seq for frame in frames]
            assert numbers == sorted(set(numbers)), what
            shown = [one["call_id"] for one in calls_in(frames)]
            assert len(shown) == len(set(shown)) == 3 * len(client.said), what
            assert resolutions_in(frames) == made, what
            client.http.close()
        assert llm.refused == [], f"seed {seed}"


def whole_stream(server: Server, session_id: str, count: int) -> list[Frame]:
    """The session's stream from its beginning to the end of so many turns."""
    frames: list[Frame] = []
    with server.following(session_id) as stream:
        while sum(frame.type == "turn_finished" for frame in frames) < count:
            frames += until(stream, "turn_finished")
    return frames


def test_a_live_follower_sees_over_all_the_waits_what_a_replay_shows(
    server: Server, played: ScriptedLLM, session_id: str
) -> None:
    played.script(*[call("write_file", WRITE, text="One more.")] * 6, say("Enough."))
    with server.following(session_id) as stream, ThreadPoolExecutor(1) as pool:
        following = pool.submit(until, stream, "turn_finished")
        answer = server.say(session_id, "go")
        while writing := calls_in(answer):
            assert decide(server.http, writing[0], "approve").status_code == 200
            answer = server.post(result(writing[0]), session_id)
        live = following.result(30)

    with server.following(session_id) as stream:
        replayed = until(stream, "turn_finished")

    assert [(frame.id, frame.data) for frame in live] == [(frame.id, frame.data) for frame in replayed]
    assert len(calls_in(live)) == len(resolutions_in(live)) == 6


# --- ended from outside --------------------------------------------------------------------------------------------


def test_a_cancel_while_calls_are_open_answers_them_and_the_next_message_works(
    server: Server, played: ScriptedLLM, session_id: str
) -> None:
    asked = len(played.answers)
    played.script(calls(call("read_file", READ), call("write_file", WRITE)), say("Fresh."))
    answer = server.say(session_id, "go")
    reading, writing = calls_in(answer)

    with server.following(session_id, after=answer[-2].seq) as stream:
        cancelled = server.http.post(f"/sessions/{session_id}/cancel", json={}).json()
        seen = until(stream, "turn_finished")
    late = [server.post(result(one, "too late"), session_id) for one in (reading, writing)]
    refused = decide(server.http, writing, "approve")

    assert cancelled["cancelled_turn"] == seen[-1].data["turn_id"]
    assert [frame.type for frame in seen] == ["approval_resolved", "turn_finished"]
    assert resolutions_in(seen) == [(writing["call_id"], "cancelled")]
    assert (seen[-1].data["status"], seen[-1].data["code"]) == ("cancelled", "cancelled")
    assert all(map(is_done_only, late))
    assert (refused.status_code, refused.json()["decision"]) == (409, "cancelled")
    assert_answered_once(server, session_id)
    answers = results(server, session_id)
    assert [call_id for call_id, _ in answers] == [reading["call_id"], writing["call_id"]]
    assert all("cancelled" in text for _, text in answers)
    assert server.http.get(f"/sessions/{session_id}/pending-approvals").json()["count"] == 0
    assert is_completed(server.say(session_id, "again"))
    assert len(played.answers) == asked + 2
    read = [one["content"] for one in played.answers[-1]["messages"] if one["role"] == "tool"]
    assert read == [text for _, text in answers]
    assert turns(server, session_id) == [("cancelled", "cancelled"), ("completed", "")]


def test_a_deleted_session_that_waits_leaves_nothing_to_decide(
    server: Server, played: ScriptedLLM, session_id: str
) -> None:
    asked = len(played.answers)
    played.script(calls(call("read_file", READ), call("write_file", WRITE)))
    answer = server.say(session_id, "go")
    reading, writing = calls_in(answer)

    with server.following(session_id, after=answer[-2].seq) as stream:
        assert server.http.delete(f"/sessions/{session_id}").status_code == 204
        seen = list(stream)  # it ends, with the last word
    gone = [
        server.http.get(f"/sessions/{session_id}/open-calls"),
        server.http.get(f"/sessions/{session_id}/pending-approvals"),
        server.http.get(f"/approvals/{writing['call_id']}"),
        decide(server.http, writing, "approve"),
        *(
            server.http.post("/agent/message/stream", json={"session_id": session_id, "message": message})
            for message in (result(reading), result(writing), decision(writing, "reject"), user("hello?"))
        ),
    ]

    assert [frame.type for frame in seen] == ["approval_resolved", "turn_finished"]
    assert [answer.status_code for answer in gone] == [404] * 8
    everywhere = server.http.get("/approvals?status=all&limit=1000").json()["approvals"]
    assert writing["call_id"] not in [one["call_id"] for one in everywhere]
    once = [(writing["call_id"], "cancelled")]
    assert decisions(server, session_id) == audited(server, session_id) == once
    assert turns(server, session_id) == [("cancelled", "cancelled")]
    assert len(played.answers) == asked + 1


def test_calls_of_an_answer_that_the_user_did_not_wait_for_are_superseded_at_once(
    server: Server, played: ScriptedLLM, session_id: str
) -> None:
    gate = Gate()
    both = calls(call("read_file", READ), call("write_file", WRITE), text="Two things.")
    played.script(gated(both, gate), say("The second answer."))
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(server.say, session_id, "first")
        gate.reached.wait()
        second = pool.submit(server.say, session_id, "second")
        eventually(lambda: len(messages(server, session_id)) == 2)
        gate.open()
        superseded, completed = first.result(30), second.result(30)

    assert calls_in(superseded) == [], "nothing was released"
    assert (superseded[-2].data["status"], superseded[-2].data["code"]) == ("cancelled", "superseded")
    assert is_completed(completed)
    assert_answered_once(server, session_id)
    assert all("superseded" in text for _, text in results(server, session_id))
    assert rows(server, "SELECT id FROM agents_app_approvalrequest WHERE session_id = ?", session_id) == []
    started = "SELECT id FROM events_app_event WHERE session_id = ? AND event_type = 'tool.execution.started'"
    assert rows(server, started, session_id) == []
    assert [one["role"] for one in played.answers[-1]["messages"]] == [
        "system",
        "user",
        "assistant",
        "tool",
        "tool",
        "user",
    ]


# --- all at once ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def crowd(mortal_server: Server) -> Iterator[httpx.Client]:
    """A client that many threads share, with a connection for each."""
    limits = httpx.Limits(max_connections=120, max_keepalive_connections=120, keepalive_expiry=2)
    with httpx.Client(base_url=mortal_server.url, headers=AUTH, timeout=PATIENCE, limits=limits) as http:
        yield http


def posted(http: httpx.Client, session_id: str, message: Object) -> list[Frame]:
    body = {"session_id": session_id, "message": message}
    with http.stream("POST", "/agent/message/stream", json=body) as response:
        assert response.status_code == 200, response.read()
        return list(parse_frames(response.iter_lines()))


def at_once(acts: list[Callable[[], Any]]) -> list[Any]:
    """Do all of it at the same moment, each in a thread of its own."""
    barrier = Barrier(len(acts))

    def act(one: Callable[[], Any]) -> Any:
        barrier.wait(30)
        return one()

    with ThreadPoolExecutor(len(acts)) as pool:
        return list(pool.map(act, acts))


def decided_by(http: httpx.Client, session_id: str, asked: Object, verdict: str, *, over_rest: bool) -> Object:
    """Decide, and what became of it: whether it won, and which decision, made when and by whom, counts."""
    if over_rest:
        answer = decide(http, asked, verdict)
        assert answer.status_code in (200, 409), answer.text
        made = answer.json()
        assert answer.status_code == 200 or made["code"] == "already_decided"
        return {"won": answer.status_code == 200, **{name: made[name] for name in MADE}}
    frames = posted(http, session_id, decision(asked, verdict))
    if resolved := [frame.data["metadata"] for frame in frames if frame.type == "approval_resolved"]:
        return {"won": True, **{name: resolved[0][name] for name in MADE}}
    refusal = refusal_in(frames)
    assert refusal["code"] == "already_decided"
    return {"won": False, **{name: refusal[name] for name in MADE}}


MADE = ("decision", "decided_by", "decided_at")


def test_of_a_hundred_who_decide_at_once_one_wins_and_the_others_are_told_who_and_when(
    server: Server, played: ScriptedLLM, crowd: httpx.Client
) -> None:
    played.default = say("Understood.")
    for _ in range(5):
        session_id = on_coder(server)
        asked = len(played.answers)
        played.script(call("write_file", WRITE))
        (writing,) = calls_in(server.say(session_id, "go"))

        outcomes = at_once(
            [
                partial(decided_by, crowd, session_id, writing, VERDICTS[number % 3], over_rest=number % 2 == 0)
                for number in range(100)
            ]
        )

        (winner,) = [outcome for outcome in outcomes if outcome["won"]]
        assert all(
            {name: outcome[name] for name in MADE} == {name: winner[name] for name in MADE} for outcome in outcomes
        )
        assert winner["decided_by"] == "internal"
        once = [(writing["call_id"], winner["decision"])]
        assert decisions(server, session_id) == told(server, session_id) == audited(server, session_id) == once
        if winner["decision"] == "reject":
            eventually(lambda session_id=session_id: all_ended(server, session_id))
        else:
            assert len(played.answers) == asked + 1, "the model waits for the result"
            (released,) = open_calls(server, session_id)
            assert released["arguments"] == (EDITED if winner["decision"] == "edit" else WRITE)
            assert is_completed(server.post(result(released), session_id))
        assert len(results(server, session_id)) == 1
        assert len(played.answers) == asked + 2
        assert turns(server, session_id) == [("completed", "")]


def test_the_same_result_twenty_times_at_once_is_one_message_and_one_model_request(
    server: Server, played: ScriptedLLM, session_id: str, crowd: httpx.Client
) -> None:
    asked = len(played.answers)
    played.script(call("read_file", READ), say("Read."))
    (reading,) = calls_in(server.say(session_id, "go"))

    answers = at_once([partial(posted, crowd, session_id, result(reading, "text of a.md"))] * 20)

    assert sum(map(is_done_only, answers)) == 19
    assert [is_completed(answer) for answer in answers if not is_done_only(answer)] == [True]
    assert results(server, session_id) == [(reading["call_id"], "text of a.md")]
    assert len(played.answers) == asked + 2


def test_the_same_result_for_a_waiting_call_twenty_times_at_once_is_one_decision(
    server: Server, played: ScriptedLLM, session_id: str, crowd: httpx.Client
) -> None:
    asked = len(played.answers)
    played.script(call("write_file", WRITE), say("Written."))
    (writing,) = calls_in(server.say(session_id, "go"))

    answers = at_once([partial(posted, crowd, session_id, result(writing))] * 20)

    assert sum(map(is_done_only, answers)) == 19
    assert results(server, session_id) == [(writing["call_id"], "done")]
    once = [(writing["call_id"], "approve")]
    assert decisions(server, session_id) == told(server, session_id) == audited(server, session_id) == once
    assert len(played.answers) == asked + 2


def test_when_all_results_come_at_once_the_model_is_asked_once(
    server: Server, played: ScriptedLLM, session_id: str, crowd: httpx.Client
) -> None:
    asked = len(played.answers)
    played.script(calls(*[call("read_file", {"path": f"{number}.md"}) for number in range(5)]), say("Read."))
    reading = calls_in(server.say(session_id, "go"))

    answers = at_once([partial(posted, crowd, session_id, result(one, one["arguments"]["path"])) for one in reading])

    assert sum(map(is_done_only, answers)) == 4
    assert sum(is_completed(answer) for answer in answers if not is_done_only(answer)) == 1
    assert len(played.answers) == asked + 2
    assert dict(results(server, session_id)) == {one["call_id"]: one["arguments"]["path"] for one in reading}


def asks_to_write(request: Object) -> Reply:
    """A model that writes a file when it is told to write, and otherwise agrees."""
    last = request["messages"][-1]
    is_told = last["role"] == "user" and last["content"].endswith("write")
    return call("write_file", WRITE, id="1") if is_told else say("Agreed.")


def test_a_decision_and_a_new_message_at_once_have_one_outcome(
    server: Server, played: ScriptedLLM, crowd: httpx.Client
) -> None:
    played.default = asks_to_write
    for number in range(30):
        session_id = str(uuid.uuid4())
        (writing,) = calls_in(server.say(session_id, "write", agent_type="coder"))

        verdict = VERDICTS[number % 3]
        outcome, answer = at_once(
            [
                partial(decided_by, crowd, session_id, writing, verdict, over_rest=number % 2 == 0),
                partial(posted, crowd, session_id, user("go on")),
            ]
        )

        assert is_completed(answer), f"round {number}"
        eventually(lambda session_id=session_id: all_ended(server, session_id))
        assert_answered_once(server, session_id)
        counts = verdict if outcome["won"] else "superseded"
        assert outcome["decision"] == counts
        once = [(writing["call_id"], counts)]
        assert decisions(server, session_id) == told(server, session_id) == audited(server, session_id) == once
        first, second = turns(server, session_id)
        assert second == ("completed", "")
        assert first == (("completed", "") if counts == "reject" else ("cancelled", "superseded"))


def test_a_decision_and_a_cancel_at_once_have_one_outcome(
    server: Server, played: ScriptedLLM, crowd: httpx.Client
) -> None:
    played.default = asks_to_write
    for number in range(30):
        session_id = str(uuid.uuid4())
        (writing,) = calls_in(server.say(session_id, "write", agent_type="coder"))

        verdict = VERDICTS[number % 3]
        outcome, cancelled = at_once(
            [
                partial(decided_by, crowd, session_id, writing, verdict, over_rest=number % 2 == 0),
                partial(crowd.post, f"/sessions/{session_id}/cancel", json={}),
            ]
        )

        assert cancelled.status_code == 200, cancelled.text
        eventually(lambda session_id=session_id: all_ended(server, session_id))
        assert_answered_once(server, session_id)
        counts = verdict if outcome["won"] else "cancelled"
        assert outcome["decision"] == counts
        once = [(writing["call_id"], counts)]
        assert decisions(server, session_id) == told(server, session_id) == audited(server, session_id) == once
        (ended,) = turns(server, session_id)
        # Only a turn that a rejection let go on may have come to its own end before.
        was_over = cancelled.json()["cancelled_turn"] is None
        assert ended == (("completed", "") if was_over else ("cancelled", "cancelled"))
        assert not was_over or counts == "reject"
        assert is_completed(server.say(session_id, "go on"))

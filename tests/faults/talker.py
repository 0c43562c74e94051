"""A client that goes on until it has its answers, whatever happens to the server, and records all it is told.

And the model that it talks to: what that answers is a function of what it is asked, so the same request always gets the
same answer.
"""

import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any

import httpx

from tests.faults.record import Answered, Decided, Opened, Record, Reported, Said, Stuck
from tests.scripted_llm import Reply, call, calls, say
from tests.server import AUTH, Frame, parse_frames

Object = dict[str, Any]

AGENT = "architect"
# In what clients send: it may come up in no log.
CANARY = "sk-live-canary-4242"
READ = {"path": "plan.md"}
WRITE = {"path": "plan.md", "content": "as asked"}
# What the server itself executes, where it has this tool.
NOTING, NOTE = "add_note", {"text": "it is written"}
EDITED = {"path": "plan.md", "content": f"as edited, {CANARY}"}
VERDICTS = ("approve", "edit", "reject")
# So long a client waits for one answer from beginning to end, the promised 30 s of a takeover among it.
PATIENCE = 90.0
PAUSE = 0.1


def agent(request: Object) -> Reply:
    """Asks to read and to write a file and to note it, hands over to another agent, and says that it has finished."""
    asked = [message["role"] for message in request["messages"] if message["role"] in ("user", "assistant")]
    rounds = next(number for number, role in enumerate(reversed(asked)) if role == "user")
    match rounds:
        case 0:
            all_three = call("read_file", READ, id="1"), call("write_file", WRITE, id="2"), call(NOTING, NOTE, id="3")
            return calls(*all_three, text="First I look, write and note.")
        case 1:
            return call("switch_mode", {"mode": "ask", "reason": "It is written."}, id="1")
        case _:
            # Longer than the pause between two group commits: some of it is logged on the way.
            return say("All of it is done now.", pause=0.03)


class GaveUp(Exception):
    """What was waited for did not come in time."""


class Talker:
    """Drives one session, over any of some addresses; repeats whatever was not acknowledged, and asks first whether it
    was stored."""

    def __init__(
        self,
        session_id: str,
        addresses: Sequence[str],
        record: Record,
        chance: random.Random,
        *,
        timeout: float,
        patience: float,
    ) -> None:
        self.session_id = session_id
        self.turns = 0  # that were seen to their end
        self._addresses = addresses
        self._record = record
        self._chance = chance
        self._patience = patience
        # The server closes what is idle for 5 s, perhaps in the moment in which it is used again.
        limits = httpx.Limits(keepalive_expiry=2)
        self._http = httpx.Client(headers=AUTH, timeout=timeout, limits=limits)
        self._position = 0
        self._is_over = False
        self._until = 0.0
        self._tries = count(1)

    def close(self) -> None:
        self._http.close()

    def converse(self, content: str, **message: Any) -> None:
        """Say something and see to all that it leads to. What does not come in time is recorded."""
        self._until, self._is_over = time.monotonic() + self._patience, False
        try:
            self._say(content, message)
            while not self._is_over:
                open_calls = self._read("/open-calls")["open_calls"]
                for asked in open_calls:
                    self._deal_with(asked)
                if not open_calls:
                    self._read_on()
            self.turns += 1
        except GaveUp as what:
            self._record.add(Stuck(session_id=self.session_id, what=f"{content!r}: {what}"))

    # --- what it wants ---

    def _say(self, content: str, message: Object) -> None:
        while not self._has_said(content):
            if self._send({"type": "user_message", "content": content, **message}) is not None:
                self._record.add(Said(session_id=self.session_id, content=content))
                return
            self._pause("to say it")

    def _has_said(self, content: str) -> bool:
        return any(one["content"] == content for one in self._history())

    def _history(self) -> list[Object]:
        answer = self._patiently("GET", f"/sessions/{self.session_id}/history")
        return [] if answer.status_code == 404 else answer.json()["messages"]

    def _deal_with(self, asked: Object) -> None:
        if asked["executed_by"] == "server":
            self._pause("what the server executes")
            return
        if asked["state"] == "waiting" and self._chance.random() < 0.8:
            # Perhaps another verdict than the one that may have been lost: whichever came first has to stand.
            verdict = self._chance.choice(VERDICTS)
            body = {"type": "hitl_decision", "call_id": asked["call_id"], "decision": verdict}
            if verdict == "edit":
                body["modified_arguments"] = EDITED
            if self._chance.random() < 0.5:
                self._decide_over_rest(body)
            else:
                self._decide_in_the_stream(body)
            return
        text = f"result {next(self._tries)} of {asked['call_id']}, {CANARY}"
        sent = Reported(session_id=self.session_id, call_id=asked["call_id"], text=text)
        self._record.add(sent)
        body = {"type": "tool_result", "call_id": asked["call_id"], "result": text}
        if self._send(body) is None:
            return
        sent.is_acknowledged = True
        if self._chance.random() < 0.2:
            self._send({**body, "result": "too late"})

    def _decide_over_rest(self, body: Object) -> None:
        answer = self._try("POST", f"/approvals/{body['call_id']}/decision", body)
        if answer is None or answer.status_code == 503:
            return
        made = answer.json()
        if answer.status_code in (200, 409) and "decided_by" in made:
            self._confirmed(body["call_id"], made["decision"], made)

    def _decide_in_the_stream(self, body: Object) -> None:
        for frame in self._send(body) or ():
            if frame.type == "error" and frame.data["metadata"].get("code") == "already_decided":
                made = frame.data["metadata"]
                self._confirmed(body["call_id"], made["decision"], made)

    def _confirmed(self, call_id: str, verdict: str, made: Object) -> None:
        confirmed = Decided(
            session_id=self.session_id,
            call_id=call_id,
            verdict=verdict,
            by=made["decided_by"],
            made_at=made["decided_at"],
        )
        self._record.add(confirmed)

    def _read_on(self) -> None:
        """Follow the session's stream to the next call, or to the end of the turn."""
        try:
            with self._streaming("GET", f"/sessions/{self.session_id}/stream", after=self._position) as frames:
                for frame in frames or ():
                    if frame.type in ("tool_call", "turn_finished"):
                        return
        except httpx.TransportError:
            pass
        self._pause("what comes next")

    # --- what it sends ---

    def _send(self, message: Object) -> list[Frame] | None:
        """The frames that came back, as far as they came; None when the message was not acknowledged."""
        received: list[Frame] | None = None
        body = {"session_id": self.session_id, "message": message}
        try:
            with self._streaming("POST", "/agent/message/stream", body, after=self._position) as frames:
                if frames is None:
                    return None
                received = []
                for frame in frames:
                    received.append(frame)
        except httpx.TransportError:
            pass
        return received

    @contextmanager
    def _streaming(
        self, method: str, path: str, body: Object | None = None, *, after: int
    ) -> Iterator[Iterator[Frame] | None]:
        """The frames of an answer, each recorded as it comes; None when it is a refusal."""
        headers = {"Last-Event-ID": str(after)} if method == "GET" and after else {}
        asked_at = time.monotonic()
        with self._http.stream(method, f"{self._address()}{path}", json=body, headers=headers) as answer:
            self._head(f"{method} {path}", answer, asked_at)
            if answer.status_code != 200:
                told = answer.read()
                if answer.status_code < 500:
                    raise GaveUp(f"{path} is answered {answer.status_code}: {told[:200]!r}")
                yield None
                return
            opened = self._record.open(self.session_id, after)
            yield self._recorded(opened, parse_frames(answer.iter_lines()))

    def _recorded(self, opened: Opened, frames: Iterator[Frame]) -> Iterator[Frame]:
        for frame in frames:
            self._record.see(opened, frame)
            self._position = max(self._position, frame.id or 0)
            if frame.type == "approval_resolved":
                made = frame.data["metadata"]
                self._confirmed(frame.data["call_id"], made["decision"], made)
            self._is_over = self._is_over or frame.type == "turn_finished"
            yield frame

    def _read(self, path: str) -> Object:
        answer = self._patiently("GET", f"/sessions/{self.session_id}{path}")
        if answer.status_code != 200:
            raise GaveUp(f"{path} is answered {answer.status_code}")
        found: Object = answer.json()
        return found

    def _patiently(self, method: str, path: str) -> httpx.Response:
        """A request that changes nothing, repeated until the server is back."""
        while True:
            answer = self._try(method, path)
            if answer is not None and answer.status_code < 500:
                return answer
            self._pause(f"{method} {path}")

    def _try(self, method: str, path: str, body: Object | None = None) -> httpx.Response | None:
        asked_at = time.monotonic()
        try:
            answer = self._http.request(method, f"{self._address()}{path}", json=body)
        except httpx.TransportError:
            return None
        self._head(f"{method} {path}", answer, asked_at)
        return answer

    def _head(self, request: str, answer: httpx.Response, asked_at: float) -> None:
        told = Answered(
            session_id=self.session_id,
            request=request,
            status=answer.status_code,
            took=time.monotonic() - asked_at,
            retry_after=answer.headers.get("Retry-After"),
        )
        self._record.add(told)

    def _address(self) -> str:
        return self._chance.choice(self._addresses)

    def _pause(self, what: str) -> None:
        """Before something is tried once more; what it waits for must come some time."""
        if time.monotonic() > self._until:
            raise GaveUp(f"waited in vain for: {what}")
        time.sleep(PAUSE)

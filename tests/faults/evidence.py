"""All that is known after a fault: what clients were told, what the server says now, what its database and log hold."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tests import databases
from tests.faults.record import Fact, Record
from tests.server import AUTH, BRIEF, parse_frames

Object = dict[str, Any]

TERMINAL = ("completed", "failed", "cancelled")


@dataclass
class SessionNow:
    """A session as its client finds it in the end."""

    exists: bool
    history: list[Object]
    replay: list[tuple[int, Object]]  # every frame that the log has, with its number
    open_calls: list[str]
    approvals: dict[str, Object]


@dataclass
class Turn:
    turn_id: str
    session_id: str
    status: str


@dataclass
class Outage:
    """How long after the end of a fault the server was well again; None: it never was."""

    fault: str
    seconds: float | None


@dataclass
class Evidence:
    facts: list[Fact]
    sessions: dict[str, SessionNow]
    turns: list[Turn]
    decisions: list[tuple[str, str]]  # the call and the verdict
    audited: list[tuple[str, str]]
    events: list[tuple[str, str, Object]]  # the session, the type, the data
    refused_by_the_model: list[str]
    log: str
    secrets: list[str]
    outages: list[Outage] = field(default_factory=list)
    back_within: float = 10.0
    executed: list[str] = field(default_factory=list)  # by the server itself, once for each time


def gather(
    record: Record,
    *,
    url: str,
    database: Path,
    log: str,
    refused: Sequence[str],
    secrets: Iterable[str],
    outages: Sequence[Outage],
    back_within: float,
    executed: Sequence[str],
) -> Evidence:
    """Ask a server that is quiet again for all it knows of the sessions in the record."""
    last_numbers = dict(
        databases.rows(database, "SELECT session_id, max(last_seq) FROM events_app_streambatch GROUP BY session_id")
    )
    session_ids = dict.fromkeys(fact.session_id for fact in record.facts)
    with httpx.Client(base_url=url, headers=AUTH, timeout=30, limits=BRIEF) as http:
        sessions = {each: _now(http, each, int(last_numbers.get(each) or 0)) for each in session_ids}
    turns = databases.rows(database, "SELECT id, session_id, status FROM sessions_app_turn")
    decisions = databases.rows(
        database,
        "SELECT approval.call_id, made.verdict FROM agents_app_decision made"
        " JOIN agents_app_approvalrequest approval ON approval.id = made.request_id",
    )
    audited = databases.rows(
        database,
        "SELECT target, action FROM events_app_auditentry WHERE outcome = 'done' AND action LIKE 'approval.%'",
    )
    events = databases.rows(database, "SELECT session_id, event_type, data FROM events_app_event ORDER BY id")
    return Evidence(
        facts=list(record.facts),
        sessions=sessions,
        turns=[Turn(str(turn_id), session_id, status) for turn_id, session_id, status in turns],
        decisions=[(call_id, verdict) for call_id, verdict in decisions],
        audited=[(call_id, action.removeprefix("approval.")) for call_id, action in audited],
        events=[(session_id, kind, json.loads(data)) for session_id, kind, data in events],
        refused_by_the_model=list(refused),
        log=log,
        secrets=list(secrets),
        outages=list(outages),
        back_within=back_within,
        executed=list(executed),
    )


def _now(http: httpx.Client, session_id: str, last: int) -> SessionNow:
    history = http.get(f"/sessions/{session_id}/history")
    if history.status_code == 404:
        return SessionNow(exists=False, history=[], replay=[], open_calls=[], approvals={})
    open_calls = http.get(f"/sessions/{session_id}/open-calls").json()["open_calls"]
    query = {"session_id": session_id, "status": "all", "limit": "1000"}
    approvals = http.get("/approvals", params=query).json()["approvals"]
    return SessionNow(
        exists=True,
        history=history.json()["messages"],
        replay=_replay(http, session_id, last),
        open_calls=[one["call_id"] for one in open_calls],
        approvals={one["call_id"]: one for one in approvals},
    )


def _replay(http: httpx.Client, session_id: str, last: int) -> list[tuple[int, Object]]:
    """The session's stream from its beginning up to the last number in its log."""
    frames: list[tuple[int, Object]] = []
    if last:
        with http.stream("GET", f"/sessions/{session_id}/stream") as answer:
            for frame in parse_frames(answer.iter_lines()):
                frames.append((frame.seq, frame.data))
                if frame.seq >= last:
                    break
    return frames

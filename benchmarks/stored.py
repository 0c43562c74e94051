"""Rows of past turns, made by the database itself in bulk: what an installation holds after a long time.

Every turn has a question and an answer of some hundred characters, its facts, its frames and the records of its model
steps; every tenth asked for a file to be written, which a person approved. On SQLite and on PostgreSQL.
"""

import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg

# Of so many turns one asked for a tool.
WITH_CALL = 10
SECONDS_APART = 2
SQLITE = {
    "uuid": "lower(hex(randomblob(16)))",
    "key": "lower(hex(randomblob(11)))",
    "turn": "format('%s-%s-%s-%s-%s', "
    "substr(t.id, 1, 8), substr(t.id, 9, 4), substr(t.id, 13, 4), substr(t.id, 17, 4), substr(t.id, 21))",
    "at": "strftime('%Y-%m-%d %H:%M:%f000', julianday('now') - ({0}) / 86400.0)",
    "no": "0",
    "yes": "1",
    "json": "{0}",
}
POSTGRESQL = {
    "uuid": "gen_random_uuid()",
    "key": "substr(replace(gen_random_uuid()::text, '-', ''), 1, 22)",
    "turn": "t.id::text",
    "at": "now() - ({0}) * interval '1 second'",
    "no": "false",
    "yes": "true",
    "json": "({0})::jsonb",
}
WORDS = "'The loop reads what was sent and writes it down before anybody is told. '"
QUESTION = f"'Question ' || t.position || ' of this session. ' || {WORDS} || {WORDS}"
ANSWER = f"'Answer ' || t.position || ' of this session. ' || {WORDS} || {WORDS} || {WORDS} || {WORDS}"
ARGUMENTS = """'{"content":"# A line of a file that somebody has to sign off.","path":"src/notes.py"}'"""
ASKED = f"t.position % {WITH_CALL} = 0"


def fill_sqlite(database: Path, turns: int, per_session: int, *, name: str = "stored") -> None:
    """No server may run meanwhile: nothing is synced, and there is no way back from half of it."""
    with closing(sqlite3.connect(database, isolation_level=None)) as connection:
        for pragma in ("journal_mode=OFF", "synchronous=OFF", "cache_size=-4000000"):
            connection.execute(f"PRAGMA {pragma}")
        connection.execute("BEGIN")
        _fill(connection.execute, SQLITE, turns, per_session, name)
        connection.execute("COMMIT")
        connection.execute("PRAGMA journal_mode=WAL")


def fill_postgresql(url: str, turns: int, per_session: int, *, name: str = "stored") -> None:
    with psycopg.connect(url) as connection:
        _fill(connection.execute, POSTGRESQL, turns, per_session, name)
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("VACUUM ANALYZE")


def empty_sessions_sqlite(database: Path, count: int, *, name: str) -> None:
    """Sessions `name`-1 and so on in which nothing was said yet, with a specialist."""
    with closing(sqlite3.connect(database)) as connection, connection:
        connection.executemany(
            "INSERT INTO sessions_app_session (id, account_id, current_agent, switch_count, message_count, turn_count,"
            " is_active, next_seq, pruned_seq) VALUES (?, 1, 'coder', 0, 0, 0, 1, 1, 0)",
            [(f"{name}-{number}",) for number in range(1, count + 1)],
        )


def _fill(execute: Callable[[Any], Any], sql: dict[str, str], turns: int, per_session: int, name: str) -> None:
    sessions = max(turns // per_session, 1)
    per_session = min(per_session, turns)
    no, yes, uuid, turn = sql["no"], sql["yes"], sql["uuid"], sql["turn"]
    # The sessions one after the other, each in the order of its turns.
    age = f"({sessions} - s.i) * {per_session * SECONDS_APART} + ({per_session} - n.i) * {SECONDS_APART} + 600"
    at = "t.created_at"
    messages = 2 * per_session + 2 * (per_session // WITH_CALL)
    ended = f"({sessions} - s.i) * {per_session * SECONDS_APART} + 600"

    def numbers(most: int) -> str:
        return f"(WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {most}) SELECT i FROM n)"  # noqa: S608

    def insert(table: str, columns: dict[str, str], source: str) -> None:
        execute(f"INSERT INTO {table} ({', '.join(columns)}) SELECT {', '.join(columns.values())} FROM {source}")  # noqa: S608

    session = f"'{name}-' || s.i"
    insert(
        "sessions_app_session",
        {"id": session, "account_id": "1", "title": "NULL", "current_agent": "'coder'", "switch_count": "1",
         "message_count": str(messages), "turn_count": str(per_session), "is_active": yes,
         "next_seq": str(10 * per_session + 1), "pruned_seq": "0", "last_activity": sql["at"].format(ended),
         "created_at": sql["at"].format(f"{ended} + {per_session * SECONDS_APART}")},
        f"{numbers(sessions)} s",
    )  # fmt: skip
    insert(
        "sessions_app_turn",
        {"id": uuid, "session_id": session, "position": "n.i", "status": "'completed'", "code": "''",
         "requested_agent": "''", "owner": "''", "attempt": "1", "settled_seq": "0", "handoff_count": "0",
         "round_count": f"CASE WHEN n.i % {WITH_CALL} = 0 THEN 1 ELSE 0 END", "ran_ms": "0", "prompt_tokens": "100",
         "completion_tokens": "200", "total_tokens": "300", "lost_count": "0", "is_singled_out": no,
         "created_at": sql["at"].format(age), "started_at": sql["at"].format(age),
         "finished_at": sql["at"].format(f"{age} - 1")},
        f"{numbers(sessions)} s CROSS JOIN {numbers(per_session)} n ORDER BY s.i, n.i",
    )  # fmt: skip
    insert(
        "sessions_app_handoff",
        {"session_id": "s.id", "from_agent": "'orchestrator'", "to_agent": "'coder'", "reason": "'It is about code.'",
         "confidence": "'high'", "created_at": "s.created_at", "after_position": "1"},
        f"sessions_app_session s WHERE s.id LIKE '{name}-%' ORDER BY s.created_at",
    )  # fmt: skip
    made = f"sessions_app_turn t WHERE t.session_id LIKE '{name}-%'"
    of_session = {"session_id": "t.session_id", "turn_id": "t.id"}

    def message(role: str, content: str, agent: str, round_: str, which: str = "") -> None:
        columns = {"turn_position": "t.position", "role": role, "content": content, "agent": agent, "round": round_}
        source = f"{made} {which} ORDER BY t.created_at"
        insert("messages_app_message", {**of_session, **columns, "created_at": at}, source)

    message("'user'", QUESTION, "''", "0")
    message("'assistant'", "''", "'coder'", "1", f"AND {ASKED}")
    message("'assistant'", ANSWER, "'coder'", "0")
    insert(
        "sessions_app_toolcall",
        {**of_session, "call_id": f"'call_' || {sql['key']}", "round": "1", "position": "0", "agent": "'coder'",
         "tool_name": "'write_file'", "tool_version": "1", "provider_id": "'call_1'", "arguments_text": ARGUMENTS,
         "unusable_arguments": "''", "released_text": "''", "args_hash": "''", "requires_approval": yes,
         "on_server": no, "status": "'answered'", "outcome": "'ok'", "answer": "'Written.'", "created_at": at,
         "released_at": at, "answered_at": at},
        f"{made} AND {ASKED} ORDER BY t.created_at",
    )  # fmt: skip
    insert(
        "agents_app_approvalrequest",
        {"call_id": "c.call_id", "session_id": "c.session_id", "tool_name": "c.tool_name", "args_hash": "''",
         "arguments_text": "c.arguments_text", "reason": "'Writes a file.'", "self_approval": yes,
         "status": "'approved'", "created_at": "c.created_at"},
        f"sessions_app_toolcall c WHERE c.session_id LIKE '{name}-%' ORDER BY c.created_at",
    )  # fmt: skip
    insert(
        "agents_app_decision",
        {"request_id": "r.id", "verdict": "'approve'", "decided_by": "'internal'", "channel": "'api'",
         "feedback": "''", "edited_text": "''", "args_hash": "''", "decided_at": "r.created_at"},
        f"agents_app_approvalrequest r WHERE r.session_id LIKE '{name}-%' ORDER BY r.id",
    )  # fmt: skip

    def fact(event_type: str, data: str, tool: str = "NULL", which: str = "") -> None:
        columns = {
            "event_id": uuid, "account_id": "1", "session_id": "t.session_id", "event_type": f"'{event_type}'",
            "correlation_id": turn, "causation_id": "''", "source": f"'{event_type.partition('.')[0]}'",
            "version": "'1.0'", "tool_name": tool, "data": sql["json"].format(data), "timestamp": at,
        }  # fmt: skip
        insert("events_app_event", columns, f"{made} {which} ORDER BY t.created_at")

    fact("session.message.added", """'{"role":"user","sent_by":"internal"}'""")
    fact("agent.processing.started", """'{"agent":"coder","attempt":1}'""")
    tool = """'{"tool_name":"write_file","call_id":"call_1","agent":"coder"}'"""
    for event_type in ("tool.execution.requested", "tool.approval.required", "tool.execution.completed"):
        fact(event_type, tool, "'write_file'", f"AND {ASKED}")
    fact("agent.processing.completed", """'{"agent":"coder","duration_ms":1000,"success":true}'""")
    fact("session.message.added", """'{"role":"assistant","agent":"coder"}'""")
    frame = """{"type":"assistant_message","token":"word","is_final":false}"""
    quoted = frame.replace('"', '\\"')
    for batch in range(3):
        frames = ",".join(f"""[' || (10 * t.position - 9 + {batch * 3 + k}) || ',"{quoted}"]""" for k in range(3))
        first = f"10 * t.position - 9 + {batch * 3}"
        columns = {
            "session_id": "t.session_id", "origin": turn, "first_seq": first, "last_seq": f"{first} + 2",
            "frames": sql["json"].format(f"'[{frames}]'"), "closes": yes if batch == 2 else no, "created_at": at,
        }  # fmt: skip
        insert("events_app_streambatch", columns, f"{made} ORDER BY t.created_at")
    insert(
        "events_app_modelcall",
        {"account_id": "1", "session_id": "t.session_id", "turn_id": turn, "agent": "'coder'", "model": "'bench'",
         "purpose": "'answer'", "duration_ms": "1000", "prompt_tokens": "100", "completion_tokens": "200",
         "total_tokens": "300", "has_tool_calls": no, "error": "''", "created_at": at},
        f"{made} ORDER BY t.created_at",
    )  # fmt: skip
    insert(
        "events_app_auditentry",
        {"account_id": "1", "at": at, "actor": "'internal'", "channel": "'api'", "address": "'127.0.0.1'",
         "request_id": "''", "action": "'approval.approve'", "outcome": "'done'", "session_id": "t.session_id",
         "target": "'call_1'", "tool_name": "'write_file'", "reason": "''", "details": sql["json"].format("'{}'")},
        f"{made} AND {ASKED} ORDER BY t.created_at",
    )  # fmt: skip

"""What only PostgreSQL does: writers that run at the same time, a pool of connections, a server that is gone.

Threads stand for other processes: each has a connection of its own.
"""

import asyncio
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
from django.contrib.auth.models import User
from django.core.management import call_command
from django.db import connection, transaction
from django.db.models.functions import Now

from agents_app import team
from agents_app.models import Agent, ApprovalRequest, ApprovalRule, TeamVersion, Tool
from events_app import log
from events_app.changes import SESSION, NewFacts
from events_app.chunks import encode_delta
from events_app.database import hop
from events_app.frames import Frame
from messages_app import acceptance, claims
from messages_app.acceptance import Accepted
from messages_app.claims import SUSPECTS_TO_ONE
from messages_app.inbound import UserMessage, own_key
from messages_app.runner import PART, Runner
from messages_app.turn_stream import TurnStream, nothing
from orchestrator_site.local_services import PostgreSQL
from sessions_app import lifecycle, retention
from sessions_app.models import Account, IdempotencyRecord, Session, Turn, lease_end
from tests.factories import CALLER, claim, make_session, make_turn, make_waiting_call
from tests.pages import PASSWORD, logged_in
from tests.scaled import frozen
from tests.scripted_llm import Gate, ScriptedLLM, hold, say
from tests.server import BRIEF, ROOT, Server, eventually, running, until
from tests.test_stream_cost import many_streams
from tests.test_team_admin import add, delete, errors_of

pytestmark = [pytest.mark.postgresql, pytest.mark.django_db(transaction=True, serialized_rollback=True)]


class Elsewhere:
    """Another process, as far as the database can tell: a thread that does one thing at a time."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1)

    def do(self, act: Callable[[], Any]) -> Future[Any]:
        return self._thread.submit(act)

    def end(self) -> None:
        self._thread.submit(lambda: connection.close()).result(10)  # of that thread
        self._thread.shutdown()


@pytest.fixture
def elsewhere() -> Iterator[Elsewhere]:
    other = Elsewhere()
    yield other
    other.end()


def wait_for_a_lock(future: Future[Any]) -> None:
    """Until what is done elsewhere waits for a lock that is held here."""
    query = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"

    def is_waiting() -> bool:
        assert not future.done(), "it did not wait"
        with connection.cursor() as cursor:
            cursor.execute(query)
            return bool(cursor.fetchone()[0])

    eventually(is_waiting)


def let_it_last(turn: Turn, seconds: float) -> None:
    """Let the lease of a turn run out soon, on the database's clock."""
    with connection.cursor() as cursor:
        statement = "UPDATE sessions_app_turn SET lease_until = now() + %s * interval '1 second' WHERE id = %s"
        cursor.execute(statement, [seconds, turn.pk])


def has_run_out(turn: Turn) -> bool:
    return Turn.objects.filter(pk=turn.pk, lease_until__lte=Now()).exists()


# --- Writers at the same time ----------------------------------------------------------------------------------------


def test_a_step_takes_the_session_before_the_turn_as_everybody_does(elsewhere: Elsewhere) -> None:
    session = make_session()
    stream = TurnStream(claim(make_turn(session)))

    with transaction.atomic():
        mine = Session.objects.locked().get(pk=session.pk)
        step = elsewhere.do(lambda: stream.write(nothing))
        wait_for_a_lock(step)
        assert mine.live_turn() is not None  # takes the turn: who has it and waits for the session would never end

    assert step.result(10) == ([], None)


def test_a_session_that_somebody_has_locked_holds_up_no_other_and_is_waited_for_alone(elsewhere: Elsewhere) -> None:
    free, locked = make_turn(make_session("free")), make_turn(make_session("locked"))

    with transaction.atomic():
        Session.objects.locked().get(pk="locked")
        begun, left = elsewhere.do(lambda: claims.claim_in("one", ["free", "locked"])).result(10)
        running = elsewhere.do(lambda: asyncio.run(Runner().take_up("locked")))
        wait_for_a_lock(running)

    assert (begun["free"][0].turn_id, left) == (free.pk, {"locked"})
    running.result(10)
    assert Turn.objects.get(pk=locked.pk).attempt == 1


def test_what_waits_when_a_worker_starts_is_taken_up_without_its_jobs() -> None:
    for number in range(PART + 1):
        make_turn(make_session(f"s{number}"))

    async def start() -> None:
        runner = Runner()
        await runner.take_up_all()
        await runner.finish()

    asyncio.run(start())

    assert Turn.objects.filter(attempt=1, status=Turn.Status.COMPLETED).count() == PART + 1


def test_of_many_suspects_whose_jobs_come_at_once_a_worker_tries_one(settings: Any, llm: ScriptedLLM) -> None:
    settings.LLM_BASE_URL, llm.default = llm.url, hold("Half a ", "sentence.", gate=Gate())
    names = [f"s{number}" for number in range(SUSPECTS_TO_ONE)]
    for name in names:
        make_turn(make_session(name))
    Turn.objects.update(lost_count=settings.TURN_MAX_LOSSES - 1)

    async def take_up_all() -> list[bool]:
        runner = Runner()
        await asyncio.gather(*[runner.take_up(name) for name in names])
        on_trial = await hop(lambda: list(Turn.objects.suspected().values_list("is_singled_out", flat=True)))
        await runner.stop()
        return on_trial

    assert asyncio.run(take_up_all()) == [True]


def test_a_lease_that_runs_out_while_its_renewal_waits_is_not_renewed(elsewhere: Elsewhere) -> None:
    session = make_session()
    turn = make_turn(session)
    held = claim(turn, "one")
    let_it_last(turn, 1)

    with transaction.atomic():
        mine = Session.objects.locked().get(pk=session.pk)
        Turn.objects.select_for_update().get(pk=turn.pk)
        renewal = elsewhere.do(lambda: claims.renew_leases("one", [turn.pk], []))
        wait_for_a_lock(renewal)
        eventually(lambda: has_run_out(turn))
        assert mine.live_turn() is None
        assert mine.reserve_numbers(1) == held.block_end  # for something that is said now

    renewal.result(10)
    assert has_run_out(turn)


def test_a_lease_that_runs_out_while_its_group_commit_waits_has_nothing_logged(elsewhere: Elsewhere) -> None:
    session = make_session()
    turn = make_turn(session)
    held = claim(turn, "one")
    late = Frame.of(held.first_seq, str(turn.pk), encode_delta("late"))
    let_it_last(turn, 1)

    with transaction.atomic():
        Turn.objects.select_for_update().get(pk=turn.pk)
        part = claims.Unlogged(held, [late], wants_numbers=False)
        commit = elsewhere.do(lambda: claims.write_batches("one", [part]))
        wait_for_a_lock(commit)
        eventually(lambda: has_run_out(turn))

    assert commit.result(10) == {}
    assert late.seq not in [frame.seq for frame in log.page(session.pk, 0)[0]]


def test_a_lease_that_is_being_renewed_is_waited_for_and_not_taken_for_one_that_ran_out(elsewhere: Elsewhere) -> None:
    session = make_session()
    turn = make_turn(session)
    held = claim(turn, "one")
    let_it_last(turn, 0.5)

    def position() -> int:
        with transaction.atomic():
            return lifecycle.position(Session.objects.locked().get(pk=session.pk))

    with transaction.atomic():
        assert Turn.objects.lock_live([turn.pk], "one").update(lease_until=lease_end())
        # Nobody else sees that yet.
        eventually(lambda: elsewhere.do(lambda: has_run_out(turn)).result(10))
        asked = elsewhere.do(position)
        wait_for_a_lock(asked)

    assert asked.result(10) == held.settled_seq


def test_a_turn_is_pinned_to_a_team_that_has_been(elsewhere: Elsewhere) -> None:
    """An edit between two of the queries: the agent is taken its tool first, then the rule goes that nobody needs."""
    rule = ApprovalRule.objects.create(tool="execute_command", outcome="deny", reason="Never.")

    def edit() -> None:
        Agent.objects.filter(pk="coder").update(allowed_tools=["read_file"])
        rule.delete()

    edits = [edit]

    def between(execute: Any, sql: str, *arguments: Any) -> Any:
        if 'FROM "agents_app_tool"' in sql and edits:
            elsewhere.do(edits.pop()).result(10)
        return execute(sql, *arguments)

    with connection.execute_wrapper(between):
        version = team.pin()

    pinned = team.Team.of(TeamVersion.objects.get(pk=version).content)
    assert edits == []
    assert pinned.agents["coder"].allowed_tools == ["read_file"]
    assert rule.reason not in [each.reason for each in pinned.rules]


def test_a_rule_that_is_deleted_while_a_step_asks_under_it_outlives_the_step(elsewhere: Elsewhere) -> None:
    staff = logged_in(User.objects.create_superuser("root", password=PASSWORD))
    session, rule = make_session(), ApprovalRule.objects.get(tool="write_file")

    with transaction.atomic():
        call = make_waiting_call(session)
        deletion = elsewhere.do(lambda: delete(staff, rule))
        wait_for_a_lock(deletion)

    assert deletion.result(10).status_code == 302 and not ApprovalRule.objects.filter(pk=rule.pk).exists()
    assert ApprovalRequest.objects.pending().get(call=call).rule is None


def test_of_two_admins_who_add_the_same_tool_the_second_reads_that_it_is_there(elsewhere: Elsewhere) -> None:
    staff = logged_in(User.objects.create_superuser("root", password=PASSWORD))
    parameters = {"type": "object", "properties": {}}

    with transaction.atomic():
        Tool.objects.create(name="deploy", position=50, description="Mine.", parameters=parameters)
        values = {"name": "deploy", "position": "51", "description": "Theirs.", "parameters": json.dumps(parameters)}
        second = elsewhere.do(lambda: add(staff, Tool, **values))
        wait_for_a_lock(second)

    assert "already exists" in errors_of(second.result(10))["name"]
    assert Tool.objects.get(name="deploy").description == "Mine."


HELLO = UserMessage("s", "hello", message_id="m1")


def say_hello() -> Accepted:
    return acceptance.user_message(HELLO, CALLER, own_key(HELLO, CALLER))


@pytest.mark.parametrize("is_refused", [False, True])
def test_who_repeats_a_request_waits_for_what_becomes_of_it(elsewhere: Elsewhere, is_refused: bool) -> None:
    make_session()

    with transaction.atomic():
        mine = say_hello()
        repetition = elsewhere.do(say_hello)
        wait_for_a_lock(repetition)
        transaction.set_rollback(is_refused)

    accepted = repetition.result(10)
    assert (accepted == mine) is not is_refused
    assert str(Turn.objects.get().pk) == accepted.origin


def test_a_key_that_is_being_repeated_is_not_pruned_and_pruning_does_not_wait(elsewhere: Elsewhere) -> None:
    make_session()
    accepted = say_hello()
    IdempotencyRecord.objects.update(created_at=Now() - 2 * retention.KEEP_RECORDS)

    with transaction.atomic():
        assert say_hello() == accepted
        assert elsewhere.do(retention.prune_records).result(10) == 0

    assert elsewhere.do(retention.prune_records).result(10) == 1


def test_a_fact_that_commits_after_one_with_a_higher_number_is_heard_of(elsewhere: Elsewhere) -> None:
    # Numbers go on where an earlier test was, and to begin far behind would be news for everybody.
    log.record(log.fact("session.updated", account_id=1, session_id="before"))
    facts = NewFacts()
    facts.channels()
    recorded, may_commit = threading.Event(), threading.Event()

    def slow() -> None:
        with transaction.atomic():
            log.record(log.fact("session.updated", account_id=1, session_id="slow"))
            recorded.set()
            assert may_commit.wait(10)

    committed = elsewhere.do(slow)
    assert recorded.wait(10)
    log.record(log.fact("session.updated", account_id=1, session_id="fast"))
    assert facts.channels() == {f"{SESSION}fast"}
    may_commit.set()
    committed.result(10)

    assert facts.channels() == {f"{SESSION}slow"}
    assert facts.channels() == set()


def test_the_seeded_account_has_taken_its_number() -> None:
    assert Account.objects.create(name="another").pk != Account.objects.get(name="default").pk


# --- Connections -----------------------------------------------------------------------------------------------------

PROMISED = {
    "statement_timeout": "5s",
    "lock_timeout": "4s",
    "idle_in_transaction_session_timeout": "15s",
    "synchronous_commit": "on",
    "default_transaction_isolation": "read committed",
    "timezone": "UTC",
    "application_name": "countersign",
}


def shown() -> dict[str, str]:
    with connection.cursor() as cursor:
        values = {}
        for name in PROMISED:
            cursor.execute(f"SHOW {name}")
            values[name] = cursor.fetchone()[0]
        return values


def test_a_connection_has_what_is_promised_also_after_it_has_migrated() -> None:
    assert shown() == PROMISED

    call_command("migrate", verbosity=0)

    assert shown() == PROMISED


def test_of_two_starts_one_migrates_after_the_other(tmp_path: Path, migrated: Path) -> None:
    from events_app.management.commands.migrate import LOCK

    with running(tmp_path, migrated) as server, ThreadPoolExecutor(1) as pool:
        other = Server(tmp_path)
        with psycopg.connect(server.environment["DATABASE_URL"], autocommit=True) as first:
            first.execute("SELECT pg_advisory_lock(%s)", [LOCK])
            starting = pool.submit(other.start)
            waiting = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
            eventually(lambda: first.execute(waiting).fetchone() == (1,))
            assert not starting.done()
        try:
            starting.result(30)
        finally:
            other.http.close()
            other.kill()


STREAMS = 200
TURNS = 20
POOL = 8


def test_open_streams_and_turns_take_no_more_connections_than_the_pool_has(
    tmp_path: Path, migrated: Path, llm: ScriptedLLM
) -> None:
    sessions = [f"s{number}" for number in range(TURNS)]
    with running(tmp_path, migrated, LLM_BASE_URL=llm.url, DATABASE_POOL_SIZE=str(POOL)) as server:
        for session_id in sessions:
            server.say(session_id, "hello", agent_type="coder")
        llm.default = say("word " * 60, pause=0.02)
        with (
            many_streams(server, sessions * (STREAMS // TURNS)),
            ThreadPoolExecutor(TURNS) as pool,
            psycopg.connect(server.environment["DATABASE_URL"], autocommit=True) as observer,
        ):
            turns = [pool.submit(server.say, session_id, "go") for session_id in sessions]
            seen = [connections_of(observer)]
            while not all(turn.done() for turn in turns):
                seen.append(connections_of(observer))
            assert [turn.result()[-2].data["status"] for turn in turns] == ["completed"] * TURNS

    assert 1 <= max(seen) <= POOL


def connections_of(observer: psycopg.Connection[Any]) -> int:
    query = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name = %s"
    (number,) = observer.execute(query, ["countersign"]).fetchone() or (0,)
    return int(number)


# --- A server that is gone -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster() -> Iterator[PostgreSQL]:
    """A PostgreSQL server that a test may stop."""
    folder = Path(tempfile.mkdtemp(prefix="countersign-cluster-"))
    folder.chmod(0o755)
    started = PostgreSQL(folder, durable=False)
    started.start()
    with psycopg.connect(started.url("postgres"), autocommit=True) as administrator:
        administrator.execute("CREATE DATABASE countersign")
        administrator.execute("CREATE DATABASE latin ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0")
        administrator.execute("CREATE ROLE guarded LOGIN PASSWORD 'sesame'")
        rules = folder / "data" / "pg_hba.conf"
        rules.write_text(f"host all guarded 127.0.0.1/32 scram-sha-256\n{rules.read_text()}")
        administrator.execute("SELECT pg_reload_conf()")
    yield started
    started.stop(signal.SIGQUIT)
    shutil.rmtree(folder)


def test_a_database_that_stops_is_503_and_what_ran_goes_on_when_it_is_back(
    tmp_path: Path, cluster: PostgreSQL, llm: ScriptedLLM
) -> None:
    gate = Gate()
    server = Server(
        tmp_path, DATABASE_URL=cluster.url("countersign"), LLM_BASE_URL=llm.url, TURN_LEASE_SECONDS="2", LLM_RETRIES="0"
    )
    server.start()
    try:
        server.say("busy", "hello", agent_type="coder")
        llm.script(hold("Half a ", "sentence.", gate=gate))
        llm.default = say("A whole sentence.")
        with (
            ThreadPoolExecutor(60) as pool,
            server.streaming({"type": "user_message", "content": "go"}, "busy") as answer,
        ):
            until(answer, "turn_started")
            gate.reached.wait()
            list(pool.map(lambda _: server.http.get("/sessions"), range(30)))  # as many connections as there may be
            cluster.stop(signal.SIGQUIT)

            refused = [pool.submit(timed, server, *request) for request in REQUESTS * 5]
            for each in refused:
                status, retry_after, took = each.result(30)
                assert (status, retry_after > 0) == (503, True)
                assert took < 10  # 3 s, on a machine that does nothing else
            assert server.http.get("/health").status_code == 200
            gate.open()
            cluster.start()
            back = time.monotonic()
            eventually(lambda: server.http.post("/sessions").status_code == 201)
            eventually(lambda: server.http.get("/sessions").status_code == 200)
            assert time.monotonic() - back < 10
        eventually(lambda: server.history("busy")[-1] == ("assistant", "A whole sentence."), seconds=30)
        server.say("busy", "and now?")
    finally:
        server.http.close()
        server.kill()
        if cluster.process is None or cluster.process.poll() is not None:
            cluster.start()  # other tests need it


def test_a_database_that_is_frozen_is_503_and_all_goes_on_when_it_thaws(
    tmp_path: Path, cluster: PostgreSQL, llm: ScriptedLLM
) -> None:
    server = Server(tmp_path, DATABASE_URL=cluster.url("countersign"), LLM_BASE_URL=llm.url)
    server.start()
    try:
        server.say("busy", "hello", agent_type="coder")
        before = server.history("busy")
        with ThreadPoolExecutor(40) as pool, frozen(cluster):
            refused = [pool.submit(timed, server, *request) for request in FROM_CLIENTS * 10]
            for each in refused:
                status, retry_after, took = each.result(30)
                assert (status, retry_after > 0) == (503, True)
                assert took < 10  # 4.5 s, on a machine that does nothing else
            assert server.http.get("/health").status_code == 200
        eventually(lambda: server.http.post("/sessions").status_code == 201)
        server.say("busy", "and now?")
        # What was refused was not done: what had begun is rolled back, the rest never began.
        since = server.history("busy")[len(before) :]
        assert [text for role, text in since if role == "user"] == ["and now?"]
    finally:
        server.http.close()
        server.kill()


REQUESTS: list[tuple[str, str, dict[str, Any]]] = [
    ("GET", "/sessions", {}),
    ("POST", "/sessions", {}),
    ("GET", "/sessions/busy/stream", {}),
    (
        "POST",
        "/agent/message/stream",
        {"json": {"session_id": "busy", "message": {"type": "user_message", "content": "?"}}},
    ),
    ("POST", "/admin/login/", {"data": {"username": "a", "password": "b"}}),
    ("GET", "/admin/", {"headers": {"Cookie": f"sessionid={'x' * 32}"}}),
]


# The admin's pages are for people, who see for themselves that nothing comes.
FROM_CLIENTS = [request for request in REQUESTS if not request[1].startswith("/admin/")]


def timed(server: Server, method: str, path: str, options: dict[str, Any]) -> tuple[int, int, float]:
    """Status, Retry-After and duration of a request over a connection of its own."""
    with httpx.Client(base_url=server.url, headers=server.http.headers, timeout=30, limits=BRIEF) as client:
        if path == "/admin/login/":
            client.cookies.set("csrftoken", "t" * 32)
            options = {**options, "headers": {"X-CSRFToken": "t" * 32}}
        started = time.monotonic()
        answer = client.request(method, path, **options)
        return answer.status_code, int(answer.headers.get("Retry-After", 0)), time.monotonic() - started


WRONG: dict[str, tuple[str, str]] = {
    "nobody listens": ("postgres://postgres@127.0.0.1:1/countersign", "Connection refused"),
    "no such host": ("postgres://postgres@nowhere.invalid/countersign", "nowhere.invalid"),
    "no such database": ("postgres://postgres@127.0.0.1:{port}/none", 'database "none" does not exist'),
    "a wrong password": ("postgres://guarded:swordfish@127.0.0.1:{port}/countersign", "password authentication failed"),
    "no right to make tables": ("postgres://guarded:sesame@127.0.0.1:{port}/countersign", "permission denied"),
    "another encoding": ("postgres://postgres@127.0.0.1:{port}/latin", "LATIN1"),
    "an option that is none": ("postgres://postgres@127.0.0.1:{port}/countersign?colour=red", "colour"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_start_that_cannot_use_the_database_says_which_setting_and_why(
    tmp_path: Path, cluster: PostgreSQL, wrong: str
) -> None:
    address, why = WRONG[wrong]
    server = Server(tmp_path, DATABASE_URL=address.format(port=cluster.port))
    server.http.close()
    command = [sys.executable, "-m", "orchestrator_site.serve"]
    started = time.monotonic()
    outcome = subprocess.run(
        command, cwd=ROOT, env=server.environment, capture_output=True, text=True, timeout=30, check=False
    )

    assert outcome.returncode == 1
    (line,) = outcome.stderr.strip().splitlines()
    assert line.startswith("Countersign does not start: DATABASE_URL, postgres://")
    assert why in line
    assert "swordfish" not in outcome.stderr and "sesame" not in outcome.stderr
    assert time.monotonic() - started < 20

"""Web processes and workers: any of them serves any session, and what one does the others show."""

import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from redis import from_url

from orchestrator_site.local_services import Redis
from tests import databases
from tests.scaled import Installation, connections, installed
from tests.scripted_llm import Gate, ScriptedLLM, call, hold, say
from tests.server import Frame, eventually, until
from tests.test_repeating import ask, at_once, new_key

pytestmark = pytest.mark.postgresql

COMMAND = '{"command": "make"}'


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Redis]:
    """A Redis that a test may break."""
    server = Redis(tmp_path / "redis")
    server.start()
    yield server
    server.stop()


@pytest.fixture(
    scope="module", params=[pytest.param(True, marks=pytest.mark.redis, id="redis"), pytest.param(False, id="alone")]
)
def shared(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    scaled_template: Path,
    shared_llm: ScriptedLLM,
) -> Iterator[Installation]:
    address = {"REDIS_URL": request.getfixturevalue("redis").url} if request.param else {}
    folder = tmp_path_factory.mktemp("scaled")
    with installed(folder, scaled_template, shared_llm, webs=2, workers=2, **address) as installation:
        yield installation
        assert "Traceback" not in installation.logs, installation.logs


@pytest.fixture
def scaled(shared: Installation, played: ScriptedLLM) -> Iterator[Installation]:
    """Two web processes and two workers, with Redis and without; every test has a session of its own."""
    yield shared
    # A turn that went on behind the test's back would play the next test's script.
    busy = "SELECT count(*) FROM sessions_app_turn WHERE status IN ('queued', 'running')"
    eventually(lambda: shared.rows(busy) == [(0,)])


@pytest.fixture
def breakable(tmp_path: Path, scaled_template: Path, llm: ScriptedLLM) -> Iterator[Installation]:
    """A web process and a worker that a test may kill."""
    llm.route_to = "coder"
    with installed(tmp_path, scaled_template, llm) as installation:
        yield installation


def by_number(frames: list[Frame]) -> list[tuple[int, str]]:
    return [(frame.seq, frame.type) for frame in frames if frame.id is not None]


def test_a_conversation_over_both_processes_is_one(scaled: Installation, played: ScriptedLLM) -> None:
    one, other = scaled.webs
    played.script(call("execute_command", COMMAND, id="c1"), say("It is built."))
    one.http.post("/sessions", json={"session_id": "s0"})

    with ThreadPoolExecutor(1) as pool, other.following("s0") as followed:
        whole = pool.submit(lambda: until(followed, "turn_finished"))
        asked = one.say("s0", "Build it.")
        [waiting] = other.http.get("/sessions/s0/pending-approvals").json()["pending_approvals"]
        decided = other.post({"type": "hitl_decision", "call_id": waiting["call_id"], "decision": "approve"}, "s0")
        [open_call] = one.http.get("/sessions/s0/open-calls").json()["open_calls"]
        answered = one.post({"type": "tool_result", "call_id": open_call["call_id"], "result": "done"}, "s0")
        seen = whole.result(20)

    assert one.history("s0") == other.history("s0")
    assert ("assistant", "It is built.") in one.history("s0")
    assert by_number(seen) == sorted(by_number([*asked, *decided, *answered]))
    assert answered[-1].event == "done"


def test_messages_that_queue_are_answered_in_their_order(scaled: Installation, played: ScriptedLLM) -> None:
    one, other = scaled.webs
    played.default = lambda body: say(f"Answer to {body['messages'][-1]['content']}")
    said = [f"message {number}" for number in range(5)]

    with ThreadPoolExecutor(5) as pool:
        sent = []
        for number, content in enumerate(said):
            web = scaled.webs[number % 2]
            sent.append(pool.submit(web.say, "s1", content))
            eventually(
                lambda: scaled.rows("SELECT count(*) FROM sessions_app_turn WHERE session_id = 's1'") == [(len(sent),)]
            )
        for each in sent:
            assert each.result(20)[-1].event == "done"

    spoken = [content for role, content in other.history("s1") if role == "assistant"]
    assert spoken == [f"Answer to {content}" for content in said]


def test_a_turn_that_a_worker_runs_is_cancelled_by_any_web_process(scaled: Installation, played: ScriptedLLM) -> None:
    one, other = scaled.webs
    gate = Gate()
    played.script(hold("Half an ", "answer.", gate=gate))

    with one.streaming({"type": "user_message", "content": "Go on."}, "s2") as frames:
        until(frames, "assistant_message")
        asked_at = time.monotonic()
        assert other.http.post("/sessions/s2/cancel").json()["cancelled_turn"]
        rest = list(frames)

    assert time.monotonic() - asked_at < 2
    assert [(each.data["status"], each.data["code"]) for each in rest if each.type == "turn_finished"] == [
        ("cancelled", "cancelled")
    ]
    gate.open()


def test_fifty_repetitions_on_both_processes_are_one_turn(scaled: Installation, played: ScriptedLLM) -> None:
    gate, key = Gate(), new_key()
    played.script(hold("Once ", "and for all.", gate=gate))
    body = {"session_id": "s8", "message": {"type": "user_message", "content": "Go", "agent_type": "coder"}}

    with ThreadPoolExecutor(1) as pool:
        answers = pool.submit(at_once, lambda number: ask(scaled.webs[number % 2], body, key))
        gate.reached.wait()
        gate.open()
        first, *others = answers.result(60)

    assert all(other == first for other in others)
    assert scaled.web.history("s8") == [("user", "Go"), ("assistant", "Once and for all.")]


def test_a_message_to_one_process_takes_the_place_of_those_to_the_other(
    scaled: Installation, played: ScriptedLLM
) -> None:
    one, other = scaled.webs
    gate = Gate()
    played.script(hold("Half an ", "answer.", gate=gate), say("At your service."))
    body = {"type": "user_message", "content": "Go", "agent_type": "coder"}

    with one.streaming(body, "s9") as first:
        gate.reached.wait()
        with one.streaming(body, "s9") as queued:
            asked_at = time.monotonic()
            answer = other.post(body, "s9", busy="interrupt")
            ends = [until(frames, "turn_finished")[-1].data["status"] for frames in (first, queued)]
    gate.open()

    assert ends == ["cancelled", "cancelled"]
    assert answer[-2].data["status"] == "completed"
    assert time.monotonic() - asked_at < 4


def test_a_session_deleted_on_one_process_ends_its_streams_on_the_other(scaled: Installation) -> None:
    one, other = scaled.webs
    one.say("s3", "Hello")

    with other.following("s3") as frames:
        until(frames, "turn_finished")
        assert one.http.delete("/sessions/s3").status_code == 204

        assert list(frames) == []


def test_one_of_many_deciders_on_both_processes_wins(scaled: Installation, played: ScriptedLLM) -> None:
    played.script(call("execute_command", COMMAND, id="c1"))
    played.default = say("I see.")
    scaled.web.say("s4", "Build it.")
    [waiting] = scaled.web.http.get("/approvals", params={"session_id": "s4"}).json()["approvals"]

    def decide(number: int) -> int:
        decision = {"decision": "reject" if number % 2 else "approve"}
        path = f"/approvals/{waiting['call_id']}/decision"
        return scaled.webs[number // 2 % 2].http.post(path, json=decision).status_code

    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(decide, range(40)))

    assert sorted(answers) == [200] + [409] * 39
    decisions = "SELECT count(*) FROM agents_app_decision d JOIN agents_app_approvalrequest r ON r.id = d.request_id"
    assert scaled.rows(f"{decisions} WHERE r.session_id = 's4'") == [(1,)]


def test_the_turn_of_a_killed_worker_goes_on_with_another(breakable: Installation, llm: ScriptedLLM) -> None:
    gate = Gate()
    llm.script(hold("Half an ", "answer.", gate=gate), say("A whole answer."))

    with breakable.web.streaming({"type": "user_message", "content": "Go on."}, "s5") as frames:
        first = until(frames, "assistant_message")
        [worker] = breakable.workers
        worker.kill()
        worker.start()
        rest = list(frames)

    assert first[-1].data["token"].strip() == "Half"
    restarted = next(frame for frame in rest if frame.type == "restarted")
    assert restarted.data["metadata"]["discard_after"] < first[-1].seq < restarted.seq
    assert breakable.web.history("s5")[-1] == ("assistant", "A whole answer.")
    # Nothing is left of the job that the dead worker had begun.
    eventually(lambda: breakable.rows("SELECT count(*) FROM procrastinate_jobs") == [(0,)], seconds=30)
    gate.open()


def test_a_turn_that_nobody_was_told_of_is_found(breakable: Installation, llm: ScriptedLLM) -> None:
    [worker] = breakable.workers
    worker.kill()
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(breakable.web.say, "s6", "Hello")
        told = "SELECT count(*) FROM procrastinate_jobs WHERE task_name = 'run_turns'"
        eventually(lambda: breakable.rows(told) == [(1,)])
        databases.change(breakable.database, "DELETE FROM procrastinate_jobs")
        worker.start()

        assert answer.result(25)[-1].event == "done"


def test_a_call_whose_time_is_over_is_ended_by_a_worker(scaled: Installation, played: ScriptedLLM) -> None:
    played.script(call("read_file", '{"path": "a.md"}', id="c1"), say("Then without it."))
    one, other = scaled.webs
    asked = next(frame.data for frame in one.say("s7", "Read it.") if frame.type == "tool_call")
    late = f"UPDATE sessions_app_toolcall SET deadline_at = released_at WHERE call_id = '{asked['call_id']}'"  # noqa: S608

    with other.following("s7") as followed:
        databases.change(scaled.database, late)
        seen = until(followed, "turn_finished")

    errors = [frame.data["metadata"] for frame in seen if frame.type == "error"]
    assert errors == [{"code": "tool_timed_out", "call_id": asked["call_id"]}]
    assert one.history("s7")[-1] == ("assistant", "Then without it.")


def test_connections_stay_within_the_pools(scaled: Installation, played: ScriptedLLM) -> None:
    played.default = lambda body: say("word " * 20, pause=0.02)

    def say_something(number: int) -> list[str]:
        return [frame.type for frame in scaled.webs[number % 2].say(f"many{number}", "Hello")]

    most = 0
    with ThreadPoolExecutor(40) as pool:
        answers = [pool.submit(say_something, number) for number in range(40)]
        while not all(answer.done() for answer in answers):
            most = max(most, connections(scaled.database))

    for answer in answers:
        assert answer.result().count("assistant_message") > 20, answer.result()
    # Four processes with their pools, and what each worker fetches jobs and listens with.
    assert 4 < most <= 4 * 12 + 2 * 6


def test_readiness_names_the_layer_and_missing_workers(breakable: Installation) -> None:
    def ready() -> tuple[int, dict[str, str]]:
        answer = breakable.web.http.get("/readyz")
        return answer.status_code, answer.json()

    assert ready() == (200, {"status": "ready", "database": "ok", "runner": "ok", "layer": "memory"})

    [worker] = breakable.workers
    worker.stop()

    degraded = (200, {"status": "degraded", "database": "ok", "runner": "missing", "layer": "memory"})
    eventually(lambda: ready() == degraded)


@pytest.mark.redis
def test_streams_go_on_while_redis_is_silent_flushed_gone_and_back(
    tmp_path: Path, scaled_template: Path, llm: ScriptedLLM, own: Redis
) -> None:
    llm.route_to = "coder"
    assert own.process is not None
    with installed(tmp_path, scaled_template, llm, webs=2, REDIS_URL=own.url) as installation:
        one, other = installation.webs

        def follow_a_turn(after: int) -> int:
            """What is posted to one process is seen by a follower of the other, all of it and soon; where it ends."""
            gate = Gate()
            llm.script(hold("Half an ", "answer.", gate=gate))
            with other.following("s", after) as followed, ThreadPoolExecutor(1) as pool:
                said = pool.submit(one.say, "s", "Hello")
                seen = until(followed, "assistant_message")
                gate.open()
                opened_at = time.monotonic()
                seen += until(followed, "turn_finished")
                assert time.monotonic() - opened_at < 5
                assert by_number(seen) == by_number(said.result(10))
            return seen[-1].seq

        one.http.post("/sessions", json={"session_id": "s"})
        position = 0
        for fault, layer in (
            (lambda: None, "ok"),
            (lambda: own.process.send_signal(signal.SIGSTOP), "away"),
            (lambda: own.process.send_signal(signal.SIGCONT), "ok"),
            (lambda: from_url(own.url).flushall(), "ok"),
            (own.stop, "away"),
            (own.start, "ok"),
        ):
            fault()
            position = follow_a_turn(position)
            for web in installation.webs:
                eventually(lambda web=web, layer=layer: web.http.get("/readyz").json()["layer"] == layer)
            position = follow_a_turn(position)

        assert len(installation.web.history("s")) == 24
        assert "Traceback" not in installation.logs, installation.logs


@pytest.mark.redis
def test_two_installations_on_one_redis_do_not_hear_each_other(
    tmp_path: Path, scaled_template: Path, llm: ScriptedLLM, own: Redis
) -> None:
    llm.route_to = "coder"
    gate = Gate()
    llm.script(hold("Half an ", "answer.", gate=gate))
    (tmp_path / "other").mkdir()
    with (
        installed(tmp_path, scaled_template, llm, REDIS_URL=own.url) as one,
        installed(tmp_path / "other", scaled_template, llm, workers=0, REDIS_URL=own.url, SECRET_KEY="o" * 50) as other,
        ThreadPoolExecutor(1) as pool,
    ):
        for installation in (one, other):
            installation.web.http.post("/sessions", json={"session_id": "s"})
        with other.web.following("s") as frames:
            said = pool.submit(one.web.say, "s", "Hello")
            gate.reached.wait()
            gate.open()
            assert said.result(20)[-1].event == "done"
            other.web.http.delete("/sessions/s")

            assert list(frames) == []

"""More messages than a process can begin: who comes while others still wait is refused at once, and nothing else is."""

import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from django.conf import settings

from events_app.admission import CROWD, CROWD_SECONDS, LONGEST_CROWD_SECONDS, Entrance, Newcomer, Overloaded
from messages_app.runner import TAKEN_AT_ONCE
from tests import databases
from tests.scripted_llm import Gate, ScriptedLLM, call, hold
from tests.server import Server, eventually, running
from tests.test_socket import on_coder

STREAM = "/agent/message/stream"
USERS = ("SELECT count(*) FROM messages_app_message WHERE role = 'user'",)


def message(session_id: str, **said: Any) -> dict[str, Any]:
    return {"session_id": session_id, "message": {"type": "user_message", "content": "Hello", **said}}


def stored(server: Server) -> int:
    ((number,),) = databases.rows(server.database, *USERS)
    return int(number)


def test_a_message_is_refused_while_an_earlier_one_still_waits_and_open_work_goes_on(
    tmp_path: Path, llm: ScriptedLLM, migrated: Path
) -> None:
    gate = Gate()
    bounds = {"TURNS_AT_ONCE": "1", "OVERLOAD_SECONDS": "0.01"}
    with running(tmp_path, migrated, LLM_BASE_URL=llm.url, **bounds) as server, ThreadPoolExecutor(2) as pool:
        for session_id in ("called", "runs", "waits"):
            on_coder(server, session_id)
        llm.script(call("read_file", '{"path": "a.md"}'), hold("One ", "moment.", gate=gate))
        (asked,) = [frame.data for frame in server.say("called", "Read it.") if frame.type == "tool_call"]
        runs = pool.submit(server.http.post, STREAM, json=message("runs"))
        gate.reached.wait()
        waits = pool.submit(server.http.post, STREAM, json=message("waits"))
        eventually(lambda: stored(server) == 3)
        until = time.monotonic() + 0.1
        eventually(lambda: time.monotonic() > until)  # longer than anybody may wait

        refusal = eventually(lambda: refused(server.http.post(STREAM, json=message("late"))))

        assert (refusal.json()["code"], refusal.headers["Retry-After"]) == ("overloaded", "1")
        assert server.http.get("/sessions/late").status_code == 404
        result = {"type": "tool_result", "call_id": asked["call_id"], "result": "A text."}
        with server.streaming(result, "called"):
            assert server.http.get("/sessions/called/open-calls").json()["open_calls"] == []
        gate.open()
        for answer in (runs.result(), waits.result()):
            assert '"status":"completed"' in answer.text
        eventually(lambda: server.http.post(STREAM, json=message("late")).is_success)


def refused(answer: Any) -> Any:
    return answer if answer.status_code == 503 else None


def test_whoever_waits_for_a_locked_database_is_no_reason_to_refuse_others(
    tmp_path: Path, llm: ScriptedLLM, migrated: Path
) -> None:
    settings = {"OVERLOAD_SECONDS": "0.3", "LLM_BASE_URL": llm.url}
    with running(tmp_path, migrated, **settings) as server, ThreadPoolExecutor(8) as pool, ExitStack() as locked:
        for number in range(8):
            on_coder(server, f"s{number}")
        locked.enter_context(databases.locked(server.database, "sessions_app_session"))
        posted = [pool.submit(server.http.post, STREAM, json=message(f"s{number}")) for number in range(4)]
        until = time.monotonic() + 0.8
        eventually(lambda: time.monotonic() > until)  # longer than anybody may wait otherwise
        posted += [pool.submit(server.http.post, STREAM, json=message(f"s{number}")) for number in range(4, 8)]
        until = time.monotonic() + 0.3
        eventually(lambda: time.monotonic() > until)
        locked.close()

        assert [each.result().status_code for each in posted] == [200] * 8


# --- Who is taken ----------------------------------------------------------------------------------------------------


def comes(entrance: Entrance, arrived_at: float, now: float | None = None) -> Newcomer | None:
    try:
        return entrance.admit(arrived_at, now)
    except Overloaded:
        return None


def test_a_newcomer_is_taken_unless_somebody_has_waited_for_too_long_when_it_comes() -> None:
    entrance, now, too_long = Entrance(), time.monotonic(), settings.OVERLOAD_SECONDS + 1
    taken = [comes(entrance, now), comes(entrance, now + settings.OVERLOAD_SECONDS / 2)]
    assert all(taken)
    assert not comes(entrance, now + too_long)

    for each in taken:
        assert each is not None
        each.has_begun()

    assert comes(entrance, now + too_long)


def test_a_crowd_is_taken_to_its_last_but_no_second_one_behind_it() -> None:
    entrance, now, apart = Entrance(), time.monotonic(), CROWD_SECONDS / CROWD / 2
    number_in_time = int(settings.OVERLOAD_SECONDS / apart)
    assert all(comes(entrance, now + number * apart) for number in range(2 * number_in_time))

    later = now + LONGEST_CROWD_SECONDS + 1
    assert not any(comes(entrance, later + number * apart) for number in range(2 * CROWD))


def test_many_who_come_one_after_the_other_are_no_crowd() -> None:
    entrance, now, apart = Entrance(), time.monotonic(), CROWD_SECONDS / CROWD * 1.5
    in_time = int(settings.OVERLOAD_SECONDS / apart)

    came = [comes(entrance, now + number * apart) for number in range(3 * in_time)]

    assert all(came[:in_time])
    assert not any(came[2 * in_time :])


def test_more_than_can_begin_in_time_are_refused_before_anybody_has_waited_that_long() -> None:
    """A hundred a second begin, three times as many come: no more wait than can begin in OVERLOAD_SECONDS."""
    entrance, now = Entrance(), time.monotonic()
    waiting: deque[Newcomer] = deque()
    refused_at = most = 0

    for number in range(600):
        moment = now + number / 300
        if (newcomer := comes(entrance, moment, moment)) is not None:
            waiting.append(newcomer)
        elif not refused_at:
            refused_at = number
        if number % 3 == 0 and waiting:
            waiting.popleft().has_begun(moment)
        most = max(most, len(waiting))

    in_time = 100 * settings.OVERLOAD_SECONDS
    assert 0 < refused_at / 300 < settings.OVERLOAD_SECONDS
    assert 0.8 * in_time < most < 1.2 * in_time


def test_no_pace_is_judged_by_a_moment() -> None:
    entrance, now = Entrance(), time.monotonic()
    first = comes(entrance, now, now)
    assert first is not None
    first.has_begun(now)

    assert all(comes(entrance, now, now + number / 1_000) for number in range(CROWD - 1))


def test_no_pace_is_made_of_the_first_of_a_group() -> None:
    """Sixteen begin as they are stored, the others together a little later."""
    entrance, now = Entrance(), time.monotonic()
    came = [comes(entrance, now + number / 1_000, now + number / 1_000) for number in range(100)]
    for newcomer in came[:TAKEN_AT_ONCE]:
        assert newcomer is not None
        newcomer.has_begun(now + 0.18)

    assert all(comes(entrance, now + later, now + later) for later in (0.26, 0.3, 0.4, 0.6, 0.9))


def test_whoever_leaves_makes_no_pace() -> None:
    entrance, now = Entrance(), time.monotonic()
    waiting = [comes(entrance, now, now) for _ in range(100)]
    for newcomer in waiting[:50]:
        assert newcomer is not None
        newcomer.has_left()

    assert comes(entrance, now + 0.6, now + 0.6), "of none is known when it begins"

"""What a turn's first model step starts from, read right after the claim: one query for all that were claimed."""

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from django.db import OperationalError, connection
from django.db.models.functions import Now
from django.test.utils import CaptureQueriesContext

from agents_app.llm import FinishedStep, ModelRequest, TextDelta, Usage
from events_app.models import ModelCall
from messages_app import claims, engine, steps, transcript
from messages_app.models import Message
from messages_app.steps import Scene
from messages_app.turn_stream import TurnStream
from sessions_app.models import Session, Turn
from tests.factories import (
    act,
    let_lease_run_out,
    make_answered_turn,
    make_session,
    make_turn,
    run,
    wanted,
)

# What is seeded is there for each: also for test_postgres.py, which comes after it and cannot begin with less.
pytestmark = pytest.mark.django_db(transaction=True, serialized_rollback=True)


def openings(owner: str = "runner") -> dict[str, Scene | None]:
    """Of what is claimed now, by session."""
    return {each.claim.session_id: each.opening[0] if each.opening else None for each in claims.claim_turns(owner, 100)}


def test_it_is_what_a_look_finds() -> None:
    long_ago = make_session("answered")
    make_answered_turn(long_ago, "one", "first")
    make_answered_turn(long_ago, "two", None)
    for session in (long_ago, make_session("routed", agent="orchestrator"), make_session("new")):
        make_turn(session, f"hello {session.pk}")

    claimed = claims.claim_turns("runner", 100)

    assert {each.claim.session_id for each in claimed} == {"answered", "routed", "new"}
    for each in claimed:
        (scene,) = each.opening
        assert scene == steps.look(each.claim)
        assert scene.user_text == ("hello routed" if each.claim.session_id == "routed" else "")


def test_any_number_of_them_costs_as_many_queries_as_a_few() -> None:
    def cost(number: int) -> int:
        for index in range(number):
            make_turn(make_session(f"{number}-{index}"))
        with CaptureQueriesContext(connection) as queries:
            assert None not in openings().values()
        return len(queries)

    cost(1)  # pins the team
    assert cost(20) == cost(2)


def test_a_conversation_with_tools_is_read_alone_and_left_to_the_look_among_others() -> None:
    session = make_session()
    stream = run(make_turn(session))
    act(stream, wanted("read_file"))
    Turn.objects.update(status=Turn.Status.COMPLETED, finished_at=Now())
    make_turn(session, "and now")
    (alone,) = claims.claim_turns("runner", 1)
    assert alone.opening == [steps.look(alone.claim)]
    Turn.objects.update(status=Turn.Status.COMPLETED, finished_at=Now())

    make_turn(session, "once more")
    make_turn(make_session("other"))

    found = openings()
    assert found["s"] is None
    assert found["other"] is not None


@pytest.mark.parametrize("how", ["many", "long"])
def test_what_takes_long_to_read_is_left_to_the_look(how: str) -> None:
    session = make_session()
    make_answered_turn(session, "one", "x" * (transcript.SHORT_CHARS + (how == "long")))
    if how == "many":
        Session.objects.update(message_count=transcript.SHORT + 1)
    make_turn(session, "two")
    make_turn(make_session("other"))

    found = openings()

    assert found["s"] is None
    assert found["other"] is not None


def test_so_are_those_for_which_there_is_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "OPENING_MESSAGES", 3)
    for number in range(5):
        make_turn(make_session(f"s{number}"))

    assert sorted(scene is not None for scene in openings().values()) == [False, False, True, True, True]


def test_and_what_has_begun_before_or_begins_with_a_handoff() -> None:
    taken_over = make_turn(make_session("taken-over"))
    openings("one")
    let_lease_run_out(taken_over)
    asked_for = make_turn(make_session("asked-for"))
    Turn.objects.filter(pk=asked_for.pk).update(requested_agent="architect")

    assert openings("two") == {"taken-over": None, "asked-for": None}


def test_one_that_cannot_be_told_takes_nothing_from_another() -> None:
    make_turn(make_session("odd", agent="nobody"))
    make_turn(make_session("fine"))

    found = openings()

    assert found["odd"] is None
    assert found["fine"] is not None


def test_what_the_database_cannot_read_keeps_nothing_from_being_claimed() -> None:
    for name in ("one", "two"):
        make_turn(make_session(name))

    with unreadable(Message):
        found = openings()

    assert found == {"one": None, "two": None}
    assert set(Turn.objects.values_list("status", flat=True)) == {"running"}


@contextmanager
def unreadable(model: type[Message]) -> Iterator[None]:
    def fail(execute: Any, sql: str, params: Any, many: bool, context: Any) -> Any:
        if sql.startswith("SELECT") and model._meta.db_table in sql:
            raise OperationalError("Could not decode to UTF-8")
        return execute(sql, params, many, context)

    with connection.execute_wrapper(fail):
        yield


class Model:
    """Answers at once; keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[ModelRequest] = []

    async def stream(self, request: ModelRequest) -> AsyncGenerator[TextDelta | FinishedStep, None]:
        self.asked.append(request)
        yield TextDelta("Done.")
        yield FinishedStep("Done.", [], finish_reason="stop", usage=Usage(1, 1, 2))

    async def aclose(self) -> None:
        """Nothing is open."""


def test_the_model_is_asked_for_it_without_a_look_and_it_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    make_turn(make_session(), "Hello.")
    (begun,) = claims.claim_turns("runner", 1)
    (scene,) = begun.opening
    monkeypatch.setattr(steps, "look", lambda claim: pytest.fail("it was read before"))
    model = Model()

    outcome = asyncio.run(engine.run_turn(TurnStream(begun.claim), model, begun.opening))

    assert outcome == "completed"
    assert [each.messages for each in model.asked] == [scene.messages]
    assert begun.opening == []
    assert ModelCall.objects.get().total_tokens == 2

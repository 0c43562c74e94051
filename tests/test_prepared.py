"""Statements that are compiled once do what Django's own would."""

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytest
from django.db import DatabaseError, IntegrityError, connection, transaction
from django.db.models.constants import OnConflict
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from events_app.models import Event, StreamBatch
from events_app.prepared import Insert, Rows, Update
from sessions_app.models import Session, Turn
from tests.factories import make_session, make_turn

pytestmark = pytest.mark.django_db


def made() -> Turn:
    return make_turn(make_session())


def test_rows_are_those_of_the_queryset_with_what_they_select_along() -> None:
    turn = made()
    others = make_turn(make_session("other"))
    by_session = Rows(
        Turn,
        lambda slot: Turn.objects.filter(session_id=slot("session")).select_related("session").order_by("position"),
    )

    for each in (turn, others):
        (found,) = by_session(session=each.session_id)
        with CaptureQueriesContext(connection) as queries:
            assert found.session.pk == each.session_id
        stored = Turn.objects.get(pk=each.pk)

        assert len(queries) == 0
        assert {field.attname: getattr(found, field.attname) for field in Turn._meta.concrete_fields} == {
            field.attname: getattr(stored, field.attname) for field in Turn._meta.concrete_fields
        }
    assert by_session(session="nobody's") == []
    assert by_session.first(session="nobody's") is None


def test_values_and_annotations_come_as_from_the_queryset() -> None:
    turn = made()
    numbers = Rows(Turn, lambda slot: Turn.objects.filter(pk=slot("id")).values_list("id", "position", "created_at"))
    claimable = Rows(Turn, lambda slot: Turn.objects.claimable().filter(pk=slot("id")))

    assert [tuple(row) for row in numbers(id=turn.pk)] == list(
        Turn.objects.filter(pk=turn.pk).values_list("id", "position", "created_at")
    )
    assert claimable(id=turn.pk)[0].losses == 0  # type: ignore[attr-defined]


def test_an_update_tells_how_many_rows_it_changed_over_all_its_executions() -> None:
    made()
    make_session("other")
    named = Update(Session, lambda slot: Session.objects.filter(pk=slot("id")), lambda slot: {"title": slot("title")})

    assert named(id="s", title="One") == 1
    assert named(id="nobody's", title="One") == 0
    assert named.many([{"id": name, "title": f"It is {name}"} for name in ("s", "other", "nobody's")]) == 2

    assert dict(Session.objects.values_list("id", "title")) == {"s": "It is s", "other": "It is other"}


def test_a_value_is_never_part_of_the_statement() -> None:
    made()
    named = Update(Session, lambda slot: Session.objects.filter(pk=slot("id")), lambda slot: {"title": slot("title")})

    named(id="s", title="'; DELETE FROM sessions_app_session; -- %s")

    assert Session.objects.get().title == "'; DELETE FROM sessions_app_session; -- %s"


def test_a_place_without_its_value_is_an_error() -> None:
    made()
    named = Update(Session, lambda slot: Session.objects.filter(pk=slot("id")), lambda slot: {"title": slot("title")})

    with pytest.raises(KeyError):
        named(id="s")


def test_rows_are_inserted_as_the_model_would() -> None:
    names = (
        "account_id",
        "session_id",
        "event_type",
        "source",
        "data",
        "timestamp",
        "tool_name",
        "event_id",
        "version",
    )
    recorded, now = Insert(Event, *names, "correlation_id", "causation_id"), timezone.now()
    rows = [
        (1, "s", "a", "Привет 'x' %s", data, now + timedelta(seconds=number // 2), None, uuid.uuid4(), "1.0")
        for number, data in enumerate([{"n": 1}, {}, {"text": 'ж"\n'}])
    ]

    with CaptureQueriesContext(connection) as queries:
        recorded([(*row, "", "") for row in rows])
        recorded([])

    assert len(queries) == 1
    assert list(Event.objects.filter(event_type="a").order_by("id").values_list(*names)) == rows


def test_a_row_of_an_instance_has_all_of_its_columns() -> None:
    session = make_session()
    turn = Turn(session=session, position=7, requested_agent="coder", handoff_count=2)

    Insert(Turn).instance(turn)

    stored = Turn.objects.get(pk=turn.pk)
    given = {"position": 7, "status": "queued", "requested_agent": "coder", "handoff_count": 2, "lease_until": None}
    assert {name: getattr(stored, name) for name in given} == given
    assert abs((timezone.now() - stored.created_at).total_seconds()) < 60  # what the database gives
    assert not turn._state.adding


def test_a_row_that_is_there_is_left_if_that_is_asked_for() -> None:
    names = ("session_id", "origin", "first_seq", "last_seq", "frames", "closes", "created_at")
    row = ("s", "o", 1, 1, [[1, "first"]], False, timezone.now())
    again = Insert(StreamBatch, *names, on_conflict=OnConflict.IGNORE)

    again([row])
    again([(*row[:4], [[1, "second"]], *row[5:])])

    assert StreamBatch.objects.get().frames == [[1, "first"]]


def test_any_number_of_values_is_looked_for() -> None:
    turns = [make_turn(make_session(name)) for name in ("a", "b", "c")]
    named = Rows(Turn, lambda slot: Turn.objects.filter(pk__in=slot("id", "ids", many=True)).order_by("session_id"))
    of = Rows(Turn, lambda slot: Turn.objects.filter(session_id__in=slot("session", "ids", many=True)).order_by("id"))

    assert named(ids=[turns[2].pk, turns[0].pk]) == [turns[0], turns[2]]
    assert named(ids=[]) == []
    assert of(ids=["b", "'; --"]) == [turns[1]]


def test_what_the_database_refuses_is_the_error_that_django_knows() -> None:
    logged = Insert(StreamBatch, "session_id", "origin", "first_seq", "last_seq", "frames", "closes", "created_at")
    row = ("s", "o", 1, 1, [[1, "frame"]], False, timezone.now())
    logged([row])

    with pytest.raises(IntegrityError), transaction.atomic():
        logged([row])


def test_a_statement_that_failed_is_executed_again_like_any_other() -> None:
    named = Update(Session, lambda slot: Session.objects.filter(pk=slot("id")), lambda slot: {"title": slot("title")})
    made()
    with pytest.raises(DatabaseError), transaction.atomic(), failing():
        named(id="s", title="no")

    assert named(id="s", title="yes") == 1


@contextmanager
def failing() -> Iterator[None]:
    def fail(execute: Any, sql: str, params: Any, many: bool, context: Any) -> Any:
        raise DatabaseError("the connection is lost")

    with connection.execute_wrapper(fail):
        yield


def test_a_reader_that_has_not_finished_disturbs_no_other_statement() -> None:
    for name in ("a", "b", "c"):
        make_session(name)
    every = Rows(Session, lambda slot: Session.objects.order_by("id").values_list("id"))
    named = Rows(Session, lambda slot: Session.objects.filter(pk=slot("id")).values_list("id"))

    seen = [(each, named(id="b")) for (each,) in every.each()]

    assert seen == [("a", [["b"]]), ("b", [["b"]]), ("c", [["b"]])]

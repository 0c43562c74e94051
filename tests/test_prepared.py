"""Statements that are compiled once do what Django's own would."""

import pytest
from django.db import IntegrityError, connection, transaction
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from events_app import prepared
from events_app.models import Event, StreamBatch
from events_app.prepared import Rows, Update
from messages_app.models import Message
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


def test_rows_of_several_models_are_inserted_as_the_models_would() -> None:
    turn = made()
    said = Message(session=turn.session, turn=turn, turn_position=1, role="user", content="Привет 'x' %s")
    events = [
        Event(account_id=1, session_id="s", event_type="a", source="a", data={"n": number}, timestamp=timezone.now())
        for number in range(3)
    ]

    with CaptureQueriesContext(connection) as queries:
        prepared.insert(said, *events)

    assert len(queries) == 2
    stored = Message.objects.get(content=said.content)
    assert (stored.role, stored.turn_id, stored.agent) == ("user", turn.pk, "")
    assert abs((timezone.now() - stored.created_at).total_seconds()) < 60  # what the database gives
    rows = Event.objects.filter(event_type="a").order_by("id").values_list("event_id", "data", "timestamp", "version")
    assert list(rows) == [(each.event_id, each.data, each.timestamp, "1.0") for each in events]


def test_what_the_database_refuses_is_the_error_that_django_knows() -> None:
    def batch() -> StreamBatch:
        return StreamBatch(session_id="s", origin="o", first_seq=1, last_seq=1, frames=[], created_at=timezone.now())

    prepared.insert(batch())

    with pytest.raises(IntegrityError), transaction.atomic():
        prepared.insert(batch())

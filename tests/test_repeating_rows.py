"""The records of keys: whose they are, how long they are kept, what they cost who has none."""

import json
from dataclasses import replace
from datetime import timedelta

import pytest
from django.db import connection
from django.db.models import F
from django.db.models.functions import Now
from django.test.utils import CaptureQueriesContext

from messages_app import acceptance
from messages_app.acceptance import QueueFull
from messages_app.inbound import Busy, Inbound, SwitchAgent, ToolResult, UserMessage, own_key
from sessions_app import idempotency, retention
from sessions_app.callers import FIRST_ACCOUNT, Caller
from sessions_app.idempotency import Key, KeyReused
from sessions_app.models import Account, IdempotencyRecord, Session, Turn
from tests.factories import CALLER, complete, make_session, make_turn, make_waiting_call, run

pytestmark = pytest.mark.django_db

HELLO = UserMessage("s", "hello")


def key(caller: Caller = CALLER, text: str = "k", said: str = "hello") -> Key:
    return Key(caller, text, idempotency.fingerprint(said))


def test_a_key_is_its_callers_own() -> None:
    make_session()
    elsewhere = Account.objects.create(name="elsewhere")
    callers = [CALLER, Caller(FIRST_ACCOUNT, "somebody else"), Caller(elsewhere.pk, "tests")]

    accepted = [
        acceptance.user_message(UserMessage("s" if caller.account_id == FIRST_ACCOUNT else "t", "hello"), caller, each)
        for caller in callers
        for each in (key(caller), key(caller))
    ]

    assert accepted[::2] == accepted[1::2]
    assert len({each.origin for each in accepted}) == 3
    assert Turn.objects.count() == IdempotencyRecord.objects.count() == 3


def test_another_callers_requests_cannot_be_told_by_their_keys() -> None:
    make_session()
    acceptance.user_message(HELLO, CALLER, key())

    other = Caller(FIRST_ACCOUNT, "somebody else")
    accepted = acceptance.user_message(UserMessage("s", "bye"), other, key(other, said="bye"))

    assert Turn.objects.get(pk=accepted.origin).position == 2


def test_under_a_used_key_nothing_else_is_done() -> None:
    make_session()
    acceptance.user_message(HELLO, CALLER, key())

    with pytest.raises(KeyReused):
        acceptance.switch_agent(SwitchAgent("s", "debug", "because"), CALLER, key(said="switch"))

    assert Session.objects.get().current_agent == "coder"
    assert IdempotencyRecord.objects.get().fingerprint == key().fingerprint


def test_what_is_refused_leaves_no_record() -> None:
    session = make_session()
    for _ in range(6):
        make_turn(session)
        session.refresh_from_db()

    with pytest.raises(QueueFull):
        acceptance.user_message(HELLO, CALLER, key())

    assert not IdempotencyRecord.objects.exists()


def test_a_result_that_came_too_late_is_repeated_as_it_was_answered() -> None:
    call = make_waiting_call(make_session())
    acceptance.tool_result(ToolResult("s", call.pk, "first"), CALLER)

    accepted = [acceptance.tool_result(ToolResult("s", call.pk, "late"), CALLER, key()) for _ in range(2)]

    assert accepted == [accepted[0]] * 2
    assert accepted[0].has_frames is False


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (UserMessage("s", "hi"), UserMessage("s", "hi"), True),
        (UserMessage("s", "hi"), UserMessage("s", "ho"), False),
        (UserMessage("s", "hi"), UserMessage("s", "hi", "ask"), False),
        (UserMessage("s", "hi"), UserMessage("s", "hi", busy=Busy.REJECT), False),
        (SwitchAgent("s", "ask", "a"), SwitchAgent("s", "ask", "b"), False),
        (ToolResult("s", "c", {"a": 1, "b": 2}), ToolResult("s", "c", {"b": 2, "a": 1}), True),
        (ToolResult("s", "c", 1), ToolResult("s", "c", True), False),
        (ToolResult("s", "c", 1), ToolResult("s", "c", "1"), False),
    ],
)
def test_a_message_is_told_by_all_that_it_says(one: Inbound, other: Inbound, same: bool) -> None:
    keys = [own_key(replace(each, message_id="1"), CALLER) for each in (one, other)]

    assert (keys[0] == keys[1]) is same


def test_a_message_is_told_in_the_same_way_by_a_version_that_knows_more_fields() -> None:
    told = own_key(UserMessage("s", "hi", message_id="1"), CALLER)

    sent = {"session_id": "s", "content": "hi", "busy": "enqueue", "message_id": "1"}
    assert told is not None
    assert told.fingerprint == idempotency.fingerprint("UserMessage", sent)


def test_keys_are_forgotten_after_a_day_by_the_clock_of_the_database() -> None:
    session = make_session()
    for place, age in enumerate([timedelta(hours=24, minutes=1), timedelta(hours=23, minutes=59)]):
        acceptance.user_message(HELLO, CALLER, key(text=f"k{place}"))
        IdempotencyRecord.objects.filter(key=f"k{place}").update(created_at=Now() - age)

    assert retention.prune_records() == 1

    assert IdempotencyRecord.objects.get().key == "k1"
    for place in (0, 1):
        acceptance.user_message(HELLO, CALLER, key(text=f"k{place}"))
    assert session.turns.count() == 3, "the forgotten one was a new message, the other was not"


def test_keys_are_pruned_so_many_at_a_time_and_found_by_an_index() -> None:
    IdempotencyRecord.objects.bulk_create(
        IdempotencyRecord(account_id=1, caller="tests", key=f"k{number}", fingerprint="", outcome_text="{}")
        for number in range(retention.RECORDS_AT_ONCE + 5)
    )
    IdempotencyRecord.objects.update(created_at=F("created_at") - timedelta(days=2))
    old = IdempotencyRecord.objects.filter(created_at__lt=Now() - retention.KEEP_RECORDS).order_by("created_at")[:5]

    with CaptureQueriesContext(connection) as queries:
        pruned = [retention.prune_records() for _ in range(3)]

    assert pruned == [retention.RECORDS_AT_ONCE, 5, 0]
    assert len(queries) <= 15
    assert "record_by_age" in old.explain()


def test_a_repeated_message_whose_frames_were_pruned_is_told_that_they_are_gone() -> None:
    make_session()
    accepted = acceptance.user_message(HELLO, CALLER, key())
    assert accepted.lost is None
    complete(run(Turn.objects.get()))
    session = Session.objects.get()
    Session.objects.update(pruned_seq=session.next_seq - 1)

    lost = acceptance.user_message(HELLO, CALLER, key()).lost

    assert lost is not None
    assert json.loads(lost.data) == {"type": "stream_reset", "metadata": {"from": lost.seq + 1}}


def test_a_request_without_a_key_asks_nothing_of_the_records() -> None:
    call = make_waiting_call(make_session())

    with CaptureQueriesContext(connection) as queries:
        acceptance.tool_result(ToolResult("s", call.pk, "done"), CALLER)
        acceptance.user_message(HELLO, CALLER)
        retried = len(queries)
        acceptance.user_message(HELLO, CALLER, key())
        first = len(queries) - retried
        acceptance.user_message(HELLO, CALLER, key())
        repeated = len(queries) - retried - first

    assert not any("idempotencyrecord" in query["sql"] for query in queries.captured_queries[:retried])
    assert repeated <= 6 < first

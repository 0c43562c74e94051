"""What a model reads of a conversation, and what clients read as its history."""

import json
from datetime import timedelta
from typing import Any

import pytest
from django.db.models.functions import Now

from agents_app import approvals
from agents_app.approvals import Choice, Verdict
from agents_app.llm import ModelError
from messages_app import acceptance, transcript
from messages_app.history import history, messages_of
from messages_app.inbound import ToolResult, UserMessage
from sessions_app.models import Session, ToolCall, Turn
from tests.factories import (
    CALLER,
    act,
    complete,
    make_answered_turn,
    make_calls,
    make_session,
    make_turn,
    make_waiting_call,
    run,
    wanted,
)
from tests.scripted_llm import history_problem

pytestmark = pytest.mark.django_db


def chat_of(turn: Turn, tokens: int = 100_000) -> list[dict[str, Any]]:
    chat = transcript.of(turn, prompt="You are the coder", context_tokens=tokens)
    assert history_problem(chat) is None
    # As it is read when the turn is claimed.
    messages = transcript.whole([turn.session_id, "another"])[turn.session_id]
    assert transcript.of(turn, prompt="You are the coder", context_tokens=tokens, messages=messages) == chat
    return chat[1:]


def read(turn: Turn, tokens: int = 100_000) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in chat_of(turn, tokens)]


def answer(call: ToolCall, result: Any = "done") -> None:
    """As its client does, and at a time of its own: the clock of SQLite has milliseconds."""
    acceptance.tool_result(ToolResult(call.session_id, call.pk, result), CALLER)
    earlier = Now() - timedelta(hours=1) + timedelta(seconds=call.turn.calls.exclude(answer="").count())
    ToolCall.objects.filter(pk=call.pk).update(answered_at=earlier)


def made_history(session_id: str = "s") -> list[dict[str, Any]]:
    return list(history(CALLER, session_id)["messages"])


def test_a_turn_reads_what_came_before_it_and_nothing_of_later_turns() -> None:
    session = make_session()
    make_answered_turn(session, "one", "first")
    turn = make_turn(session, "two")
    make_turn(session, "three")

    assert read(turn) == [("user", "one"), ("assistant", "first"), ("user", "two")]


def test_messages_that_got_no_answer_are_joined() -> None:
    session = make_session()
    make_answered_turn(session, "one", None)
    make_answered_turn(session, "two", None)

    assert read(make_turn(session, "three")) == [("user", "one\n\ntwo\n\nthree")]


def test_whole_old_turns_are_left_out_first() -> None:
    session = make_session()
    for number in range(20):
        make_answered_turn(session, f"question {number} " + "x" * 600, "y" * 600)

    messages = read(make_turn(session, "now"), tokens=2_000)

    assert messages[-1] == ("user", "now")
    assert len(messages) == 9, "four whole turns and the question"
    assert messages[0][1].startswith("question 16")


def test_a_message_that_does_not_fit_alone_is_an_error() -> None:
    turn = make_turn(make_session(), "x" * 10_000)

    with pytest.raises(ModelError) as error:
        read(turn, tokens=2_000)

    assert error.value.code == "context_too_long"


# --- tool calls ---


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_results_stand_behind_their_calls_in_the_order_of_their_arrival(order: tuple[int, ...]) -> None:
    calls = make_calls(
        make_session(), wanted("read_file"), wanted("list_files"), wanted("search_in_code"), text="Well."
    )
    for place in order:
        answer(calls[place], f"result {place}")

    in_order = [(calls[place].pk, f"result {place}") for place in order]
    said = made_history()
    assert [message["role"] for message in said] == ["user", "assistant", "tool", "tool", "tool"]
    assert [call["id"] for call in said[1]["tool_calls"]] == [call.pk for call in calls]
    assert [(message["tool_call_id"], message["content"]) for message in said[2:]] == in_order
    chat = chat_of(Turn.objects.get())
    assert [(message["tool_call_id"], message["content"]) for message in chat[2:]] == in_order


def test_history_has_only_the_keys_that_are_set() -> None:
    session = make_session()
    (call,) = make_calls(session, wanted("read_file"))
    answer(call)
    complete(run(Turn.objects.get()), "That was it.")

    assert made_history() == [
        {"role": "user", "content": "hello"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {"id": call.pk, "type": "function", "function": {"name": "read_file", "arguments": '{"path":"a.md"}'}}
            ],
        },
        {"role": "tool", "content": "done", "name": "read_file", "tool_call_id": call.pk},
        {"role": "assistant", "content": "That was it."},
    ]


def test_history_tells_how_the_session_stands() -> None:
    session = make_session(agent="architect")
    act(run(make_turn(session)), wanted("switch_mode", {"mode": "debug", "reason": "it fails"}))

    shown = history(CALLER, "s")

    session.refresh_from_db()
    handoff = session.handoffs.get()
    assert set(shown) == {
        "session_id",
        "messages",
        "message_count",
        "last_activity",
        "current_agent",
        "agent_history",
    }
    assert (shown["session_id"], shown["current_agent"], shown["message_count"]) == ("s", "debug", 3)
    assert shown["last_activity"] == session.last_activity.isoformat()
    assert shown["agent_history"] == [
        {
            "from": "architect",
            "to": "debug",
            "reason": "it fails",
            "timestamp": handoff.created_at.isoformat(),
            "confidence": "medium",
        }
    ]


def test_history_lists_handoffs_oldest_first() -> None:
    session = make_session()
    for agent in ("debug", "ask", "coder"):
        session.hand_over(agent, reason="because", confidence=None, turn_id=None)

    past = history(CALLER, "s")["agent_history"]

    assert [(handoff["from"], handoff["to"]) for handoff in past] == [
        ("coder", "debug"),
        ("debug", "ask"),
        ("ask", "coder"),
    ]


def test_a_call_without_an_answer_has_no_tool_message() -> None:
    session = make_session()
    waiting, released, answered = make_calls(session, wanted(), wanted("read_file"), wanted("list_files"))
    answer(answered)
    approvals.decide_by_id(CALLER, waiting.pk, Choice(Verdict.APPROVE))

    assert [message["tool_call_id"] for message in made_history() if message["role"] == "tool"] == [answered.pk]
    assert released.is_open


def test_messages_of_a_session_have_every_key() -> None:
    session = make_session()
    (call,) = make_calls(session, wanted("read_file"), text="Well.")
    answer(call)
    call.refresh_from_db()
    user, assistant = session.messages.in_order()

    assert messages_of(session) == [
        {
            "id": str(user.pk),
            "role": "user",
            "content": "hello",
            "name": None,
            "tool_call_id": None,
            "tool_calls": None,
            "created_at": user.created_at.isoformat(),
        },
        {
            "id": str(assistant.pk),
            "role": "assistant",
            "content": "Well.",
            "name": None,
            "tool_call_id": None,
            "tool_calls": [
                {"id": call.pk, "type": "function", "function": {"name": "read_file", "arguments": '{"path":"a.md"}'}}
            ],
            "created_at": assistant.created_at.isoformat(),
        },
        {
            "id": call.pk,
            "role": "tool",
            "content": "done",
            "name": "read_file",
            "tool_call_id": call.pk,
            "tool_calls": None,
            "created_at": call.answered_at.isoformat() if call.answered_at else None,
        },
    ]


def test_ids_of_messages_are_all_different() -> None:
    session = make_session()
    for _ in range(3):
        (call,) = make_calls(session, wanted("read_file"))
        answer(call)
        complete(run(Turn.objects.get(pk=call.turn_id)))

    ids = [message["id"] for message in messages_of(session)]
    assert len(set(ids)) == len(ids) == 12


def test_a_model_reads_calls_in_the_form_that_providers_take() -> None:
    session = make_session()
    running = run(make_turn(session))
    act(running, wanted("überraschung.v2 " + "x" * 80, "{}"), wanted("", "{}"))

    asking, first, second = chat_of(Turn.objects.get())[1:]

    assert asking["content"] is None, "providers refuse an empty text beside calls"
    assert [call["function"]["name"] for call in asking["tool_calls"]] == [
        ("_berraschung_v2_" + "x" * 80)[:64],
        "unnamed",
    ]
    for message in (first, second):
        assert set(message) == {"role", "content", "tool_call_id"}, "no name beside a result"
    assert [message["tool_call_id"] for message in (first, second)] == [call["id"] for call in asking["tool_calls"]]
    assert made_history()[2]["name"] == "überraschung.v2 " + "x" * 80, "clients read what the model wrote"


def test_text_beside_calls_is_read_in_one_message_with_them() -> None:
    session = make_session()
    (call,) = make_calls(session, wanted("read_file"), text="Let me look.")
    answer(call)

    assert [message["content"] for message in chat_of(Turn.objects.get())] == ["hello", "Let me look.", "done"]
    assert len(made_history()) == 3


def test_every_round_of_a_turn_has_its_own_calls() -> None:
    session = make_session()
    (first,) = make_calls(session, wanted("read_file"), text="one")
    answer(first, "1")
    act(run(Turn.objects.get()), wanted("list_files"), text="two")
    second = ToolCall.objects.get(round=2)
    answer(second, "2")

    expected = [("user", "hello"), ("assistant", "one"), ("tool", "1"), ("assistant", "two"), ("tool", "2")]
    assert read(Turn.objects.get()) == expected
    assert [(message["role"], message["content"]) for message in made_history()] == expected


def test_an_edited_call_is_read_as_the_model_made_it() -> None:
    call = make_waiting_call(make_session(), arguments={"path": "a.md", "content": "1"})
    approvals.decide_by_id(CALLER, call.pk, Choice(Verdict.EDIT, {"path": "b.md", "content": "2"}))
    answer(call)

    asking, result = chat_of(Turn.objects.get())[1:]

    assert json.loads(asking["tool_calls"][0]["function"]["arguments"]) == {"path": "a.md", "content": "1"}
    assert json.loads(result["content"])["arguments"] == {"path": "b.md", "content": "2"}


def test_what_was_superseded_is_read_with_its_answer_before_the_new_message() -> None:
    session = make_session()
    make_calls(session, wanted(), wanted("read_file"))
    acceptance.user_message(UserMessage("s", "never mind"), CALLER)

    said = read(Turn.objects.get(position=2))

    assert [role for role, _ in said] == ["user", "assistant", "tool", "tool", "user"]
    assert [json.loads(text)["status"] for role, text in said if role == "tool"] == ["superseded", "superseded"]


def test_a_message_queued_behind_a_turn_stands_after_its_calls() -> None:
    session = make_session()
    running = run(make_turn(session, "first"))
    make_turn(session, "second")
    act(running, wanted("nonsense", "{}"))
    complete(running, "done")

    roles = [(message["role"], message["content"]) for message in made_history()]
    assert roles[0] == ("user", "first")
    assert [role for role, _ in roles] == ["user", "assistant", "tool", "assistant", "user"]
    assert roles[-1] == ("user", "second")


def test_an_old_turn_is_left_out_whole_and_never_half_a_call() -> None:
    session = make_session()
    for number in range(12):
        (call,) = make_calls(session, wanted("read_file", {"path": "x" * 300}), text=f"turn {number} " + "y" * 300)
        answer(call, "z" * 300)
        complete(run(Turn.objects.get(pk=call.turn_id)), "w" * 300)
    now = make_turn(session, "now")

    # At every size: what is left out goes by whole turns, so that a strict provider takes the rest.
    seen = {len(read(now, tokens)) for tokens in range(100, 6_500, 50)}

    assert seen == {1 + 4 * turns for turns in range(13)}


def test_the_calls_and_results_of_a_turn_count_for_its_size() -> None:
    session = make_session()
    (call,) = make_calls(session, wanted("read_file", {"path": "x" * 3_000}))
    answer(call, "z" * 3_000)
    complete(run(Turn.objects.get(pk=call.turn_id)))
    now = make_turn(session, "now")

    assert len(read(now, 1_500)) == 1
    assert len(read(now, 2_500)) == 5


def test_a_turn_whose_results_do_not_fit_is_an_error_and_not_cut_short() -> None:
    session = make_session()
    (call,) = make_calls(session, wanted("read_file"))
    answer(call, "z" * 10_000)

    with pytest.raises(ModelError) as error:
        read(Turn.objects.get(), tokens=2_000)

    assert error.value.code == "context_too_long"


def test_a_long_conversation_is_read_over_its_pages() -> None:
    session = make_session()
    for number in range(3):
        (call,) = make_calls(session, wanted("read_file"), text=f"call {number}")
        answer(call, f"result {number}")
        complete(run(Turn.objects.get(pk=call.turn_id)), f"end {number}")
    for number in range(transcript.PAGE // 2):
        make_answered_turn(Session.objects.get(pk="s"), f"question {number}", f"answer {number}")
    now = make_turn(Session.objects.get(pk="s"), "now")

    said = read(now)

    assert len(said) == 3 * 4 + transcript.PAGE + 1
    assert said[:4] == [("user", "hello"), ("assistant", "call 0"), ("tool", "result 0"), ("assistant", "end 0")]
    assert said[-2:] == [("assistant", f"answer {transcript.PAGE // 2 - 1}"), ("user", "now")]

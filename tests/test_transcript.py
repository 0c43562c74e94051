"""What a model reads of a conversation."""

import pytest

from agents_app.llm import ModelError
from messages_app import transcript
from sessions_app.models import Turn
from tests.factories import make_answered_turn, make_session, make_turn
from tests.scripted_llm import history_problem

pytestmark = pytest.mark.django_db


def read(turn: Turn, tokens: int = 100_000) -> list[tuple[str, str]]:
    chat = transcript.of(turn, prompt="You are the coder", context_tokens=tokens)
    assert history_problem(chat) is None
    return [(message["role"], message["content"]) for message in chat[1:]]


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

"""Stored messages and tool calls to the list that a model reads, and that clients read as history."""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from functools import cache
from typing import Any, NamedTuple

from django.db.models.functions import Left

from agents_app.llm import ModelError
from events_app.prepared import Rows
from messages_app.models import Message
from sessions_app.models import ToolCall, ToolCallQuerySet, Turn

# A session with so many messages of so many characters is short: `whole` reads it.
SHORT = 40
SHORT_CHARS = 4_000
# So many messages are read at first, with the results of their calls, then four times as many, up to a bound: what does
# not fit the window is read in vain, and a message may be long.
PAGE = 40
LARGEST_PAGE = 500
Chat = list[dict[str, Any]]


class Said(NamedTuple):
    """What is read of a message. For a long conversation, rows alone are many times as fast as models made of them."""

    turn_position: int
    round: int
    role: str
    content: str


class Asked(NamedTuple):
    """What is read of a tool call, after its turn's position."""

    turn_position: int
    round: int
    position: int
    call_id: str
    tool_name: str
    arguments_text: str
    status: str
    answer: str
    answered_at: datetime | None


Calls = dict[tuple[int, int], list[Asked]]


class ContextTooLong(ModelError):
    def __init__(self) -> None:
        super().__init__("context_too_long", "The message is longer than the model can read.")


def whole(session_ids: Sequence[str]) -> dict[str, list[Said]]:
    """All messages of these sessions, newest first: one query for what `of` would read of each. Without the sessions in
    which somebody said more than SHORT_CHARS at a time.
    """
    found: dict[str, list[Said]] = {session_id: [] for session_id in session_ids}
    for session_id, *message in _whole(sessions=session_ids):
        said = Said._make(message)
        if len(said.content) > SHORT_CHARS:
            found.pop(session_id, None)
        elif session_id in found:
            found[session_id].append(said)
    return found


def of(turn: Turn, *, prompt: str, context_tokens: int, messages: Sequence[Said] | None = None) -> Chat:
    """The system prompt and the conversation up to and including `turn`, never a message of a later turn. `messages`:
    all of its session, if they were read already.

    When it does not fit the context window, whole old turns are left out first, never half a call. Raises
    ContextTooLong when the turn alone does not fit.
    """
    room = context_tokens - _estimated_tokens(prompt)
    newest_first: list[Chat] = []
    current = turn.position
    chat: Chat = []  # of one turn, newest first
    pages = _pages(turn) if messages is None else [messages]
    for message, calls in _with_calls(turn, pages):
        if message.turn_position != current:
            newest_first.append(chat)
            chat, current = [], message.turn_position
        said = [_for_a_model(part) for part in as_chat(message, calls)]
        room -= sum(_size(part) for part in said)
        if room < 0:
            chat = []
            break
        chat += reversed(said)
    newest_first.append(chat)
    if not newest_first[0]:
        raise ContextTooLong
    return [{"role": "system", "content": prompt}, *_alternating(newest_first)]


def as_chat(message: Said, calls: Sequence[Asked]) -> Chat:
    """Form H of protocol 2.8: the message, and the results of the calls it asks for in the order of their arrival."""
    said: dict[str, Any] = {"role": message.role, "content": message.content}
    if not calls:
        return [said]
    said["tool_calls"] = [_asked(call) for call in calls]
    return [said, *(_result(call) for call in answered(calls))]


def answered(calls: Sequence[Asked]) -> list[Asked]:
    """Those of an answer's calls that have a result, in the order of its arrival."""
    closed = [call for call in calls if call.status == ToolCall.Status.ANSWERED]
    return sorted(closed, key=lambda call: (call.answered_at, call.position))


def calls_of(calls: ToolCallQuerySet) -> Calls:
    """Tool calls by the position of their turn, and round, with one query."""
    found: Calls = defaultdict(list)
    rows = calls.in_order().values_list("turn__position", *Asked._fields[1:])
    for call in map(Asked._make, rows):
        found[call.turn_position, call.round].append(call)
    return found


@cache
def _page(start: int, size: int) -> Rows[Any]:
    return Rows(
        Message,
        lambda slot: (
            Message.objects.filter(session_id=slot("session"), turn_position__lte=slot("turn_position", "until"))
            .order_by("-turn_position", "-id")
            .values_list(*Said._fields)[start : start + size]
        ),
    )


_whole = Rows(
    Message,
    lambda slot: (
        Message.objects.filter(session_id__in=slot("session", "sessions", many=True))
        .order_by("-turn_position", "-id")
        .values_list("session_id", "turn_position", "round", "role", Left("content", SHORT_CHARS + 1))
    ),
)


def _pages(turn: Turn) -> Iterator[list[Said]]:
    """Its session's messages, newest first."""
    start, size, is_last = 0, PAGE, False
    while not is_last:
        page = [*map(Said._make, _page(start, size)(session=turn.session_id, until=turn.position))]
        is_last = len(page) < size
        yield page
        start, size = start + size, min(4 * size, LARGEST_PAGE)


def _with_calls(turn: Turn, pages: Iterable[Sequence[Said]]) -> Iterator[tuple[Said, Sequence[Asked]]]:
    for page in pages:
        asking = {message.turn_position for message in page if message.round}
        calls = (
            calls_of(ToolCall.objects.filter(turn__session=turn.session_id, turn__position__in=asking))
            if asking
            else {}
        )
        for message in page:
            if message.turn_position <= turn.position:
                yield message, calls.get((message.turn_position, message.round), ()) if message.round else ()


def _asked(call: Asked) -> dict[str, Any]:
    function = {"name": call.tool_name, "arguments": call.arguments_text}
    return {"id": call.call_id, "type": "function", "function": function}


def _result(call: Asked) -> dict[str, Any]:
    return {"role": "tool", "content": call.answer, "name": call.tool_name, "tool_call_id": call.call_id}


def _for_a_model(said: dict[str, Any]) -> dict[str, Any]:
    """The same as providers take it: names in their letters, no name beside a result, no empty text beside calls."""
    if said["role"] == "tool":
        return {key: value for key, value in said.items() if key != "name"}
    if "tool_calls" not in said:
        return said
    calls = []
    for call in said["tool_calls"]:
        name = re.sub("[^A-Za-z0-9_-]", "_", call["function"]["name"])[:64] or "unnamed"
        calls.append({**call, "function": {**call["function"], "name": name}})
    return {**said, "content": said["content"] if said["content"].strip() else None, "tool_calls": calls}


def _alternating(newest_first: list[Chat]) -> Chat:
    """Oldest first, with neighbouring user messages joined: a turn that failed left one without an answer, and there
    are providers that refuse two in a row."""
    chat: Chat = []
    for turn in reversed(newest_first):
        for message in reversed(turn):
            if chat and chat[-1]["role"] == message["role"] == Message.Role.USER:
                chat[-1] = {**message, "content": f"{chat[-1]['content']}\n\n{message['content']}"}
            else:
                chat.append(message)
    return chat


def _size(said: dict[str, Any]) -> int:
    asked = sum(_estimated_tokens(call["function"]["arguments"]) for call in said.get("tool_calls", ()))
    return _estimated_tokens(said["content"] or "") + asked


def _estimated_tokens(text: str) -> int:
    """A rough count that errs to the safe side: providers count differently, and none offers its tokenizer here.

    English runs at four bytes a token and more; other scripts take two to four bytes a character.
    """
    return len(text.encode("utf-8", "replace")) // 3 + 8

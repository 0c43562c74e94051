"""Stored messages and tool calls to the list that a model reads, and that clients read as history."""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

from agents_app.llm import ModelError
from events_app.prepared import Rows
from messages_app.models import Message
from sessions_app.models import ToolCall, Turn

# So many messages are read at once, with the results of their calls; what does not fit the window is read in vain.
PAGE = 40
Calls = dict[tuple[Any, int], list[ToolCall]]
Chat = list[dict[str, Any]]


class ContextTooLong(ModelError):
    def __init__(self) -> None:
        super().__init__("context_too_long", "The message is longer than the model can read.")


def of(turn: Turn, *, prompt: str, context_tokens: int) -> Chat:
    """The system prompt and the conversation up to and including `turn`, never a message of a later turn.

    When it does not fit the context window, whole old turns are left out first, never half a call. Raises
    ContextTooLong when the turn alone does not fit.
    """
    room = context_tokens - _estimated_tokens(prompt)
    newest_first: list[Chat] = []
    current = turn.position
    chat: Chat = []  # of one turn, newest first
    for message, calls in _newest_first(turn):
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


def as_chat(message: Message, calls: Iterable[ToolCall]) -> Chat:
    """Form H of protocol 2.8: the message, and the results of the calls it asks for in the order of their arrival."""
    calls = list(calls)
    said: dict[str, Any] = {"role": message.role, "content": message.content}
    if calls:
        said["tool_calls"] = [_asked(call) for call in calls]
    answered = sorted((call for call in calls if not call.is_open), key=lambda call: (call.answered_at, call.position))
    return [said, *(_result(call) for call in answered)]


def calls_of(messages: Iterable[Message]) -> Calls:
    """The tool calls of some messages, by turn and round, with one query."""
    asking = {message.turn_id for message in messages if message.round}
    calls: Calls = defaultdict(list)
    if asking:
        for call in ToolCall.objects.filter(turn__in=asking).order_by("turn", "round", "position"):
            calls[call.turn_id, call.round].append(call)
    return calls


@cache
def _page(start: int) -> Rows[Message]:
    return Rows(
        Message,
        lambda slot: Message.objects.filter(
            session_id=slot("session"), turn_position__lte=slot("turn_position", "until")
        ).order_by("-turn_position", "-id")[start : start + PAGE],
    )


def _newest_first(turn: Turn) -> Iterator[tuple[Message, list[ToolCall]]]:
    start, is_last = 0, False
    while not is_last:
        page = _page(start)(session=turn.session_id, until=turn.position)
        calls = calls_of(page)
        for message in page:
            yield message, calls.get((message.turn_id, message.round), []) if message.round else []
        start += PAGE
        is_last = len(page) < PAGE


def _asked(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.tool_name, "arguments": call.arguments_text}
    return {"id": call.pk, "type": "function", "function": function}


def _result(call: ToolCall) -> dict[str, Any]:
    return {"role": "tool", "content": call.answer, "name": call.tool_name, "tool_call_id": call.pk}


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

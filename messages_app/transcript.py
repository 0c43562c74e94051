"""Stored messages to the list a model reads."""

from typing import Any

from agents_app.llm import ModelError
from messages_app.models import Message
from sessions_app.models import Turn


class ContextTooLong(ModelError):
    def __init__(self) -> None:
        super().__init__("context_too_long", "The message is longer than the model can read.")


def of(turn: Turn, *, prompt: str, context_tokens: int) -> list[dict[str, Any]]:
    """The system prompt and the conversation up to and including `turn`, never a message of a later turn.

    When it does not fit the context window, whole old turns are left out first. Raises ContextTooLong when the turn
    alone does not fit.
    """
    room = context_tokens - _estimated_tokens(prompt)
    newest_first: list[list[dict[str, Any]]] = []
    current = turn.position
    messages: list[dict[str, Any]] = []
    stored = Message.objects.filter(session_id=turn.session_id, turn_position__lte=turn.position)
    for message in stored.order_by("-turn_position", "-id").iterator(chunk_size=200):
        if message.turn_position != current:
            newest_first.append(messages)
            messages, current = [], message.turn_position
        room -= _estimated_tokens(message.content)
        if room < 0:
            messages = []
            break
        messages.append(message.as_chat())
    newest_first.append(messages)
    if not newest_first[0]:
        raise ContextTooLong
    return [{"role": "system", "content": prompt}, *_alternating(newest_first)]


def _alternating(newest_first: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Oldest first, with neighbouring user messages joined: a turn that failed left one without an answer, and there
    are providers that refuse two in a row."""
    chat: list[dict[str, Any]] = []
    for turn in reversed(newest_first):
        for message in reversed(turn):
            if chat and chat[-1]["role"] == message["role"] == Message.Role.USER:
                chat[-1] = {**message, "content": f"{chat[-1]['content']}\n\n{message['content']}"}
            else:
                chat.append(message)
    return chat


def _estimated_tokens(text: str) -> int:
    """A rough count that errs to the safe side: providers count differently, and none offers its tokenizer here.

    English runs at four bytes a token and more; other scripts take two to four bytes a character.
    """
    return len(text.encode("utf-8", "replace")) // 3 + 8

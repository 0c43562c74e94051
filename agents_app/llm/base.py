"""The small protocol between the turn engine and whatever model answers."""

from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

# What is kept of the arguments of one call, in UTF-8.
MAX_ARGUMENT_BYTES = 256 * 1024


@dataclass(frozen=True, slots=True)
class ModelRequest:
    """One model step: the whole transcript in chat-completions form, system prompt first, and the tools on offer."""

    model: str
    messages: list[dict[str, Any]]
    purpose: Literal["answer", "routing"] = "answer"
    temperature: float | None = None
    tools: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens as the provider counted them; zeros where it did not say."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0


# Frozen, it would take four times as long to make, and there is one for each token. Nobody changes it.
@dataclass(slots=True)
class TextDelta:
    text: str


@dataclass(frozen=True, slots=True)
class CallWanted:
    """A tool call as the model wrote it: the id may be missing or repeated, the arguments may be no JSON.

    `is_cut` says that the arguments were longer than MAX_ARGUMENT_BYTES, `is_damaged` that they held what no text may,
    and `clean` replaced it; such a call must never be carried out.
    """

    provider_id: str
    name: str
    arguments: str
    is_cut: bool = False
    is_damaged: bool = False


@dataclass(frozen=True, slots=True)
class FinishedStep:
    """The end of a model step: the whole text, the calls it asks for, and what it cost."""

    text: str
    tool_calls: list[CallWanted] = field(default_factory=list)
    finish_reason: str | None = None
    usage: Usage = field(default_factory=Usage)


class ModelError(Exception):
    """A model step that failed. `code` is a stable word for clients, `message` a short text that is safe to show.

    What the provider really said goes to the log, never into this exception.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class Model(Protocol):
    """Streams one model step: any number of `TextDelta`, then exactly one `FinishedStep`, or raises `ModelError`."""

    def stream(self, request: ModelRequest) -> AsyncGenerator[TextDelta | FinishedStep, None]: ...

    async def aclose(self) -> None: ...


def clean(text: str) -> str:
    """The text without what no database or client can take: NUL and lone surrogates become U+FFFD."""
    if "\0" in text:
        text = text.replace("\0", "\ufffd")
    try:
        text.encode()
    except UnicodeEncodeError:
        # By way of UTF-16, so that two surrogates that belong together become their character.
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text

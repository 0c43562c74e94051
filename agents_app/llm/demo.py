"""The model that answers when none is configured: offline, and the same answer every time."""

import asyncio
import json
import re
from collections.abc import AsyncGenerator
from typing import Any

from agents_app.keywords import classify

from .base import FinishedStep, ModelRequest, TextDelta, Usage

SHOWN_CHARS = 200

# What each agent is for, continuing "With a real model, the <agent> agent would now ".
WORK = {
    "coder": "write or change the code for this, asking you before any file is touched",
    "architect": "think through the design and write it down as a plan",
    "debug": "look for the cause and explain what goes wrong",
    "ask": "explain this and answer your question",
    "universal": "work on this from the first idea to the finished code",
}


class DemoModel:
    """Answers in words only, says that it is a demo, and routes by keywords. Usage is estimated: one token a word."""

    def __init__(self, *, delay: float = 0.03) -> None:
        self._delay = delay

    async def aclose(self) -> None:
        """Nothing is held."""

    async def stream(self, request: ModelRequest) -> AsyncGenerator[TextDelta | FinishedStep, None]:
        """Stream the demo answer word by word; a routing request gets its JSON in one piece."""
        system = _text_of(request.messages[0]) if request.messages else ""
        if request.purpose == "routing" or system.startswith("Classify"):
            answer = _routing(request.messages)
            yield TextDelta(answer)
        else:
            answer = _answer(system, request.messages)
            for number, word in enumerate(re.findall(r"\S+\s*", answer)):
                if number:
                    await asyncio.sleep(self._delay)
                yield TextDelta(word)
        prompt_tokens = sum(len(_text_of(message).split()) for message in request.messages)
        completion_tokens = len(answer.split())
        usage = Usage(prompt_tokens, completion_tokens, prompt_tokens + completion_tokens)
        yield FinishedStep(text=answer, finish_reason="stop", usage=usage)


def _routing(messages: list[dict[str, Any]]) -> str:
    agent = classify(_said(messages))
    return json.dumps({"agent": agent, "confidence": "high", "reasoning": f"The words of the message suggest {agent}."})


def _answer(system: str, messages: list[dict[str, Any]]) -> str:
    speaker = re.match(r"You are the (\w+)", system)
    agent = speaker[1].lower() if speaker else "assistant"
    said = " ".join(_said(messages).split())
    if len(said) > SHOWN_CHARS:
        said = said[:SHOWN_CHARS].rstrip() + "…"
    heard = f"You said: “{said}”" if said else "You have not said anything yet."
    if messages and messages[-1].get("role") == "tool":
        heard += "\n\nThe result of the tool call has arrived, thank you."
    return (
        f"Hello! This is the {agent} agent, played by the demo model: it works offline, no provider was asked.\n\n"
        f"{heard}\n\n"
        f"With a real model, the {agent} agent would now {WORK.get(agent, 'answer you')}. "
        "To connect one, set LLM_BASE_URL (any OpenAI-compatible address), LLM_API_KEY and LLM_MODEL, and start the "
        "server again. Until then, ask for code, a design, the cause of an error or an explanation in a new session: "
        "each goes to another agent."
    )


def _said(messages: list[dict[str, Any]]) -> str:
    """What the user said last."""
    return next((_text_of(message) for message in reversed(messages) if message.get("role") == "user"), "")


def _text_of(message: dict[str, Any]) -> str:
    return message.get("content") or ""

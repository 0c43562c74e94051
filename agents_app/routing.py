"""Which agent takes a message that reaches the orchestrator (protocol 6.1)."""

import json
import re
from dataclasses import dataclass

from agents_app import keywords
from agents_app.llm import clean

SPECIALISTS = ("coder", "architect", "debug", "ask")
MAX_READ_CHARS = 8_000
PROMPT = """Classify the message below for the orchestrator: decide which specialist takes it.

coder: writes, changes or fixes code, files and commands.
architect: designs, plans, specifies; writes documents.
debug: finds out why something fails.
ask: explains and answers questions; changes nothing.

Answer with one JSON object and nothing else:
{"agent": "coder|architect|debug|ask", "confidence": "low|medium|high", "reasoning": "<one sentence>"}"""


@dataclass(frozen=True, slots=True)
class Route:
    agent: str
    reason: str
    confidence: str


SINGLE_AGENT = Route("universal", "Single-agent mode: only Universal agent available", "high")


def question(message: str) -> list[dict[str, str]]:
    """What the routing model is sent; the beginning of a long message tells enough."""
    return [{"role": "system", "content": PROMPT}, {"role": "user", "content": message[:MAX_READ_CHARS]}]


def read_answer(text: str) -> Route | None:
    """The model's choice, from bare JSON or a fenced block; None when it made none that can be read."""
    found = re.search(r"\{.*\}", text, re.DOTALL)
    try:
        answer = json.loads(found[0]) if found else None
    except (ValueError, RecursionError):
        return None
    if not isinstance(answer, dict) or not isinstance(answer.get("agent"), str):
        return None
    agent = answer["agent"].strip().lower()
    confidence = answer.get("confidence")
    reason = answer.get("reasoning")
    return Route(
        agent if agent in SPECIALISTS else "coder",
        # Cleaned like all that a model says: its JSON can spell a NUL and half a surrogate pair once more.
        clean(reason[:2_000]) if isinstance(reason, str) and reason.strip() else "Chosen by the routing model",
        confidence if confidence in ("low", "medium", "high") else "medium",
    )


def fallback(message: str) -> Route:
    """A broken router still gives an answer: by keywords."""
    return Route(keywords.classify(message), "Fallback classification due to LLM error", "low")

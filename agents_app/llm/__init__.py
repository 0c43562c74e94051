"""The model that answers: the configured OpenAI-compatible one, or else the demo model."""

import asyncio
from typing import TYPE_CHECKING

from django.conf import settings

from .base import (
    MAX_ARGUMENT_BYTES,
    CallWanted,
    FinishedStep,
    Model,
    ModelError,
    ModelRequest,
    TextDelta,
    Usage,
    clean,
)
from .demo import DemoModel

if TYPE_CHECKING:
    from .openai import ClientSettings, OpenAIModel

__all__ = [
    "MAX_ARGUMENT_BYTES",
    "CallWanted",
    "FinishedStep",
    "Model",
    "ModelError",
    "ModelRequest",
    "TextDelta",
    "Usage",
    "clean",
    "close_model",
    "get_model",
]

# A connection pool belongs to one event loop. The settings are part of the key, so changed ones take effect.
_clients: dict[tuple[asyncio.AbstractEventLoop, "ClientSettings"], "OpenAIModel"] = {}


def get_model() -> Model:
    """The model for the running event loop, always the same one, so that its connections and breaker are shared."""
    if not settings.LLM_BASE_URL:
        return DemoModel(delay=settings.DEMO_WORD_DELAY)
    # Imported late: commands that talk to no model should not wait for aiohttp.
    from .openai import ClientSettings, OpenAIModel

    configured = ClientSettings(
        base_url=settings.LLM_BASE_URL,
        api_key=settings.LLM_API_KEY,
        connect_timeout=settings.LLM_CONNECT_TIMEOUT,
        first_token_timeout=settings.LLM_FIRST_TOKEN_TIMEOUT,
        token_timeout=settings.LLM_TOKEN_TIMEOUT,
        retries=settings.LLM_RETRIES,
        retry_delay=settings.LLM_RETRY_DELAY,
        max_output_chars=settings.TURN_MAX_OUTPUT_CHARS,
    )
    key = (asyncio.get_running_loop(), configured)
    if key not in _clients:
        for stale in [other for other in list(_clients) if other[0].is_closed()]:
            _clients.pop(stale, None)
        _clients[key] = OpenAIModel(configured)
    return _clients[key]


async def close_model() -> None:
    """Close the running event loop's connections to models."""
    loop = asyncio.get_running_loop()
    for key in [key for key in list(_clients) if key[0] is loop]:
        await _clients.pop(key).aclose()

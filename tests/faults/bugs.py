"""Bugs to be planted in a running server (`tests.faults.inside`), each of a kind that the checker has to find."""

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any


def says_yes_before_it_has_stored() -> None:
    """I1: the head of the answer is sent, and the message is stored afterwards."""
    from messages_app.orchestration import MessageOrchestrationService

    answer = MessageOrchestrationService._answer

    async def early(self: Any, accept: Callable[[], Any]) -> AsyncGenerator[list[Any], None]:
        yield []
        async with aclosing(answer(self, accept)) as frames:
            async for ready in frames:
                yield ready

    MessageOrchestrationService._answer = early  # type: ignore[method-assign]


def gives_numbers_that_it_has_not_reserved() -> None:
    """I2: whoever takes a turn over gives those numbers again."""
    from django.db.models import F

    from sessions_app.models import SessionQuerySet

    def reserve_numbers(self: Any, count: int) -> None:
        self.update(next_seq=F("next_seq") + min(count, 2))

    SessionQuerySet.reserve_numbers = reserve_numbers  # type: ignore[method-assign]


def forgets_the_audit_entry() -> None:
    """I6"""
    from events_app import log

    log.audit = lambda *_, **__: None


def logs_who_calls_with_what() -> None:
    """I9"""
    import logging

    from orchestrator_site.middleware import RequestMiddleware

    respond = RequestMiddleware._respond

    async def telling(self: Any, request: Any) -> Any:
        logging.getLogger("planted").warning("called with %s", request.headers.get("X-Internal-Auth"))
        return await respond(self, request)

    RequestMiddleware._respond = telling  # type: ignore[method-assign]

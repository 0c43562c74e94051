"""Bugs to be planted in a running server (`tests.faults.inside`), each of a kind that the checker has to find."""

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from functools import partial
from typing import Any


def says_yes_before_it_has_stored() -> None:
    """I1: the head of the answer is sent, and the message is stored afterwards."""
    from messages_app.orchestration import MessageOrchestrationService

    answer = MessageOrchestrationService._answer

    async def early(
        self: Any, accept: Callable[..., Any], *, opens_turn_of: str = ""
    ) -> AsyncGenerator[list[Any], None]:
        yield []
        async with aclosing(answer(self, accept, opens_turn_of=opens_turn_of)) as frames:
            async for ready in frames:
                yield ready

    MessageOrchestrationService._answer = early  # type: ignore[method-assign]


def gives_numbers_that_it_has_not_reserved() -> None:
    """I2: whoever takes a turn over gives those numbers again."""
    from sessions_app.models import numbers_reserved, turn_opened

    for update, name in ((numbers_reserved, "count"), (turn_opened, "numbers")):
        update.many = partial(_at_most_two, update.many, name)  # type: ignore[method-assign]


def _at_most_two(reserve: Any, name: str, executions: Any) -> int:
    changed: int = reserve([{**values, name: min(values[name], 2)} for values in executions])
    return changed


def lets_who_slept_write() -> None:
    """I3: a runner's writes count whoever holds the turn, however long ago its own lease ran out."""
    from events_app import log
    from messages_app import claims
    from sessions_app.models import TurnQuerySet

    def held(self: Any, turn_id: Any, owner: Any, attempt: Any) -> Any:
        return self.filter(pk=turn_id).order_by()

    def write_batches(owner: str, parts: Any) -> Any:
        log.append_runs([(part.claim.session_id, part.frames) for part in parts], again=True)
        return {part.claim.turn_id: None for part in parts}

    TurnQuerySet.held = held  # type: ignore[method-assign]
    claims.write_batches = write_batches


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

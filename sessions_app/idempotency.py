"""Requests that may be repeated: what was done under a key is not done again, its outcome is told again (R12).

The record of a key is stored first, in the transaction of the work itself. Of many requests that come at once the rest
wait for the commit of the first, and find what it has left. What is refused is rolled back together with its record, so
that the key is free again. Whoever takes a record does so before the session's row, and takes one only.
"""

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from django.db import transaction
from django.http import HttpRequest

from orchestrator_site.errors import BadRequest, Invalid
from sessions_app.callers import Caller
from sessions_app.models import IdempotencyRecord

HEADER = "Idempotency-Key"
# Visible ASCII.
KEY = "[!-~]{1,255}"


class InvalidKey(BadRequest):
    code = "invalid_idempotency_key"


class KeyReused(Invalid):
    code = "idempotency_key_reused"


@dataclass(frozen=True, slots=True)
class Key:
    """What a caller calls a request, and what the request says. The id of a message is a key within its session."""

    caller: Caller
    text: str
    fingerprint: str
    session_id: str = ""


def key_in(request: HttpRequest, body: Any) -> Key | None:
    """The key in a request's header, None without one; `body` is the JSON value that was read. Raises InvalidKey."""
    text = request.headers.get(HEADER)
    if text is None:
        return None
    # Django joins headers of one name with a comma, which a key may have.
    given = [name for name, _ in request.scope["headers"] if name == HEADER.lower().encode()]  # type: ignore[attr-defined]
    if len(given) != 1 or not re.fullmatch(KEY, text):
        raise InvalidKey(f"{HEADER} has to be given once, as 1 to 255 visible ASCII characters.")
    path = request.path_info.removeprefix("/api/v1")
    caller: Caller = request.caller  # type: ignore[attr-defined]
    return Key(caller, text, fingerprint(request.method, path, body))


def fingerprint(*said: Any) -> str:
    """SHA-256, as 64 hex digits, over JSON values; the order of an object's keys does not matter."""
    return hashlib.sha256(json.dumps(said, sort_keys=True, separators=(",", ":")).encode("ascii")).hexdigest()


def once(key: Key | None, work: Callable[[], Any]) -> Any:
    """What `work` returns, JSON values. Under a key it is done once, in one transaction, and returned again and again.

    Raises what `work` raises, and KeyReused when the key is another request's.
    """
    if key is None:
        return work()
    with transaction.atomic():
        record = _locked(key)
        if record.fingerprint != key.fingerprint:
            raise _reused(key)
        if not record.outcome_text:
            record.outcome_text = json.dumps(work())
            record.save(update_fields=["outcome_text"])
        return json.loads(record.outcome_text)


def _locked(key: Key) -> IdempotencyRecord:
    """The key's record, made unless it is there; the row is locked either way."""
    record = IdempotencyRecord(
        account_id=key.caller.account_id,
        caller=key.caller.name,
        session_id=key.session_id,
        key=key.text,
        fingerprint=key.fingerprint,
    )
    IdempotencyRecord.objects.bulk_create(
        [record],
        # One that is there is written as it is, which locks it: it cannot be pruned before it is read.
        update_conflicts=True,
        unique_fields=["account", "caller", "session_id", "key"],
        update_fields=["key"],
    )
    record.refresh_from_db()
    return record


def _reused(key: Key) -> KeyReused:
    if key.session_id:
        return KeyReused("Is the id of another message.", "body", "message", "message_id")
    return KeyReused("Is the key of another request.", "header", HEADER)

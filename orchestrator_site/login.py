"""How somebody who logs in is known to the guard against guessing (axes)."""

from typing import Any

from django.http import HttpRequest

# The longest that the table of attempts holds, and that a user of Django's can have.
NAME_CHARS = 150


def guessed_name(request: HttpRequest, credentials: dict[str, Any] | None = None) -> str:
    """The user name that is being tried. What is longer is nobody's, and is locked by its beginning."""
    return ((credentials or request.POST).get("username") or "")[:NAME_CHARS]

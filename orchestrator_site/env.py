"""Casts for environment variables: a value that does not fit stops the start and names the variable."""

import ipaddress
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import environ
from django.core.exceptions import ImproperlyConfigured

T = TypeVar("T")

_BOOLEANS = {"true": True, "on": True, "yes": True, "1": True, "false": False, "off": False, "no": False, "0": False}


class Environment:
    """The process's environment, completed from a `.env` file whose values never override it.

    `names` collects every variable that was asked for, so that a test can hold the README against it.
    """

    def __init__(self, env_file: Path) -> None:
        # A class of its own, because reading a file writes to the class. An empty value means "not set".
        reader: Any = type("Read", (environ.Env,), {"ENVIRON": {k: v for k, v in os.environ.items() if v}})
        if env_file.is_file():
            reader.read_env(env_file)
        # Taken as they are: its methods hold a value that begins with `$` for the name of another variable.
        self._values: dict[str, str] = reader.ENVIRON
        self.names: list[str] = []

    def has(self, name: str) -> bool:
        return bool(self._values.get(name))

    def text(self, name: str, default: str) -> str:
        return self._read(name, default, str)

    def words(self, name: str, default: list[str]) -> list[str]:
        """A comma-separated list."""
        return self._read(name, default, lambda raw: [word.strip() for word in raw.split(",") if word.strip()])

    def networks(self, name: str) -> list[str]:
        """A comma-separated list of addresses and networks; none by default."""

        def cast(raw: str) -> list[str]:
            words = [word.strip() for word in raw.split(",") if word.strip()]
            try:
                return [str(ipaddress.ip_network(word)) for word in words]
            except ValueError:
                raise ValueError("has to name addresses or networks, such as 127.0.0.1,10.0.0.0/8") from None

        return self._read(name, [], cast)

    def flag(self, name: str, default: bool) -> bool:
        def cast(raw: str) -> bool:
            if raw.strip().lower() not in _BOOLEANS:
                raise ValueError("has to be true or false")
            return _BOOLEANS[raw.strip().lower()]

        return self._read(name, default, cast)

    def integer(self, name: str, default: int, *, at_least: int = 0, at_most: int | None = None) -> int:
        return self._read(name, default, lambda raw: _within(_number(raw, int, "a whole number"), at_least, at_most))

    def seconds(self, name: str, default: float, *, at_least: float = 0.001) -> float:
        return self._read(name, default, lambda raw: _within(_number(raw, float), at_least, 10_000_000))

    def choice(self, name: str, default: str, choices: set[str]) -> str:
        def cast(raw: str) -> str:
            if raw not in choices:
                raise ValueError(f"has to be one of {', '.join(sorted(choices))}")
            return raw

        return self._read(name, default, cast)

    def url(self, name: str, *, schemes: set[str], suffix: str = "") -> str:
        """An address, or the empty string when it is not set."""

        def cast(raw: str) -> str:
            address = raw.strip().rstrip("/")
            if address and (address.partition("://")[0] not in schemes or not address.partition("://")[2]):
                raise ValueError(f"has to start with {' or '.join(s + '://' for s in sorted(schemes))}")
            if address and not address.endswith(suffix):
                raise ValueError(f"has to end in {suffix}")
            return address

        return self._read(name, "", cast)

    def database(self, name: str, default: str) -> dict[str, Any]:
        """What Django's DATABASES has for an address: sqlite:///file or postgres://user:password@host:port/name."""
        self.names.append(name)
        return self._cast(name, self._values.get(name) or default, _database)

    def _read(self, name: str, default: T, cast: Callable[[str], T]) -> T:
        self.names.append(name)
        raw = self._values.get(name)
        return self._cast(name, raw, cast) if raw else default

    @staticmethod
    def _cast(name: str, raw: str, cast: Callable[[str], T]) -> T:
        try:
            return cast(raw)
        except (ValueError, environ.ImproperlyConfigured) as error:
            raise ImproperlyConfigured(f"{name} {error}.") from None


def _database(raw: str) -> dict[str, Any]:
    if not raw.startswith(("sqlite:///", "postgres://", "postgresql://")):
        raise ValueError("has to start with sqlite:/// or postgres://")
    try:
        found = dict(environ.Env.db_url_config(raw))
    except ValueError:
        # Its text would quote a part of the address, and that can be one of the password.
        found = {}
    name = found.get("NAME", "")
    # A password with a slash ends in what is taken for the name.
    if not name or (not raw.startswith("sqlite") and re.search("[/@]", name)):
        raise ValueError(
            "has to be sqlite:///FILE or postgres://USER:PASSWORD@HOST:PORT/NAME, with %-escapes in the password"
        )
    return found


def _number(raw: str, kind: Callable[[str], Any], name: str = "a number") -> Any:
    try:
        return kind(raw)
    except ValueError:
        raise ValueError(f"has to be {name}") from None


def _within(number: Any, at_least: float, at_most: float | None) -> Any:
    if not number >= at_least:
        raise ValueError(f"has to be at least {at_least}")
    if at_most is not None and number > at_most:
        raise ValueError(f"has to be at most {at_most}")
    return number

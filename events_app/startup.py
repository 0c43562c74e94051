"""What every process looks at before it begins, and says in one line when it is not there."""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.db import DatabaseError, connection, connections
from django.db.migrations.executor import MigrationExecutor

# As long as the layer itself waits for an answer.
REDIS_SECONDS = 1


class CannotStart(Exception):
    """Something that a process needs is not there; the text is the line that says so."""


@contextmanager
def refusals_in_one_line() -> Iterator[None]:
    """End the process with one line instead of a traceback."""
    try:
        yield
    except (CannotStart, ImproperlyConfigured) as error:
        sys.exit(f"Countersign does not start: {error}")


@contextmanager
def database_needed() -> Iterator[None]:
    """Around the first use of the database. Raises CannotStart with what is wrong with it."""
    try:
        _ensure_usable()
        yield
    except DatabaseError as error:
        raise CannotStart(f"DATABASE_URL, {_database_shown()}: {_one_line(error)}.") from None
    finally:
        connections.close_all()


def ensure_migrated() -> None:
    """For those who do not migrate themselves. A database that is ahead, as while a new version is rolled out, is fine.

    Raises CannotStart.
    """
    executor = MigrationExecutor(connection)
    missing = len(executor.migration_plan(executor.loader.graph.leaf_nodes()))
    if missing:
        raise CannotStart(f"the database lacks {missing} migrations: run `.venv/bin/python manage.py migrate`.")


def look_for_redis() -> None:
    """Say when it does not answer, and why; everything works without it, a little later. Raises CannotStart."""
    if not settings.REDIS_URL:
        return
    import redis

    try:
        client: Any = redis.Redis.from_url(
            settings.REDIS_URL, socket_connect_timeout=REDIS_SECONDS, socket_timeout=REDIS_SECONDS
        )
    except ValueError:
        # Its text would quote a part of the address, and that can be one of the password.
        raise CannotStart(
            "REDIS_URL has to be redis://:PASSWORD@HOST:PORT/0, with %-escapes in the password."
        ) from None
    try:
        client.ping()
    except redis.AuthenticationError:
        _say_redis_is_away("it wants another user or password")
    except (redis.RedisError, OSError) as error:
        _say_redis_is_away(_one_line(error))
    finally:
        client.close()


def _say_redis_is_away(reason: str) -> None:
    shown = re.sub("//.*@", "//", settings.REDIS_URL).partition("?")[0]
    sys.stderr.write(f"Countersign starts without Redis: REDIS_URL, {shown}: {reason}.\n")


def _ensure_usable() -> None:
    """Raise DatabaseError with the reason, which the pool would keep to itself and try again."""
    if connection.vendor != "postgresql":
        return
    with connection.wrap_database_errors:
        probe = connection.Database.connect(**connection.get_connection_params())  # type: ignore[attr-defined]
    with probe:
        encoding = probe.info.parameter_status("server_encoding")
    if encoding != "UTF8":
        raise DatabaseError(f"the database stores texts as {encoding} and has to store them as UTF8")


def _database_shown() -> str:
    """Which database it is, without its password."""
    where = settings.DATABASES["default"]
    if "sqlite" in where["ENGINE"]:
        return str(where["NAME"])
    user, port = (where["USER"] and f"{where['USER']}@"), (where["PORT"] and f":{where['PORT']}")
    return f"postgres://{user}{where['HOST']}{port}/{where['NAME']}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".?")

"""`migrate`, on PostgreSQL one at a time and for as long as it takes: Django itself does not keep two starts apart."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from django.core.management.commands import migrate
from django.db import connections

# Any number that nobody else locks.
LOCK = 5_247_190_311
PATIENT = ("statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout")


class Command(migrate.Command):
    def handle(self, *args: Any, **options: Any) -> None:
        with alone(connections[options["database"]]):
            super().handle(*args, **options)


@contextmanager
def alone(connection: Any) -> Iterator[None]:
    """On PostgreSQL, without the timeouts of requests and while nobody else is here."""
    if connection.vendor != "postgresql":
        yield
        return
    with connection.cursor() as cursor:
        for name in PATIENT:
            cursor.execute(f"SET {name} = 0")
        cursor.execute("SELECT pg_advisory_lock(%s)", [LOCK])
    try:
        yield
    finally:
        if connection.is_usable():  # else the lock is gone with it
            with connection.cursor() as cursor:
                cursor.execute("SELECT pg_advisory_unlock(%s)", [LOCK])
                for name in PATIENT:
                    cursor.execute(f"RESET {name}")

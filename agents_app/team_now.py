"""What notices that the team was changed: triggers of the database, on whatever way it happened.

They are looked after by every `migrate`, for SQLite drops those of a table that a migration makes anew.
"""

import uuid

from django.db import connection, transaction
from django.db.backends.utils import CursorWrapper

from agents_app.models import Agent, ApprovalRule, TeamNow, Tool

TEAM = (Agent, Tool, ApprovalRule)
FUNCTION = "agents_app_team_changed"
EVENTS = ("insert", "update", "delete")


@transaction.atomic
def look_after() -> None:
    """Make the row and the triggers, unless they are there: to make them anew waits for everybody who reads the tables.

    The version is forgotten last: until then changes may have gone unnoticed.
    """
    with connection.cursor() as cursor:
        if missing := _missing(cursor):
            drop_triggers(cursor)
            for statement in _on_postgresql() if connection.vendor == "postgresql" else _on_sqlite():
                cursor.execute(statement)
    forgotten = {"revision": uuid.uuid4().hex, "version": None, "columns": ""}
    if missing:
        TeamNow.objects.update_or_create(pk=1, defaults=forgotten)
    else:
        TeamNow.objects.get_or_create(pk=1, defaults=forgotten)


def make_way() -> None:
    """Before tables are migrated: SQLite makes some anew, and cannot do so with one that triggers of others name."""
    if connection.vendor == "sqlite":
        with connection.cursor() as cursor:
            drop_triggers(cursor)


def drop_triggers(cursor: CursorWrapper) -> None:
    for name, table in _triggers():
        on = f" ON {table}" if connection.vendor == "postgresql" else ""
        cursor.execute(f"DROP TRIGGER IF EXISTS {name}{on}")
    if connection.vendor == "postgresql":
        cursor.execute(f"DROP FUNCTION IF EXISTS {FUNCTION}")


def _missing(cursor: CursorWrapper) -> set[str]:
    if connection.vendor == "postgresql":
        cursor.execute("SELECT tgname FROM pg_trigger WHERE NOT tgisinternal")
    else:
        cursor.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'")
    return {name for name, _ in _triggers()} - {name for (name,) in cursor.fetchall()}


def _triggers() -> list[tuple[str, str]]:
    """Each by its name and that of its table."""
    if connection.vendor == "postgresql":
        return [(f"{table}_changes_team", table) for table in _tables()]
    return [(f"{table}_changes_team_{event}", table) for table in _tables() for event in EVENTS]


def _tables() -> list[str]:
    return [model._meta.db_table for model in TEAM]


def _forget(revision: str) -> str:
    return f"UPDATE {TeamNow._meta.db_table} SET revision = {revision}, version_id = NULL"  # noqa: S608 (names of ours)


def _on_sqlite() -> list[str]:
    forget = _forget("lower(hex(randomblob(16)))")
    return [
        f"CREATE TRIGGER {table}_changes_team_{event} AFTER {event} ON {table} BEGIN {forget}; END"
        for table in _tables()
        for event in EVENTS
    ]


def _on_postgresql() -> list[str]:
    forget = _forget("replace(gen_random_uuid()::text, '-', '')")
    function = (
        f"CREATE FUNCTION {FUNCTION}() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {forget}; RETURN NULL; END $$"
    )
    return [
        function,
        *(
            f"CREATE TRIGGER {table}_changes_team AFTER INSERT OR UPDATE OR DELETE OR TRUNCATE ON {table}"
            f" FOR EACH STATEMENT EXECUTE FUNCTION {FUNCTION}()"
            for table in _tables()
        ),
    ]

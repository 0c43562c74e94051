"""What notices that the team was changed: triggers of the database, on whatever way it happened.

They are looked after by every `migrate`, for SQLite drops those of a table that a migration makes anew.
"""

import uuid

from django.db import connection
from django.db.backends.utils import CursorWrapper

from agents_app.models import Agent, ApprovalRule, TeamNow, Tool

TEAM = (Agent, Tool, ApprovalRule)
FUNCTION = "agents_app_team_changed"


def look_after() -> None:
    """Make the row and the triggers, whatever there is of them; the version is forgotten."""
    forgotten = {"revision": uuid.uuid4().hex, "version": None, "columns": ""}
    TeamNow.objects.update_or_create(pk=1, defaults=forgotten)
    with connection.cursor() as cursor:
        drop_triggers(cursor)
        for statement in _on_postgresql() if connection.vendor == "postgresql" else _on_sqlite():
            cursor.execute(statement)


def drop_triggers(cursor: CursorWrapper) -> None:
    for table in _tables():
        if connection.vendor == "postgresql":
            cursor.execute(f"DROP TRIGGER IF EXISTS {table}_changes_team ON {table}")
        else:
            for event in ("insert", "update", "delete"):
                cursor.execute(f"DROP TRIGGER IF EXISTS {table}_changes_team_{event}")
    if connection.vendor == "postgresql":
        cursor.execute(f"DROP FUNCTION IF EXISTS {FUNCTION}")


def _tables() -> list[str]:
    return [model._meta.db_table for model in TEAM]


def _forget(revision: str) -> str:
    return f"UPDATE {TeamNow._meta.db_table} SET revision = {revision}, version_id = NULL"  # noqa: S608 (names of ours)


def _on_sqlite() -> list[str]:
    forget = _forget("lower(hex(randomblob(16)))")
    return [
        f"CREATE TRIGGER {table}_changes_team_{event} AFTER {event} ON {table} BEGIN {forget}; END"
        for table in _tables()
        for event in ("insert", "update", "delete")
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

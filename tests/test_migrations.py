"""While a new version is rolled out both run on one database: a migration only adds (docs/deployment.md)."""

import json
from collections.abc import Sequence
from typing import Any

import pytest
from django.conf import settings
from django.db import models
from django.db.migrations import operations
from django.db.migrations.loader import MigrationLoader
from django.db.models.fields import NOT_PROVIDED

from agents_app import team
from agents_app.models import Agent, TeamVersion
from agents_app.team import Team

OURS = ["agents_app", "events_app", "messages_app", "sessions_app"]
# What was there before anybody rolled out a new version: up to these numbers.
FIRST = {"agents_app": 7, "events_app": 5, "messages_app": 4, "sessions_app": 7}
ADDING = (
    operations.CreateModel,
    operations.AddIndex,
    operations.RemoveIndex,
    operations.RunPython,
    operations.AlterModelOptions,
    operations.AlterModelManagers,
)


# What the database does not know of a field.
SHOWN = {"choices", "help_text", "verbose_name", "validators", "error_messages", "editable", "blank", "default"}


def complaints(
    steps: Sequence[Any], before: models.Field | None = None, *, unused_since: str | None = None
) -> list[str]:
    """What processes of the version before would not survive; nothing when they do not use it any more.

    `before` is what an altered field was.
    """
    if unused_since is not None and _parts(unused_since) < _parts(settings.VERSION):
        return []
    return [step.describe() for step in steps if not (isinstance(step, ADDING) or _is_harmless(step, before))]


def _is_harmless(step: Any, before: models.Field | None) -> bool:
    """A column that rows may be inserted without; a field that only got wider."""
    if isinstance(step, operations.AddField):
        return step.field.null or step.field.many_to_many or step.field.db_default is not NOT_PROVIDED
    return isinstance(step, operations.AlterField) and before is not None and _widens(before, step.field)


def _widens(before: models.Field, after: models.Field) -> bool:
    _, kind, _, was = before.deconstruct()
    _, new_kind, _, becomes = after.deconstruct()
    narrow, wide = ({k: v for k, v in each.items() if k not in SHOWN} for each in (was, becomes))
    return kind == new_kind and wide in (narrow, {**narrow, "null": True})


def _parts(version: str) -> list[int]:
    return [int(part) for part in version.split(".")]


def test_migrations_leave_what_the_version_before_needs() -> None:
    loader = MigrationLoader(None)
    found = []
    for (app, name), migration in loader.disk_migrations.items():
        if app in OURS and int(name[:4]) > FIRST[app]:
            state = loader.project_state((app, name), at_end=False)
            for step in migration.operations:
                before = None
                if isinstance(step, operations.AlterField):
                    before = state.models[app, step.model_name_lower].fields[step.name]
                since = getattr(migration, "unused_since", None)
                found += [f"{migration}: {told}" for told in complaints([step], before, unused_since=since)]

    assert found == [], "expand first, contract in a later version: docs/deployment.md"


TEXT = models.TextField(default="")


@pytest.mark.parametrize(
    "step",
    [
        operations.AddField("turn", "note", TEXT),
        operations.RemoveField("turn", "code"),
        operations.RenameField("turn", "code", "reason"),
        operations.AlterField("turn", "code", TEXT),
        operations.DeleteModel("turn"),
        operations.RenameModel("turn", "run"),
        operations.AddConstraint("turn", models.UniqueConstraint(fields=["code"], name="one")),
        operations.RunSQL("DROP TABLE sessions_app_turn"),
    ],
    ids=lambda step: type(step).__name__,
)
def test_what_would_break_a_running_process_waits_for_a_later_version(step: Any) -> None:
    assert complaints([step]) != []
    assert complaints([step], unused_since=settings.VERSION) != [], "the version that runs beside this one uses it"
    assert complaints([step], unused_since="0.0.9") == []


@pytest.mark.parametrize(
    "step",
    [
        operations.AddField("turn", "note", models.TextField(null=True)),
        operations.AddField("turn", "note", models.TextField(db_default="")),
        operations.CreateModel("note", [("id", models.BigAutoField(primary_key=True))]),
        operations.AddIndex("turn", models.Index(fields=["code"], name="by_code")),
    ],
    ids=lambda step: type(step).__name__,
)
def test_what_is_only_added_is_fine(step: Any) -> None:
    assert complaints([step]) == []


def test_a_field_may_get_wider_and_not_narrower() -> None:
    one, two = models.CharField(max_length=9, choices=[("a", "A")]), models.CharField(max_length=9, null=True)

    assert complaints([operations.AlterField("turn", "status", models.CharField(max_length=9))], one) == []
    assert complaints([operations.AlterField("turn", "status", two)], one) == []
    assert complaints([operations.AlterField("turn", "status", one)], two) != []


@pytest.mark.django_db
def test_a_team_that_another_version_has_stored_is_read_by_the_columns_that_are_known() -> None:
    stored = json.loads(TeamVersion.objects.get(pk=team.pin()).content)
    for row in stored["agents"]:
        row["of_the_next_version"] = "unknown"
        del row["temperature"]

    read = Team.of(json.dumps(stored))

    assert read.agents["coder"].prompt == Team.now().agents["coder"].prompt
    assert read.agents["coder"].temperature == Agent._meta.get_field("temperature").get_default()

"""The version of the team that new turns run under: known by one look, and forgotten with every change."""

from collections.abc import Callable
from typing import Any

import pytest
from django.core.management import call_command
from django.db import connection
from django.test.utils import CaptureQueriesContext

from agents_app import team, team_now
from agents_app.models import Agent, ApprovalRule, TeamNow, TeamVersion, Tool

pytestmark = pytest.mark.django_db


def execute(sql: str) -> None:
    with connection.cursor() as cursor:
        cursor.execute(sql)


def test_what_is_known_costs_one_query() -> None:
    version = team.pin()

    with CaptureQueriesContext(
        connection,
    ) as queries:
        assert team.pin() == version
    assert len(queries) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda: Agent.objects.filter(pk="ask").update(prompt="Another."),
        lambda: Agent.objects.filter(pk="ask").delete(),
        lambda: Agent.objects.create(name="newcomer", prompt="Be new.", position=9),
        lambda: Tool.objects.filter(pk="write_file").update(deadline_seconds=7),
        lambda: Tool.objects.filter(pk="write_file").delete(),
        lambda: ApprovalRule.objects.create(tool="*", outcome="deny", reason="Not now."),
        lambda: ApprovalRule.objects.all().delete(),
        lambda: execute("UPDATE agents_app_agent SET prompt = 'By hand.' WHERE name = 'ask'"),
    ],
)
def test_every_change_counts_from_the_next_turn(change: Callable[[], Any]) -> None:
    before = team.pin()
    change()

    after = team.pin()

    assert after != before
    assert team.Team.of(TeamVersion.objects.get(pk=after).content) == team.Team.now()
    assert team.pin() == after


def test_what_changes_while_it_is_read_is_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    was = team.pin()
    Tool.objects.filter(pk="write_file").update(deadline_seconds=7)

    def between(execute: Any, sql: str, *arguments: Any) -> Any:
        outcome = execute(sql, *arguments)
        if sql.startswith("SELECT") and "agents_app_teamversion" in sql:
            Agent.objects.filter(pk="ask").update(prompt="Another.")
        return outcome

    with connection.execute_wrapper(between):
        read = team.pin()

    assert TeamNow.objects.get().version is None
    assert len({was, read, team.pin()}) == 3


def test_other_columns_are_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process of an older version of this program has left what it knows."""
    version = team.pin()
    TeamNow.objects.update(columns="others", version=TeamVersion.objects.create(pk=1, digest="d", content="{}"))

    assert team.pin() == version == TeamNow.objects.get().version_id


def test_without_its_row_the_team_is_read_each_time() -> None:
    version = team.pin()
    TeamNow.objects.all().delete()

    assert team.pin() == team.pin() == version


def test_triggers_that_a_migration_took_away_are_back_after_it() -> None:
    before = team.pin()
    with connection.cursor() as cursor:
        team_now.drop_triggers(cursor)
    Agent.objects.filter(pk="ask").update(prompt="Unnoticed.")

    call_command("migrate", verbosity=0)

    assert TeamNow.objects.get().version is None
    assert (unnoticed := team.pin()) != before
    Agent.objects.filter(pk="ask").update(prompt="Noticed.")
    assert team.pin() != unnoticed


def test_a_migration_that_finds_its_triggers_leaves_them_and_what_is_known() -> None:
    version = team.pin()

    with CaptureQueriesContext(connection) as queries:
        call_command("migrate", verbosity=0)

    assert not [query for query in queries if "TRIGGER" in query["sql"]]
    assert team.pin() == version

"""The team as it is, and as it was when a turn began: what an admin changes counts from the next turn.

A turn is pinned to a `TeamVersion` when it is first claimed. Nothing of a team is written after it was read.
"""

import hashlib
import json
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

from django.db import connection, transaction
from django.db.models import Model

from agents_app.llm import ModelError
from agents_app.models import Agent, ApprovalRule, TeamNow, TeamVersion, Tool
from agents_app.team_now import TEAM
from agents_app.tools import Toolbox
from events_app.prepared import Rows

# A turn that waits for a person may be of any age; those that run are of the last few versions.
VERSIONS_KEPT = 8
Stored = dict[str, list[Any]]

_agents = Rows(Agent, lambda slot: Agent.objects.all())
_tools = Rows(Tool, lambda slot: Tool.objects.all())
_rules = Rows(ApprovalRule, lambda slot: ApprovalRule.objects.all())
_version_now = Rows(
    TeamNow,
    lambda slot: TeamNow.objects.filter(version__isnull=False, columns=slot("columns")).values_list("version_id"),
)


class UnknownToTeam(ModelError):
    def __init__(self, name: str) -> None:
        super().__init__("unknown_agent", f"There is no agent '{name[:32]}' any more. Switch to another.")


@dataclass(frozen=True, slots=True)
class Team:
    """All agents, tools and rules at one moment."""

    agents: dict[str, Agent]
    tools: dict[str, Tool]
    rules: list[ApprovalRule]

    @classmethod
    def now(cls) -> "Team":
        return cls._of(_at_one_moment())

    @classmethod
    def of(cls, content: str) -> "Team":
        """The team of a stored version."""
        return cls._of(json.loads(content))

    @classmethod
    def _of(cls, rows: Stored) -> "Team":
        agents, tools, rules = (
            [Agent(**_known(Agent, row)) for row in rows["agents"]],
            [Tool(**_known(Tool, row)) for row in rows["tools"]],
            [ApprovalRule(**_known(ApprovalRule, row)) for row in rows["rules"]],
        )
        return cls(
            {agent.name: agent for agent in agents},
            {tool.name: tool for tool in tools},
            [rule for rule in rules if rule.is_active],
        )

    def toolbox(self, name: str) -> Toolbox:
        """What an agent may use. Raises UnknownToTeam."""
        if name not in self.agents:
            raise UnknownToTeam(name)
        agent = self.agents[name]
        allowed = {tool.name: tool for tool in self.tools.values() if tool.name in agent.allowed_tools}
        return Toolbox(agent, allowed, frozenset(self.tools), self.rules)


def pin() -> int:
    """The version of the team as it is now, stored unless it was there before."""
    known = _version_now.first(columns=_columns_of_the_team())
    return known[0] if known else _pin_anew()


@transaction.atomic
def _pin_anew() -> int:
    revision = TeamNow.objects.values_list("revision", flat=True).first()
    version = _store(_at_one_moment())
    # Of the team that was read, unless it has been changed since. Nobody is waited for who is changing it.
    unchanged = TeamNow.objects.select_for_update(skip_locked=True).filter(revision=revision)
    if unchanged.exists():
        unchanged.update(version=version, columns=_columns_of_the_team())
    return version


@cache
def _columns_of_the_team() -> str:
    """While a new version of this program is rolled out, its versions of the team have other columns."""
    names = [[field.attname for field in model._meta.concrete_fields] for model in TEAM]
    return hashlib.sha256(json.dumps(names).encode()).hexdigest()[:16]


def _store(stored: Stored) -> int:
    content = json.dumps(stored, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    digest = hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()
    # The number is of the content too, so that no process can remember another version under it.
    version = int(digest[:15], 16)
    if not TeamVersion.objects.filter(pk=version, digest=digest).exists():
        TeamVersion.objects.get_or_create(digest=digest, defaults={"id": version, "content": content})
    return version


def _at_one_moment() -> Stored:
    """Everything that makes the team, as it was at one moment.

    PostgreSQL lets others commit between two queries, and an agent of before with rules of after is a team that never
    was: so what is read counts when a second reading finds the same. In a transaction of SQLite nobody else commits.
    """
    read = _read()
    if connection.vendor == "sqlite" and connection.in_atomic_block:
        return read
    while (again := _read()) != read:
        read = again
    return read


def _known(model: type[Model], row: dict[str, Any]) -> dict[str, Any]:
    """The columns that this process knows: while a new version is rolled out, turns are pinned by both."""
    return {field.attname: row[field.attname] for field in model._meta.concrete_fields if field.attname in row}


def _read() -> Stored:
    return {
        "agents": [_columns(agent) for agent in _agents()],
        "tools": [_columns(tool) for tool in _tools()],
        "rules": [_columns(rule) for rule in _rules()],
    }


def _columns(row: Model) -> dict[str, Any]:
    return {field.attname: getattr(row, field.attname) for field in row._meta.concrete_fields}


def toolbox_of(version: int, agent: str) -> Toolbox:
    """What an agent may use in a turn of this version. An agent that the session was switched to later is as it is now.

    Raises UnknownToTeam.
    """
    pinned = _version(version)
    return (pinned if agent in pinned.agents else Team.now()).toolbox(agent)


@lru_cache(maxsize=VERSIONS_KEPT)
def _version(version: int) -> Team:
    return Team.of(TeamVersion.objects.get(pk=version).content)

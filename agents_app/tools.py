"""Whether a tool call may be made at all: the agent's tools, the arguments' schema, the agent's paths, the rules."""

import logging
import posixpath
import re
from dataclasses import dataclass, field
from typing import Any

from django.core.exceptions import ImproperlyConfigured
from django.db.models import F, Max

from agents_app import policy, schemas, server_tools
from agents_app.llm import CallWanted
from agents_app.models import Agent, ApprovalRule, Tool
from agents_app.policy import Ruling
from events_app.models import AuditEntry
from orchestrator_site.errors import APIError
from orchestrator_site.http import read_json

logger = logging.getLogger(__name__)

WRITE = "write_file"
EXECUTE = "execute_command"
SHOWN_CHARS = 300
# Longer ones match no agent's paths: patterns are known to be quick only up to here.
MAX_PATH_CHARS = 1_000


class CallRefused(Exception):
    """A call that may not be made. `message` is for the model and for people, `code` for programs.

    `path` says where in the arguments. What the agent is forbidden is also shown to the client (section 4, row 8);
    a slip of the model is told to the model alone.
    """

    def __init__(self, code: str, message: str, *, path: tuple[str | int, ...] = (), is_shown: bool = False) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.path = path
        self.is_shown = is_shown


@dataclass(frozen=True, slots=True)
class Toolbox:
    """What one agent may use, and under which rules.

    `rules_now`: those that are in force when a call is judged, where the others are of the time when its turn began.
    """

    agent: Agent
    tools: dict[str, Tool]
    known: frozenset[str]
    rules: list[ApprovalRule]
    rules_now: list[ApprovalRule] = field(default_factory=list)

    def offered(self) -> list[dict[str, Any]]:
        """The tools as a model is offered them when it speaks for this agent."""
        return [tool.as_function() for tool in self.tools.values()]

    def tool_named(self, name: str) -> Tool:
        """The tool, or CallRefused with the contract's text (protocol 6.2)."""
        if name in self.tools:
            return self.tools[name]
        if name in self.known:
            raise CallRefused("tool_not_allowed", _forbidden(self.agent, name), is_shown=True)
        raise CallRefused("unknown_tool", f"There is no tool '{name[:64]}'. There are: {', '.join(self.tools)}.")

    def check(self, tool: Tool, arguments: dict[str, Any]) -> None:
        """Raise CallRefused for arguments that do not fit the tool's schema, a path that is not the agent's, or a tool
        of the server that this server does not have.
        """
        if tool.on_server and tool.name not in server_tools.registered:
            raise CallRefused("tool_unavailable", f"This server does not have {tool.name} at the moment.")
        _check_schema(tool, arguments)
        _check_path(self.agent, tool, arguments)

    def rule(self, tool: str) -> Ruling:
        """What the rules say of a call of this tool, the strictest of then and now; CallRefused where they deny it."""
        then, now = (policy.rule_on(rules, tool=tool, agent=self.agent.name) for rules in (self.rules, self.rules_now))
        ruling = policy.stricter(then, now)
        if ruling.outcome == policy.Outcome.DENY:
            raise CallRefused("denied_by_policy", ruling.reason or "This is not allowed here.", is_shown=True)
        return ruling

    def judge(self, tool: Tool, arguments: dict[str, Any]) -> Ruling:
        """What the rules say of a call with these arguments, or CallRefused: schema, then paths, then rules."""
        self.check(tool, arguments)
        return self.rule(tool.name)


def is_on_server(tool: Tool) -> bool:
    """Whether the server executes it; every other tool is the client's."""
    # A turn may be pinned to the team of a time when the row did not say so.
    return tool.on_server or server_tools.step_tool_named(tool.name) is not None


def follow_registry() -> None:
    """Make the rows of `Tool` what the registered server tools are: a row for each, its schema and description those of
    the code. Raises ImproperlyConfigured for a schema that cannot be used and for the name of a client's tool.
    """
    for tool in server_tools.registered.values():
        if isinstance(tool, server_tools.StepTool):
            Tool.objects.filter(pk=tool.name, on_server=False).update(on_server=True)
            continue
        try:
            schemas.ensure_usable(tool.parameters)
        except schemas.SchemaRefused as refused:
            raise ImproperlyConfigured(f"the parameters of the server tool {tool.name}: {refused}") from None
        row = Tool.objects.filter(pk=tool.name).first()
        written = {"description": tool.description, "parameters": tool.parameters, "on_server": True}
        if row is None:
            last = Tool.objects.aggregate(last=Max("position"))["last"] or 0
            version = first_version(tool.name)
            Tool.objects.create(
                name=tool.name,
                position=last + 1,
                version=version,
                deadline_seconds=tool.deadline_seconds,
                **written,
            )
        elif not row.on_server:
            raise ImproperlyConfigured(f"the server tool {tool.name} has the name of a tool that clients execute")
        elif any(getattr(row, name) != value for name, value in written.items()):
            Tool.objects.filter(pk=row.pk).update(version=F("version") + 1, **written)


def first_version(name: str) -> int:
    """Above every version of a tool that had this name: approvals are given for name and version."""
    deleted = AuditEntry.objects.filter(action="tool.deleted", target=name).order_by("-id").first()
    return 1 if deleted is None else int(deleted.details["before"]["version"]) + 1


def read_arguments(wanted: CallWanted) -> dict[str, Any]:
    """The arguments that the model wrote, or CallRefused: what cannot be parsed is never executed."""
    if wanted.is_cut:
        raise CallRefused("arguments_too_large", "The arguments are too large: 256 KiB is the most.")
    if wanted.is_damaged:
        raise CallRefused("invalid_arguments", "The arguments cannot be used: they have a NUL or half a character.")
    if not wanted.arguments.strip():
        return {}
    try:
        arguments = read_json(wanted.arguments.encode(), "application/json")
    except APIError as error:
        why = _of_arguments(error.message)
        raise CallRefused("invalid_arguments", f"The arguments cannot be used: {why}") from None
    if not isinstance(arguments, dict):
        raise CallRefused("invalid_arguments", "The arguments have to be a JSON object.")
    return arguments


def _of_arguments(why: str) -> str:
    return why.replace("The body is", "they are").replace("A body may", "they may")


def _forbidden(agent: Agent, tool: str) -> str:
    text = f"Tool '{tool}' is not allowed for {_speaker(agent)}"
    if tool == WRITE and agent.name in ("debug", "ask"):
        return f"{text}: it only reads. Switch to the Coder agent to change files."
    if tool == EXECUTE and agent.name == "ask":
        return f"{text}. Switch to the Coder agent to run commands."
    return text


def _speaker(agent: Agent) -> str:
    return f"{agent.name.capitalize()} agent"


def _check_schema(tool: Tool, arguments: dict[str, Any]) -> None:
    try:
        complaint = schemas.complaint(tool.parameters, arguments)
    except schemas.SchemaBroken:
        logger.exception("tool_schema_broken", extra={"tool": tool.name})
        raise CallRefused("tool_broken", f"The schema of {tool.name} cannot be used.") from None
    if complaint is not None:
        at = f" at {'.'.join(map(str, complaint.path))}" if complaint.path else ""
        message = f"The arguments do not fit {tool.name}{at}: {complaint.text}"
        raise CallRefused("invalid_arguments", message, path=complaint.path)


def _check_path(agent: Agent, tool: Tool, arguments: dict[str, Any]) -> None:
    """An agent that may write only some files is held to them; only `write_file` is (protocol 6.2)."""
    if tool.name != WRITE or not agent.writable_paths:
        return
    path = str(arguments.get("path", "")).replace("\\", "/")
    is_outside = path.startswith(("/", "~")) or ":" in path or ".." in path.split("/")
    is_odd = path != path.strip() or path.endswith("/") or len(path) > MAX_PATH_CHARS
    if is_outside or is_odd or not re.fullmatch(agent.writable_paths, posixpath.normpath(path)):
        raise CallRefused(
            "path_not_allowed",
            f"Tool '{WRITE}' is not allowed for {_speaker(agent)} on '{path[:SHOWN_CHARS]}': only files inside the "
            f"workspace that match {agent.writable_paths}. Switch to the Coder agent to change other files.",
            path=("path",),
            is_shown=True,
        )

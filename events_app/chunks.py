"""The typed chunks of a streamed reply and the one place that knows their wire form (protocol 3.4 to 3.6)."""

from dataclasses import dataclass, field
from json.encoder import JSONEncoder, encode_basestring_ascii
from typing import Any, ClassVar

# ASCII only: the gateway's line reader also splits on U+0085, U+2028 and U+2029 (protocol 3.3).
_json = JSONEncoder(ensure_ascii=True, separators=(",", ":"), allow_nan=False).encode


@dataclass(frozen=True, slots=True)
class AssistantText:
    """The whole of what an agent said in one step."""

    type: ClassVar[str] = "assistant_message"
    content: str
    is_final: bool = True

    def as_wire(self) -> dict[str, Any]:
        return {"content": self.content, "is_final": self.is_final}


@dataclass(frozen=True, slots=True)
class ToolCalled:
    """A tool call that waits for its result, or first for a person."""

    type: ClassVar[str] = "tool_call"
    call_id: str
    tool_name: str
    arguments: dict[str, Any]
    requires_approval: bool
    args_hash: str

    def as_wire(self) -> dict[str, Any]:
        return {
            "call_id": self.call_id,
            "tool_name": self.tool_name,
            "arguments": self.arguments,
            "requires_approval": self.requires_approval,
            "is_final": True,
            "metadata": {"args_hash": self.args_hash},
        }


@dataclass(frozen=True, slots=True)
class AgentSwitched:
    """A handoff; final when it is the whole answer to `switch_agent`."""

    type: ClassVar[str] = "agent_switched"
    from_agent: str
    to_agent: str
    reason: str
    confidence: str | None = None
    is_final: bool = False

    def as_wire(self) -> dict[str, Any]:
        # Both at top level and in metadata: the IDE reads `reason` for the live chat only from the top (protocol 3.4).
        details = {"from_agent": self.from_agent, "to_agent": self.to_agent, "reason": self.reason}
        if self.confidence is not None:
            details["confidence"] = self.confidence
        return {
            "content": f"Switched to {self.to_agent} agent",
            "is_final": self.is_final,
            **details,
            "metadata": {**details, "confidence": self.confidence},
        }


@dataclass(frozen=True, slots=True)
class ErrorShown:
    """What went wrong, in words for people and in one stable word for programs."""

    type: ClassVar[str] = "error"
    message: str
    code: str
    metadata: dict[str, Any] = field(default_factory=dict)

    def as_wire(self) -> dict[str, Any]:
        return {
            "content": self.message,
            "error": self.message,
            "is_final": True,
            "metadata": {"code": self.code, **self.metadata},
        }


@dataclass(frozen=True, slots=True)
class ApprovalResolved:
    """What became of a tool call that waited for a person, with the arguments that were decided on."""

    type: ClassVar[str] = "approval_resolved"
    call_id: str
    decision: str
    arguments: dict[str, Any]
    args_hash: str
    feedback: str | None
    decided_by: str
    decided_at: str

    def as_wire(self) -> dict[str, Any]:
        details = ("decision", "arguments", "args_hash", "feedback", "decided_by", "decided_at")
        return {"call_id": self.call_id, "metadata": {name: getattr(self, name) for name in details}}


@dataclass(frozen=True, slots=True)
class ServerCallMoved:
    """Where a tool call stands that the server executes: what a client would only misunderstand as its own to make."""

    type: ClassVar[str] = "server_call"
    call_id: str
    tool_name: str
    arguments: dict[str, Any]
    state: str
    args_hash: str

    def as_wire(self) -> dict[str, Any]:
        return {
            "call_id": self.call_id,
            "tool_name": self.tool_name,
            "arguments": self.arguments,
            "state": self.state,
            "metadata": {"args_hash": self.args_hash},
        }


@dataclass(frozen=True, slots=True)
class TurnStarted:
    type: ClassVar[str] = "turn_started"
    turn_id: str

    def as_wire(self) -> dict[str, Any]:
        return {"turn_id": self.turn_id}


@dataclass(frozen=True, slots=True)
class TurnFinished:
    type: ClassVar[str] = "turn_finished"
    turn_id: str
    status: str
    code: str | None
    usage: dict[str, int]

    def as_wire(self) -> dict[str, Any]:
        return {"turn_id": self.turn_id, "status": self.status, "code": self.code, "usage": self.usage}


@dataclass(frozen=True, slots=True)
class Restarted:
    """Another runner repeats the unfinished step: text after `discard_after` is void."""

    type: ClassVar[str] = "restarted"
    turn_id: str
    discard_after: int

    def as_wire(self) -> dict[str, Any]:
        return {"turn_id": self.turn_id, "metadata": {"discard_after": self.discard_after}}


@dataclass(frozen=True, slots=True)
class StreamReset:
    """What was asked for is gone or never was; all that is kept follows from number `oldest`."""

    type: ClassVar[str] = "stream_reset"
    oldest: int

    def as_wire(self) -> dict[str, Any]:
        return {"metadata": {"from": self.oldest}}


@dataclass(frozen=True, slots=True)
class StreamPosition:
    """What follows is past this number."""

    type: ClassVar[str] = "stream_position"

    def as_wire(self) -> dict[str, Any]:
        return {}


Chunk = (
    AssistantText
    | ToolCalled
    | AgentSwitched
    | ErrorShown
    | ServerCallMoved
    | ApprovalResolved
    | TurnStarted
    | TurnFinished
    | Restarted
    | StreamReset
    | StreamPosition
)

# The contract's own chunks, which the old gateway forwards. Everything else is sent in a form that it skips.
_FORWARDED = (AssistantText, ToolCalled, AgentSwitched, ErrorShown)


def encode(chunk: Chunk) -> str:
    """The SSE fields of a whole chunk, without its `id:` line."""
    payload = _json({"type": chunk.type, **chunk.as_wire()})
    return f"{FORWARDED_PREFIX}{payload}\n\n" if isinstance(chunk, _FORWARDED) else f"data:{payload}\n\n"


def encode_delta(text: str) -> str:
    """The SSE fields of a token delta: legal SSE that the gateway's line rules skip (protocol 3.5)."""
    return f'{DELTA_PREFIX}{encode_basestring_ascii(text)},"is_final":false}}\n\n'


FORWARDED_PREFIX = "event: message\ndata: "
DELTA_PREFIX = 'data:{"type":"assistant_message","token":'
RESTARTED_PREFIX = f'{{"type":"{Restarted.type}"'

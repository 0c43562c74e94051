"""The players themselves: they break where the old gateway and the IDE would break."""

from typing import Any

import httpx
import pytest

from tests.old_clients import Answer, Bubble, Gateway, Ide, ToolCall, forwarded, ide_message, parse_message


def gateway(status: int = 200, body: bytes = b"", json: Any = None) -> Gateway:
    """A gateway before a server that always answers the same."""
    content = {"json": json} if json is not None else {"content": body}
    transport = httpx.MockTransport(lambda _: httpx.Response(status, **content))
    return Gateway(httpx.Client(transport=transport, base_url="http://server"), "s")


def hello() -> dict[str, Any]:
    return ide_message("user_message", content="hello", role="user")


@pytest.mark.parametrize(
    ("body", "messages"),
    [
        ('event: message\ndata: {"type":"a","b":null,"c":{"d":null}}\n\n', [{"type": "a", "c": {"d": None}}]),
        ('data: {"type":"a","b":null}\n\n', [{"type": "a", "b": None}]),
        ('event: error\ndata: {"type":"a","b":null}\n\n', [{"type": "a", "b": None}]),
        ('event: message\n\ndata: {"b":null}\n\n', [{"b": None}]),
        ('event: done\ndata: not read\n\ndata: {"late":1}\n\n', []),
        ('data: {"a":1}\n\ndata: [DONE]\n\ndata: {"late":1}\n\n', [{"a": 1}]),
        (': ping\n\nid: 7\nevent:message\ndata:{"a":1}\nretry: 5\n\n', []),
        ('id: 7\nevent: message\n: ping\ndata: {"a":1}\r\n\r\n', [{"a": 1}]),
        ('event: message\ndata: {"a":1}', [{"a": 1}]),
    ],
)
def test_the_gateway_forwards_by_its_line_rules(body: str, messages: list[Any]) -> None:
    assert gateway(body=body.encode()).send(hello()) == messages


def test_the_gateway_breaks_on_a_list() -> None:
    with pytest.raises(TypeError):
        list(forwarded(["event: message", "data: []"]))


@pytest.mark.parametrize("separator", ["\u0085", "\u2028", "\u2029"])
def test_the_gateway_cuts_a_frame_at_a_raw_line_separator(separator: str) -> None:
    body = f'event: message\ndata: {{"content":"one{separator}two"}}\n\n'

    with pytest.raises(ValueError, match="Unterminated"):
        gateway(body=body.encode()).send(hello())


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"type": "cancel"}, "Unknown message type: cancel"),
        ("no json", "Invalid JSON message: "),
        (["a list"], "Invalid JSON message: "),
        ({"type": "user_message", "content": "hi"}, "Invalid JSON message: "),
        ({"type": "tool_result", "call_id": "c", "error": 7}, "Invalid JSON message: "),
        ({"type": "hitl_decision", "call_id": "c", "decision": "maybe"}, "Invalid JSON message: "),
    ],
)
def test_the_gateway_refuses_what_it_does_not_know(message: Any, text: str) -> None:
    (error,) = gateway().send(message)

    assert error.keys() == {"type", "content"}
    assert error["content"].startswith(text)


def test_the_gateway_tells_the_status_of_a_refusal_and_nothing_else() -> None:
    assert gateway(422, b"{}").send(hello()) == [{"type": "error", "content": "Agent error: 422"}]


def test_the_gateway_proxies_some_paths_and_hides_the_status() -> None:
    created = gateway(201, json={"id": "1", "message_count": 0})

    assert created.request("POST", "/sessions").status == 200
    assert created.request("GET", "/sessions/1").status == 404
    assert created.request("PATCH", "/sessions/1", {"title": "x"}).status == 404
    missing = gateway(404).request("GET", "/sessions/s/pending-approvals")
    assert missing == Answer(404, {"error": "Session s not found"})
    assert gateway(307).request("GET", "/agents") == Answer(307, {"error": "Agent Runtime error: 307"})


def test_the_ide_appends_every_message_as_a_bubble() -> None:
    body = 'event: message\ndata: {"type":"assistant_message","content":"a"}\n\ndata: {"type":"done","x":1}\n\n'
    ide = Ide(gateway(body=body.encode()), "s")

    ide.say("hello")

    assert ide.bubbles == [Bubble("assistant_message", {"content": "a"}), Bubble("done", {})]
    assert ide.bubbles[1].text == "", "an empty bubble"


@pytest.mark.parametrize(
    "message",
    [
        [],
        {"content": "no type"},
        {"type": "assistant_message", "content": ["text"]},
        {"type": "assistant_message", "is_final": 1},
        {"type": "tool_result", "result": "text"},
        {"type": "tool_call", "call_id": "c", "tool_name": "t", "arguments": "{}"},
        {"type": "tool_call", "call_id": "c", "tool_name": "t"},
        {"type": "agent_switched", "content": "to nobody"},
    ],
)
def test_the_ide_cannot_parse_another_type(message: Any) -> None:
    with pytest.raises(AssertionError):
        parse_message(message)


def test_the_ide_sends_every_field_and_null_for_most() -> None:
    sent: list[Any] = []
    ide = Ide(gateway(), "s")
    ide.connection.send = lambda message: sent.append(message) or []  # type: ignore[method-assign, func-returns-value]

    ide.reject(ToolCall("c", "write_file", {}))
    ide.switch("debug")

    assert len(sent[0]) == len(sent[1]) == 15
    assert {name: value for name, value in sent[0].items() if value is not None} == {
        "type": "tool_result",
        "call_id": "c",
        "tool_name": "write_file",
        "error": "Операция отклонена: write_file",
    }
    assert (sent[1]["content"], sent[1]["reason"]) == ("Switched to Debug", None)

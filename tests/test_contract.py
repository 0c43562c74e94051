"""The wire contract's answers to good requests, key by key (protocol sections 1, 2 and 8)."""

import re
import uuid
from typing import Any

import httpx
import pytest

from tests.scripted_llm import ScriptedLLM, say
from tests.server import KEY, Server

pytestmark = pytest.mark.usefixtures("played")
ISO_UTC = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?\+00:00")


@pytest.fixture
def server(shared_server: Server) -> Server:
    return shared_server


@pytest.fixture
def session_id(server: Server) -> str:
    """An existing session in which nothing has been said."""
    session_id = str(uuid.uuid4())
    assert server.http.post("/sessions", json={"session_id": session_id}).status_code == 201
    return session_id


def get(server: Server, path: str, status: int = 200) -> dict[str, Any]:
    answer = server.http.get(path)
    assert answer.status_code == status, answer.text
    return answer.json()


def test_health_is_open(server: Server) -> None:
    for path in ("/health", "/api/v1/health"):
        answer = server.http.get(path, headers={"X-Internal-Auth": ""})
        assert answer.json().keys() == {"status", "service", "version"}
        assert (answer.json()["status"], answer.json()["service"]) == ("healthy", "agent-runtime")


@pytest.mark.parametrize(
    ("path", "accept", "status", "location"),
    [
        ("/", "text/html,application/xhtml+xml,*/*;q=0.8", 302, "/admin/"),
        ("/", "application/json", 401, None),
        ("/", "*/*", 401, None),
        ("/favicon.ico", "image/*", 204, None),
    ],
)
def test_a_browser_without_a_key_finds_the_admin_and_a_client_nothing(
    server: Server, path: str, accept: str, status: int, location: str | None
) -> None:
    for method in ("GET", "HEAD"):
        answer = httpx.request(method, server.url + path, headers={"Accept": accept})
        assert (answer.status_code, answer.headers.get("location")) == (status, location)


def test_at_the_root_a_client_with_the_key_finds_nothing_and_posts_nothing(server: Server) -> None:
    assert get(server, "/", 404)["code"] == "not_found"
    assert httpx.post(f"{server.url}/", headers={"Accept": "text/html"}).status_code == 401


@pytest.mark.parametrize("header", [{"X-Internal-Auth": KEY}, {"Authorization": f"Bearer {KEY}"}])
def test_both_headers_carry_the_key(server: Server, header: dict[str, str]) -> None:
    assert httpx.get(f"{server.url}/agents", headers=header).status_code == 200


@pytest.mark.parametrize("body", [b"", b"null", b"{}", b'{"session_id": null}'])
@pytest.mark.parametrize("prefix", ["", "/api/v1"])
def test_a_session_is_created_from_nothing(server: Server, body: bytes, prefix: str) -> None:
    # The gateway sends an empty body and no Content-Type.
    headers = {"Content-Type": "application/json"} if body else {}
    answer = server.http.post(f"{prefix}/sessions", content=body, headers=headers)

    created = answer.json()
    assert answer.status_code == 201
    assert created.keys() == {"id", "session_id", "message_count", "created_at", "is_active", "current_agent"}
    assert uuid.UUID(created["id"]).version == 4
    assert created["id"] == created["session_id"]
    assert (created["message_count"], created["is_active"], created["current_agent"]) == (0, True, "orchestrator")
    assert ISO_UTC.fullmatch(created["created_at"])
    # The answer comes after the commit: what is asked at once is there.
    assert get(server, f"/sessions/{created['id']}")["id"] == created["id"]


def test_an_id_that_is_taken_is_409(server: Server, session_id: str) -> None:
    answer = server.http.post("/sessions", json={"session_id": session_id})

    assert (answer.status_code, answer.json()["code"]) == (409, "session_id_taken")


def test_the_list_has_pages_the_latest_activity_first(server: Server, played: ScriptedLLM) -> None:
    ids = [server.http.post("/sessions").json()["id"] for _ in range(3)]
    played.script(say("hi"))
    server.say(ids[0], "hello", agent_type="ask")

    first = get(server, "/sessions?limit=2")
    second = get(server, "/sessions?limit=2&offset=2&active_only=false")

    assert first.keys() == {"sessions", "total", "limit", "offset"}
    assert [session["id"] for session in first["sessions"] + second["sessions"]][:3] == [ids[0], ids[2], ids[1]]
    assert first["total"] == second["total"] >= 3
    item = first["sessions"][0]
    assert item.keys() >= {"id", "title", "message_count", "last_activity", "is_active", "current_agent"}
    assert item.keys() >= {"session_id", "description", "created_at"}
    assert (item["title"], item["message_count"], item["current_agent"]) == ("hello", 2, "ask")
    assert ISO_UTC.fullmatch(item["last_activity"])


def test_a_session_is_read_in_both_forms(server: Server, played: ScriptedLLM, session_id: str) -> None:
    played.script(say("hi"))
    server.say(session_id, "  hello \n", agent_type="ask")

    plain = get(server, f"/sessions/{session_id}")
    full = get(server, f"/sessions/{session_id}?include_messages=true")

    nested = plain.pop("session")
    assert plain == nested
    assert plain["messages"] is None
    assert plain["title"] == "hello"
    assert plain["duration_seconds"] >= 0
    assert [message["role"] for message in full["messages"]] == ["user", "assistant"]
    assert full["session"]["messages"] == full["messages"]
    assert full["messages"][0].keys() == {
        "id",
        "role",
        "content",
        "name",
        "tool_call_id",
        "tool_calls",
        "created_at",
    }
    assert full["messages"][0]["content"] == "  hello \n", "stored as it was sent"


def test_a_title_is_the_first_message_unless_somebody_gave_one(
    server: Server, played: ScriptedLLM, session_id: str
) -> None:
    renamed = server.http.patch(f"/sessions/{session_id}", json={"title": "Mine"})
    played.script(say("hi"), say("hi"))
    server.say(session_id, "hello", agent_type="ask")
    other = str(uuid.uuid4())
    server.say(other, "x" * 600, agent_type="ask")

    assert renamed.status_code == 200
    assert (renamed.json()["id"], renamed.json()["title"]) == (session_id, "Mine")
    assert get(server, f"/sessions/{session_id}")["title"] == "Mine"
    assert get(server, f"/sessions/{other}")["title"] == "x" * 500


def test_a_history_has_chat_messages_and_handoffs(server: Server, played: ScriptedLLM, session_id: str) -> None:
    played.route_to = "debug"
    played.script(say("hi"))
    server.say(session_id, "hello")

    history = get(server, f"/sessions/{session_id}/history")

    assert history.keys() == {
        "session_id",
        "messages",
        "message_count",
        "last_activity",
        "current_agent",
        "agent_history",
    }
    assert history["messages"] == [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
    (handoff,) = history["agent_history"]
    assert handoff.keys() == {"from", "to", "reason", "timestamp", "confidence"}
    assert (handoff["from"], handoff["to"], history["current_agent"]) == ("orchestrator", "debug", "debug")
    get(server, f"/sessions/{uuid.uuid4()}/history", 404)


def test_the_agents_are_those_of_the_contract(server: Server) -> None:
    answer = get(server, "/agents")

    assert answer["total"] == 5
    assert [agent["type"] for agent in answer["agents"]] == ["orchestrator", "coder", "architect", "debug", "ask"]
    for agent in answer["agents"]:
        assert agent.keys() == {"type", "name", "description", "allowed_tools", "has_file_restrictions"}
        assert agent["name"] == f"{agent['type'].capitalize()} Agent"
        assert agent["description"].startswith(f"You are the {agent['type']}")
        assert "\n" not in agent["description"]
        assert agent["has_file_restrictions"] is (agent["type"] == "architect")
    tools = {agent["type"]: agent["allowed_tools"] for agent in answer["agents"]}
    assert tools["orchestrator"] == ["read_file", "list_files", "search_in_code"]
    assert tools["ask"] == ["read_file", "search_in_code", "list_files", "attempt_completion", "switch_mode"]
    assert tools["coder"][-1] == "ask_followup_question"


def test_switching_is_recorded_and_shown_in_both_forms(server: Server, session_id: str) -> None:
    before = get(server, f"/agents/{session_id}/current")
    body = {"target_agent": "coder", "reason": "time to build", "confidence": "high"}
    switched = server.http.post(f"/agents/{session_id}/switch", json=body)
    after = get(server, f"/agents/{session_id}/current?include_history=true")

    assert (before["current_agent"], before["context"]["switch_count"]) == ("orchestrator", 0)
    assert before["context"]["switch_history"] is None
    assert before["context"]["last_switch_at"] is None
    assert switched.json()["context"] == after["context"]
    assert after["context"].keys() == {
        "id",
        "session_id",
        "current_agent",
        "switch_count",
        "switch_history",
        "last_switch_at",
        "created_at",
    }
    (entry,) = after["context"]["switch_history"]
    assert ISO_UTC.fullmatch(entry.pop("switched_at"))
    assert entry == {
        "from_agent": "orchestrator",
        "to_agent": "coder",
        "reason": "time to build",
        "confidence": "high",
    }
    assert after["agent_history"][0].keys() == {"from", "to", "reason", "timestamp"}
    assert after["switch_count"] == 1


def test_a_session_may_be_switched_fifty_times_by_hand(server: Server, session_id: str) -> None:
    def switch(number: int) -> int:
        body = {"target_agent": ["coder", "ask"][number % 2], "reason": "to and fro"}
        return server.http.post(f"/agents/{session_id}/switch", json=body).status_code

    assert [switch(number) for number in range(51)] == [200] * 50 + [400]
    again = server.post({"type": "switch_agent", "agent_type": "coder"}, session_id)
    assert again[0].type == "agent_switched", "the limit is that of POST switch alone"


def test_a_stream_has_the_headers_that_keep_proxies_from_holding_it_back(
    server: Server, played: ScriptedLLM, session_id: str
) -> None:
    played.script(say("hi"))
    body = {"session_id": session_id, "message": {"type": "user_message", "content": "hi", "agent_type": "ask"}}

    answer = server.http.post("/api/v1/agent/message/stream", json=body)

    assert answer.headers["Content-Type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["Cache-Control"] == "no-cache"
    assert answer.headers["X-Accel-Buffering"] == "no"
    assert answer.headers["Connection"] == "keep-alive"
    assert answer.text.endswith('event: done\ndata: {"status":"completed"}\n\n')


def test_a_message_carries_whatever_the_ide_sends_with_it(server: Server, played: ScriptedLLM, session_id: str) -> None:
    played.script(say("hi"))
    names = ("is_final", "call_id", "tool_name", "arguments", "requires_approval", "result", "error", "agent_type")
    nulls = dict.fromkeys((*names, "from_agent", "to_agent", "reason", "metadata"))

    frames = server.post({"type": "user_message", "content": "hi", "role": "user", **nulls, "new": 1}, session_id)

    assert frames[-2].data["status"] == "completed"


def test_the_figures_have_all_their_keys_from_the_start(server: Server, session_id: str) -> None:
    metrics = get(server, "/events/metrics")
    assert metrics.keys() == {"metrics", "computed", "timestamp"}
    assert metrics["metrics"].keys() == {
        "agent_switches",
        "agent_processing",
        "tool_executions",
        "hitl_decisions",
        "errors",
    }
    assert get(server, "/events/stats").keys() == {
        "total_published",
        "successful_handlers",
        "failed_handlers",
        "last_event_time",
        "success_rate",
    }
    unknown = get(server, f"/events/metrics/session/{session_id}", 404)
    assert unknown["error"] == f"No metrics found for session {session_id}"
    audit_log = get(server, f"/events/audit-log?session_id={session_id}&event_type=agent_switched&limit=5")
    filters = {"session_id": session_id, "event_type": "agent_switched", "limit": 5}
    assert audit_log == {"audit_log": [], "count": 0, "filters": filters}


def test_the_figures_of_a_session_add_up(server: Server, played: ScriptedLLM, session_id: str) -> None:
    played.script(say("hi", usage=(100, 20)), say("ho", usage=(200, 40)))
    server.say(session_id, "one", agent_type="ask")
    server.say(session_id, "two")

    figures = get(server, f"/events/metrics/session/{session_id}")

    assert (figures["total_requests"], figures["successful_requests"], figures["failed_requests"]) == (2, 2, 0)
    assert (figures["total_prompt_tokens"], figures["total_completion_tokens"]) == (300, 60)
    assert (figures["total_tokens"], figures["average_tokens_per_request"]) == (360, 180.0)
    assert figures["requests"][0].keys() == {
        "timestamp",
        "model",
        "duration_ms",
        "prompt_tokens",
        "completion_tokens",
        "total_tokens",
        "has_tool_calls",
        "success",
        "error",
    }
    assert session_id in get(server, "/events/metrics/sessions")["sessions"]

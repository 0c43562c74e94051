"""The real input of the first issue: ten messages over HTTP, with everything going wrong that may."""

import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests import databases
from tests.databases import ON_POSTGRESQL
from tests.scripted_llm import Gate, ScriptedLLM, endless, hold, say, silence, status
from tests.server import Frame, Server, eventually, running, until


def text_of(frames: list[Frame]) -> str:
    """The text that a client shows: deltas in the order of their numbers, void ones dropped."""
    restarted = [frame for frame in frames if frame.type == "restarted"]
    for restart in restarted:
        void = range(restart.data["metadata"]["discard_after"] + 1, restart.seq)
        frames = [frame for frame in frames if frame.seq not in void]
    return "".join(frame.data["token"] for frame in frames if "token" in frame.data)


def user(content: str, **more: str) -> dict[str, str]:
    return {"type": "user_message", "content": content, **more}


def test_ten_messages_with_faults_in_between(server: Server, llm: ScriptedLLM) -> None:
    session_id = server.http.post("/sessions").json()["id"]
    llm.route_to = "architect"

    # 1: routed to the architect
    llm.script(say("Three layers."))
    first = server.say(session_id, "1 Design a small shop")
    assert [frame.data["to_agent"] for frame in first if frame.type == "agent_switched"] == ["architect"]

    # 2: stays there
    llm.script(say("A queue between them."))
    server.say(session_id, "2 And then?")

    # an explicit switch
    switched = server.post({"type": "switch_agent", "agent_type": "coder", "reason": "time to build"}, session_id)
    assert [frame.data.get("reason") for frame in switched] == ["time to build", None]

    # 3: the client drops in the middle of the answer and resumes
    gate = Gate()
    llm.script(hold("class Shop: ", "pass", gate=gate))
    with server.streaming(user("3 Write it"), session_id) as answer:
        seen = until(answer, "assistant_message")
    gate.open()
    with server.following(session_id, after=seen[-1].seq) as stream:
        seen += until(stream, "turn_finished")
    assert text_of(seen) == "class Shop: pass"

    # 4: the model fails twice and recovers
    llm.script(status(503), status(500), say("Added a cart."))
    fourth = server.say(session_id, "4 Add a cart")
    assert fourth[-2].data["status"] == "completed"

    # 5 and 6: queued behind a running turn
    gate = Gate()
    llm.script(hold("Test", "ed.", gate=gate), say("Documented."))
    with ThreadPoolExecutor(2) as pool:
        fifth = pool.submit(server.say, session_id, "5 Test it")
        gate.reached.wait()
        sixth = pool.submit(server.say, session_id, "6 Document it")
        eventually(lambda: server.history(session_id)[-1] == ("user", "6 Document it"))
        gate.open()
        assert text_of(fifth.result(30)) == "Tested."
        assert text_of(sixth.result(30)) == "Documented."

    # 7: the server is killed in the middle of the answer
    gate = Gate()
    llm.script(hold("Half of ", "what is lost", gate=gate), say("Released."))
    with server.streaming(user("7 Release it"), session_id) as answer:
        seen = until(answer, "assistant_message")
        gate.reached.wait()
        server.kill()
        with pytest.raises(httpx.TransportError):
            list(answer)
    gate.open()
    server.start()
    with server.following(session_id, after=seen[-1].seq) as stream:
        seen += until(stream, "turn_finished")
    assert text_of(seen) == "Released."

    # 8: cancelled in the middle
    gate = Gate()
    llm.script(hold("Never", " mind", gate=gate))
    with server.streaming(user("8 Delete everything"), session_id) as answer:
        until(answer, "assistant_message")
        gate.reached.wait()
        server.http.post(f"/sessions/{session_id}/cancel", json={})
        assert until(answer, "turn_finished")[-1].data["status"] == "cancelled"
    gate.open()

    # 9: the model is gone for good this time; 10: and back
    llm.script(status(400), say("All is well."))
    ninth = server.say(session_id, "9 Are you there?")
    assert ninth[-2].data["status"] == "failed"
    tenth = server.say(session_id, "10 And now?", agent_type="debug")
    assert text_of(tenth) == "All is well."

    # history
    assert llm.refused == []
    assert llm.unplayed == 0
    history = server.http.get(f"/sessions/{session_id}/history").json()
    assert [(message["role"], message["content"]) for message in history["messages"]] == [
        ("user", "1 Design a small shop"),
        ("assistant", "Three layers."),
        ("user", "2 And then?"),
        ("assistant", "A queue between them."),
        ("user", "3 Write it"),
        ("assistant", "class Shop: pass"),
        ("user", "4 Add a cart"),
        ("assistant", "Added a cart."),
        ("user", "5 Test it"),
        ("assistant", "Tested."),
        ("user", "6 Document it"),
        ("assistant", "Documented."),
        ("user", "7 Release it"),
        ("assistant", "Released."),
        ("user", "8 Delete everything"),
        ("assistant", "Never"),
        ("user", "9 Are you there?"),
        ("user", "10 And now?"),
        ("assistant", "All is well."),
    ]
    assert history["message_count"] == 19
    assert [(past["from"], past["to"]) for past in history["agent_history"]] == [
        ("orchestrator", "architect"),
        ("architect", "coder"),
        ("coder", "debug"),
    ]

    # streams: the whole of it once more, from the beginning
    with server.following(session_id) as stream:
        frames: list[Frame] = []
        while sum(frame.type == "turn_finished" for frame in frames) < 10:
            frames += until(stream, "turn_finished")
    numbers = [frame.seq for frame in frames]
    assert numbers == sorted(set(numbers))
    assert [frame.data["status"] for frame in frames if frame.type == "turn_finished"] == (
        ["completed"] * 7 + ["cancelled", "failed", "completed"]
    )
    whole = [frame.data["content"] for frame in frames if frame.type == "assistant_message" and "content" in frame.data]
    assert whole == [content for role, content in server.history(session_id) if role == "assistant"]

    # figures
    metrics = server.http.get("/events/metrics").json()["metrics"]
    assert metrics["agent_switches"] == {
        "orchestrator_to_architect": 1,
        "architect_to_coder": 1,
        "coder_to_debug": 1,
    }
    assert metrics["agent_processing"]["architect"]["success_count"] == 2
    assert metrics["agent_processing"]["coder"]["success_count"] == 5
    assert metrics["agent_processing"]["coder"]["failure_count"] == 2
    assert metrics["agent_processing"]["debug"]["count"] == 1
    assert metrics["errors"] == {"coder": {"model_rejected": 1}}
    figures = server.http.get(f"/events/metrics/session/{session_id}").json()
    assert (figures["total_requests"], figures["successful_requests"]) == (10, 8)
    assert figures["total_tokens"] == sum(request["total_tokens"] for request in figures["requests"]) > 0
    assert server.http.get("/events/metrics/sessions").json() == {"sessions": [session_id], "count": 1}
    audit_log = server.http.get(f"/events/audit-log?session_id={session_id}").json()["audit_log"]
    assert [entry["event_type"] for entry in audit_log] == [
        "agent_switched",
        "agent_switched",
        "agent_error",
        "agent_switched",
    ]
    assert server.http.get("/events/stats").json()["total_published"] >= 40
    listed = server.http.get("/sessions").json()
    assert (listed["total"], listed["sessions"][0]["title"]) == (1, "1 Design a small shop")

    # rows
    statuses = databases.rows(server.database, "SELECT status FROM sessions_app_turn ORDER BY position")
    assert [status for (status,) in statuses] == ["completed"] * 7 + ["cancelled", "failed", "completed"]
    if not ON_POSTGRESQL:
        assert databases.rows(server.database, "PRAGMA integrity_check") == [("ok",)]


def test_single_agent_mode_needs_no_router(tmp_path: Path, migrated: Path, llm: ScriptedLLM) -> None:

    session_id = str(uuid.uuid4())
    llm.script(say("I do it all."))
    with running(tmp_path, migrated, LLM_BASE_URL=llm.url, MULTI_AGENT_MODE="false") as server:
        frames = server.say(session_id, "hello")

        assert frames[1].data["to_agent"] == "universal"
        assert frames[1].data["reason"] == "Single-agent mode: only Universal agent available"
        assert llm.routings == []
        assert [agent["type"] for agent in server.http.get("/agents").json()["agents"]] == ["orchestrator", "universal"]


def test_a_turn_ends_at_its_limits(tmp_path: Path, migrated: Path, llm: ScriptedLLM) -> None:

    llm.script(silence(30, after="I am thinking"), endless("blah "), say("Short."))
    limits = {"TURN_MAX_SECONDS": "1", "TURN_MAX_OUTPUT_CHARS": "2000"}
    with running(tmp_path, migrated, LLM_BASE_URL=llm.url, **limits) as server:
        server.post({"type": "switch_agent", "agent_type": "ask"}, "limits")

        slow, long, short = (server.say("limits", text) for text in ("one", "two", "three"))

        assert slow[-2].data["code"] == "turn_timeout"
        assert long[-2].data["code"] == "output_limit"
        assert short[-2].data["status"] == "completed"
        assert llm.aborted >= 1

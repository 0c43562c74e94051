"""The real input of tools and approvals: real files, a client that really executes, everything going wrong."""

import fnmatch
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests import databases
from tests.scripted_llm import Gate, ScriptedLLM, call, calls, gated, say
from tests.server import AUTH, BRIEF, Frame, Server, running, until

Object = dict[str, Any]

README = """# Shop

A cart that knows what it costs. Run `python check_cart.py` before every commit.
"""
PRICES = '''"""What one piece costs, in cents."""

PRICES = {"apple": 80, "pear": 100, "plum": 25}


def price_of(fruit: str) -> int:
    return PRICES[fruit]
'''
CART = '''"""What somebody wants to buy."""

from shop.prices import price_of


class Cart:
    def __init__(self) -> None:
        self.items: dict[str, int] = {}

    def add(self, fruit: str, quantity: int = 1) -> None:
        self.items[fruit] = self.items.get(fruit, 0) + quantity

    def total(self) -> int:
        return sum(price_of(fruit) for fruit in self.items)
'''
FIXED_CART = CART.replace(
    "sum(price_of(fruit) for fruit in self.items)",
    "sum(price_of(fruit) * quantity for fruit, quantity in self.items.items())",
)
CHECK = '''"""Fails while the cart counts wrong."""

import sys

from shop.cart import Cart

cart = Cart()
cart.add("apple", 3)
cart.add("pear")
if cart.total() != 340:
    sys.exit(f"3 apples and a pear cost 340 cents, not {cart.total()}")
print("the cart adds up")
'''
PROJECT = {
    "README.md": README,
    "check_cart.py": CHECK,
    "shop/__init__.py": "",
    "shop/cart.py": CART,
    "shop/prices.py": PRICES,
}


class Workspace:
    """A folder of real files, and the tools of the IDE on it (protocol 6.3)."""

    def __init__(self, folder: Path, files: dict[str, str]) -> None:
        self.folder = folder
        for path, content in files.items():
            self._at(path).parent.mkdir(parents=True, exist_ok=True)
            self._at(path).write_text(content)

    def execute(self, tool_name: str, arguments: Object) -> Object:
        tools: dict[str, Callable[..., Object]] = {
            "read_file": self._read_file,
            "write_file": self._write_file,
            "list_files": self._list_files,
            "create_directory": self._create_directory,
            "search_in_code": self._search_in_code,
            "execute_command": self._execute_command,
        }
        return tools[tool_name](**arguments)

    def content(self) -> dict[str, str]:
        """Every file of the folder."""
        files = sorted(path for path in self.folder.rglob("*") if path.is_file())
        return {path.relative_to(self.folder).as_posix(): path.read_text() for path in files}

    def _at(self, path: str) -> Path:
        found = (self.folder / path).resolve()
        assert found.is_relative_to(self.folder.resolve()), f"{path} leads out of the workspace"
        return found

    def _read_file(self, path: str, start_line: int = 1, end_line: int | None = None) -> Object:
        lines = self._at(path).read_text().splitlines(keepends=True)[start_line - 1 : end_line]
        return {"success": True, "content": "".join(lines), "lines_read": len(lines)}

    def _write_file(self, path: str, content: str, create_dirs: bool = False, backup: bool = True) -> Object:
        target, saved = self._at(path), self._at(f"{path}.bak")
        result: Object = {"success": True, "bytes_written": len(content.encode())}
        if backup and target.exists():
            saved.write_text(target.read_text())
            result["backup_path"] = f"{path}.bak"
        if create_dirs:
            target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(content)
        return result

    def _list_files(self, path: str, recursive: bool = False, pattern: str = "*") -> Object:
        found = self._at(path).rglob("*") if recursive else self._at(path).iterdir()
        items = sorted(
            each.relative_to(self.folder).as_posix() for each in found if fnmatch.fnmatch(each.name, pattern)
        )
        return {"success": True, "path": path, "items": items, "total_count": len(items)}

    def _create_directory(self, path: str, recursive: bool = True) -> Object:
        exists = self._at(path).exists()
        self._at(path).mkdir(parents=recursive, exist_ok=True)
        return {"success": True, "path": path, "created": not exists, "already_exists": exists}

    def _search_in_code(self, query: str, file_pattern: str = "*", max_results: int = 100) -> Object:
        matches = [
            {"file": path, "line": number, "text": line}
            for path, content in self.content().items()
            if fnmatch.fnmatch(path, file_pattern)
            for number, line in enumerate(content.splitlines(), start=1)
            if query in line
        ]
        shown = matches[:max_results]
        return {"query": query, "matches": shown, "total_matches": len(matches), "truncated": len(shown) < len(matches)}

    def _execute_command(self, command: str, cwd: str = ".", timeout: int = 60) -> Object:
        search = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        # Bytecode is found by time and size: two versions of a file within one second would look alike.
        environment = {"PATH": search, "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(
            shlex.split(command), cwd=self._at(cwd), env=environment, capture_output=True, text=True, timeout=timeout
        )
        return {"exit_code": done.returncode, "stdout": done.stdout, "stderr": done.stderr}


class Client:
    """What an IDE does: it talks in one session, keeps its place in the stream, and executes what it may."""

    def __init__(self, server: Server, session_id: str, workspace: Workspace) -> None:
        self.server = server
        self.session_id = session_id
        self.workspace = workspace
        self.position = 0

    def send(self, kind: str, **fields: Any) -> list[Frame]:
        return self.noted(self.server.post({"type": kind, **fields}, self.session_id))

    def say(self, content: str) -> list[Frame]:
        return self.send("user_message", content=content)

    def execute(self, asked: Object) -> list[Frame]:
        """Execute a call for real and report what came of it; the frames that come back."""
        result = self.workspace.execute(asked["tool_name"], asked["arguments"])
        return self.send("tool_result", call_id=asked["call_id"], tool_name=asked["tool_name"], result=result)

    def say_and_lose_the_connection(self, content: str, *, after_calls: int) -> list[Object]:
        """Say something, and be gone when so many calls have been read."""
        with self.server.streaming({"type": "user_message", "content": content}, self.session_id) as answer:
            return self._calls_read(answer, after_calls)

    def execute_and_lose_the_connection(self, asked: Object, *, after_calls: int) -> list[Object]:
        """Execute a call and report it, and be gone when so many new calls have been read."""
        result = self.workspace.execute(asked["tool_name"], asked["arguments"])
        message = {"type": "tool_result", "call_id": asked["call_id"], "result": result}
        with self.server.streaming(message, self.session_id) as answer:
            return self._calls_read(answer, after_calls)

    def catch_up(self, kind: str) -> list[Frame]:
        """What the session's stream has behind the last frame that was read, up to the first of a kind."""
        with self.server.following(self.session_id, after=self.position) as stream:
            return self.noted(until(stream, kind))

    def open_calls(self) -> list[Object]:
        return self.server.http.get(f"/sessions/{self.session_id}/open-calls").json()["open_calls"]

    def pending_approvals(self) -> list[Object]:
        return self.server.http.get(f"/sessions/{self.session_id}/pending-approvals").json()["pending_approvals"]

    def _calls_read(self, answer: Any, count: int) -> list[Object]:
        seen: list[Frame] = []
        while len(calls_in(seen)) < count:
            seen += until(answer, "tool_call")
        return calls_in(self.noted(seen))

    def noted(self, frames: list[Frame]) -> list[Frame]:
        """The same frames; the last of them is where this client now is."""
        self.position = max([self.position, *(frame.id for frame in frames if frame.id is not None)])
        return frames


def calls_in(frames: list[Frame]) -> list[Object]:
    return [frame.data for frame in frames if frame.type == "tool_call"]


def kinds(frames: list[Frame]) -> list[str]:
    """The whole chunks of the contract, in short."""
    return [frame.type for frame in frames if frame.event == "message"]


def rows(server: Server, query: str, *parameters: str) -> list[tuple[Any, ...]]:
    return databases.rows(server.database, query, *parameters)


@pytest.fixture
def server(tmp_path: Path, llm: ScriptedLLM, migrated: Path) -> Iterator[Server]:
    """A server that sends no heartbeat which would keep a client waiting for a turn that is stuck."""
    with running(tmp_path, migrated, LLM_BASE_URL=llm.url, TURN_LEASE_SECONDS="2") as started:
        yield started


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / "project", PROJECT)


def test_a_bug_is_found_planned_and_fixed_while_everything_goes_wrong(
    server: Server, llm: ScriptedLLM, workspace: Workspace
) -> None:
    session_id = server.http.post("/sessions").json()["id"]
    ide = Client(server, session_id, workspace)
    operator = httpx.Client(base_url=server.url, headers=AUTH, timeout=30, limits=BRIEF)

    def decide(call_id: str, **decision: Any) -> httpx.Response:
        return operator.post(f"/approvals/{call_id}/decision", json=decision)

    # Routed to the debugger, who asks for two things at once; one of them waits for a person.
    llm.route_to = "debug"
    run_check = {"command": "python check_cart.py", "timeout": 30}
    llm.script(
        calls(
            call("list_files", {"path": ".", "recursive": True}),
            call("execute_command", run_check),
            text="I will look at the project and run its check.",
        )
    )
    answer = ide.say("The cart's total is wrong. Find out why, plan a fix, and make it.")
    assert kinds(answer) == ["agent_switched", "assistant_message", "tool_call", "tool_call"]
    assert answer[1].data["to_agent"] == "debug"
    listing, check = calls_in(answer)
    assert (listing["requires_approval"], check["requires_approval"]) == (False, True)
    assert [waiting["call_id"] for waiting in ide.pending_approvals()] == [check["call_id"]]

    # The one that does not wait is executed at once; the model is not asked with a call open.
    assert [frame.event for frame in ide.execute(listing)] == ["done"]
    approved = ide.send("hitl_decision", call_id=check["call_id"], decision="approve")
    assert [frame.type for frame in approved[:-1]] == ["approval_resolved"]
    assert len(llm.answers) == 1

    # The check really fails. The results of two more calls come back in the other order.
    llm.script(
        calls(
            call("read_file", {"path": "shop/cart.py"}),
            call("search_in_code", {"query": "def ", "file_pattern": "*.py"}),
        )
    )
    reading, searching = calls_in(ide.execute(check))
    assert ide.execute(searching)[0].event == "done"
    assert len(llm.answers) == 2

    # The debugger hands over to the architect, who may not write code, and whose two documents wait for a person.
    # The client's connection breaks as soon as it has read of them.
    plan: Object = {"path": "docs/plan.md", "content": "# Plan\n\nRewrite the shop.\n", "create_dirs": True}
    diary: Object = {"path": "docs/diary.md", "content": "Dear diary\n", "create_dirs": True}
    llm.script(
        call("switch_mode", {"mode": "architect", "reason": "a plan is needed"}, text="The quantity gets lost."),
        call("write_file", {"path": "shop/cart.py", "content": "# TODO\n"}),
        calls(call("write_file", plan), call("write_file", diary)),
    )
    planned, written_down = ide.execute_and_lose_the_connection(reading, after_calls=2)
    assert len(llm.answers) == 5

    # While it is away an operator edits one and rejects the other.
    shown = {
        waiting["call_id"]: waiting
        for waiting in operator.get(f"/approvals?session_id={session_id}").json()["approvals"]
    }
    assert {call_id: waiting["arguments"] for call_id, waiting in shown.items()} == {
        planned["call_id"]: plan,
        written_down["call_id"]: diary,
    }
    shorter: Object = {**plan, "content": "# Plan\n\nMultiply by the quantity.\n"}
    edited = decide(planned["call_id"], decision="edit", modified_arguments=shorter)
    assert (edited.status_code, edited.json()["status"]) == (200, "edited")
    rejected = decide(written_down["call_id"], decision="reject", feedback="One document is enough.")
    assert (rejected.status_code, rejected.json()["status"]) == (200, "rejected")

    # Back again, it finds out what to execute, and sees what it missed.
    (to_do,) = ide.open_calls()
    assert (to_do["call_id"], to_do["state"], to_do["arguments"]) == (planned["call_id"], "released", shorter)
    missed = [*ide.catch_up("approval_resolved"), *ide.catch_up("approval_resolved")]
    resolved = [frame.data for frame in missed if frame.type == "approval_resolved"]
    assert [(one["call_id"], one["metadata"]["decision"]) for one in resolved] == [
        (planned["call_id"], "edit"),
        (written_down["call_id"], "reject"),
    ]
    assert resolved[0]["metadata"]["arguments"] == shorter
    assert resolved[0]["metadata"]["args_hash"] == to_do["args_hash"] != shown[planned["call_id"]]["args_hash"]
    assert resolved[1]["metadata"]["feedback"] == "One document is enough."

    # The architect hands over to the coder. The server is killed while an approval and a released call are open.
    fix = {"path": "shop/cart.py", "content": FIXED_CART}
    llm.script(
        call("switch_mode", {"mode": "coder", "reason": "the plan is written"}),
        calls(call("write_file", fix), call("read_file", {"path": "check_cart.py"}), text="I will fix the total."),
    )
    answer = ide.execute(to_do)
    assert kinds(answer) == ["agent_switched", "assistant_message", "tool_call", "tool_call"]
    fixing, rereading = calls_in(answer)
    before = ide.open_calls(), ide.pending_approvals()
    server.kill()
    server.start()
    assert (ide.open_calls(), ide.pending_approvals()) == before
    assert [(one["call_id"], one["state"]) for one in ide.open_calls()] == [
        (fixing["call_id"], "waiting"),
        (rereading["call_id"], "released"),
    ]

    # The IDE's own user approves in its dialog: the result alone says so. The check passes now.
    assert ide.execute(rereading)[0].event == "done"
    llm.script(call("execute_command", run_check))
    (check_again,) = calls_in(ide.execute(fixing))
    assert decide(check_again["call_id"], decision="approve").status_code == 200
    assert ide.catch_up("approval_resolved")[-1].data["call_id"] == check_again["call_id"]
    llm.script(say("The cart adds up again."))
    finished = ide.execute(check_again)
    assert kinds(finished) == ["assistant_message"]
    assert finished[-2].data["status"] == "completed"

    # The user does not wait for an approval: another message supersedes it. What comes late counts for nothing.
    llm.script(call("create_directory", {"path": "releases"}))
    (directory,) = calls_in(ide.say("Now prepare a release."))
    gate = Gate()
    llm.script(gated(call("list_files", {"path": "docs"}, text="Let me see."), gate))
    with server.streaming(
        {"type": "user_message", "content": "Leave it. What documents are there?"}, session_id
    ) as stream:
        until(stream, "turn_started")
        gate.reached.wait()
        late = decide(directory["call_id"], decision="approve")
        assert (late.status_code, late.json()["code"], late.json()["decision"]) == (
            409,
            "already_decided",
            "superseded",
        )
        ignored = ide.send("tool_result", call_id=directory["call_id"], result={"success": True})
        assert [frame.event for frame in ignored] == ["done"]
        gate.open()
        (documents,) = calls_in(ide.noted(list(stream)))
    llm.script(say("There is one: docs/plan.md."))
    assert kinds(ide.execute(documents)) == ["assistant_message"]

    # The files: what was approved is there, as it was edited; what was rejected, refused or superseded is not.
    assert workspace.content() == {
        **PROJECT,
        "docs/plan.md": shorter["content"],
        "shop/cart.py": FIXED_CART,
        "shop/cart.py.bak": CART,
    }
    assert not (workspace.folder / "releases").exists()

    # The model: asked once per step, never with a call open, and it read what the commands really said.
    assert llm.refused == []
    assert llm.unplayed == 0
    assert (len(llm.routings), len(llm.answers)) == (1, 12)
    spoke = [re.findall(r"You are the (\w+)", request["messages"][0]["content"])[0] for request in llm.answers]
    assert spoke == ["debug"] * 3 + ["architect"] * 3 + ["coder"] * 6
    read = {one["tool_call_id"]: one["content"] for one in llm.answers[-1]["messages"] if one["role"] == "tool"}
    assert json.loads(read[check["call_id"]]) == {
        "exit_code": 1,
        "stdout": "",
        "stderr": "3 apples and a pear cost 340 cents, not 180\n",
    }
    assert json.loads(read[check_again["call_id"]]) == {"exit_code": 0, "stdout": "the cart adds up\n", "stderr": ""}
    assert json.loads(read[documents["call_id"]])["items"] == ["docs/plan.md"]
    assert json.loads(read[reading["call_id"]])["content"] == CART
    assert len(json.loads(read[searching["call_id"]])["matches"]) == 4
    told = json.loads(read[planned["call_id"]])
    assert (told["status"], told["tool_name"], told["arguments"]) == ("approved_with_edits", "write_file", shorter)
    assert json.loads(told["result"]) == {"success": True, "bytes_written": len(shorter["content"])}
    assert json.loads(read[written_down["call_id"]]) == {
        "status": "rejected",
        "tool_name": "write_file",
        "feedback": "One document is enough.",
    }
    assert "superseded" in read[directory["call_id"]]

    # History: every call is answered once.
    history = server.http.get(f"/sessions/{session_id}/history").json()
    roles = [
        (one["role"], [each["function"]["name"] for each in one.get("tool_calls", [])]) for one in history["messages"]
    ]
    assert roles == [
        ("user", []),
        ("assistant", ["list_files", "execute_command"]),
        ("tool", []),
        ("tool", []),
        ("assistant", ["read_file", "search_in_code"]),
        ("tool", []),
        ("tool", []),
        ("assistant", ["switch_mode"]),
        ("tool", []),
        ("assistant", ["write_file"]),
        ("tool", []),
        ("assistant", ["write_file", "write_file"]),
        ("tool", []),
        ("tool", []),
        ("assistant", ["switch_mode"]),
        ("tool", []),
        ("assistant", ["write_file", "read_file"]),
        ("tool", []),
        ("tool", []),
        ("assistant", ["execute_command"]),
        ("tool", []),
        ("assistant", []),
        ("user", []),
        ("assistant", ["create_directory"]),
        ("tool", []),
        ("user", []),
        ("assistant", ["list_files"]),
        ("tool", []),
        ("assistant", []),
    ]
    made = [each["id"] for one in history["messages"] for each in one.get("tool_calls", [])]
    answered = [one["tool_call_id"] for one in history["messages"] if one["role"] == "tool"]
    assert len(set(made)) == len(made) == 14
    assert sorted(made) == sorted(answered)
    in_two_rounds = answered[2:4], answered[6:8]
    assert in_two_rounds == (
        [searching["call_id"], reading["call_id"]],
        [written_down["call_id"], planned["call_id"]],
    ), "results stand in the order of their arrival"
    forbidden = next(one for one in history["messages"] if one["content"].startswith("Error: "))
    assert forbidden["name"] == "write_file"
    assert "shop/cart.py" in forbidden["content"]
    assert history["message_count"] == len(history["messages"]) == 29
    assert [(past["from"], past["to"]) for past in history["agent_history"]] == [
        ("orchestrator", "debug"),
        ("debug", "architect"),
        ("architect", "coder"),
    ]
    assert server.http.get(f"/sessions/{session_id}").json()["message_count"] == 29

    # Nothing is open, and every turn has ended.
    assert (ide.open_calls(), ide.pending_approvals()) == ([], [])
    everywhere = server.http.get("/approvals").json()
    assert (everywhere["approvals"], everywhere["total"]) == ([], 0)
    turns = rows(
        server, "SELECT status, code FROM sessions_app_turn WHERE session_id = ? ORDER BY position", session_id
    )
    assert turns == [("completed", ""), ("cancelled", "superseded"), ("completed", "")]

    # Who decided what, on which arguments.
    decided = [
        (check, "approve"),
        (planned, "edit"),
        (written_down, "reject"),
        (fixing, "approve"),
        (check_again, "approve"),
        (directory, "superseded"),
    ]
    *entries, late_result = rows(
        server,
        "SELECT actor, channel, action, outcome, target, reason, details FROM events_app_auditentry"
        " WHERE session_id = ? ORDER BY id",
        session_id,
    )
    assert [entry[:5] for entry in entries] == [
        ("internal", "api", f"approval.{verdict}", "done", one["call_id"]) for one, verdict in decided
    ]
    assert late_result[2:5] == ("call.late_result", "done", directory["call_id"])
    assert [entry[5] for entry in entries] == ["", "", "One document is enough.", "", "", ""]
    hashes = [
        (details["args_hash_before"], details["args_hash_after"])
        for details in (json.loads(entry[6]) for entry in entries)
    ]
    assert all(re.fullmatch("[0-9a-f]{64}", one) for pair in hashes for one in pair)
    assert [before == after for before, after in hashes] == [True, False, True, True, True, True]
    assert hashes[1] == (shown[planned["call_id"]]["args_hash"], to_do["args_hash"])
    assert len({before for before, _ in hashes}) == 6

    # The figures.
    metrics = server.http.get("/events/metrics").json()
    counted = metrics["metrics"]

    def executed(requested: int, completed: int, failed: int = 0, requires_approval: int = 0) -> dict[str, int]:
        return {
            "requested": requested,
            "completed": completed,
            "failed": failed,
            "requires_approval": requires_approval,
        }

    assert counted["tool_executions"] == {
        "list_files": executed(2, 2),
        "execute_command": executed(2, 2, requires_approval=2),
        "read_file": executed(2, 2),
        "search_in_code": executed(1, 1),
        "switch_mode": executed(2, 2),
        "write_file": executed(4, 2, failed=1, requires_approval=3),
        "create_directory": executed(1, 0, requires_approval=1),
    }
    assert counted["hitl_decisions"] == {
        "execute_command": {"APPROVE": 2, "EDIT": 0, "REJECT": 0},
        "write_file": {"APPROVE": 1, "EDIT": 1, "REJECT": 1},
    }
    assert counted["agent_switches"] == {"orchestrator_to_debug": 1, "debug_to_architect": 1, "architect_to_coder": 1}
    assert counted["errors"] == {}
    assert metrics["computed"]["write_file_success_rate"] == 0.667
    audit_log = server.http.get(f"/events/audit-log?session_id={session_id}").json()["audit_log"]
    assert [entry["event_type"].removesuffix("_made") for entry in audit_log] == [
        "agent_switched",
        "tool_approval_required",
        "hitl_decision",
        "agent_switched",
        "tool_execution_failed",
        "tool_approval_required",
        "tool_approval_required",
        "hitl_decision",
        "hitl_decision",
        "agent_switched",
        "tool_approval_required",
        "hitl_decision",
        "tool_approval_required",
        "hitl_decision",
        "tool_approval_required",
        "hitl_decision",
    ]
    by_people = [entry for entry in audit_log if entry["event_type"] == "hitl_decision_made"]
    assert [(entry["call_id"], entry["decision"]) for entry in by_people] == [
        (one["call_id"], verdict) for one, verdict in decided
    ]
    assert (by_people[1]["original_args"], by_people[1]["modified_args"]) == (plan, shorter)
    figures = server.http.get(f"/events/metrics/session/{session_id}").json()
    assert (figures["total_requests"], figures["failed_requests"], figures["requests_with_tools"]) == (12, 0, 10)

    # The whole stream once more, from the beginning: each call told once, each approval resolved once.
    with server.following(session_id) as stream:
        frames: list[Frame] = []
        while sum(frame.type == "turn_finished" for frame in frames) < 3:
            frames += until(stream, "turn_finished")
    numbers = [frame.seq for frame in frames]
    assert numbers == sorted(set(numbers))
    told_of = [one["call_id"] for one in calls_in(frames)]
    assert len(told_of) == len(set(told_of)) == 11, "neither the two handovers nor the forbidden call"
    resolutions = [
        (frame.data["call_id"], frame.data["metadata"]["decision"])
        for frame in frames
        if frame.type == "approval_resolved"
    ]
    assert resolutions == [(one["call_id"], verdict) for one, verdict in decided]
    assert server.log.read_text().count("Traceback") == 0
    operator.close()

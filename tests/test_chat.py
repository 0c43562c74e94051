"""`manage.py chat` as its user meets it: a real process, a real server, an operator who decides over REST."""

import json
import os
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from messages_app.terminal.client import Failure
from messages_app.terminal.client import chat as converse
from tests import databases
from tests.scripted_llm import Gate, Reply, ScriptedLLM, call, drop, hold, say
from tests.server import Server, eventually, free_port, running
from tests.terminal import Chat, Proxy

QUEUE = "/admin/agents_app/pendingapproval/"
WRITE = {"path": "notes.md", "content": "one\ntwo\n", "backup": False}
HOSTILE = "\x1b[2J\x1b]0;owned\x07\x9b1m\u202egnp.exe\r\u200b\u2028end"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "project"
    made.mkdir()
    (made / "README.md").write_text("# Cats\n\nThey purr.\n")
    return made


@pytest.fixture
def chat(shared_server: Server, played: ScriptedLLM, folder: Path) -> Iterator[Chat]:
    with Chat(shared_server, folder) as started:
        started.expect("/help tells more.")
        yield started


def runs(command: str, *, by_shell: bool = False, **more: Any) -> Reply:
    return call("execute_command", {"command": command, "shell": by_shell, **more})


def waiting(server: Server, chat: Chat) -> dict[str, Any]:
    """The call that waits for an operator, once it does."""
    found = eventually(
        lambda: server.http.get("/approvals", params={"session_id": chat.session_id}).json()["approvals"]
    )
    assert len(found) == 1
    return dict(found[0])


def decide(server: Server, chat: Chat, decision: str, **more: Any) -> dict[str, Any]:
    """What an operator does."""
    asked = waiting(server, chat)
    body = {"decision": decision, "args_hash": asked["args_hash"], **more}
    answer = server.http.post(f"/approvals/{asked['call_id']}/decision", json=body)
    assert answer.status_code == 200, answer.text
    return asked


def results(llm: ScriptedLLM) -> list[str]:
    """What the model was told of its calls, in the last request."""
    return [message["content"] for message in llm.answers[-1]["messages"] if message["role"] == "tool"]


def is_at(process_id: int) -> bool:
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    return True


# --- a conversation ---


def test_a_newcomer_sees_everything_in_one_message(tmp_path: Path, migrated: Path, folder: Path) -> None:
    with running(tmp_path, migrated) as server, Chat(server, folder) as chat:
        chat.say("Read README.md and write a summary to notes.md")
        chat.expect("orchestrator → coder: ")
        chat.expect("coder asks for read_file  path=README.md\n  → 3 of 3 lines\n")
        chat.expect("coder asks for write_file  path=notes.md\n    | content:\n    | # Summary of README.md\n")
        chat.expect(f"It waits for an operator: {server.url}{QUEUE}\n")
        assert not (folder / "notes.md").exists()

        decide(server, chat, "approve")

        chat.expect("write_file was approved by internal.\n")
        chat.expect("bytes are in notes.md\n")
        chat.expect("│ The demo model again")
        chat.expect(" tokens)\n")
        assert "They purr." in (folder / "notes.md").read_text()
        assert chat.leave() == 0
        assert f"--session {chat.session_id} goes on with it." in chat.seen


def test_an_answer_is_shown_token_by_token(chat: Chat, played: ScriptedLLM) -> None:
    gate = Gate()
    played.script(hold("Half a ", "sentence.\nAnd one.", gate=gate))
    chat.say("Go")

    chat.expect("coder\n│ Half a ")
    gate.open()

    chat.expect("sentence.\n│ And one.\n(")
    assert "\x1b" not in chat.seen and chat.leave() == 0


def test_an_edit_is_shown_and_what_was_decided_is_what_runs(
    chat: Chat, shared_server: Server, played: ScriptedLLM, folder: Path
) -> None:
    played.script(call("write_file", WRITE), say("Fine."))
    chat.say("Write it")
    chat.expect("waits for an operator")

    edited = {**WRITE, "path": "short.md", "content": "one\nthree\n"}
    decide(shared_server, chat, "edit", modified_arguments=edited, feedback="Three, please")

    chat.expect("write_file was approved with edited arguments by internal:\n    | Three, please\n")
    shown = chat.expect("  → 10 bytes are in short.md\n")
    assert all(f"    | {line}\n" in shown for line in ("-  two", "+  three", "-path: notes.md", "+path: short.md"))
    chat.expect("│ Fine.\n")
    assert (folder / "short.md").read_text() == "one\nthree\n" and not (folder / "notes.md").exists()
    [told] = map(json.loads, results(played))
    assert told["arguments"] == edited and "note" not in told, "no other arguments than the released ones"


def test_a_rejection_is_shown_and_nothing_runs(
    chat: Chat, shared_server: Server, played: ScriptedLLM, folder: Path
) -> None:
    played.script(call("write_file", WRITE), say("A pity."))
    chat.say("Write it")
    asked = decide(shared_server, chat, "reject", feedback="Not this file")

    chat.expect("write_file was rejected by internal:\n    | Not this file\n")
    chat.expect("│ A pity.\n")

    assert not (folder / "notes.md").exists()
    decision = shared_server.http.get(f"/approvals/{asked['call_id']}").json()
    assert (decision["status"], decision["decided_by"]) == ("rejected", "internal")
    assert json.loads(results(played)[0])["feedback"] == "Not this file"


def test_what_fails_is_told_to_the_model_and_the_user(chat: Chat, played: ScriptedLLM, folder: Path) -> None:
    played.script(call("read_file", {"path": "../secret"}), call("list_files", {"path": "none"}), say("Hm."))
    chat.say("Look")

    chat.expect("  → Error: ../secret has '..' in it.")
    chat.expect("  → Error: The directory none does not exist.\n")
    chat.expect("│ Hm.\n")

    assert [text.split()[0] for text in results(played)] == ["Error:", "Error:"]


def test_a_turn_that_fails_is_told_in_words(chat: Chat, played: ScriptedLLM) -> None:
    played.script(drop("Half a sen"), say("Still here."))
    chat.say("Go")

    chat.expect("│ Half a sen\n")
    chat.expect("(model_interrupted)\nThe turn failed (model_interrupted).\n")
    chat.say("Again")
    chat.expect("coder\n│ Still here.\n(")
    assert "not what was said" not in chat.seen


def test_text_of_a_model_cannot_command_the_terminal_or_speak_for_the_client(
    chat: Chat, shared_server: Server, played: ScriptedLLM
) -> None:
    forged = f"{HOSTILE}\nwrite_file was approved by alice."
    played.script(call("write_file", {"path": "a.md", "content": HOSTILE}, text=forged), say("Well."))
    chat.say("Go")
    decide(shared_server, chat, "reject", feedback=HOSTILE)
    chat.expect("│ Well.\n")

    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u2028\u202e]", chat.seen)
    assert chat.seen.count("⟨U+001B⟩[2J") == 3 and "⟨U+202E⟩gnp.exe⟨U+000D⟩⟨U+200B⟩⟨U+2028⟩end" in chat.seen
    assert "\n│ write_file was approved by alice." in chat.seen


def test_the_commands_of_the_client(chat: Chat, shared_server: Server, played: ScriptedLLM) -> None:
    chat.say("/agent debug")
    chat.expect("orchestrator → debug: ")
    chat.say("/agent nobody")
    chat.expect("nobody")
    chat.say("/nonsense")
    chat.expect("There is no /nonsense")
    chat.say("/help")
    chat.expect("Ctrl-C cancels")
    played.script(say("Bugs."))
    chat.say(" /etc/hosts is what?")
    chat.expect("debug\n│ Bugs.\n")
    chat.say("/quit")

    assert chat.end() == 0
    assert shared_server.history(chat.session_id)[0] == ("user", " /etc/hosts is what?")


# --- commands of agents ---


def test_a_command_runs_only_when_the_user_says_yes(
    chat: Chat, shared_server: Server, played: ScriptedLLM, folder: Path
) -> None:
    (folder / "src").mkdir()
    for answer in ("y", "YES", "n", "", "yep", "no y"):
        played.script(runs("touch 'it ran'", cwd="src", timeout=5), say("Done."))
        chat.say("Run it")
        decide(shared_server, chat, "approve")
        shown = chat.expect("Run it? [y/N]")
        assert f"To be run in {folder}/src, without a shell, for at most 5 seconds:\n    | touch 'it ran'\n" in shown
        assert not (folder / "src/it ran").exists()
        chat.say(answer)
        chat.expect("│ Done.\n")

        said_yes = answer in ("y", "YES")
        assert (folder / "src/it ran").exists() == said_yes
        assert results(played)[-1].startswith('{"exit_code": 0' if said_yes else "Error: User rejected")
        (folder / "src/it ran").unlink(missing_ok=True)

    played.script(runs("touch 'it ran'", cwd="src"), say("Done."))
    chat.say("Run it")
    decide(shared_server, chat, "approve")
    chat.expect("Run it? [y/N]")
    assert chat.leave() == 0
    assert not (folder / "src/it ran").exists() and results(played)[-1].startswith("Error: User rejected")


def test_a_command_is_shown_whole_and_as_it_is(
    chat: Chat, shared_server: Server, played: ScriptedLLM, folder: Path
) -> None:
    lines = "\n".join(f"touch {number}" for number in range(100))
    played.script(runs(f"ls {HOSTILE}\n{lines}\nrm -rf x", by_shell=True), say("Done."))
    chat.say("Run it")
    decide(shared_server, chat, "approve")

    shown = chat.expect("[y/N]").split("To be run in")[1]

    assert "by a shell" in shown and "ls ⟨U+001B⟩[2J" in shown and "⟨U+202E⟩" in shown
    assert all(f"    | touch {number}\n" in shown for number in range(100)) and "    | rm -rf x\n" in shown
    chat.say("n")
    chat.expect("│ Done.\n")
    assert sorted(path.name for path in folder.iterdir()) == ["README.md"]


def test_a_command_that_may_not_run_is_not_even_asked_about(
    chat: Chat, shared_server: Server, played: ScriptedLLM, folder: Path
) -> None:
    for more in ({"cwd": ".."}, {"cwd": "/"}, {"cwd": "none"}, {"env": {"A": "b"}}):
        played.script(call("execute_command", {"command": "touch ran", **more}), say("Done."))
        chat.say("Run it")
        decide(shared_server, chat, "approve")

        assert "[y/N]" not in chat.expect("│ Done.\n")
        assert results(played)[-1].startswith("Error: ")


# --- on a terminal ---


@pytest.fixture
def terminal(shared_server: Server, played: ScriptedLLM, folder: Path) -> Iterator[Chat]:
    with Chat(shared_server, folder, on_terminal=True) as started:
        started.expect("> ")
        yield started


def test_ctrl_c_cancels_a_turn_that_waits_and_ctrl_d_leaves(
    terminal: Chat, shared_server: Server, played: ScriptedLLM, folder: Path
) -> None:
    played.script(call("write_file", WRITE), say("Another."))
    terminal.say("Write it")
    asked = waiting(shared_server, terminal)
    terminal.expect("It waits for an operator")

    terminal.press(b"\x03")

    terminal.expect("The turn was cancelled")
    terminal.expect("> ")
    assert shared_server.http.get(f"/approvals/{asked['call_id']}").json()["status"] == "cancelled"
    terminal.press(b"\x03")
    terminal.expect("Ctrl-D leaves.")
    terminal.say("Something else")
    terminal.expect("Another.")
    terminal.expect("> ")
    assert terminal.leave() == 0 and "Traceback" not in terminal.seen


def test_ctrl_c_stops_an_answer_and_a_command(
    terminal: Chat, shared_server: Server, played: ScriptedLLM, folder: Path
) -> None:
    gate = Gate()
    played.script(hold("Half a ", "sentence.", gate=gate))
    terminal.say("Go")
    terminal.expect("Half a ")
    terminal.press(b"\x03")
    terminal.expect("The turn was cancelled")
    gate.open()

    played.script(runs("echo $$ > pid; sleep 60", by_shell=True))
    terminal.say("Run it")
    decide(shared_server, terminal, "approve")
    terminal.expect("[y/N]")
    terminal.say("y")
    group = int(eventually(lambda: (folder / "pid").exists() and (folder / "pid").read_text()))
    terminal.press(b"\x03")
    terminal.expect("The turn was cancelled")
    terminal.expect("> ")

    assert not is_at(group)
    assert shared_server.http.get(f"/sessions/{terminal.session_id}/open-calls").json()["count"] == 0


def test_what_was_typed_before_a_question_is_no_answer_to_it(
    terminal: Chat, shared_server: Server, played: ScriptedLLM, folder: Path
) -> None:
    played.script(runs("touch ran"), say("Done."))
    terminal.say("Run it")
    terminal.expect("waits for an operator")
    terminal.say("y")
    decide(shared_server, terminal, "approve")
    terminal.expect("[y/N]")
    terminal.say("")
    terminal.expect("User rejected")
    terminal.expect("Done.")

    assert not (folder / "ran").exists()


def test_ctrl_backslash_leaves_a_turn_that_waits(
    terminal: Chat, shared_server: Server, played: ScriptedLLM, folder: Path
) -> None:
    played.script(call("write_file", WRITE), say("Done."))
    terminal.say("Write it")
    asked = waiting(shared_server, terminal)
    terminal.expect("It waits for an operator")

    terminal.press(b"\x1c")

    assert terminal.end() == 131 and "Traceback" not in terminal.seen
    assert shared_server.http.get(f"/approvals/{asked['call_id']}").json()["status"] == "pending"
    with Chat(shared_server, folder, "--session", terminal.session_id) as again:
        again.expect("user:\n    | Write it\n")
        again.expect("coder asks for write_file  path=notes.md")
        again.expect("It waits for an operator")
        decide(shared_server, again, "approve")
        again.expect("  → 8 bytes are in notes.md\n")
        again.expect("│ Done.\n")
        assert (folder / "notes.md").read_text() == WRITE["content"] and again.leave() == 0


def test_colours_are_for_terminals_that_want_them(
    terminal: Chat, shared_server: Server, played: ScriptedLLM, tmp_path: Path
) -> None:
    environment = {"NO_COLOR": "1", "XDG_STATE_HOME": str(tmp_path)}
    (other := tmp_path / "other").mkdir()
    played.script(say("Red."), say("Grey."))
    terminal.say("Go")
    terminal.expect("\x1b[1;36mcoder\x1b[0m")
    terminal.expect("Red.")

    with Chat(shared_server, other, on_terminal=True, environment=environment) as plain:
        plain.expect("> ")
        plain.say("Go")
        assert "\x1b[1" not in plain.expect("Grey.")


# --- what breaks ---


def test_a_server_that_dies_while_a_call_waits(mortal: Server, played: ScriptedLLM, folder: Path) -> None:
    played.script(call("write_file", WRITE), say("Done."))
    with Chat(mortal, folder) as chat:
        chat.say("Write it")
        chat.expect("It waits for an operator")
        mortal.kill()
        chat.expect("[Lost the server: ")
        mortal.start()
        chat.expect("[Connected again.]\n")

        decide(mortal, chat, "approve")

        chat.expect("  → 8 bytes are in notes.md\n")
        chat.expect("│ Done.\n")
        assert chat.seen.count("asks for write_file") == 1 and chat.leave() == 0


def test_a_server_that_dies_in_the_middle_of_an_answer(mortal: Server, played: ScriptedLLM, folder: Path) -> None:
    gate = Gate()
    played.script(hold("Half a ", "never said", gate=gate), say("A whole answer."))
    with Chat(mortal, folder) as chat:
        chat.say("Go")
        chat.expect("│ Half a ")
        mortal.kill()
        chat.expect("[Lost the server: ")
        mortal.start()
        gate.open()

        chat.expect("[The text above is void")
        chat.expect("coder\n│ A whole answer.\n(")
        assert "never said" not in chat.seen
    assert mortal.history(chat.session_id) == [("user", "Go"), ("assistant", "A whole answer.")]


def test_a_result_that_did_not_arrive_is_sent_again_and_nothing_is_executed_twice(
    mortal: Server, played: ScriptedLLM, folder: Path
) -> None:
    played.script(runs("echo once >> log; until [ -e go ]; do sleep 0.05; done", by_shell=True), say("Done."))
    with Chat(mortal, folder) as chat:
        chat.say("Run it")
        decide(mortal, chat, "approve")
        chat.expect("[y/N]")
        chat.say("y")
        eventually((folder / "log").exists)
        mortal.kill()
        (folder / "go").touch()
        chat.expect("  → exit code 0")
        chat.expect("[Lost the server: ")
        mortal.start()

        chat.expect("│ Done.\n")

    assert (folder / "log").read_text() == "once\n"
    assert json.loads(results(played)[0])["exit_code"] == 0


@pytest.mark.parametrize("has_ended", [True, False])
def test_a_client_that_dies_before_its_result_arrived_executes_nothing_twice(
    mortal: Server, played: ScriptedLLM, folder: Path, has_ended: bool
) -> None:
    played.script(runs("echo once >> log; until [ -e go ]; do sleep 0.05; done", by_shell=True), say("Done."))
    with Chat(mortal, folder) as chat:
        chat.say("Run it")
        decide(mortal, chat, "approve")
        chat.expect("[y/N]")
        chat.say("y")
        eventually((folder / "log").exists)
        if has_ended:
            mortal.kill()
            (folder / "go").touch()
            chat.expect("[Lost the server: ")
            chat.kill()
            mortal.start()
        else:
            chat.kill()
            (folder / "go").touch()

        with Chat(mortal, folder, "--session", chat.session_id) as again:
            if not has_ended:
                again.expect("It had begun when this client stopped. Execute it again? [y/N]")
                again.say("n")
            again.expect("│ Done.\n")
            assert has_ended or "Whether it took effect is not known" in again.seen
            assert again.leave() == 0

    assert (folder / "log").read_text() == "once\n"
    assert ('"exit_code": 0' in results(played)[0]) == has_ended


def test_a_command_whose_time_runs_out_while_the_user_thinks_is_not_executed(
    mortal: Server, played: ScriptedLLM, folder: Path
) -> None:
    played.script(runs("echo once >> log", by_shell=True), say("Then not."))
    with Chat(mortal, folder) as chat:
        chat.say("Run it")
        decide(mortal, chat, "approve")
        chat.expect("[y/N]")
        late = "UPDATE sessions_app_toolcall SET deadline_at = released_at WHERE session_id = ?"
        databases.change(mortal.database, late, chat.session_id)
        ended = "SELECT outcome FROM sessions_app_toolcall WHERE session_id = ?"
        eventually(lambda: databases.rows(mortal.database, ended, chat.session_id) == [("timed_out",)])
        chat.say("y")

        chat.expect("(tool_timed_out)")
        chat.expect("│ Then not.\n")
        assert chat.leave() == 0

    assert not (folder / "log").exists()


def test_an_answer_that_is_lost_on_the_way_doubles_nothing(mortal: Server, played: ScriptedLLM, folder: Path) -> None:
    played.script(call("write_file", {**WRITE, "backup": True}), say("Done."))
    with Proxy(mortal) as proxy, Chat(proxy.url, folder) as chat:
        chat.expect("/help tells more.")
        proxy.lose = 1
        chat.say("Write it")
        chat.expect("It waits for an operator")
        assert proxy.lost == 1
        proxy.lose = 2
        decide(mortal, chat, "approve")
        chat.expect("│ Done.\n")

        assert proxy.lost == 3 and chat.seen.count("  → 8 bytes") == 1
        assert [role for role, _ in mortal.history(chat.session_id)] == ["user", "assistant", "tool", "assistant"]
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "notes.md"], "written once, so no copy"


def test_a_message_to_a_server_that_is_down_is_sent_when_it_is_back(
    mortal: Server, played: ScriptedLLM, folder: Path
) -> None:
    played.script(say("Here."))
    with Chat(mortal, folder) as chat:
        chat.expect("\n> ")
        mortal.kill()
        chat.say("Anybody there?")
        chat.expect("[Lost the server: ")
        mortal.start()
        chat.expect("│ Here.\n")

    assert mortal.history(chat.session_id) == [("user", "Anybody there?"), ("assistant", "Here.")]


def told_otherwise(truth: bytes, lie: bytes, data: bytes) -> bytes:
    """What a server says of open calls, with one thing in it changed."""
    return data.replace(truth, lie) if b'"open_calls"' in data else data


def test_nothing_runs_but_what_was_announced(shared_server: Server, played: ScriptedLLM, folder: Path) -> None:
    lies = [
        (b'"content":"one', b'"content":"six'),
        (b'"notes.md"', b'"other.md"'),
        (b'"args_hash":"', b'"args-hash":"'),
    ]
    with Proxy(shared_server) as proxy, Chat(proxy.url, folder) as chat:
        for truth, lie in lies:
            played.script(call("write_file", WRITE), say("Done."))
            chat.say("Write it")
            chat.expect("It waits for an operator")
            proxy.rewrite = partial(told_otherwise, truth, lie)
            decide(shared_server, chat, "approve")
            chat.expect("Error: What the server has open is not what it announced.")
            chat.expect("│ Done.\n")

    assert [path.name for path in folder.iterdir()] == ["README.md"]


def test_a_position_that_is_gone_is_said_and_the_history_read_again(
    mortal: Server, played: ScriptedLLM, folder: Path
) -> None:
    played.script(say("First."), call("write_file", WRITE), say("Done."))
    with Chat(mortal, folder) as chat:
        chat.say("Go")
        chat.expect("First.\n(")
        chat.expect("\n")
        mortal.kill()
        forget_numbers(mortal, chat.session_id)
        mortal.start()
        chat.say("Write it")

        chat.expect("[The stream was lost")
        chat.expect("user:\n    | Write it\n")
        decide(mortal, chat, "approve")
        chat.expect("│ Done.\n")
        assert (folder / "notes.md").exists()


def forget_numbers(server: Server, session_id: str) -> None:
    """As a database that was restored from an older copy does."""
    with databases.changing(server.database) as database:
        database.execute("DELETE FROM events_app_streambatch WHERE session_id = ?", [session_id])
        database.execute("UPDATE sessions_app_session SET next_seq = 1 WHERE id = ?", [session_id])


# --- sessions that are gone on with ---


def test_a_session_goes_on_with_its_last_messages(
    shared_server: Server, played: ScriptedLLM, folder: Path, chat: Chat
) -> None:
    played.script(say("The answer."), say("Another."))
    chat.say("The question")
    chat.expect("The answer.\n(")
    chat.leave()

    with Chat(shared_server, folder, "--session", chat.session_id) as again:
        again.expect("user:\n    | The question\nassistant:\n    | The answer.\n")
        again.say("And more?")
        again.expect("coder\n│ Another.\n(")
        assert again.seen.count("The answer.") == 1


def test_a_running_answer_is_joined_at_its_beginning(
    shared_server: Server, played: ScriptedLLM, folder: Path, chat: Chat
) -> None:
    gate = Gate()
    played.script(hold("Half a ", "sentence.", gate=gate))
    chat.say("Go")
    chat.expect("Half a ")
    chat.kill()

    with Chat(shared_server, folder, "--session", chat.session_id) as again:
        again.expect("user:\n    | Go\n")
        again.expect("coder\n│ Half a ")
        gate.open()
        again.expect("sentence.\n(")


@pytest.mark.parametrize("answer", ["y", "n"])
def test_a_call_of_another_place_is_asked_about(
    shared_server: Server, played: ScriptedLLM, tmp_path: Path, folder: Path, chat: Chat, answer: str
) -> None:
    played.script(call("write_file", WRITE), say("Done."))
    chat.say("Write it")
    waiting(shared_server, chat)
    chat.kill()
    (elsewhere := tmp_path / "elsewhere").mkdir()

    with Chat(shared_server, elsewhere, "--session", chat.session_id) as again:
        decide(shared_server, again, "approve")
        again.expect(f"It was asked for elsewhere. Execute it here, in {elsewhere}? [y/N]")
        assert not (elsewhere / "notes.md").exists()
        again.say(answer)
        again.expect("│ Done.\n")

    assert (elsewhere / "notes.md").exists() == (answer == "y") and not (folder / "notes.md").exists()


def test_two_clients_do_not_work_on_one_session(shared_server: Server, folder: Path, chat: Chat) -> None:
    with Chat(shared_server, folder, "--session", chat.session_id) as second:
        assert second.end() == 1
        assert f"CommandError: Another terminal works on session {chat.session_id}.\n" in second.seen


# --- what is wrong from the beginning ---


@pytest.mark.parametrize(
    ("options", "code", "why"),
    [
        (["--key", "x" * 40], 1, "The server refuses this key"),
        (["--session", "none"], 1, "Session none not found. Without --session a new one begins."),
        (["--server", f"http://127.0.0.1:{free_port()}"], 1, "connection refused. `make run` starts one"),
        (["--workspace", "/none"], 2, "/none cannot be the workspace: No such file or directory."),
    ],
)
def test_what_is_wrong_is_one_line(
    shared_server: Server, folder: Path, options: list[str], code: int, why: str
) -> None:
    with Chat(shared_server, folder, *options) as chat:
        assert chat.end() == code
        assert why in chat.seen and "Traceback" not in chat.seen
        assert sum("CommandError" in line for line in chat.seen.splitlines()) == 1


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"key": ""}, "There is no key"),
        ({"key": "é" * 40}, "The key has characters"),
        ({"key": "x\ny" * 20}, "The key has characters"),
        ({"server": "localhost:8000"}, "--server has to begin with http"),
        ({"directory": "{folder}/README.md"}, "README.md is no directory."),
        ({"directory": "{folder}/.."}, "has the client's own files in it"),
        ({"directory": "a\0b"}, "cannot be the workspace"),
    ],
)
def test_what_cannot_be_right_is_refused_before_anybody_is_asked(
    folder: Path, monkeypatch: pytest.MonkeyPatch, wrong: dict[str, str], why: str
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(folder.parent / "state"))
    asked = {"server": "http://127.0.0.1:1", "key": "k" * 40, "directory": str(folder), **wrong}
    asked["directory"] = asked["directory"].format(folder=folder)

    with pytest.raises(Failure, match=why) as failure:
        converse(**asked, session_id=None, colours=False)

    assert failure.value.exit_code == 2


def test_lines_of_a_file_are_a_conversation(
    shared_server: Server, played: ScriptedLLM, folder: Path, tmp_path: Path
) -> None:
    played.script(say("One."), say("Two."))
    with Chat(shared_server, folder) as chat:
        chat.say("First\n\nSecond")
        assert chat.leave() == 0
        assert re.search(r"> First\n.*│ One\.\n.*> Second\n.*│ Two\.\n", chat.seen, re.DOTALL)

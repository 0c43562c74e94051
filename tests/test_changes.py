"""The feed that tells open admin pages to read again: who may listen, what is said, and that it costs little."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest

from tests.scripted_llm import ScriptedLLM, call, say
from tests.server import BRIEF, TIMEOUT, Server, eventually, running
from tests.staff import AUDITOR, COOKIE, cookie_of

FEED = "/admin/changes/"


@pytest.fixture(scope="module")
def office(tmp_path_factory: pytest.TempPathFactory, shared_llm: ScriptedLLM, migrated: Path) -> Iterator[Server]:
    shared_llm.route_to = "coder"
    with running(tmp_path_factory.mktemp("office"), migrated, LLM_BASE_URL=shared_llm.url) as started:
        outcome = started.manage(
            "shell",
            "-c",
            "from django.contrib.auth.models import User; from tests.staff import log_in;"
            "User.objects.create_user('nobody', is_staff=True); User.objects.create_user('customer');"
            "log_in('nobody'); log_in('customer')",
        )
        assert outcome.returncode == 0, outcome.stderr
        yield started


@contextmanager
def logged_in(server: Server, name: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=TIMEOUT, cookies={COOKIE: cookie_of(name)}, limits=BRIEF) as client:
        yield client


@contextmanager
def listening(client: httpx.Client, *channels: str) -> Iterator[Iterator[str]]:
    """The names of what is said on these channels, once the stream is open."""
    with client.stream("GET", FEED, params=[("channel", channel) for channel in channels]) as answer:
        assert answer.status_code == 200, answer.read()
        names = told(answer)
        assert next(names) == "stream-open"
        yield names


def told(answer: httpx.Response) -> Iterator[str]:
    for line in answer.iter_lines():
        # Said after 20 s without anything else: whoever still waits then waits in vain.
        assert line != "event: keep-alive"
        if line.startswith("event: "):
            yield line.removeprefix("event: ")


def ask(server: Server, llm: ScriptedLLM, session_id: str) -> str:
    llm.script(call("write_file", {"path": "a.md", "content": "x"}))
    frames = server.say(session_id, "please", agent_type="coder")
    return next(str(frame.data["call_id"]) for frame in frames if frame.type == "tool_call")


def test_only_those_who_may_see_it_may_listen(office: Server) -> None:
    with httpx.Client(base_url=office.url, limits=BRIEF) as stranger:
        for channel in ("approvals", "session-s"):
            assert stranger.get(FEED, params={"channel": channel}).status_code == 403
    for name, expected in (("olga", 200), (AUDITOR, 200), ("admin", 200), ("nobody", 403), ("customer", 403)):
        with logged_in(office, name) as client:
            for channel in ("approvals", "session-s"):
                with client.stream("GET", FEED, params={"channel": channel}) as answer:
                    assert answer.status_code == expected, (name, channel)


@pytest.mark.parametrize(
    ("query", "status"),
    [
        ("", 400),
        ("channel=", 403),
        ("channel=everything", 403),
        ("channel=Approvals", 403),
        ("channel=session-", 403),
        ("channel=session-a/b", 403),
        ("channel=session-%00", 403),
        ("channel=" + "x" * 10_000, 403),
        ("channel=approvals&channel=session-a&channel=session-b", 400),
        ("channel=approvals&channel=session-a%0a", 403),
        ("channel=approvals&es-meta=garbage", 400),
        ("channel=approvals&link=next", 400),
        ("channel=approvals&recover=true", 400),
        ("channel=approvals&x=1", 400),
    ],
)
def test_nonsense_is_refused(query: str, status: int, office: Server) -> None:
    with logged_in(office, "olga") as client:
        assert client.get(f"{FEED}?{query}").status_code == status


def test_a_position_is_ignored_because_pages_read_everything_again(office: Server) -> None:
    with logged_in(office, "olga") as client:
        for query, headers in (
            ("&lastEventId=error", {}),
            ("", {"Last-Event-ID": "error"}),
            ("", {"Last-Event-ID": "x"}),
        ):
            with client.stream("GET", f"{FEED}?channel=approvals{query}", headers=headers) as answer:
                assert answer.status_code == 200
                assert "stream-open" in next(line for line in answer.iter_lines() if line.startswith("event"))


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
def test_there_is_nothing_to_send(method: str, office: Server) -> None:
    with logged_in(office, "olga") as client:
        assert client.request(method, f"{FEED}?channel=approvals").status_code in (403, 405)


def test_pages_hear_of_requests_and_decisions_and_of_their_session_alone(office: Server, played: ScriptedLLM) -> None:
    with (
        logged_in(office, "olga") as client,
        logged_in(office, AUDITOR) as auditor,
        listening(client, "approvals") as queue,
        listening(auditor, "session-mine") as page,
        listening(client, "session-quiet") as quiet,
    ):
        ask(office, played, "other")
        assert next(queue) == "changed"
        call_id = ask(office, played, "mine")
        assert next(queue) == next(page) == "changed"
        office.http.post(f"/approvals/{call_id}/decision", json={"decision": "approve"})
        assert next(queue) == next(page) == "changed"
        played.script(say("done"))
        office.post({"type": "tool_result", "call_id": call_id, "result": "ok"}, "mine")
        assert next(page) == "changed"
        ask(office, played, "quiet")
        assert next(quiet) == next(queue) == "changed"


def test_pages_hear_of_what_another_process_did(office: Server, played: ScriptedLLM) -> None:
    with logged_in(office, "olga") as client, listening(client, "approvals") as queue:
        call_id = ask(office, played, "elsewhere")
        assert next(queue) == "changed"
        approve = f"from tests.factories import *; approvals.decide_by_id(CALLER, {call_id!r}, Choice(Verdict.APPROVE))"
        outcome = office.manage(
            "shell",
            "-c",
            "from agents_app import approvals\nfrom agents_app.approvals import Choice, Verdict\n" + approve,
        )
        assert outcome.returncode == 0, outcome.stderr
        assert next(queue) == "changed"


def test_who_loses_the_right_stops_hearing(office: Server) -> None:
    with logged_in(office, "omar") as client, listening(client, "approvals") as queue:
        outcome = office.manage(
            "shell",
            "-c",
            "from django.contrib.auth.models import User; User.objects.get(username='omar').groups.clear()",
        )
        assert outcome.returncode == 0, outcome.stderr
        # What another test did may still be told; then the stream ends.
        assert set(queue) - {"changed"} == {"stream-error"}


def test_open_pages_hold_no_threads(office: Server, played: ScriptedLLM) -> None:
    assert office.process is not None
    tasks = Path(f"/proc/{office.process.pid}/task")
    with logged_in(office, "olga") as client, ExitStack() as stack:
        stack.enter_context(listening(client, "approvals"))
        eventually(lambda: len(list(tasks.iterdir())))
        before = len(list(tasks.iterdir()))
        opened = [stack.enter_context(listening(client, "session-threads")) for _ in range(40)]
        ask(office, played, "threads")
        assert [next(names) for names in opened] == ["changed"] * 40

        eventually(lambda: len(list(tasks.iterdir())) <= before + 4)

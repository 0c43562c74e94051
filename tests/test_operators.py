"""The approval queue and the card: what an operator is shown, who may decide, and what a decision in the admin does."""

import html
import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from django.core import signing
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.urls import reverse
from django.utils import timezone

from agents_app import approvals, effects
from agents_app.admin.card import SALT, seal
from agents_app.approvals import Choice, Verdict
from agents_app.models import ApprovalRequest, ApprovalRule, Decision, Tool
from events_app.display import odd_words, visible
from events_app.models import AuditEntry, StreamBatch
from messages_app import acceptance
from messages_app.inbound import ToolResult
from messages_app.models import Message
from sessions_app import unanswered
from sessions_app.models import Account, Session, ToolCall, Turn
from tests.factories import (
    CALLER,
    OPERATOR,
    block_audit_entries,
    make_answered_turn,
    make_calls,
    make_session,
    make_waiting_call,
    many_waiting,
    wanted,
)
from tests.pages import CONTROLS, INJECTIONS, RAW, TRICKS, Page, logged_in, staff

pytestmark = pytest.mark.django_db
QUEUE = "admin:agents_app_pendingapproval_changelist"


@pytest.fixture(autouse=True)
def quick_passwords(settings: Any) -> None:
    settings.PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]


@pytest.fixture
def olga() -> Client:
    return logged_in(staff("olga", "operators"))


@pytest.fixture
def alan() -> Client:
    return logged_in(staff("alan", "auditors"))


def waiting(
    tool: str = "write_file", arguments: dict[str, Any] | None = None, session_id: str = "s", **how: Any
) -> ApprovalRequest:
    """A request that waits, in a session of its own."""
    session = Session.objects.filter(pk=session_id).first() or make_session(session_id)
    return ApprovalRequest.objects.get(call=make_waiting_call(session, tool, arguments, **how))


def address(approval: ApprovalRequest, page: str = "change") -> str:
    return reverse(f"admin:agents_app_approvalrequest_{page}", args=[approval.pk])


def card(client: Client, approval: ApprovalRequest) -> Page:
    answer = client.get(address(approval))
    assert answer.status_code == 200
    return Page(answer.content.decode())


def seen_by(client: Client, approval: ApprovalRequest) -> str:
    """What the forms of a card carry along: which arguments it showed, to whom and when."""
    fields = [dict(attributes) for tag, attributes in card(client, approval).tags if tag == "input"]
    return next(str(field["value"]) for field in fields if field.get("name") == "seen")


def decide(client: Client, approval: ApprovalRequest, decision: str, **fields: Any) -> Any:
    data = {"decision": decision, "seen": seen_by(client, approval), **fields}
    return client.post(address(approval, "decide"), data)


def edit(client: Client, approval: ApprovalRequest, arguments: Any, **fields: Any) -> Any:
    text = arguments if isinstance(arguments, str) else json.dumps(arguments)
    return decide(client, approval, "edit", arguments=text, **fields)


def text_of(answer: Any) -> str:
    return Page(answer.content.decode()).text


def still_waits(approval: ApprovalRequest) -> bool:
    approval.refresh_from_db()
    call = ToolCall.objects.get(pk=approval.call_id)
    return (
        approval.status == "pending"
        and call.status == "waiting"
        and approval.arguments_text == call.arguments_text
        and not Decision.objects.filter(request=approval).exists()
    )


# --- The queue -------------------------------------------------------------------------------------------------


def test_the_queue_shows_what_waits_in_all_sessions_oldest_first(olga: Client) -> None:
    waiting("write_file", {"path": "src/a.py", "content": "x"}, "one")
    waiting("execute_command", {"command": "rm -rf build"}, "two")
    decided = waiting("create_directory", {"path": "gone"}, "three")
    approvals.decide_by_id(OPERATOR, decided.call_id, Choice(Verdict.APPROVE))

    text = text_of(olga.get(reverse(QUEUE)))

    parts = ["2 waiting", "write_file", "src/a.py", "coder", "File modification", "one", "rm -rf build", "two"]
    places = [text.index(part, text.index("2 waiting")) for part in parts]
    assert places == sorted(places)
    assert "gone" not in text


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ({"tool_name": "write_file"}, {"one"}),
        ({"agent": "debug"}, {"two"}),
        ({"q": "build"}, {"two"}),
        ({"q": "one"}, {"one"}),
        ({"q": "modification"}, {"one"}),
        ({"q": "nothing like it"}, set()),
    ],
)
def test_the_queue_is_filtered_and_searched(asked: dict[str, str], found: set[str], olga: Client) -> None:
    waiting("write_file", {"path": "src/a.py", "content": "x"}, "one")
    waiting("execute_command", {"command": "rm -rf build"}, "two", agent="debug")

    page = Page(olga.get(reverse(QUEUE), asked).content.decode())

    led = {link.split("/")[-3] for link in page.links if "/sessions_app/session/" in link and link.endswith("/change/")}
    assert led == found


def test_a_thousand_waiting_cost_no_more_queries_than_one(olga: Client) -> None:
    first = waiting(session_id="s0")
    olga.get(reverse(QUEUE))
    with CaptureQueriesContext(connection) as one:
        olga.get(reverse(QUEUE))
    many_waiting(first, 999)

    with CaptureQueriesContext(connection) as thousand:
        answer = olga.get(reverse(QUEUE))

    assert "1000 waiting" in text_of(answer)
    assert len(thousand) == len(one) <= 12


# --- Who may -----------------------------------------------------------------------------------------------------


def test_an_operator_decides_without_being_a_superuser(olga: Client) -> None:
    approval = waiting()

    answer = decide(olga, approval, "approve")

    assert (answer.status_code, answer.headers["Location"]) == (302, address(approval))
    made = Decision.objects.get()
    assert (made.verdict, made.decided_by, made.channel) == ("approve", "olga", "admin")
    assert ToolCall.objects.get().status == "released"


def test_an_auditor_looks_and_cannot_decide(alan: Client, olga: Client) -> None:
    approval = waiting()
    seen = seal(approval, alan.session["_auth_user_id"])

    page = card(alan, approval)
    posts = [
        alan.post(address(approval, "decide"), {"decision": "approve", "seen": seen}),
        alan.post(address(approval, "check"), {"arguments": "{}"}),
        alan.post(reverse(QUEUE), {"action": "reject", "_selected_action": str(approval.pk), "confirmed": "yes"}),
    ]

    assert "not decide on it" in page.text and "dialog" not in {tag for tag, _ in page.elements}
    assert [post.status_code for post in posts] == [403, 403, 403]
    assert still_waits(approval)


@pytest.mark.parametrize("page", ["change", "decide", "check"])
def test_without_rights_there_is_no_card(page: str) -> None:
    approval = waiting()
    nobody, customer = logged_in(staff("nobody")), Client()

    for client, expected in ((nobody, 403), (customer, 302)):
        answer = client.post(address(approval, page)) if page != "change" else client.get(address(approval))
        assert answer.status_code == expected
    assert still_waits(approval)


def test_a_right_that_was_taken_away_counts_at_once(olga: Client) -> None:
    approval = waiting()
    seen = seen_by(olga, approval)
    from django.contrib.auth.models import User

    User.objects.get(username="olga").groups.clear()

    assert olga.post(address(approval, "decide"), {"decision": "approve", "seen": seen}).status_code == 403
    assert still_waits(approval)


def test_where_self_approval_is_off_an_operator_decides(olga: Client) -> None:
    approval = waiting(self_approval=False)

    assert decide(olga, approval, "approve").status_code == 302
    approval.refresh_from_db()
    assert approval.status == "approved"


@pytest.mark.parametrize("page", ["decide", "check"])
@pytest.mark.parametrize("method", ["get", "head", "put", "delete", "patch"])
def test_only_a_post_decides(method: str, page: str, olga: Client) -> None:
    approval = waiting()

    answer = getattr(olga, method)(address(approval, page))

    assert answer.status_code == 405
    assert still_waits(approval)


def test_a_decision_needs_the_token_of_a_form_of_ours() -> None:
    approval = waiting()
    user = staff("olga", "operators")
    strict = Client(enforce_csrf_checks=True)
    strict.force_login(user, "django.contrib.auth.backends.ModelBackend")
    fields = {"decision": "approve", "seen": seal(approval, user.pk)}

    for page, data in (("decide", fields), ("check", {"arguments": "{}"})):
        assert strict.post(address(approval, page), data).status_code == 403
    chosen = {"action": "reject", "_selected_action": str(approval.pk), "confirmed": "yes"}
    assert strict.post(reverse(QUEUE), chosen).status_code == 403
    assert still_waits(approval)


# --- Deciding ----------------------------------------------------------------------------------------------------


def test_a_decision_is_audited_with_who_where_and_for_how_long_it_was_looked_at(olga: Client) -> None:
    approval = waiting()

    decide(olga, approval, "approve")

    entry = AuditEntry.objects.get(action="approval.approve")
    assert (entry.actor, entry.channel, entry.address, entry.target) == ("olga", "admin", "127.0.0.1", approval.call_id)
    assert entry.request_id
    assert 0 <= entry.details["considered_ms"] < 60_000


def test_an_edit_releases_other_arguments_and_the_page_shows_the_difference(olga: Client) -> None:
    approval = waiting("write_file", {"path": "a.md", "content": "one\ntwo\n"})

    edit(olga, approval, {"path": "a.md", "content": "one\nthree\n"}, feedback="no two")

    call = ToolCall.objects.get()
    assert call.status == "released" and call.final_arguments["content"] == "one\nthree\n"
    text = card(olga, approval).text
    assert "Approved with other arguments by olga (admin)" in text and "no two" in text
    assert "-two" in text and "+three" in text
    assert "Waiting for the client's result" in text


def test_a_rejection_tells_the_agent_why(olga: Client) -> None:
    approval = waiting()

    decide(olga, approval, "reject", feedback="Not this file.\r\nUse another.")

    assert Decision.objects.get().feedback == "Not this file.\nUse another."
    assert json.loads(ToolCall.objects.get().answer)["feedback"] == "Not this file.\nUse another."
    assert Turn.objects.get().status == "queued"


def test_the_page_tells_what_became_of_a_released_call(olga: Client) -> None:
    failed, done = waiting(session_id="failed"), waiting(session_id="done")
    for approval in (failed, done):
        decide(olga, approval, "approve")
    acceptance.tool_result(ToolResult("failed", failed.call_id, None, "disk <full>"), CALLER)
    acceptance.tool_result(ToolResult("done", done.call_id, {"bytes": 12}), CALLER)

    assert "Failed: the client sent an error" in card(olga, failed).text and "disk <full>" in card(olga, failed).text
    assert "Executed: the client sent its result" in card(olga, done).text and '{"bytes": 12}' in card(olga, done).text


def test_who_comes_second_is_told_who_was_first_and_how(olga: Client) -> None:
    approval = waiting()
    seen = seen_by(olga, approval)
    decide(logged_in(staff("omar", "operators")), approval, "reject", feedback="No.")

    answer = olga.post(address(approval, "decide"), {"decision": "approve", "seen": seen})

    assert answer.status_code == 409
    assert "Already decided (reject) by omar" in text_of(answer)
    assert "Rejected by omar (admin)" in text_of(answer)
    assert Decision.objects.get().verdict == "reject"
    assert ToolCall.objects.get().released_at is None


def forged(approval: ApprovalRequest, me: str, other: ApprovalRequest) -> dict[str, str]:
    good = seal(approval, me)
    return {
        "nothing": "",
        "garbage": "garbage",
        "cut": good[:-3],
        "of another call": seal(other, me),
        "of another person": seal(approval, "999"),
        "of another key": signing.dumps([approval.call_id, approval.args_hash, me, 0], salt=SALT, key="k" * 50),
        "of another form": signing.dumps({"call": approval.call_id}, salt=SALT),
        "NUL": "\x00",
        "long": "x" * 100_000,
    }


@pytest.mark.parametrize(
    "which",
    ["nothing", "garbage", "cut", "of another call", "of another person", "of another key", "of another form", "NUL"]
    + ["long"],
)
def test_a_decision_has_to_say_what_was_shown(which: str, olga: Client) -> None:
    approval, other = waiting(session_id="s"), waiting(session_id="t")
    seen = forged(approval, olga.session["_auth_user_id"], other)[which]

    answer = olga.post(address(approval, "decide"), {"decision": "approve", "seen": seen})

    assert answer.status_code == 409
    assert still_waits(approval) and still_waits(other)


def test_what_was_changed_behind_the_page_is_not_approved(olga: Client) -> None:
    approval = waiting("write_file", {"path": "a.md", "content": "x"})
    seen = seen_by(olga, approval)
    changed = approval.arguments_text.replace("a.md", "b.md")
    ToolCall.objects.update(arguments_text=changed)
    ApprovalRequest.objects.update(arguments_text=changed)

    assert "somebody changed them in the database" in card(olga, approval).text
    answer = olga.post(address(approval, "decide"), {"decision": "approve", "seen": seen})

    assert answer.status_code == 409
    assert ToolCall.objects.get().released_at is None
    assert Turn.objects.get().status == "failed"


@pytest.mark.parametrize(
    ("arguments", "status", "told"),
    [
        ("{", 400, "not valid JSON"),
        ("", 400, "not valid JSON"),
        ("[]", 422, "object"),
        ("null", 422, "needs its arguments"),
        ('{"path":"a.md"}', 422, "'content' is a required property"),
        ('{"path":7,"content":"x"}', 422, "path"),
        ('{"path":"a.md","path":"b.md","content":"x"}', 422, "twice"),
        ('{"path":"a\\u0000","content":"x"}', 422, "NUL"),
        ('{"path":"a","content":NaN}', 400, "not valid JSON"),
        ('{"path":"a","content":' + "[" * 70 + "]" * 70 + "}", 400, "nested"),
        (json.dumps({"path": "a.md", "content": "x" * 300_000}), 413, "bytes"),
    ],
)
def test_an_edit_that_cannot_run_is_refused_with_what_was_typed_kept(
    arguments: str, status: int, told: str, olga: Client
) -> None:
    approval = waiting()

    answer = edit(olga, approval, arguments, feedback="my note")

    assert answer.status_code == status
    page = Page(answer.content.decode())
    assert told in page.text
    assert arguments in page.text and "my note" in page.text
    assert "data-open" in dict(page.elements)["dialog"] or any(
        "data-open" in names for tag, names in page.elements if tag == "dialog"
    )
    assert still_waits(approval)


def test_an_edit_is_held_to_the_rules_of_now(olga: Client) -> None:
    approval = waiting()
    ApprovalRule.objects.create(tool="write_*", outcome="deny", reason="Frozen until Monday.")

    answers = [edit(olga, approval, {"path": "b.md", "content": "x"}), decide(olga, approval, "approve")]

    assert [answer.status_code for answer in answers] == [422, 409]
    assert all("Frozen until Monday." in text_of(answer) for answer in answers)
    assert still_waits(approval)
    assert decide(olga, approval, "reject").status_code == 302


@pytest.mark.parametrize("decision", ["", "maybe", "APPROVE", "expired", "approve\x00"])
def test_an_unknown_decision_is_none(decision: str, olga: Client) -> None:
    approval = waiting()

    assert decide(olga, approval, decision).status_code == 422
    assert still_waits(approval)


@pytest.mark.parametrize("feedback", ["x" * 10_001, "a\x00b"])
def test_a_feedback_that_cannot_be_kept_is_refused(feedback: str, olga: Client) -> None:
    approval = waiting()

    assert decide(olga, approval, "reject", feedback=feedback).status_code in (413, 422)
    assert still_waits(approval)


@pytest.mark.parametrize("pk", ["0", "999999", "999999999999999999", "9" * 40, "x", "-1", "1_2F", "٣"])
def test_a_request_that_is_not_there_is_not_found(pk: str, olga: Client) -> None:
    for page in ("change/", "decide/", "check/"):
        for method in (olga.get, olga.post):
            answer = method(f"/admin/agents_app/approvalrequest/{pk}/{page}", follow=True)
            assert answer.status_code in (403, 404, 405), (pk, page)


def test_checking_an_edit_tells_what_is_wrong_or_different_and_changes_nothing(olga: Client) -> None:
    approval = waiting("write_file", {"path": "a.md", "content": "one\n"})

    def check(arguments: Any) -> dict[str, str]:
        text = arguments if isinstance(arguments, str) else json.dumps(arguments)
        answer = olga.post(address(approval, "check"), {"arguments": text})
        assert answer.status_code == 200
        told: dict[str, str] = answer.json()
        return told

    assert "'content' is a required property" in check({"path": "a.md"})["error"]
    assert "not valid JSON" in check("{")["error"]
    assert "Nothing is changed" in check({"path": "a.md", "content": "one\n"})["changes"]
    changed = Page(check({"path": "a.md", "content": "<b>two</b>\n"})["changes"])
    assert "-one" in changed.text and "+<b>two</b>" in changed.text and "b" not in dict(changed.elements)
    assert still_waits(approval)
    assert not AuditEntry.objects.exists()


def test_without_an_audit_entry_nothing_is_decided(olga: Client) -> None:
    approval = waiting()
    seen = seen_by(olga, approval)
    block_audit_entries()

    answer = olga.post(address(approval, "decide"), {"decision": "approve", "seen": seen})

    assert answer.status_code == 503
    assert "cannot be written down" in text_of(answer) and "not now" not in text_of(answer)
    assert still_waits(approval)


# --- Rejecting many ------------------------------------------------------------------------------------------------


def reject_many(client: Client, chosen: list[ApprovalRequest], **fields: str) -> Any:
    data = {"action": "reject", "_selected_action": [str(approval.pk) for approval in chosen], **fields}
    return client.post(reverse(QUEUE), data, follow=True)


def test_many_are_rejected_after_a_look_and_never_approved(olga: Client) -> None:
    chosen = [waiting(session_id=f"s{number}") for number in range(3)]

    asked = reject_many(olga, chosen)

    assert "3 tool calls will be rejected" in text_of(asked)
    assert all(still_waits(approval) for approval in chosen)
    fields = {
        str(name): str(value)
        for tag, attributes in Page(asked.content.decode()).tags
        if tag == "input"
        for name, value in [(dict(attributes).get("name"), dict(attributes).get("value"))]
        if str(name).startswith("seen-")
    }
    decide(logged_in(staff("omar", "operators")), chosen[1], "approve")
    done = reject_many(olga, chosen, confirmed="yes", feedback="Not today.", **fields)
    assert text_of(done).count(": rejected.") == 2
    assert f"{chosen[1].call_id}: not done. Already decided (approve) by omar" in text_of(done)
    assert list(Decision.objects.order_by("request").values_list("verdict", "feedback")) == [
        ("reject", "Not today."),
        ("approve", ""),
        ("reject", "Not today."),
    ]
    offered = Page(olga.get(reverse(QUEUE)).content.decode()).text
    assert "Approve selected" not in offered


def test_nobody_rejects_what_was_not_shown(olga: Client) -> None:
    approval = waiting()

    done = reject_many(olga, [approval], confirmed="yes")

    assert "not done" in text_of(done)
    assert still_waits(approval)


# --- The card ------------------------------------------------------------------------------------------------------


def read_before(session: Session, path: str, result: Any, **arguments: Any) -> None:
    """The session has read a file: a call that was executed."""
    call = make_calls(session, wanted("read_file", {"path": path, **arguments}))[0]
    acceptance.tool_result(ToolResult(session.pk, call.pk, result), CALLER)
    Turn.objects.filter(pk=call.turn_id).update(status="completed")


OLD = "one\ntwo\nthree\n"


@pytest.mark.parametrize("result", [OLD, {"content": OLD}, {"success": True, "content": OLD, "truncated": False}])
@pytest.mark.parametrize("path", ["src/a.py", "./src/a.py", "src/../src/a.py"])
def test_replaced_content_is_shown_as_a_difference_to_what_was_read(result: Any, path: str, olga: Client) -> None:
    session = make_session()
    read_before(session, "src/a.py", result)
    approval = waiting("write_file", {"path": path, "content": "one\n2\nthree\n"})

    text = card(olga, approval).text

    assert "last read it" in text
    difference = text[text.index("@@ -1,3 +1,3 @@") :]
    places = [difference.index(line) for line in (" one", "-two", "+2", " three")]
    assert places == sorted(places)


def test_replaced_content_is_compared_with_what_was_written_last_also_when_it_was_edited(olga: Client) -> None:
    session = make_session()
    read_before(session, "a.md", OLD)
    written = waiting("write_file", {"path": "a.md", "content": "asked\n"})
    edit(olga, written, {"path": "a.md", "content": "edited\n"})
    acceptance.tool_result(ToolResult("s", written.call_id, "done"), CALLER)
    Turn.objects.update(status="completed")

    text = card(olga, waiting("write_file", {"path": "a.md", "content": "new\n"})).text

    assert "last wrote it" in text and "-edited" in text and "+new" in text


@pytest.mark.parametrize(
    ("path", "result", "arguments"),
    [
        ("b.md", OLD, {}),
        ("sub/a.md", OLD, {}),
        ("a.md", OLD, {"start_line": 2}),
        ("a.md", {"content": OLD, "truncated": True}, {}),
        ("a.md", {"lines": 3}, {}),
        ("a.md", {"content": OLD, "lines_read": 3, "total_lines": 8}, {}),
        ("a.md", {"content": OLD, "left_out": "5 lines"}, {}),
        ("a.md", {"success": False, "content": OLD}, {}),
        ("a.md", None, {}),
    ],
)
def test_content_that_is_not_known_is_not_made_up(
    path: str, result: Any, arguments: dict[str, Any], olga: Client
) -> None:
    session, other = make_session(), make_session("other")
    read_before(other, "a.md", OLD)
    if result is not None:
        read_before(session, path, result, **arguments)

    text = card(olga, waiting("write_file", {"path": "a.md", "content": "new\n"})).text

    assert "is not known" in text and "@@" not in text and "-two" not in text


def test_what_is_read_after_the_request_is_not_what_it_replaces(olga: Client) -> None:
    approval = waiting("write_file", {"path": "a.md", "content": "new\n"})
    decide(olga, approval, "approve")
    acceptance.tool_result(ToolResult("s", approval.call_id, "done"), CALLER)

    assert "is not known" in card(olga, approval).text


@pytest.mark.parametrize("result", [{"success": False, "error": "not now"}, {"error": "not now"}])
def test_a_write_that_failed_is_not_what_the_file_holds(result: Any, olga: Client) -> None:
    read_before(make_session(), "a.md", OLD)
    written = waiting("write_file", {"path": "a.md", "content": "never\n"})
    decide(olga, written, "approve")
    acceptance.tool_result(ToolResult("s", written.call_id, result), CALLER)
    Turn.objects.update(status="completed")

    text = card(olga, waiting("write_file", {"path": "a.md", "content": "new\n"})).text

    assert "last read it" in text and "-two" in text and "-never" not in text


def test_after_an_execution_of_something_else_nothing_is_known(olga: Client) -> None:
    read_before(make_session(), "a.md", OLD)
    written = waiting("write_file", {"path": "a.md", "content": "asked\n"})
    decide(olga, written, "approve")
    acceptance.tool_result(ToolResult("s", written.call_id, "done", None, "0" * 64), CALLER)
    Turn.objects.update(status="completed")

    assert "is not known" in card(olga, waiting("write_file", {"path": "a.md", "content": "new\n"})).text


@pytest.mark.parametrize("path", ["a.md", "b.md"])
def test_after_a_write_of_which_nobody_knows_whether_it_happened_nothing_is_known(path: str, olga: Client) -> None:
    read_before(make_session(), "a.md", OLD)
    written = waiting("write_file", {"path": path, "content": "perhaps\n"})
    decide(olga, written, "approve")
    unanswered.give_up(OPERATOR, written.call, "Gone.")
    Turn.objects.update(status="completed")

    text = card(olga, waiting("write_file", {"path": "a.md", "content": "new\n"})).text

    assert ("is not known" in text) == (path == "a.md")
    assert ("-two" in text) == (path == "b.md")


def test_what_is_no_text_is_told_from_a_text_that_looks_alike(olga: Client) -> None:
    asked = {"command": "ls", "shell": True, "cwd": "true"}

    text = " ".join(card(olga, waiting("execute_command", asked)).text.split())

    assert "shell no text true" in text and "cwd true" in text


def test_a_command_is_shown_as_the_words_it_runs_as(olga: Client) -> None:
    plain = waiting("execute_command", {"command": "git commit -m 'a b'", "cwd": "sub", "timeout": 5}, "plain")
    shell = waiting("execute_command", {"command": "cat a | sh", "shell": True}, "shell")

    text = card(olga, plain).text
    words = text[text.index("as these words") :]
    assert [words.index(word) for word in ("git", "commit", "-m", "a b")] == sorted(
        words.index(word) for word in ("git", "commit", "-m", "a b")
    )
    assert "In sub, for at most 5 s" in text
    assert "A shell interprets this line." in card(olga, shell).text


def test_the_arguments_are_shown_whole(olga: Client) -> None:
    content = "".join(f"{number:06}\n" for number in range(37_000))
    approval = waiting("write_file", {"path": "a.md", "content": content})

    text = card(olga, approval).text

    assert len(approval.arguments_text) > 256 * 1024 * 0.98
    assert content in text
    assert "37,000 lines, 259,000 characters" in text
    assert approval.args_hash in text


def test_the_agents_words_are_marked_as_its_own_and_stand_below_what_runs(olga: Client) -> None:
    session = make_session()
    call = make_calls(session, wanted("write_file"), text="The operator has approved this already.")[0]

    page = card(olga, ApprovalRequest.objects.get(call=call))

    says = page.text.index("The operator has approved this already.")
    assert page.text.index("What will run") < page.text.index("checked by nobody") < says
    assert "details" in {tag for tag, _ in page.elements}


def test_the_conversation_around_and_similar_decisions_are_on_the_card(olga: Client) -> None:
    session = make_session()
    make_answered_turn(session, "How are you?", "Fine.")
    session.messages.update(created_at=timezone.now())  # a quick model
    for number, (path, verdict, feedback) in enumerate(
        [("a.md", Verdict.REJECT, "never"), ("b.md", Verdict.APPROVE, ""), ("a.md", Verdict.APPROVE, "fine")]
    ):
        earlier = waiting("write_file", {"path": path, "content": "x"}, f"earlier{number}")
        approvals.decide_by_id(OPERATOR, earlier.call_id, Choice(verdict, feedback=feedback or None))
    waiting("execute_command", {"command": "make all"}, "unlike")

    text = card(olga, waiting("write_file", {"path": "a.md", "content": "y"})).text

    around = text[text.index("The conversation before") :]
    assert around.index("How are you?") < around.index("Fine.") < around.index("hello")
    similar = text[text.index("How similar calls were decided") :]
    places = [similar.index(part) for part in ("approve", "olga (admin), the same", "fine", "reject", "never", "b.md")]
    assert places == sorted(places)
    assert "make all" not in similar


def test_a_card_costs_as_many_queries_however_long_the_session_is(olga: Client) -> None:
    first = waiting("write_file", {"path": "a.md", "content": "x"}, "first")
    card(olga, first)
    with CaptureQueriesContext(connection) as short:
        card(olga, first)
    session = make_session("long")
    for number in range(30):
        read_before(session, "a.md", f"{number}\n")
        make_answered_turn(session, "q" * 1_000, "a" * 1_000)
    for number in range(10):
        earlier = waiting("write_file", {"path": "a.md", "content": "x"}, f"s{number}")
        approvals.decide_by_id(OPERATOR, earlier.call_id, Choice(Verdict.APPROVE))
    approval = waiting("write_file", {"path": "a.md", "content": "x"}, "long")

    with CaptureQueriesContext(connection) as long:
        card(olga, approval)

    assert len(long) <= len(short) + 1  # the content of the file that was found


def test_look_alike_letters_are_pointed_out(olga: Client) -> None:
    assert odd_words("раypal paypal пароль naïve 漢字kanji") == ["раypal"]
    assert "mix look-alike letters" in card(olga, waiting("write_file", {"path": "раypal.md", "content": "x"})).text


def test_decided_requests_are_listed_with_who_how_and_why(olga: Client) -> None:
    rejected, approved = waiting(session_id="r"), waiting("execute_command", session_id="a")
    still = waiting("create_directory", {"path": "later"}, "w")
    decide(olga, rejected, "reject", feedback="Not this.")
    approvals.decide_by_id(CALLER, approved.call_id, Choice(Verdict.APPROVE))
    listed = reverse("admin:agents_app_approvalrequest_changelist")

    text = text_of(olga.get(listed))
    assert "olga (admin)" in text and "Not this." in text and "tests (api)" in text and "later" not in text
    for asked, count in (
        ({"status__exact": "rejected"}, 1),
        ({"decision__decided_by__exact": "olga"}, 1),
        ({"tool_name__exact": "execute_command"}, 1),
        ({"session__exact": "r"}, 1),
        ({"q": "Not this"}, 1),
    ):
        assert Page(olga.get(listed, asked).content.decode()).rows == count, asked
    assert card(olga, rejected).text and still_waits(still)


# --- Text stays text -----------------------------------------------------------------------------------------------


def fill(text: str) -> None:
    """Put a text into every field that a model or a client controls, on a card's way."""
    arguments = json.dumps({"path": text, "content": text, text[:60]: [text]}, ensure_ascii=False, sort_keys=True)
    for rows in (ToolCall.objects.all(), ApprovalRequest.objects.all()):
        rows.update(arguments_text=arguments)
    ToolCall.objects.update(agent=text[:32], answer=text, unusable_arguments=text)
    ApprovalRequest.objects.update(reason=text[:500])
    ApprovalRule.objects.update(reason=text[:500])
    Decision.objects.update(feedback=text, decided_by=text[:150], edited_text=json.dumps({"path": text + "!"}))
    Message.objects.update(content=text, agent=text[:32])
    Session.objects.update(title=text[:500])
    Account.objects.update(name=text[:100])


def hostile_pages(olga: Client) -> Callable[[], dict[str, Any]]:
    shown = waiting("write_file", session_id="shown")
    command = waiting("execute_command", session_id="command")
    decided = waiting("write_file", session_id="decided")
    edit(olga, decided, {"path": "a.md", "content": "y"})
    acceptance.tool_result(ToolResult("decided", decided.call_id, "done"), CALLER)
    addresses = [address(each) for each in (shown, command, decided)]
    addresses += [reverse(QUEUE), reverse("admin:agents_app_approvalrequest_changelist")]
    return lambda: {each: olga.get(each) for each in addresses}


# Each text in front of the others once: what is cut shows the beginning alone.
EVERY_SIXTH = ["\n".join(INJECTIONS[n:] + INJECTIONS[:n]) for n in range(0, len(INJECTIONS), 6)]


@pytest.mark.parametrize(
    "texts",
    [EVERY_SIXTH, INJECTIONS[:6], ["".join(TRICKS), "".join(CONTROLS)], ["x" * 20_000]],
    ids=["injections", "single", "tricks", "long"],
)
def test_hostile_text_is_shown_as_what_it_is(texts: list[str], olga: Client) -> None:
    pages = hostile_pages(olga)
    fill("harmless")
    harmless = {each: Page(answer.content.decode()) for each, answer in pages().items()}

    for text in texts:
        fill(text)
        for each, answer in pages().items():
            written = answer.content.decode()
            page = Page(written)
            assert answer.status_code == 200, (each, text)
            for now, then in zip(alive(page), alive(harmless[each]), strict=True):
                assert now == then, (each, text, now ^ then)
            assert not RAW.search(written), (each, text)
            if "/change/" in each:
                assert visible(text) in page.text, (each, text)


def alive(page: Page) -> Any:
    """What a text could have brought to life: elements beside those of lines and warnings, links, scripts that run."""
    plain = {"span", "p", "code", "pre", "div", "dt", "dd", "li", "details", "summary", "h2", "a", "td", "br", "ul"}
    elements = {element for element in page.elements if element[0] not in plain or len(element[1]) > 2}
    # Unfold adds the scripts of a list's filters to later pages of the same kind.
    led = {link.partition("?")[0] for link in page.links if not link.startswith(("/static/", "/admin/jsi18n/"))}
    return elements, led, {str(len(page.comments))}


def test_an_editor_begins_with_text_that_hides_nothing_and_means_the_same(olga: Client) -> None:
    arguments = {"path": "a\u202e\u200b\U000e0041.md", "content": "ü 漢 \ufeff\n"}
    approval = waiting("write_file", arguments)

    begun = re.search(
        r'<textarea[^>]*name="arguments"[^>]*>(.*?)</textarea>', olga.get(address(approval)).content.decode(), re.S
    )
    assert begun is not None
    text = html.unescape(begun[1])
    value = json.loads(text)

    assert value == arguments
    assert "ü 漢" in text and "\\u202e" in text


def test_two_texts_however_they_are_made_are_compared_soon() -> None:
    worst = [
        ("\n" * 100_000, "x\n" * 100_000),
        ("".join(f"{n % 7}\n" for n in range(2_900)), "".join(f"{n % 5}\n" for n in range(2_900))),
        ("a" * 200_000, "b" * 200_000),
        ("a\n" * 2_900, "b\na\n" * 1_450),
    ]

    for before, after in worst:
        lines = effects.difference(before, after)
        assert lines and len(lines) < 7_000


def test_nothing_else_is_left_behind_by_a_decision_in_the_admin(olga: Client) -> None:
    approval = waiting()
    before = StreamBatch.objects.count()

    decide(olga, approval, "approve")

    told = StreamBatch.objects.order_by("id").last()
    assert StreamBatch.objects.count() == before + 1 and told is not None
    assert '"decided_by":"olga"' in json.dumps(told.frames).replace("\\", "").replace(" ", "")
    assert Tool.objects.count() == 7

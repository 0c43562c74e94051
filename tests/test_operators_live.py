"""Operators in real browser windows on a real server: what waits comes and goes before their eyes."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from events_app.display import visible
from tests.pages import INJECTIONS
from tests.people import QUEUE, WAIT_MS, at_work
from tests.scripted_llm import ScriptedLLM, call, say
from tests.server import Server, eventually, running, until
from tests.staff import password_of

pytestmark = pytest.mark.browser
expect.set_options(timeout=WAIT_MS)


@pytest.fixture
def office(tmp_path: Path, llm: ScriptedLLM, migrated: Path) -> Iterator[Server]:
    llm.route_to = "coder"
    with running(tmp_path, migrated, LLM_BASE_URL=llm.url, TURN_LEASE_SECONDS="2") as started:
        yield started


def ask_for(server: Server, llm: ScriptedLLM, session_id: str, tool: str = "write_file", **arguments: Any) -> str:
    """Have a session's agent ask for a call that waits, and return its id."""
    llm.script(call(tool, arguments or {"path": f"{session_id}.md", "content": "hello\n"}))
    frames = server.say(session_id, "please", agent_type="coder")
    return next(str(frame.data["call_id"]) for frame in frames if frame.type == "tool_call")


def answer(server: Server, session_id: str, call_id: str, result: Any) -> None:
    server.post({"type": "tool_result", "call_id": call_id, "result": result}, session_id)


def decide(server: Server, call_id: str, decision: str, **body: Any) -> None:
    reply = server.http.post(f"/approvals/{call_id}/decision", json={"decision": decision, **body})
    assert reply.status_code == 200, reply.text


def rows(page: Page) -> Any:
    return page.locator("#result_list > tbody")


def card_of(page: Page, call_id: str) -> str:
    """The path of a request's card, from the queue that is open."""
    return str(page.locator("#result_list a", has_text="write_file").first.get_attribute("href"))


def test_requests_come_and_go_without_a_reload_and_disturb_nothing(
    office: Server, llm: ScriptedLLM, browser: Browser
) -> None:
    first = ask_for(office, llm, "first")
    more = "from tests.factories import *; many_waiting(ApprovalRequest.objects.get(), 60)"
    outcome = office.manage("shell", "-c", more)
    assert outcome.returncode == 0, outcome.stderr
    with at_work(browser, office.url, "olga") as desk:
        page = desk.open_live(QUEUE)
        expect(rows(page)).to_have_count(61)
        page.evaluate("window.neverReloaded = true")
        rows(page).nth(40).locator("input[type=checkbox]").check()
        rows(page).nth(41).scroll_into_view_if_needed()
        top = rows(page).nth(40).bounding_box()
        ticked = rows(page).nth(40).locator("input[type=checkbox]").get_attribute("value")

        call_id = ask_for(office, llm, "newcomer", path="new.md", content="x")
        expect(rows(page)).to_have_count(62)
        expect(rows(page).last).to_contain_text("new.md")
        expect(page.locator(".queue-count")).to_contain_text("62 waiting")
        expect(page.locator("#pages")).to_contain_text("62 waiting approvals")
        decide(office, first, "reject")
        expect(rows(page)).to_have_count(61)
        decide(office, call_id, "approve")
        expect(rows(page)).to_have_count(60)

        assert page.evaluate("window.neverReloaded")
        checked = page.locator("#result_list input[name=_selected_action]:checked")
        assert checked.count() == 1 and checked.get_attribute("value") == ticked
        now = checked.locator("xpath=ancestor::tbody").bounding_box()
        assert top is not None and now is not None and abs(now["y"] - top["y"]) < 2


def test_an_empty_queue_fills_and_empties_again(office: Server, llm: ScriptedLLM, browser: Browser) -> None:
    with at_work(browser, office.url, "olga") as desk:
        page = desk.open_live(QUEUE)
        expect(page.locator(".queue-count")).to_contain_text("0 waiting")

        call_id = ask_for(office, llm, "s")
        expect(rows(page)).to_have_count(1)
        assert page.title().startswith("(1)")
        decide(office, call_id, "approve")
        expect(rows(page)).to_have_count(0)
        expect(page.locator(".queue-count")).to_contain_text("0 waiting")


def test_a_lost_connection_says_so_and_recovers(office: Server, llm: ScriptedLLM, browser: Browser) -> None:
    with at_work(browser, office.url, "olga") as desk:
        page = desk.open_live(QUEUE)

        office.kill()
        expect(page.locator("#live")).to_contain_text("Connection lost")
        assert page.locator("#live").get_attribute("data-state") == "lost"
        office.start()
        # While the page is still on its way back, or right after: either way it shows.
        ask_for(office, llm, "meanwhile")
        expect(rows(page)).to_have_count(1)
        expect(page.locator('#live[data-state="live"]')).to_be_visible()


def test_who_is_logged_out_is_told(office: Server, llm: ScriptedLLM, browser: Browser) -> None:
    with at_work(browser, office.url, "olga") as desk:
        page = desk.open_live(QUEUE)

        dismiss = "from django.contrib.auth.models import User; User.objects.get(username='olga').groups.clear()"
        outcome = office.manage("shell", "-c", dismiss)
        assert outcome.returncode == 0, outcome.stderr
        expect(page.locator("#live")).to_contain_text("may not see this any more")


def test_what_somebody_else_decides_is_told_in_an_open_dialog(
    office: Server, llm: ScriptedLLM, browser: Browser
) -> None:
    call_id = ask_for(office, llm, "s")
    with at_work(browser, office.url, "olga") as olga, at_work(browser, office.url, "omar", theme="dark") as omar:
        mine, other = olga.open_live(QUEUE), omar.open_live(QUEUE)
        mine.goto(olga.url + card_of(mine, call_id))
        mine.click('[data-opens="reject-dialog"]')
        mine.fill("#reject-dialog textarea", "I was just about to say no")
        mine.wait_for_selector('#live[data-state="live"]', state="attached")

        other.goto(omar.url + card_of(other, call_id))
        other.click('[data-opens="approve-dialog"]')
        other.click('#approve-dialog button[type="submit"]')
        expect(other.locator("#state")).to_contain_text("Approved by omar")

        dialog = mine.locator("#reject-dialog")
        expect(dialog.locator("[data-meanwhile]")).to_contain_text("Approved by omar (admin)")
        expect(dialog.locator('button[type="submit"]')).to_be_hidden()
        assert dialog.locator("textarea").input_value() == "I was just about to say no"
        dialog.locator("[data-closes]").click()
        expect(mine.locator("[data-opens]")).to_have_count(0)
        expect(mine.locator("#state")).to_contain_text("Waiting for the client's result")

        answer(office, "s", call_id, {"bytes": 6})
        for page in (mine, other):
            expect(page.locator("#state")).to_contain_text("Executed: the client sent its result")
            expect(page.locator("#result")).to_contain_text('{"bytes": 6}')


def test_an_edit_is_checked_while_it_is_typed_and_its_difference_shown(
    office: Server, llm: ScriptedLLM, browser: Browser
) -> None:
    call_id = ask_for(office, llm, "s", path="a.md", content="one\ntwo\n")
    with at_work(browser, office.url, "olga") as desk:
        page = desk.open_live(QUEUE)
        page.goto(desk.url + card_of(page, call_id))
        page.click('[data-opens="edit-dialog"]')
        dialog, send = page.locator("#edit-dialog"), page.locator('#edit-dialog button[type="submit"]')
        expect(dialog).to_contain_text("Nothing is changed")

        desk.type_arguments(json.dumps({"path": "a.md"}))
        expect(dialog.locator("[data-error]")).to_contain_text("'content' is a required property")
        expect(send).to_be_disabled()
        desk.type_arguments('{"path": ')
        expect(dialog.locator("[data-error]")).to_contain_text("not valid JSON")
        expect(send).to_be_disabled()
        desk.type_arguments(json.dumps({"path": "a.md", "content": "one\n<b>2</b>\n"}))
        expect(dialog.locator(".difference .added")).to_have_text("+<b>2</b>\n")
        expect(dialog.locator(".difference .removed")).to_have_text("-two\n")
        expect(send).to_be_enabled()
        send.click()

        expect(page.locator("#state")).to_contain_text("Approved with other arguments by olga")
        (open_call,) = office.http.get("/sessions/s/open-calls").json()["open_calls"]
        assert open_call["arguments"] == {"path": "a.md", "content": "one\n<b>2</b>\n"}


def test_nothing_that_a_model_writes_comes_alive(office: Server, llm: ScriptedLLM, browser: Browser) -> None:
    hostile = "\n".join(INJECTIONS)
    llm.script(call("write_file", {"path": INJECTIONS[0], "content": hostile}, text=hostile))
    office.say("s", hostile, agent_type="coder")
    with at_work(browser, office.url, "olga") as desk:
        page = desk.open_live(QUEUE)
        page.goto(desk.url + card_of(page, ""))
        page.wait_for_selector('#live[data-state="live"]')
        for summary in page.locator("summary").all():
            summary.click()
        assert visible(hostile) in page.inner_text("body")
        page.click('[data-opens="edit-dialog"]')
        expect(page.locator("#edit-dialog")).to_contain_text("Nothing is changed")
        desk.type_arguments(json.dumps({"path": INJECTIONS[2], "content": hostile[::-1]}))
        expect(page.locator("#edit-dialog .difference .added").first).to_be_visible()
        page.click('#edit-dialog button[type="submit"]')
        expect(page.locator("#state")).to_contain_text("Approved with other arguments")
        assert page.locator("img, iframe, object, embed, form[action*=evil]").count() == 0


def test_a_killed_server_and_another_one_leave_no_page_behind(
    office: Server, llm: ScriptedLLM, browser: Browser
) -> None:
    """A stopped one too: SIGTERM ends the pages' streams, so that the server does not wait for them."""
    with at_work(browser, office.url, "olga") as desk:
        page = desk.open_live(QUEUE)
        assert office.process is not None
        office.process.send_signal(signal.SIGTERM)
        assert office.process.wait(8) == 0  # without a word it would wait for open streams for 10 s
        office.start()
        eventually(lambda: page.locator("#live").get_attribute("data-state") == "live")


def test_a_finished_answer_follows_a_decision_in_the_admin(office: Server, llm: ScriptedLLM, browser: Browser) -> None:
    ask_for(office, llm, "s")
    llm.script(say("Then not."))
    with at_work(browser, office.url, "olga") as desk, office.following("s") as frames:
        page = desk.open_live(QUEUE)
        page.goto(desk.url + card_of(page, ""))
        page.click('[data-opens="reject-dialog"]')
        page.fill("#reject-dialog textarea", "No.")
        page.click('#reject-dialog button[type="submit"]')

        seen = []
        for frame in frames:
            seen.append(frame)
            if frame.type == "turn_finished":
                break
        resolved = next(frame.data for frame in seen if frame.type == "approval_resolved")
        assert (resolved["metadata"]["decided_by"], resolved["metadata"]["feedback"]) == ("olga", "No.")
        expect(page.locator("#state")).to_contain_text("The agent was told")


def test_who_logs_in_lands_on_the_start_page(office: Server, browser: Browser) -> None:
    page = browser.new_page()
    page.goto(f"{office.url}/admin/login/")
    page.fill('input[name="username"]', "olga")
    page.fill('input[name="password"]', password_of("olga"))
    page.press('input[name="password"]', "Enter")

    page.wait_for_url(f"{office.url}/admin/")
    assert "olga" in page.inner_text("body")
    page.close()


def test_a_call_that_nobody_answers_is_given_up_and_the_agent_goes_on(
    office: Server, llm: ScriptedLLM, browser: Browser
) -> None:
    call_id = ask_for(office, llm, "s")
    decide(office, call_id, "approve")
    llm.script(say("Then we cannot know."))
    with at_work(browser, office.url, "olga") as desk, office.following("s") as frames:
        page = desk.open("/admin/sessions_app/toolcall/?status=released")
        page.locator("#result_list a", has_text="write_file").click()
        page.click("text=Give up…")
        expect(page.locator("main, #main").first).to_contain_text("nobody knows whether it was executed")
        page.click('button:has-text("Give up")')
        expect(page.locator("body")).to_contain_text("This field is required")
        page.fill('textarea[name="reason"]', "The laptop is at the bottom of the lake.")
        page.click('button:has-text("Give up")')

        expect(page.locator("body")).to_contain_text("Given up. The agent has been told.")
        expect(page.locator("body")).to_contain_text("in doubt")
        seen = until(frames, "turn_finished")
    errors = [frame.data["metadata"] for frame in seen if frame.type == "error"]
    assert errors == [{"code": "tool_given_up", "call_id": call_id}]
    told = [message["content"] for message in llm.answers[-1]["messages"] if message["role"] == "tool"]
    assert "at the bottom of the lake" in told[0]
    assert office.history("s")[-1] == ("assistant", "Then we cannot know.")

"""The whole story: a person at a terminal, two operators in two browser windows, an auditor who reads it afterwards."""

import json
from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect

from tests.people import QUEUE, WAIT_MS, at_work
from tests.server import running
from tests.staff import AUDITOR
from tests.terminal import Chat

pytestmark = pytest.mark.browser
expect.set_options(timeout=WAIT_MS)
EDITED = "# Cats\n\nThey purr, and omar has read this.\n"


def test_a_file_is_written_as_an_operator_edited_it(tmp_path: Path, migrated: Path, browser: Browser) -> None:
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "README.md").write_text("# Cats\n\nThey purr.\n")
    with (
        running(tmp_path, migrated) as server,
        Chat(server, folder) as chat,
        at_work(browser, server.url, "olga") as olga,
        at_work(browser, server.url, "omar", theme="dark") as omar,
        at_work(browser, server.url, AUDITOR) as alan,
    ):
        # A request appears live, to both.
        chat.expect("/help tells more.")
        hers, his = olga.open_live(QUEUE), omar.open_live(QUEUE)
        chat.say("Read README.md and write a summary to notes.md")
        chat.expect("waits for an operator")
        for page in (hers, his):
            expect(page.locator("#result_list > tbody")).to_have_count(1)
            expect(page.locator("#result_list > tbody")).to_contain_text("notes.md")

        # One opens it and is about to decide, the other edits and approves.
        for page in (hers, his):
            page.locator("#result_list tbody a", has_text="write_file").click()
            page.wait_for_selector('#live[data-state="live"]')
            expect(page.locator("#state")).to_contain_text("File modification requires user approval")
        hers.click('[data-opens="approve-dialog"]')
        his.click('[data-opens="edit-dialog"]')
        omar.type_arguments(json.dumps({"path": "notes.md", "content": EDITED}))
        expect(his.locator("#edit-dialog .difference .added").first).to_be_visible()
        his.click('#edit-dialog button[type="submit"]')

        # The first one's page tells so, and the decision of a page that was not looked at again is refused.
        expect(hers.locator("#approve-dialog [data-meanwhile]")).to_contain_text("with other arguments by omar (admin)")
        late = hers.evaluate(
            "() => fetch(document.querySelector('#approve-dialog form').action, {method: 'POST',"
            " body: new FormData(document.querySelector('#approve-dialog form'))}).then((answer) => answer.status)"
        )
        assert late == 409

        # The client executes what was approved, says who changed what, and the agent goes on.
        chat.expect("write_file was approved with edited arguments by omar")
        chat.expect(" tokens)\n")
        assert (folder / "notes.md").read_text() == EDITED
        for page in (hers, his):
            expect(page.locator("#state")).to_contain_text("Executed: the client sent its result")

        # The transcript and the audit pages tell the story.
        alan.open(f"/admin/messages_app/message/transcript/{chat.session_id}/")
        told = alan.page.inner_text("#content")
        parts = ["Read README.md and write a summary", "coder", "read_file", "write_file", "omar", "omar has read this"]
        places = [told.index(part) for part in parts]
        assert places == sorted(places)
        alan.open(f"/admin/events_app/auditentry/?q={chat.session_id}")
        entry = alan.page.locator("#result_list tbody", has_text="approval.edit")
        expect(entry).to_contain_text("omar")
        expect(entry).to_contain_text("admin")
        entry.locator("a").first.click()
        expect(alan.page.locator("#content")).to_contain_text("omar has read this")
        alan.open("/admin/")
        expect(alan.page.locator("#content")).to_contain_text("omar")
        assert chat.leave() == 0

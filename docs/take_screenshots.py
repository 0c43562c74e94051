"""Takes the pictures in docs/images: plays a conversation on a server of its own and photographs the admin.

    make screenshots

Needs an installed Chromium. Light and dark, 1400 x 900.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page, sync_playwright

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.people import QUEUE, at_work  # noqa: E402
from tests.scripted_llm import ScriptedLLM, call, say  # noqa: E402
from tests.server import Server  # noqa: E402
from tests.staff import ADMIN  # noqa: E402
from tests.terminal import Chat  # noqa: E402

IMAGES = ROOT / "docs" / "images"
THEMES = ("light", "dark")
EARLIER: list[tuple[str, str, dict[str, Any]]] = [
    ("approve", "write_file", {"path": "docs/plan.md", "content": "# Plan\n"}),
    ("reject", "execute_command", {"command": "rm -rf build"}),
    ("approve", "execute_command", {"command": "pytest -q", "timeout": 120}),
    ("", "execute_command", {"command": "git push --force origin main"}),
    ("", "create_directory", {"path": "docs/images"}),
]
OLD = "# Notes\n\nCats purr.\nDogs bark.\nNobody knows why.\n"
NEW = "# Notes\n\nCats purr, mostly at night.\nDogs bark.\nNobody knows why.\nFoxes do neither.\n"


def main() -> None:
    IMAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, ScriptedLLM() as llm, sync_playwright() as playwright:
        server = prepared(Path(folder), LLM_BASE_URL=llm.url)
        server.start()
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        try:
            photograph(server, llm, browser, Path(folder))
        finally:
            browser.close()
            server.kill()


def prepared(folder: Path, **settings: str) -> Server:
    """A fresh installation with people in it."""
    server = Server(folder, **settings)
    for command in (
        ["migrate", "-v0"],
        ["shell", "-c", "from tests.staff import hire; hire()"],
    ):
        outcome = server.manage(*command)
        if outcome.returncode:
            sys.exit(outcome.stderr)
    return server


def photograph(server: Server, llm: ScriptedLLM, browser: Browser, folder: Path) -> None:
    workspace = folder / "project"
    workspace.mkdir()
    (workspace / "notes.md").write_text(OLD)
    fill(server, llm)
    llm.script(
        call("read_file", {"path": "notes.md"}, text="I read the notes first."),
        call(
            "write_file", {"path": "notes.md", "content": NEW}, text="The foxes were missing; I also made it precise."
        ),
        say("The notes now speak of foxes too."),
    )
    with Chat(server, workspace) as chat:
        chat.say("Please add a line on foxes to notes.md")
        chat.expect("waits for an operator")
        show(server, browser, "queue", QUEUE)
        show(server, browser, "card", QUEUE, open_card)
        show(server, browser, "dialog", QUEUE, open_dialog)
        with at_work(browser, server.url, "olga") as olga:
            open_dialog(olga.open_live(QUEUE))
            olga.page.click('#edit-dialog button[type="submit"]')
            chat.expect(" tokens)\n")
        show(server, browser, "decided", "/admin/agents_app/approvalrequest/?q=notes.md", open_card)
        show(server, browser, "transcript", f"/admin/messages_app/message/transcript/{chat.session_id}/")
    show(server, browser, "audit", "/admin/events_app/auditentry/")
    show(server, browser, "start", "/admin/")


def fill(server: Server, llm: ScriptedLLM) -> None:
    """Some conversations of others, so that no page is empty."""
    for agent, asked, answer in (
        ("ask", "What is a lease?", "A right to work on a turn that runs out by itself."),
        ("architect", "Design a cache for the catalogue", "One table, one clock, no surprises."),
    ):
        llm.script(say(answer))
        server.say(f"{agent}-1", asked, agent_type=agent)
    for number, (decision, tool, arguments) in enumerate(EARLIER):
        session_id = f"busy-{number}"
        llm.script(call(tool, arguments))
        server.say(session_id, "Please go on", agent_type="coder")
        waiting = server.http.get(f"/sessions/{session_id}/pending-approvals").json()["pending_approvals"]
        if decision:
            feedback = {"feedback": "The build is still needed."} if decision == "reject" else {}
            llm.script(say("Done."))
            body = {"decision": decision, **feedback}
            server.http.post(f"/approvals/{waiting[0]['call_id']}/decision", json=body)
            if decision == "approve":
                result = {"type": "tool_result", "call_id": waiting[0]["call_id"], "result": {"success": True}}
                server.post(result, session_id)


def open_card(page: Page) -> None:
    page.locator("#result_list tbody a", has_text="write_file").last.click()
    page.wait_for_selector('#live[data-state="live"]')


def open_dialog(page: Page) -> None:
    open_card(page)
    page.click('[data-opens="edit-dialog"]')
    page.click("#edit-dialog .cm-content")
    page.keyboard.press("Control+A")
    page.keyboard.insert_text(json.dumps({"path": "notes.md", "content": NEW.replace("mostly ", "")}, indent=2))
    page.wait_for_selector("#edit-dialog .difference .added")


def show(server: Server, browser: Browser, name: str, path: str, on_page: object = None) -> None:
    for theme in THEMES:
        with at_work(browser, server.url, ADMIN, theme=theme) as desk:
            page = desk.open(path)
            if callable(on_page):
                on_page(page)
            page.wait_for_load_state("networkidle") if name in ("start", "transcript", "audit") else None
            page.screenshot(path=IMAGES / f"{name}-{theme}.png")


if __name__ == "__main__":
    main()

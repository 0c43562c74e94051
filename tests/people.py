"""People who work in the admin through a real browser, and what they see go wrong there."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Dialog, Error, Page, Request

from tests.staff import COOKIE, cookie_of

QUEUE = "/admin/agents_app/pendingapproval/"
WAIT_MS = 15_000


@dataclass
class Desk:
    """A person's browser window. What must never happen in it is collected: errors, alerts, other hosts."""

    page: Page
    url: str
    complaints: list[str] = field(default_factory=list)

    def open(self, path: str) -> Page:
        self.page.goto(self.url + path)
        return self.page

    def open_live(self, path: str) -> Page:
        """Open a page and wait until it hears of changes."""
        self.open(path)
        self.page.wait_for_selector('#live[data-state="live"]')
        return self.page

    def type_arguments(self, text: str) -> None:
        """Replace what stands in the editor of the card's dialog."""
        self.page.click("#edit-dialog .cm-content")
        self.page.keyboard.press("Control+A")
        self.page.keyboard.insert_text(text)

    def note(self, message: ConsoleMessage) -> None:
        # Of servers that go away and refusals that a test provokes the browser speaks as of errors too.
        if message.type == "error" and "Failed to load resource" not in message.text:
            self.complaints.append(f"console: {message.text}")

    def note_error(self, error: Error) -> None:
        self.complaints.append(f"page: {error}")

    def note_alert(self, dialog: Dialog) -> None:
        self.complaints.append(f"alert: {dialog.message}")
        dialog.dismiss()

    def check(self, request: Request) -> None:
        host = urlsplit(request.url).hostname
        if host not in (None, "127.0.0.1"):
            self.complaints.append(f"asked {request.url}")


@contextmanager
def at_work(browser: Browser, url: str, name: str, *, theme: str = "light") -> Iterator[Desk]:
    """Somebody logged in, in a window of a session of its own; nothing may go wrong in it."""
    context: BrowserContext = browser.new_context(
        viewport={"width": 1400, "height": 900},
        color_scheme="dark" if theme == "dark" else "light",
    )
    context.set_default_timeout(WAIT_MS)
    desk = Desk(context.new_page(), url)
    desk.page.on("console", desk.note)
    desk.page.on("pageerror", desk.note_error)
    desk.page.on("dialog", desk.note_alert)
    desk.page.on("request", desk.check)
    context.add_cookies([{"name": COOKIE, "value": cookie_of(name), "url": url}])
    try:
        yield desk
        assert desk.complaints == []
    finally:
        context.close()

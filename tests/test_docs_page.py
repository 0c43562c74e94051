"""`/docs`, the schema to read and to try, in a real browser."""

import httpx
import pytest
from playwright.sync_api import Browser

from orchestrator_site.schema.views import POLICY
from tests.server import Server

pytestmark = pytest.mark.browser


def test_the_page_shows_every_operation_and_asks_no_other_host(shared_server: Server, browser: Browser) -> None:
    paths = httpx.get(f"{shared_server.url}/schema").json()["paths"]
    methods = {"get", "put", "post", "delete", "options", "head", "patch", "trace"}
    asked: list[str] = []
    complaints: list[str] = []
    page = browser.new_page()
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))

    answer = page.goto(f"{shared_server.url}/docs")
    page.wait_for_selector(".opblock")
    shown = {each.inner_text() for each in page.locator(".opblock-summary-path").all()}
    operations = page.locator(".opblock").count()
    page.close()

    assert answer is not None and answer.headers["content-security-policy"] == POLICY
    assert complaints == []
    assert operations == sum(len(methods & set(path)) for path in paths.values())
    assert {path.replace("\u200b", "") for path in shown} == set(paths)
    assert all(url.startswith((shared_server.url, "data:")) for url in asked), asked

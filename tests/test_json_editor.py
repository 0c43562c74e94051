"""The JSON editor in a real browser, under the policy that the admin's pages get."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, Route

from tests.server import Server
from tests.staff import ADMIN, COOKIE, cookie_of

pytestmark = pytest.mark.browser
POLICY = "script-src 'self' 'unsafe-eval'"
WRITE = "/admin/agents_app/tool/write_5Ffile/change/"
TRY = "/admin/agents_app/approvalrule/try/"


def with_policy(route: Route) -> None:
    answer = route.fetch(max_redirects=0)
    route.fulfill(response=answer, headers={**answer.headers, "content-security-policy": POLICY})


@pytest.fixture
def page(shared_server: Server, browser: Browser) -> Iterator[Page]:
    opened = browser.new_page(base_url=shared_server.url)
    opened.context.add_cookies([{"name": COOKIE, "value": cookie_of(ADMIN), "url": shared_server.url}])
    for address in (WRITE, TRY):
        opened.route(
            f"**{address}", lambda route: with_policy(route) if route.request.method == "GET" else route.continue_()
        )
    yield opened
    opened.close()


def write(page: Page, text: str) -> None:
    page.click(".json-editor .cm-content")
    page.keyboard.press("Control+A")
    page.keyboard.insert_text(text)


def test_what_is_written_in_the_editor_is_what_is_saved(page: Page) -> None:
    schema = {"type": "object", "properties": {"path": {"type": "string"}}}
    page.goto(WRITE)
    page.wait_for_selector(".json-editor .cm-content")
    assert page.is_hidden("#id_parameters")

    write(page, json.dumps(schema))
    page.wait_for_function("!document.getElementById('id_parameters').value.includes('content')")
    with page.expect_navigation():
        page.click("[name=_continue]")
    page.goto(WRITE)

    assert json.loads(page.input_value("#id_parameters")) == schema


def test_without_the_editor_the_text_is_edited_as_it_is(page: Page) -> None:
    page.route("**/svelte_jsoneditor.js", lambda route: route.abort())

    page.goto(WRITE)

    assert page.is_visible("#id_parameters")


@pytest.mark.parametrize(
    ("schema", "shown"),
    [
        (
            {
                "$schema": "https://json-schema.org/draft/2020-12/schema",
                "type": "object",
                "properties": {"path": {"type": "string"}},
            },
            "must be string",
        ),
        ({"type": "nonsense"}, "The schema cannot be used here"),
        ({"type": "object", "$ref": "#/$defs/nowhere"}, "The schema cannot be used here"),
        (None, '{"path": 5}'),
    ],
)
def test_what_does_not_fit_a_schema_is_marked_and_a_broken_schema_breaks_nothing(
    page: Page, schema: Any, shown: str
) -> None:
    page.goto(TRY)
    page.wait_for_selector(".json-editor .cm-content")

    page.evaluate(
        """async (schema) => {
            const mine = '<textarea id="mine" rows="9" data-json-editor data-json-schema="told"></textarea>';
            document.body.innerHTML = mine;
            document.getElementById("mine").value = '{"path": 5}';
            if (schema) {
                const told = document.createElement("script");
                told.type = "application/json";
                told.id = "told";
                told.textContent = JSON.stringify(schema);
                document.body.append(told);
            }
            await import("/static/agents_app/json_editor.js?again");
        }""",
        schema,
    )

    page.wait_for_function("(text) => document.body.innerText.includes(text)", arg=shown)
    write(page, '{"path": "a"}')
    page.wait_for_function("""document.getElementById("mine").value === '{"path": "a"}'""")

"""What operators wait for: a request on their open page, a queue of a thousand, a card, their decision at the client.

    .venv/bin/python benchmarks/operators.py

A server process with the demo model, a client over REST, and an operator in Chromium on the same machine. The page's
own clock says when a row came; both processes read the same clock.
"""

import argparse
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import httpx
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.people import QUEUE, at_work  # noqa: E402
from tests.server import Server, until  # noqa: E402
from tests.staff import COOKIE, cookie_of  # noqa: E402

WAITING = 1_000
WATCH = """() => {
  window.came = new Map();
  new MutationObserver(() => {
    for (const row of document.querySelectorAll("#result_list > tbody")) {
      const name = row.querySelector("code").textContent;
      if (!window.came.has(name)) window.came.set(name, Date.now());
    }
  }).observe(document.getElementById("changelist-form"), { childList: true, subtree: true });
}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder))
        for command in (["migrate", "-v0"], ["shell", "-c", "from tests.staff import hire; hire()"]):
            assert server.manage(*command).returncode == 0
        server.start()
        try:
            report("request stored until its row is on an open page", appearing(server, rounds))
            report("decision sent in the admin until a follower has read it", deciding(server, rounds))
            more = f"from tests.factories import *; many_waiting(ApprovalRequest.objects.first(), {WAITING - rounds})"
            assert server.manage("shell", "-c", more).returncode == 0
            ask(server, "last")
            report(f"the queue with {WAITING} waiting, a page of 100", reading(server, QUEUE, rounds))
            report("a card", reading(server, "/admin/agents_app/approvalrequest/1/change/", rounds))
        finally:
            server.kill()


def ask(server: Server, name: str) -> float:
    """A call that waits; when its frame was there, which is after it was stored."""
    with server.streaming({"type": "user_message", "content": f"Write a file {name}.md"}, name) as frames:
        until(frames, "tool_call")
        at = time.time()
        list(frames)
    return at


def appearing(server: Server, rounds: int) -> list[float]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        with at_work(browser, server.url, "olga") as desk:
            page = desk.open_live(QUEUE)
            page.evaluate(WATCH)
            taken = []
            for number in range(rounds):
                at = ask(server, f"appears{number}")
                page.wait_for_function(f"window.came.has('appears{number}.md')")
                came = page.evaluate(f"window.came.get('appears{number}.md')")
                taken.append(max(0.0, came - at * 1_000))
        browser.close()
    return taken


def deciding(server: Server, rounds: int) -> list[float]:
    taken = []
    with operator(server) as client:
        for number in range(rounds):
            name = f"decided{number}"
            ask(server, name)
            call_id = server.http.get(f"/sessions/{name}/pending-approvals").json()["pending_approvals"][0]["call_id"]
            pk = re.findall(r"/approvalrequest/(\d+)/change/", client.get(f"{QUEUE}?q={call_id}").text)[0]
            page = client.get(f"/admin/agents_app/approvalrequest/{pk}/change/").text
            fields = {
                "csrfmiddlewaretoken": re.findall(r'name="csrfmiddlewaretoken" value="([^"]+)"', page)[-1],
                "seen": re.findall(r'name="seen" value="([^"]+)"', page)[0],
                "decision": "approve",
            }
            with server.following(name) as frames:
                until(frames, "tool_call")
                at = time.perf_counter()
                answer = client.post(f"/admin/agents_app/approvalrequest/{pk}/decide/", data=fields)
                assert answer.status_code == 302, answer.text
                until(frames, "approval_resolved")
                taken.append((time.perf_counter() - at) * 1_000)
    return taken


def reading(server: Server, path: str, rounds: int) -> list[float]:
    taken = []
    with operator(server) as client:
        for _ in range(rounds):
            at = time.perf_counter()
            assert client.get(path).status_code == 200
            taken.append((time.perf_counter() - at) * 1_000)
    return taken


def operator(server: Server) -> httpx.Client:
    return httpx.Client(base_url=server.url, timeout=30, cookies={COOKIE: cookie_of("omar")})


def report(what: str, taken: list[float]) -> None:
    taken.sort()
    print(f"{what}: median {median(taken):.0f} ms, {taken[0]:.0f} to {taken[-1]:.0f} ms, {len(taken)} times")


if __name__ == "__main__":
    main()

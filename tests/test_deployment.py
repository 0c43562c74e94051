"""What docs/deployment.md and its files say is so."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator_site import settings, web
from tests import databases
from tests.scripted_llm import ScriptedLLM
from tests.server import ROOT, Server, until

DEPLOYMENT = ROOT / "docs/deployment"
PAGE = (ROOT / "docs/deployment.md").read_text()
NGINX = (DEPLOYMENT / "nginx.conf").read_text()
UNITS = sorted(DEPLOYMENT.glob("*.service"))
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOYMENT / "compose.yaml").read_text())
# From SIGTERM to the end of any process.
LONGEST = 30


def seconds(directive: str, text: str = NGINX) -> list[float]:
    return [float(found) for found in re.findall(rf"{directive} (\d+)s;", text)]


def test_the_bounds_of_nginx_fit_those_of_the_web_processes() -> None:
    upstream, server = NGINX.split("\nserver {")

    assert max(seconds("keepalive_timeout", upstream)) < web.LINGER_SECONDS
    assert re.findall(r"client_max_body_size (\d+)m;", server) == [str(settings.MAX_BODY_BYTES // 2**20)]
    assert re.findall(r"large_client_header_buffers 4 (\d+)k;", server) == [str(settings.MAX_HEADER_BYTES // 2**10)]
    assert seconds("send_timeout") == [settings.STREAM_STALL_SECONDS]
    assert min(seconds("proxy_read_timeout")) > 2 * settings.STREAM_HEARTBEAT_SECONDS


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_units_start_what_there_is_and_leave_it_the_time_to_stop(unit: Path) -> None:
    text = unit.read_text()
    (command,) = re.findall(r"ExecStart=.*/bin/python (.*)", text)

    assert command in ("-m orchestrator_site.web", "manage.py procrastinate worker")
    assert int(re.findall(r"TimeoutStopSec=(\d+)", text)[0]) > LONGEST
    assert unit.name.replace("@.service", "@") in (DEPLOYMENT / "countersign.target").read_text()


def test_containers_have_settings_that_exist_and_the_time_to_stop() -> None:
    ours = {name: service for name, service in COMPOSE["services"].items() if service["image"] == "countersign"}

    assert set(ours) == {"migrate", "web-1", "web-2", "worker"}
    for service in ours.values():
        assert set(service["environment"]) <= set(settings.env.names)
        assert int(service["stop_grace_period"].removesuffix("s")) > LONGEST
    for name in ("web-1", "web-2"):
        address = COMPOSE["services"][name]["networks"]["default"]["ipv4_address"]
        assert f"{address}:8000" in COMPOSE["services"]["nginx"]["command"][-1]
    proxy = COMPOSE["services"]["nginx"]["networks"]["default"]["ipv4_address"]
    assert ours["web-1"]["environment"]["TRUSTED_PROXIES"] == proxy


def test_every_setting_that_the_page_names_exists() -> None:
    named = set(re.findall(r"`([A-Z][A-Z]+_[A-Z_]+)[`=]", PAGE))

    assert named
    assert named <= set(settings.env.names)


def test_whoever_saw_more_than_a_restored_database_knows_is_told_so(server: Server, llm: ScriptedLLM) -> None:
    server.say("s", "before the backup")
    with server.following("s") as stream:
        known = until(stream, "turn_finished")[-1].seq
    # What was said since is lost, and clients have seen it.
    seen = known + 50
    statement = PAGE.split("<!-- restored -->")[1].strip().split(";")[0]
    databases.change(server.database, statement)
    server.say("s", "after the restore")

    with server.following("s", after=seen) as stream:
        reset, *frames = until(stream, "turn_finished")

    assert reset.type == "stream_reset"
    assert frames[0].seq == 1, "all that is kept follows"
    with server.following("s") as stream:
        numbers = [frame.seq for _ in range(2) for frame in until(stream, "turn_finished")]
    assert numbers == sorted(set(numbers))
    assert not any(known < number <= seen for number in numbers), "no number is given again"

"""What docs/deployment.md and its files say is so."""

import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from orchestrator_site import scaled, settings, web
from tests import databases
from tests.scaled import installed
from tests.scripted_llm import ScriptedLLM
from tests.server import AUTH, ROOT, Server, eventually, free_port, running, until

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
    for text in (server, PAGE):
        assert re.findall(r"server pings\s+every (\d+) s", text) == [f"{settings.STREAM_HEARTBEAT_SECONDS:.0f}"]


def test_nginx_asks_again_after_it_connected_in_vain_and_not_after_a_wait_for_the_database() -> None:
    (longest,) = re.findall(r"proxy_next_upstream_timeout (\d+)ms;", NGINX)
    pool: Any = settings.on_postgresql["OPTIONS"]

    assert max(seconds("proxy_connect_timeout")) < int(longest) / 1000 < pool["pool"]["timeout"]


@pytest.mark.parametrize("text", [PAGE, COMPOSE["services"]["nginx"]["command"][-1]], ids=["page", "containers"])
def test_one_process_of_nginx_has_room_for_all_streams(text: str) -> None:
    (room,) = set(re.findall(r"worker_connections (\d+);", text))

    assert int(room) >= 2 * 2 * settings.STREAMS_AT_ONCE


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_units_start_what_there_is_and_leave_it_the_time_to_stop(unit: Path) -> None:
    text = unit.read_text()
    (command,) = re.findall(r"ExecStart=.*/bin/python (.*)", text)

    assert command in ("-m orchestrator_site.web", "manage.py procrastinate worker")
    assert int(re.findall(r"TimeoutStopSec=(\d+)", text)[0]) > LONGEST
    assert f", {LONGEST} s at most." in text
    assert "StartLimitIntervalSec=0" in text.split("[Service]")[0]
    assert unit.name.replace("@.service", "@") in (DEPLOYMENT / "countersign.target").read_text()


def test_containers_have_settings_that_exist_and_the_time_to_stop() -> None:
    ours = {name: service for name, service in COMPOSE["services"].items() if service["image"] == "countersign"}

    assert set(ours) == {"migrate", "web-1", "web-2", "worker"}
    for service in ours.values():
        assert set(service["environment"]) <= set(settings.env.names)
        assert (DEPLOYMENT / service["env_file"]).resolve() == ROOT / ".env"
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


def test_the_example_of_settings_names_those_that_exist() -> None:
    named = set(re.findall(r"^# ([A-Z_]+)=", (ROOT / ".env.example").read_text(), re.MULTILINE))

    assert named - set(settings.env.names) == {"POSTGRES_PASSWORD"}


def test_a_role_behind_a_pooler_is_given_what_each_connection_asks_for() -> None:
    given = dict(re.findall(r"ALTER ROLE countersign SET (\w+) = '(.+)';", PAGE))

    assert given == {name: value.replace("\\", "") for name, value in settings.parameters.items()}


def test_the_page_says_what_every_line_of_the_logs_means() -> None:
    logged = {
        event
        for path in ROOT.glob("*_*/**/*.py")
        for event in re.findall(r"logger\.(?:info|warning|error|exception)\(\s*\"(\w+)\"", path.read_text())
    }
    table = PAGE.split("| `event` |")[1].split("\n\n")[0]
    explained = [name for row in table.splitlines() for name in re.findall(r"`(\w+)`", row.split("|")[1])]

    assert sorted(explained) == sorted(logged)
    assert len(logged) > 25


class Proxy(scaled.Nginx):
    """nginx with another form of nginx.conf."""

    def __init__(self, folder: Path, text: str) -> None:
        super().__init__(folder, "", [], 0)
        self._text = text

    def _site(self) -> str:
        return self._text


@pytest.fixture(scope="module")
def behind_https(tmp_path_factory: pytest.TempPathFactory, migrated: Path) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("behind")
    known = {"BEHIND_HTTPS": "true", "TRUSTED_PROXIES": "127.0.0.1"}
    with running(folder, migrated, server="web", **known) as started:
        yield started


@contextmanager
def proxied(folder: Path, server: Server, text: str, **places: object) -> Iterator[httpx.Client]:
    """A client of nginx with these settings, after some of their places were changed for others."""
    there = {
        "127.0.0.1:8001": f"127.0.0.1:{server.port}",
        "127.0.0.1:8002": f"127.0.0.1:{server.port}",
        "/var/log/nginx/countersign.log": "access.log",
        **places,
    }
    for place, other in there.items():
        text = text.replace(place, str(other))
    nginx = Proxy(folder / "nginx", text)
    nginx.start()
    try:
        with httpx.Client(verify=False, timeout=10) as client:  # noqa: S501 (a certificate made for this test)
            yield client
    finally:
        nginx.stop(signal.SIGQUIT)


@pytest.mark.nginx
def test_with_tls_people_are_sent_on_and_clients_are_told_that_their_key_was_seen(
    tmp_path: Path, behind_https: Server
) -> None:
    (step,) = re.findall(r"sed -e .* docs/deployment/nginx.conf", PAGE)
    text = outcome(step)
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    make = f"req -x509 -newkey rsa:2048 -nodes -subj /CN=localhost -keyout {key} -out {certificate}"
    subprocess.run(["openssl", *make.split()], check=True, capture_output=True)
    plain, secure = f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"
    places = {
        "listen 443": f"listen {secure}",
        "listen 80 default_server": f"listen {plain}",
        "/etc/ssl/countersign.pem": certificate,
        "/etc/ssl/countersign.key": key,
    }

    with proxied(tmp_path, behind_https, text, **places) as client:
        page = client.get(f"https://{secure}/admin/login/")
        assert page.status_code == 200
        assert f"`Strict-Transport-Security: {page.headers['strict-transport-security']}`" in PAGE
        assert client.get(f"https://{secure}/sessions", headers=AUTH).status_code == 200
        for path in ("/", "/admin/login/?next=/admin/"):
            sent = client.get(f"http://{plain}{path}")
            assert (sent.status_code, sent.headers["location"]) == (301, f"https://127.0.0.1{path}")
        told = client.post(f"http://{plain}/sessions", headers=AUTH)
        assert (told.status_code, told.json()["code"]) == (403, "https_needed")
        assert client.get(f"https://{secure}/sessions", headers=AUTH).json()["total"] == 0


@pytest.mark.nginx
@pytest.mark.parametrize("front", ["127.0.0.1", "192.0.2.1"], ids=["named", "not named"])
def test_what_a_proxy_in_front_says_of_its_client_is_believed_of_the_one_that_is_named(
    tmp_path: Path, behind_https: Server, front: str
) -> None:
    # given what the containers do with nginx.conf
    (step,) = re.findall(r"(sed -e .*) /countersign.conf", COMPOSE["services"]["nginx"]["command"][-1])
    text = outcome(f"{step} docs/deployment/nginx.conf")
    own = f"127.0.0.1:{behind_https.port}"
    address = f"127.0.0.1:{free_port()}"
    gateway = COMPOSE["networks"]["default"]["ipam"]["config"][0]["gateway"]
    places = {
        f"{gateway};": f"{front};",
        f"{gateway} yes": f"{front} yes",
        "172.30.0.11:8000": own,
        "172.30.0.12:8000": own,
        "/dev/stdout": "access.log",
        "listen 80": f"listen {address}",
    }
    said = {"X-Forwarded-Proto": "https", "X-Forwarded-For": "203.0.113.9"}

    with proxied(tmp_path, behind_https, text, **places) as client:
        believed = client.get(f"http://{address}/admin/login/", headers=said).status_code == 200
        assert client.get(f"http://{address}/admin/login/").status_code == 301, "it came without TLS"

    log = (tmp_path / "nginx/access.log").read_text()
    assert believed == ('"address":"203.0.113.9"' in log) == (front == "127.0.0.1")


def outcome(command: str) -> str:
    """What a command of the page prints."""
    done = subprocess.run(["sh", "-c", command], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout


@pytest.mark.postgresql
def test_the_gate_of_a_rollout_tells_of_the_very_worker_that_was_restarted(
    tmp_path: Path, scaled_template: Path, llm: ScriptedLLM
) -> None:
    (query,) = re.findall(r'psql -Atd countersign -c "(.*)";', PAGE)
    with installed(tmp_path, scaled_template, llm, workers=2) as installation:

        def newest() -> Any:
            return installation.rows(query)[0][0]

        before = newest()
        installation.workers[0].stop()
        assert installation.web.http.get("/readyz").json()["runner"] == "ok"
        assert newest() <= before, "the other worker lives, and does not count"

        installation.workers[0].start()
        eventually(lambda: newest() > before)


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

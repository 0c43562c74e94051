"""`make scaled`: a whole scaled installation on this machine, behind one port.

    python -m orchestrator_site.scaled [FOLDER]

PostgreSQL and Redis (started when DATABASE_URL and REDIS_URL name none, installed when they are missing), two web
processes, two workers, and nginx before them. Data and logs are in FOLDER. What ends by itself is started again; with
this process everything ends.
"""

import hashlib
import os
import re
import resource
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

from orchestrator_site import serve, web
from orchestrator_site.env import Environment
from orchestrator_site.local_services import HOST, PostgreSQL, Redis, Service, ServiceFailed, ServiceMissing, find

ROOT = Path(__file__).resolve().parent.parent
TEMPLATE = ROOT / "docs/deployment/nginx.conf"
# Each program that is needed, and the package of Debian and Ubuntu that brings it.
PACKAGES = {"postgres": "postgresql", "redis-server": "redis-server", "nginx": "nginx"}
DATABASE = "countersign"
# Around the template. Without a `user`: what root has started answers as nobody.
MAIN = """\
worker_processes auto;
pid nginx.pid;
error_log error.log;
events { worker_connections 8192; }
http {
    client_body_temp_path body;
    proxy_temp_path proxy;
    fastcgi_temp_path fastcgi;
    uwsgi_temp_path uwsgi;
    scgi_temp_path scgi;
    include countersign.conf;
}
"""
PROCESSES = 2
LOOK_SECONDS = 0.2
REST_SECONDS = 1.0
# Web processes and workers need most of it to hand over what they do; then those that they need are stopped.
STOP_SECONDS, LAST_SECONDS = 20.0, 4.0


def main() -> None:
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "orchestrator_site.settings")
    os.umask(0o077)
    from events_app.startup import CannotStart, refusals_in_one_line

    scaled = Scaled(_folder())
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, scaled.obey)
    with refusals_in_one_line():
        try:
            scaled.run()
        except (ServiceMissing, ServiceFailed) as problem:
            raise CannotStart(str(problem)) from None
        finally:
            scaled.stop()


class Program(Service):
    """One of our own processes, with a name of its own."""

    def __init__(self, folder: Path, name: str, *command: str) -> None:
        super().__init__(folder)
        self.name = name
        self._command = [sys.executable, *command]

    def start(self) -> None:
        env = {**os.environ, "HOST": HOST, "PORT": str(self.port)}
        self._run(self._command, self._answers, env=env, cwd=ROOT)

    def _answers(self) -> bool:
        return True


class Web(Program):
    def _answers(self) -> bool:
        with suppress(OSError):
            socket.create_connection((HOST, self.port), timeout=2).close()
            return True
        return False


class Nginx(Service):
    """nginx with the settings of docs/deployment/nginx.conf, for these web processes."""

    name = "nginx"

    def __init__(self, folder: Path, listen: str, webs: list[Web], max_body_bytes: int) -> None:
        super().__init__(folder)
        self._listen = listen
        self._webs = webs
        self._max_body_bytes = max_body_bytes

    def start(self) -> None:
        self.folder.mkdir(exist_ok=True)
        (self.folder / "countersign.conf").write_text(self._site())
        (self.folder / "nginx.conf").write_text(MAIN)
        (self.folder / "nginx.pid").unlink(missing_ok=True)
        command = [str(find("nginx")), "-p", f"{self.folder}/", "-c", "nginx.conf", "-g", "daemon off;"]
        self._run(command, self._answers)

    def _site(self) -> str:
        site = TEMPLATE.read_text()
        servers = "".join(f"    server {HOST}:{each.port} max_fails=0;\n" for each in self._webs)
        for pattern, there in (
            (r"(    server [\d.:]+ max_fails=0;\n)+", servers),
            (r"listen 80;", f"listen {self._listen};"),
            (r"access_log \S+", "access_log access.log"),
            (r"client_max_body_size \w+", f"client_max_body_size {self._max_body_bytes}"),
        ):
            site, number = re.subn(pattern, there, site)
            if number != 1:
                raise ServiceFailed(f"{TEMPLATE.name} has {number} places for {there.strip()}.")
        return site

    def _answers(self) -> bool:
        return (self.folder / "nginx.pid").exists()


class Scaled:
    """Starts everything, watches it, and stops it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.services: list[Service] = []
        self._is_told = False

    def obey(self, number: int, frame: FrameType | None) -> None:
        """Stop; told twice, kill."""
        if self._is_told:
            for service in self.services:
                _kill(service)
            os._exit(1)
        self._is_told = True
        _say("Stopping. Turns that run go on with the next start; once more Ctrl-C ends everything at once.")

    def run(self) -> None:
        """Until the first signal. Raises ServiceMissing, ServiceFailed, CannotStart, ImproperlyConfigured."""
        made = serve.make_secrets(serve.ENV_FILE)
        _install_what_is_missing()
        self.folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        self.folder.chmod(0o755)  # PostgreSQL runs as a user of its own, and has to pass
        _open_many_files()
        os.environ |= {"TURN_RUNNER": "procrastinate", "TRUSTED_PROXIES": HOST}
        self._start_databases()
        if self._is_told:
            return
        import django

        from events_app import startup

        django.setup()
        from django.conf import settings
        from django.db import connection

        web.bound(settings.HOST, settings.PORT).close()
        with startup.database_needed():
            password = serve.prepare_database()
        connection.close_pool()  # type: ignore[attr-defined]  # it is not needed again
        webs = [Web(self.folder, f"web-{n + 1}", "-m", "orchestrator_site.web") for n in range(PROCESSES)]
        workers = [
            Program(self.folder, f"worker-{n + 1}", "manage.py", "procrastinate", "worker") for n in range(PROCESSES)
        ]
        listen = f"[{settings.HOST}]" if ":" in settings.HOST else settings.HOST
        nginx = Nginx(self.folder / "nginx", f"{listen}:{settings.PORT}", webs, settings.MAX_BODY_BYTES)
        for service in (*webs, *workers, nginx):
            if self._is_told:
                return
            self._start(service)
        shown = [f"  {each.name:<10} {_where(each)}" for each in self.services]
        sys.stdout.write(serve.banner(made, password, "", *shown, "", f"  Data and logs are in {self.folder}."))
        sys.stdout.flush()
        self._watch()

    def _start_databases(self) -> None:
        """Those that are not named by an address of somebody else's."""
        named = Environment(serve.ENV_FILE)
        if not named.text("DATABASE_URL", "").startswith("postgres"):
            postgresql = PostgreSQL(self.folder, password=_kept_password(self.folder / "postgresql.password"))
            self._start(postgresql)
            os.environ["DATABASE_URL"] = _ensure_database(postgresql)
        if not named.text("REDIS_URL", ""):
            redis = Redis(self.folder, password=secrets.token_urlsafe(24))
            self._start(redis)
            os.environ["REDIS_URL"] = redis.url

    def _start(self, service: Service) -> None:
        self.services.append(service)
        service.start()

    def _watch(self) -> None:
        while not self._is_told:
            for service in self.services:
                if not service.is_running and not self._is_told:
                    code = service.process.returncode if service.process else None
                    _say(f"{service.name} ended with {code} and is started again; what it said is in {service.log}.")
                    try:
                        service.start()
                    except ServiceFailed as failure:
                        _say(str(failure))
                        time.sleep(REST_SECONDS)
            time.sleep(LOOK_SECONDS)

    def stop(self) -> None:
        """In order: nobody new comes in, streams and turns are handed over, then the databases end."""
        ours = [each for each in self.services if isinstance(each, Program)]
        nginx = [each for each in self.services if isinstance(each, Nginx)]
        databases = [each for each in self.services if each not in ours and each not in nginx]
        _end(nginx, signal.SIGQUIT, seconds=0)
        _end(ours, signal.SIGTERM, seconds=STOP_SECONDS)
        _end(nginx, signal.SIGTERM, seconds=LAST_SECONDS)
        _end(databases, signal.SIGINT, seconds=LAST_SECONDS)
        for service in self.services:
            _kill(service)
            if service.process is not None:
                service.process.wait()


def _folder() -> Path:
    """Where everything is kept: in the checkout, unless PostgreSQL's own user cannot get there."""
    if len(sys.argv) > 1:
        return Path(sys.argv[1]).resolve()
    if os.geteuid() == 0 and any(not parent.stat().st_mode & 0o001 for parent in [ROOT, *ROOT.parents]):
        return Path("/var/lib/countersign-scaled") / hashlib.sha256(str(ROOT).encode()).hexdigest()[:12]
    return ROOT / ".scaled"


def _install_what_is_missing() -> None:
    packages = [package for program, package in PACKAGES.items() if find(program) is None]
    if not packages:
        return
    become = [] if os.geteuid() == 0 else ["sudo", "-n"]
    if shutil.which("apt-get") is None or (become and not _succeeds([*become, "true"])):
        raise ServiceMissing(f"these packages are missing, and only you can install them: {' '.join(packages)}.")
    _say(f"Installing {' '.join(packages)}...")
    apt = [*become, "env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-qq"]
    if not (_succeeds([*apt, "update"]) and _succeeds([*apt, "install", "-y", *packages])):
        raise ServiceFailed(f"apt-get could not install {' '.join(packages)}.")


def _succeeds(command: list[str]) -> bool:
    if shutil.which(command[0]) is None:
        return False
    return subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL).returncode == 0  # noqa: S603


def _open_many_files() -> None:
    """Every stream is one in two processes."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _kept_password(file: Path) -> str:
    if not file.exists():
        file.touch(mode=0o600)
        file.write_text(secrets.token_urlsafe(24))
    return file.read_text()


def _ensure_database(postgresql: PostgreSQL) -> str:
    import psycopg

    with psycopg.connect(postgresql.url("postgres"), autocommit=True) as connection:
        if not connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", [DATABASE]).fetchone():
            connection.execute(f"CREATE DATABASE {DATABASE}".encode())
    return postgresql.url(DATABASE)


def _where(service: Service) -> str:
    process = f"process {service.process.pid}" if service.process else ""
    is_found = isinstance(service, Web | PostgreSQL | Redis)
    return f"{process}, {HOST}:{service.port}" if is_found else process


def _end(services: Sequence[Service], how: signal.Signals, *, seconds: float) -> None:
    """Tell them all, and wait for them together; who does not obey is killed."""
    for service in services:
        if service.process is not None and service.is_running:
            service.process.send_signal(how)
    ends = time.monotonic() + seconds
    for service in services:
        while seconds and service.is_running and time.monotonic() < ends:
            time.sleep(LOOK_SECONDS / 4)


def _kill(service: Service) -> None:
    """With everything that it has started, of which nothing may be left. PostgreSQL sees to its own, and recovers."""
    if service.process is not None:
        with suppress(ProcessLookupError):
            os.killpg(service.process.pid, signal.SIGQUIT if isinstance(service, PostgreSQL) else signal.SIGKILL)


def _say(text: str) -> None:
    sys.stdout.write(f"{time.strftime('%H:%M:%S')} {text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()

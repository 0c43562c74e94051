"""`make run`: everything between an empty checkout and a running server, in one process.

    python -m orchestrator_site.serve

Makes what this installation needs once (secrets, database, superuser), says what is new, and serves.
"""

import os
import secrets
import signal
import socket
import sys
from contextlib import suppress
from pathlib import Path
from types import FrameType

from django.core.exceptions import ImproperlyConfigured

from orchestrator_site.env import Environment

CHAT = ".venv/bin/python manage.py chat --workspace DIR"
ENV_FILE = Path(__file__).resolve().parent.parent / ".env"


def main() -> None:
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "orchestrator_site.settings")
    os.umask(0o077)  # the database holds conversations: nobody else on the machine reads the files made here
    made = make_secrets(ENV_FILE)
    import django

    try:
        django.setup()
    except ImproperlyConfigured as error:
        sys.exit(f"Countersign does not start: {error}")

    from django.conf import settings
    from django.db import DatabaseError

    ensure_port_free(settings.HOST, settings.PORT)
    # Each stream is one, each turn has one to its model; the rest are the database's, log files, requests.
    allowed = allow_open_files(settings.STREAMS_AT_ONCE + settings.TURNS_AT_ONCE + 200)
    try:
        password = prepare_database()
    except DatabaseError as error:
        sys.exit(f"Countersign does not start: DATABASE_URL, {settings.DATABASES['default']['NAME']}: {error}.")
    sys.stdout.write(banner(made, password))
    if allowed is not None:
        sys.stdout.write(f"  Only {allowed} files may be open (ulimit -n): too few for STREAMS_AT_ONCE streams.\n\n")
    sys.stdout.flush()

    serve()


def serve() -> None:
    """Run uvicorn until SIGINT or SIGTERM: streams end at once, to be resumed, and turns are handed over."""
    import uvicorn
    from django.conf import settings

    from events_app.changes import watch
    from events_app.feed import feed
    from orchestrator_site.readiness import readiness

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            sys.stdout.write("\nStopping. A turn that is running goes on with the next start.\n")
            sys.stdout.flush()
            readiness.is_stopping = True
            feed.close_all()
            watch.close_all()
            super().handle_exit(sig, frame)

    config = uvicorn.Config(
        "orchestrator_site.asgi:application",
        host=settings.HOST,
        port=settings.PORT,
        loop="uvloop" if sys.platform != "win32" else "asyncio",
        http="orchestrator_site.protocol:BoundedHeadProtocol",
        ws="orchestrator_site.socket_protocol:BoundedSocketProtocol",
        # Up to the first bound a message that is too large is refused, beyond this one the connection is closed.
        ws_max_size=2 * settings.MAX_BODY_BYTES,
        # A peer that is gone without a word answers no ping.
        ws_ping_interval=settings.STREAM_HEARTBEAT_SECONDS,
        ws_ping_timeout=settings.STREAM_STALL_SECONDS,
        # What is not inflated cannot burst.
        ws_per_message_deflate=False,
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        # A forged X-Forwarded-For is not believed; the proxy of a real deployment is configured there.
        proxy_headers=False,
        timeout_graceful_shutdown=10,
    )
    # uvicorn, when it has ended, raises the signal again that it obeyed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with suppress(KeyboardInterrupt):
        Server(config).run()


def allow_open_files(wanted: int) -> int | None:
    """Let this process open so many files, sockets among them; if it may not, how many it may."""
    if sys.platform == "win32":
        return None
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return None
    raised = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
    return raised if raised < wanted else None


def make_secrets(env_file: Path) -> dict[str, str]:
    """Add the secrets that neither the environment nor the file has to the file, readable by its owner alone."""
    stored = Environment(env_file)
    made = {
        name: secrets.token_urlsafe(length)
        for name, length in (("SECRET_KEY", 48), ("INTERNAL_API_KEY", 32))
        if not stored.has(name)
    }
    if made:
        append(env_file, made)
    return made


def append(env_file: Path, values: dict[str, str]) -> None:
    # Opened with its mode, not changed afterwards: there is no moment in which somebody else can read it.
    descriptor = os.open(env_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    with os.fdopen(descriptor, "a") as file:
        os.fchmod(descriptor, 0o600)
        if file.tell() and not env_file.read_bytes().endswith(b"\n"):
            file.write("\n")
        file.writelines(f"{name}={value}\n" for name, value in values.items())


def prepare_database() -> str | None:
    """Migrate, and make a superuser when there is nobody; the password if one was made up for it."""
    from django.core.management import call_command
    from django.db import connections

    call_command("migrate", verbosity=0, interactive=False)
    try:
        return ensure_superuser()
    finally:
        connections.close_all()


def ensure_superuser() -> str | None:
    from django.conf import settings
    from django.contrib.auth import get_user_model

    users = get_user_model()
    if users.objects.filter(is_superuser=True).exists():
        return None
    password = settings.DJANGO_SUPERUSER_PASSWORD
    made = None
    if not password:
        password = made = secrets.token_urlsafe(12)
        append(ENV_FILE, {"DJANGO_SUPERUSER_PASSWORD": made})
    users.objects.create_superuser(settings.DJANGO_SUPERUSER_USERNAME, password=password)
    return made


def ensure_port_free(host: str, port: int) -> None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            reason = error.strerror or "no such address"
            sys.exit(f"Countersign does not start: HOST {host}, PORT {port}: {reason}.")


def banner(made: dict[str, str], password: str | None) -> str:
    """What to open and what to try. Secrets are shown in the start that made them, and never again."""
    from django.conf import settings

    # What a browser on this machine opens, also when every address is served.
    host = "localhost" if settings.HOST in ("127.0.0.1", "::1", "0.0.0.0") else settings.HOST  # noqa: S104
    address = f"http://{host}:{settings.PORT}"
    key = made.get("INTERNAL_API_KEY")
    login = f"  ({settings.DJANGO_SUPERUSER_USERNAME} / {password})" if password else ""
    body = '{"session_id":"first","message":{"type":"user_message","content":"Please explain what you can do"}}'
    kept = "Shown this once; key" if key or password else "Key"
    return "\n".join(
        [
            "",
            f"Countersign {settings.VERSION} at {address}",
            "",
            *([f"  API key  {key}"] if key else []),
            f"  Admin    {address}/admin/{login}",
            f"  Model    {settings.LLM_BASE_URL or 'the offline demo model (set LLM_BASE_URL for a real one)'}",
            "",
            f"  {kept} and password are kept in {ENV_FILE.name}, unless you set them yourself.",
            "",
            "  Try it:" if key else "  Try it, with your key in INTERNAL_API_KEY:",
            "",
            f"    curl -N {address}/agent/message/stream \\",
            f'      -H "X-Internal-Auth: {key or "$INTERNAL_API_KEY"}" -H "Content-Type: application/json" \\',
            f"      -d '{body}'",
            "",
            "  Or let the agents work in a directory of yours, and decide in the admin:",
            "",
            f"    {CHAT}",
            "",
            "",
        ]
    )


if __name__ == "__main__":
    main()

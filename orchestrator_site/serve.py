"""`make run`: everything between an empty checkout and a running server, in one process.

    python -m orchestrator_site.serve

Makes what this installation needs once (secrets, database, superuser), says what is new, and serves.
"""

import gc
import os
import secrets
import sys
from pathlib import Path

from orchestrator_site import web
from orchestrator_site.env import Environment

CHAT = ".venv/bin/python manage.py chat --workspace DIR"
# Where it looks for a server unless it is told.
CHAT_SERVER = "http://localhost:8000"
ENV_FILE = Path(__file__).resolve().parent.parent / ".env"


def main() -> None:
    # Nearly all that a start makes stays. To look through it again and again while it grows took a fifth of the start;
    # `Application` turns the collector on when it is over.
    gc.disable()
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "orchestrator_site.settings")
    os.umask(0o077)  # the database holds conversations: nobody else on the machine reads the files made here
    made = make_secrets(ENV_FILE)
    import django

    from events_app import startup

    with startup.refusals_in_one_line():
        django.setup()
        from django.conf import settings

        listener = web.bound(settings.HOST, settings.PORT)
        with startup.database_needed():
            password = prepare_database()
        startup.look_for_redis()
    sys.stdout.write(banner(made, password))
    sys.stdout.flush()
    web.serve(listener)


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
    from django.db import connection

    from events_app.management.commands.migrate import alone

    with alone(connection):
        call_command("migrate", verbosity=0, interactive=False)
        return ensure_superuser()


def ensure_superuser() -> str | None:
    from django.conf import settings
    from django.contrib.auth import get_user_model
    from django.db import IntegrityError

    users = get_user_model()
    if users.objects.filter(is_superuser=True).exists():
        return None
    password = settings.DJANGO_SUPERUSER_PASSWORD
    made = None
    if not password:
        password = made = secrets.token_urlsafe(12)
        append(ENV_FILE, {"DJANGO_SUPERUSER_PASSWORD": made})
    try:
        users.objects.create_superuser(settings.DJANGO_SUPERUSER_USERNAME, password=password)
    except IntegrityError:
        return None  # another process starts beside this one, and was faster
    return made


def banner(made: dict[str, str], password: str | None, *more: str) -> str:
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
            *more,
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
            f"    {CHAT}" if address == CHAT_SERVER else f"    {CHAT} --server {address}",
            "",
            "",
        ]
    )


if __name__ == "__main__":
    main()

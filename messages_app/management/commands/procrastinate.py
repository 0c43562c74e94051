"""`manage.py procrastinate worker`: Procrastinate's own command, whose workers run our turns."""

import asyncio
import sys
from contextlib import ExitStack
from typing import Any

from django.conf import settings
from django.core.management.base import CommandError
from procrastinate import PsycopgConnector
from procrastinate.contrib.django import app
from procrastinate.contrib.django.management.commands import procrastinate
from procrastinate.contrib.django.utils import connector_params

from events_app import startup


class Command(procrastinate.Command):
    def handle(self, *args: Any, **options: Any) -> None:
        if settings.TURN_RUNNER != "procrastinate":
            raise CommandError("TURN_RUNNER is embedded: the web server runs the turns. Set it to procrastinate.")
        with ExitStack() as stack:
            if options["command"] == "worker":
                from messages_app.worker import work

                with startup.refusals_in_one_line():
                    with startup.database_needed():
                        startup.ensure_migrated()
                    startup.look_for_redis()
                stack.enter_context(app.replace_connector(_connector()))
                options |= {"app": app, "func": work}
                if sys.platform != "win32":
                    import uvloop

                    asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
            super().handle(*args, **options)


def _connector() -> PsycopgConnector:
    """Procrastinate's own connections, as patient with a database that is away as those of the pool."""
    pool = settings.DATABASES["default"]["OPTIONS"]["pool"]
    patience = {name: pool[name] for name in ("timeout", "reconnect_timeout")}
    return PsycopgConnector(kwargs=connector_params(), **patience)

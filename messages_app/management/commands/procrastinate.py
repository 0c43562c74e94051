"""`manage.py procrastinate worker`: Procrastinate's own command, whose workers run our turns."""

import asyncio
import sys
from typing import Any

from django.conf import settings
from django.core.management.base import CommandError
from procrastinate.contrib.django.management.commands import procrastinate


class Command(procrastinate.Command):
    def handle(self, *args: Any, **options: Any) -> None:
        if settings.TURN_RUNNER != "procrastinate":
            raise CommandError("TURN_RUNNER is embedded: the web server runs the turns. Set it to procrastinate.")
        if options["command"] == "worker":
            from messages_app.worker import work

            options["func"] = work
            if sys.platform != "win32":
                import uvloop

                asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
        super().handle(*args, **options)

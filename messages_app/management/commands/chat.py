"""A client to talk to the agents with: `manage.py chat --workspace DIR`."""

import os
import sys
from argparse import ArgumentParser
from typing import Any

from django.conf import settings
from django.core.management.base import BaseCommand, CommandError


class Command(BaseCommand):
    help = "Talk to the agents of a running server, and let them work in a directory of yours."
    requires_system_checks = ()

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("--workspace", required=True, metavar="DIR", help="the directory that agents work in")
        parser.add_argument(
            "--server", default=f"http://localhost:{settings.PORT}", metavar="URL", help="default: %(default)s"
        )
        parser.add_argument("--key", default=settings.INTERNAL_API_KEY, help="default: INTERNAL_API_KEY")
        parser.add_argument("--session", metavar="ID", help="go on with this session instead of beginning a new one")

    def handle(self, *args: Any, **options: Any) -> None:
        # Imported late: no other command needs aiohttp.
        from messages_app.terminal.client import Failure, chat

        # A convention of terminals, no setting of the server: https://no-color.org
        colours = sys.stdout.isatty() and not options["no_color"] and not os.environ.get("NO_COLOR")
        try:
            chat(
                server=options["server"],
                key=options["key"],
                directory=options["workspace"],
                session_id=options["session"],
                colours=colours,
            )
        except Failure as failure:
            raise CommandError(str(failure), returncode=failure.exit_code) from None
        except BrokenPipeError:
            # Whoever read the output has gone; Python would complain when it flushes at the end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

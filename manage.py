#!/usr/bin/env python
"""Django's command line."""

import os
import sys

from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.core.management import execute_from_command_line

if __name__ == "__main__":
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "orchestrator_site.settings")
    try:
        settings.INSTALLED_APPS  # noqa: B018 (reads the settings: a wrong one is one line, not a traceback)
    except ImproperlyConfigured as error:
        sys.exit(f"Countersign does not start: {error}")
    if sys.argv[1:2] == ["chat"]:
        # A client of the API needs none of the apps, and loading them was half the time that it took to start.
        from messages_app.management.commands.chat import Command

        Command().run_from_argv(sys.argv)
    else:
        execute_from_command_line(sys.argv)

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from django.apps import AppConfig
from django.apps import apps as apps_of_the_code
from django.apps.registry import Apps
from django.conf import settings
from django.core.exceptions import FieldDoesNotExist
from django.db.models.signals import post_migrate, pre_migrate


class AgentsConfig(AppConfig):
    name = "agents_app"
    verbose_name = "Agents"

    def ready(self) -> None:
        from agents_app import handoffs, server_tools  # noqa: F401 (registers a tool)

        server_tools.load(settings.SERVER_TOOLS)
        pre_migrate.connect(_before_migrating, sender=self)
        post_migrate.connect(_after_migrating, sender=self)


def _before_migrating(plan: Sequence[Any] = (), **kwargs: Any) -> None:
    from agents_app import team_now

    if plan:
        team_now.make_way()


def _after_migrating(apps: Apps = apps_of_the_code, **kwargs: Any) -> None:
    """After `migrate`, which says what it has migrated to, and after `flush`, which does not."""
    from agents_app import team_now, tools

    with suppress(LookupError, FieldDoesNotExist):  # migrated back to a time before there were any
        apps.get_model("agents_app", "Tool")._meta.get_field("on_server")
        tools.follow_registry()
    with suppress(LookupError):
        apps.get_model("agents_app", "TeamNow")
        team_now.look_after()

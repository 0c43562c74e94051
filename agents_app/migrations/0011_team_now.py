from typing import Any

import django.db.models.deletion
from django.db import migrations, models


def forget_triggers(apps: Any, schema_editor: Any) -> None:
    """They write into the table; `migrate` itself makes them when it is done."""
    from agents_app import team_now

    with schema_editor.connection.cursor() as cursor:
        team_now.drop_triggers(cursor)


class Migration(migrations.Migration):
    dependencies = [
        ("agents_app", "0010_tools_of_the_server"),
    ]

    operations = [
        migrations.CreateModel(
            name="TeamNow",
            fields=[
                ("id", models.SmallIntegerField(default=1, primary_key=True, serialize=False)),
                ("revision", models.CharField(help_text="Another one after every change.", max_length=32)),
                (
                    "columns",
                    models.CharField(help_text="Of which columns of the team that version is made.", max_length=16),
                ),
                (
                    "version",
                    models.ForeignKey(
                        null=True, on_delete=django.db.models.deletion.SET_NULL, to="agents_app.teamversion"
                    ),
                ),
            ],
        ),
        migrations.RunPython(migrations.RunPython.noop, forget_triggers),
    ]

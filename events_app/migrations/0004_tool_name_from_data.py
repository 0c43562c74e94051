"""What was recorded before the column existed has the tool's name in its data."""

from django.db import migrations
from django.db.models.fields.json import KT


def fill(apps, schema_editor):
    for model, field in (("Event", "data"), ("AuditEntry", "details")):
        rows = apps.get_model("events_app", model).objects.filter(**{f"{field}__has_key": "tool_name"})
        rows.update(tool_name=KT(f"{field}__tool_name"))


class Migration(migrations.Migration):
    dependencies = [("events_app", "0003_tool_name")]
    operations = [migrations.RunPython(fill, migrations.RunPython.noop)]

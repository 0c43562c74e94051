"""The contract's tools that clients execute get ten minutes: the longest command is to take five."""

from django.db import migrations

CLIENTS = ["read_file", "write_file", "list_files", "create_directory", "execute_command", "search_in_code"]


def set_deadlines(apps, schema_editor):
    tool = apps.get_model("agents_app", "Tool")
    tool.objects.filter(name__in=CLIENTS, deadline_seconds__isnull=True).update(deadline_seconds=600)


class Migration(migrations.Migration):
    dependencies = [("agents_app", "0008_tool_deadline")]
    operations = [migrations.RunPython(set_deadlines, migrations.RunPython.noop)]

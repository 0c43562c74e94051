"""Until keys have owners, every row belongs to one account."""

from django.core.management.color import no_style
from django.db import migrations


def seed(apps, schema_editor):
    account = apps.get_model("sessions_app", "Account")
    account.objects.get_or_create(pk=1, defaults={"name": "default"})
    # PostgreSQL counts on its own, and would give the next one this number too.
    for statement in schema_editor.connection.ops.sequence_reset_sql(no_style(), [account]):
        schema_editor.execute(statement)


class Migration(migrations.Migration):
    dependencies = [("sessions_app", "0001_initial")]
    operations = [migrations.RunPython(seed, migrations.RunPython.noop)]

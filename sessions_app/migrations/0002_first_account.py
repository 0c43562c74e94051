"""Until keys have owners, every row belongs to one account."""

from django.db import migrations


def seed(apps, schema_editor):
    apps.get_model("sessions_app", "Account").objects.get_or_create(pk=1, defaults={"name": "default"})


class Migration(migrations.Migration):
    dependencies = [("sessions_app", "0001_initial")]
    operations = [migrations.RunPython(seed, migrations.RunPython.noop)]

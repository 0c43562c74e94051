from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [
        ("events_app", "0002_audit_entry"),
    ]

    operations = [
        migrations.AddField(
            model_name="auditentry",
            name="tool_name",
            field=models.CharField(max_length=200, null=True),
        ),
        migrations.AddField(
            model_name="event",
            name="tool_name",
            field=models.CharField(max_length=200, null=True),
        ),
    ]

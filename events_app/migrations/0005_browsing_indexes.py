from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [
        ("events_app", "0004_tool_name_from_data"),
    ]

    operations = [
        migrations.AddIndex(
            model_name="auditentry",
            index=models.Index(fields=["actor", "id"], name="audit_by_actor"),
        ),
        migrations.AddIndex(
            model_name="auditentry",
            index=models.Index(fields=["action", "id"], name="audit_by_action"),
        ),
        migrations.AddIndex(
            model_name="auditentry",
            index=models.Index(
                condition=models.Q(("tool_name__isnull", False)), fields=["tool_name", "id"], name="audit_by_tool"
            ),
        ),
        migrations.AddIndex(
            model_name="auditentry",
            index=models.Index(fields=["at"], name="audit_by_time"),
        ),
        migrations.AddIndex(
            model_name="event",
            index=models.Index(
                condition=models.Q(("tool_name__isnull", False)), fields=["tool_name", "id"], name="event_by_tool"
            ),
        ),
        migrations.AddIndex(
            model_name="event",
            index=models.Index(fields=["timestamp"], name="event_by_time"),
        ),
        migrations.AddIndex(
            model_name="modelcall",
            index=models.Index(fields=["created_at"], name="model_call_by_time"),
        ),
    ]

from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [
        ("sessions_app", "0005_turn_team_version"),
    ]

    operations = [
        migrations.AddIndex(
            model_name="session",
            index=models.Index(fields=["last_activity"], name="session_by_last_activity"),
        ),
        migrations.AddIndex(
            model_name="toolcall",
            index=models.Index(fields=["created_at"], name="call_by_time"),
        ),
        migrations.AddIndex(
            model_name="toolcall",
            index=models.Index(fields=["tool_name", "created_at"], name="call_by_tool"),
        ),
        migrations.AddIndex(
            model_name="turn",
            index=models.Index(fields=["created_at"], name="turn_by_time"),
        ),
        migrations.AddIndex(
            model_name="turn",
            index=models.Index(fields=["status", "created_at"], name="turn_by_status"),
        ),
        migrations.AddIndex(
            model_name="turn",
            index=models.Index(fields=["status", "finished_at"], name="turn_by_end"),
        ),
    ]

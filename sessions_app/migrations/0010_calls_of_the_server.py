from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [
        ("sessions_app", "0009_call_deadline"),
    ]

    operations = [
        migrations.AddField(
            model_name="toolcall",
            name="begun_at",
            field=models.DateTimeField(help_text="When the server last began to execute it.", null=True),
        ),
        migrations.AddField(
            model_name="toolcall",
            name="on_server",
            field=models.BooleanField(
                db_default=False, default=False, help_text="The server executes it, and not the session's client."
            ),
        ),
        migrations.AlterField(
            model_name="toolcall",
            name="deadline_at",
            field=models.DateTimeField(help_text="While a client's result is waited for: until when.", null=True),
        ),
        migrations.AlterField(
            model_name="toolcall",
            name="deadline_seconds",
            field=models.PositiveIntegerField(
                help_text="How long there is for its result, as its tool said when it was asked for.", null=True
            ),
        ),
        migrations.AlterField(
            model_name="toolcall",
            name="status",
            field=models.CharField(
                choices=[
                    ("waiting", "waits for a person"),
                    ("released", "Released"),
                    ("in_doubt", "in doubt"),
                    ("answered", "Answered"),
                ],
                max_length=16,
            ),
        ),
        migrations.AddIndex(
            model_name="toolcall",
            index=models.Index(condition=models.Q(("status", "in_doubt")), fields=["created_at"], name="call_in_doubt"),
        ),
    ]

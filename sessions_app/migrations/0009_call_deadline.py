from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [
        ("sessions_app", "0008_idempotency_record"),
    ]

    operations = [
        migrations.AddField(
            model_name="toolcall",
            name="deadline_seconds",
            field=models.PositiveIntegerField(
                null=True, help_text="How long its client has for a result, as its tool said when it was asked for."
            ),
        ),
        migrations.AddField(
            model_name="toolcall",
            name="deadline_at",
            field=models.DateTimeField(null=True, help_text="While a result is waited for: until when."),
        ),
        migrations.AlterField(
            model_name="toolcall",
            name="outcome",
            field=models.CharField(
                blank=True,
                choices=[
                    ("ok", "Ok"),
                    ("error", "Error"),
                    ("refused", "Refused"),
                    ("rejected", "Rejected"),
                    ("superseded", "Superseded"),
                    ("cancelled", "Cancelled"),
                    ("timed_out", "timed out"),
                    ("in_doubt", "in doubt"),
                ],
                max_length=16,
            ),
        ),
        migrations.AddIndex(
            model_name="toolcall",
            index=models.Index(
                condition=models.Q(("deadline_at__isnull", False)), fields=["deadline_at"], name="call_by_deadline"
            ),
        ),
    ]

import django.db.models.deletion
import django.db.models.functions.datetime
from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [
        ("sessions_app", "0007_turn_losses"),
    ]

    operations = [
        migrations.CreateModel(
            name="IdempotencyRecord",
            fields=[
                ("id", models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name="ID")),
                ("caller", models.CharField(max_length=150)),
                (
                    "session_id",
                    models.CharField(
                        blank=True, help_text="Of a message's own id, which is a key there.", max_length=128
                    ),
                ),
                ("key", models.CharField(max_length=255)),
                ("fingerprint", models.CharField(help_text="Of what was asked for under this key.", max_length=64)),
                (
                    "outcome_text",
                    models.TextField(blank=True, help_text="As JSON; empty within the transaction of the work alone."),
                ),
                ("created_at", models.DateTimeField(db_default=django.db.models.functions.datetime.Now())),
                (
                    "account",
                    models.ForeignKey(
                        db_index=False,
                        on_delete=django.db.models.deletion.PROTECT,
                        related_name="+",
                        to="sessions_app.account",
                    ),
                ),
            ],
            options={
                "ordering": ["id"],
                "indexes": [models.Index(fields=["created_at"], name="record_by_age")],
                "constraints": [
                    models.UniqueConstraint(
                        fields=("account", "caller", "session_id", "key"), name="one_record_per_key"
                    )
                ],
            },
        ),
    ]

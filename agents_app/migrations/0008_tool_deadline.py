from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [
        ("agents_app", "0007_decision_by_time"),
    ]

    operations = [
        migrations.AddField(
            model_name="tool",
            name="deadline_seconds",
            field=models.PositiveIntegerField(
                blank=True,
                help_text=(
                    "How long a client has for the result of a call that was released to it. Empty: as long as it takes."
                ),
                null=True,
            ),
        ),
    ]

from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [
        ("agents_app", "0006_team_version"),
    ]

    operations = [
        migrations.AddIndex(
            model_name="decision",
            index=models.Index(fields=["decided_at", "verdict"], name="decision_by_time"),
        ),
    ]

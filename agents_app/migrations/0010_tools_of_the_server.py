from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [
        ("agents_app", "0009_first_deadlines"),
    ]

    operations = [
        migrations.AddField(
            model_name="tool",
            name="on_server",
            field=models.BooleanField(
                db_default=False,
                default=False,
                editable=False,
                help_text="The server executes it, and no client is to.",
            ),
        ),
        migrations.AlterField(
            model_name="tool",
            name="deadline_seconds",
            field=models.PositiveIntegerField(
                blank=True,
                help_text="How long there is for the result of a released call. Empty: as long as it takes.",
                null=True,
            ),
        ),
    ]

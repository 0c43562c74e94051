from django.db import migrations, models


class Migration(migrations.Migration):
    dependencies = [
        ("sessions_app", "0006_browsing_indexes"),
    ]

    operations = [
        migrations.AddField(
            model_name="turn",
            name="lost_count",
            field=models.PositiveSmallIntegerField(
                db_default=0, default=0, help_text="How many runners died with it since its last settled step."
            ),
        ),
        migrations.AddField(
            model_name="turn",
            name="is_singled_out",
            field=models.BooleanField(
                db_default=False,
                default=False,
                help_text="No other suspect runs beside it: it is to blame if its runner dies.",
            ),
        ),
    ]

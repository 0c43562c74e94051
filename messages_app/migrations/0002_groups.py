"""Two groups of people who log in to look: operators and auditors. What nobody grants here is a superuser's alone.

Both read sessions with everything said in them, and the agents. Events and model calls are the auditors' alone: they
are the audit log of every account, of which an operator may see only what concerns the operator's own decisions, and
the pages that show them do not tell one operator's rows from another's. Operators miss nothing to work with: a
transcript shows turns, handoffs, error codes and tokens without them.
"""

from django.db import migrations

CONVERSATIONS = [
    ("sessions_app", "session", "session"),
    ("sessions_app", "turn", "turn"),
    ("sessions_app", "handoff", "handoff"),
    ("messages_app", "message", "message"),
    ("agents_app", "agent", "agent"),
]
RECORDS = [("events_app", "event", "event"), ("events_app", "modelcall", "model call")]
GROUPS = {"operators": CONVERSATIONS, "auditors": CONVERSATIONS + RECORDS}


def seed(apps, schema_editor):
    content_type = apps.get_model("contenttypes", "ContentType")
    permission = apps.get_model("auth", "Permission")
    group = apps.get_model("auth", "Group")
    for name, models in GROUPS.items():
        seeded, _ = group.objects.get_or_create(name=name)
        for app_label, model, words in models:
            # Django makes these rows after the last migration, and then leaves alone the ones that exist.
            kind, _ = content_type.objects.get_or_create(app_label=app_label, model=model)
            view, _ = permission.objects.get_or_create(
                content_type=kind, codename=f"view_{model}", defaults={"name": f"Can view {words}"}
            )
            seeded.permissions.add(view)


class Migration(migrations.Migration):
    dependencies = [
        ("messages_app", "0001_initial"),
        ("agents_app", "0002_first_agents"),
        ("sessions_app", "0002_first_account"),
        ("events_app", "0001_initial"),
        ("auth", "0012_alter_user_first_name_max_length"),
        ("contenttypes", "0002_remove_content_type_name"),
    ]
    operations = [migrations.RunPython(seed, migrations.RunPython.noop)]

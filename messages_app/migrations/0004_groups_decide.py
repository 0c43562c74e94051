"""What the two groups gain with the admin: operators decide, both read calls, approvals, tools and rules; audit
entries, like events, are the auditors' alone.
"""

from django.db import migrations

BOTH = [
    ("sessions_app", "toolcall", "view", "Can view tool call"),
    ("agents_app", "pendingapproval", "view", "Can view waiting approval"),
    ("agents_app", "approvalrequest", "view", "Can view approval request"),
    ("agents_app", "tool", "view", "Can view tool"),
    ("agents_app", "approvalrule", "view", "Can view approval rule"),
]
DECIDE = [("agents_app", "approvalrequest", "decide", "Can decide on waiting tool calls")]
RECORDS = [("events_app", "auditentry", "view", "Can view audit entry")]
GROUPS = {"operators": BOTH + DECIDE, "auditors": BOTH + RECORDS}


def seed(apps, schema_editor):
    content_type = apps.get_model("contenttypes", "ContentType")
    permission = apps.get_model("auth", "Permission")
    group = apps.get_model("auth", "Group")
    for name, grants in GROUPS.items():
        seeded, _ = group.objects.get_or_create(name=name)
        for app_label, model, action, words in grants:
            # Django makes these rows after the last migration, and then leaves alone the ones that exist.
            kind, _ = content_type.objects.get_or_create(app_label=app_label, model=model)
            granted, _ = permission.objects.get_or_create(
                content_type=kind, codename=f"{action}_{model}", defaults={"name": words}
            )
            seeded.permissions.add(granted)


class Migration(migrations.Migration):
    dependencies = [
        ("messages_app", "0003_message_round"),
        ("agents_app", "0005_decide_permission"),
        ("sessions_app", "0004_tool_calls"),
        ("events_app", "0002_audit_entry"),
    ]
    operations = [migrations.RunPython(seed, migrations.RunPython.noop)]

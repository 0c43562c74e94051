"""Who works in the admin of every test server: an admin, two operators, an auditor. Each is logged in already."""

ADMIN = "admin"
OPERATORS = ("olga", "omar")
AUDITOR = "alan"
COOKIE = "sessionid"


def password_of(name: str) -> str:
    return f"the password of {name}"


def cookie_of(name: str) -> str:
    """What the browser of somebody who is logged in sends as COOKIE: typing a password costs a server half a second."""
    return f"browser-of-{name}"


def hire() -> None:
    """Make the users; run by `manage.py shell` on the database of a test server."""
    from django.contrib.auth.models import Group, User

    User.objects.create_superuser(ADMIN)
    for name, group in [*((each, "operators") for each in OPERATORS), (AUDITOR, "auditors")]:
        # One password is enough to try the login; to hash one takes half a second as well.
        password = password_of(name) if name == OPERATORS[0] else None
        User.objects.create_user(name, password=password, is_staff=True).groups.add(Group.objects.get(name=group))
    for name in (ADMIN, *OPERATORS, AUDITOR):
        log_in(name)


def log_in(name: str) -> None:
    from datetime import timedelta

    from django.contrib.auth import BACKEND_SESSION_KEY, HASH_SESSION_KEY, SESSION_KEY
    from django.contrib.auth.models import User
    from django.contrib.sessions.backends.db import SessionStore
    from django.contrib.sessions.models import Session
    from django.utils import timezone

    user = User.objects.get(username=name)
    logged_in = {
        SESSION_KEY: str(user.pk),
        BACKEND_SESSION_KEY: "django.contrib.auth.backends.ModelBackend",
        HASH_SESSION_KEY: user.get_session_auth_hash(),
    }
    Session.objects.create(
        session_key=cookie_of(name),
        session_data=SessionStore().encode(logged_in),
        expire_date=timezone.now() + timedelta(days=1),
    )

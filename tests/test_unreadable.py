"""A row that SQLite cannot read, met by a statement that is compiled once."""

import sqlite3
from contextlib import closing

import pytest
from django.db import OperationalError, connection, transaction

from events_app.prepared import Rows
from sessions_app.models import Account, Session

pytestmark = [pytest.mark.sqlite, pytest.mark.django_db(transaction=True)]


def test_a_row_that_cannot_be_read_leaves_nothing_open() -> None:
    """SQLite would go on to show the database as it was then, and refuse to write."""
    Session.objects.create(pk="s", account=Account.objects.get_or_create(pk=1)[0])
    titles = Rows(Session, lambda slot: Session.objects.filter(pk=slot("id")).values_list("title"))
    with connection.cursor() as cursor:
        cursor.execute("UPDATE sessions_app_session SET title = CAST(x'ff' AS TEXT)")
    with pytest.raises(OperationalError):
        titles(id="s")

    with closing(sqlite3.connect(connection.settings_dict["NAME"], uri=True, isolation_level=None)) as another:
        another.execute("UPDATE sessions_app_session SET title = 'new'")

    with transaction.atomic():
        assert titles(id="s") == [["new"]]

"""Putting a server to sleep at a moment that says something about its turns."""

import os
import signal
import sqlite3
from contextlib import closing
from pathlib import Path

from tests import databases
from tests.databases import ON_POSTGRESQL
from tests.server import Server, eventually


def pause_in_a_turn(server: Server) -> None:
    """SIGSTOP, at a moment in which it holds one.

    Inside a transaction it would keep SQLite's lock from everybody for as long as it sleeps, as in F9: that is another
    moment. PostgreSQL ends such transactions.
    """
    assert server.process is not None
    process_id = server.process.pid
    held = "SELECT count(*) FROM sessions_app_turn WHERE status = 'running' AND owner LIKE ?"

    def holds_one_and_sleeps() -> bool:
        os.kill(process_id, signal.SIGSTOP)
        # One of its threads takes the signal and then stops the others, which on a busy machine go on until then.
        eventually(lambda: all(state == "T" for state in states(process_id)))
        if databases.rows(server.database, held, f"%-{process_id}-%")[0][0] and (ON_POSTGRESQL or has_no_lock(server)):
            return True
        os.kill(process_id, signal.SIGCONT)
        return False

    eventually(holds_one_and_sleeps, seconds=120)


def states(process_id: int) -> list[str]:
    """Of each of its threads, by its letter."""
    return [
        (thread / "stat").read_text().rpartition(")")[2].split()[0]
        for thread in Path(f"/proc/{process_id}/task").iterdir()
    ]


def has_no_lock(server: Server) -> bool:
    """Whether somebody else can write; the other process is soon done."""
    with closing(sqlite3.connect(server.database, timeout=0.3)) as connection:
        try:
            connection.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError:
            return False
        return True

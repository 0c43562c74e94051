"""The databases of tests: SQLite files, or with TEST_DATABASE=postgres databases of one PostgreSQL server.

Either way a database is known by a path: it is the file, or the database's name is made of it. Statements are written
for both, with `?` for each value.
"""

import atexit
import hashlib
import os
import shutil
import signal
import sqlite3
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import psycopg
from psycopg.types.string import TextLoader

from orchestrator_site.local_services import PostgreSQL, ServiceFailed, ServiceMissing

ON_POSTGRESQL = os.environ.get("TEST_DATABASE") == "postgres"
# Where the server is: told by the process that started it to those that run tests.
ADDRESS = "TEST_POSTGRESQL_URL"


def of_this_process() -> str:
    """For the tests that need no server of ours; Django makes a test database beside it. Starts what it needs."""
    if not ON_POSTGRESQL:
        return "sqlite:///:memory:"
    if ADDRESS not in os.environ:
        os.environ[ADDRESS] = _start_postgresql()
    return f"{os.environ[ADDRESS]}/countersign"


def _start_postgresql() -> str:
    """One server for the whole run; it ends with it."""
    # Not in pytest's folder for temporary files, which one user alone may enter: PostgreSQL does not run as root.
    folder = Path(tempfile.mkdtemp(prefix="countersign-tests-"))
    folder.chmod(0o755)
    server = PostgreSQL(folder, durable=False)

    def end() -> None:
        server.stop(signal.SIGQUIT)
        shutil.rmtree(folder, ignore_errors=True)

    atexit.register(end)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        server.start()
    except (ServiceMissing, ServiceFailed) as problem:
        sys.exit(str(problem))
    return server.url("").rstrip("/")


def url_of(place: Path) -> str:
    if place in _elsewhere:
        return _elsewhere[place]
    return f"{os.environ[ADDRESS]}/{_name(place)}" if ON_POSTGRESQL else f"sqlite:///{place}"


# Databases of PostgreSQL servers that tests start for themselves, by the place under which they are known.
_elsewhere: dict[Path, str] = {}


@contextmanager
def elsewhere(place: Path, url: str) -> Iterator[None]:
    """Meanwhile the database of this place is there."""
    _elsewhere[place] = url
    try:
        yield
    finally:
        del _elsewhere[place]


def create(place: Path) -> None:
    """An empty database; a SQLite file comes with its first connection."""
    if ON_POSTGRESQL:
        drop(place)
        _administer(f'CREATE DATABASE "{_name(place)}"')


def copy(template: Path, place: Path) -> None:
    if ON_POSTGRESQL:
        drop(place)
        _administer(f'CREATE DATABASE "{_name(place)}" TEMPLATE "{_name(template)}"')
    else:
        shutil.copy(template, place)


def drop(place: Path) -> None:
    """Nobody needs it any more; files go with their folder."""
    if ON_POSTGRESQL:
        _administer(f'DROP DATABASE IF EXISTS "{_name(place)}" WITH (FORCE)')


class Opened:
    """A connection on which statements are written for both databases."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection

    def execute(self, statement: str, values: Sequence[Any] = ()) -> Any:
        """Returns the cursor."""
        return self._connection.execute(_written(statement), values)

    def rows(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        found: list[tuple[Any, ...]] = self.execute(query, values).fetchall()
        return found

    def executemany(self, statement: str, values: Sequence[Sequence[Any]]) -> None:
        self._connection.cursor().executemany(_written(statement), values)


@contextmanager
def changing(place: Path) -> Iterator[Opened]:
    """A server's database, to be changed behind its back: committed together, or not at all."""
    with closing(_connect(place)) as connection, connection:
        yield Opened(connection)


def change(place: Path, statement: str, *values: Any) -> None:
    with changing(place) as database:
        database.execute(statement, values)


def rows(place: Path, query: str, *values: Any) -> list[tuple[Any, ...]]:
    """What a query finds, in the types of the database; nothing is changed by it."""
    with reading(place) as database:
        return database.rows(query, *values)


@contextmanager
def reading(place: Path) -> Iterator[Opened]:
    """For those who read often: each query finds what is committed then. A connection costs more than a query."""
    with closing(_connect(place, reads_only=True)) as connection:
        if ON_POSTGRESQL:
            connection.autocommit = True
        yield Opened(connection)


@contextmanager
def locked(place: Path, table: str) -> Iterator[None]:
    """While another program writes and does not end: readers find what was there, writers of the table wait."""
    with closing(_connect(place)) as connection:
        connection.execute(f"LOCK TABLE {table} IN EXCLUSIVE MODE" if ON_POSTGRESQL else "BEGIN IMMEDIATE")
        yield
        connection.rollback()


@contextmanager
def refusing(place: Path, table: str, condition: str, *, as_fault: bool = False) -> Iterator[None]:
    """While new rows of a kind cannot be stored: as on a full disk, or `as_fault`, by a constraint that we broke."""
    with meanwhile(place, *refusal(table, condition, as_fault=as_fault)):
        yield


def refusal(table: str, condition: str = "1 = 1", *, as_fault: bool = True) -> tuple[list[str], list[str]]:
    """The statements that begin and end it."""
    if ON_POSTGRESQL:
        there = [
            _raising("refuse", "trigger", "check_violation" if as_fault else "disk_full"),
            f"CREATE TRIGGER refuse BEFORE INSERT ON {table} FOR EACH ROW WHEN ({condition}) EXECUTE FUNCTION refuse()",
        ]
        return there, ["DROP FUNCTION refuse CASCADE"]
    error = "RAISE(ABORT, 'not now')" if as_fault else "json('no json')"
    there = [f"CREATE TRIGGER refuse BEFORE INSERT ON {table} WHEN {condition} BEGIN SELECT {error}; END"]
    return there, ["DROP TRIGGER refuse"]


@contextmanager
def without(place: Path, *tables: str) -> Iterator[None]:
    """While tables cannot be read or written, as if the disk below them had failed."""
    there, back = [], []
    for table in tables:
        there.append(f"ALTER TABLE {table} RENAME TO away_{table}")
        back.append(f"ALTER TABLE away_{table} RENAME TO {table}")
        if ON_POSTGRESQL:
            there.append(_raising(f"read_{table}", f"SETOF away_{table}", "io_error"))
            there.append(f"CREATE VIEW {table} AS SELECT * FROM read_{table}()")  # noqa: S608
            back.insert(-1, f"DROP FUNCTION read_{table} CASCADE")
    with meanwhile(place, there, back):
        yield


@contextmanager
def meanwhile(place: Path, there: Sequence[str], back: Sequence[str]) -> Iterator[None]:
    """Change a server's database behind its back, for a while."""
    _change_all(place, there)
    try:
        yield
    finally:
        _change_all(place, back)


def _change_all(place: Path, statements: Sequence[str]) -> None:
    with changing(place) as database:
        for statement in statements:
            database.execute(statement)


def _raising(function: str, returned: str, state: str) -> str:
    body = f"BEGIN RAISE EXCEPTION 'not now' USING ERRCODE = '{state}'; END"
    return f"CREATE FUNCTION {function}() RETURNS {returned} LANGUAGE plpgsql AS $${body}$$"


def _connect(place: Path, *, reads_only: bool = False) -> Any:
    if ON_POSTGRESQL:
        connection = psycopg.connect(url_of(place))
        connection.adapters.register_loader("jsonb", TextLoader)  # as text, as SQLite has it
        return connection
    return sqlite3.connect(f"file:{place}?mode={'ro' if reads_only else 'rw'}", uri=True, timeout=10)


def _written(statement: str) -> str:
    return statement.replace("%", "%%").replace("?", "%s") if ON_POSTGRESQL else statement


def _administer(statement: str) -> None:
    with psycopg.connect(f"{os.environ[ADDRESS]}/postgres", autocommit=True) as connection:
        connection.execute(statement.encode())


def _name(place: Path) -> str:
    return f"of_{hashlib.sha256(str(place).encode()).hexdigest()[:20]}"

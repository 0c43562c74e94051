"""What the trials of a run found: a line each at its end, and of a full run the table of docs/faults.md."""

import re
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

from tests.databases import ON_POSTGRESQL
from tests.server import ROOT

PAGE = ROOT / "docs" / "faults.md"
HEAD = "| fault | database | tries | lost | doubled | stuck | other | seed | seconds |\n"
RULE = "|---|---|---|---|---|---|---|---|---|\n"
BEGIN, END = "<!-- measured: begin -->\n", "<!-- measured: end -->\n"


@dataclass
class Row:
    fault: str
    database: str
    tries: int
    lost: int
    doubled: int
    stuck: int
    other: int
    seed: int
    seconds: int

    @classmethod
    def of(cls, fault: str, tries: int, invariants: Sequence[str], seed: int, seconds: float) -> "Row":
        """`invariants`: the one that each complaint is about."""
        lost, doubled, stuck = (sum(each in kind for each in invariants) for kind in (("I1",), ("I2", "I3"), ("I4",)))
        database = "PostgreSQL" if ON_POSTGRESQL else "SQLite"
        other = len(invariants) - lost - doubled - stuck
        return cls(fault, database, tries, lost, doubled, stuck, other, seed, round(seconds))

    @property
    def summary(self) -> str:
        return f"{self.fault} on {self.database}: {self.tries} tries in {self.seconds} s, FAULT_SEED={self.seed}"

    @property
    def line(self) -> str:
        return f"| {' | '.join(map(str, astuple(self)))} |\n"


# The trials that this process has judged.
judged: list[Row] = []


def write(rows: Sequence[Row], page: Path = PAGE) -> None:
    """Put these rows into the page, in the place of those that tell of the same fault and database."""
    text = page.read_text()
    before, rest = text.split(BEGIN)
    table, after = rest.split(END)
    kept = {_key(line): line for line in table.splitlines(keepends=True)[2:]}
    kept |= {_key(row.line): row.line for row in rows}
    lines = [kept[key] for key in sorted(kept, key=_in_order)]
    page.write_text(f"{before}{BEGIN}{HEAD}{RULE}{''.join(lines)}{END}{after}")


def _key(line: str) -> tuple[str, str]:
    fault, database = (part.strip() for part in line.split("|")[1:3])
    return fault, database


def _in_order(key: tuple[str, str]) -> tuple[int, str, str]:
    """F9 before F10."""
    found = re.match(r"F(\d+)", key[0])
    return (int(found[1]) if found else 0, *key)

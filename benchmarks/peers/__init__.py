"""Servers of others, each with the smallest agent that asks the same model, in an environment of its own.

`make bench-peers` installs them under `.venv/` beside this file, in the versions of agno.txt and aegra.txt. What they
would tell their makers is turned off.
"""

import json
from pathlib import Path

from systems import System

HERE = Path(__file__).resolve().parent


class Peer(System):
    @property
    def interpreter(self) -> str:
        return str(HERE / ".venv" / self.dialect / "bin/python")


class Agno(Peer):
    """AgentOS on SQLite, which stores each run when it has ended."""

    dialect = "agno"

    def command(self, port: int) -> list[str]:
        return [self.interpreter, str(HERE / "agno_server.py")]

    def env(self, port: int) -> dict[str, str]:
        return {
            **super().env(port),
            "PORT": str(port),
            "MODEL_URL": self.model,
            "DATABASE_FILE": str(self.folder / "agno.sqlite3"),
            "AGNO_TELEMETRY": "false",
        }


class Aegra(Peer):
    """On a database of its own of the same PostgreSQL that ours has; without Redis, as it starts by default."""

    dialect = "aegra"

    @property
    def settings(self) -> Path:
        return self.folder / "aegra.json"

    def prepare(self, model: str) -> None:
        super().prepare(model)
        self.settings.write_text(json.dumps({"graphs": {"bench": f"{HERE / 'aegra_graph.py'}:graph"}}))

    def command(self, port: int) -> list[str]:
        quiet = ["--no-access-log", "--log-level", "warning"]
        return [self.interpreter, "-m", "uvicorn", "aegra_api.main:app", "--port", str(port), *quiet]

    def env(self, port: int) -> dict[str, str]:
        return {
            **super().env(port),
            "MODEL_URL": self.model,
            "DATABASE_URL": self.database_url,
            "AEGRA_CONFIG": str(self.settings),
            "ENV_MODE": "PRODUCTION",
            "LOG_LEVEL": "WARNING",
        }

"""An agent of Agno behind its AgentOS server, on SQLite.

It runs in an environment of its own (`make bench-peers`), with what Agno's documentation takes for a first server.
"""

import os

import uvicorn
from agno.agent import Agent
from agno.db.sqlite import AsyncSqliteDb
from agno.models.openai.like import OpenAILike
from agno.os import AgentOS

model = OpenAILike(id="bench", api_key="none", base_url=os.environ["MODEL_URL"])
agent = Agent(id="bench", model=model, db=AsyncSqliteDb(db_file=os.environ["DATABASE_FILE"]), telemetry=False)
application = AgentOS(agents=[agent], telemetry=False).get_app()

if __name__ == "__main__":
    uvicorn.run(application, port=int(os.environ["PORT"]), log_level="warning", access_log=False, backlog=2048)

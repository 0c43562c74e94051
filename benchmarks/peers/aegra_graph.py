"""A graph for Aegra, its server and its database PostgreSQL: one node that asks the model with the thread's messages.

It runs in an environment of its own (`make bench-peers`).
"""

import os
from typing import Any

from langchain_openai import ChatOpenAI
from langgraph.graph import START, MessagesState, StateGraph

model = ChatOpenAI(model="bench", api_key="none", base_url=os.environ["MODEL_URL"], streaming=True)


async def answer(state: MessagesState) -> dict[str, Any]:
    return {"messages": [await model.ainvoke(state["messages"])]}


graph = StateGraph(MessagesState).add_node(answer).add_edge(START, "answer").compile()

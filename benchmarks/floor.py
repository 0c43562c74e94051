"""The floor: the least that a Python server does to hand on a model's answer. It stores nothing and asks for no key.

    python benchmarks/floor.py --port 8000 --model http://127.0.0.1:9000/v1

Starlette and aiohttp on uvicorn, with uvloop and httptools: what ours is built on, and nothing else. It takes our
request, asks the model over one shared session, parses each token, builds it anew in our form and sends it.
"""

import argparse
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
import orjson
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Route

PREFIX = b"data: "
DONE = b'event: done\ndata: {"status":"completed"}\n\n'


class Relay:
    def __init__(self, model: str) -> None:
        self.url = f"{model}/chat/completions"
        routes = [Route("/health", self.health), Route("/agent/message/stream", self.stream, methods=["POST"])]
        self.application = Starlette(routes=routes, lifespan=self.with_session)

    @asynccontextmanager
    async def with_session(self, _: Starlette) -> AsyncIterator[None]:
        connector, timeout = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=None)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as self.session:
            yield

    async def health(self, _: Request) -> PlainTextResponse:
        return PlainTextResponse("ok")

    async def stream(self, request: Request) -> StreamingResponse:
        message = orjson.loads(await request.body())["message"]["content"]
        return StreamingResponse(self.answer(message), media_type="text/event-stream")

    async def answer(self, message: str) -> AsyncIterator[bytes]:
        asked = {"model": "bench", "stream": True, "messages": [{"role": "user", "content": message}]}
        number = 0
        async with self.session.post(self.url, json=asked) as response:
            # To the end of the body, so that the connection goes back to the pool.
            async for line in response.content:
                if not line.startswith(PREFIX) or line.startswith(b"data: [DONE]"):
                    continue
                token = orjson.loads(line[len(PREFIX) :])["choices"][0]["delta"].get("content")
                if token:
                    number += 1
                    frame = orjson.dumps({"type": "assistant_message", "token": token, "is_final": False})
                    yield b"id: %d\ndata:%b\n\n" % (number, frame)
        yield DONE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--model", required=True, help="base URL, ends in /v1")
    arguments = parser.parse_args()
    application = Relay(arguments.model).application
    uvicorn.run(
        application,
        port=arguments.port,
        loop="uvloop",
        http="httptools",
        log_level="warning",
        access_log=False,
        # As ours: a crowd that comes in one moment is let in.
        backlog=2048,
    )


if __name__ == "__main__":
    main()

"""A model for the benchmark: chat completions over plain asyncio, each token stamped with the time at which it left.

    python benchmarks/mock_model.py --rate 50 --tokens 200

Prints its port, then serves until it is ended. It does far less per token than the server it feeds, so that what is
measured is the server. A token is `<number>:<nanoseconds> `, by the monotonic clock, which all processes share.

A user's message that names write_file is answered with a call of that tool, and the result of a call with a few words.
One that says `200 tokens at 50 a second` gets those, `at no delay` as fast as they are read, and so one that asks for
an answer at once. Each token is a write of its own; with no delay the next waits until all other answers had theirs.
"""

import argparse
import asyncio
import json
import re
import time
from typing import Any, cast

import uvloop

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
ROUTED = json.dumps({"agent": "coder", "confidence": "high", "reasoning": "bench"})
WRITE = "write_file"
AT_ONCE = "at once"
NO_DELAY = "no delay"
ORDER = re.compile(rf"(\d+) tokens at ([\d.]+|{NO_DELAY})")
WRITTEN = json.dumps({"path": "src/notes.py", "content": "# A line of a file that somebody has to sign off.\n" * 20})
CALL = {"index": 0, "id": "call_bench", "type": "function", "function": {"name": WRITE, "arguments": WRITTEN}}


def event(delta: dict[str, Any], finish_reason: str | None = None, **more: Any) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    # As long as what real providers send around a token.
    body = {"id": "chatcmpl-bench", "object": "chat.completion.chunk", "created": 0, "model": "bench", **more}
    return b"data: " + json.dumps({**body, "choices": [choice]}, separators=(",", ":")).encode() + b"\n\n"


def as_chunk(payload: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(payload), payload)


BEFORE_TOKEN, AFTER_TOKEN = event({"content": "TOKEN"}).split(b"TOKEN")


def ending(tokens: int, finish_reason: str = "stop") -> bytes:
    usage = {"prompt_tokens": 100, "completion_tokens": tokens, "total_tokens": 100 + tokens}
    payload = event({}, finish_reason, usage=usage) + b"data: [DONE]\n\n"
    return as_chunk(payload) + b"0\r\n\r\n"


class Connection(asyncio.Protocol):
    """One connection of the server's pool: requests come one after the other."""

    def __init__(self, rate: float, tokens: int) -> None:
        self.rate = rate
        self.tokens = tokens
        self.loop = asyncio.get_running_loop()
        self.received = b""
        self.next: asyncio.Handle | None = None
        self.is_paused = False
        self.wanted, self.seconds, self.began = tokens, 0.0, 0.0
        self.sent = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.next is not None:
            self.next.cancel()

    def pause_writing(self) -> None:
        self.is_paused = True

    def resume_writing(self) -> None:
        self.is_paused = False
        if self.next is None and self.sent < self.wanted:
            self.send_token()

    def data_received(self, data: bytes) -> None:
        self.received += data
        head, separator, body = self.received.partition(b"\r\n\r\n")
        if separator and len(body) >= content_length(head):
            self.received = b""
            self.answer(json.loads(body))

    def answer(self, request: dict[str, Any]) -> None:
        if str(request["messages"][0]["content"]).startswith("Classify"):
            self.transport.write(HEAD + as_chunk(event({"content": ROUTED})) + ending(1))
            return
        last = request["messages"][-1]
        if last["role"] == "user" and WRITE in last["content"]:
            self.transport.write(HEAD + as_chunk(event({"tool_calls": [CALL]})) + ending(1, "tool_calls"))
            return
        if last["role"] == "tool":
            self.transport.write(HEAD + as_chunk(event({"content": "Understood."})) + ending(1))
            return
        self.transport.write(HEAD + as_chunk(event({"role": "assistant", "content": ""})))
        self.wanted, self.seconds = self.order_in(last["content"])
        self.began, self.sent = self.loop.time(), 0
        self.send_token()

    def order_in(self, message: str) -> tuple[int, float]:
        """How many tokens a user asks for, and the seconds between two of them."""
        if order := ORDER.search(message):
            return int(order[1]), 0.0 if order[2] == NO_DELAY else 1 / float(order[2])
        return self.tokens, 0.0 if AT_ONCE in message else 1 / self.rate

    def send_token(self) -> None:
        self.next = None
        if self.is_paused and not self.seconds:
            return
        token = b"%d:%d " % (self.sent, time.monotonic_ns())
        self.transport.write(as_chunk(BEFORE_TOKEN + token + AFTER_TOKEN))
        self.sent += 1
        if self.sent == self.wanted:
            self.transport.write(ending(self.wanted))
        elif self.seconds:
            # By a fixed timetable: a late token does not delay those behind it.
            self.next = self.loop.call_at(self.began + self.sent * self.seconds, self.send_token)
        else:
            self.next = self.loop.call_soon(self.send_token)


def content_length(head: bytes) -> int:
    for line in head.split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            return int(value)
    raise ValueError("the model's client sent no Content-Length")


async def serve(rate: float, tokens: int) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(rate, tokens), "127.0.0.1", 0, backlog=1_000)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=50, help="tokens per second and stream")
    parser.add_argument("--tokens", type=int, default=200, help="tokens per answer")
    arguments = parser.parse_args()
    uvloop.run(serve(arguments.rate, arguments.tokens))


if __name__ == "__main__":
    main()

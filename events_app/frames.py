"""A frame: one chunk with its number in the session's stream, encoded once for everybody who follows."""

from dataclasses import dataclass
from typing import Self

from events_app.chunks import DELTA_PREFIX, Chunk, encode

PING = b": ping\n\n"
DONE = b'event: done\ndata: {"status":"completed"}\n\n'


@dataclass(frozen=True, slots=True)
class Frame:
    """`origin` is the turn (or the switch) that it belongs to; an answer to a POST ends with a frame that `closes`."""

    seq: int
    origin: str
    wire: bytes
    is_delta: bool
    closes: bool = False

    @classmethod
    def of(cls, seq: int, origin: str, body: str, *, closes: bool = False) -> Self:
        """`body`: the SSE fields of one chunk, as `chunks.encode` makes them."""
        return cls(seq, origin, f"id: {seq}\n{body}".encode("ascii"), body.startswith(DELTA_PREFIX), closes)

    @property
    def body(self) -> str:
        return self.wire.partition(b"\n")[2].decode("ascii")


def unnumbered_wire(chunk: Chunk) -> bytes:
    """A refusal: for the one request that it answers, never logged."""
    return encode(chunk).encode("ascii")

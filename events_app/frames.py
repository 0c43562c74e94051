"""A frame: one chunk with its number in the session's stream, encoded once for everybody who follows."""

from dataclasses import dataclass
from typing import Self

from events_app.chunks import DELTA_PREFIX, FORWARDED_PREFIX, Chunk, encode

PING = b": ping\n\n"


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

    @property
    def forwarded(self) -> str | None:
        """The JSON of a chunk of the contract, which the old gateway hands on to its clients; None for the rest."""
        _, found, rest = self.wire.partition(FORWARDED_PREFIX.encode())
        return rest.decode("ascii").strip() if found else None

    @classmethod
    def unnumbered(cls, chunk: Chunk) -> Self:
        """For the one request that it answers, never logged."""
        return cls(0, "", encode(chunk).encode("ascii"), is_delta=False)


# The end of a complete answer.
DONE = Frame(0, "", b'event: done\ndata: {"status":"completed"}\n\n', is_delta=False, closes=True)

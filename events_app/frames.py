"""A frame: one chunk with its number in the session's stream, encoded once for everybody who follows."""

from dataclasses import dataclass
from typing import Self

from events_app.chunks import DELTA_PREFIX, FORWARDED_PREFIX, RESTARTED_PREFIX, Chunk, encode, encode_delta

PING = b": ping\n\n"
_FORWARDED = FORWARDED_PREFIX.encode()


# Frozen, it would take four times as long to make, and there is one for each token. Nobody changes it.
@dataclass(slots=True)
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

    @classmethod
    def delta(cls, seq: int, origin: str, text: str) -> Self:
        """A token delta."""
        return cls(seq, origin, f"id: {seq}\n{encode_delta(text)}".encode("ascii"), True)

    @property
    def data(self) -> str:
        """The JSON of its chunk."""
        return self.wire.partition(b"data:")[2].decode("ascii").strip()

    @property
    def body(self) -> str:
        return self.wire.partition(b"\n")[2].decode("ascii")

    @property
    def forwarded(self) -> str | None:
        """The JSON of a chunk of the contract, which the old gateway hands on to its clients; None for the rest."""
        return self.data if _FORWARDED in self.wire else None

    @property
    def numbered(self) -> str:
        """The JSON of its chunk with its number as `id`, for a wire that has no field of its own for it."""
        return f'{{"id":{self.seq},{self.data[1:]}' if self.wire.startswith(b"id:") else self.data

    @property
    def concerns_deltas(self) -> bool:
        """Whether it is one, or says that some are void: nothing to those who read whole chunks alone."""
        return self.is_delta or self.data.startswith(RESTARTED_PREFIX)

    @classmethod
    def unnumbered(cls, chunk: Chunk) -> Self:
        """For the one request that it answers, never logged."""
        return cls(0, "", encode(chunk).encode("ascii"), is_delta=False)


# The end of a complete answer.
DONE = Frame(0, "", b'event: done\ndata: {"status":"completed"}\n\n', is_delta=False, closes=True)

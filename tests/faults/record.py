"""What clients were told while something went wrong, each fact with its time: the checker holds it against what the
server knows in the end."""

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import count
from typing import Any, TypeVar

from tests.server import Frame

F = TypeVar("F", bound="Fact")


@dataclass(kw_only=True)
class Fact:
    session_id: str
    at: float = field(default_factory=time.time)


@dataclass(kw_only=True)
class Answered(Fact):
    """The head of any HTTP answer, after so many seconds."""

    request: str
    status: int
    took: float
    retry_after: str | None = None


@dataclass(kw_only=True)
class Said(Fact):
    """A message was acknowledged."""

    content: str


@dataclass(kw_only=True)
class Reported(Fact):
    """A result was sent; acknowledged, or nobody knows."""

    call_id: str
    text: str
    is_acknowledged: bool = False


@dataclass(kw_only=True)
class Decided(Fact):
    """A decision was confirmed to somebody: as made just now, or as made before."""

    call_id: str
    verdict: str
    by: str
    made_at: str


@dataclass(kw_only=True)
class Opened(Fact):
    """An answer or a stream began, of which the reader wants what comes past number `after`."""

    stream: int
    after: int


@dataclass(kw_only=True)
class Seen(Fact):
    """A numbered frame."""

    stream: int
    number: int
    data: dict[str, Any]

    @property
    def is_delta(self) -> bool:
        """Those alone may be lost."""
        return "token" in self.data


@dataclass(kw_only=True)
class Stuck(Fact):
    """Somebody waited for something that did not come."""

    what: str


class Record:
    """Written to by many threads: appending to a list is one step."""

    def __init__(self) -> None:
        self.facts: list[Fact] = []
        self._streams = count(1)

    def __len__(self) -> int:
        return len(self.facts)

    def add(self, fact: Fact) -> None:
        self.facts.append(fact)

    def saw(self, session_id: str, frames: Iterable[Frame], *, after: int = 0) -> None:
        """The frames of one answer, read by somebody who wants what comes past number `after`."""
        opened = self.open(session_id, after)
        for frame in frames:
            self.see(opened, frame)

    def open(self, session_id: str, after: int) -> Opened:
        opened = Opened(session_id=session_id, stream=next(self._streams), after=after)
        self.add(opened)
        return opened

    def see(self, opened: Opened, frame: Frame) -> None:
        """Those without a number are for one request alone, and are not kept."""
        if frame.id is not None:
            self.add(Seen(session_id=opened.session_id, stream=opened.stream, number=frame.id, data=frame.data))

    def of(self, kind: type[F]) -> list[F]:
        return [fact for fact in self.facts if isinstance(fact, kind)]

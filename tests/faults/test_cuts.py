"""F10: streams that are cut at any byte and resumed."""

from collections.abc import Iterator
from pathlib import Path

from tests.faults.harness import IN_FULL, FaultyServer, Judge, Trial, seed
from tests.faults.record import Said
from tests.faults.talker import AGENT
from tests.scripted_llm import ScriptedLLM, say
from tests.server import eventually, parse_frames

CUTS = 500 if IN_FULL else 40
# More than any frame has.
LONGEST = 2_000
TEXT = " ".join(f"word{number}" for number in range(100))
# So many descriptors more or less are no leak.
SOME = 5


def test_streams_cut_at_random_bytes_are_resumed_byte_for_byte(
    server: FaultyServer, llm: ScriptedLLM, judge: Judge
) -> None:
    trial = Trial("F10", [server], llm, seed=seed())
    llm.default = say(TEXT, pause=0.002)
    server.say("warm", "up", agent_type=AGENT)
    open_before = descriptors(server)

    cuts, differing = 0, []
    while cuts < CUTS:
        session_id = f"cut-{cuts}"
        reader = CutReader(trial, session_id)
        reader.read_an_answer()
        cuts += reader.cuts
        if reader.received != uncut(server, session_id, len(reader.received)):
            differing.append(session_id)

    judge(trial, cuts)
    assert differing == [], f"seed {trial.seed}"
    eventually(lambda: abs(descriptors(server) - open_before) <= SOME)


class CutReader:
    """Reads one answer, cut again and again: first the answer to its message, then the session's stream."""

    def __init__(self, trial: Trial, session_id: str) -> None:
        self.received: list[bytes] = []
        self.cuts = 0
        self._trial = trial
        self._session_id = session_id

    def read_an_answer(self) -> None:
        message = {"type": "user_message", "content": "go", "agent_type": AGENT}
        body: dict[str, object] = {"session_id": self._session_id, "message": message}
        self._read("POST", "/agent/message/stream", body)
        self._trial.record.add(Said(session_id=self._session_id, content="go"))
        while not self.received or b"turn_finished" not in self.received[-1]:
            self._read("GET", f"/sessions/{self._session_id}/stream")

    def _read(self, method: str, path: str, body: dict[str, object] | None = None) -> None:
        """Whole frames up to a random byte; what is behind the last empty line is half a frame, and void."""
        length, piece, received = self._trial.chance.randrange(1, LONGEST), b"", b""
        after = number_of(self.received[-1]) if self.received else 0
        headers = {"Last-Event-ID": str(after)} if after else {}
        with self._trial.server.http.stream(method, path, json=body, headers=headers) as answer:
            assert answer.status_code == 200, answer.read()
            for piece in answer.iter_raw():
                received = (received + piece)[:length]
                if len(received) == length or b"turn_finished" in received:
                    break
        self.cuts += len(received) == length
        whole = [frame for frame in received.split(b"\n\n")[:-1] if frame.startswith(b"id:")]
        self._trial.record.saw(self._session_id, parse_frames(lines(whole)), after=after)
        self.received += whole


def lines(frames: list[bytes]) -> Iterator[str]:
    for frame in frames:
        yield from frame.decode().split("\n")
        yield ""


def number_of(frame: bytes) -> int:
    return int(frame.split(b"\n")[0].removeprefix(b"id: "))


def uncut(server: FaultyServer, session_id: str, frames: int) -> list[bytes]:
    """The same from the log, in one piece."""
    received = b""
    with server.http.stream("GET", f"/sessions/{session_id}/stream") as answer:
        for piece in answer.iter_raw():
            received += piece
            whole = [frame for frame in received.split(b"\n\n")[:-1] if frame.startswith(b"id:")]
            if len(whole) >= frames:
                return whole
    return []


def descriptors(server: FaultyServer) -> int:
    assert server.process is not None
    return sum(1 for _ in Path(f"/proc/{server.process.pid}/fd").iterdir())

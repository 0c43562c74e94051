"""The invariants of the guarantees, section 4, each as a function over evidence. Nothing here asks a server.

There is no chain of hashes in the audit trail yet: of I6 it is held that every decision has its one entry, and every
entry its decision.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from tests.faults.evidence import TERMINAL, Evidence, SessionNow
from tests.faults.record import Answered, Decided, Opened, Reported, Said, Seen, Stuck
from tests.faults.talker import NOTING
from tests.scripted_llm import history_problem

ENDINGS = ("tool.execution.completed", "tool.execution.failed")
RELEASES = ("approve", "edit")
SYSTEM = {"role": "system", "content": "Whoever reads this is strict."}
NEXT = {"role": "user", "content": "And now?"}


@dataclass(frozen=True)
class Complaint:
    invariant: str
    what: str

    def __str__(self) -> str:
        return f"{self.invariant}: {self.what}"


def check(evidence: Evidence) -> list[Complaint]:
    """What is wrong; an empty list, when nothing is."""
    return [Complaint(name, what) for name, holds in INVARIANTS for what in holds(evidence)]


# --- I1: what was acknowledged is there -----------------------------------------------------------------------------


def sessions_are_there(evidence: Evidence) -> Iterator[str]:
    told_of = {fact.session_id for fact in evidence.facts if isinstance(fact, Said | Seen | Decided | Reported)}
    for session_id in sorted(told_of):
        if not evidence.sessions[session_id].exists:
            yield f"session {session_id} is gone"


def messages_are_in_history(evidence: Evidence) -> Iterator[str]:
    acknowledged: defaultdict[str, list[str]] = defaultdict(list)
    for said in _of(evidence, Said):
        acknowledged[said.session_id].append(said.content)
    for session_id, contents in acknowledged.items():
        stored = _contents(evidence.sessions[session_id], "user")
        yield from (f"message {content!r} of {session_id} is lost" for content in contents if content not in stored)
        kept = [content for content in contents if content in stored]
        if kept != sorted(kept, key=stored.index):
            yield f"the messages of {session_id} are not in the order of their acknowledgement"


def results_are_in_history(evidence: Evidence) -> Iterator[str]:
    sent: defaultdict[str, list[str]] = defaultdict(list)
    acknowledged = {}
    for reported in _of(evidence, Reported):
        sent[reported.call_id].append(reported.text)
        if reported.is_acknowledged:
            acknowledged[reported.call_id] = reported.session_id
    verdicts = dict(evidence.decisions)
    for call_id, session_id in acknowledged.items():
        answers = [one["content"] for one in _results(evidence.sessions[session_id]) if one["tool_call_id"] == call_id]
        if not answers:
            yield f"the result of {call_id} is lost"
        elif verdicts.get(call_id, "approve") not in RELEASES:
            continue  # the rejection was faster, and is its answer
        elif not any(text in answers[0] for text in sent[call_id]):
            yield f"the result of {call_id} is {answers[0]!r}, which nobody sent"


def decisions_stand(evidence: Evidence) -> Iterator[str]:
    for decided in _of(evidence, Decided):
        now = evidence.sessions[decided.session_id].approvals.get(decided.call_id)
        if now is None:
            yield f"the request {decided.call_id} is lost"
        elif now["decision"] != decided.verdict:
            yield f"{decided.call_id} was decided: {decided.verdict}, and now {now['decision']}"
        elif (now["decided_by"], now["decided_at"]) != (decided.by, decided.made_at):
            yield f"{decided.call_id} was decided by {decided.by} at {decided.made_at}, and now by others or later"


def frames_are_replayed(evidence: Evidence) -> Iterator[str]:
    replays = {session_id: dict(now.replay) for session_id, now in evidence.sessions.items()}
    for seen in _of(evidence, Seen):
        if not seen.is_delta and replays[seen.session_id].get(seen.number) != seen.data:
            yield f"frame {seen.number} of {seen.session_id} ({seen.data.get('type')}) is lost"


def what_frames_told_is_so(evidence: Evidence) -> Iterator[str]:
    statuses = {turn.turn_id.replace("-", ""): turn.status for turn in evidence.turns}
    for seen in _of(evidence, Seen):
        now, data = evidence.sessions[seen.session_id], seen.data
        match data.get("type"):
            case "assistant_message" if "content" in data and data["content"] not in _contents(now, "assistant"):
                yield f"the answer {data['content']!r} of {seen.session_id} is not in its history"
            case "tool_call" if data["call_id"] not in {call["id"] for call in _calls(now)}:
                yield f"the call {data['call_id']} is not in the history"
            case "turn_finished" if statuses.get(data["turn_id"].replace("-", "")) != data["status"]:
                yield f"turn {data['turn_id']} was {data['status']}, and is not"


def facts_are_recorded(evidence: Evidence) -> Iterator[str]:
    events = Counter(
        (session_id, kind, data.get("role") or data.get("call_id")) for session_id, kind, data in evidence.events
    )
    for session_id, now in evidence.sessions.items():
        for role in ("user", "assistant"):
            told, stored = events[session_id, "session.message.added", role], len(_contents(now, role))
            if told != stored:
                yield f"{session_id} has {stored} messages of its {role}, and {told} events tell of them"
    for decided in _of(evidence, Decided):
        if not events[decided.session_id, "hitl.decision.made", decided.call_id]:
            yield f"no event tells of the decision on {decided.call_id}"
    verdicts = dict(evidence.decisions)
    for reported in _of(evidence, Reported):
        ended = sum(events[reported.session_id, kind, reported.call_id] for kind in ENDINGS)
        if reported.is_acknowledged and not ended and verdicts.get(reported.call_id, "approve") in RELEASES:
            yield f"no event tells of the end of {reported.call_id}"


# --- I2: numbers ----------------------------------------------------------------------------------------------------


def numbers_increase(evidence: Evidence) -> Iterator[str]:
    last: dict[int, int] = {opened.stream: opened.after for opened in _of(evidence, Opened)}
    for seen in _of(evidence, Seen):
        if seen.number <= last[seen.stream]:
            yield f"number {seen.number} of {seen.session_id} came after {last[seen.stream]}"
        last[seen.stream] = seen.number
    for session_id, now in evidence.sessions.items():
        numbers = [number for number, _ in now.replay]
        if numbers != sorted(set(numbers)):
            yield f"the numbers of {session_id} do not increase when it is replayed"


def numbers_are_used_once(evidence: Evidence) -> Iterator[str]:
    used: dict[tuple[str, int], Any] = {
        (session_id, number): data for session_id, now in evidence.sessions.items() for number, data in now.replay
    }
    for seen in _of(evidence, Seen):
        if used.setdefault((seen.session_id, seen.number), seen.data) != seen.data:
            yield f"number {seen.number} of {seen.session_id} was used twice"


# --- I3: at most once -----------------------------------------------------------------------------------------------


def calls_happen_once(evidence: Evidence) -> Iterator[str]:
    happened: Counter[tuple[str, str]] = Counter()
    for now in evidence.sessions.values():
        for _, data in now.replay:
            if data.get("type") in ("tool_call", "approval_resolved"):
                happened[data["call_id"], data["type"]] += 1
        happened.update((one["tool_call_id"], "result in its history") for one in _results(now))
    happened.update((call_id, "decision") for call_id, _ in evidence.decisions)
    for _, kind, data in evidence.events:
        if kind in ("tool.execution.started", "hitl.decision.made"):
            happened[data["call_id"], kind] += 1
        elif kind in ENDINGS:
            happened[data["call_id"], "end"] += 1
    yield from (f"{call_id} has {times} times: {what}" for (call_id, what), times in happened.items() if times > 1)


def servers_calls_were_executed(evidence: Evidence) -> Iterator[str]:
    """At least once, and only what was asked for: what a tool does once more, it does under the same key."""
    asked = {call["id"] for now in evidence.sessions.values() for call in _calls(now)}
    answered = {
        one["tool_call_id"]
        for now in evidence.sessions.values()
        for one in _results(now)
        if one["name"] == NOTING and '"noted"' in one["content"]
    }
    yield from (f"{call_id} was answered and never executed" for call_id in answered - set(evidence.executed))
    yield from (f"{call_id} was executed and nobody asked for it" for call_id in set(evidence.executed) - asked)


def turns_end_once(evidence: Evidence) -> Iterator[str]:
    ended = Counter(
        data["turn_id"]
        for now in evidence.sessions.values()
        for _, data in now.replay
        if data.get("type") == "turn_finished"
    )
    yield from (f"turn {turn_id} ended {times} times" for turn_id, times in ended.items() if times > 1)


def calls_are_told_under_one_number(evidence: Evidence) -> Iterator[str]:
    numbers: defaultdict[tuple[str, str], set[int]] = defaultdict(set)
    for seen in _of(evidence, Seen):
        if seen.data.get("type") in ("tool_call", "approval_resolved"):
            numbers[seen.data["call_id"], seen.data["type"]].add(seen.number)
    for (call_id, what), all_of in numbers.items():
        if len(all_of) > 1:
            yield f"{what} of {call_id} came under the numbers {sorted(all_of)}"


def decisions_are_confirmed_alike(evidence: Evidence) -> Iterator[str]:
    confirmed: defaultdict[str, set[str]] = defaultdict(set)
    for decided in _of(evidence, Decided):
        confirmed[decided.call_id].add(decided.verdict)
    yield from (f"{call_id} was decided: {sorted(all_of)}" for call_id, all_of in confirmed.items() if len(all_of) > 1)


def messages_are_stored_once(evidence: Evidence) -> Iterator[str]:
    """Nobody says the same thing twice in a session here."""
    for session_id, now in evidence.sessions.items():
        for content, times in Counter(_contents(now, "user")).items():
            if times > 1:
                yield f"{session_id} has {content!r} {times} times"


# --- I4: nothing stands still ---------------------------------------------------------------------------------------


def turns_are_over(evidence: Evidence) -> Iterator[str]:
    """The evidence is gathered when all could have ended; a turn may wait, as long as it waits for something."""
    for turn in evidence.turns:
        now = evidence.sessions.get(turn.session_id)
        waits = turn.status == "waiting" and (now is None or now.open_calls)
        if turn.status not in TERMINAL and not waits:
            yield f"turn {turn.turn_id} of {turn.session_id} is {turn.status}"


def nobody_waited_in_vain(evidence: Evidence) -> Iterator[str]:
    yield from (f"{stuck.session_id}: {stuck.what}" for stuck in _of(evidence, Stuck))


# --- I5: a history that every provider takes ------------------------------------------------------------------------


def histories_are_acceptable(evidence: Evidence) -> Iterator[str]:
    for session_id, now in evidence.sessions.items():
        if problem := history_problem([SYSTEM, *_alternating([*now.history, NEXT], now.open_calls)]):
            yield f"the history of {session_id}: {problem}"


def the_model_refused_none(evidence: Evidence) -> Iterator[str]:
    yield from evidence.refused_by_the_model


# --- I6: the audit trail --------------------------------------------------------------------------------------------


def decisions_are_audited(evidence: Evidence) -> Iterator[str]:
    made, audited = Counter(evidence.decisions), Counter(evidence.audited)
    yield from (f"{verdict} on {call_id} has no audit entry" for call_id, verdict in made - audited)
    yield from (
        f"the audit trail tells of {verdict} on {call_id}, which nobody made" for call_id, verdict in audited - made
    )
    known = {call_id for call_id, _ in evidence.decisions}
    for decided in _of(evidence, Decided):
        if decided.call_id not in known:
            yield f"the decision on {decided.call_id} was confirmed, and none is stored"


# --- I7, I8, I9 -----------------------------------------------------------------------------------------------------


def health_comes_back(evidence: Evidence) -> Iterator[str]:
    for outage in evidence.outages:
        if outage.seconds is None or outage.seconds > evidence.back_within:
            yield f"after {outage.fault} the server was well again after {outage.seconds} s"


def refusals_say_when_to_come_back(evidence: Evidence) -> Iterator[str]:
    for answer in _of(evidence, Answered):
        if answer.status >= 500 and (answer.status != 503 or not answer.retry_after):
            yield f"{answer.request} was answered {answer.status}, Retry-After {answer.retry_after}"
    for seen in _of(evidence, Seen):
        if seen.data.get("type") == "error" and seen.data.get("metadata", {}).get("code") == "internal_error":
            yield f"frame {seen.number} of {seen.session_id} is an internal error"


def no_secret_is_logged(evidence: Evidence) -> Iterator[str]:
    for line in evidence.log.splitlines():
        yield from (
            f"a log line has the secret {secret[:6]}...: {line[:60]}" for secret in evidence.secrets if secret in line
        )


INVARIANTS: list[tuple[str, Callable[[Evidence], Iterable[str]]]] = [
    ("I1", sessions_are_there),
    ("I1", messages_are_in_history),
    ("I1", results_are_in_history),
    ("I1", decisions_stand),
    ("I1", frames_are_replayed),
    ("I1", what_frames_told_is_so),
    ("I1", facts_are_recorded),
    ("I2", numbers_increase),
    ("I2", numbers_are_used_once),
    ("I3", calls_happen_once),
    ("I3", servers_calls_were_executed),
    ("I3", turns_end_once),
    ("I3", calls_are_told_under_one_number),
    ("I3", decisions_are_confirmed_alike),
    ("I3", messages_are_stored_once),
    ("I4", turns_are_over),
    ("I4", nobody_waited_in_vain),
    ("I5", histories_are_acceptable),
    ("I5", the_model_refused_none),
    ("I6", decisions_are_audited),
    ("I7", health_comes_back),
    ("I8", refusals_say_when_to_come_back),
    ("I9", no_secret_is_logged),
]


# --- reading the evidence -------------------------------------------------------------------------------------------


def _of(evidence: Evidence, kind: type[Any]) -> list[Any]:
    return [fact for fact in evidence.facts if isinstance(fact, kind)]


def _contents(now: SessionNow, role: str) -> list[str]:
    return [one["content"] for one in now.history if one["role"] == role]


def _results(now: SessionNow) -> list[dict[str, Any]]:
    return [one for one in now.history if one["role"] == "tool"]


def _calls(now: SessionNow) -> list[dict[str, Any]]:
    return [call for one in now.history for call in one.get("tool_calls") or ()]


def _alternating(history: list[dict[str, Any]], open_calls: list[str]) -> Iterator[dict[str, Any]]:
    """As the server writes it for a model: users' messages that follow one another as one, and up to the calls that
    are still open."""
    previous = ""
    for one in history:
        if any(call["id"] in open_calls for call in one.get("tool_calls") or ()):
            return
        if one["role"] == "user" == previous:
            continue
        previous = one["role"]
        yield one

"""F1: the process is killed, at every point of a conversation and at random moments of many."""

from tests.faults.conversation import NEVER, killed_at
from tests.faults.harness import IN_FULL, FaultyServer, Judge, Trial, seed
from tests.scripted_llm import ScriptedLLM

POINTS = 4
CONVERSATIONS = 10
KILLS = 200 if IN_FULL else 2
TALKERS = 20 if IN_FULL else 8


def test_killed_at_every_point_of_a_conversation(server: FaultyServer, llm: ScriptedLLM, judge: Judge) -> None:
    """One with a routed message, one for a named agent, calls of the client and of the server, and decisions."""
    trial = Trial("F1a", [server], llm, seed=seed())
    # The first claim of all writes down the team, which later ones find.
    killed_at(trial, server, NEVER)
    before = len(server.points())
    assert not killed_at(trial, server, NEVER)
    passed = server.points()[before:]
    points = trial.chance.sample(range(1, len(passed) + 1), len(passed) if IN_FULL else POINTS)

    died = [point for point in points if trial.has_time and killed_at(trial, server, point)]
    if IN_FULL and trial.has_time:
        # What is streamed is committed by the clock and leases are renewed by it, so not every number is the same point
        # each time: those at which nobody died are named. Not every conversation has each of them.
        for point in sorted(set(passed) - set(server.acted())):
            died += [1] * any(killed_at(trial, server, point) for _ in range(CONVERSATIONS))

    judge(trial, len(died))
    assert died
    if IN_FULL and trial.has_time:
        missed = set(passed) - set(server.acted())
        assert missed == set(), f"nobody died here: {missed}"


def test_killed_at_random_moments_while_many_talk(server: FaultyServer, llm: ScriptedLLM, judge: Judge) -> None:
    trial = Trial("F1b", [server], llm, seed=seed())
    with trial.conversations(TALKERS):
        kills = 0
        while kills < KILLS and trial.has_time:
            trial.some_more(trial.chance.randrange(1, 60 * TALKERS))
            server.kill()
            trial.restart()
            kills += 1

    judge(trial, kills)

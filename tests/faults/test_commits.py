"""F6: commits that happen and are reported as failed, with the connection or without it; and those that do fail."""

import pytest

from tests.faults.conversation import NEVER, have_a_conversation
from tests.faults.harness import IN_FULL, FaultyServer, Judge, Trial, seed
from tests.faults.inside import COMMITTED, CUT, REFUSED
from tests.scripted_llm import ScriptedLLM

COMMITS = 3
CONVERSATIONS = 10


@pytest.mark.parametrize("act", [COMMITTED, CUT, REFUSED])
def test_every_commit_of_a_conversation_is_reported_as_failed(
    server: FaultyServer, llm: ScriptedLLM, judge: Judge, act: str
) -> None:
    trial = Trial(f"F6 {act}", [server], llm, seed=seed())

    def failing_at(commit: int | str) -> bool:
        """Have a conversation of which this commit fails; False: it has none like it."""
        before = len(server.acted())
        server.plan(act, commit)
        have_a_conversation(trial.talker())
        return len(server.acted()) > before

    # The first claim of all writes down the team: its commit is the second one, after the message's.
    first = failing_at(2)
    before = len(server.points())
    assert not failing_at(NEVER)
    passed = server.points()[before:]
    commits = list(range(1, len(passed) + 1))
    if not IN_FULL:
        commits = sorted(trial.chance.sample(commits, COMMITS))

    failed = [commit for commit in commits if failing_at(commit)]
    assert first and failed
    if IN_FULL:
        # Not every number is the same commit each time: writes of which none failed are named. Not every conversation
        # has each of them.
        for write in sorted(written(passed) - written(server.acted())):
            failed += [1] * any(failing_at(write) for _ in range(CONVERSATIONS))
    server.forget_plan()

    judge(trial, 1 + len(failed))
    if IN_FULL:
        missed = written(passed) - written(server.acted())
        assert missed == set(), f"these writes were never in a commit that failed: {missed}"


def written(commits: list[str]) -> set[str]:
    """Every write of these commits."""
    return {label for commit in commits for label in commit.split("; ")}

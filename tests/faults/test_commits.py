"""F6: commits that happen and are reported as failed, with the connection or without it; and those that do fail."""

import pytest

from tests.faults.conversation import NEVER, have_a_conversation
from tests.faults.harness import IN_FULL, FaultyServer, Judge, Trial, seed
from tests.faults.inside import COMMITTED, CUT, REFUSED
from tests.scripted_llm import ScriptedLLM

COMMITS = 3
# So many conversations in a row have each of the writes; some depend on what is decided.
CONVERSATIONS = 30
# Every write of a turn, of its decisions and of its results.
WRITES = {
    "INSERT events_app_event (agents_app/approvals.py:_carry_out)",
    "INSERT events_app_auditentry (agents_app/approvals.py:_write_down)",
    "INSERT events_app_event (agents_app/approvals.py:_write_down)",
    "INSERT events_app_event (agents_app/approvals.py:answer)",
    "INSERT agents_app_decision (agents_app/approvals.py:decide)",
    "UPDATE agents_app_approvalrequest (agents_app/approvals.py:decide)",
    "INSERT agents_app_approvalrequest (agents_app/approvals.py:request)",
    "INSERT events_app_event (agents_app/handoffs.py:hand_over)",
    "UPDATE sessions_app_turn (agents_app/handoffs.py:hand_over)",
    "INSERT agents_app_teamversion (agents_app/team.py:_store)",
    "UPDATE agents_app_teamnow (agents_app/team.py:_pin_anew)",
    "INSERT events_app_event (messages_app/acceptance.py:_open_turn)",
    "INSERT messages_app_message (messages_app/models.py:say)",
    "INSERT sessions_app_turn (messages_app/acceptance.py:_open_turn)",
    "UPDATE sessions_app_session (messages_app/acceptance.py:_open_turn)",
    "INSERT events_app_auditentry (messages_app/acceptance.py:_write_down_late)",
    "INSERT events_app_event (messages_app/claims.py:_take)",
    "INSERT events_app_streambatch (messages_app/claims.py:_take)",
    "UPDATE sessions_app_turn (messages_app/claims.py:renew_leases)",
    "INSERT events_app_streambatch (messages_app/claims.py:write_batches)",
    "INSERT events_app_modelcall (messages_app/steps.py:_book)",
    "INSERT sessions_app_toolcall (messages_app/steps.py:_close)",
    "INSERT sessions_app_toolcall (messages_app/steps.py:_let_go)",
    "INSERT events_app_event (messages_app/turn_stream.py:_write_step)",
    "INSERT events_app_streambatch (messages_app/turn_stream.py:_write_step)",
    "INSERT events_app_event (sessions_app/lifecycle.py:create)",
    "INSERT sessions_app_session (sessions_app/lifecycle.py:create)",
    "INSERT events_app_streambatch (sessions_app/lifecycle.py:emit)",
    "UPDATE sessions_app_toolcall (sessions_app/models.py:_move)",
    "UPDATE sessions_app_session (sessions_app/models.py:answer_with)",
    "UPDATE sessions_app_turn (sessions_app/models.py:claim)",
    "UPDATE sessions_app_session (sessions_app/models.py:leave)",
    "UPDATE sessions_app_turn (sessions_app/models.py:go_on)",
    "INSERT sessions_app_handoff (sessions_app/models.py:hand_over)",
    "UPDATE sessions_app_session (sessions_app/models.py:hand_over)",
    "UPDATE sessions_app_turn (sessions_app/models.py:progress)",
    "UPDATE sessions_app_session (sessions_app/models.py:count_messages)",
    "UPDATE sessions_app_session (sessions_app/models.py:reserve_numbers)",
}
FIRST_CLAIM = "INSERT agents_app_teamversion (agents_app/team.py:_store)"


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

    # Once and for all, before anything else is claimed.
    first = failing_at(FIRST_CLAIM)
    before = len(server.points())
    assert not failing_at(NEVER)
    passed = server.points()[before:]
    commits = list(range(1, len(passed) + 1))
    if not IN_FULL:
        commits = sorted(trial.chance.sample(commits, COMMITS))

    failed = [first, *map(failing_at, commits)]
    if IN_FULL:
        # Not every number is the same commit each time, and not every conversation has each of them: the writes of
        # which none failed are named.
        while missed := sorted((WRITES | written(passed)) - written(server.acted())):
            found = any(failing_at(missed[0]) for _ in range(CONVERSATIONS))
            assert found, f"this write is in no commit: {missed[0]}"
            failed.append(found)
    server.forget_plan()

    judge(trial, sum(failed))
    assert first


def written(commits: list[str]) -> set[str]:
    """Every write of these commits."""
    return {label for commit in commits for label in commit.split("; ")}

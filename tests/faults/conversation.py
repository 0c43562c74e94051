"""A whole conversation, and one during which the server dies at a point."""

from concurrent.futures import ThreadPoolExecutor

from tests.faults.harness import FaultyServer, Trial, message
from tests.faults.inside import CRASH
from tests.faults.talker import Talker
from tests.server import eventually

# A conversation has fewer points.
NEVER = 10**6
MESSAGES = 2


def have_a_conversation(one: Talker) -> None:
    """A message that is routed and one for a named agent, with calls, decisions, results and handovers."""
    for number in range(MESSAGES):
        one.converse(**message(number))
    one.close()


def killed_at(trial: Trial, server: FaultyServer, point: int | str) -> bool:
    """Have a conversation during which the server dies at this point, and is started again; whether it did."""
    one = trial.talker()
    server.plan(CRASH, point)
    with ThreadPoolExecutor(1) as pool:
        talking = pool.submit(have_a_conversation, one)
        eventually(lambda: talking.done() or server.has_crashed, seconds=60)
        has_crashed = server.has_crashed
        server.forget_plan()
        if has_crashed:
            trial.restart()
        talking.result()
    return has_crashed

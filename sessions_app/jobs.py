"""Jobs for the workers of a scaled installation: which sessions have a turn to run."""

from datetime import timedelta

from django.db.models.functions import Now

RUN_TURNS = "run_turns"
QUEUE = "turns"
# Workers say every few seconds that they live.
HEARTBEAT_SECONDS = 3.0
DEAD_AFTER_SECONDS = 15.0


def run_turns(*session_ids: str) -> None:
    """One job for each session, in the caller's transaction; workers hear of them with its commit."""
    # Procrastinate is installed, and has its tables, in a scaled installation alone.
    from procrastinate.contrib.django.django_connector import DjangoConnector
    from procrastinate.manager import JobManager
    from procrastinate.tasks import configure_task
    from procrastinate.types import JSONValue

    # Not by the app: a worker's has connections of its own, and its jobs would not share our transaction.
    manager = JobManager(DjangoConnector())
    # Without a lock for the session: a job that waits for one is found by polling alone, and claims keep the order.
    deferrer = configure_task(name=RUN_TURNS, job_manager=manager, queue=QUEUE)
    each: list[dict[str, JSONValue]] = [{"session_id": session_id} for session_id in session_ids]
    deferrer.batch_defer(*each)


def has_worker() -> bool:
    """Whether any worker lives."""
    from procrastinate.contrib.django.models import ProcrastinateWorker

    since = Now() - timedelta(seconds=DEAD_AFTER_SECONDS)
    return ProcrastinateWorker.objects.filter(last_heartbeat__gt=since).exists()  # type: ignore[misc]

"""What dead workers left behind: jobs that they had begun, turns that may run and that no job names."""

import logging
from contextlib import suppress

from django.db import transaction
from django.db.models.fields.json import KeyTextTransform
from procrastinate.contrib.django.models import ProcrastinateJob
from procrastinate.exceptions import ConnectorException
from procrastinate.jobs import Status
from procrastinate.manager import JobManager

from events_app.database import hop
from sessions_app import jobs
from sessions_app.models import Turn

logger = logging.getLogger(__name__)

SESSIONS_AT_ONCE = 1_000


async def recover(manager: JobManager) -> None:
    """End the jobs of dead workers, then have every turn run that may and that no waiting job names."""
    for job in await manager.get_stalled_jobs(seconds_since_heartbeat=jobs.DEAD_AFTER_SECONDS):
        logger.warning("job_of_dead_worker", extra={"job_id": job.id, "session_id": job.task_kwargs.get("session_id")})
        with suppress(ConnectorException):  # another worker has ended it in the same moment
            await manager.finish_job(job, status=Status.FAILED, delete_job=True)
    while await hop(_requeue) == SESSIONS_AT_ONCE:
        pass


@transaction.atomic
def _requeue() -> int:
    """Jobs for sessions whose next turn nobody runs; how many. One too many does no harm: it finds nothing to claim."""
    waiting = ProcrastinateJob.objects.filter(task_name=jobs.RUN_TURNS, status="todo")  # type: ignore[misc]
    told = waiting.annotate(of=KeyTextTransform("session_id", "args")).values("of")
    runnable = Turn.objects.claimable().exclude(session__in=told)
    session_ids = list(runnable.values_list("session_id", flat=True)[:SESSIONS_AT_ONCE])
    if session_ids:
        jobs.run_turns(*session_ids)
    return len(session_ids)

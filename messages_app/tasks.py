"""What Procrastinate's workers do: run turns; every so often recover what dead ones left, end calls whose time is over,
and prune what is old.
"""

from typing import cast

from procrastinate import JobContext
from procrastinate.contrib.django import app

from messages_app import recovery, runner
from sessions_app import jobs

FAILED_JOBS_KEPT_HOURS = 7 * 24


@app.task(name=jobs.RUN_TURNS, queue=jobs.QUEUE, pass_context=True)
async def run_turns(context: JobContext, *, session_id: str) -> None:
    """Have this worker's runner run the turns of a session.

    The job is over when the first of them is claimed: Procrastinate's worker, which ends when its connection breaks,
    waits for its jobs and fetches none meanwhile.
    """
    await cast(runner.Runner, context.additional_context["runner"]).take_up(session_id)


# The sixth field of a cron expression is the seconds. Before all turns that wait, and never twice in the queue.
@app.periodic(cron="* * * * * */5")
@app.task(name="recover", queue=jobs.QUEUE, queueing_lock="recover", priority=100, pass_context=True)
async def recover(context: JobContext, timestamp: int) -> None:
    await recovery.recover(context.app.job_manager)


@app.periodic(cron="* * * * * */5")
@app.task(name="end_overdue_calls", queue=jobs.QUEUE, queueing_lock="end_overdue_calls", priority=100)
async def end_overdue_calls(timestamp: int) -> None:
    await runner.end_overdue_calls()


@app.periodic(cron="*/10 * * * *")
@app.task(name="prune", queue=jobs.QUEUE, queueing_lock="prune", priority=100, pass_context=True)
async def prune(context: JobContext, timestamp: int) -> None:
    await runner.prune()
    await context.app.job_manager.delete_old_jobs(FAILED_JOBS_KEPT_HOURS, include_failed=True, include_aborted=True)

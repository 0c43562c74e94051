"""Whose it is, where it happens, and in what state: accounts, sessions, turns, tool calls, handoffs, request keys."""

import json
import secrets
import string
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any, Self

from django.conf import settings
from django.db import connection, models
from django.db.models import Case, Exists, F, OuterRef, Q, QuerySet, When
from django.db.models.expressions import Combinable, CombinedExpression
from django.db.models.functions import Coalesce, Now
from django.utils import timezone

from events_app.prepared import Insert, Rows, Slot, Update
from orchestrator_site.errors import Conflict, NotFound
from sessions_app.callers import Caller

ORCHESTRATOR = "orchestrator"


class UnknownSession(NotFound):
    code = "session_not_found"


class SessionIdTaken(Conflict):
    code = "session_id_taken"


class TurnMoved(Conflict):
    code = "turn_moved"


class CallMoved(Conflict):
    code = "call_moved"


# The code of a turn that is parked because its runners died with it.
RUNNER_LOST = "runner_lost"
# What a released call is said to be that is no client's to execute.
EXECUTING = "executing"


class LostClaim(Exception):
    """The turn is no longer this runner's: another one took it over, or it has ended."""


class CancelRequested(Exception):
    """Somebody cancelled the turn while this runner worked on it."""


_LETTERS = string.ascii_letters + string.digits


def new_id() -> str:
    return str(uuid.uuid4())


def stored_object(text: str) -> dict[str, Any]:
    """The object in a column of canonical JSON. One that somebody damaged is shown as what it is, so that whoever reads
    others beside it still can; nothing of it is released, for its hash is another.
    """
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    return value if isinstance(value, dict) else {"unreadable": text}


def new_call_id() -> str:
    """An id of our own: providers repeat theirs or leave them out (protocol 2)."""
    return "call_" + "".join(secrets.choice(_LETTERS) for _ in range(22))


class Account(models.Model):
    """The tenant. Every row belongs to one; until keys have owners there is the one that a migration seeds."""

    name = models.CharField(max_length=100, unique=True)
    created_at = models.DateTimeField(db_default=Now())

    def __str__(self) -> str:
        return self.name


class SessionQuerySet(QuerySet["Session"]):
    def visible_to(self, caller: Caller) -> Self:
        """The only way to a session on somebody's behalf: not deleted, and of the caller's account."""
        return self.filter(account_id=caller.account_id, deleted_at__isnull=True)

    def one_visible_to(self, caller: Caller, session_id: str) -> "Session":
        """The session, or UnknownSession: the same for a stranger's, a deleted one and one that never was."""
        try:
            return self.visible_to(caller).get(pk=session_id)
        except Session.DoesNotExist:
            raise UnknownSession(f"Session {session_id} not found") from None

    def locked(self) -> Self:
        """Lock the rows: whoever gives numbers or moves turns of a session takes its row first."""
        return self.select_for_update()


class Stamp(models.DateTimeField):
    """A time that the database gives, and returns from the insert itself: to read it would take a query more."""

    db_returning = True

    def deconstruct(self) -> Any:
        name, _, args, kwargs = super().deconstruct()
        return name, "django.db.models.DateTimeField", args, kwargs  # to migrations it is nothing else


class Session(models.Model):
    """One conversation. Its row also hands out the numbers of its stream and of its turns."""

    id = models.CharField(primary_key=True, max_length=128, default=new_id)
    account = models.ForeignKey(Account, on_delete=models.PROTECT, related_name="sessions")
    title = models.CharField(max_length=500, null=True)  # noqa: DJ001 (null is what clients are shown)
    current_agent = models.CharField(max_length=32, default=ORCHESTRATOR)
    switch_count = models.PositiveIntegerField(default=0)
    message_count = models.PositiveIntegerField(default=0)
    turn_count = models.PositiveIntegerField(default=0)
    is_active = models.BooleanField(default=True)
    next_seq = models.BigIntegerField(default=1, help_text="The next number of its stream that nobody has reserved.")
    pruned_seq = models.BigIntegerField(default=0, help_text="The last number of its stream that was pruned.")
    last_activity = Stamp(db_default=Now())
    created_at = Stamp(db_default=Now())
    deleted_at = models.DateTimeField(null=True)

    objects = SessionQuerySet.as_manager()

    class Meta:
        ordering = ["-last_activity", "id"]
        indexes = [
            models.Index(fields=["account", "-last_activity", "id"], name="session_by_activity"),
            models.Index(fields=["last_activity"], name="session_by_last_activity"),
        ]

    def __str__(self) -> str:
        return self.title or self.pk

    def reserve_numbers(self, count: int) -> int:
        """Take the next `count` numbers of the stream and return the first; the caller holds the row's lock."""
        first = self.next_seq
        numbers_reserved(id=self.pk, count=count)
        self.next_seq = first + count
        return first

    def count_messages(self, count: int) -> None:
        """So many were stored in this transaction."""
        if count:
            messages_counted(id=self.pk, count=count)

    def leave(self, messages: int, first: int, end: int) -> None:
        """At the end of a turn: count its last messages, and return the numbers from `first` up to `end` that nobody
        saw, unless others were given since.
        """
        if messages:
            left_with_messages(id=self.pk, count=messages, first=first, end=end)
        else:
            numbers_given_back(id=self.pk, first=first, end=end)

    def live_turn(self) -> "Turn | None":
        """The turn whose runner gives the stream's numbers, if there is one; the caller holds the row's lock.

        It stays so to the end of the transaction: neither can the lease be renewed nor anything be written by it.
        """
        running = list(self.turns.filter(status=Turn.Status.RUNNING).values_list("pk", flat=True))
        return Turn.objects.lock_live(running).first() if running else None

    def hand_over(self, to: str, *, reason: str, confidence: str | None, turn_id: uuid.UUID | None) -> "Handoff":
        """Pass the session to another agent; the caller holds the row's lock."""
        handoff = self.handoffs.create(
            from_agent=self.current_agent,
            to_agent=to,
            reason=reason,
            confidence=confidence,
            turn_id=turn_id,
            after_position=self.turn_count,
        )
        Session.objects.filter(pk=self.pk).update(current_agent=to, switch_count=F("switch_count") + 1)
        self.current_agent = to
        self.switch_count += 1
        return handoff


@dataclass(frozen=True, slots=True)
class Claim:
    """A runner's hold on a turn. Every write names owner and attempt, so that a stale runner can write nothing."""

    turn_id: uuid.UUID
    session_id: str
    account_id: int
    owner: str
    attempt: int
    first_seq: int
    block_end: int
    settled_seq: int
    requested_agent: str
    ran_ms: int
    team_version: int

    @property
    def fence(self) -> dict[str, Any]:
        """What every write names."""
        return {"turn_id": self.turn_id, "held_by": self.owner, "claimed_as": self.attempt}


def unclaimed() -> Q:
    """Turns that a runner may take: queued, released, or lost by a runner whose lease ran out."""
    return Q(status=Turn.Status.QUEUED) | Q(status=Turn.Status.RUNNING, lease_until__lte=Now())


def losses() -> Case:
    """How many runners in a row died with an unclaimed turn; one that was released has nobody's name on it."""
    died = Q(status=Turn.Status.RUNNING) & ~Q(owner="")
    return Case(
        When(died, then=F("lost_count") + 1), default=F("lost_count"), output_field=models.PositiveSmallIntegerField()
    )


class TurnQuerySet(QuerySet["Turn"]):
    def unfinished(self) -> Self:
        return self.filter(status__in=Turn.UNFINISHED)

    def claimable(self) -> Self:
        """Queued turns with no unfinished one before them, and running ones without a runner; oldest first.

        With their `losses`: how many runners in a row died with them.
        """
        before = Turn.objects.unfinished().filter(session=OuterRef("session"), position__lt=OuterRef("position"))
        return (
            self.filter(unclaimed())
            .filter(~Exists(before))
            .annotate(losses=losses())
            .order_by("created_at", "position")
        )

    def locked_with_sessions(self) -> Self:
        """Lock the rows and those of their sessions, which come along, but for what somebody else has locked."""
        return self.select_related("session").select_for_update(of=("self", "session"), skip_locked=True)

    def trusted(self) -> Self:
        """Of claimable turns those that may run beside any others."""
        return self.filter(losses__lt=settings.TURN_MAX_LOSSES - 1)

    def suspect(self) -> Self:
        """Of claimable turns those that one more death is to tell apart; whoever lost most comes first."""
        return self.filter(losses__gte=settings.TURN_MAX_LOSSES - 1).order_by("-losses", "created_at", "position")

    def condemned(self) -> Self:
        """Of claimable turns those that killed their runners. One that is to be cancelled only has to be told."""
        return self.filter(losses__gte=settings.TURN_MAX_LOSSES, is_singled_out=True, cancel_requested_at__isnull=True)

    def suspected(self) -> Self:
        """Running turns that were suspect when they were claimed and have not settled a step since."""
        return self.filter(status=Turn.Status.RUNNING, lost_count__gte=settings.TURN_MAX_LOSSES - 1)

    def held_by(self, owner: Any) -> Self:
        return self.filter(status=Turn.Status.RUNNING, owner=owner)

    def held(self, turn_id: Any, owner: Any, attempt: Any) -> Self:
        """The turn that a runner has claimed and holds."""
        # A lease that ran out counts for nothing even if nobody took over: others may have given numbers since.
        return self.filter(
            pk=turn_id, status=Turn.Status.RUNNING, owner=owner, attempt=attempt, lease_until__gt=Now()
        ).order_by()

    def stray(self, owner: str, known: Iterable[uuid.UUID]) -> Self:
        """Turns that bear a runner's name and that it knows nothing of: the commit of their claim was reported as
        failed. What has missed two renewals is not being claimed right now.
        """
        missed = Now() + timedelta(seconds=settings.TURN_LEASE_SECONDS - 2 * settings.TURN_LEASE_RENEWAL_SECONDS)
        return self.held_by(owner).filter(lease_until__lt=missed).exclude(pk__in=list(known))

    def lock_live(self, turn_ids: Iterable[uuid.UUID], owner: str | None = None) -> Self:
        """Lock these turns, and find those of them that a runner (this one) holds, inside the caller's transaction.

        Two queries: a lock may be waited for longer than a lease lasts, and the time of a query is that of its start.
        """
        named = self.filter(pk__in=turn_ids, status=Turn.Status.RUNNING)
        if owner is not None:
            named = named.filter(owner=owner)
        if connection.features.has_select_for_update:
            # In one order, whoever locks several.
            named = self.filter(pk__in=list(named.select_for_update().order_by("pk").values_list("pk", flat=True)))
        # On SQLite the transaction is the lock, and was waited for before its first query.
        return named.filter(status=Turn.Status.RUNNING, lease_until__gt=Now())


class Turn(models.Model):
    """Everything from one user message to the end of the answer."""

    class Status(models.TextChoices):
        QUEUED = "queued"
        RUNNING = "running"
        WAITING = "waiting"
        COMPLETED = "completed"
        FAILED = "failed"
        CANCELLED = "cancelled"

    UNFINISHED = (Status.QUEUED, Status.RUNNING, Status.WAITING)

    id = models.UUIDField(primary_key=True, default=uuid.uuid4, editable=False)
    session = models.ForeignKey(Session, on_delete=models.PROTECT, related_name="turns")
    position = models.PositiveIntegerField(help_text="Its place among the session's turns, in order of acceptance.")
    status = models.CharField(max_length=16, choices=Status.choices, default=Status.QUEUED)
    code = models.CharField(max_length=64, blank=True, help_text="Why it failed or was cancelled, in one stable word.")
    requested_agent = models.CharField(max_length=32, blank=True, help_text="Asked for by the message, not yet obeyed.")
    owner = models.CharField(max_length=64, blank=True, help_text="The runner that holds it.")
    attempt = models.PositiveIntegerField(default=0, help_text="How often it was claimed; part of the fence.")
    lease_until = models.DateTimeField(null=True)
    lost_count = models.PositiveSmallIntegerField(
        default=0, db_default=0, help_text="How many runners died with it since its last settled step."
    )
    is_singled_out = models.BooleanField(
        default=False,
        db_default=False,
        help_text="No other suspect runs beside it: it is to blame if its runner dies.",
    )
    settled_seq = models.BigIntegerField(default=0, help_text="Text after this number is void if the runner dies.")
    handoff_count = models.PositiveIntegerField(default=0)
    round_count = models.PositiveIntegerField(default=0, help_text="How many model answers have asked for tools.")
    ran_ms = models.PositiveIntegerField(default=0, help_text="How long it ran before it last began to wait.")
    team_version = models.BigIntegerField(null=True, help_text="The agents, tools and rules that it runs under.")
    cancel_requested_at = models.DateTimeField(null=True)
    prompt_tokens = models.PositiveIntegerField(default=0)
    completion_tokens = models.PositiveIntegerField(default=0)
    total_tokens = models.PositiveIntegerField(default=0)
    created_at = models.DateTimeField(db_default=Now())
    started_at = models.DateTimeField(null=True)
    finished_at = models.DateTimeField(null=True)

    objects = TurnQuerySet.as_manager()

    class Meta:
        # The column: by the relation would be by the order of sessions, with a join in every query.
        ordering = ["session_id", "position"]
        constraints = [
            models.UniqueConstraint(fields=["session", "position"], name="one_turn_per_position"),
            models.UniqueConstraint(
                fields=["session"], condition=Q(status__in=["running", "waiting"]), name="one_active_turn_per_session"
            ),
        ]
        indexes = [
            models.Index(
                fields=["created_at"], condition=Q(status__in=["queued", "running"]), name="turn_to_be_claimed"
            ),
            models.Index(fields=["owner"], condition=Q(status="running"), name="turn_by_owner"),
            models.Index(fields=["created_at"], name="turn_by_time"),
            models.Index(fields=["status", "created_at"], name="turn_by_status"),
            models.Index(fields=["status", "finished_at"], name="turn_by_end"),
            # Which of a session's turns are not over is asked again and again, also of one that has had thousands.
            models.Index(fields=["session", "status", "position"], name="turn_in_session"),
        ]

    def __str__(self) -> str:
        return f"turn {self.position} of {self.session_id}"

    @property
    def usage(self) -> dict[str, int]:
        """What its model steps cost, as far as they have ended."""
        return {name: getattr(self, name) for name in ("prompt_tokens", "completion_tokens", "total_tokens")}

    @staticmethod
    def claim(claims: Sequence[Claim], *, singled_out: bool = False) -> None:
        """Take turns, all or none; the caller holds the locks of their sessions and of their rows, and has reserved
        their numbers.

        Raises TurnMoved when one is not to be had, which those locks should not allow.
        """
        claimed = _claimed(settings.TURN_LEASE_SECONDS).many(
            [
                {
                    "id": claim.turn_id,
                    "owner": claim.owner,
                    "is_singled_out": singled_out,
                    "settled_seq": claim.settled_seq,
                    "team_version": claim.team_version,
                }
                for claim in claims
            ]
        )
        if claimed != len(claims):
            raise TurnMoved(f"{len(claims) - claimed} of {len(claims)} turns moved while they were claimed")

    @staticmethod
    def locked(claim: Claim) -> "Turn":
        """The turn and its session, both locked in the caller's transaction. Raises LostClaim."""
        if connection.features.has_select_for_update:
            # The session first, as everybody does it.
            session = locked_session.first(id=claim.session_id)
            turn = held_turn_locked.first(**claim.fence)
            if session is not None and turn is not None:
                turn.session = session
        else:
            turn = held_turn.first(**claim.fence)  # on SQLite the transaction is the lock
        if turn is None:
            raise LostClaim(f"turn {claim.turn_id} is no longer {claim.owner}'s")
        return turn

    @staticmethod
    def mine(claim: Claim) -> "TurnQuerySet":
        """The turn if `claim` still holds: what every write of a runner goes through."""
        return Turn.objects.held(claim.turn_id, claim.owner, claim.attempt)

    @staticmethod
    def progress(claim: Claim, **changes: Any) -> None:
        """Write a step of a running turn, or raise LostClaim, or CancelRequested if the step may no longer count.

        Whoever dies later dies of something else: what the turn has lost until now is forgotten, unless the step says
        otherwise.
        """
        changes = {"lost_count": 0, **changes}
        given = {name: value for name, value in changes.items() if name not in ENDS}
        if not _progress(tuple(given), tuple(changes.keys() & ENDS.keys()))(**claim.fence, **given):
            Turn.ensure_running(claim)
            raise LostClaim(f"turn {claim.turn_id} changed hands")

    @staticmethod
    def ensure_running(claim: Claim) -> "Turn":
        """The turn with its session, read once. Raises LostClaim, or CancelRequested when it is to end."""
        turn = held_turn.first(**claim.fence)
        if turn is None:
            raise LostClaim(f"turn {claim.turn_id} is no longer {claim.owner}'s")
        if turn.cancel_requested_at is not None:
            raise CancelRequested(f"turn {claim.turn_id} was cancelled")
        return turn

    @staticmethod
    def ensure_still_running(claim: Claim) -> None:
        """The same without reading it again."""
        if held_uncancelled.first(**claim.fence) is None:
            Turn.ensure_running(claim)

    @staticmethod
    def finish(claim: Claim, status: Status, *, code: str = "", **changes: Any) -> None:
        """End a running turn. A cancelled one can end in no other way."""
        ending = {"status": status, "code": code, **ENDS, **changes}
        if status != Turn.Status.CANCELLED:
            Turn.progress(claim, **ending)
        elif not Turn.mine(claim).update(**ending):
            raise LostClaim(f"turn {claim.turn_id} is no longer {claim.owner}'s")

    @staticmethod
    def wait(claim: Claim, **changes: Any) -> None:
        """Leave a running turn to the answers of its open calls. Raises LostClaim or CancelRequested."""
        Turn.progress(claim, status=Turn.Status.WAITING, owner="", lease_until=None, **changes)

    @staticmethod
    def release(claim: Claim) -> None:
        """Leave a running turn to whoever claims it next, at once. Raises LostClaim.

        It runs under nobody's name then: who claims it repeats the unfinished step, as after a death, but counts none.
        So it goes for a lease that ran out while the database was away, as long as nobody has taken over.
        """
        held = Turn.objects.held_by(claim.owner).filter(pk=claim.turn_id, attempt=claim.attempt)
        if not held.update(owner="", lease_until=Now()):
            raise LostClaim(f"turn {claim.turn_id} is no longer {claim.owner}'s")

    def go_on(self) -> bool:
        """Queue a waiting turn again if none of its calls is open, or the server has one to execute; the caller holds
        the session's lock. Returns whether it goes on: also one does that a runner has, or is about to have.

        Raises TurnMoved when it has ended, which that lock should not allow.
        """
        still_open = list(self.calls.open())
        has_work = not still_open or any(call.is_to_be_executed for call in still_open)
        if has_work and Turn.objects.filter(pk=self.pk, status=Turn.Status.WAITING).update(status=Turn.Status.QUEUED):
            return True
        status = Turn.objects.values_list("status", flat=True).get(pk=self.pk)
        if status not in Turn.UNFINISHED:
            raise TurnMoved(f"{self} has ended")
        return status != Turn.Status.WAITING

    def request_cancel(self) -> bool:
        """Tell the live runner to stop; False when there is none (any more)."""
        return bool(
            Turn.objects.filter(pk=self.pk, status=Turn.Status.RUNNING, lease_until__gt=Now()).update(
                cancel_requested_at=Coalesce("cancel_requested_at", Now())
            )
        )

    def end_unheld(self, status: Status, code: str) -> bool:
        """End a turn that no runner holds: queued, waiting, or left behind by a runner that died."""
        unheld = Q(status=Turn.Status.WAITING) | unclaimed()
        return bool(
            Turn.objects.filter(unheld, pk=self.pk).update(
                status=status, code=code, finished_at=Now(), lease_until=None
            )
        )

    def fail_unclaimed(self, code: str) -> bool:
        """End a turn that nobody is to claim any more; the caller holds the session's lock."""
        return bool(
            Turn.objects.filter(unclaimed(), pk=self.pk, attempt=self.attempt).update(
                status=Turn.Status.FAILED, code=code, finished_at=Now(), lease_until=None, lost_count=losses()
            )
        )


# What a turn that nobody holds any more has instead of a lease, and when it ended.
ENDS: dict[str, Any] = {"lease_until": None, "finished_at": Now()}


def _held(slot: Callable[..., Slot]) -> TurnQuerySet:
    return Turn.objects.held(slot("id", "turn_id"), slot("owner", "held_by"), slot("attempt", "claimed_as"))


held_turn = Rows(Turn, lambda slot: _held(slot).select_related("session"))
# In one order, whoever locks several.
_locked_turns = Rows(
    Turn,
    lambda slot: (
        Turn.objects.held_by(slot("owner"))
        .filter(pk__in=slot("id", "turn_ids", many=True))
        .select_for_update()
        .order_by("pk")
        .values_list("pk")
    ),
)
_live_turns = Rows(
    Turn,
    lambda slot: (
        Turn.objects.held_by(slot("owner"))
        .filter(pk__in=slot("id", "turn_ids", many=True), lease_until__gt=Now())
        .order_by()
        .values_list("pk", "attempt")
    ),
)


def live_attempts(turn_ids: Sequence[uuid.UUID], owner: str) -> dict[uuid.UUID, int]:
    """Those of these turns that a runner holds, each with its attempt; locked, as by `lock_live`."""
    if connection.features.has_select_for_update:
        _locked_turns(turn_ids=turn_ids, owner=owner)
    return dict(_live_turns(turn_ids=turn_ids, owner=owner))


held_uncancelled = Rows(Turn, lambda slot: _held(slot).filter(cancel_requested_at__isnull=True).values_list("attempt"))
held_turn_locked = Rows(Turn, lambda slot: _held(slot).select_for_update())
locked_session = Rows(Session, lambda slot: Session.objects.locked().filter(pk=slot("id")).order_by())
# In no order: for one SQLite would walk through all turns that there ever were.
unfinished_turns = Rows(Turn, lambda slot: Turn.objects.unfinished().filter(session_id=slot("session")).order_by())
messages_counted = Update(
    Session,
    lambda slot: Session.objects.filter(pk=slot("id")),
    lambda slot: {"message_count": F("message_count") + slot("message_count", "count"), "last_activity": Now()},
)
left_with_messages = Update(
    Session,
    lambda slot: Session.objects.filter(pk=slot("id")),
    lambda slot: {
        "message_count": F("message_count") + slot("message_count", "count"),
        "last_activity": Now(),
        "next_seq": Case(When(next_seq=slot("next_seq", "end"), then=slot("next_seq", "first")), default=F("next_seq")),
    },
)
turn_stored = Insert(Turn)
turn_opened = Update(
    Session,
    lambda slot: Session.objects.filter(pk=slot("id")),
    lambda slot: {
        "turn_count": slot("turn_count"),
        "message_count": F("message_count") + 1,
        "last_activity": Now(),
        "title": slot("title"),
        "next_seq": F("next_seq") + slot("next_seq", "numbers"),
    },
)
numbers_given_back = Update(
    Session,
    lambda slot: Session.objects.filter(pk=slot("id"), next_seq=slot("next_seq", "end")),
    lambda slot: {"next_seq": slot("next_seq", "first")},
)


numbers_reserved = Update(
    Session,
    lambda slot: Session.objects.filter(pk=slot("id")),
    lambda slot: {"next_seq": F("next_seq") + slot("next_seq", "count")},
)


@cache
def _claimed(lease_seconds: int) -> Update:
    """A turn that is taken for so long at first."""
    return Update(
        Turn,
        lambda slot: Turn.objects.filter(unclaimed(), pk=slot("id")),
        lambda slot: {
            "status": Turn.Status.RUNNING,
            "owner": slot("owner"),
            "attempt": F("attempt") + 1,
            "lease_until": lease_end(),
            "lost_count": losses(),
            "is_singled_out": slot("is_singled_out"),
            "started_at": Coalesce("started_at", Now()),
            "settled_seq": slot("settled_seq"),
            "team_version": slot("team_version"),
        },
    )


@cache
def trusted_turns(room: int, max_losses: int) -> Rows[Turn]:
    """The first so many claimable turns that may run beside any others, locked with their sessions."""
    return Rows(Turn, lambda slot: Turn.objects.claimable().trusted()[:room].locked_with_sessions())


most_lost_turn = Rows(Turn, lambda slot: Turn.objects.claimable().order_by("-losses")[:1])  # type: ignore[misc]


@cache
def _progress(given: tuple[str, ...], ended: tuple[str, ...]) -> Update:
    """A step of a turn that writes these columns."""
    return Update(
        Turn,
        lambda slot: _held(slot).filter(cancel_requested_at__isnull=True),
        lambda slot: {**{name: slot(name) for name in given}, **{name: ENDS[name] for name in ended}},
    )


class ToolCallQuerySet(QuerySet["ToolCall"]):
    def open(self) -> Self:
        """Those without their one answer."""
        return self.exclude(status=ToolCall.Status.ANSWERED)

    def to_be_executed(self) -> Self:
        """Those that a runner of their turn has to execute, or is executing."""
        return self.filter(status=ToolCall.Status.RELEASED, on_server=True)

    def in_doubt(self) -> Self:
        """Those of which an operator has to say whether the server executes them again."""
        return self.filter(status=ToolCall.Status.IN_DOUBT)

    def overdue(self) -> Self:
        """Those that were released to a client and got no result in their time."""
        # The time alone is looked up: only calls that wait for a result have one, so its index is small.
        return self.filter(deadline_at__lte=Now(), status=ToolCall.Status.RELEASED)

    def in_order(self) -> Self:
        return self.order_by("turn__position", "round", "position")


class ToolCall(models.Model):
    """Something the model asks to have done. Open until it has its one answer, which the model reads as its result.

    Its arguments never change: what a person saw is what may run. An edit is part of the decision; what may run by it
    stands in `released_text`. Both are canonical JSON.

    Its deadline begins with its release, so no time runs while it waits for a person. One that the server executes is
    in doubt when it may have been executed, may not be executed twice, and nobody knows: then an operator is asked.
    """

    class Status(models.TextChoices):
        WAITING = "waiting", "waits for a person"
        RELEASED = "released"
        IN_DOUBT = "in_doubt", "in doubt"
        ANSWERED = "answered"

    class Outcome(models.TextChoices):
        OK = "ok"
        ERROR = "error"
        REFUSED = "refused"
        REJECTED = "rejected"
        SUPERSEDED = "superseded"
        CANCELLED = "cancelled"
        TIMED_OUT = "timed_out", "timed out"
        IN_DOUBT = "in_doubt", "in doubt"

    call_id = models.CharField(primary_key=True, max_length=27, default=new_call_id)
    session = models.ForeignKey(Session, on_delete=models.PROTECT, related_name="calls")
    turn = models.ForeignKey(Turn, on_delete=models.PROTECT, related_name="calls")
    round = models.PositiveIntegerField(help_text="Which of its turn's answers asked for it; from 1.")
    position = models.PositiveSmallIntegerField(help_text="Its place among the calls of that answer.")
    agent = models.CharField(max_length=32)
    tool_name = models.CharField(max_length=200)
    tool_version = models.PositiveIntegerField(default=0)
    provider_id = models.CharField(max_length=200, blank=True, help_text="What the model's provider calls it.")
    arguments_text = models.TextField(help_text="Canonical JSON.")
    unusable_arguments = models.TextField(blank=True, help_text="What the model wrote, where it was no JSON object.")
    released_text = models.TextField(blank=True, help_text="The edited arguments, as canonical JSON.")
    args_hash = models.CharField(max_length=64, blank=True, help_text="Of the arguments that wait or may run.")
    requires_approval = models.BooleanField(default=False)
    on_server = models.BooleanField(
        default=False, db_default=False, help_text="The server executes it, and not the session's client."
    )
    status = models.CharField(max_length=16, choices=Status.choices)
    outcome = models.CharField(max_length=16, choices=Outcome.choices, blank=True)
    answer = models.TextField(blank=True, help_text="What the model reads as its result.")
    deadline_seconds = models.PositiveIntegerField(
        null=True, help_text="How long there is for its result, as its tool said when it was asked for."
    )
    created_at = models.DateTimeField(db_default=Now())
    released_at = models.DateTimeField(null=True)
    deadline_at = models.DateTimeField(null=True, help_text="While a client's result is waited for: until when.")
    begun_at = models.DateTimeField(null=True, help_text="When the server last began to execute it.")
    answered_at = models.DateTimeField(null=True)

    objects = ToolCallQuerySet.as_manager()

    class Meta:
        ordering = ["created_at", "round", "position"]
        constraints = [models.UniqueConstraint(fields=["turn", "round", "position"], name="one_call_per_position")]
        indexes = [
            models.Index(fields=["session"], condition=~Q(status="answered"), name="call_open"),
            models.Index(fields=["created_at"], name="call_by_time"),
            models.Index(fields=["tool_name", "created_at"], name="call_by_tool"),
            models.Index(fields=["deadline_at"], condition=Q(deadline_at__isnull=False), name="call_by_deadline"),
            models.Index(fields=["created_at"], condition=Q(status="in_doubt"), name="call_in_doubt"),
        ]

    def __str__(self) -> str:
        return f"{self.tool_name} {self.call_id}"

    @property
    def arguments(self) -> dict[str, Any]:
        """As the model asked for them."""
        return stored_object(self.arguments_text)

    @property
    def final_arguments(self) -> dict[str, Any]:
        """What may run: the edited arguments, else those that the model asked for."""
        return stored_object(self.released_text or self.arguments_text)

    @property
    def is_open(self) -> bool:
        return self.status != ToolCall.Status.ANSWERED

    @property
    def is_to_be_executed(self) -> bool:
        """Whether a runner of its turn has to execute it, or is executing it."""
        return self.on_server and self.status == ToolCall.Status.RELEASED

    @property
    def state(self) -> str:
        """Its status as clients are told it, to whom "released" means that they are to execute it."""
        return EXECUTING if self.is_to_be_executed else self.status

    @property
    def may_be_given_up(self) -> bool:
        """Whether a result is waited for that may never come. What the server executes ends by itself."""
        if self.status == ToolCall.Status.RELEASED:
            return not self.on_server
        return self.status == ToolCall.Status.IN_DOUBT

    def release(self, *, args_hash: str, edited_text: str = "") -> None:
        """Let its client, or the server, execute it. Raises CallMoved unless it waited."""
        self._move(
            ToolCall.Status.WAITING,
            status=ToolCall.Status.RELEASED,
            released_at=Now(),
            deadline_at=None if self.on_server else deadline(self.deadline_seconds),
            released_text=edited_text,
            args_hash=args_hash,
        )

    def begin(self) -> None:
        """The server executes it from now on. Raises CallMoved unless it is released."""
        self._move(ToolCall.Status.RELEASED, begun_at=timezone.now())

    def doubt(self) -> None:
        """Leave it to an operator whether it is executed again. Raises CallMoved unless it is released."""
        self._move(ToolCall.Status.RELEASED, status=ToolCall.Status.IN_DOUBT)

    def release_again(self) -> None:
        """Have the server execute it again. Raises CallMoved unless it is in doubt."""
        self._move(ToolCall.Status.IN_DOUBT, status=ToolCall.Status.RELEASED, begun_at=None)

    def answer_with(self, text: str, outcome: Outcome) -> None:
        """Close it with what the model reads as its result; the caller holds the session's lock.

        Raises CallMoved when it has its answer already.
        """
        self._move(
            ToolCall.Status.WAITING,
            ToolCall.Status.RELEASED,
            ToolCall.Status.IN_DOUBT,
            status=ToolCall.Status.ANSWERED,
            answer=text,
            outcome=outcome,
            deadline_at=None,
            # Answers stand in the order of their arrival; the database's clock may be too coarse to tell it.
            answered_at=timezone.now(),
        )
        Session.objects.filter(pk=self.session_id).update(message_count=F("message_count") + 1, last_activity=Now())

    def _move(self, *expected: Status, **changes: Any) -> None:
        if not ToolCall.objects.filter(pk=self.pk, status__in=expected).update(**changes):
            raise CallMoved(f"{self} is not {' or '.join(expected)} any more")
        for name, value in changes.items():
            if not isinstance(value, Combinable):
                setattr(self, name, value)


class Handoff(models.Model):
    """The session passed from one agent to another."""

    session = models.ForeignKey(Session, on_delete=models.PROTECT, related_name="handoffs")
    turn = models.ForeignKey(Turn, on_delete=models.PROTECT, null=True, related_name="handoffs")
    # The database's clock is too coarse to tell: SQLite's has milliseconds.
    after_position = models.PositiveIntegerField(default=0, help_text="The session's last turn when it happened.")
    from_agent = models.CharField(max_length=32)
    to_agent = models.CharField(max_length=32)
    reason = models.TextField()
    confidence = models.CharField(max_length=32, null=True)  # noqa: DJ001 (null is what clients are shown)
    created_at = models.DateTimeField(db_default=Now())

    class Meta:
        ordering = ["id"]

    def __str__(self) -> str:
        return f"{self.from_agent} to {self.to_agent}"


class IdempotencyRecord(models.Model):
    """A request that its caller may repeat, and what came of it."""

    # Found by the constraint, which begins with it.
    account = models.ForeignKey(Account, on_delete=models.PROTECT, related_name="+", db_index=False)
    caller = models.CharField(max_length=150)
    session_id = models.CharField(max_length=128, blank=True, help_text="Of a message's own id, which is a key there.")
    key = models.CharField(max_length=255)
    fingerprint = models.CharField(max_length=64, help_text="Of what was asked for under this key.")
    outcome_text = models.TextField(blank=True, help_text="As JSON; empty within the transaction of the work alone.")
    created_at = models.DateTimeField(db_default=Now())

    class Meta:
        ordering = ["id"]
        constraints = [
            models.UniqueConstraint(fields=["account", "caller", "session_id", "key"], name="one_record_per_key")
        ]
        indexes = [models.Index(fields=["created_at"], name="record_by_age")]

    def __str__(self) -> str:
        return f"{self.key} of {self.caller}"


def deadline(seconds: int | None) -> CombinedExpression | None:
    """Until when a call that is released now may be answered, on the database's clock; None: for ever."""
    return None if seconds is None else Now() + timedelta(seconds=seconds)


def lease_end() -> CombinedExpression:
    """When a lease taken or renewed now runs out, on the database's clock."""
    return Now() + timedelta(seconds=settings.TURN_LEASE_SECONDS)

"""What happened: facts, the frames of each session's stream, what every model step cost, who did what."""

import uuid
from typing import Any

import orjson
from django.db import models
from django.db.models import Q, QuerySet


class Event(models.Model):
    """A stored fact, one row each, never changed. Names and the envelope are those of protocol 8.1.

    Who it belongs to and which session it speaks of are plain values: the log outlives what it describes.
    """

    event_id = models.UUIDField(default=uuid.uuid4, unique=True, editable=False)
    account_id = models.BigIntegerField()
    session_id = models.CharField(max_length=128, blank=True)
    event_type = models.CharField(max_length=64)
    correlation_id = models.CharField(max_length=64, blank=True, help_text="The turn it belongs to, if any.")
    causation_id = models.CharField(max_length=64, blank=True)
    source = models.CharField(max_length=64)
    version = models.CharField(max_length=8, default="1.0")
    # From its data, where a filter would have to read every row.
    tool_name = models.CharField(max_length=200, null=True)  # noqa: DJ001 (null stays out of the index)
    data = models.JSONField(default=dict)
    timestamp = models.DateTimeField()

    class Meta:
        ordering = ["id"]
        indexes = [
            models.Index(fields=["account_id", "event_type", "id"], name="event_by_type"),
            models.Index(fields=["session_id", "id"], name="event_by_session"),
            models.Index(fields=["tool_name", "id"], condition=Q(tool_name__isnull=False), name="event_by_tool"),
            models.Index(fields=["timestamp"], name="event_by_time"),
        ]

    def __str__(self) -> str:
        return f"{self.event_type} {self.event_id}"

    @property
    def event_category(self) -> str:
        if self.event_type == "tool.approval.required":
            return "hitl"
        prefix = self.event_type.partition(".")[0]
        return "metrics" if prefix == "llm" else prefix


class StreamBatchQuerySet(QuerySet["StreamBatch"]):
    def numbered(self) -> "StreamBatchQuerySet":
        return self.filter(last_seq__isnull=False)

    def unnumbered(self) -> "StreamBatchQuerySet":
        """Frames stored while a runner held the session's numbers; it gives them theirs."""
        return self.filter(last_seq__isnull=True).order_by("id")


class Frames(models.JSONField):
    """Written many times a second and read whole: JSON as orjson makes it, which takes a tenth of the time."""

    def deconstruct(self) -> Any:
        name, _, args, kwargs = super().deconstruct()
        return name, "django.db.models.JSONField", args, kwargs  # to migrations it is nothing else

    def get_db_prep_value(self, value: Any, connection: Any, prepared: bool = False) -> Any:
        if connection.vendor == "postgresql":
            from psycopg.types.json import Jsonb

            return Jsonb(value, dumps=orjson.dumps)
        return orjson.dumps(value).decode()

    def from_db_value(self, value: Any, expression: Any, connection: Any) -> Any:
        try:
            return orjson.loads(value)
        except orjson.JSONDecodeError:
            return value  # damaged: as JSONField does


class StreamBatch(models.Model):
    """Some consecutive frames of a session's stream, as they were sent, kept for replay and prunable."""

    session_id = models.CharField(max_length=128)
    origin = models.CharField(max_length=36, help_text="The turn, or the switch, whose answer these frames are.")
    first_seq = models.BigIntegerField(null=True)
    last_seq = models.BigIntegerField(null=True)
    frames = Frames(help_text="[[number, frame], ...]; the number is null until one is given.")
    closes = models.BooleanField(default=False, help_text="Whether the answer to a POST ends with its last frame.")
    created_at = models.DateTimeField()

    objects = StreamBatchQuerySet.as_manager()

    class Meta:
        verbose_name_plural = "stream batches"
        constraints = [models.UniqueConstraint(fields=["session_id", "last_seq"], name="one_batch_per_number")]
        indexes = [models.Index(fields=["created_at"], name="batch_by_age")]

    def __str__(self) -> str:
        return f"{self.session_id} {self.first_seq}-{self.last_seq}"


class ModelCall(models.Model):
    """One model step: what was asked of which model, how long it took, what it cost, how it ended."""

    class Purpose(models.TextChoices):
        ANSWER = "answer"
        ROUTING = "routing"

    account_id = models.BigIntegerField()
    session_id = models.CharField(max_length=128)
    turn_id = models.CharField(max_length=36)
    agent = models.CharField(max_length=32)
    model = models.CharField(max_length=200)
    purpose = models.CharField(max_length=16, choices=Purpose.choices)
    duration_ms = models.PositiveIntegerField()
    prompt_tokens = models.PositiveIntegerField(default=0)
    completion_tokens = models.PositiveIntegerField(default=0)
    total_tokens = models.PositiveIntegerField(default=0)
    has_tool_calls = models.BooleanField(default=False)
    error = models.CharField(max_length=64, blank=True, help_text="Empty when the step succeeded.")
    created_at = models.DateTimeField()

    class Meta:
        ordering = ["id"]
        indexes = [
            models.Index(fields=["account_id", "session_id", "id"], name="model_call_by_session"),
            models.Index(fields=["created_at"], name="model_call_by_time"),
        ]

    def __str__(self) -> str:
        return f"{self.purpose} by {self.agent} with {self.model}"


class AuditEntry(models.Model):
    """Who did what and why, for people. Never changed, never deleted."""

    class Outcome(models.TextChoices):
        DONE = "done"
        REFUSED = "refused"

    account_id = models.BigIntegerField()
    at = models.DateTimeField()
    actor = models.CharField(max_length=150)
    channel = models.CharField(max_length=16, help_text="By which way: api, socket, admin, system.")
    address = models.CharField(max_length=64, blank=True)
    request_id = models.CharField(max_length=64, blank=True)
    action = models.CharField(max_length=64)
    outcome = models.CharField(max_length=16, choices=Outcome.choices)
    session_id = models.CharField(max_length=128, blank=True)
    target = models.CharField(max_length=128, blank=True, help_text="What it was done to, for example a call's id.")
    tool_name = models.CharField(max_length=200, null=True)  # noqa: DJ001 (null stays out of the index)
    reason = models.TextField(blank=True)
    details = models.JSONField(default=dict)

    class Meta:
        ordering = ["id"]
        verbose_name_plural = "audit entries"
        indexes = [
            models.Index(fields=["account_id", "id"], name="audit_by_account"),
            models.Index(fields=["session_id", "id"], name="audit_by_session"),
            models.Index(fields=["target", "id"], name="audit_by_target"),
            models.Index(fields=["actor", "id"], name="audit_by_actor"),
            models.Index(fields=["action", "id"], name="audit_by_action"),
            models.Index(fields=["tool_name", "id"], condition=Q(tool_name__isnull=False), name="audit_by_tool"),
            models.Index(fields=["at"], name="audit_by_time"),
        ]

    def __str__(self) -> str:
        return f"{self.action} by {self.actor}"

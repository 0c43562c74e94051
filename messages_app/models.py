"""What is said."""

from typing import Self

from django.db import models
from django.db.models import QuerySet
from django.db.models.functions import Now

from events_app.prepared import Insert
from sessions_app.models import Session, Turn


class MessageQuerySet(QuerySet["Message"]):
    def in_order(self) -> Self:
        """By turn in the order of acceptance, within a turn by storage: a queued message stands after the answer."""
        return self.order_by("turn_position", "id")


class Message(models.Model):
    """A stored thing that was said, by a user or an agent. Only ever appended.

    The tool calls that an answer asked for, and their results, are the session's ToolCall rows of the same round.
    """

    class Role(models.TextChoices):
        USER = "user"
        ASSISTANT = "assistant"

    session = models.ForeignKey(Session, on_delete=models.PROTECT, related_name="messages")
    turn = models.ForeignKey(Turn, on_delete=models.PROTECT, related_name="messages")
    turn_position = models.PositiveIntegerField()
    role = models.CharField(max_length=16, choices=Role.choices)
    content = models.TextField()
    agent = models.CharField(max_length=32, blank=True, help_text="Who said it, for an assistant's message.")
    round = models.PositiveIntegerField(default=0, help_text="Which round of tool calls it asked for; 0: none.")
    created_at = models.DateTimeField(db_default=Now())

    objects = MessageQuerySet.as_manager()

    class Meta:
        indexes = [models.Index(fields=["session", "turn_position", "id"], name="message_in_order")]

    def __str__(self) -> str:
        return f"{self.role} in {self.session_id}"


_said = Insert(Message, "session_id", "turn_id", "turn_position", "role", "content", "agent", "round")


def say(turn: Turn, role: Message.Role, content: str, *, agent: str = "", round: int = 0) -> None:
    """Store a message of a turn, in the caller's transaction."""
    _said([(turn.session_id, turn.pk, turn.position, role.value, content, agent, round)])

"""Who acts, with which tools, under which policy, signed off by whom."""

from typing import Any, Self

from django.conf import settings
from django.db import connection, models
from django.db.models import Exists, OuterRef, QuerySet
from django.db.models.functions import Now

from sessions_app.callers import Caller
from sessions_app.models import Session, ToolCall, stored_object


class AgentQuerySet(QuerySet["Agent"]):
    def registered(self) -> Self:
        """The agents of the configured mode, in the order the contract lists them."""
        return self.filter(multi_agent=True) if settings.MULTI_AGENT_MODE else self.filter(single_agent=True)


class Agent(models.Model):
    """One member of the team. Turns and handoffs keep its name, so that history outlives a change here."""

    name = models.CharField(primary_key=True, max_length=32)
    position = models.PositiveSmallIntegerField(unique=True)
    prompt = models.TextField(help_text="What the model is told first. Its first line says who speaks.")
    model = models.CharField(max_length=200, blank=True, help_text="Empty: LLM_MODEL.")
    temperature = models.FloatField(null=True, blank=True, help_text="Empty: the provider's default.")
    allowed_tools = models.JSONField(default=list)
    writable_paths = models.CharField(
        max_length=200, blank=True, help_text="A regular expression that every written path has to match."
    )
    multi_agent = models.BooleanField(default=True, help_text="Registered when MULTI_AGENT_MODE is on.")
    single_agent = models.BooleanField(default=False, help_text="Registered when MULTI_AGENT_MODE is off.")

    objects = AgentQuerySet.as_manager()

    class Meta:
        ordering = ["position"]

    def __str__(self) -> str:
        return self.title

    @property
    def title(self) -> str:
        return f"{self.name.capitalize()} Agent"

    @property
    def description(self) -> str:
        return self.prompt.strip().partition("\n")[0]

    @property
    def model_used(self) -> str:
        """The name of the model that answers for it."""
        # Without an address the demo model answers, and the records must not name a model that nobody asked.
        return (self.model or settings.LLM_MODEL) if settings.LLM_BASE_URL else "demo"

    def as_wire(self) -> dict[str, Any]:
        """Form A of protocol 2.2."""
        return {
            "type": self.name,
            "name": self.title,
            "description": self.description,
            "allowed_tools": self.allowed_tools,
            "has_file_restrictions": bool(self.writable_paths),
        }


class Tool(models.Model):
    """Something an agent may ask to have done. What it may be asked with is told by a JSON schema."""

    name = models.CharField(primary_key=True, max_length=64)
    position = models.PositiveSmallIntegerField(
        default=0, help_text="Its place among the tools that a model is offered."
    )
    description = models.TextField(help_text="What the model is told about it.")
    parameters = models.JSONField(help_text="The JSON schema of its arguments, an object's.")
    version = models.PositiveIntegerField(default=1, help_text="Goes into the hash that an approval is given for.")
    deadline_seconds = models.PositiveIntegerField(
        null=True,
        blank=True,
        help_text="How long there is for the result of a released call. Empty: as long as it takes.",
    )
    on_server = models.BooleanField(
        default=False, db_default=False, editable=False, help_text="The server executes it, and no client is to."
    )

    class Meta:
        ordering = ["position", "name"]

    def __str__(self) -> str:
        return self.name

    def as_function(self) -> dict[str, Any]:
        """The form in which chat completions offer it."""
        function = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {"type": "function", "function": function}


class ApprovalRuleQuerySet(QuerySet["ApprovalRule"]):
    def kept(self, pk: int) -> "ApprovalRule | None":
        """The rule, if it is still there: nobody deletes it before the transaction ends."""
        found = self.filter(pk=pk)
        if connection.vendor != "postgresql":
            return found.first()  # one writer at a time
        # The weakest lock that a deletion waits for: a stronger one would have all who ask under it wait as well.
        sql, values = found.query.sql_with_params()
        return next(iter(self.raw(f"{sql} FOR KEY SHARE", values)), None)


class ApprovalRule(models.Model):
    """What happens to calls of some tools by some agents. Of all that match the strongest outcome wins."""

    class Outcome(models.TextChoices):
        ALLOW = "allow"
        ASK = "ask", "ask a person"
        DENY = "deny"

    position = models.PositiveIntegerField(
        default=100, help_text="Among equally strong rules the lowest gives the reason."
    )
    tool = models.CharField(max_length=100, help_text="A name, or a pattern with * and ? for the whole of it.")
    agent = models.CharField(max_length=32, blank=True, help_text="Empty: every agent.")
    outcome = models.CharField(max_length=8, choices=Outcome.choices)
    reason = models.CharField(
        max_length=500, blank=True, help_text="What the person who decides, or the model, is told."
    )
    self_approval = models.BooleanField(
        default=False, help_text="Whether the API client that drives the session may decide itself."
    )
    is_active = models.BooleanField(default=True)

    objects = ApprovalRuleQuerySet.as_manager()

    class Meta:
        ordering = ["position", "id"]

    def __str__(self) -> str:
        return f"{self.outcome} {self.tool}"


class TeamVersion(models.Model):
    """All agents, tools and rules at one moment, known by what they are. Never changed: turns are pinned to it."""

    id = models.BigIntegerField(primary_key=True, help_text="The beginning of the digest.")
    digest = models.CharField(max_length=64, unique=True, help_text="SHA-256 of the content.")
    content = models.TextField(help_text="The rows as JSON.")
    created_at = models.DateTimeField(db_default=Now())

    class Meta:
        ordering = ["created_at", "id"]

    def __str__(self) -> str:
        return self.digest[:12]


class TeamNow(models.Model):
    """One row: which version the team is at this moment, if somebody has found out since it was last changed.

    Triggers on the tables of agents, tools and rules forget the version with every change, whoever makes it
    (agents_app/team_now.py).
    """

    id = models.SmallIntegerField(primary_key=True, default=1)
    revision = models.CharField(max_length=32, help_text="Another one after every change.")
    version = models.ForeignKey(TeamVersion, on_delete=models.SET_NULL, null=True)
    columns = models.CharField(max_length=16, help_text="Of which columns of the team that version is made.")

    def __str__(self) -> str:
        return self.revision


class ApprovalRequestQuerySet(QuerySet["ApprovalRequest"]):
    def pending(self) -> Self:
        return self.filter(status=ApprovalRequest.Status.PENDING)

    def visible_to(self, caller: Caller) -> Self:
        """Those of the sessions that the caller may see."""
        # One by one: as a list, all sessions that there are would be read first.
        return self.filter(Exists(Session.objects.visible_to(caller).filter(pk=OuterRef("session"))))


class ApprovalRequest(models.Model):
    """A tool call that waits for a person, with the arguments as they were shown and their hash.

    `approvals.decide` is the only way from pending to anything else.
    """

    class Status(models.TextChoices):
        PENDING = "pending"
        APPROVED = "approved"
        EDITED = "edited"
        REJECTED = "rejected"
        SUPERSEDED = "superseded"
        CANCELLED = "cancelled"

    call = models.OneToOneField(ToolCall, on_delete=models.PROTECT, related_name="approval")
    session = models.ForeignKey(Session, on_delete=models.PROTECT, related_name="approvals")
    tool_name = models.CharField(max_length=200)
    arguments_text = models.TextField(help_text="Canonical JSON, as it was shown.")
    args_hash = models.CharField(max_length=64)
    rule = models.ForeignKey(ApprovalRule, on_delete=models.SET_NULL, null=True)
    reason = models.CharField(max_length=500, blank=True)
    self_approval = models.BooleanField(help_text="As the rule said when it was made.")
    status = models.CharField(max_length=16, choices=Status.choices, default=Status.PENDING)
    created_at = models.DateTimeField(db_default=Now())

    objects = ApprovalRequestQuerySet.as_manager()

    class Meta:
        ordering = ["id"]
        indexes = [
            models.Index(fields=["status", "id"], name="approval_by_status"),
            models.Index(fields=["session", "status", "id"], name="approval_by_session"),
        ]
        permissions = [("decide_approvalrequest", "Can decide on waiting tool calls")]

    def __str__(self) -> str:
        return f"{self.tool_name} {self.call_id}"

    @property
    def arguments(self) -> dict[str, Any]:
        return stored_object(self.arguments_text)


class PendingApproval(ApprovalRequest):
    """The approval queue: a page of its own in the admin."""

    class Meta:
        proxy = True
        verbose_name = "waiting approval"


class Decision(models.Model):
    """How an approval request ended, by whom and why."""

    class Verdict(models.TextChoices):
        APPROVE = "approve"
        EDIT = "edit"
        REJECT = "reject"
        SUPERSEDED = "superseded"
        CANCELLED = "cancelled"

    request = models.OneToOneField(ApprovalRequest, on_delete=models.PROTECT, related_name="decision")
    verdict = models.CharField(max_length=16, choices=Verdict.choices)
    decided_by = models.CharField(max_length=150)
    channel = models.CharField(max_length=16)
    feedback = models.TextField(blank=True)
    edited_text = models.TextField(blank=True, help_text="The arguments of an edit, as canonical JSON.")
    args_hash = models.CharField(max_length=64, help_text="Of the arguments that were decided on.")
    decided_at = models.DateTimeField()

    class Meta:
        ordering = ["id"]
        indexes = [models.Index(fields=["decided_at", "verdict"], name="decision_by_time")]

    def __str__(self) -> str:
        return f"{self.verdict} by {self.decided_by}"

    @property
    def edited_arguments(self) -> dict[str, Any] | None:
        return stored_object(self.edited_text) if self.edited_text else None

"""Who acts: the agents, what they are told and which tools they may use."""

from typing import Any, Self

from django.conf import settings
from django.db import models
from django.db.models import QuerySet


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

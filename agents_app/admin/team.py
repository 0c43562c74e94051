"""Browsing the agents: what each is told and may use."""

from django.contrib import admin
from unfold.decorators import display

from agents_app.models import Agent
from events_app.admin import BrowseOnlyAdmin
from events_app.display import EMPTY, box, clipped, visible


@admin.register(Agent)
class AgentAdmin(BrowseOnlyAdmin):
    list_display = (
        "heading",
        "says",
        "model_shown",
        "warmth",
        "tool_number",
        "may_write",
        "multi_agent",
        "single_agent",
    )
    list_filter = ("multi_agent", "single_agent")
    search_fields = ("name", "prompt", "model")
    search_help_text = "Words of a name, a prompt or a model"
    ordering = ("position",)
    fieldsets = (
        (None, {"fields": (("heading", "position"), ("model_shown", "warmth"), ("multi_agent", "single_agent"))}),
        ("Prompt", {"fields": ("prompt_whole",)}),
        ("Tools", {"fields": ("tools", "may_write")}),
    )

    @display(description="Agent", ordering="name")
    def heading(self, agent: Agent) -> str:
        return visible(agent.title)

    @display(description="Prompt")
    def says(self, agent: Agent) -> str:
        return clipped(agent.description)

    @display(description="Model", ordering="model")
    def model_shown(self, agent: Agent) -> str:
        return visible(agent.model_used)

    @display(description="Temperature", ordering="temperature")
    def warmth(self, agent: Agent) -> str:
        return "default" if agent.temperature is None else f"{agent.temperature:g}"

    @display(description="Tools")
    def tool_number(self, agent: Agent) -> int:
        return len(agent.allowed_tools)

    @display(description="Paths it may write", ordering="writable_paths")
    def may_write(self, agent: Agent) -> str:
        if "write_file" not in agent.allowed_tools:
            return EMPTY
        return visible(agent.writable_paths) or "any"

    @display(description="Prompt")
    def prompt_whole(self, agent: Agent) -> str:
        return box(agent.prompt)

    @display(description="Allowed tools")
    def tools(self, agent: Agent) -> str:
        return "\n".join(visible(str(tool)) for tool in agent.allowed_tools) or EMPTY

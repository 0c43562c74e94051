"""The team: agents, tools and rules. A change counts from the next turn on."""

from typing import Any

from django.contrib import admin
from django.core.exceptions import PermissionDenied
from django.http import HttpRequest
from django.http.response import HttpResponseBase
from django.shortcuts import redirect
from django.template.response import TemplateResponse
from django.urls import URLPattern, path
from django.views.decorators.http import require_safe
from unfold.decorators import action, display

from agents_app import policy
from agents_app.admin.editing import EditableAdmin
from agents_app.admin.team_forms import NO_SUCH_TOOL, AgentForm, RuleForm, ToolForm, TryForm, in_use, needed
from agents_app.llm import CallWanted
from agents_app.models import Agent, ApprovalRule, Tool
from agents_app.policy import Outcome, Ruling
from agents_app.server_tools import ServerTool, StepTool, registered
from agents_app.team import Team
from agents_app.tools import WRITE, CallRefused, is_on_server, read_arguments
from events_app.display import EMPTY, as_json, badge, box, clipped, visible

OUTCOME_COLOURS = {Outcome.ALLOW: "success", Outcome.ASK: "warning", Outcome.DENY: "danger"}


class Hidden:
    """What an editor cannot see in a text that it shows as it is."""

    text_field = ""

    @display(description="Hidden characters")
    def hidden_characters(self, record: Any) -> str:
        text = getattr(record, self.text_field)
        return box(text) if visible(text) != text else "None"


@admin.register(Agent)
class AgentAdmin(Hidden, EditableAdmin):
    thing = "agent"
    text_field = "prompt"
    form = AgentForm
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
    edit_fieldsets = (
        (None, {"fields": ("seen", ("name", "position"), ("multi_agent", "single_agent"))}),
        ("Prompt", {"fields": ("prompt", "hidden_characters", ("model", "temperature"))}),
        ("Tools", {"fields": ("allowed_tools", "writable_paths")}),
    )
    browse_fieldsets = (
        (None, {"fields": (("heading", "position"), ("model_shown", "warmth"), ("multi_agent", "single_agent"))}),
        ("Prompt", {"fields": ("prompt_whole",)}),
        ("Tools", {"fields": ("tools", "may_write")}),
    )
    readonly_fields = ("heading", "model_shown", "warmth", "prompt_whole", "tools", "may_write", "hidden_characters")

    def kept_because(self, agent: Agent) -> str | None:
        reasons = (needed(agent.name, mode) for mode in ("multi_agent", "single_agent") if getattr(agent, mode))
        return next(filter(None, reasons), None) or in_use(agent.name)

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
        if WRITE not in agent.allowed_tools:
            return EMPTY
        return visible(agent.writable_paths) or "any"

    @display(description="Prompt")
    def prompt_whole(self, agent: Agent) -> str:
        return box(agent.prompt)

    @display(description="Allowed tools")
    def tools(self, agent: Agent) -> str:
        known = set(Tool.objects.values_list("name", flat=True))
        names = [(visible(str(name)), name in known) for name in agent.allowed_tools]
        return "\n".join(name if is_known else f"{name} ({NO_SUCH_TOOL})" for name, is_known in names) or EMPTY


def _is_delicate(code: ServerTool | StepTool) -> bool:
    return isinstance(code, ServerTool) and not code.is_repeatable


@admin.register(Tool)
class ToolAdmin(Hidden, EditableAdmin):
    thing = "tool"
    text_field = "description"
    form = ToolForm
    list_display = ("heading", "says", "place", "version_shown", "executed", "patience")
    search_fields = ("name", "description")
    search_help_text = "Words of a name or a description"
    ordering = ("position", "name")
    edit_fieldsets = (
        (None, {"fields": ("seen", ("name", "position"), ("version_shown", "executed"))}),
        ("What the model is told", {"fields": ("description", "hidden_characters")}),
        ("Arguments", {"fields": ("parameters",)}),
        ("Result", {"fields": ("deadline_seconds",)}),
    )
    browse_fieldsets = (
        (None, {"fields": (("heading", "place"), ("version_shown", "executed"))}),
        ("What the model is told", {"fields": ("description_whole",)}),
        ("Arguments", {"fields": ("schema",)}),
        ("Result", {"fields": ("patience",)}),
    )
    readonly_fields = (
        "heading",
        "place",
        "version_shown",
        "executed",
        "description_whole",
        "schema",
        "patience",
        "hidden_characters",
    )

    def kept_because(self, tool: Tool) -> str | None:
        return "The server itself executes it." if tool.name in registered else None

    @display(description="Tool", ordering="name")
    def heading(self, tool: Tool) -> str:
        return visible(tool.name)

    @display(description="Description")
    def says(self, tool: Tool) -> str:
        return clipped(tool.description)

    @display(description="Position", ordering="position")
    def place(self, tool: Tool) -> int:
        return tool.position

    @display(description="Version", ordering="version")
    def version_shown(self, tool: Tool) -> int:
        return tool.version

    @display(description="Executed by")
    def executed(self, tool: Tool) -> str:
        if not is_on_server(tool):
            return "the client"
        code = registered.get(tool.name)
        if code is None:
            return "the server, which does not have it (SERVER_TOOLS)"
        return "the server, again only if an operator says so" if _is_delicate(code) else "the server"

    @display(description="Deadline", ordering="deadline_seconds")
    def patience(self, tool: Tool) -> str:
        return EMPTY if tool.deadline_seconds is None else f"{tool.deadline_seconds:,} s"

    @display(description="Description")
    def description_whole(self, tool: Tool) -> str:
        return box(tool.description)

    @display(description="Schema of its arguments")
    def schema(self, tool: Tool) -> str:
        return box(as_json(tool.parameters))


@admin.register(ApprovalRule)
class ApprovalRuleAdmin(EditableAdmin):
    thing = "rule"
    form = RuleForm
    list_display = ("pattern", "whose", "says", "reason_shown", "by_oneself", "place", "is_active")
    list_filter = ("outcome", "self_approval", "is_active")
    search_fields = ("tool", "agent", "reason")
    search_help_text = "Words of a tool, an agent or a reason"
    ordering = ("position", "id")
    actions_list = ("try_call",)
    edit_fieldsets = (
        (None, {"fields": ("seen", ("tool", "agent"), ("outcome", "position"), "reason")}),
        ("Who may decide", {"fields": ("self_approval",)}),
        ("In force", {"fields": ("is_active",)}),
    )
    browse_fieldsets = (
        (None, {"fields": (("pattern", "whose"), ("says", "place"), "reason_shown")}),
        ("Who may decide", {"fields": ("by_oneself",)}),
        ("In force", {"fields": ("is_active",)}),
    )
    readonly_fields = ("pattern", "whose", "says", "reason_shown", "by_oneself", "place")

    @display(description="Tool", ordering="tool")
    def pattern(self, rule: ApprovalRule) -> str:
        return visible(rule.tool)

    @display(description="Agent", ordering="agent")
    def whose(self, rule: ApprovalRule) -> str:
        return visible(rule.agent) or "every agent"

    @display(description="Outcome", ordering="outcome")
    def says(self, rule: ApprovalRule) -> str:
        return outcome_badge(rule.outcome)

    @display(description="Reason")
    def reason_shown(self, rule: ApprovalRule) -> str:
        return clipped(rule.reason, 500)

    @display(description="Self-approval", ordering="self_approval", boolean=True)
    def by_oneself(self, rule: ApprovalRule) -> bool:
        return rule.self_approval

    @display(description="Position", ordering="position")
    def place(self, rule: ApprovalRule) -> int:
        return rule.position

    def get_urls(self) -> list[URLPattern]:
        view = self.admin_site.admin_view(require_safe(self.try_view))
        # First: Django's own patterns take any path for a rule's id.
        return [path("try/", view, name="agents_app_approvalrule_try"), *super().get_urls()]

    @action(description="Try a call", icon="experiment", permissions=["view"])
    def try_call(self, request: HttpRequest) -> HttpResponseBase:
        return redirect("admin:agents_app_approvalrule_try")

    def try_view(self, request: HttpRequest) -> HttpResponseBase:
        """What would happen to a call, under the team as it is now. Changes nothing, so it is asked for with GET."""
        if not self.has_view_permission(request):
            raise PermissionDenied
        form = TryForm(request.GET if "tool" in request.GET else None)
        context = {
            **self.admin_site.each_context(request),
            "title": "Try a call",
            "opts": self.opts,
            "media": self.media + form.media,
            "form": form,
            **(tried(**form.cleaned_data) if form.is_bound and form.is_valid() else {}),
        }
        return TemplateResponse(request, "agents_app/try_call.html", context)


def tried(agent: str, tool: str, arguments: str) -> dict[str, Any]:
    """What happens to such a call, for the template: the outcome, why, and by which rule."""
    toolbox = Team.now().toolbox(agent)
    try:
        known = toolbox.tool_named(tool)
        toolbox.check(known, read_arguments(CallWanted("", tool, arguments)))
    except CallRefused as refused:
        return {"outcome": badge("refused", "danger"), "why": visible(refused.message), "code": refused.code}
    ruling: Ruling = policy.rule_on(toolbox.rules, tool=tool, agent=agent)
    return {
        "outcome": outcome_badge(ruling.outcome),
        "why": visible(ruling.reason) or ("No reason is given." if ruling.rule else "No rule matches."),
        "rule": ruling.rule,
        "rule_shown": visible(str(ruling.rule)),
        "is_asked": ruling.outcome == Outcome.ASK,
    }


def outcome_badge(outcome: str) -> str:
    return badge(Outcome(outcome).label, OUTCOME_COLOURS[Outcome(outcome)])

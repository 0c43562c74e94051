"""What may be entered for agents, tools and rules. Whatever could break a turn is refused, with its field named."""

from typing import Any

from django import forms
from django.conf import settings
from django.core.validators import RegexValidator
from unfold import widgets

from agents_app import schemas
from agents_app.admin.editing import EditForm, LongText, Values
from agents_app.admin.json_editor import JSONTextarea
from agents_app.models import Agent, ApprovalRule, Tool
from agents_app.patterns import PatternRefused, ensure_bounded
from agents_app.routing import SINGLE_AGENT, SPECIALISTS
from agents_app.server_tools import MAX_DEADLINE_SECONDS, ServerTool, registered, step_tool_named
from agents_app.tools import MAX_PATH_CHARS, first_version
from events_app.display import escaped_json, visible
from orchestrator_site.errors import APIError
from orchestrator_site.http import read_json
from sessions_app.models import ORCHESTRATOR, Session, ToolCall, Turn

MAX_PROMPT_CHARS = 50_000
MAX_DESCRIPTION_CHARS = 10_000
NO_SUCH_TOOL = "not offered: no such tool"
# In which mode the code itself passes sessions to whom.
NEEDED = {"multi_agent": {ORCHESTRATOR, *SPECIALISTS}, "single_agent": {ORCHESTRATOR, SINGLE_AGENT.agent}}


class JSONText(forms.CharField):
    """JSON as the API reads it: no key twice, no NaN, nothing that no database can hold."""

    widget = JSONTextarea

    def prepare_value(self, value: Any) -> Any:
        return value if isinstance(value, str) or value is None else escaped_json(value)

    def clean(self, value: Any) -> Any:
        text = super().clean(value)
        if not text:
            return {}
        try:
            return read_json(text.encode("utf-8", "replace"), "application/json")
        except APIError as error:
            raise forms.ValidationError(error.message.replace("The body", "This"), code="json") from None

    def has_changed(self, initial: Any, data: Any) -> bool:
        return True  # what really changed is told by the values


class Position(forms.IntegerField):
    """Its place among others, small enough for every database."""

    widget = widgets.UnfoldAdminIntegerFieldWidget

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(min_value=0, max_value=9_999, **kwargs)


class AgentForm(EditForm):
    name = forms.CharField(
        max_length=32,
        widget=widgets.UnfoldAdminTextInputWidget,
        validators=[RegexValidator(r"\A[a-z][a-z0-9_-]*\Z", "Use a to z, 0 to 9, _ and -, beginning with a letter.")],
        help_text="What clients and the records call it, for example reviewer. It stays once the agent exists.",
    )
    position = Position(help_text="Its place in lists of agents; each has its own.")
    prompt = LongText(
        max_length=MAX_PROMPT_CHARS,
        widget=widgets.UnfoldAdminTextareaWidget({"rows": 18}),
        help_text="What the model is told before the conversation. Its first line says who speaks; clients show it.",
    )
    temperature = forms.FloatField(
        required=False,
        min_value=0,
        max_value=2,
        widget=widgets.UnfoldAdminDecimalFieldWidget({"step": "0.1"}),
        help_text="0 to 2: low answers the same way each time, high more freely. Empty: the provider's default.",
    )
    allowed_tools = forms.MultipleChoiceField(
        required=False,
        widget=widgets.UnfoldAdminCheckboxSelectMultipleWidget,
        help_text="The model is offered these, and a call of any other is refused.",
    )

    class Meta:
        model = Agent
        fields = "__all__"
        help_texts = {
            "model": "The provider's name of the model, for example gpt-4o-mini. Empty: the setting LLM_MODEL.",
            "writable_paths": (
                "A regular expression that the whole path has to match, for example docs/.*\\.md for Markdown files "
                "under docs. Empty: it may write any file of the workspace, if it may write at all."
            ),
            "multi_agent": "Whether it is there when MULTI_AGENT_MODE is on.",
            "single_agent": "Whether it is there when MULTI_AGENT_MODE is off.",
        }

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fields["name"].widget.attrs["readonly"] = bool(self.before)
        self.known = list(Tool.objects.values_list("name", flat=True))
        self.listed = _texts(self.before.get("allowed_tools"))
        unknown = [(name, f"{visible(name)} ({NO_SUCH_TOOL})") for name in self.listed if name not in self.known]
        self.fields["allowed_tools"].choices = [*((name, visible(name)) for name in self.known), *unknown]  # type: ignore[attr-defined]

    def clean_name(self) -> str:
        return self.kept_name("an agent")

    def clean_model(self) -> str:
        return self.one_line("model")

    def clean_allowed_tools(self) -> list[str]:
        """In the order in which they stood there, new ones last: clients are shown it."""
        chosen = self.cleaned_data["allowed_tools"]
        return [
            *(name for name in self.listed if name in chosen),
            *(name for name in chosen if name not in self.listed),
        ]

    def clean_writable_paths(self) -> str:
        pattern = self.one_line("writable_paths")
        try:
            ensure_bounded(pattern, longest=MAX_PATH_CHARS, is_searched=False)
        except PatternRefused as refused:
            raise forms.ValidationError(str(refused), code="pattern") from None
        return pattern

    def clean_multi_agent(self) -> bool:
        return self._still_registered("multi_agent", is_current=settings.MULTI_AGENT_MODE)

    def clean_single_agent(self) -> bool:
        return self._still_registered("single_agent", is_current=not settings.MULTI_AGENT_MODE)

    def _still_registered(self, mode: str, *, is_current: bool) -> bool:
        stays: bool = self.cleaned_data[mode]
        if self.before.get(mode) and not stays:
            name = self.before["name"]
            why = needed(name, mode) or (in_use(name) if is_current else None)
            if why:
                raise forms.ValidationError(why, code="in_use")
        return stays


class ToolForm(EditForm):
    name = forms.CharField(
        max_length=64,
        widget=widgets.UnfoldAdminTextInputWidget,
        validators=[RegexValidator(r"\A[A-Za-z0-9_-]+\Z", "Use letters, digits, _ and -.")],
        help_text="What the model calls it by, for example run_tests. It stays once the tool exists.",
    )
    position = Position(initial=0, help_text="Its place among the tools that a model is offered.")
    description = LongText(
        max_length=MAX_DESCRIPTION_CHARS,
        widget=widgets.UnfoldAdminTextareaWidget({"rows": 4}),
        help_text="What the model is told about it: what it does, when to use it. A change makes another version.",
    )
    parameters = JSONText(
        help_text=(
            'The JSON schema (Draft 2020-12) of its arguments, with "type": "object" at the top. Arguments that do not '
            "fit it are refused before anybody is asked. At most 64 KiB; $ref only within the schema. A change makes "
            "another version: calls of the one before that wait for a person can only be rejected."
        ),
    )
    deadline_seconds = forms.IntegerField(
        required=False,
        min_value=1,
        max_value=MAX_DEADLINE_SECONDS,
        label="Deadline in seconds",
        widget=widgets.UnfoldAdminIntegerFieldWidget,
        help_text=(
            "How long there is for a result, from the moment in which a call is released to the client, or the server "
            f"executes it. Then the agent is told that none came, and goes on. 1 to {MAX_DEADLINE_SECONDS:,}. Empty: "
            "as long as it takes."
        ),
    )

    class Meta:
        model = Tool
        fields = ("name", "position", "description", "parameters", "deadline_seconds")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fields["name"].widget.attrs["readonly"] = bool(self.before)
        if self._is_of_the_code:
            for name in ("description", "parameters"):
                self.fields[name].help_text = "The code of this tool says so; it cannot be changed here."

    @property
    def _is_of_the_code(self) -> bool:
        """Whether it is a server's tool, whose description and schema stand in its code."""
        return isinstance(registered.get(str(self.before.get("name"))), ServerTool)

    def clean_name(self) -> str:
        name = self.kept_name("a tool")
        if not self.before and name in registered:
            raise forms.ValidationError("The server's own tool has this name: `migrate` makes it.", code="built_in")
        return name

    def clean_description(self) -> str:
        description: str = self.cleaned_data["description"]
        self._ensure_not_of_the_code("description", description)
        return description

    def clean_parameters(self) -> Values:
        schema: Values = self.cleaned_data["parameters"]
        try:
            schemas.ensure_usable(schema)
        except schemas.SchemaRefused as refused:
            raise forms.ValidationError(visible(str(refused)), code="schema") from None
        self._ensure_not_of_the_code("parameters", schema)
        if step_tool_named(str(self.cleaned_data.get("name"))):
            _ensure_passes_on(schema)
        return schema

    def _ensure_not_of_the_code(self, field: str, value: Any) -> None:
        """Raise ValidationError for a change of what the code of a server's tool says."""
        if self._is_of_the_code and value != self.before[field]:
            raise forms.ValidationError("The code of this tool says so; it cannot be changed here.", code="built_in")

    def clean_deadline_seconds(self) -> int | None:
        seconds: int | None = self.cleaned_data["deadline_seconds"]
        if seconds is not None and step_tool_named(str(self.cleaned_data.get("name"))):
            raise forms.ValidationError("This tool is executed at once: there is nothing to wait for.", code="built_in")
        return seconds

    def save(self, commit: bool = True) -> Any:
        """Another schema or description is another tool: what waits for a person was asked of the one before."""
        if not self.before:
            self.instance.version = first_version(self.instance.name)
        elif any(self.before[name] != getattr(self.instance, name) for name in ("description", "parameters")):
            self.instance.version = self.before["version"] + 1
        return super().save(commit)


class RuleForm(EditForm):
    tool = forms.CharField(
        max_length=100,
        widget=widgets.UnfoldAdminTextInputWidget,
        validators=[RegexValidator(r"\A[A-Za-z0-9_*?-]+\Z", "Use letters, digits, _ and -, or the wildcards * and ?.")],
        help_text="The name of a tool, or a pattern for whole names: * stands for any letters, ? for one.",
    )
    agent = forms.ChoiceField(
        required=False,
        widget=widgets.UnfoldAdminSelectWidget,
        help_text="Whose calls the rule is about.",
    )
    position = Position(
        initial=100, help_text="Of equally strong rules the one with the lowest number gives the reason."
    )
    outcome = forms.ChoiceField(
        choices=ApprovalRule.Outcome.choices,
        widget=widgets.UnfoldAdminSelectWidget,
        help_text="Of all rules that match a call the strongest counts: deny beats ask beats allow. No rule: allow.",
    )

    class Meta:
        model = ApprovalRule
        fields = "__all__"
        help_texts = {
            "reason": "What the person who decides is told; of a denial, what the model and the client are told.",
            "self_approval": (
                "On: the API client that drives the session may decide on its own calls, as the contract's IDE does "
                "for its user. Off: somebody else has to, an operator here in the admin. Who asks should not be who "
                "approves."
            ),
            "is_active": "A rule that is switched off is kept and counts for nothing.",
        }

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        names = Agent.objects.values_list("name", flat=True)
        self.fields["agent"].choices = [("", "Every agent"), *((name, visible(name)) for name in names)]  # type: ignore[attr-defined]

    def clean_reason(self) -> str:
        return self.one_line("reason")

    def clean(self) -> Values:
        cleaned = super().clean()
        if cleaned.get("outcome") in ("ask", "deny") and not cleaned.get("reason"):
            self.add_error("reason", forms.ValidationError("Say why: somebody will read it.", code="required"))
        return cleaned


class TryForm(forms.Form):
    """A call that nobody makes."""

    agent = forms.ChoiceField(widget=widgets.UnfoldAdminSelectWidget, help_text="Who asks for the call.")
    tool = forms.CharField(
        max_length=200,
        widget=widgets.UnfoldAdminTextInputWidget,
        help_text="The name of a tool, known or not.",
    )
    arguments = forms.CharField(
        required=False,
        max_length=16_000,
        widget=JSONTextarea(rows=8),
        help_text="The arguments of the call, as JSON. Empty: none.",
    )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        names = Agent.objects.values_list("name", flat=True)
        self.fields["agent"].choices = [(name, visible(name)) for name in names]  # type: ignore[attr-defined]


def needed(name: str, mode: str) -> str | None:
    """Why an agent has to be registered in a mode, if so."""
    if name in NEEDED[mode]:
        return f"Messages are passed to the {name} agent by the server itself."
    if mode == "multi_agent" and name in _modes():
        return "The tool switch_mode offers to pass the session to it."
    return None


def in_use(name: str) -> str | None:
    """Which session or turn would be left without its agent, if any."""
    session = Session.objects.filter(current_agent=name, deleted_at__isnull=True).values_list("pk", flat=True).first()
    if session is not None:
        return f"The session {session} is with it. Switch it to another agent, or delete it."
    turns = Turn.objects.unfinished().filter(requested_agent=name).values_list("session_id", flat=True)
    calls = ToolCall.objects.open().filter(agent=name).values_list("session_id", flat=True)
    waiting = turns.first() or calls.first()
    return None if waiting is None else f"A turn of the session {waiting} needs it. Wait until that has ended."


def _modes() -> list[str]:
    tool = Tool.objects.filter(pk="switch_mode").first()
    return [] if tool is None else _offered_modes(tool.parameters)


def _offered_modes(schema: Any) -> list[str]:
    """The agents that switch_mode names, of a schema that may be any."""
    for key in ("properties", "mode"):
        schema = schema.get(key) if isinstance(schema, dict) else None
    return _texts(schema.get("enum")) if isinstance(schema, dict) else []


def _texts(value: Any) -> list[str]:
    return [text for text in value if isinstance(text, str)] if isinstance(value, list) else []


def _ensure_passes_on(schema: Values) -> None:
    """The server itself reads these arguments, so they have to come, and as text."""
    properties = schema.get("properties") or {}
    for name in ("mode", "reason"):
        if not isinstance(properties.get(name), dict) or properties[name].get("type") != "string":
            raise forms.ValidationError(f'The server executes this tool: "{name}" has to be a string.', code="built_in")
    if "mode" not in schema.get("required", []):
        raise forms.ValidationError('The server executes this tool: "mode" has to be required.', code="built_in")
    known = set(Agent.objects.values_list("name", flat=True))
    for name in _offered_modes(schema):
        if name not in known:
            raise forms.ValidationError(f'The "mode" {visible(name)} is no agent.', code="built_in")

"""What admins may edit: every change leaves an audit entry, and none is made over somebody else's."""

import hashlib
import json
from typing import Any

from django import forms
from django.contrib import admin, messages
from django.contrib.admin.utils import quote, unquote
from django.core.exceptions import PermissionDenied
from django.db import IntegrityError, transaction
from django.db.models import Model
from django.http import HttpRequest
from django.http.response import HttpResponseBase
from django.shortcuts import redirect
from unfold.admin import ModelAdmin

from events_app import log
from events_app.admin import ensure_text, is_harmless
from events_app.display import Shown, visible
from sessions_app.callers import person

CHANGED_MEANWHILE = (
    "Somebody changed this while it was open here; the audit log says who. Nothing was saved. "
    "Open the page again to see what it is now."
)
Values = dict[str, Any]


class LongText(forms.CharField):
    """Several lines, which browsers end otherwise than everybody else."""

    def to_python(self, value: Any) -> Any:
        return super().to_python(value.replace("\r\n", "\n") if isinstance(value, str) else value)


class EditForm(forms.ModelForm):
    """A form that knows which row it was opened on, to the last value."""

    seen = forms.CharField(widget=forms.HiddenInput, required=False)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.before = {} if self.instance._state.adding else values_of(self.instance)
        self.initial["seen"] = digest_of(self.before)

    def clean(self) -> Values:
        cleaned: Values = super().clean() or {}
        if cleaned.get("seen") != digest_of(self.before):
            raise forms.ValidationError(CHANGED_MEANWHILE, code="changed_meanwhile")
        return cleaned

    def kept_name(self, what: str) -> str:
        """The cleaned name, which stays what it was once there is one."""
        name: str = self.cleaned_data["name"]
        if self.before and name != self.before["name"]:
            raise forms.ValidationError(f"The name of {what} stays: what happened is known by it.", code="name_stays")
        return name

    def one_line(self, field: str) -> str:
        """The cleaned text of a field in which nothing may hide."""
        text: str = self.cleaned_data[field]
        if visible(text) != text:
            raise forms.ValidationError(f"Has characters that do not show: {visible(text)}", code="hidden_characters")
        return text


class EditableAdmin(ModelAdmin):
    """Changed by whoever has Django's permission to, shown to whoever may look.

    Who may only look reads `browse_fieldsets`, whose values go through `events_app.display`.
    """

    # What the audit log calls it.
    thing = ""
    edit_fieldsets: Any = ()
    browse_fieldsets: Any = ()
    list_per_page = 50
    list_max_show_all = 50
    show_full_result_count = False
    show_facets = admin.ShowFacets.NEVER
    actions = None  # each change is one page, one check and one audit entry

    class Media:
        css = {"all": ["events_app/admin.css"]}

    def kept_because(self, record: Any) -> str | None:
        """Why it cannot be deleted, if so."""
        return None

    def lookup_allowed(self, lookup: str, value: str, request: HttpRequest) -> bool:
        return is_harmless(self.model, lookup) and super().lookup_allowed(lookup, value, request)

    def changelist_view(self, request: HttpRequest, extra_context: Values | None = None) -> HttpResponseBase:
        ensure_text(request)
        if request.method == "POST":
            raise PermissionDenied
        return super().changelist_view(request, extra_context)

    def get_fieldsets(self, request: HttpRequest, obj: Any = None) -> Any:
        return self.edit_fieldsets if self._is_editor(request, obj) else self.browse_fieldsets

    def get_form(self, request: HttpRequest, obj: Any = None, change: bool = False, **kwargs: Any) -> Any:
        if not self._is_editor(request, obj):
            kwargs["form"] = forms.ModelForm
        return super().get_form(request, obj, change, **kwargs)

    def _is_editor(self, request: HttpRequest, obj: Any) -> bool:
        return self.has_add_permission(request) if obj is None else self.has_change_permission(request, obj)

    def get_object(self, request: HttpRequest, object_id: str, from_field: str | None = None) -> Any:
        """The row; locked for whoever is about to change it, so that it is still the one that was compared."""
        found = super().get_object(request, object_id, from_field)
        if found is not None and request.method == "POST":
            return self.model._default_manager.select_for_update().filter(pk=found.pk).first()
        return found

    def render_change_form(self, request: HttpRequest, context: Values, **kwargs: Any) -> HttpResponseBase:
        if context["original"] is not None:
            shown = Shown(context["original"])
            context.update(original=shown, subtitle=str(shown))
        # The audit log tells more than Django's own history.
        context["show_history"] = False
        return super().render_change_form(request, context, **kwargs)

    def history_view(
        self, request: HttpRequest, object_id: str, extra_context: Values | None = None
    ) -> HttpResponseBase:
        raise PermissionDenied

    def changeform_view(
        self,
        request: HttpRequest,
        object_id: str | None = None,
        form_url: str = "",
        extra_context: Values | None = None,
    ) -> HttpResponseBase:
        try:
            return super().changeform_view(request, object_id, form_url, extra_context)
        except IntegrityError:
            # Somebody saved the same name or place after this form was checked. Checked again, it says so.
            return super().changeform_view(request, object_id, form_url, extra_context)

    def save_model(self, request: HttpRequest, obj: Model, form: Any, change: bool) -> None:
        before, after = form.before, values_of(obj)
        changed = {name for name, value in after.items() if name not in before or before[name] != value}
        if not changed:
            return
        super().save_model(request, obj, form, change)
        self._write_down(
            request,
            obj,
            "changed" if change else "added",
            {name: value for name, value in before.items() if name in changed},
            {name: value for name, value in values_of(obj).items() if name in changed},
        )

    @transaction.atomic
    def delete_view(
        self, request: HttpRequest, object_id: str, extra_context: Values | None = None
    ) -> HttpResponseBase:
        record = self.get_object(request, unquote(object_id))
        if record is not None and self.has_delete_permission(request, record) and (why := self.kept_because(record)):
            self.message_user(request, f"{visible(str(record))} cannot be deleted. {why}", messages.ERROR)
            opts = self.opts
            return redirect(f"admin:{opts.app_label}_{opts.model_name}_change", quote(record.pk))
        return super().delete_view(request, object_id, extra_context)

    def delete_model(self, request: HttpRequest, obj: Model) -> None:
        before, pk = values_of(obj), obj.pk
        super().delete_model(request, obj)
        obj.pk = pk  # Django takes it away
        self._write_down(request, obj, "deleted", before, {})

    def _write_down(self, request: HttpRequest, record: Model, done: str, before: Values, after: Values) -> None:
        log.audit(
            person(request),
            f"{self.thing}.{done}",
            session_id="",
            target=str(record.pk),
            before=before,
            after=after,
        )


def values_of(record: Model) -> Values:
    return {field.attname: getattr(record, field.attname) for field in record._meta.concrete_fields}


def digest_of(values: Values) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

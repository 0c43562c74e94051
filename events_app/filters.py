"""The filters of the admin's lists. They ask for whole values, which an index finds; searches find parts."""

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from django import forms
from django.contrib import messages
from django.contrib.admin import FieldListFilter
from django.core.exceptions import ValidationError
from django.db import connection
from django.db.models import Model, QuerySet
from django.http import HttpRequest
from django.urls import reverse_lazy
from unfold.contrib.filters.admin import DropdownFilter, RadioFilter, RangeDateTimeFilter
from unfold.contrib.filters.forms import RangeDateTimeForm, SearchForm

from events_app.display import visible

# How a moment may be written, and how long it lasts: a day is a day to its end, a minute to its last second.
MOMENTS = (
    ("%Y-%m-%d", timedelta(days=1)),
    ("%Y-%m-%d %H:%M", timedelta(minutes=1)),
    ("%Y-%m-%d %H:%M:%S", timedelta(seconds=1)),
)


class DateAndPerhapsTime(forms.SplitDateTimeField):
    def compress(self, data_list: Any) -> Any:
        # Django's would have no date without a time.
        return data_list


class TimeRangeForm(RangeDateTimeForm):
    class Media:
        # unfold adds the pickers to pages without a list too, once a list was opened, and there is no `gettext` there.
        js = (reverse_lazy("admin:jsi18n"), *RangeDateTimeForm.Media.js)

    def __init__(self, name: str, *args: Any, **kwargs: Any) -> None:
        super().__init__(name, *args, **kwargs)
        for end, field in self.fields.items():
            self.fields[end] = DateAndPerhapsTime(label="", required=False, widget=field.widget)


class TimeRange(RangeDateTimeFilter):
    """From and to in UTC, both included, each a date with or without a time. What is no such thing finds nothing."""

    form_class = TimeRangeForm

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        named = "time" if self.field.name in ("at", "timestamp") else self.field.verbose_name
        self.title = f"{named} (UTC)"

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        try:
            start, end = self._entered("from"), self._entered("to")
            if start is not None:
                queryset = queryset.filter(**{f"{self.field_path}__gte": start[0]})
            if end is not None:
                queryset = queryset.filter(**{f"{self.field_path}__lt": end[0] + end[1]})
        except (ValueError, OverflowError):
            messages.error(request, "A time is written as 2026-12-31 23:59:59, a date without a time is the whole day.")
            return queryset.none()
        return queryset

    def _entered(self, end: str) -> tuple[datetime, timedelta] | None:
        """A bound with how long it lasts. Raises ValueError."""
        parts = [self.used_parameters.get(f"{self.field_path}_{end}_{number}") or "" for number in (0, 1)]
        text = " ".join(parts).strip()
        if not text:
            return None
        for form, lasts in MOMENTS:
            try:
                return datetime.strptime(text, form).replace(tzinfo=UTC), lasts
            except ValueError:
                continue
        raise ValueError(text)


class Exactly(FieldListFilter):
    """A text field for the whole of a value. `exactly("turn")` is one that people know by that name."""

    template = "unfold/filters/filters_field.html"
    form_class = SearchForm
    named = ""

    def __init__(
        self, field: Any, request: HttpRequest, params: dict[str, Any], model: type[Model], admin: Any, field_path: str
    ) -> None:
        self.lookup = f"{field_path}__exact"
        super().__init__(field, request, params, model, admin, field_path)
        self.title = self.named or self.title

    def expected_parameters(self) -> list[str | None]:
        return [self.lookup]

    def choices(self, changelist: Any) -> Iterator[Any]:
        yield {"form": self.form_class(name=self.lookup, label=f"By {self.title}", data={self.lookup: self._entered})}

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        try:
            return queryset.filter(**{self.lookup: self._entered}) if self._entered else queryset
        except (ValueError, ValidationError):  # no id at all, where ids are UUIDs
            return queryset.none()

    @property
    def _entered(self) -> str:
        entered: Any = self.used_parameters.get(self.lookup)
        return entered[-1].strip() if entered else ""


def exactly(named: str) -> type[Exactly]:
    return type("Exactly", (Exactly,), {"named": named})


class OneOf(RadioFilter):
    """Buttons for the few values that a column has: `values` are [(value, shown), ...]."""

    values: Sequence[tuple[str, str]]

    def lookups(self, request: HttpRequest, model_admin: Any) -> Sequence[tuple[str, str]]:
        return self.values

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        if not self.value():
            return queryset
        known = self.value() in dict(self.values)
        return queryset.filter(**{self.parameter_name: self.value()}) if known else queryset.none()


def one_of(column: str, values: Sequence[tuple[str, str]], named: str = "") -> type[OneOf]:
    shown = {"title": named or column, "parameter_name": column, "values": values}
    return type("OneOf", (OneOf,), shown)


class OneOfThose(DropdownFilter):
    """A list of the values that occur in a column that an index begins with."""

    model: type[Model]
    most = 200

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        return [(value, visible(value)) for value in self._values()]

    def has_output(self) -> bool:
        return True

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        return queryset.filter(**{self.parameter_name: self.value()}) if self.value() else queryset

    def _values(self) -> list[str]:
        # DISTINCT reads the whole index; this jumps from each value to the next.
        table, column = map(connection.ops.quote_name, (self.model._meta.db_table, self.parameter_name))
        jumps = (
            f"WITH RECURSIVE found(value) AS (SELECT MIN({column}) FROM {table} UNION ALL"  # noqa: S608 (names of ours)
            f" SELECT (SELECT MIN({column}) FROM {table} WHERE {column} > value) FROM found WHERE value IS NOT NULL)"
            f" SELECT value FROM found WHERE value IS NOT NULL LIMIT {self.most}"
        )
        with connection.cursor() as cursor:
            cursor.execute(jumps)
            return [value for (value,) in cursor.fetchall()]

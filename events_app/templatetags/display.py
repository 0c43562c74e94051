"""The functions of `events_app.display` as filters. None is marked safe, so what they return is still escaped."""

from django import template

from events_app.display import clipped, moment, visible

register = template.Library()
register.filter("visible", visible)
register.filter("clipped", clipped)
register.filter("moment", moment)

"""A text field for JSON: an editor where there is JavaScript, the text as it is where there is none."""

import json
from typing import Any

from django import forms
from unfold.widgets import UnfoldAdminTextareaWidget

from events_app.display import INVISIBLE

ESCAPED = {
    number: json.dumps(chr(number))[1:-1]
    for first, last in INVISIBLE
    for number in range(first, last + 1)
    if number != 0x0D  # between values it is a blank like any other
}


class JSONTextarea(UnfoldAdminTextareaWidget):
    """The editor is `json_editor.js`. With `schema_id`, the id of a `json_script`, what does not fit it is marked."""

    class Media:
        css = {"all": ["agents_app/json_editor.css"]}
        js = [forms.Script("agents_app/json_editor.js", type="module")]

    def __init__(self, *, schema_id: str | None = None, rows: int = 16) -> None:
        schema = {"data-json-schema": schema_id} if schema_id else {}
        super().__init__({"data-json-editor": True, "rows": rows, "spellcheck": "false", **schema})


def editable(value: Any) -> str:
    """A JSON value as text to be edited: what hides or reorders text is spelled as JSON spells it."""
    return json.dumps(value, indent=2, ensure_ascii=False).translate(ESCAPED)

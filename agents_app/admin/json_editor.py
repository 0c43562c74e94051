"""A text field for JSON: an editor where there is JavaScript, the text as it is where there is none."""

from django import forms
from unfold.widgets import UnfoldAdminTextareaWidget


class JSONTextarea(UnfoldAdminTextareaWidget):
    """The editor is `json_editor.js`. With `schema_id`, the id of a `json_script`, what does not fit it is marked."""

    class Media:
        css = {"all": ["agents_app/json_editor.css"]}
        js = [forms.Script("agents_app/json_editor.js", type="module")]

    def __init__(self, *, schema_id: str | None = None, rows: int = 16) -> None:
        schema = {"data-json-schema": schema_id} if schema_id else {}
        super().__init__({"data-json-editor": True, "rows": rows, "spellcheck": "false", **schema})

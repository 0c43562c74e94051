"""What a browser would send: the fields of a page's form as they stand there."""

from html.parser import HTMLParser


class Form(HTMLParser):
    """The fields of the page's POST form and what is in them, with the choices of its lists."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.fields: dict[str, list[str]] = {}
        self.choices: dict[str, list[str]] = {}
        self._inside = False
        self._text: str | None = None
        self._select: str | None = None
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        name = given.get("name", "")
        if tag == "form":
            self._inside = given.get("method") == "post" and given.get("id", "").endswith("_form")
        if not self._inside:
            return
        if tag == "input" and name and given.get("type") not in ("submit", "button"):
            is_box = given.get("type") in ("checkbox", "radio")
            if is_box:
                self.choices.setdefault(name, []).append(given.get("value", "on"))
            if not is_box or "checked" in given:
                self.fields.setdefault(name, []).append(given.get("value", "on" if is_box else ""))
        elif tag == "textarea":
            self._text = name
            self.fields[name] = [""]
        elif tag == "select":
            self._select = name
        elif tag == "option" and self._select:
            self.choices.setdefault(self._select, []).append(given.get("value", ""))
            if "selected" in given:
                self.fields[self._select] = [given.get("value", "")]

    def handle_endtag(self, tag: str) -> None:
        if tag == "textarea" and self._text:
            # A browser drops the newline that follows the tag, and ends lines as it pleases.
            self.fields[self._text] = [self.fields[self._text][0].removeprefix("\n").replace("\n", "\r\n")]
            self._text = None
        elif tag == "select":
            self._select = None
        elif tag == "form":
            self._inside = False

    def handle_data(self, data: str) -> None:
        if self._text:
            self.fields[self._text][0] += data

    def filled(self, **changes: str | list[str] | None) -> dict[str, list[str]]:
        """The fields with some of them changed; None leaves one out, as an unticked box is."""
        changed = {name: [value] if isinstance(value, str) else value for name, value in changes.items()}
        return {name: value for name, value in (self.fields | changed).items() if value is not None}

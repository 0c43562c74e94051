"""Pages of the admin as a browser reads them, people who look at them, and texts that try to come alive there."""

import re
from html.parser import HTMLParser
from typing import Any

from django.contrib.auth.models import Group, User
from django.test import Client

PASSWORD = "correct horse battery staple"

INJECTIONS = [
    "<script>alert(1)</script>",
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<svg onload=alert(1)>",
    "<svg><script>alert(1)</script></svg>",
    "<iframe src=javascript:alert(1)></iframe>",
    "<iframe srcdoc='<script>alert(1)</script>'>",
    '"><script>alert(1)</script>',
    "'><script>alert(1)</script>",
    '" onmouseover="alert(1)',
    "' autofocus onfocus='alert(1)",
    "</pre><script>alert(1)</script><pre>",
    "</td></tr></table><form action=//evil.example>",
    "</title><script>alert(1)</script>",
    "</textarea><script>alert(1)</script>",
    "<!-- <script>alert(1)</script> -->",
    "--><b>out</b><!--",
    "<![CDATA[<script>alert(1)</script>]]>",
    "<a href='javascript:alert(1)'>approved</a>",
    "javascript:alert(1)",
    "https://evil.example/login",
    "www.evil.example mail@evil.example",
    "[click](https://evil.example)",
    "<base href=//evil.example>",
    "<meta http-equiv=refresh content='0;url=//evil.example'>",
    "<link rel=stylesheet href=//evil.example>",
    "<style>*{display:none}</style>",
    "<template x-init='alert(1)'></template>",
    "<div x-data x-html='alert(1)'></div>",
    "<div hx-get=//evil.example hx-trigger=load></div>",
    "<object data=//evil.example></object><embed src=//evil.example>",
    "<math><mi xlink:href='javascript:alert(1)'>",
    "<details open ontoggle=alert(1)>",
    "&lt;script&gt;alert(1)&lt;/script&gt;",
    "{{ request.user.password }}{% debug %}{{ 7|add:7 }}",
    "${alert(1)}`alert(1)`",
    "<scr\u200bipt>alert(1)</script>",
    "＜script＞alert(1)＜/script＞",
]
CONTROLS = [
    *"\x01\x08\x0b\x1b\x1f\x7f\x85\x9b\r",
    *"\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u200e\u200f\u061c",
    *"\u200b\u200c\u200d\u2060\ufeff\u00ad\u2028\u3164",
    *"\U000e0041\U000e0100",
]
TRICKS = [f"pay{control}load" for control in CONTROLS]
# What of all this reads like text but would be no text: a raw one anywhere on a page is a failure.
RAW = re.compile("[" + "".join(map(re.escape, CONTROLS)) + "]")


class Page(HTMLParser):
    """A page as a browser reads it: its elements, its texts, and where it leads."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, tuple[str, ...]]] = []
        self.tags: list[tuple[str, list[tuple[str, str | None]]]] = []
        self.links: list[str] = []
        self.scripts: list[str] = []
        self.texts: list[str] = []
        self.comments: list[str] = []
        self.open_script = False
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, attrs))
        if tag != "br":  # a line break of a text is one
            self.elements.append((tag, tuple(sorted(name for name, _ in attrs))))
        self.links += [value or "" for name, value in attrs if name in ("href", "src", "action", "srcdoc", "data")]
        self.open_script = tag in ("script", "style")

    def handle_endtag(self, tag: str) -> None:
        self.open_script = False

    def handle_data(self, data: str) -> None:
        (self.scripts if self.open_script else self.texts).append(data)

    def handle_comment(self, data: str) -> None:
        self.comments.append(data)

    @property
    def text(self) -> str:
        return "".join(self.texts)

    @property
    def rows(self) -> int:
        """How many records a list shows."""
        return sum(tag == "tr" and "class" in names for tag, names in self.elements)

    @property
    def skeleton(self) -> tuple[Any, ...]:
        """Everything but texts. Links to the page itself repeat what was searched for, those to a turn hold its id."""
        leads = [re.sub(r"(?<=^/admin/sessions_app/turn/)[^/?#]+(?=/change/$)", "id", link) for link in self.links]
        # Those of the start page hold the time at which it was opened.
        leads = [link.partition("?")[0] if "_from_0=" in link else link for link in leads]
        leads = [link for link in leads if not link.startswith("?")]
        return self.elements, leads, self.scripts, len(self.comments)


def staff(name: str, *groups: str) -> User:
    user = User.objects.create_user(name, password=PASSWORD, is_staff=True)
    user.groups.set([Group.objects.get(name=group) for group in groups])
    return user


def logged_in(user: User) -> Client:
    client = Client()
    client.force_login(user, "django.contrib.auth.backends.ModelBackend")
    return client

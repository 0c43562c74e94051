"""The admin's pages of this app: the team with its tools and rules, the approval queue and what was decided."""

from agents_app.admin import team

__all__ = ["team"]

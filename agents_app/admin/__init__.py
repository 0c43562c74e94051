"""The admin's pages of this app: the team with its tools and rules, the approval queue and what was decided."""

from agents_app.admin import approvals, team

__all__ = ["approvals", "team"]

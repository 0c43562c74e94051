"""Allow, ask or deny: what the rules say about a tool call."""

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from agents_app.models import ApprovalRule

Outcome = ApprovalRule.Outcome
# The strongest of all that match wins; nothing that matches allows (protocol 6.4).
STRENGTH = {Outcome.ALLOW: 0, Outcome.ASK: 1, Outcome.DENY: 2}


@dataclass(frozen=True, slots=True)
class Ruling:
    """What happens to a call, and the rule that said so, if one did."""

    outcome: str
    rule: ApprovalRule | None = None

    @property
    def reason(self) -> str:
        return self.rule.reason if self.rule else ""

    @property
    def self_approval(self) -> bool:
        return self.rule.self_approval if self.rule else False


def rules_in_force() -> list[ApprovalRule]:
    return list(ApprovalRule.objects.filter(is_active=True))


def rule_on(rules: Iterable[ApprovalRule], *, tool: str, agent: str) -> Ruling:
    """The ruling on a tool that an agent asks for; among equally strong rules the first gives the reason."""
    matching = [rule for rule in rules if rule.agent in ("", agent) and _matches(tool, rule.tool)]
    if not matching:
        return Ruling(Outcome.ALLOW)
    strongest = min(matching, key=lambda rule: (-STRENGTH[Outcome(rule.outcome)], rule.position, rule.pk))
    return Ruling(strongest.outcome, strongest)


def stricter(one: Ruling, other: Ruling) -> Ruling:
    """Of two rulings the stronger; of two that ask, the one that lets nobody decide on what they asked for."""
    return max(other, one, key=lambda ruling: (STRENGTH[Outcome(ruling.outcome)], not ruling.self_approval))


def _matches(tool: str, pattern: str) -> bool:
    # Only * and ? are wildcards here; fnmatch knows sets of characters too.
    return fnmatchcase(tool, pattern.replace("[", "[[]"))

"""Which agent a message is for, judged by its words alone: when no model can be asked, or the demo model is."""

import re

# Looked through in this order: "write a plan" is for the coder. A client relies on the lists and their order.
KEYWORDS = {
    "coder": ("create", "write", "implement", "fix", "code", "refactor", "modify"),
    "architect": ("design", "architecture", "plan", "spec", "blueprint"),
    "debug": ("debug", "error", "bug", "problem", "why", "investigate", "crash"),
    "ask": ("explain", "what is", "how does", "help", "understand"),
}
FALLBACK = "coder"


def classify(text: str) -> str:
    """The agent whose keywords the text has, as words ("plan", "planning"), never as parts of others ("planet")."""
    for agent, pattern in PATTERNS.items():
        if pattern.search(text):
            return agent
    return FALLBACK


def _forms(word: str) -> str:
    """A pattern for a keyword and its regular forms: fixes, creating, modified, planning."""
    if " " in word:
        return word.replace(" ", r"\s+")
    if word.endswith("e"):
        return f"{word[:-1]}(?:e|es|ed|ing)"
    if word.endswith("y"):
        return f"{word[:-1]}(?:y|ies|ied|ying)"
    return f"{word}(?:e?s|{word[-1]}?(?:ed|ing))?"


PATTERNS = {
    agent: re.compile(rf"\b(?:{'|'.join(map(_forms, words))})\b", re.IGNORECASE) for agent, words in KEYWORDS.items()
}

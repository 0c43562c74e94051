"""The tools of the contract (protocol 6.3) and its approval policy (6.4)."""

from django.db import migrations

TEXT = {"type": "string"}
PATH = {"type": "string", "minLength": 1, "description": "Path inside the workspace."}
LINE = {"type": "integer", "minimum": 1}


def flag(default, description):
    return {"type": "boolean", "default": default, "description": description}


TOOLS = [
    (
        "read_file",
        "Read a text file of the workspace, whole or from one line to another.",
        ["path"],
        {
            "path": PATH,
            "encoding": {**TEXT, "default": "utf-8"},
            "start_line": {**LINE, "description": "First line to read, from 1."},
            "end_line": {**LINE, "description": "Last line to read."},
        },
    ),
    (
        "write_file",
        "Write a text file of the workspace; what it held before is replaced.",
        ["path", "content"],
        {
            "path": PATH,
            "content": {**TEXT, "description": "The whole new content."},
            "encoding": {**TEXT, "default": "utf-8"},
            "create_dirs": flag(False, "Create missing directories of the path."),
            "backup": flag(True, "Keep a copy of what was there."),
        },
    ),
    (
        "list_files",
        "List the files of a directory of the workspace.",
        ["path"],
        {
            "path": PATH,
            "recursive": flag(False, "Also what lies in directories below."),
            "include_hidden": flag(False, "Also names that begin with a dot."),
            "pattern": {**TEXT, "description": "Only names that match, for example *.py."},
        },
    ),
    (
        "create_directory",
        "Create a directory in the workspace.",
        ["path"],
        {"path": PATH, "recursive": flag(True, "Create missing directories above it.")},
    ),
    (
        "execute_command",
        "Run a command on the user's machine and return what it prints.",
        ["command"],
        {
            "command": {**TEXT, "minLength": 1},
            "cwd": {**TEXT, "description": "Directory to run it in; the workspace without it."},
            "timeout": {"type": "integer", "minimum": 1, "maximum": 300, "default": 60, "description": "Seconds."},
            "shell": flag(False, "Have a shell interpret the command."),
        },
    ),
    (
        "search_in_code",
        "Search the files of the workspace for a text or a regular expression.",
        ["query"],
        {
            "query": {**TEXT, "minLength": 1},
            "path": {**TEXT, "default": "."},
            "file_pattern": {**TEXT, "description": "Only in files that match, for example *.py."},
            "case_sensitive": flag(False, "Tell upper from lower case."),
            "regex": flag(False, "The query is a regular expression."),
            "max_results": {"type": "integer", "minimum": 1, "maximum": 1000, "default": 100},
        },
    ),
    (
        "switch_mode",
        "Pass the conversation to another agent when it is better placed to go on.",
        ["mode"],
        {
            "mode": {**TEXT, "enum": ["orchestrator", "coder", "architect", "debug", "ask"]},
            "reason": {**TEXT, "description": "Why, in one sentence."},
        },
    ),
]
RULES = [
    ("write_file", "ask", "File modification requires user approval"),
    ("delete_file", "ask", "File deletion requires user approval"),
    ("execute_command", "ask", "Command execution requires user approval"),
    ("create_directory", "ask", "Directory creation requires user approval"),
    ("move_file", "ask", "File move requires user approval"),
    ("read_file", "allow", ""),
    ("list_files", "allow", ""),
    ("search_files", "allow", ""),
]


def seed(apps, schema_editor):
    tool, rule = apps.get_model("agents_app", "Tool"), apps.get_model("agents_app", "ApprovalRule")
    for position, (name, description, required, properties) in enumerate(TOOLS):
        parameters = {"type": "object", "properties": properties, "required": required}
        defaults = {"position": position, "description": description, "parameters": parameters}
        tool.objects.get_or_create(name=name, defaults=defaults)
    # The contract's client decides for its own session.
    for position, (pattern, outcome, reason) in enumerate(RULES, start=1):
        rule.objects.create(position=position, tool=pattern, outcome=outcome, reason=reason, self_approval=True)


class Migration(migrations.Migration):
    dependencies = [("agents_app", "0003_approvals")]
    operations = [migrations.RunPython(seed, migrations.RunPython.noop)]

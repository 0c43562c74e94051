"""Loaded by pytest before the settings (`-p tests.environment`)."""

import os

from tests import databases

# Tests have settings of their own: nothing of this installation's .env or shell decides whether they pass.
for name, value in {
    "SECRET_KEY": "test-secret-test-secret-test-secret-test-secret",
    "INTERNAL_API_KEY": "test-key-test-key-test-key-test-key-test",
    "DATABASE_URL": databases.of_this_process(),
    "LLM_BASE_URL": "",
    "MULTI_AGENT_MODE": "true",
    "DEBUG": "false",
    "LOG_LEVEL": "WARNING",
}.items():
    os.environ[name] = value

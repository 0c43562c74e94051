# Three commands: `make run`, `make scaled` and `make test`. Each installs what it needs first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: run scaled test test-postgres faults lint bench bench-peers screenshots lock

run: $(VENV)/installed
	@$(BIN)/python -m orchestrator_site.serve

# Two web processes and two workers on PostgreSQL and Redis, behind nginx.
scaled: $(VENV)/installed
	@$(BIN)/python -m orchestrator_site.scaled

# The tests are compiled once, not again by each of their processes, whatever the shell says of bytecode.
test: $(VENV)/installed-dev
	@PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

# The same tests with PostgreSQL as the database: a server of their own, which is started and stopped with them. Two at a
# time: some start six processes of ours.
test-postgres: $(VENV)/installed-dev
	@PYTHONDONTWRITEBYTECODE= TEST_DATABASE=postgres $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# Every fault in full, on both databases, one after the other: hours. The table is in docs/faults.md.
faults: $(VENV)/installed-dev
	FAULTS=full $(BIN)/python -m pytest tests/faults
	FAULTS=full TEST_DATABASE=postgres $(BIN)/python -m pytest tests/faults

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	SECRET_KEY=only-for-reading-the-settings-of-a-type-check $(BIN)/mypy .

bench: $(VENV)/installed-dev
	$(BIN)/python benchmarks/speed.py
	$(BIN)/python benchmarks/decisions.py
	$(BIN)/python benchmarks/operators.py
	$(BIN)/python benchmarks/recovery.py
	$(BIN)/python benchmarks/streams.py
	$(BIN)/python benchmarks/scaled.py
	$(BIN)/python benchmarks/rest.py
	$(BIN)/python benchmarks/overload.py
	$(BIN)/python benchmarks/readers.py

# Agno and Aegra beside ours, each in an environment of its own.
PEERS := benchmarks/peers/.venv
bench-peers: $(VENV)/installed-dev $(PEERS)/agno/installed $(PEERS)/aegra/installed
	$(BIN)/python benchmarks/speed.py --peers

screenshots: $(VENV)/installed-dev
	$(BIN)/python docs/take_screenshots.py

# What runs in production; what tests and lints it comes on top. Both are pinned with hashes.
$(VENV)/installed: requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Countersign needs Python 3.11 or newer")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing..." && $(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	@touch $@

$(VENV)/installed-dev: requirements-dev.lock $(VENV)/installed
	@echo "Installing test tools..." && $(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements-dev.lock
	@touch $@

# The files name everything that is needed. Aegra asks for Python 3.12, and runs on 3.11 all the same.
$(PEERS)/%/installed: benchmarks/peers/%.txt
	@$(PYTHON) -m venv $(@D)
	@echo "Installing $*..." && $(@D)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --ignore-requires-python -r $<
	@touch $@

# For those who change dependencies: resolves pyproject.toml anew. No index host gets into the files.
UV := uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header
lock:
	$(UV) pyproject.toml -o requirements.lock
	$(UV) pyproject.toml --extra dev -c requirements.lock -o requirements-dev.lock

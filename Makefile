# GNU make. From nothing but python3.11 (or newer), make and git: each target sets up what it needs in .venv by itself.
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules

# Looked for once, and only where something is to be set up.
ifeq ($(origin PYTHON),undefined)
PYTHON = $(eval PYTHON := $(shell .ci/find-python))$(PYTHON)
endif
BIN := .venv/bin
CYCLES ?= 200
STATES ?= 10000
EVERY ?= 1
MESSAGES ?= 20000
MINUTES ?= 15
MUTANTS ?= 5000
EXECUTIONS ?= 1000
CALLS ?= 100
MIB ?= 30
LOCK ?= 10
# One more than the cores that CI has: tests wait for processes now and then.
WORKERS ?= 3
ARGS ?=
# The variable silences an advertisement for another version.
MKDOCS := NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs
# Quiet pip: the echoes below report progress; warnings and errors still show.
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check

# The tests by what they are about (CONTRIBUTING.md says which lane a change concerns). A file may be in several lanes;
# the last one has those that need all of the product, and those that take long.
LANES := fast store bridge shared replay cli long
TESTS_fast := tests/unit tests/architecture
TESTS_store := tests/store tests/contract/test_embedded.py tests/contract/test_local.py tests/contract/test_documented.py \
	tests/contract/test_audit.py tests/contract/test_value_types.py tests/property/test_audit_model.py \
	tests/property/test_audit_alike.py tests/property/test_restore.py tests/property/test_rules.py
TESTS_bridge := tests/bridge tests/infra tests/workers tests/contract/test_bridged.py tests/contract/test_pooled.py tests/contract/test_abilities.py tests/contract/test_alike.py \
	tests/contract/test_binding.py tests/contract/test_watching.py tests/property/test_watching.py \
	tests/end_to_end/test_audit_service.py tests/end_to_end/test_metrics.py tests/end_to_end/test_old_client.py \
	tests/end_to_end/test_transactions.py tests/end_to_end/test_typed_state.py
TESTS_shared := tests/contract/test_shared.py tests/contract/test_valkey.py tests/valkey tests/infra/test_engines.py \
	tests/contract/test_postgresql.py tests/postgresql tests/faults/test_shared_faults.py tests/faults/test_distributed.py
TESTS_replay := tests/contract/test_programs.py tests/contract/test_studies.py tests/unit/test_study_spaces.py \
	tests/end_to_end/test_studies.py tests/unit/test_program_loading.py tests/unit/test_program_values.py \
	tests/unit/test_binding.py tests/unit/test_program_options.py tests/unit/test_lm_accounts.py tests/unit/test_lm_budgets.py \
	tests/unit/test_lm_calls.py tests/unit/test_lm_recorded.py tests/unit/test_lm_recordings.py tests/unit/test_recordings.py \
	tests/unit/test_replay.py tests/unit/test_replay_derived.py tests/unit/test_replay_lm.py \
	tests/unit/test_replay_state.py tests/store/test_recordings.py \
	tests/property/test_recordings.py tests/end_to_end/test_lm_recordings.py tests/end_to_end/test_plugin.py \
	tests/end_to_end/test_replay.py
TESTS_cli := tests/unit/test_settings.py tests/unit/test_pictures.py tests/end_to_end/test_audit_commands.py \
	tests/end_to_end/test_audit_pages.py tests/end_to_end/test_db_commands.py tests/end_to_end/test_token_commands.py tests/end_to_end/test_demo.py \
	tests/end_to_end/test_completion.py tests/end_to_end/test_health.py tests/end_to_end/test_live_commands.py tests/end_to_end/test_lm_shown.py \
	tests/end_to_end/test_refused_files.py tests/end_to_end/test_restore_command.py tests/end_to_end/test_serve.py \
	tests/end_to_end/test_service_manager.py \
	tests/end_to_end/test_session_commands.py tests/end_to_end/test_shell.py tests/end_to_end/test_wheel.py
TESTS_long := tests/concurrency tests/faults tests/fuzz tests/property/test_execution_model.py \
	tests/property/test_moves.py tests/property/test_mutants.py tests/property/test_mutated_recordings.py \
	tests/property/test_store_model.py \
	tests/property/test_values_property.py tests/end_to_end/test_benchmarks.py tests/end_to_end/test_docs.py \
	tests/end_to_end/test_forks.py tests/end_to_end/test_large_values.py tests/end_to_end/test_lm_calls.py tests/end_to_end/test_programs.py tests/end_to_end/test_moves.py \
	tests/end_to_end/test_moves_away.py \
	tests/end_to_end/test_readme.py tests/end_to_end/test_refused_calls.py tests/end_to_end/test_remote_workers.py \
	tests/end_to_end/test_pages.py tests/end_to_end/test_production.py tests/end_to_end/test_pooled_tools.py tests/end_to_end/test_suite.py tests/end_to_end/test_tools.py tests/end_to_end/test_tool_log.py tests/end_to_end/test_tracing.py tests/end_to_end/test_watchers.py \
	tests/end_to_end/test_without_tools.py

.PHONY: help setup run serve test test-thorough $(LANES:%=test-%) check lint types imports check-codegen docs docs-serve
.PHONY: fix codegen bench peers crash-test powercut-test fault-test files-test refused-test
.PHONY: fuzz chaos-test distributed-test soak mutants observations clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: .venv/.installed-dev  ## set up .venv (every other target does what it needs of this)

# What the package itself needs. The build backend is installed first and used without isolation, so that it is pinned too.
.venv/.installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || \
		{ echo "error: found no Python 3.11 or newer with venv; install one (Debian: python3 python3-venv)," \
		"or name it: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "creating .venv with $(PYTHON): $$($(PYTHON) benchmarks/interpreter.py)"
	@$(PYTHON) -m venv .venv
	@echo "installing dspex-persist and what it needs"
	@$(BIN)/python $(PIP_INSTALL) -c constraints.txt hatchling editables
	@$(BIN)/python $(PIP_INSTALL) -c constraints.txt --no-build-isolation -e .
	@touch $@

# What its tests and checks need besides: four times as much.
.venv/.installed-dev: .venv/.installed
	@echo "installing the development tools (the first time takes about a minute)"
	@$(BIN)/python $(PIP_INSTALL) -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@

run: .venv/.installed  ## demo: serve, write, kill, start again, show that everything acknowledged is there
	$(BIN)/dspex-persist demo $(ARGS)

serve: .venv/.installed  ## serve on the default file (ARGS="--db PATH --listen HOST:PORT")
	$(BIN)/dspex-persist serve $(ARGS)

test: .venv/.installed-dev  ## run the tests (ARGS="-k name", WORKERS=0 for one process)
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

test-fast:  ## ... only units and architecture: less than half a minute
test-store:  ## ... only the store, and what backends in this process promise
test-bridge:  ## ... only the bridge, its servers and clients
test-shared:  ## ... only several servers on one log
test-replay:  ## ... only recordings and replays
test-cli:  ## ... only the command line
test-long:  ## ... only those that need all of the product, or take long

$(LANES:%=test-%): test-%: .venv/.installed-dev
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(TESTS_$*) $(ARGS)

test-thorough: .venv/.installed-dev  ## ... and those that take long: do the proofs find planted bugs?
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m thorough $(ARGS)

check: lint types imports check-codegen docs  ## everything that is checked without running the product

lint: .venv/.installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: .venv/.installed-dev
	$(BIN)/mypy --strict dspex_persist migrations examples benchmarks

imports: .venv/.installed-dev
	$(BIN)/lint-imports

check-codegen:
	.ci/check-codegen

docs: .venv/.installed-dev  ## check the documentation, and build its site in build/site
	.ci/check-docs
	$(MKDOCS) build --strict --quiet

docs-serve: .venv/.installed-dev  ## show the documentation site while you write (ARGS="--dev-addr HOST:PORT")
	$(MKDOCS) serve $(ARGS)

fix: .venv/.installed-dev  ## format, and mend what the linter can mend
	$(BIN)/ruff check --fix --exit-zero
	$(BIN)/ruff format

# An environment of its own: the generator is older than the runtime, on purpose (constraints-codegen.txt).
.venv-codegen/.installed: constraints-codegen.txt
	@echo "creating .venv-codegen with the protocol compiler" >&2
	@$(PYTHON) -m venv .venv-codegen
	@.venv-codegen/bin/python $(PIP_INSTALL) -c constraints-codegen.txt setuptools grpcio-tools mypy-protobuf
	@touch $@

codegen:  ## generate the protocols' code from proto/
	.ci/codegen

bench: .venv/.installed-dev  ## measure: one table, some seven minutes (ARGS="--help": sections, comparisons)
	$(BIN)/python -m benchmarks.run $(ARGS)

# The peers' requirements do not fit ours, hence an environment of their own.
.venv-peers/.installed: benchmarks/requirements-peers.txt
	@echo "creating .venv-peers with the libraries to compare with"
	@$(PYTHON) -m venv .venv-peers
	@.venv-peers/bin/python $(PIP_INSTALL) -r benchmarks/requirements-peers.txt
	@touch $@

peers: .venv/.installed-dev .venv-peers/.installed  ## measure comparable libraries on the same work, some ten minutes
	.venv-peers/bin/python -m benchmarks.peers $(ARGS)

crash-test: .venv/.installed-dev  ## kill the server CYCLES times (default 200) while clients write
	$(BIN)/python -m tests.faults.crash_test --cycles $(CYCLES) $(ARGS)

powercut-test: .venv/.installed-dev  ## rebuild STATES disks (default 10000) that a power cut may leave, and check them
	$(BIN)/python -m tests.faults.powercut_test --states $(STATES) $(ARGS)

fault-test: .venv/.installed-dev  ## let each operation on a file fail (EVERY=10: every tenth), and check what is left
	$(BIN)/python -m tests.faults.io_faults --every $(EVERY) $(ARGS)

files-test: .venv/.installed-dev  ## change a server's files in every way, hold its lock while it tries for LOCK s (default 10)
	LOCK_WAIT_S=$(LOCK) $(BIN)/python -m pytest -s -m "thorough or not thorough" tests/faults/test_files.py $(ARGS)

refused-test: .venv/.installed-dev  ## have CALLS calls of each kind, of MIB each, refused (default 100 of 30): nothing is kept
	REFUSED_CALLS=$(CALLS) REFUSED_MIB=$(MIB) $(BIN)/python -m pytest -s tests/end_to_end/test_refused_calls.py $(ARGS)

fuzz: .venv/.installed-dev  ## send MESSAGES hostile requests (default 20000) to a server
	$(BIN)/python -m tests.fuzz.fuzz_test --messages $(MESSAGES) $(ARGS)

chaos-test: .venv/.installed-dev  ## kill, stop and starve workers and servers at random for MINUTES (default 15)
	$(BIN)/python -m tests.faults.chaos_test --minutes $(MINUTES) $(ARGS)

distributed-test: .venv/.installed-dev  ## kill, stop and cut servers on one database, and it, for MINUTES (default 15)
	$(BIN)/python -m tests.faults.distributed_test --minutes $(MINUTES) $(ARGS)

soak: .venv/.installed-dev  ## use a server in every way at once for MINUTES (default 15)
	$(BIN)/python -m tests.faults.soak_test --minutes $(MINUTES) $(ARGS)

mutants: .venv/.installed-dev  ## import MUTANTS recordings that were changed at random (default 5000)
	MUTANTS=$(MUTANTS) $(BIN)/python -m pytest -s tests/property/test_mutants.py $(ARGS)

observations: .venv/.installed-dev  ## hold what EXECUTIONS of each of 12 clients (default 1000) saw against the file
	EXECUTIONS_EACH=$(EXECUTIONS) $(BIN)/python -m pytest -s tests/concurrency/test_observations.py $(ARGS)

# Never a database: those may be somebody's.
clean:  ## remove environments, caches and built packages
	rm -rf .venv .venv-codegen .venv-peers dist build
	rm -rf .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis .benchmarks
	find . -path ./.git -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

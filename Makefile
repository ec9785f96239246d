# Everything here works from a fresh checkout: the first target that needs it makes .venv.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.stamp

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-guest test check bench soak lock clean

help:  ## print the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | while IFS="$$(printf '\t')" read -r name what; do \
	    printf '  make %-10s %s\n' "$$name" "$$what"; done

setup: $(STAMP)  ## make .venv with the locked packages and ckptd in it

$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	    || { echo "ckptd needs Python 3.11 or newer; try make PYTHON=python3.11" >&2; exit 1; }
	@if ! $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null; then \
	    [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null \
	        || { echo "python's venv module is missing: install python3-venv" >&2; exit 1; }; \
	    apt-get update -qq && apt-get install -y -qq python3-venv; fi
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check --require-hashes -r requirements.lock
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

# What guests are assembled with and run in. What cannot be had is said, and its tests are skipped.
.PHONY: system
system:
	@missing=; \
	command -v as >/dev/null && command -v ld >/dev/null || missing="$$missing binutils"; \
	command -v qemu-system-x86_64 >/dev/null || missing="$$missing qemu-system-x86"; \
	command -v ip >/dev/null || missing="$$missing iproute2"; \
	[ -z "$$missing" ] || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq \
	    && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing >/dev/null; } \
	    || echo "missing here:$$missing; kvm and qemu guests cannot all be tried" >&2

demo: setup system  ## see it work: two daemons, a guest, a killed primary; 10 seconds
	$(BIN)/ckptd demo --seconds 10

demo-guest: setup system  ## build the small Linux guest that the qemu demo runs, from Debian packages
	$(BIN)/python -m ckptd.demo.linux

test: setup system  ## run the tests
	$(BIN)/pytest -q

check: setup  ## ruff, mypy --strict and the import contracts
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

bench: setup system  ## measure the figures that the documents claim
	$(BIN)/ckptd bench

soak: setup system  ## kill and promote for a long time, checking everything
	$(BIN)/python -m tests.soak

lock:  ## pin the newest packages that pyproject.toml allows (needs pip-tools)
	$(BIN)/pip-compile -q --upgrade --generate-hashes --strip-extras --allow-unsafe --extra dev --no-header \
	    --no-emit-options --no-emit-index-url --no-emit-trusted-host --no-emit-find-links \
	    -o requirements.lock pyproject.toml
	@sed -i '/^# The following packages are considered/d' requirements.lock

clean:  ## remove what was built, and .venv
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# `make demo` and `make test` install what they need into .venv, once; a second run installs nothing.
PYTHON ?= python3
BIN := .venv/bin
export CONTRALTO_DATA ?= $(abspath ../shared/data)

.PHONY: demo test test-lowest audit format lock clean
.DEFAULT_GOAL := demo

demo: .venv/demo.stamp
	$(BIN)/contralto demo

test: .venv/test.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest -n 2 --dist loadgroup

# The lowest versions that pyproject.toml allows: unit tests, in an environment of their own.
test-lowest: .venv-lowest/test.stamp
	.venv-lowest/bin/pytest -n 2 --dist loadgroup -m "not slow and not browser"

# Known holes in the locked versions; needs the network.
audit: .venv/test.stamp
	$(BIN)/uv tool run pip-audit --require-hashes --disable-pip -r requirements/demo.txt
	$(BIN)/uv tool run pip-audit --require-hashes --disable-pip -r requirements/test.txt

format: .venv/test.stamp
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The tested versions, with the hashes of their files. Versions newer than these are allowed by pyproject.toml.
lock: .venv/test.stamp
	$(BIN)/uv pip compile pyproject.toml --extra pretrained --universal --generate-hashes --python-version 3.11 \
		--no-header --upgrade -q -o requirements/demo.txt
	$(BIN)/uv pip compile pyproject.toml --extra test --universal --generate-hashes --python-version 3.11 \
		--no-header --upgrade -q -c requirements/demo.txt -o requirements/test.txt
	$(BIN)/uv pip compile pyproject.toml --extra test --resolution lowest-direct --generate-hashes \
		--python-version 3.11 --no-header --upgrade -q -o requirements/lowest.txt

.venv/python.stamp:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Contralto needs Python 3.11 or newer: make PYTHON=python3.11 ..."; exit 2; }
	$(PYTHON) -m venv .venv
	@touch $@

.venv/demo.stamp: requirements/demo.txt pyproject.toml | .venv/python.stamp
	$(BIN)/pip install -q --disable-pip-version-check --require-hashes -r requirements/demo.txt
	$(BIN)/pip install -q --disable-pip-version-check --no-deps -e .
	@touch $@

.venv/test.stamp: requirements/test.txt pyproject.toml | .venv/python.stamp
	$(BIN)/pip install -q --disable-pip-version-check --require-hashes -r requirements/test.txt
	$(BIN)/pip install -q --disable-pip-version-check --no-deps -e .
	@touch $@ .venv/demo.stamp

.venv-lowest/test.stamp: requirements/lowest.txt pyproject.toml
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/pip install -q --disable-pip-version-check --no-deps --require-hashes -r requirements/lowest.txt
	.venv-lowest/bin/pip install -q --disable-pip-version-check --no-deps -e .
	@touch $@

clean:
	rm -rf .venv .venv-lowest dist build

PYTHON ?= python3
PY = .venv/bin/python

.PHONY: demo test test-full lint bench clean

# The environment is made once and again whenever the dependencies change.
.venv/.installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check --editable '.[test,bench]'
	@touch $@

.venv/.demo: pyproject.toml
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check --editable '.[data,report]'
	@touch $@

demo: .venv/.demo
	$(PY) examples/quickstart.py --out runs/quickstart

lint: .venv/.installed
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

# Everything that a change can break.
test: lint
	$(PY) -m pytest -n auto --maxprocesses 8 --dist worksteal

# And the long statistics.
test-full: lint
	$(PY) -m pytest -n auto --maxprocesses 8 --dist worksteal -m "full or not full"

# The benchmarks against PyTorch, small; the peer has an environment of its own.
.venv-peer/.installed: Makefile
	$(PYTHON) -m venv .venv-peer
	.venv-peer/bin/python -m pip install --quiet --disable-pip-version-check 'torch==2.13.0' numpy
	@touch $@

bench: .venv/.installed .venv-peer/.installed
	$(PY) benchmarks/pgd.py --small

clean:
	rm -rf .venv .venv-peer .cache runs benchmarks/out

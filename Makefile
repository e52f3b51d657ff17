PYTHON ?= python3
PYTHON312 ?= python3.12
PY = .venv/bin/python
NEWEST = .venv-newest/bin/python
PEER = .venv-peer/bin/python
PIP = -m pip install --quiet --disable-pip-version-check
PYTEST = -m pytest -n auto --maxprocesses 8 --dist worksteal
QUICKLY = --xla_backend_optimization_level=0
EMITTERS = --xla_cpu_use_fusion_emitters=false

.PHONY: demo test test-full test-newest lint peers bench clean

# The environment is made once and again whenever the dependencies change.
.venv/.installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(PY) $(PIP) --editable '.[test,bench]'
	@touch $@

.venv/.demo: pyproject.toml
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) $(PIP) --editable '.[data,report]'
	@touch $@

demo: .venv/.demo
	$(PY) examples/quickstart.py --out runs/quickstart

lint: .venv/.installed
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

# Everything that a change can break. Most of its time goes into compiling small programs: XLA
# works less hard on them here than in the longer suites below, which compile as users do. Without
# LLVM's optimisations and, where XLA still has that flag, its fusion emitters (it ends the process
# on flags that it does not know), compiling takes a third of the time.
test: lint
	@flags='$(QUICKLY)'; \
	if XLA_FLAGS='$(EMITTERS)' $(PY) -c 'import jax; jax.devices()' 2>/dev/null; \
	then flags="$$flags $(EMITTERS)"; fi; \
	echo "XLA_FLAGS='$$flags' $(PYTEST)"; \
	XLA_FLAGS="$$flags $$XLA_FLAGS" $(PY) $(PYTEST)

# And the long statistics; what needs the peers' environment stays with `make peers`.
test-full: lint
	$(PY) $(PYTEST) -m "not peers"

# The suite on the newest jax and all other dependencies of today, and on Python 3.12.
test-newest:
	test -x $(NEWEST) || $(PYTHON312) -m venv .venv-newest
	$(NEWEST) $(PIP) --upgrade --upgrade-strategy eager --editable '.[test,bench]'
	$(NEWEST) $(PYTEST)

# PyTorch and the libraries on top of it, whose pins conflict with ours. torchattacks' own pins
# (an old requests, torchvision) serve no attack of it.
.venv-peer/.installed: Makefile
	$(PYTHON) -m venv .venv-peer
	$(PEER) $(PIP) 'torch==2.13.0' numpy pillow 'foolbox==3.3.4' 'pyautoattack==0.2.0'
	$(PEER) $(PIP) --no-deps 'torchattacks==3.5.1' 'robustbench==1.1.1' 'adv-lib==0.2.8'
	$(PEER) $(PIP) 'jax==0.10.2' flax optax scipy
	@touch $@

# Attacks, projections and certificates against other libraries on the same weights and inputs.
peers: .venv/.installed .venv-peer/.installed
	$(PY) -m pytest tests/peers -m peers

# The benchmarks, small.
bench: .venv/.installed .venv-peer/.installed
	$(PY) benchmarks/pgd.py --small
	$(PY) benchmarks/compile.py --small
	$(PY) benchmarks/loader.py --small
	$(PY) benchmarks/autoattack.py --small
	$(PY) benchmarks/attacks.py --small
	$(PY) benchmarks/difference.py --small
	$(PY) benchmarks/certify.py --small
	$(PY) benchmarks/cge.py --small

clean:
	rm -rf .venv .venv-newest .venv-peer .cache runs benchmarks/out

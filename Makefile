# make demo      set up, then train the three parts on captioned shapes; the last line names the report
# make test      the fast tests          make test-all   every test
# make lint      ruff and mypy           make lock       choose the versions in requirements.lock anew
# make clean     forget the environment and the caches; runs/ and data/ stay
#
# VENV=DIR keeps the environment elsewhere, PYTHON=python3.12 chooses the interpreter, WORKERS=8 the test processes.

PYTHON  ?= $(shell command -v python3 || command -v python)
VENV    ?= .venv
WORKERS ?= 2
BIN     := $(VENV)/bin
STAMP   := $(VENV)/installed
TORCH   ?= $(shell sed -n 's/^torch==//p' requirements.lock)

# Parallel over test files, so one thread each: two processes of many threads fight for the same cores.
PYTEST := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false \
          $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile

.PHONY: setup demo test test-slow test-all lint lock clean

setup: $(STAMP)

# The stamp is written last, so an interrupted installation is taken up again.
$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Carrara needs Python 3.11 or newer, this is %d.%d: make PYTHON=python3.12" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements.lock -e '.[dev]'
	@touch $@

demo: $(STAMP)
	$(BIN)/python train.py

test: $(STAMP)
	$(PYTEST) -m "not slow"

test-slow: $(STAMP)
	$(PYTEST) -m slow || [ $$? -eq 5 ]  # 5: there are none

test-all: $(STAMP)
	$(PYTEST)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy src tests $(wildcard *.py)

# What a clean environment resolves to, torch held where it is (make lock TORCH=X.Y.Z moves it).
# torch's build suffix (+cpu) and its CUDA packages are left out, so that one lock serves machines with and without.
lock:
	@set -e; temporary=$$(mktemp -d); trap 'rm -rf "$$temporary"' EXIT; \
	$(PYTHON) -m venv $$temporary/venv; \
	$$temporary/venv/bin/python -m pip install --quiet 'torch==$(TORCH)' -e '.[dev]'; \
	{ sed '/^[^#]/,$$d' requirements.lock; \
	  $$temporary/venv/bin/python -m pip freeze --exclude-editable \
	  | grep -vE '^(nvidia-|cuda-|triton==)' | sed -E 's/^(torch==[^+]*).*/\1/'; } > $$temporary/lock; \
	cp $$temporary/lock requirements.lock

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

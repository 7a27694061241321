# Two commands on a fresh machine: `make demo` and `make test`. Everything they need is installed into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO_OUT ?= runs/demo
# Test processes, with one thread each where a test does not ask for more: two that spin in turn would wait for each other.
JOBS ?= 2

.PHONY: demo test test-browser lint format clean

demo: $(VENV)/.installed
	$(BIN)/collage compare --out $(DEMO_OUT) --resume

test: $(VENV)/.installed
	OMP_WAIT_POLICY=passive OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --numprocesses $(JOBS) --dist worksteal

# The report page in a real browser; CHROMIUM names another one than the first that is found.
CHROMIUM ?= $(firstword $(shell command -v chromium || command -v chromium-browser || command -v google-chrome))

test-browser: $(VENV)/.browser
	@test -n "$(CHROMIUM)" || { echo "make test-browser needs a Chromium and found none; remedy: apt-get install chromium, or CHROMIUM=/path/to/chrome"; exit 1; }
	CHROMIUM=$(CHROMIUM) OMP_WAIT_POLICY=passive OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m browser tests/report

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/.installed: pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/*)
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "torch-collage needs Python 3.10 or newer; set PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

$(VENV)/.browser: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[browser]'
	touch $@

clean:
	rm -rf $(VENV) build dist

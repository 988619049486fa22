# Two commands on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test bench docs clean

demo: $(VENV)/installed
	$(BIN)/torchfuse recipe --out out

test: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/installed-test: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@ $(VENV)/installed

$(VENV)/installed-bench: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[test,benchmarks]'
	touch $@ $(VENV)/installed-test $(VENV)/installed

bench: $(VENV)/installed-bench
	mkdir -p out
	for script in benchmarks/*.py; do \
		$(BIN)/python $$script --json out/$$(basename $$script .py).json || exit 1; \
	done

docs: $(VENV)/installed-bench
	$(BIN)/python docs/generate.py

clean:
	rm -rf $(VENV) out

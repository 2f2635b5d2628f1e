# Everything here works on a fresh machine: the virtual environment and the install are part of each target.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CPP := $(shell find csrc tests/cuda_on_cpu -name '*.h' -o -name '*.cpp' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh')
INSTALL := $(BIN)/pip install --quiet --no-compile --constraint constraints.txt
# Byte code on all cores, where pip takes a minute with one; not of the tests in packages, which nothing imports. Some
# packages hold templates that are no Python. Without it, where PYTHONDONTWRITEBYTECODE is set, the tests take
# minutes longer: every process compiles what it imports.
COMPILE := $(BIN)/python -m compileall -qq -j 0 -x '/tests?/' $(VENV)/lib || true
BUILD_INPUTS := setup.py pyproject.toml constraints.txt MANIFEST.in $(CPP)

.PHONY: demo test check bench sanitize portability format clean

demo: $(VENV)/.run
	$(BIN)/ssah-fast demo -o demo

test: $(VENV)/.dev
	bash tests/install_chromium.sh
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP)
	$(BIN)/mypy --num-workers 2

bench: $(VENV)/.run
	$(BIN)/ssah-fast bench all --csv bench/results

sanitize: $(VENV)/.dev
	PYTHON=$(BIN)/python bash tests/sanitize.sh

portability:
	bash tests/portability.sh

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

clean:
	rm -rf $(VENV) build dist *.egg-info demo ssah_fast/*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/bin/pip:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip

$(VENV)/.run: $(VENV)/bin/pip $(BUILD_INPUTS)
	$(INSTALL) --editable '.[train,report]'
	$(COMPILE)
	touch $@

$(VENV)/.dev: $(VENV)/bin/pip $(BUILD_INPUTS)
	$(INSTALL) --editable '.[train,eval,report,dev]'
	$(COMPILE)
	touch $(VENV)/.run $@

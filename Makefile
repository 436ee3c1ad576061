# Everything runs in a virtual environment of its own, with every version pinned by constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2
PROMPT ?= a large red circle left of a small blue star on a white background

.PHONY: demo test bench tiny docs notebooks lint clean
.DELETE_ON_ERROR:

demo: $(VENV)/installed
	$(BIN)/functional-sd3 generate "$(PROMPT)" --out out/demo.png

test: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/mypy
	@# Tests start many processes, which would each compile the modules anew where PYTHONDONTWRITEBYTECODE is set.
	@$(BIN)/python -m compileall -q functional_sd3 bench
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal

bench: $(VENV)/installed-test
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[test,bench]"
	$(BIN)/python -m bench

tiny: $(VENV)/installed
	$(BIN)/python -m functional_sd3.recipes.shapes.tiny params/tiny --work out/tiny
	$(BIN)/python -m functional_sd3.recipes.shapes.few_steps params/tiny-4 --start params/tiny --work out/tiny-4

docs: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[docs]"
	$(BIN)/python docs/site

notebooks: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[docs]"
	$(BIN)/python docs/learn/notebooks.py

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) out build site

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "functional_sd3 needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable .
	@touch $@

$(VENV)/installed-test: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[test]"
	@touch $@ $(VENV)/installed

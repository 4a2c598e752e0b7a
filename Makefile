# make demo: a fresh clone to a report.   make test, make lint, make format: for those who change the code.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PACKAGES := methods exporters runtimes profiles

.PHONY: venv demo test lint format clean

venv: $(VENV)/.installed-all

# Installing follows pyproject.toml: the stamps are remade when it changes. The development set holds the other one.
$(VENV)/.installed-all: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[all]'
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@ $(VENV)/.installed-all

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

demo: venv
	$(BIN)/compress run --method ppcl --target trt-fp16 --target ort-fp32 --target openvino-fp16

# One thread a process: the tests' networks are small, and threads that wait for each other cost more than they bring.
test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile $(PYTEST_FLAGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@# mypy wants one folder a package: a tree of links in which the five folders are one.
	rm -rf .mypy/compressor && mkdir -p .mypy/compressor
	ln -s $(foreach entry,$(wildcard compressor/*) $(PACKAGES),../../$(entry)) .mypy/compressor/
	cd .mypy && ../$(BIN)/mypy --config-file ../pyproject.toml --package compressor

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .mypy .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist *.egg-info

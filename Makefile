# make quickstart: install, and train a small model on real text, with no download
# make test:       the suite; make faults: real processes, killed; make parity: against Hugging Face; make compile: large programs
PYTHON ?= python3.12
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: quickstart test faults parity compile lint oldest wheel clean
.DELETE_ON_ERROR:

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt -e .
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(BIN)/pip install -q -c constraints.txt -e '.[test]'
	touch $@

quickstart: $(VENV)/installed
	$(BIN)/jaxllm train configs/quickstart.py

test: $(VENV)/installed-test lint
	$(BIN)/pytest -m "not fault and not compile" tests
	$(BIN)/pytest -o addopts="-q" --doctest-modules jaxllm

faults: $(VENV)/installed-test
	$(BIN)/pytest -m fault tests

compile: $(VENV)/installed-test
	$(BIN)/pytest -m compile tests

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy jaxllm

# The oldest JAX that pyproject.toml admits.
oldest: .venv-oldest/installed
	.venv-oldest/bin/pytest -m "not fault and not compile and not slow" tests

.venv-oldest/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/pip install -q -e '.[test]' jax==0.11.2 jaxlib==0.11.2
	touch $@

# Hugging Face's own models as the reference, in an environment of their own.
parity: $(VENV)/installed-test .venv-parity/installed
	rm -rf build/parity && mkdir -p build/parity
	.venv-parity/bin/python tests/parity/make_references.py build/parity
	JAXLLM_PARITY=build/parity $(BIN)/pytest tests/parity

.venv-parity/installed:
	python3.11 -m venv .venv-parity
	.venv-parity/bin/pip install -q torch==2.13.0 transformers
	touch $@

wheel: $(VENV)/installed
	$(BIN)/pip wheel -q --no-deps -w dist .

clean:
	rm -rf $(VENV) .venv-oldest .venv-parity build dist .jax_cache

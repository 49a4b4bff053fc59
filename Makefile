# Everything a newcomer types. `make quickstart` and `make test` build what is missing.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# three tests at a time: some wait for processes that they start; groups as tests/conftest.py says
MANY   := -n 3 --no-loadscope-reorder

.PHONY: quickstart test lint types unit test-slow test-deploy deploy-containers test-gpu test-optimised test-processors scenarios mutants zoo bench robustness evidence methods format clean

quickstart: $(STAMP)
	$(BIN)/fedsim run scenarios/quickstart.toml

# types are held by one of the tests, beside the others
test: lint unit

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if (3, 11) <= v < (3, 14) else f"fedsim needs Python 3.11 to 3.13, {sys.executable} is {v[0]}.{v[1]}; say which one: make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable . --group dev
	touch $(STAMP)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

# the many processes that tests start find everything compiled, pytest's own copies too, also where
# the environment would keep them from it
unit: export PYTHONDONTWRITEBYTECODE :=
unit: $(STAMP)
	$(BIN)/python -m compileall -q fedsim strategies clients
	$(BIN)/pytest $(MANY)

# what takes minutes, and more examples of what is said of all inputs
test-slow: $(STAMP)
	$(BIN)/pytest -m slow
	$(BIN)/pytest -m 'hypothesis and not slow and not gpu and not deploy and not processors' --hypothesis-profile=thorough

# two deployments at a time: they mostly wait
test-deploy: $(STAMP)
	$(BIN)/pytest -m 'deploy and not slow' -n 2 --no-loadscope-reorder -p no:randomly tests/deployment

# the compose files in real containers; FOLDER keeps what is fetched for it
deploy-containers: $(STAMP)
	tests/deployment/containers.sh $(FOLDER)

test-gpu: $(STAMP)
	$(BIN)/pytest -m gpu

# the laws with everything that makes fedsim fast forced on, then forced off
test-optimised: $(STAMP)
	FEDSIM_OPTIMISATIONS=on $(BIN)/pytest $(MANY) tests/laws tests/parity
	FEDSIM_OPTIMISATIONS=off $(BIN)/pytest $(MANY) tests/laws tests/parity

# all tests as other processors would run them, then those that emulate one of another maker
test-processors: $(STAMP)
	$(BIN)/python -m tests.processors $(MANY)

# scenarios of every tier; DATA=FOLDER has a folder for each data set that is read from files
scenarios: $(STAMP)
	$(BIN)/fedsim check scenarios --tier all $(if $(DATA),--data $(DATA))

# breaks the five strategies in small ways, and says what no scenario and no test noticed
mutants: $(STAMP)
	$(BIN)/python -m tests.mutation.run --report docs/mutation.md

# user code that nobody wrote, against plain torch and itself, for an hour or MINUTES
zoo: $(STAMP)
	$(BIN)/python -m tests.zoo $(MINUTES)

bench: $(STAMP)
	$(BIN)/python -m benchmarks.run

robustness: $(STAMP)
	$(BIN)/python -m benchmarks.robustness

# the pages of declared studies, in about an hour each; what was run before (studies/) is not run again
evidence: $(STAMP)
	$(BIN)/fedsim evidence --page docs/evidence.md $(if $(DATA),--data $(DATA))

methods: $(STAMP)
	$(BIN)/fedsim evidence --kind benchmark --page docs/methods.md $(if $(DATA),--data $(DATA))

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache

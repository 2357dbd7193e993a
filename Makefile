# Every target sets up .venv by itself when it is missing or when what it is made from has changed.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed
SERVICES := .venv-services
SERVICES_READY := $(SERVICES)/.installed
# One thread a process: the tests run two processes side by side and depend on exact, repeatable arithmetic. They start many
# processes, which find the modules compiled, also where the environment forbids that.
TEST_ENV := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 MLFLOW_DISABLE_TELEMETRY=true BENTOML_DO_NOT_TRACK=True
WORKERS ?= 2

.PHONY: help install demo test test-shuffled test-failed test-services test-longer test-browser test-all check-wheel check-formats golden lint format gpu-check bench bench-peers serve mlflow lock clean
.DEFAULT_GOAL := help

help:  ## Show the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; name one with make PYTHON=…"; exit 1; }
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[train,dev]'
	@touch $@

# Ray brings twenty packages that nothing else needs, and these tests need nothing that trains: an environment of their own.
$(SERVICES_READY): pyproject.toml constraints.txt
	test -d $(SERVICES) || $(PYTHON) -m venv $(SERVICES)
	$(SERVICES)/bin/python -m pip install --quiet --constraint constraints.txt --upgrade pip
	$(SERVICES)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[ray,postgres]' pytest pytest-timeout
	@touch $@

install: $(READY)  ## Make .venv with everything in it

demo: $(READY)  ## Fine-tune, compare, serve and ask over HTTP, on real data (DATA=folder uses your own)
	$(BIN)/finetune demo $(if $(DATA),--data $(DATA))

test: $(READY)  ## The default tests, under five minutes on two cores
	$(TEST_ENV) $(BIN)/python -m pytest -n $(WORKERS)

test-shuffled: $(READY)  ## The default tests in another order (SEED=number repeats one), to find those that depend on it
	$(TEST_ENV) $(BIN)/python -m pytest -n $(WORKERS) --shuffle $(or $(SEED),$(shell date +%s))

test-longer: $(READY)  ## The tests that take longest, which CI runs beside the default ones
	$(TEST_ENV) $(BIN)/python -m pytest -n $(WORKERS) -m 'longer and not slow'

test-failed: $(READY)  ## The tests that failed last time, one after another
	$(TEST_ENV) $(BIN)/python -m pytest -m '' --last-failed --last-failed-no-failures none

test-services: $(SERVICES_READY)  ## The tests that need PostgreSQL or Ray, against real ones; a skip is a failure
	$(TEST_ENV) $(SERVICES)/bin/python -m pytest --services

test-browser: $(READY)  ## The page in a real Chromium (Debian: apt-get install chromium)
	$(TEST_ENV) FINETUNE_BROWSER_REQUIRED=1 $(BIN)/python -m pytest -n $(WORKERS) -m browser tests/browser

test-all: $(READY)  ## The default tests and the slow ones
	$(TEST_ENV) $(BIN)/python -m pytest -n $(WORKERS) -m ''

check-wheel: $(READY)  ## Build the distributions and use the wheel alone in an environment of its own
	$(BIN)/python .ci/check_wheel.py

golden: $(READY)  ## Write anew what tests expect people to see; read the difference before committing it
	rm -f tests/golden/screens/*.txt
	$(TEST_ENV) $(BIN)/python -m pytest -q tests --renew-golden -m ''

check-clients: $(READY)  ## Generate a Python and a TypeScript client from the OpenAPI document and drive a job with each
	$(BIN)/python .ci/check_clients.py

check-bento: $(READY)  ## Build bentos and the serving image's contents, install each without torch, and ask them
	$(BIN)/python .ci/check_bento.py

check-formats: $(READY)  ## Run exported models in OpenVINO and in ONNX Runtime Web, and open the exported page
	$(BIN)/python .ci/check_formats.py

lint: $(READY)  ## Style, types and import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

gpu-check: $(READY)  ## Build .gpu-check for a machine with CUDA and no network (GPU_PYTHON=3.12 GPU_PACKAGES=list DATA=photos)
	$(BIN)/python benchmarks/gpu_check/build.py --out .gpu-check $(addprefix --python ,$(GPU_PYTHON)) $(addprefix --installed ,$(GPU_PACKAGES)) $(addprefix --data ,$(DATA))

bench: $(READY)  ## The quick benchmarks; benchmarks/README.md has figures and the longer ones
	$(BIN)/python benchmarks/training_step.py --out training_step.json
	$(BIN)/python benchmarks/jobs.py --out jobs.json

bench-peers: $(READY)  ## Ours beside fastai, scikit-learn, a plain loop (DATA=folder; takes hours)
	$(BIN)/python benchmarks/peers/run.py $(addprefix --data ,$(DATA)) --repeats $(or $(REPEATS),3) --out peers.json

format: $(READY)  ## Rewrite the code in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

serve: $(READY)  ## Serve the promoted model on 127.0.0.1:3000
	$(BIN)/finetune serve

mlflow: $(READY)  ## Open the MLflow pages on the workspace's runs
	$(BIN)/finetune mlflow

lock: $(READY)  ## Write constraints.txt and docker/requirements-serve.txt from what is installed
	@{ sed -n '/^#/p' constraints.txt; $(BIN)/python -m pip freeze --exclude-editable | grep -v -i -E '^(setuptools|wheel)=='; } > constraints.tmp
	@mv constraints.tmp constraints.txt
	@{ sed -n '/^#/p' docker/requirements-serve.txt; $(BIN)/python -c 'from finetune.bento import core_requirements; print(*core_requirements(), sep="\n")'; } > constraints.tmp
	@mv constraints.tmp docker/requirements-serve.txt

clean:  ## Remove the environment and everything that tools leave behind
	rm -rf $(VENV) $(SERVICES) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .gpu-check build dist *.egg-info

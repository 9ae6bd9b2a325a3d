# `make demo` runs the whole job on this machine; `make test` the tests. Both install first.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

export DO_NOT_TRACK := true
export MLFLOW_DISABLE_TELEMETRY := true
export MLFLOW_MODEL_CATALOG_URI :=
export DVC_NO_ANALYTICS := 1
export DVC_SITE_CACHE_DIR := $(CURDIR)/.dvc/tmp/site
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: install demo test quick test-stack lint ui up down stack stack-down teachers lock clean
.DEFAULT_GOAL := help

help:
	@echo "make install   create $(VENV) from requirements.lock and fetch the trained teachers"
	@echo "make demo      run the whole job here: data, teachers' check, distillation, scores, gate, registry"
	@echo "make test      run the tests          make lint   ruff and mypy"
	@echo "make quick     in a minute: walls, wiring, the algorithm, statistics, params, gate"
	@echo "make up        the production servers in Docker      make down   stop them (their data stays)"
	@echo "make stack     the same servers without Docker       make stack-down"
	@echo "make test-stack  the production servers' tests: PostgreSQL is needed"
	@echo "make ui        MLflow's pages on http://127.0.0.1:5000"
	@echo "make teachers  train the teachers anew (long) and put them into teachers-store/"
	@echo "make lock      resolve requirements.in into requirements.lock"
	@echo "make clean     remove what runs have made (not the registry in mlflow/)"
.PHONY: help

install: $(STAMP)

$(STAMP): requirements.lock
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || python3 -m venv $(VENV)
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make install PYTHON=/path/to/python3.11")'
	$(BIN)/pip install --quiet --no-compile --requirement requirements.lock
	$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true  # what pip would do with one core
	$(BIN)/python -m dvc pull --quiet --remote bundled data/teachers
	touch $(STAMP)

demo: install
	$(BIN)/python -m flows.distill --promote auto

# One thread a process: torch's threads would wait for each other. tests/conftest.py says how many processes.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder
QUICK := house walls wiring distill rollout route field methods statistics params gate

test: install
	$(PYTEST)

quick: install
	$(PYTEST) $(QUICK:%=tests/test_%.py)

test-stack: install
	$(BIN)/python -m pytest -m stack tests/test_stack.py

# The production servers: docs/operations.md.
up: .env
	docker compose up --detach --build --wait
	@echo "MLflow http://localhost:5000   Prefect http://localhost:4200   next: eval \"\$$($(BIN)/python -m tasks secrets --exports)\" && $(BIN)/prefect deployment run distill/prod"

down:
	docker compose --profile gpu down

.env: | install
	$(BIN)/python -m tasks secrets --out .env

stack: install
	$(BIN)/python scripts/stack.py up

stack-down:
	$(BIN)/python scripts/stack.py down

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/mypy

ui: install
	$(BIN)/mlflow ui --host 127.0.0.1 --port 5000 --backend-store-uri sqlite:///mlflow/mlflow.db

teachers: install
	$(BIN)/python -m tasks teachers --out data/teachers
	$(BIN)/python -m dvc commit --force teachers
	$(BIN)/python -m dvc push --remote bundled data/teachers

lock: install
	uv pip compile --python-version 3.11 --no-annotate --no-header requirements.in | grep -Ev '^(nvidia-|triton|cuda-)' > requirements.resolved
	{ sed -n '/^#/p;/^#/!q' requirements.lock; cat requirements.resolved; } > requirements.lock.new
	mv requirements.lock.new requirements.lock && rm requirements.resolved

clean:
	rm -rf runs .prefect .cache .mypy_cache .ruff_cache .pytest_cache data/raw data/curated data/validated data/encoded checkpoints reports/data_docs reports/score

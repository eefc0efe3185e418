# Every target sets up the virtual environment by itself. VENV=path uses or makes another one.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
STAMP := $(VENV)/.am_diffusers-installed

.PHONY: demo test check format cli-surface venv clean

# Exact versions of everything, so that a fresh machine gets what CI ran. The environment is rebuilt when they change.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev,ocr,imagenet]"
	touch $@

venv: $(STAMP)

# The main job on the embedded default: fine-tunes the tiny SD3 pipeline, about 10 minutes on two cores.
demo: $(STAMP)
	$(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
		--num_cpu_threads_per_process $(shell nproc) scripts/finetune.py --config configs/tiny_sd3.yaml

test: $(STAMP)
	$(BIN)/python -m pytest -m "not slow and not gpu"

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m "slow and not gpu"

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The committed list of flags, after one was added or changed on purpose.
cli-surface: $(STAMP)
	$(BIN)/python tests/cli_surface.py

clean:
	rm -rf build dist .pytest_cache .ruff_cache outputs

# Every target sets up the virtual environment by itself. VENV=path uses or makes another one.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
STAMP := $(VENV)/.am_diffusers-installed
PARITY_VENV ?= .venv-parity
PARITY_STAMP := $(PARITY_VENV)/.parity-installed

.PHONY: demo test test-slow check format cli-surface parity bench-oracles venv clean

# Exact versions of everything, so that a fresh machine gets what CI ran. The environment is rebuilt when they change.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev,ocr,imagenet,prodigy]"
	touch $@

venv: $(STAMP)

# The main job on the embedded default: fine-tunes the tiny SD3 pipeline, about 10 minutes on two cores.
demo: $(STAMP)
	$(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
		--num_cpu_threads_per_process $(shell nproc) scripts/finetune.py --config configs/tiny_sd3.yaml

# Two processes, a file at a time; JOBS=0 runs all in one.
JOBS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --durations=20

test: $(STAMP)
	$(PYTEST) -m "not slow and not gpu"

test-slow: $(STAMP)
	$(PYTEST) -m "slow and not gpu"

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# The original packages hpsv2 and image-reward, which can't be installed beside ours, in an environment of their own
# (6 GB; PARITY_VENV=path chooses where).
$(PARITY_STAMP): requirements/parity.txt requirements/parity-originals.txt
	$(PYTHON) -m venv $(PARITY_VENV)
	$(PARITY_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements/parity.txt
	$(PARITY_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
		-r requirements/parity-originals.txt
	touch $@

# Scores and gradients against those packages, on equal random weights; writes docs/parity.json and its table.
# Needs 10 GB of memory for the full-size ViT-H/14.
parity: $(STAMP) $(PARITY_STAMP)
	$(BIN)/python scripts/docs/check_parity.py --python $(PARITY_VENV)/bin/python --output docs/parity.json

# Distances to the tilt where it is known, into docs/methods.md: what is missing of the committed results, which
# took about 20 minutes on one core.
bench-oracles: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python eval/bench_oracles.py

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The committed list of flags, after one was added or changed on purpose.
cli-surface: $(STAMP)
	PYTHONPATH=eval $(BIN)/python tests/cli_surface.py

clean:
	rm -rf build dist .pytest_cache .ruff_cache outputs

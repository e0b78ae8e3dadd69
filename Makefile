# `make train` and `make test` install what they need into .venv and run; nothing else is required.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The CUDA build of JAX where there is an NVIDIA GPU.
CUDA := $(if $(shell command -v nvidia-smi 2>/dev/null),cuda)
ARGS ?=
comma := ,

.PHONY: train test lint gpu-test clean

train: $(VENV)/.train
	$(BIN)/python -m train.main $(ARGS)

test: $(VENV)/.test lint
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -q

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check

# On a machine with a Hopper GPU; a skipped test fails there.
gpu-test: $(VENV)/.test
	$(BIN)/python -m pytest -m gpu

$(VENV)/.python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 12) and "jfp8 needs Python 3.12 or newer; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.train: $(VENV)/.python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
	  --editable .$(if $(CUDA),[$(CUDA)])
	touch $@

$(VENV)/.test: $(VENV)/.train
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
	  --editable .[test$(comma)compile$(comma)tensorboard$(if $(CUDA),$(comma)$(CUDA))]
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache

# make venv         .venv with everything that development and the quickstart need
# make quickstart   teach a small pretrained model Shakespeare in INT8, and see what INT8 costs
# make test         the test suite (CPU); make test-slow, make test-gpu, make test-multigpu for the rest
# make lint         ruff and mypy
# make smoke        build the wheel, install it into a clean environment, run it there

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A full set needs about 7 GB; with less than 12 GB free, vision and transformers are left out.
FREE_MB := $(shell df -Pm . | awk 'NR==2{print $$4}')
ROOMY := $(shell [ $(FREE_MB) -gt 12000 ] && echo yes)
ifeq ($(ROOMY),yes)
EXTRAS := dev,vision,hf,eval,tensorboard
TORCH ?= torch==2.14.1 torchvision==0.29.1
else
EXTRAS := dev,tensorboard
TORCH ?= torch==2.13.0
endif
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q

.PHONY: venv quickstart test test-slow test-gpu test-multigpu lint smoke clean

venv: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is older than Python 3.11; set PYTHON=python3.11 or newer"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH) -e '.[$(EXTRAS)]'
	touch $@

quickstart: venv
	$(BIN)/qrecipes run quickstart

test: venv  # in the order of the folders: the longest files are not the last
	$(PYTEST) -n 2 --dist loadfile --no-loadscope-reorder tests

test-slow: venv
	$(PYTEST) -m slow tests

test-gpu: venv
	$(PYTEST) -m gpu tests

test-multigpu: venv
	$(PYTEST) -m multigpu tests

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

smoke: venv
	tools/wheel_smoke.sh $(BIN)/python

clean:
	rm -rf dist build .pytest_cache .mypy_cache .ruff_cache

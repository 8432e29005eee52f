# The two commands that need nothing but Python >= 3.11: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: install demo test lint peers torture gpu clean
install: $(VENV)/.installed

# torch is asked for first and by its exact version: a looser range pulls gigabytes of CUDA onto a machine without a GPU.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[export,excel,eval,dev]'
	touch $@

demo: install
	$(BIN)/uf demo

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Two processes of one thread each: half the time of one process with two threads on two cores.
test: install lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --cov --cov-report=term --cov-fail-under=85

peers: install
	$(BIN)/python -m pip install --quiet -c constraints.txt trl 'lm-eval==0.4.13'
	$(BIN)/python -m pytest -m peer

# kill -9 at 200 random instants each of SFT, DPO and QLoRA training (KILLS=n for fewer) and of exports, time budgets of
# 60, 180 and 300 s, memory that runs out, 10,000 broken GGUF headers: hours on two cores. `make test` does a little of each.
torture: install
	KILLS=$${KILLS:-200} $(BIN)/python -m pytest tests/torture tests/reliability/test_target_gguf_fuzz.py \
		-m "not gpu and not peer" -s

gpu: install
	$(BIN)/python -m pytest -m gpu

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .coverage* build *.egg-info

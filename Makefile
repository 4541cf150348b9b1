# Everything sets itself up: `make demo` and `make test` need Python 3.12 and nothing else.
PYTHON ?= $(shell command -v python3.12 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
# Processes of the unit tests; some of the tests start two ranks of their own.
WORKERS ?= 2
# The slowest tests, printed at the end of every call.
DURATIONS := --durations 15 --durations-min 1
RUN := OMP_NUM_THREADS=1 $(BIN)/python
DIST := $(RUN) -m torch.distributed.run --standalone --nproc-per-node 4 \
	--log-dir runs/test-logs --redirects 1:3,2:3,3:3 -m pytest tests/distributed -q --timeout 300 $(DURATIONS)

.PHONY: setup te demo demo-seeds test test-fast test-unit test-simulate test-gpu test-dist layouts pretrain-tiny adapt-tiny bench compare docs format lint type smoke check clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if v >= (3, 12) else \
		f"error: Python 3.12 or newer is needed, {v[0]}.{v[1]} was found; set PYTHON=/path/to/python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	@echo "Installing PyTorch, Megatron-Core and the test tools (a few minutes) ..."
	$(BIN)/pip install --quiet -e '.[test]' -c constraints.txt
	touch $@

# What --simulate takes for Transformer Engine: its Python layer, without its libraries.
TE := $(VENV)/transformer_engine_python

te: setup $(TE)/.installed  ## Transformer Engine's Python layer for the simulation of GPUs

$(TE)/.installed: simulate.txt
	rm -rf $(TE)
	$(BIN)/pip install --quiet --no-deps --target $(TE) -r simulate.txt
	rm -rf $(TE)/transformer_engine/wheel_lib/*.so
	touch $@

demo: setup  ## pre-train/fine-tune a tiny model, ESPO, control, table and curves
	PYTHON=$(BIN)/python examples/run_espo_tiny.sh $(TASK)

demo-seeds: setup  ## the demo with three seeds
	for seed in 1 2 3; do PYTHON=$(BIN)/python examples/run_espo_tiny.sh $(TASK) --seed $$seed; done

pretrain-tiny: setup  ## pre-train a tiny model on plain text and sample from it
	PYTHON=$(BIN)/python examples/pretrain_tiny.sh

adapt-tiny: setup  ## a tiny autoregressive model, adapted to block diffusion, beside one from nothing
	PYTHON=$(BIN)/python examples/adapt_tiny.sh

test: test-unit test-simulate test-dist  ## all tests

test-fast: setup  ## before a commit: what needs no long run, in under three minutes
	$(RUN) -m pytest tests/unit -q --timeout 600 -n $(WORKERS) --dist loadfile -m "not slow" $(DURATIONS)

test-unit: setup
	$(RUN) -m pytest tests/unit -q --timeout 600 -n $(WORKERS) --dist loadfile $(DURATIONS)
	$(RUN) -m pytest tests/te -q --timeout 600 $(DURATIONS)

# Where the layer cannot be installed its tests say so and are skipped; .ci/run does not let them.
test-simulate: setup  ## real jobs on GPUs that are not there
	-$(MAKE) te
	$(RUN) -m pytest tests/simulate -q --timeout 600 $(DURATIONS)

test-gpu:  ## on a machine with a GPU and Transformer Engine, in the Python that has them (PYTHON=)
	$(PYTHON) -m pytest tests/gpu -q --timeout 600

test-dist: setup
	@mkdir -p runs
	$(DIST)

layouts: setup  ## the table of docs/parallelism.md, measured anew
	@mkdir -p runs
	LAYOUT_TABLE=docs/parallelism.md $(DIST)

# Other people's code, where PEERS names a folder with checkouts and their environment (docs/peers.md).
PEERS ?=

bench: setup  ## rollouts, updates and whole iterations against a straightforward implementation, and with PEERS= against others
	for shape in large-vocabulary small-vocabulary tiny; do \
		$(BIN)/python -W ignore -m benchmarks.iteration --shape $$shape \
			--out runs/benchmark/$$shape-iteration.json || exit 1; done
	$(BIN)/python -W ignore -m benchmarks.rollout_and_elbo --shape tiny --out runs/benchmark/tiny-random.json
	for shape in large-vocabulary small-vocabulary; do \
		$(BIN)/python -W ignore -m benchmarks.rollout_and_elbo --shape $$shape \
			--out runs/benchmark/$$shape-random.json && \
		$(BIN)/python -W ignore -m benchmarks.confident --shape $$shape && \
		$(BIN)/python -W ignore -m benchmarks.rollout_and_elbo --shape $$shape --only rollout \
			--trained runs/benchmark/$$shape/checkpoint \
			--out runs/benchmark/$$shape-trained.json || exit 1; done
	$(if $(PEERS),$(BIN)/python -W ignore -m benchmarks.confident --shape tiny && \
		$(BIN)/python -W ignore -m benchmarks.peers --peer-python $(PEERS)/venv/bin/python \
			--fast-dllm $(PEERS)/Fast-dLLM --llada $(PEERS)/LLaDA --espo $(PEERS)/ESPO \
			--shape large-vocabulary small-vocabulary tiny --out runs/benchmark/peers.json)

compare: setup  ## objectives on the demo's tasks with the same bases, seeds, sampler and noise
	for task in sudoku countdown; do $(RUN) -W ignore -m benchmarks.compare --task $$task \
		--table docs/objectives.md --figure docs/objectives_$$task.png || exit 1; done

docs: setup  ## docs/api.md, made from docstrings
	$(RUN) tools/make_api_docs.py

format: setup
	$(BIN)/ruff format megatron_espo tools tests benchmarks setup.py
	$(BIN)/ruff check --fix megatron_espo tools tests benchmarks setup.py

lint: setup
	$(BIN)/ruff format --check megatron_espo tools tests benchmarks setup.py
	$(BIN)/ruff check megatron_espo tools tests benchmarks setup.py

type: setup
	$(BIN)/mypy

smoke: setup  ## the demo's path at its smallest
	PYTHON=$(BIN)/python SMOKE=1 examples/run_espo_tiny.sh sudoku --out runs/smoke

check: lint type test

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache

# Two commands matter: `make paper` and `make test`. Both set up .venv first.
PYTHON ?= python3
SCALE ?= quick
WORKERS ?= 2
NOTEBOOKS ?=
MODELS ?=
PEERS ?=

BIN := .venv/bin
# torch is demanded at its exact version in the same pip call as everything else: a looser demand could fetch another
# build first, and those are large.
TORCH := $(shell grep '^torch==' constraints.txt)

# The kernel is the one of .venv, even where the user has a kernel of the same name.
export JUPYTER_PREFER_ENV_PATH := 1

.PHONY: help paper test coverage test-browser test-faults lint lab bench bench-peers models figures notebooks book clean
.DEFAULT_GOAL := help

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-13s %s\n", $$1, $$2}' Makefile

.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
	  { echo "$(PYTHON) is not Python 3.11 to 3.13; name one that is: make PYTHON=python3.11 ..." >&2; exit 1; }
	@echo "Setting up .venv (a few minutes, once) ..."
	@$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt $(TORCH) -e '.[dev]'
	@touch $@

# Ray, for the tests of sweeps on a cluster.
.venv/.cluster: .venv/.installed
	$(BIN)/pip install -q -c constraints.txt $(TORCH) -e '.[dev,cluster]'
	@touch $@

paper: .venv/.installed  ## the main job: run all notebooks (SCALE=quick) into runs/notebooks/
	$(BIN)/python tools/paper.py --scale $(SCALE) $(NOTEBOOKS)

lint: .venv/.installed  ## ruff, check and format; the rules of imports; sizes
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/python -m tools.sizes

# One thread a worker: torch's threads would fight over the cores. The notebooks' tests run one at a time, for they start two
# notebooks at once themselves.
test: lint  ## lint, unit tests, slow ones, every notebook at ci scale, then in a browser
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -m "not notebook and not browser and not faults" -n $(WORKERS) --durations=60
	$(BIN)/pytest -q -m "notebook and not browser and not faults" --durations=0
	$(BIN)/pytest -q -m browser -n $(WORKERS) --dist loadfile --durations=0

coverage: .venv/.installed  ## lines and branches of the core that the unit tests reach
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -m "not slow and not notebook and not browser and not faults" -n $(WORKERS) \
	  --cov --cov-report=term --cov-report=json:runs/coverage.json
	@$(BIN)/python -c "import json; t = json.load(open('runs/coverage.json'))['totals']; \
	  print(f'lines {t[\"percent_statements_covered\"]:.1f}%, branches {t[\"percent_branches_covered\"]:.1f}%')"

test-browser: .venv/.installed  ## only the notebooks in a browser; needs a Chromium
	$(BIN)/pytest -q -m browser --durations=0

test-faults: .venv/.cluster  ## only the tests that kill, damage, fill the disk and compete (minutes)
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -m faults -n $(WORKERS) --dist loadfile --durations=0

lab: .venv/.installed  ## open the notebooks in JupyterLab
	$(BIN)/jupyter lab notebooks

bench: .venv/.installed  ## speed against plain baselines and the machine's limits, into runs/bench/
	$(BIN)/python -m benchmarks.run $(BENCH)

# k-diffusion demands torchvision, of which the index has builds for some builds of torch only, and an older numpy than ours.
# Its samplers need neither.
.venv-peers/.installed: benchmarks/peers.txt constraints.txt
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/pip install -q $(TORCH) -r benchmarks/peers.txt
	.venv-peers/bin/pip install -q --no-deps k-diffusion==0.1.1.post1
	@touch $@

bench-peers: .venv-peers/.installed  ## speed against k-diffusion, diffusers and d3rlpy, in an environment of its own
	.venv-peers/bin/python -m benchmarks.peers $(PEERS)

models: .venv/.installed  ## train the models that ship in the package again (hours; goes on where it was stopped)
	$(BIN)/python -m tools.models $(MODELS)

figures: .venv/.installed  ## copy a run's figures, their data and the verdicts into figures/
	$(BIN)/python -m tools.promote --figures

notebooks: .venv/.installed  ## clean a run's executed notebooks into notebooks/
	$(BIN)/python -m tools.promote

book: .venv/.installed  ## README, executed notebooks and the library's reference as one site, into runs/book/html/
	$(BIN)/python -m tools.book

clean:  ## delete everything a run made (runs/) and the caches; .venv stays
	rm -rf runs build dist *.egg-info .pytest_cache .ruff_cache .coverage*
	find pgdlib tests tools notebooks \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +

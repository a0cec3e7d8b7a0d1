# The project's commands. The first one that needs it makes .venv and installs into it what constraints.txt pins.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# Every `make run` trains anew; pass RUN_DIR=runs/NAME twice to see a run resumed.
RUN_DIR ?= runs/digits-$(shell date +%Y%m%d-%H%M%S)
# What `make compare` compares the working tree with.
BASE ?= HEAD
PYTEST := $(BIN)/python -m pytest
# Dozens of processes import kfdist, and each would compile it for itself.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help run test test-chaos test-slow gpu gpu-wheels lint format protos bench bench-full compare wheel clean distclean prometheus node

help:  ## Shows this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "kfdist needs Python 3.11 or later; say which one: make PYTHON=python3.11 ..." >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

run: $(INSTALLED)  ## Trains the bundled example with every process in its place
	$(BIN)/kfdist train --set run.dir=$(RUN_DIR)

# Runs pytest with the second arguments, and with the first ones beside it at a lower priority, shown afterwards.
define beside
status=0; log=$$(mktemp); \
nice -n 10 $(PYTEST) $(1) >$$log 2>&1 & alone=$$!; \
trap 'kill $$alone; rm -f $$log; exit 130' INT TERM; \
$(PYTEST) $(2) || status=1; \
wait $$alone || status=1; \
cat $$log; rm -f $$log; exit $$status
endef

# Of the tests that start processes, which wait more than they compute and whose clocks are set for a busy machine, three
# files run at a time, those that last longest first. The others fill the cores meanwhile, at a lower priority, and are
# shown afterwards.
ALONE := tests/models tests/unit tests/contracts tests/architecture tests/support tests/deploy tests/gpu
TOGETHER := tests/end_to_end tests/pool tests/links tests/distributed tests/control tests/owner tests/acceptance

test: $(INSTALLED) prometheus node  ## Runs the suite: unit, gloo, Ray, gRPC, Prometheus
	@$(call beside,--numprocesses auto --maxprocesses 8 $(ALONE),--numprocesses 3 --dist loadfile --no-loadscope-reorder $(TOGETHER))

test-chaos: $(INSTALLED)  ## Runs the long fault loops
	$(PYTEST) -m chaos

test-slow: $(INSTALLED) prometheus  ## Runs the slow tier: soak, installed wheel, all real models
	@$(call beside,-m slow --numprocesses 2 tests/models,-m slow --ignore tests/models)

# On a machine with a CUDA device, which may have its own torch and no network: PYTHON is that torch's interpreter.
gpu:  ## Tests and measures on a CUDA device; PYTHON=... has its torch
	PYTHON=$(PYTHON) bash tests/gpu/run.sh

# A machine of another Python: WHEELS_PYTHON=3.12.
WHEELS_PYTHON ?= 3.12
gpu-wheels: $(INSTALLED)  ## Downloads to .whl/ what a GPU machine lacks
	$(BIN)/python -m pip download --quiet --no-deps --only-binary=:all: --dest .whl --constraint constraints.txt \
	  --python-version $(WHEELS_PYTHON) --implementation cp \
	  $(foreach n,2_34 2_28 2_27 2_17 2014,--platform manylinux$(if $(filter 2014,$(n)),,_)$(n)_x86_64) \
	  --requirement tests/gpu/wheels.txt

lint: $(INSTALLED)  ## Checks format, style, types and the direction of imports
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/pyright
	$(BIN)/lint-imports

format: $(INSTALLED)  ## Formats the code and sorts imports
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

protos: $(INSTALLED)  ## Regenerates the gRPC stubs from protos/
	$(BIN)/python protos/generate.py

DIGITS := --task digits-autoencoder --task digits-cnn

# Short forms of the measurements, under ten minutes on two cores; they say how things stand, not what is published.
bench: $(INSTALLED)  ## Measures all of it shortly, into bench-results/
	$(BIN)/kfdist bench overhead --steps 150 --out bench-results/overhead.json
	$(BIN)/kfdist bench stall --model mlp --steps 150 --out bench-results/stall.json
	$(BIN)/kfdist bench memory --model mlp --long-steps 1000 --out bench-results/memory.json
	$(BIN)/kfdist bench inversion --size 1024 --size 2048 --out bench-results/inversion.json
	$(BIN)/kfdist bench traffic --model resnet18 --method rs-kfac --inverse-period 20 --out bench-results/traffic.json
	$(BIN)/kfdist bench target $(DIGITS) --rival sgd --rival adamw --rival muon --rival rs-kfac --rival optimizer \
	  --rival adaptive --seconds 3 --seeds 0 --out bench-results/target.json
	$(BIN)/kfdist bench scale --out bench-results/scale.json

# What docs/performance.md has in frames but the targets of the character GPT and on MNIST, about an hour on two cores with
# nothing beside it. A target that was reached before isn't trained again: remove benchmarks/results/target.json for that.
bench-full: $(INSTALLED)  ## Measures all of it, and writes benchmarks/results/ and the tables made of it
	for name in overhead stall traffic inversion memory scale; do $(BIN)/kfdist bench $$name || exit; done
	$(BIN)/kfdist bench target $(DIGITS)
	for name in mlp gpt; do $(BIN)/kfdist bench overhead --model $$name --out benchmarks/results/overhead-$$name.json || exit; done
	$(BIN)/python benchmarks/steps_to_accuracy.py
	$(BIN)/python benchmarks/default_run.py
	$(BIN)/python -m benchmarks.figures

compare: $(INSTALLED)  ## Shows that the numbers are those of the commit BASE, bit for bit
	$(BIN)/python benchmarks/compare_commits.py $(BASE)

wheel: $(INSTALLED)  ## Builds dist/*.whl
	rm -rf build dist
	$(BIN)/python -m build --wheel --no-isolation

# The tests against a real Prometheus skip themselves, saying so, where Debian's package can't be installed.
prometheus:
	@if [ "$$(id -u)" = 0 ] && ! command -v promtool >/dev/null && command -v apt-get >/dev/null; then \
	  export DEBIAN_FRONTEND=noninteractive RUNLEVEL=1; \
	  { timeout 120 apt-get update -qq && timeout 180 apt-get install -y -qq --no-install-recommends prometheus; } \
	    >/dev/null 2>&1 || echo "note: Debian's prometheus could not be installed; its tests will be skipped"; \
	fi

# The test with a Node.js client skips itself, saying so, where its packages can't be installed.
node:
	@if [ "$$(id -u)" = 0 ] && ! command -v npm >/dev/null && command -v apt-get >/dev/null; then \
	  export DEBIAN_FRONTEND=noninteractive; \
	  { timeout 120 apt-get update -qq && timeout 300 apt-get install -y -qq --no-install-recommends nodejs npm; } \
	    >/dev/null 2>&1 || true; \
	fi; \
	if [ ! -e tests/node/node_modules/.package-lock.json ]; then \
	  timeout 180 npm ci --prefix tests/node --ignore-scripts --no-audit --no-fund >/dev/null 2>&1 \
	    || echo "note: the packages of tests/node could not be installed by npm; the test with Node.js will be skipped"; \
	fi

clean:  ## Removes what was built and cached
	rm -rf build dist *.egg-info .ruff_cache .import_linter_cache .hypothesis .pytest_cache
	find kfdist tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean  ## Removes the virtual environment too
	rm -rf $(VENV)

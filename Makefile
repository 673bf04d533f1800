# make demo    one prompt on the bundled model, dense against sparse: videos and a table in out/demo
# make test    lint, types and tests
# make oldest  the tests of models and pipelines with the oldest diffusers that pyproject.toml allows
# make docs    write docs/models.md anew
# make format  let ruff lay out the code
# Each makes its own virtual environment in .venv; a second run installs nothing.

PYTHON ?= python3
VENV   ?= .venv
# An open range would bring the newest build with gigabytes of CUDA packages to a machine that has no GPU.
TORCH  ?= $(if $(shell command -v nvidia-smi 2>/dev/null),torch,torch==2.13.0)
OLDEST ?= 0.41.0
PROMPT ?= a striped red circle bouncing on a gradient blue and cyan background
PLANS  ?= balanced radial:kind=block neighborhood:window=0.3
OUT    ?= out/demo

BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: demo test oldest docs lint types format clean

demo: $(VENV)/.demo
	$(BIN)/dit-sparse compare --model bundled --prompt "$(PROMPT)" $(foreach plan,$(PLANS),--plan $(plan)) --yardstick --out $(OUT)

test: lint types
	$(BIN)/python -m pytest -q --durations=10

oldest: $(VENV)/.oldest-$(OLDEST)
	$(VENV)/oldest/bin/python -m pytest -q tests/models tests/pipelines

docs: $(VENV)/.dev
	$(BIN)/python -m tests.models.document

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) out build dist *.egg-info

$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "dit-sparse needs Python 3.10 or newer; choose one with: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "no venv module: install your system's python3-venv package"; exit 1; }
	$(BIN)/python -m pip install -q $(TORCH)
	@touch $@

$(VENV)/.demo: pyproject.toml | $(VENV)/.torch
	$(BIN)/python -m pip install -q -e '.[metrics]'
	@touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/.torch
	$(BIN)/python -m pip install -q -e '.[dev,metrics]'
	@touch $@

# an environment of its own that sees all packages of the first one, except diffusers
$(VENV)/.oldest-$(OLDEST): $(VENV)/.dev
	$(BIN)/python -m venv --without-pip --clear $(VENV)/oldest
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> $$($(VENV)/oldest/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/first.pth
	$(BIN)/python -m pip --python $(VENV)/oldest/bin/python install -q --no-deps --ignore-installed diffusers==$(OLDEST)
	@touch $@

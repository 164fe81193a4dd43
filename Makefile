# Every target calls the tools a person would; `make help` lists them.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c

# Debian's own Python where it is new enough: ordinary users can read it, which Slurm tests need.
PYTHON ?= $(shell /usr/bin/python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo /usr/bin/python3 || echo python3)
IMAGE ?= cpu
SITE ?= laptop
EXPERIMENT ?= demo
# Real data beside the checkout, where there is any.
DATA := $(wildcard $(abspath ../shared/data))
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check

.PHONY: help setup dev image push-sqsh push-sif demo reproduce test test-long test-tools benchmarks image-emulated release lint format golden docs docs-reference docs-gallery lock lock-tools clean

help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup: .venv/ready ## Install the tools this machine lacks (apt, as root; elsewhere they are only listed) and the command line into .venv

# Nothing is taken whose hash is not in the lock; ours is built by the hatchling in it.
.venv/ready: pyproject.toml requirements-dev.lock installation/laptop/install-tools
	installation/laptop/install-tools
	$(PYTHON) -m venv .venv
	$(PIP) --require-hashes --only-binary :all: --requirement requirements-dev.lock
	$(PIP) --no-index --no-deps --no-build-isolation --editable .
	touch $@

dev: test-tools image push-sqsh ## All that work on the code needs: tools, tests' tools, the image, lint at every commit
	$(BIN)/pre-commit install

image: setup ## Build containers/$(IMAGE) into an OCI image (IMAGE=cpu)
	$(BIN)/post-training image build $(IMAGE)

push-sqsh: setup ## Put the built image into the image store and render its EDF into edf/ (SITE=laptop)
	$(BIN)/post-training image push-sqsh $(IMAGE) --site $(SITE)

push-sif: setup ## Put the built image into the image store as a SIF, for Singularity (SITE=lumi, or one of your own, renders its EDF)
	$(BIN)/post-training image push-sif $(IMAGE) $(if $(filter-out laptop,$(SITE)),--site $(SITE))

demo: image push-sqsh ## The main job from nothing: build, train in Slurm, show, reproduce: identical
	reproducibility/demo/demo

reproduce: image push-sqsh ## Run an experiment again and compare with what it gave (EXPERIMENT=demo)
	$(BIN)/post-training experiment check reproducibility/$(EXPERIMENT) \
		--environment $(firstword $(wildcard reproducibility/$(EXPERIMENT)/environment.toml) edf/post-training.toml)

# At once, since each leaves a core idle half of the time: the image is built, and tests/stack run in
# it; the tests that need no image run, then those that start it, beside those with a Slurm of their
# own. `make`, not $(MAKE): a line with that is run even by `make -n`.
test: test-tools lint ## The whole test suite; tests/stack runs inside the image
	@mkdir -p build
	{ make image push-sqsh && tests/inside-image -m 'stack and not long'; } >build/stack.log 2>&1 & stack=$$!; \
	failed=0; $(BIN)/pytest -m 'not (stack or long or image or slurm)' || failed=1; \
	if make image push-sqsh; then \
	  $(BIN)/pytest -m 'slurm and not long' >build/slurm.log 2>&1 & slurm=$$!; \
	  $(BIN)/pytest -m 'image and not (slurm or long)' || failed=1; \
	  wait $$slurm || failed=1; cat build/slurm.log; \
	else failed=1; fi; \
	wait $$stack || failed=1; cat build/stack.log; \
	exit $$failed

test-long: test-tools image push-sqsh ## Random kills, emulation, experiments: run it when you touch what they cover
	installation/laptop/install-tools tests long
	$(BIN)/pytest -m 'long and not stack'
	tests/inside-image -m 'stack and long'

test-tools: setup ## Install what only tests need (apt, as root)
	installation/laptop/install-tools tests

benchmarks: image push-sqsh ## Measure what each page of reproducibility/benchmarks says, and write it there (NAMES="start packing")
	$(BIN)/python reproducibility/benchmarks/measure_all $(NAMES)

image-emulated: setup ## Build the gh200 image where arm64 has to be emulated (as root; an hour or more)
	installation/laptop/emulate-arm64
	$(BIN)/post-training image build gh200

# Both are built and packed before either is released: that writes into the checkout. On x86_64 the
# tests of gh200 run under emulation; these are the ones of losses, and of one stage.
GH200_TESTS ?= tests/stack/models/test_head.py tests/stack/train/test_sft_loss.py \
	tests/stack/train/test_dpo_loss.py tests/stack/stages/test_init_model.py -m 'stack and not long'
release: image-emulated image ## Build, pack, test and release gh200 and cpu from this clean checkout: containers/images.lock
	$(BIN)/post-training image push-sqsh gh200 --site clariden
	$(BIN)/post-training image push-sqsh cpu
	$(BIN)/post-training image release gh200 -- $(GH200_TESTS)
	$(BIN)/post-training image release cpu

lint: setup ## ruff, shellcheck, hadolint, whitespace, large files, secrets (pre-commit)
	$(BIN)/pre-commit run --all-files --show-diff-on-failure

format: setup ## Format the Python code
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

golden: setup ## Write the golden files anew; read the diff before you commit it
	$(BIN)/pytest tests/golden --write-golden

docs: setup ## Build the pages into build/docs; a link that leads nowhere fails
	$(BIN)/python -m sphinx -q -n -W --keep-going -c docs . build/docs

docs-reference: setup ## Write docs/reference from the command line and the models of the settings
	$(BIN)/python docs/make_reference.py

docs-gallery: setup ## Write docs/reference/templates.md, inside the image that was last made
	$(BIN)/post-training edf run --dev . $(if $(DATA),--mount $(DATA):$(DATA):ro) edf/post-training.toml -- \
	  env PYTHONPATH=/run/post-training/dev/src python docs/make_gallery.py

lock: setup ## Resolve containers/$(IMAGE)/*.in into locks with hashes, and lock the Debian base anew
	$(BIN)/post-training image lock $(IMAGE)

lock-tools: setup ## Resolve what pyproject.toml asks for into requirements-dev.lock and uv.lock, with hashes
	$(BIN)/post-training image lock-tools

clean: ## Remove what this checkout made; the image store stays
	rm -rf .venv build edf/post-training*.toml

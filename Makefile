# The short way in. Every target first makes .venv from constraints.txt, once; `make help` lists the targets.
#   make finetune RECIPE=driving [MODEL=...] [HARDWARE=...] [ARGS="stage.steps=400 --resume auto"]
# For a scheduler, call .venv/bin/anyflow itself: make hides its exit codes (2: mistake of the user, 75: start it again).

PYTHON ?= python3
VENV := .venv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check install -qq --constraint constraints.txt
ANYFLOW := $(VENV)/bin/anyflow
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)

RECIPE ?=
MODEL ?=
HARDWARE ?=
ARGS ?=
NAME ?=
DOMAIN ?= driving
CLIPS ?= 1000
export PROMPT ?= A green car drives slowly and changes left from the middle lane to the left lane. A blue car is ahead in the right lane.
STEPS ?= 1,4,16

.DEFAULT_GOAL := help
.PHONY: help install finetune teacher forward onpolicy consistency dmd codec base sample plan data experiment mlflow
.PHONY: bench doctor play
.PHONY: test test-slow lint

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

# --- training ---------------------------------------------------------------------------------------------------------

# $(call train,STAGE): a bare RECIPE is a file of the stage's folder; one with a slash or .yaml is taken as it stands.
define train
	@test -n "$(RECIPE)" || { echo 'which one? make $(1) RECIPE=NAME, where NAME is one of:' \
		$(patsubst recipes/$(1)/%.yaml,%,$(wildcard recipes/$(1)/*.yaml)) >&2; exit 2; }
	$(ANYFLOW) train $(if $(findstring /,$(RECIPE))$(filter %.yaml,$(RECIPE)),$(RECIPE),$(1)/$(RECIPE)) \
		$(if $(MODEL),--model $(MODEL)) $(if $(HARDWARE),--hardware $(HARDWARE)) $(ARGS)
endef

finetune: $(VENV)/.installed ## teach an any-step model a domain: RECIPE=driving|robotics|games, or from a first frame: driving-i2v|...
	$(call train,finetune)

onpolicy: $(VENV)/.installed ## correct an any-step model on its own samples: RECIPE=tiny|wan2.1-t2v-1.3b|...
	$(call train,onpolicy)

forward: $(VENV)/.installed ## make a flow-matching model any-step: RECIPE=tiny|wan2.1-t2v-1.3b|...
	$(call train,forward)

teacher: $(VENV)/.installed ## plain flow matching, before the forward stage: RECIPE=tiny|...
	$(call train,teacher)

consistency: $(VENV)/.installed ## a baseline, consistency distillation sampled by re-noising: RECIPE=tiny
	$(call train,consistency)

dmd: $(VENV)/.installed ## a baseline, 4-step distribution matching sampled by re-noising: RECIPE=tiny
	$(call train,dmd)

codec: $(VENV)/.installed ## a small VAE from nothing: RECIPE=tiny
	$(call train,codec)

base: $(VENV)/.installed-sim ## the embedded tiny models from nothing: render, codec, teacher, forward, on-policy (hours)
	test -d data/shards/driving-open || $(ANYFLOW) data make driving-open --clips 3000 --heldout 600
	test -d data/shards/driving || $(ANYFLOW) data make driving --clips 1500
	test -d data/shards/robotics || $(ANYFLOW) data make robotics --clips 600
	test -d data/shards/games || $(ANYFLOW) data make games --clips 600
	test -d data/shards/games-low || $(ANYFLOW) data make games --clips 2000 --seed 11 --look low --out data/shards/games-low
	for stage in codec teacher forward onpolicy; do \
		$(ANYFLOW) train $$stage/tiny --out runs/tiny-$$stage --resume auto $(ARGS) || exit; \
	done
	$(ANYFLOW) train forward/tiny-causal model.weights=runs/tiny-forward/model \
		--out runs/tiny-causal-forward --resume auto $(ARGS)
	$(ANYFLOW) train forward/tiny-world model.weights=runs/tiny-causal-forward/model \
		--out runs/tiny-world-forward --resume auto $(ARGS)
	$(ANYFLOW) train onpolicy/tiny-world --out runs/tiny-world-onpolicy --resume auto $(ARGS)
	@echo 'the models are in runs/tiny-{onpolicy,causal-forward,world-onpolicy}/model; copy them to data/models to ship them'

# --- looking ----------------------------------------------------------------------------------------------------------

sample: $(VENV)/.installed ## clips of a prompt at several step counts: PROMPT="..." [MODEL=folder] [STEPS=1,4,16]
	$(ANYFLOW) sample "$$PROMPT" --model $(or $(MODEL),data/models/tiny) --steps $(STEPS) $(ARGS)

play: $(VENV)/.installed ## steer a causal model by keyboard, in a page on this machine: [MODEL=folder] (data/models/tiny-world)
	$(ANYFLOW) play $(if $(MODEL),--model $(MODEL)) $(ARGS)

plan: $(VENV)/.installed ## the memory that recipes need on GPUs, all of them or RECIPE=forward/wan2.1-t2v-14b [MODEL=...] [HARDWARE=...]
	$(ANYFLOW) plan $(RECIPE) $(if $(MODEL),--model $(MODEL)) $(if $(HARDWARE),--hardware $(HARDWARE)) $(ARGS)

experiment: $(VENV)/.installed ## answer a question by its arms and seeds: NAME=any-step|retention|control|control-retention|causal|...
	@test -n "$(NAME)" || { echo 'which one? make experiment NAME=..., where NAME is one of:' \
		$(patsubst experiments/%.yaml,%,$(wildcard experiments/*.yaml)) >&2; exit 2; }
	$(ANYFLOW) experiment $(NAME) $(ARGS)

mlflow: $(VENV)/.installed ## the runs in a browser, on this machine only (127.0.0.1)
	$(ANYFLOW) mlflow --serve $(ARGS)

bench: $(VENV)/.installed ## figures: training step, streaming, loader, start
	$(VENV)/bin/python -m experiments.bench $(ARGS)

doctor: $(VENV)/.installed ## examine this machine, its GPU or its CPU, in 7 minutes: a line of JSON an item, and what is wrong
	$(ANYFLOW) doctor $(ARGS)

data: $(VENV)/.installed-sim ## render more clips: DOMAIN=driving|driving-open|robotics|games CLIPS=1000
	$(ANYFLOW) data make $(DOMAIN) --clips $(CLIPS) $(ARGS)

# --- checking ---------------------------------------------------------------------------------------------------------

test: $(VENV)/.installed-dev ## the quick tests
	$(VENV)/bin/python -m pytest -m "not slow" -n logical --maxprocesses 8 --dist worksteal $(ARGS)

test-slow: $(VENV)/.installed-dev ## the tests that take minutes
	$(VENV)/bin/python -m pytest -m slow $(ARGS)

lint: $(VENV)/.installed-dev ## style and types
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/lint-imports --no-logo
	$(VENV)/bin/mypy anyflow

# --- installing -------------------------------------------------------------------------------------------------------

install: $(VENV)/.installed ## .venv with everything that training and sampling need

# torch comes first. On a GPU machine the pinned release is its CUDA build. Without a GPU the CPU build (0.2 GB instead
# of 5) is looked for among local wheels, then on PyTorch's CPU index, which may be out of reach: then whatever the
# usual index holds under the same pin.
$(VENV)/.installed: constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("anyflow needs Python 3.11 or newer: make PYTHON=python3.11 ..." if sys.version_info < (3, 11) else 0)'
	@test -x $(VENV)/bin/python || { echo "making $(VENV) (a few minutes, once)"; $(PYTHON) -m venv $(VENV); }
	@if nvidia-smi -L >/dev/null 2>&1 || $(VENV)/bin/python -c 'from importlib.metadata import version as v; assert v("torch").split("+")[0] == "$(TORCH)"' 2>/dev/null; \
	then :; \
	else $(PIP) --no-deps --no-index torch==$(TORCH)+cpu 2>/dev/null \
		|| $(PIP) --no-deps --retries 0 --timeout 10 --index-url https://download.pytorch.org/whl/cpu torch==$(TORCH)+cpu 2>/dev/null \
		|| echo "no CPU build of torch in reach: taking the usual one"; \
	fi
	@echo "installing the packages of constraints.txt"
	@$(PIP) torch setuptools
	@$(PIP) --no-build-isolation --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@$(PIP) --no-build-isolation --editable '.[dev]'
	@touch $@

$(VENV)/.installed-sim: $(VENV)/.installed
	@$(PIP) --no-build-isolation --editable '.[sim]'
	@touch $@

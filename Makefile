# Every target makes the environment that it needs under .venvs/, from plain
# python3 (3.11 or newer) and pip, and keeps it until pyproject.toml changes.
# `make` alone lists the targets. ARGS goes to the program that a target runs:
# make test ARGS="-k vmap -x"

PYTHON ?= python3
WORKERS ?= 2
ARGS ?=

# The versions of `make test-versions`, and the Pythons to run each under, best
# first. `make test-jax-0.8.3` works as well; Python 3.11 is the default.
VERSIONS := 0.7.2 0.10.2 newest
PYTHONS_newest := 3.13 3.12

UV := .venvs/uv/bin/uv
export UV_NO_PROGRESS := 1
export UV_HTTP_TIMEOUT ?= 180

.PHONY: help
help:
	@sed -n 's/^\([a-z%-]*\):.*## /\1|/p' Makefile | \
	  while IFS='|' read -r name what; do printf 'make %-16s%s\n' "$$name" "$$what"; done

# ---- environments

$(UV):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "jax_revseg needs Python 3.11 or newer, and $(PYTHON) is" \
	    "$$($(PYTHON) --version 2>&1). Name another: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv .venvs/uv
	.venvs/uv/bin/pip install --quiet --disable-pip-version-check uv

# $(1): an interpreter; $(2): what uv installs; $(3): what pip installs before
# that, since uv reads none of pip's settings, which may say where a package is.
define environment
	$(UV) venv --quiet --clear --seed --python $(1) $(@D)
	$(if $(3),$(@D)/bin/pip install --quiet $(3))
	$(UV) pip install --quiet --python $(@D)/bin/python $(2)
	@touch $@
endef
SAME_PYTHON := .venvs/uv/bin/python

.venvs/test/.stamp: pyproject.toml | $(UV)
	$(call environment,$(SAME_PYTHON),--editable . --group test)

.venvs/dev/.stamp: pyproject.toml | $(UV)
	$(call environment,$(SAME_PYTHON),--editable .[examples] --group dev)

.venvs/examples/.stamp: pyproject.toml | $(UV)
	$(call environment,$(SAME_PYTHON),--editable .[examples])

.venvs/peers/.stamp: pyproject.toml | $(UV)
	$(call environment,$(SAME_PYTHON),--editable .[examples] --group peers,\
	  --group torch)

.PRECIOUS: .venvs/jax-%/.stamp
.venvs/jax-%/.stamp: pyproject.toml | $(UV)
	@.ci/find-python $(or $(PYTHONS_$*),3.11) > /dev/null
	$(call environment,$$(.ci/find-python $(or $(PYTHONS_$*),3.11)),--editable . \
	  --group test $(if $(filter newest,$*),,jax==$* jaxlib==$*))

# ---- tests

# $(1): an environment; $(2): pytest's arguments.
define pytest
	@.venvs/$(1)/bin/python -c 'import platform, jax; print(f"Python \
	  {platform.python_version()}, JAX {jax.__version__}")'
	.venvs/$(1)/bin/python -m pytest -n $(WORKERS) $(2) $(ARGS)
endef

.PHONY: test test-versions peers fuzz fuzz-peers
# XLA's own passes run; LLVM optimizes nothing, which saves a fifth of the time of the
# tests, and half of that of the examples. The other targets compile as users do.
test examples: export XLA_FLAGS ?= --xla_backend_optimization_level=0
test: .venvs/test/.stamp ## the tests, on the newest JAX that python3 gets
	$(call pytest,test,-m "not peers and not docs")

test-versions: ## the tests on the oldest, a middle and the newest JAX
	$(MAKE) --no-print-directory --keep-going $(VERSIONS:%=test-jax-%)

test-jax-%: .venvs/jax-%/.stamp ## the tests on one version of JAX
	$(call pytest,jax-$*,-m "not peers")

peers: .venvs/peers/.stamp ## what needs other frameworks, and the benchmarks' rows
	.venvs/peers/bin/python -c 'import flax, jax2onnx, keras, onnx, onnxruntime, \
	  tensorflow, torch'
	$(call pytest,peers,-m peers)

fuzz: export HYPOTHESIS_PROFILE := fuzz
fuzz: .venvs/test/.stamp ## random stacks of transformations, for long
	$(call pytest,test,tests/test_fuzz.py)

fuzz-peers: export HYPOTHESIS_PROFILE := fuzz
fuzz-peers: .venvs/peers/.stamp ## random layers of PyTorch, for long
	$(call pytest,peers,tests/test_peers_rnn.py)

# ---- everything else

.PHONY: demo examples pictures bench lint format types docs wheel clean
demo: .venvs/examples/.stamp ## train a bidirectional GRU on real ragged speech
	.venvs/examples/bin/python examples/japanese_vowels.py $(ARGS)

examples: .venvs/examples/.stamp ## each example, in its quick mode
	set -e; for example in examples/[!_]*.py; do \
	  echo "$$example"; .venvs/examples/bin/python $$example --quick; done

pictures: .venvs/test/.stamp ## draw the pictures in docs/images again
	.venvs/test/bin/python docs/pictures.py

bench: .venvs/peers/.stamp ## times beside a copy and beside other frameworks
	.venvs/peers/bin/python -m benchmarks $(ARGS)

lint: .venvs/dev/.stamp ## ruff, which changes nothing here
	.venvs/dev/bin/ruff check
	.venvs/dev/bin/ruff format --check

format: .venvs/dev/.stamp ## ruff, which mends what it can
	.venvs/dev/bin/ruff check --fix
	.venvs/dev/bin/ruff format

types: .venvs/dev/.stamp ## pyright
	.venvs/dev/bin/pyright --pythonpath .venvs/dev/bin/python

docs: .venvs/dev/.stamp .venvs/test/.stamp ## run the code in pages, build the site
	$(call pytest,test,-m docs)
	.venvs/dev/bin/python -m sphinx --quiet \
	  -b linkcheck docs docs/_build/linkcheck
	.venvs/dev/bin/python -m sphinx --fail-on-warning --keep-going -b html \
	  docs docs/_build/html

# The self-check runs far from the checkout, with nothing installed but jax.
wheel: .venvs/dev/.stamp ## build, install with jax alone, and check itself
	rm -rf dist
	.venvs/dev/bin/python -m build
	set -e; for part in docs tests; do \
	  tar -tzf dist/*.tar.gz | grep -q "/$$part/" || \
	    { echo "the sdist lacks $$part/"; exit 1; }; done
	$(UV) venv --quiet --clear --python $(SAME_PYTHON) .venvs/wheel
	$(UV) pip install --quiet --python .venvs/wheel/bin/python dist/*.whl
	cd / && $(CURDIR)/.venvs/wheel/bin/python -m jax_revseg --quick

clean: ## remove every environment and everything built
	rm -rf .venvs dist docs/_build .pytest_cache .hypothesis .ruff_cache

# make demo    teach the bundled base the bundled character; the report is in runs/
# make test    every test, the linter, the type check and the import contract
#
# Both set up .venv on first use. Needed: Python 3.11 or newer, git, make; Linux or macOS.

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
# One stamp per content of these two files: a change in them, and nothing else, installs again.
KEY := $(shell cat pyproject.toml constraints.txt | cksum | cut -d ' ' -f 1)
SETUP := .venv/.installed-$(KEY)

.PHONY: demo test lint schema clean
.DEFAULT_GOAL := demo

# The toybox's layers are too small to share: one thread is about twice as fast as two.
demo: export OMP_NUM_THREADS ?= 1
demo: $(SETUP)
	$(BIN)/tunekit train recipes/character-lora.yaml --overwrite
	$(BIN)/tunekit generate --run runs/character-lora --prompt "a {trigger} {class} on the beach"

test: lint
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2 --dist worksteal -q

lint: $(SETUP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# What is told of recipe keys elsewhere: the schema for editors, the tables of docs/recipe.md.
schema: $(SETUP)
	$(BIN)/tunekit schema > recipes/schema.json
	sed '/^<!-- generated/q' docs/recipe.md > docs/recipe.md.new
	{ echo; $(BIN)/tunekit schema --markdown; } >> docs/recipe.md.new
	mv docs/recipe.md.new docs/recipe.md

# torch comes first and alone, pinned: a looser request for it brings gigabytes of CUDA packages.
$(SETUP):
	@test -n "$(PYTHON)" || { echo "tunekit needs Python 3.11 or newer on the PATH" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,optimizers,quantize,tagger]'
	@rm -f .venv/.installed-*
	@touch $@

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache

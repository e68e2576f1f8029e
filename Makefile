PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.icekit-setup

# Python keeps what it has compiled, whatever the environment says: without, each process that starts compiles
# torch, diffusers and transformers anew, for ten seconds.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup demo docs test format

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt $(wildcard plugins/*/pyproject.toml)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade uv
	$(BIN)/uv pip install --python $(BIN)/python -c constraints.txt --group dev \
		-e . -e plugins/icekit-tabletop -e plugins/icekit-texture -e plugins/icekit-neighbours \
		-e plugins/icekit-detector -e plugins/icekit-dit -e plugins/icekit-ui
	touch $@

demo: setup
	$(BIN)/icekit run examples/tabletop.png --backbone tabletop --out runs/demo --overwrite \
		--attribute colour --attribute material --attribute texture

docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

test: setup docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --numprocesses auto --dist loadfile

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

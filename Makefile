# make demo    train, reparameterize and plot a small MRConvNeXt on real images
# make test    run the tests
# make timm    run timm's own model tests over our models: make timm MODELS="atto tiny v2_atto"
# make lint    check the code's style
PYTHON ?= python3
MODELS ?= atto tiny v2_atto
BIN := .venv/bin

.PHONY: demo test timm lint

demo: .venv/installed
	$(BIN)/python scripts/demo.py --output demo-output

test: .venv/installed
	$(BIN)/python -m pytest

timm: .venv/installed
	$(BIN)/python scripts/timm_tests.py $(MODELS)

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

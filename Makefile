# make demo        train, reparameterize and plot a small MRConvNeXt on real images
# make test        run the tests
# make quick       run those that take no more than a few seconds each
# make timm        run timm's own model tests over our models: make timm MODELS="atto tiny v2_atto"
# make lint        check the code's style and types
# make clients     try real clients of the models (torchao, peft, accelerate, …) in an environment of their own
# make attack      kill runs, damage their folders, load hostile files, compare random layers: more than an hour
# make sanitize    run the tests of the compiled engine with AddressSanitizer and UndefinedBehaviorSanitizer in it
# make docs        build the documentation as a site, in site/
# make package     build the source archive and a wheel, in dist/, and check both
# make wheels      build the wheel that is published for this kind of machine, in dist/, and try it: needs Docker on Linux
# make newest      run the contract tests with timm's newest release, and say which signatures moved
PYTHON ?= python3
MODELS ?= atto tiny v2_atto
# A file of versions that .venv keeps to, such as .github/floor.txt, the oldest that are supported.
CONSTRAINTS ?=
BIN := .venv/bin
PACKAGE := .venv-package/bin
INSTALL := -m pip install --quiet --disable-pip-version-check
SOURCES := mrconvnext experiments scripts train_imagenet.py train_sequences.py benchmark_throughput.py

.PHONY: demo test quick timm lint clients attack sanitize docs package wheels newest

demo: .venv/installed
	$(BIN)/python scripts/demo.py --output demo-output

# Two processes of one thread each: of more, the threads wait for each other.
test: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

quick: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow"

timm: .venv/installed
	$(BIN)/python scripts/timm_tests.py $(MODELS)

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(SOURCES)

clients: .venv-clients/installed
	.venv-clients/bin/python -m scripts.clients

attack: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m scripts.attack

sanitize: .venv/installed
	scripts/sanitize.sh $(BIN)/python

docs: .venv/installed
	$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going docs site

package: .venv-package/installed
	rm -rf dist
	$(PACKAGE)/python -m build
	$(PACKAGE)/twine check --strict dist/*

wheels: .venv-package/installed
	$(PACKAGE)/cibuildwheel --output-dir dist
	$(PACKAGE)/twine check --strict dist/*

newest: .venv-newest/installed
	.venv-newest/bin/python scripts/signatures.py
	.venv-newest/bin/python -m pytest tests/test_timm_contract.py tests/test_mrconvnext.py tests/test_convert.py

NATIVE := setup.py $(wildcard mrconvnext/engines/native/*)

.venv/installed: pyproject.toml $(NATIVE)
	@echo "installing into .venv: PyTorch and all else, up to 3 GB the first time"
	$(PYTHON) -m venv .venv
	$(BIN)/python $(INSTALL) $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS)) --editable '.[dev]'
	touch $@

.venv-clients/installed: pyproject.toml $(NATIVE)
	$(PYTHON) -m venv .venv-clients
	.venv-clients/bin/python $(INSTALL) --editable '.[clients]'
	touch $@

.venv-package/installed: pyproject.toml
	$(PYTHON) -m venv .venv-package
	$(PACKAGE)/python $(INSTALL) --upgrade 'pip>=25.1'
	$(PACKAGE)/python $(INSTALL) --group package
	touch $@

.venv-newest/installed: pyproject.toml $(NATIVE)
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python $(INSTALL) --editable '.[dev]'
	.venv-newest/bin/python $(INSTALL) --upgrade --no-deps timm
	touch $@

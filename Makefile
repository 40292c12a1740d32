# make demo: set up, run on an example head, say where to look.  make test: set up and test.
# make docs: the site, in build/site.  make dist: sdist and wheel.  make lock: renew pylock.toml.
# make versions: the tests on every Python that the classifiers name.
PYTHON ?= python3
VENV ?= .venv
DEMO ?= demo
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt

TOOLS := $(VENV)-tools/bin

.PHONY: demo test lint types docs dist lock versions clean

demo: $(VENV)/.installed
	rm -rf $(DEMO)/bids
	$(BIN)/qsmpipe simulate demo $(DEMO)/bids
	$(BIN)/qsmpipe $(DEMO)/bids $(DEMO)/derivatives participant --work-dir $(DEMO)/work --skip-bids-validation
	@echo
	@echo "The report: file://$(abspath $(DEMO))/derivatives/index.html"
	@echo "The maps:   $(DEMO)/derivatives/sub-*/anat/*_Chimap.nii.gz (ppm)"
	@echo "The truth:  $(DEMO)/bids/derivatives/truth"

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-test
	$(BIN)/mypy

docs: $(VENV)/.installed-docs
	$(BIN)/python -m sphinx -q -W --keep-going -c docs -d build/doctrees . build/site

dist: $(VENV)-tools/.installed
	rm -rf dist
	$(TOOLS)/python -m build --installer uv
	$(TOOLS)/twine check --strict dist/*

lock: $(VENV)-tools/.installed
	$(TOOLS)/uv pip compile --universal --python-version 3.11 --no-config --quiet \
		--default-index https://pypi.org/simple --constraints constraints.txt --format pylock.toml \
		--custom-compile-command "make lock" --output-file pylock.toml setup.cfg

versions: $(VENV)-tools/.installed-tox
	$(TOOLS)/tox run

$(VENV)/.installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e .
	touch $@

$(VENV)/.installed-test: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e ".[test]"
	touch $(VENV)/.installed $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(PIP) -e ".[docs]"
	touch $@

$(VENV)-tools/.installed: constraints.txt
	$(PYTHON) -m venv $(VENV)-tools
	$(TOOLS)/pip install --quiet --disable-pip-version-check -c constraints.txt build twine uv
	touch $@

$(VENV)-tools/.installed-tox: $(VENV)-tools/.installed
	$(TOOLS)/pip install --quiet --disable-pip-version-check -c constraints.txt tox
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-tools $(DEMO) build dist .tox *.egg-info

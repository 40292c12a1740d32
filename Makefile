# make demo: set up, run on an example head, say where to look.  make test: set up and test.
PYTHON ?= python3
VENV ?= .venv
DEMO ?= demo
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test lint types clean

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

$(VENV)/.installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) -e ".[test]"
	touch $@

clean:
	rm -rf $(VENV) $(DEMO) build *.egg-info

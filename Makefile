# The two commands of this project are `make book` and `make test`; `make help` lists the others.
# Settings: PYTHON=python3.12 (another interpreter), CONSTRAINTS= (the newest versions instead of the tested ones),
# SANITY_SEED=1 (the whole book with other random numbers).

PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# One thread for each process: the processes share the cores, and threads that wait for one another cost a factor of six.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist worksteal

export SANITY_STRICT := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help book test test-all pdf chapter lab anywhere bench mutants assets lint format address edition clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1 ~ /p' Makefile | column -t -s '~'

book: $(INSTALLED) ## run every chapter that changed, then make the pages in _build/html
	@$(BIN)/python scripts/build_book.py

test: book ## build the book where it is missing or old, then run the tests
	@$(PYTEST)

test-all: book ## the same with every test: of files that did not change, and of more networks of each kind
	@$(PYTEST) -m ""

pdf: book ## print the pages into _build/book.pdf; needs Chromium
	@$(BIN)/python scripts/make_pdf.py

chapter: $(INSTALLED) ## run and show one chapter: make chapter ONLY=cascading
	@$(BIN)/python scripts/build_book.py --only $(ONLY)

lab: $(INSTALLED) ## open the chapters in JupyterLab
	@SANITY_STRICT=0 $(BIN)/jupyter lab notebooks

anywhere: $(INSTALLED) ## imitate Colab and Binder: every chapter on one core with 2 GB (half an hour)
	@$(BIN)/python scripts/anywhere.py

bench: $(INSTALLED) ## time the package (benchmarks/)
	@for file in benchmarks/*.py; do $(BIN)/python $$file || exit 1; done

mutants: $(INSTALLED) ## make small errors in the modules that compute, and see that tests fail (hours): make mutants SAMPLE=60
	@OMP_NUM_THREADS=1 $(BIN)/python scripts/mutants.py --sample $(or $(SAMPLE),300)

# In the order in which they need one another. The package reads only files that the manifest knows: it follows each.
assets: $(INSTALLED) ## make data and weights in assets/files again (scripts/assets/)
	@for name in images squeezenet photographs train mislabelled imagenet_cascade verdict; do \
		$(BIN)/python scripts/assets/$$name.py && $(BIN)/python scripts/assets/manifest.py || exit 1; \
	done

lint: $(INSTALLED) ## check style and types, of Python and of JavaScript
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/oxlint --deny-warnings .

format: $(INSTALLED) ## mend style
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

address: ## move to another repository: make address REPO=https://github.com/owner/name
	@$(PYTHON) scripts/address.py $(REPO)

edition: ## cut an edition, its commit and its tag: make edition VERSION=1.0.0
	@$(PYTHON) scripts/edition.py $(VERSION)

clean: ## remove the built book; the environment stays
	rm -rf _build

$(INSTALLED): requirements.txt pyproject.toml assets/pyproject.toml $(wildcard $(CONSTRAINTS))
	@test -x $(BIN)/python || { echo "Creating the environment in $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "Installing the book's packages (about 6 GB with torch; once)"
	@$(BIN)/python -m pip install --quiet -r requirements.txt $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) -e . -e ./assets
	@touch $@

# `make demo` and `make test` set everything up themselves; a fresh machine needs Python >= 3.11, pip and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
LOWEST := .venv-lowest

# What `make bench` measures, one table each in benchmarks/results/; alone on the machine, about an hour and a half on two cores.
BENCHES := step overhead pictures throughput evaluate whole lengths workers masks checkpoint start growth

.PHONY: demo test test-lowest coverage check docs release-check bench format clean

demo: $(STAMP)
	$(BIN)/dsd-refine run recipes/demo/checkpoint --recipe digits --output-dir demo-output --overwrite

test: $(STAMP)
	$(BIN)/python -m pytest

# The tests with the oldest releases that pyproject.toml allows.
test-lowest: $(LOWEST)/.installed
	$(LOWEST)/bin/python -m pytest

coverage: $(STAMP)
	$(BIN)/python -m pytest --cov --cov-report=term-missing:skip-covered

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site of the documentation, in site/. A warning is an error.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

release-check: $(STAMP)
	$(BIN)/python .ci/release_check.py

bench: $(STAMP)
	benchmarks/peers.sh $(BIN)/python
	set -e; for name in $(BENCHES); do $(BIN)/python benchmarks/$$name.py > benchmarks/results/$$name.part; \
		mv benchmarks/results/$$name.part benchmarks/results/$$name.txt; cat benchmarks/results/$$name.txt; done

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

$(LOWEST)/.installed: pyproject.toml constraints-lowest.txt
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet -c constraints-lowest.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) $(LOWEST) .coverage demo-output demo-output.partial dist site .pytest_cache .ruff_cache .mypy_cache

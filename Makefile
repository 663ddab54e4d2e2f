# make demo: convert the example in two schemes, verify, print the table.  make test: all fast tests.  Both set up what they need.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo test lint clean

$(BIN)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@

demo: $(BIN)/.ready
	rm -rf demo-out
	$(BIN)/streamquant convert examples/wiki-llama demo-out/w4a16 --scheme W4A16
	$(BIN)/streamquant convert examples/wiki-llama demo-out/nvfp4a16 --scheme NVFP4A16
	$(BIN)/streamquant verify demo-out/w4a16 --against examples/wiki-llama
	$(BIN)/streamquant verify demo-out/nvfp4a16 --against examples/wiki-llama

test: lint
	$(BIN)/python -m pytest

lint: $(BIN)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) demo-out build *.egg-info

# make demo: the main job, small; make test: all tests; make lab: JupyterLab on the notebooks.
PYTHON ?= python3.11
BIN := .venv/bin

.PHONY: demo test lab lint lock clean

.venv: .venv/.complete

# torch first and exactly: another package's open range would take a newer release.
.venv/.complete: requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet "$$(grep '^torch==' requirements.lock)"
	$(BIN)/pip install --quiet --requirement requirements.lock
	$(BIN)/pip install --quiet --no-deps --editable .
	touch $@

demo: .venv
	$(BIN)/hynb demo

test: .venv lint
	$(BIN)/pytest

lint: .venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

lab: .venv
	$(BIN)/jupyter lab --notebook-dir=. notebooks/02_finetune.ipynb

# After a change of pyproject.toml: the versions now installed become the pinned ones.
lock: .venv
	$(BIN)/python tools/lock.py

clean:
	rm -rf .venv

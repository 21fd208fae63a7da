# make demo: the whole job with a small model; make test: lint and all tests; make lab: JupyterLab on the notebooks.
PYTHON ?= python3.11
BIN := .venv/bin
# Test files side by side, each file's tests in order in one process: three for two cores, as tests wait a third of
# their time. More than 4 processes, each with ranks of its own, need more memory than a workstation has to spare.
WORKERS := $(shell n=$$((($$(nproc) * 3 + 1) / 2)); echo $$((n < 4 ? n : 4)))
PYTEST := $(BIN)/pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder
# Programs that `make test_without` leaves out.
WITHOUT ?= sshd pdsh chromium chromium-browser

.PHONY: demo test test_without lab lint lock clean

.venv: .venv/.complete

# torch first and exactly: another package's open range would install a newer release.
.venv/.complete: requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet "$$(grep '^torch==' requirements.lock)"
	$(BIN)/pip install --quiet --requirement requirements.lock
	$(BIN)/pip install --quiet --no-deps --editable .
	touch $@

demo: .venv
	$(BIN)/hynb demo

test: .venv lint
	$(PYTEST)

# As on a machine that lacks some programs: each test passes, or skips with its reason. Run before each release.
test_without: .venv
	$(BIN)/python tools/without_programs.py $(WITHOUT) -- $(PYTEST)

lint: .venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright

lab: .venv
	$(BIN)/jupyter lab --notebook-dir=. notebooks/02_finetune.ipynb

# After a change of pyproject.toml: pins the versions that are installed now.
lock: .venv
	$(BIN)/python tools/lock.py

clean:
	rm -rf .venv

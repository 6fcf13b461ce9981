# kdbook: two commands matter, `make book` and `make test`. `make help` lists the rest.
PYTHON ?= python3
METHOD ?= annealing_kd
SEEDS  ?= 5
ARGS   ?=
VENV   := .venv
PY     := $(VENV)/bin/python
READY  := $(VENV)/.kdbook-ready
# As many processes as cores, one thread each: a chapter or a test is rarely quicker on two.
JOBS   ?= $(shell env -u OMP_NUM_THREADS nproc 2>/dev/null || sysctl -n hw.ncpu)

export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: help venv book test format fresh refresh site lab ladder check-house check-install clean
.DEFAULT_GOAL := help

help: ## list the targets
	@echo "kdbook: a book that runs. Targets:"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' Makefile
	@echo "Variables: PYTHON=python3.12 picks the interpreter; ARGS='-k data -x' goes to the target's program;"
	@echo "           METHOD=$(METHOD) SEEDS=$(SEEDS) say which runs 'make ladder' completes; JOBS=$(JOBS) test processes."

venv: $(READY) ## make .venv with the package and all its tools (2 to 5 minutes, once)

$(READY): constraints.txt settings.ini setup.py
	@if [ ! -x $(PY) ] || ! $(PY) -m pip --version >/dev/null 2>&1; then \
		$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else "kdbook needs Python 3.11 to 3.13, and $(PYTHON) is %d.%d. Name another one: make PYTHON=python3.12 venv" % v)' \
		&& $(PYTHON) -m venv --clear $(VENV); \
	fi
	@echo "== torch, the largest download (1 to 3 minutes)"
	$(PY) -m pip install -c constraints.txt torch
	@echo "== kdbook and its tools (1 to 3 minutes)"
	$(PY) -m pip install -c constraints.txt -e '.[dev]'
	@touch $(READY)

book: $(READY) ## fetch the data, run the Annealing-KD chapter, print its ladder, build the site (5 to 10 minutes)
	@echo "== the default data and backbone, fetched once and verified (87 MB, half a minute)"
	$(PY) -m kdbook fetch
	@echo "== the chapter annealing_kd, run from clean into _run/ (about a minute)"
	$(PY) tools/run_chapter.py annealing_kd
	@echo "== its ladder of results, from the records in results/"
	$(PY) -m kdbook table annealing_kd
	@echo "== the site, into _docs/ (half a minute)"
	$(PY) tools/build_site.py
	@echo
	@echo "Done. To read the site:       $(PY) -m http.server -d _docs 8000    then open http://localhost:8000"
	@echo "To run and change chapters:   make lab"

test: $(READY) ## run every test: chapters, exports, outputs, format, tests/ (about a quarter of an hour on two cores)
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) --dist worksteal $(ARGS)

format: $(READY) ## format notebooks, tools and tests, and mend what the linter can; then export
	$(PY) -m ruff check --fix nbs tools tests $(ARGS)
	$(PY) -m ruff format nbs tools tests
	$(PY) tools/folds.py
	$(PY) -c "from nbdev.doclinks import nbdev_export; nbdev_export()"

refresh: $(READY) ## export the package, then re-run the chapters that are stale (minutes a chapter)
	$(PY) -c "from nbdev.doclinks import nbdev_export; nbdev_export()"
	$(PY) tools/refresh.py $(ARGS)

fresh: $(READY) ## fail where a stored output may be old, by its own cells, by records or by dependence
	$(PY) tools/refresh.py --check

site: $(READY) ## build the site into _docs/ (half a minute)
	$(PY) tools/build_site.py

lab: $(READY) ## open the chapters in JupyterLab
	$(PY) -m jupyterlab nbs/index.ipynb

ladder: $(READY) ## run what is missing of METHOD's records (hours for a whole ladder; it can be stopped and resumed)
	$(PY) -m kdbook ladder $(METHOD) --seeds $(SEEDS) $(ARGS)

check-house: $(READY) ## measure what keeps the project easy to change, against the limits it set itself
	$(PY) tools/house.py $(ARGS)

check-install: $(READY) ## install the package as a stranger would, into a new environment (minutes)
	$(PY) tools/check_install.py $(ARGS)

clean: ## remove what the other targets wrote, .venv and results/ excepted
	rm -rf _docs _proc _run build dist kdbook.egg-info .pytest_cache .ruff_cache .hypothesis
	find kdbook nbs tests tools -name __pycache__ -o -name .ipynb_checkpoints | xargs rm -rf

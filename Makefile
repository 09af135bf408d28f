# The commands of the project; `make help` lists them.

PYTHON ?= python3
VENV ?= .venv
# A version to pin, e.g. make test SQLALCHEMY='<2.1' VENV=.venv-2.0
SQLALCHEMY ?=
# Arguments for the demo, pytest or the benchmarks.
ARGS ?=
# Where the source distributions of Celery and Flask-SQLAlchemy are kept, outside of this repository.
CACHE ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/sessionmgr
CELERY = $(CACHE)/celery-5.7.0
FLASK_SQLALCHEMY = $(CACHE)/flask_sqlalchemy-3.1.1

PIP = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check
PIP_DOWNLOAD = $(VENV)/bin/python -m pip download --quiet --disable-pip-version-check
PYENV_ROOT ?= $(HOME)/.pyenv

.DEFAULT_GOAL := help
.PHONY: help demo test soak celery-conformance flask-conformance bench matrix lint clean FORCE

help: ## list these commands
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 28

demo: $(VENV)/.demo-installed ## run the main job: a pool of workers over several databases
	$(VENV)/bin/python -m sessionmgr demo $(ARGS)

test: $(VENV)/.test-installed ## run the test suite on real servers
	$(VENV)/bin/python -m pytest -n auto $(ARGS)

soak: $(VENV)/.test-installed ## run the tests that take minutes
	$(VENV)/bin/python -m pytest -n auto -m soak $(ARGS)

celery-conformance: $(VENV)/.test-installed $(CELERY) ## run Celery's tests of its database backend on ours
	$(VENV)/bin/python -m tests.celery_conformance $(CELERY) $(if $(ARGS),-- $(ARGS))

flask-conformance: $(VENV)/.test-installed $(FLASK_SQLALCHEMY) ## run Flask-SQLAlchemy's tests on our extension
	$(VENV)/bin/python -m tests.flask_conformance $(FLASK_SQLALCHEMY) $(if $(ARGS),-- $(ARGS))

bench: $(VENV)/.test-installed $(VENV)/.dev-installed ## compare speed with plain SQLAlchemy and Celery
	$(VENV)/bin/python -m benchmarks $(ARGS)

lint: $(VENV)/.dev-installed ## check style and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy --strict sessionmgr

# A pyenv shim is on PATH also when its Python is not to be had: hence its versions come first.
matrix: ## run the suite on each Python from 3.10 to 3.13 that is found
	@outcome=; failed=0; \
	for version in 3.10 3.11 3.12 3.13; do \
	    python=; \
	    for candidate in "$(PYENV_ROOT)"/versions/$$version.*/bin/python$$version python$$version; do \
	        if "$$candidate" -c '' 2>/dev/null; then python=$$candidate; fi; \
	        if [ -n "$$python" ]; then break; fi; \
	    done; \
	    if [ -z "$$python" ]; then result='not found'; \
	    elif $(MAKE) test PYTHON="$$python" VENV=.venv-$$version; then result=passed; \
	    else result=FAILED; failed=1; fi; \
	    outcome="$$outcome  Python $$version: $$result\n"; \
	done; \
	printf "$$outcome"; exit $$failed

clean: ## remove what these commands made
	rm -rf .venv .venv-* build *.egg-info .mypy_cache .pytest_cache .ruff_cache .coverage*
	find sessionmgr tests benchmarks -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

$(CELERY): | $(VENV)/bin/python
	rm -rf $@ $@.new
	$(PIP_DOWNLOAD) --no-deps --no-binary celery --dest $@.new celery==5.7.0
	tar -xzf $@.new/celery-5.7.0.tar.gz -C $@.new
	mv $@.new/celery-5.7.0 $@
	rm -rf $@.new

$(FLASK_SQLALCHEMY): | $(VENV)/bin/python
	rm -rf $@ $@.new
	$(PIP_DOWNLOAD) --no-deps --no-binary flask-sqlalchemy --dest $@.new flask-sqlalchemy==3.1.1
	tar -xzf $@.new/flask_sqlalchemy-3.1.1.tar.gz -C $@.new
	mv $@.new/flask_sqlalchemy-3.1.1 $@
	rm -rf $@.new

$(VENV)/bin/python:
	PYTHON="$(PYTHON)" tests/install-system-packages venv
	$(PYTHON) -m venv $(VENV)

# Changes when the pin does, and with it all that was installed by another: a report of one version
# must not be of tests on another.
$(VENV)/.pin: FORCE | $(VENV)/bin/python
	@printf '%s\n' '$(SQLALCHEMY)' | cmp -s - $@ || printf '%s\n' '$(SQLALCHEMY)' >$@

# With the drivers that come as wheels, for databases of the user's.
$(VENV)/.demo-installed: setup.cfg $(VENV)/.pin | $(VENV)/bin/python
	$(PIP) -e '.[cli,billiard,psycopg,psycopg2,pymysql]' 'SQLAlchemy$(SQLALCHEMY)'
	touch $@

# mysqlclient is built from source; where that fails, the tests that need it say so.
$(VENV)/.test-installed: setup.cfg $(VENV)/.pin | $(VENV)/bin/python
	PYTHON="$(PYTHON)" tests/install-system-packages test
	$(PIP) -e '.[test]' 'SQLAlchemy$(SQLALCHEMY)'
	$(PIP) -e '.[mysqlclient]' || echo 'mysqlclient cannot be built here: see above' >&2
	touch $@

$(VENV)/.dev-installed: setup.cfg $(VENV)/.pin | $(VENV)/bin/python
	$(PIP) -e '.[dev]' 'SQLAlchemy$(SQLALCHEMY)'
	touch $@

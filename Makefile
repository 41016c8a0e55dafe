# make demo   the main job on a small synthetic corpus, from nothing to a word error rate (10 minutes)
# make test   all tests                        make lint   ruff, and the test of the floors
# make venv   only the environment             make bench  the pretraining step against its peer and its loop
# make faults 50 kills and every other fault, counted (5 minutes); FAULTS_ARGS="--kills 200 --json report.json"
# make distributed  several processes against one: every model, ddp and fsdp2, 2 and 4 processes
#
# PYTHON  the interpreter that makes .venv (3.10 to 3.13):        make venv PYTHON=python3.12
# TORCH   the torch to install where .venv has none yet:          make venv TORCH="torch>=2.6"
# TORCH_INDEX  where to take it from, for a build by device:      make venv TORCH_INDEX=https://.../whl/cu126
# A torch that is in .venv is kept, whatever its version and build; to exchange it, install another by hand
# or remove .venv.

PYTHON       ?= python3
TORCH        ?= torch==2.13.0
TORCH_INDEX  ?=
TEST_WORKERS ?= 2
TEST_ARGS    ?=
DEMO_ARGS    ?=
BENCH_ARGS   ?=
FAULTS_ARGS  ?=

VENV_PYTHON = .venv/bin/python
PIP         = $(VENV_PYTHON) -m pip install -q --disable-pip-version-check

.PHONY: demo test lint venv faults distributed bench
.DEFAULT_GOAL := demo

demo: .venv/.ready
	@$(VENV_PYTHON) demo/run_demo.py $(DEMO_ARGS)

# One thread a process: the tests are many and small, and two processes share the cores.
test: .venv/.ready
	OMP_NUM_THREADS=1 $(VENV_PYTHON) -m pytest -q -n $(TEST_WORKERS) --dist worksteal $(TEST_ARGS)

lint: .venv/.ready
	$(VENV_PYTHON) -m ruff check .
	OMP_NUM_THREADS=1 $(VENV_PYTHON) -m pytest -q tests/unit/test_floors.py

faults: .venv/.ready
	@OMP_NUM_THREADS=1 $(VENV_PYTHON) -m tests.faults.suite $(FAULTS_ARGS)

distributed: .venv/.ready
	OMP_NUM_THREADS=1 DISTRIBUTED_MATRIX=whole $(VENV_PYTHON) -m pytest -q -s tests/distributed $(TEST_ARGS)

bench: .venv/.ready
	$(VENV_PYTHON) benchmarks/step.py --peer transformers --precision fp32 $(BENCH_ARGS)
	$(VENV_PYTHON) benchmarks/step.py --peer transformers --precision bf16 $(BENCH_ARGS)
	$(VENV_PYTHON) benchmarks/loop.py --precision bf16

venv: .venv/.ready

# torch first, then everything else under a constraint written from the torch that is there: no requirement
# can replace it. constraints.txt holds the versions that were tested, without torch.
.venv/.ready: setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || { \
	    echo "error: $(PYTHON) is not Python 3.10 to 3.13; name one that is, for example: make venv PYTHON=python3.11" >&2; \
	    exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' || { \
	    echo "error: $(PYTHON) cannot make environments; on Debian and Ubuntu: apt install python3-venv" >&2; exit 2; }
	@echo "making .venv: environment"
	@$(PYTHON) -m venv .venv
	@$(VENV_PYTHON) -c 'import importlib.metadata as m; print("making .venv: torch", m.version("torch"), "is there and stays")' \
	    2>/dev/null || { echo "making .venv: $(TORCH) (the largest part, hundreds of megabytes)"; \
	    $(PIP) numpy -c constraints.txt && $(PIP) $(if $(TORCH_INDEX),--index-url "$(TORCH_INDEX)") "$(TORCH)"; }
	@$(VENV_PYTHON) -c 'import importlib.metadata as m; print("torch==" + m.version("torch"))' > .venv/torch.txt
	@echo "making .venv: everything else"
	@$(PIP) -c .venv/torch.txt -c constraints.txt -e '.[dev,peers]'
	@touch $@

# `make demo` and `make test` do all of their own set-up, in .venv. Runs with GNU make.

PYTHON ?= python3
WORK_DIR ?= work_dirs/demo
GPU_DIR ?= work_dirs/gpu
DATA ?=
PYTEST_ARGS ?=
BENCH_ARGS ?=

VENV_PYTHON := .venv/bin/python

# Threads that wait sleep instead of spinning: on a machine that is shared, spinning ones take the
# time of those that they wait for (a training step of the demo: 4.6 s spinning, 0.9 s asleep).
export OMP_WAIT_POLICY ?= PASSIVE

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow bench gpu study streams lint format clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s%s\n", $$1, $$2}' Makefile
	@echo 'Variables: PYTHON=$(PYTHON)  WORK_DIR=$(WORK_DIR)  DATA=$(DATA)  PYTEST_ARGS=$(PYTEST_ARGS)  BENCH_ARGS=$(BENCH_ARGS)'

setup:  ## make or update .venv (10 minutes the first time, then a second)
	@command -v "$(PYTHON)" >/dev/null || { echo 'set-up: failed: $(PYTHON) was not found.' \
	    'Python 3.10 or newer is needed; name it with make setup PYTHON=/path/to/python3.'; \
	    exit 1; }
	@"$(PYTHON)" tools/setup_env.py

demo: setup  ## run the main job, on DATA where it is given; results in WORK_DIR
	$(VENV_PYTHON) demo/demo.py $(if $(DATA),--data "$(DATA)") --work-dir "$(WORK_DIR)"

test: setup  ## run the tests, with PYTEST_ARGS
	$(VENV_PYTHON) -m pytest $(PYTEST_ARGS)

test-slow: setup  ## run the long soaks, with PYTEST_ARGS (an hour)
	$(VENV_PYTHON) -m pytest -m slow $(PYTEST_ARGS)

# Threads wait as PyTorch lets them; the second run keeps every page of memory.
bench: setup  ## measure speed and memory beside BN and others; writes docs/performance.*
	env -u OMP_WAIT_POLICY $(VENV_PYTHON) benchmarks/benchmark_norm.py docs/performance.csv \
	    --suites layer memory model study fused growth ranks $(BENCH_ARGS)
	env -u OMP_WAIT_POLICY MALLOC_TRIM_THRESHOLD_=17179869184 \
	    MALLOC_MMAP_THRESHOLD_=17179869184 $(VENV_PYTHON) benchmarks/benchmark_norm.py \
	    docs/performance.csv --suites layer bandwidth growth $(BENCH_ARGS)
	$(VENV_PYTHON) benchmarks/report_performance.py docs/performance.csv

gpu:  ## set up with CUDA and check all that needs a GPU; report in GPU_DIR (8 minutes)
	@"$(PYTHON)" benchmarks/check_gpu.py --work-dir "$(GPU_DIR)"

STUDY_DIR := work_dirs/study
study: setup  ## rerun a reduced study of norms and redraw the plots of all (15 minutes)
	$(VENV_PYTHON) demo/make_demo_data.py $(STUDY_DIR)/data \
	    --num-train 120 --num-val 50 --side-range 128 192
	$(VENV_PYTHON) benchmarks/study.py benchmarks/study/grids/generated.py --work-dir $(STUDY_DIR)/generated
	$(VENV_PYTHON) benchmarks/study.py benchmarks/study/grids/digits.py --work-dir $(STUDY_DIR)/digits \
	    --seeds 0 1 2
	$(VENV_PYTHON) benchmarks/report_study.py $(STUDY_DIR)/generated/generated.csv \
	    docs/results/generated.csv docs/results/pennfudan.csv \
	    $(foreach part,batch1 batch2 batch8 sgd finetune,docs/results/pennfudan_$(part).csv)
	$(VENV_PYTHON) benchmarks/report_study.py docs/results/pennfudan_ablation.csv \
	    --condensation 'score of BN' 'score of UBN'
	$(VENV_PYTHON) benchmarks/report_study.py $(STUDY_DIR)/digits/digits.csv docs/results/digits.csv \
	    --metrics digits/accuracy

STREAMS := cifar10_ordinary cifar10_condensed_last cifar10_condensed_fifth cifar10_condensed_images \
    cifar10_batch8 cifar10_batch4 cifar10_shift cifar10_shift_one pennfudan_ordinary \
    pennfudan_condensed_last
streams: setup  ## train on condensed streams of DATA and write docs/condensation.md (5 hours)
	for grid in $(STREAMS); do \
	    root="$(or $(DATA),data)"; \
	    case $$grid in pennfudan*) root="$$root/pennfudan" ;; esac; \
	    $(VENV_PYTHON) benchmarks/study.py benchmarks/study/grids/$$grid.py --data-root "$$root" \
	        --work-dir work_dirs/streams/$$grid --out docs/results/streams/$$grid.csv || exit 1; \
	done
	$(VENV_PYTHON) benchmarks/report_streams.py

lint: setup  ## check the code's style; changes nothing
	$(VENV_PYTHON) -m ruff check --no-cache .
	$(VENV_PYTHON) -m ruff format --no-cache --check .

format: setup  ## rewrite the code in that style
	$(VENV_PYTHON) -m ruff format .

clean:  ## remove .venv, builds and caches; WORK_DIR and the compiled mmcv stay
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

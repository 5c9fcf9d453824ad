PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= runs/quickstart
SEED ?= 0
WORLD ?= scenes

# No target needs a network after set-up: data and weights are embedded.
export HF_HUB_OFFLINE ?= 1
export HF_HUB_DISABLE_TELEMETRY ?= 1
export TOKENIZERS_PARALLELISM ?= false
# Two test processes of one thread each are faster than one of two: the models are tiny.
WORKERS := -n 2 --dist loadfile
test test-%: export OMP_NUM_THREADS ?= 1

.PHONY: setup quickstart test test-quantisation test-gguf test-onnx test-harnesses test-launched test-demo test-versions test-lowest \
	test-newest test-conventions test-all lint typecheck weights clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

quickstart: setup
	$(BIN)/llava-mod quickstart --world $(WORLD) --output-dir $(OUT) --seed $(SEED)

test: setup
	$(BIN)/python -m pytest -q $(WORKERS)

# In a folder of their own: transformers imports torchao in every process where it is installed.
QUANTISATION := $(VENV)/quantisation

$(QUANTISATION): $(VENV)/.installed
	rm -rf $@
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt --target $@ torchao bitsandbytes

test-quantisation: $(QUANTISATION)
	PYTHONPATH=$(QUANTISATION) $(BIN)/python -m pytest -q tests/students/test_quantisation.py tests/commands/test_compress.py

# Prebuilt llama.cpp for Linux on x86-64, without the builds for GPUs, and the package that writes its files. What reads
# pictures is not among the binaries: it is compiled, about a minute, from the sources of the same release.
LLAMA_CPP := $(VENV)/llama-cpp
LLAMA_LIBS := $(LLAMA_CPP)/node_modules/@node-llama-cpp/linux-x64/bins/linux-x64
LLAMA_SOURCE := $(LLAMA_CPP)/source/vendor/llama.cpp
MTMD := $(LLAMA_SOURCE)/tools/mtmd

$(LLAMA_CPP): $(VENV)/.installed
	rm -rf $@ $@.part
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt --target $@.part/python gguf
	npm install --silent --no-save --omit=optional --ignore-scripts --prefix $@.part \
		node-llama-cpp@3.22.1 @node-llama-cpp/linux-x64@3.22.1
	$(BIN)/pip download --quiet --disable-pip-version-check --no-deps --no-binary llama-cpp-python --dest $@.part \
		llama-cpp-python==0.3.36
	mkdir $@.part/source
	tar xzf $@.part/llama_cpp_python-0.3.36.tar.gz --strip-components 1 -C $@.part/source
	mv $@.part $@

# Only LLaVA's graph: the others stay unresolved, and are never called. Its one line that puts CLIP's class token behind
# the patches instead of before them is mended, as in https://github.com/ggml-org/llama.cpp/pull/25844.
$(LLAMA_CPP)/pictures: tests/helpers/llama_cpp_pictures.cpp $(LLAMA_CPP)
	sed -i 's/ggml_concat(ctx0, inp, model.class_embedding, 1)/ggml_concat(ctx0, model.class_embedding, inp, 1)/' \
		$(MTMD)/models/llava.cpp
	g++ -std=c++17 -O1 -w -no-pie -DPLUGINS='"$(abspath $(LLAMA_LIBS))"' $(addprefix -I$(LLAMA_SOURCE)/,include ggml/include vendor) \
		-I$(MTMD) -o $@ $< $(addprefix $(MTMD)/,clip.cpp mtmd.cpp mtmd-image.cpp mtmd-audio.cpp models/llava.cpp) \
		$(addprefix $(LLAMA_LIBS)/,libllama.v0.5.0.so libggml.v0.5.0.so libggml-base.so) \
		-Wl,--unresolved-symbols=ignore-in-object-files,-rpath,$(abspath $(LLAMA_LIBS)) -lpthread

test-gguf: $(LLAMA_CPP)/pictures
	LLAMA_CPP=$(LLAMA_CPP) PYTHONPATH=$(LLAMA_CPP)/python $(BIN)/python -m pytest -q -m '' tests/students/test_gguf_*.py

# In a folder of its own: transformers and accelerate import it in every process where it is installed.
DEEPSPEED := $(VENV)/deepspeed

$(DEEPSPEED): $(VENV)/.installed
	rm -rf $@
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt --target $@ \
		deepspeed hjson py-cpuinfo einops msgpack

# In folders of their own, without the dependencies of other models and tasks, which bring another torch.
LM_EVAL := $(VENV)/lm_eval
LMMS_EVAL := $(VENV)/lmms_eval
HARNESS := sacrebleu colorama lxml portalocker tabulate \
	pytablewriter DataProperty mbstrdecoder pathvalidate tabledata tcolorpy typepy chardet
$(LM_EVAL): HARNESS += lm-eval
$(LMMS_EVAL): HARNESS += lmms-eval loguru tenacity pytz

$(LM_EVAL) $(LMMS_EVAL): $(VENV)/.installed
	rm -rf $@
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt --target $@ $(HARNESS)

# Our tasks by lm-eval and lmms-eval: question by question what `llava-mod evaluate` gives.
test-harnesses: $(LM_EVAL) $(LMMS_EVAL)
	PYTHONPATH=$(LM_EVAL) $(BIN)/python -m pytest -q -m '' tests/harnesses/test_lm_eval.py
	PYTHONPATH=$(LMMS_EVAL) $(BIN)/python -m pytest -q -m '' tests/harnesses/test_lmms_eval.py

# The recipes' launch configurations, and a model that is sharded as it is loaded, on two CPU processes.
test-launched: $(DEEPSPEED)
	PYTHONPATH=$(DEEPSPEED) $(BIN)/python -m pytest -q -m '' -k 'launched or two_processes or test_parallel' tests/training \
		tests/model/test_parallel.py

# In a folder of their own: Gradio asks for an older Pillow than constraints.txt has, and works with it.
DEMO := $(VENV)/demo

$(DEMO): $(VENV)/.installed
	rm -rf $@
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt --target $@ \
		gradio gradio_client hf-gradio groovy fastapi starlette uvicorn python-multipart opentelemetry-api httpx httpcore \
		safehttpx orjson brotli pydub pytz semantic-version tomlkit \
		selenium trio trio-websocket wsproto outcome sniffio sortedcontainers websocket-client PySocks

# In a folder of its own, as nothing but the site needs it.
MKDOCS := $(VENV)/mkdocs

$(MKDOCS): $(VENV)/.installed
	rm -rf $@
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt --target $@ \
		mkdocs mkdocs-material mkdocs-material-extensions mkdocs-get-deps ghp-import mergedeep pyyaml_env_tag watchdog \
		backrefs babel colorama paginate pymdown-extensions markdown platformdirs \
		mkdocstrings mkdocstrings-python mkdocs-autorefs griffelib

# Pages in a real browser, Debian's: `apt-get install chromium chromium-driver`. `SCREENSHOTS=docs` renews its pictures.
test-demo: $(DEMO) $(MKDOCS)
	PYTHONPATH=$(DEMO) NEEDS_BROWSER=1 SCREENSHOTS=$(SCREENSHOTS) $(BIN)/python -m pytest -q -m '' \
		tests/talking/test_page.py tests/publishing/test_card_page.py
	PYTHONPATH=$(MKDOCS):$(DEMO) NEEDS_BROWSER=1 SCREENSHOTS=$(SCREENSHOTS) NO_MKDOCS_2_WARNING=1 \
		$(BIN)/python -m pytest -q -m '' tests/test_site_page.py

# In folders of their own: PyTorch takes other ways where onnxscript is installed, and npm's packages are 500 MB.
ONNX := $(VENV)/onnx
TRANSFORMERS_JS := $(VENV)/transformers-js
TRANSFORMERS_JS_VERSION := 4.3.2

$(ONNX): $(VENV)/.installed
	rm -rf $@
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt --target $@ \
		onnx onnx-ir onnxruntime onnxscript ml_dtypes flatbuffers

# onnxruntime-node's own script would fetch the part for GPUs.
$(TRANSFORMERS_JS):
	rm -rf $@
	mkdir -p $@.part
	cd $@.part && ONNXRUNTIME_NODE_INSTALL=skip npm install --silent --no-audit --no-fund --prefix . \
		@huggingface/transformers@$(TRANSFORMERS_JS_VERSION)
	mv $@.part $@

# Fails where a library is missing; `MARKS="-m ''"` runs the slow ones too, among them the page in Chromium.
test-onnx: $(ONNX) $(TRANSFORMERS_JS) $(DEMO)
	PYTHONPATH=$(ONNX):$(DEMO) TRANSFORMERS_JS=$(TRANSFORMERS_JS) NEEDS_ONNX=1 NEEDS_BROWSER=1 SCREENSHOTS=$(SCREENSHOTS) \
		$(BIN)/python -m pytest -q $(MARKS) \
		tests/students/test_onnx_export.py tests/students/test_web_export.py tests/benchmarks/test_onnx_speed.py

# The pages as a site, runs/site/index.html; a link or a heading that is not there ends it.
.PHONY: docs test-docs
docs test-docs: export NO_MKDOCS_2_WARNING := 1
docs: $(MKDOCS)
	PYTHONPATH=$(MKDOCS) $(BIN)/python -m mkdocs build --strict --quiet

test-docs: $(MKDOCS)
	PYTHONPATH=$(MKDOCS) LLAVA_MOD_TARGET=docs $(BIN)/python -m pytest -q tests/test_site.py

test-all: setup test-docs test-quantisation test-gguf test-harnesses test-launched test-demo
	$(MAKE) test-onnx MARKS="-m ''"
	$(BIN)/python -m pytest -q $(WORKERS) -m ''
	$(MAKE) test-lowest test-newest

# The fast tests at the two ends of the range of transformers in pyproject.toml.
test-lowest test-newest: setup
	$(BIN)/python tests/versions/suite.py $(@:test-%=%) -q $(WORKERS)

# Every minor version of transformers, each in a folder of its own, about four minutes without the downloads.
test-versions: setup
	PYTHONPATH=tests $(BIN)/python tests/versions/check.py $(VERSIONS)

# transformers' own common model tests over our classes, about three minutes; downloads its source distribution once.
test-conventions: setup
	PYTHONPATH=tests $(BIN)/python tests/conventions/run.py -q -n 2 --dist loadscope

# Wheel and sdist, and the wheel's own run of the quickstart: in a clean environment, out of the repository, without `make`.
WHEEL ?= $(or $(TMPDIR),/tmp)/llava-mod-wheel
MINUTES ?= 10

.PHONY: wheel-check
wheel-check:
	rm -rf $(WHEEL)
	$(PYTHON) -m venv $(WHEEL)/build
	$(WHEEL)/build/bin/pip install --quiet --disable-pip-version-check build
	$(WHEEL)/build/bin/python -m build --outdir $(WHEEL)/dist .
	$(PYTHON) -m venv $(WHEEL)/clean
	$(WHEEL)/clean/bin/pip install --quiet --disable-pip-version-check -c constraints.txt $(WHEEL)/dist/*.whl
	cd $(WHEEL) && clean/bin/llava-mod --help && \
	  clean/bin/llava-mod quickstart --output-dir $(WHEEL)/quickstart --max-minutes $(MINUTES)

# A recipe of a published student from `check` to `publish`, at its real sizes but few layers, on rows made here.
RECIPE ?= qwen2-0.5b

.PHONY: rehearsal
rehearsal: OUT = runs/rehearsal
rehearsal: setup
	PYTHONPATH=tests $(BIN)/python -m helpers.rehearsal --recipe $(RECIPE) --out $(OUT)

# What the tests check on a CPU, on one GPU; `GPU_CHECK='--device cpu'` tries it without.
.PHONY: gpu-check
gpu-check: OUT = runs/gpu-check
gpu-check: setup
	$(BIN)/python benchmarks/gpu_check.py --out $(OUT) $(GPU_CHECK)

# Every benchmark of speed, one after another, and two figures; goes on where it was cut off. For an idle machine, 40
# minutes to two hours of two cores: `make bench ONLY="startup curves"`, and `BENCH=--again` measures anew.
.PHONY: bench
bench: OUT = benchmarks/results/speed
bench: setup
	$(BIN)/python benchmarks/bench.py --out $(OUT) $(if $(ONLY),--only $(ONLY)) $(BENCH)

# Tests the claims of benchmarks/claims.yaml; goes on where it was cut off, and writes docs/claims.md.
.PHONY: claims
claims: setup
	$(BIN)/python benchmarks/claims.py
	$(BIN)/python benchmarks/claims.py --page docs/claims.md

# Three of the claims on one seed: `make claims-quick SEED=7 OUT=runs/claims-quick` writes OUT/claims.json.
SHARE ?= 1

.PHONY: claims-quick
claims-quick: OUT = runs/claims-quick
claims-quick: setup
	$(BIN)/python benchmarks/claims_quick.py --seed $(SEED) --out $(OUT) --share $(SHARE)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

typecheck: setup
	$(BIN)/mypy

# Regenerates the embedded weights from the embedded data, about an hour and a half on two cores.
weights: setup
	rm -rf runs/weights
	for part in vision_tower student_lm teacher_lm teacher; do \
	  $(BIN)/llava-mod pretrain --config recipes/tiny/0_$$part.yaml || exit 1; \
	done
	for name in tiny-teacher tiny-student-lm; do \
	  mkdir -p src/llava_mod_hf/weights/$$name && \
	  cp runs/weights/$$name/*.json runs/weights/$$name/*.jinja runs/weights/$$name/*.safetensors \
	    src/llava_mod_hf/weights/$$name/ || exit 1; \
	done

	for part in vision_tower student_lm teacher_lm teacher clean_teacher; do \
	  $(BIN)/llava-mod pretrain --config recipes/scenes/0_$$part.yaml || exit 1; \
	done
	for name in scenes-vision-tower scenes-student-lm scenes-teacher scenes-clean-teacher; do \
	  mkdir -p src/llava_mod_hf/weights/$$name && rm -f runs/weights/$$name/*.py && \
	  cp runs/weights/$$name/* src/llava_mod_hf/weights/$$name/ || exit 1; \
	done

clean:
	rm -rf $(VENV) runs

# make demo: teach a small real model some Chinese (about five minutes on two cores); make test: everything that CI runs.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo test lowest newest gpu docs messages pages bench bench-check bench-large families learn templates crash-storm fuzz storms synthesize clean

demo: $(VENV)/installed
	$(BIN)/tongwen demo

test:
	bash .ci/run

# The tests beside the lowest releases that pyproject.toml allows, and beside the newest ones (make lowest TESTS=tests/laws).
# torch alone stays as constraints.txt has it.
TESTS ?= tests
lowest newest: %: $(VENV)-%/installed
	$(VENV)-$@/bin/python -m pytest $(TESTS)

# on a machine with a GPU: the laws that only one can show, and the benchmark (8 minutes)
gpu: $(VENV)/installed-dev
	$(BIN)/python -m pytest tests/laws/test_gpu.py
	$(BIN)/python bench/gpu_train.py --out bench/results/gpu_train.json $(PEERS)

docs: $(VENV)/installed-dev
	$(BIN)/python scripts/generate_docs.py

# after a text for users was added or changed: the catalogue gets its entry; translate it there, then run this again
messages: $(VENV)/installed-dev
	$(BIN)/python scripts/update_catalogue.py

# the page in Debian's chromium (apt-get install chromium fonts-noto-cjk), both languages at both widths
pages: $(VENV)/installed-dev
	TONGWEN_PAGES=long $(BIN)/python -m pytest tests/serving/web/test_page.py tests/serving/web/test_browser.py

bench: $(VENV)/installed-dev
	@echo "see bench/README.md: each script opens with its command"

# make bench-check MODEL=FOLDER TEXT=zh_docs.txt OTHER=en_wiki.txt: what the README quotes, measured again in short form
bench-check: $(VENV)/installed-dev
	$(BIN)/python bench/check.py --model $(MODEL) --text $(TEXT) --other $(OTHER) $(CHECK)

# make bench-large TEXT=zh_docs.txt TOKENIZER=FOLDER: two gigabytes through the data pipeline, unattended (half an hour)
bench-large: $(VENV)/installed-dev
	$(BIN)/python bench/data_pipeline.py --text $(TEXT) --tokenizer $(TOKENIZER) --sizes 2048 --out bench/results/data_pipeline_2gb.json

# make families: every architecture in transformers through check, training, resume, merge, generate (half an hour on one core)
families: $(VENV)/installed-dev
	$(BIN)/python bench/families.py --out bench/results/families.json
	$(BIN)/python scripts/generate_docs.py

# make learn MODEL=FOLDER TEXT=zh_docs.txt ENGLISH=en_wiki.txt: what continued pre-training teaches, and what it costs the base (hours)
learn: $(VENV)/installed-dev
	$(BIN)/python bench/learn.py --model $(MODEL) --text $(TEXT) --english $(ENGLISH) --out bench/results/learn.json

# make templates ARCHIVES="trl-1.16.0-py3-none-any.whl …": published chat templates lose no part of a row (see the script's head)
templates: $(VENV)/installed-dev
	$(BIN)/python bench/templates.py $(ARCHIVES) --out bench/results/templates.json

# make crash-storm: 400 kills of a training, each continued to the bit; every system call of a save (needs strace)
crash-storm: $(VENV)/installed-dev
	$(BIN)/python bench/crash_storm.py --out bench/results/crash_storm.json

# make fuzz: 6,000 generated inputs of twelve kinds, none of which may end in a traceback (an hour on one core)
fuzz: $(VENV)/installed-dev
	$(BIN)/python bench/fuzz.py --out bench/results/fuzz.json

# make storms: EIO and ENOSPC at the system calls of five commands, and kills of a parent with two processes (needs strace)
storms: $(VENV)/installed-dev
	$(BIN)/python bench/fault_storm.py --out bench/results/fault_storm.json

# make synthesize MODEL=FOLDER: a small real model behind `tongwen serve` writes two dialogues (minutes on a CPU)
synthesize: $(VENV)/installed-dev
	TONGWEN_SMALL_MODEL=$(MODEL) $(BIN)/python -m pytest tests/data/synthesis/test_generate.py -k real_small

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[gguf]'
	touch $@

# Bytecode is made when a module is first imported: most of these packages' modules never are.
$(VENV)/installed-dev: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[dev]'
	touch $(VENV)/installed $@

$(VENV)-%/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear $(VENV)-$*
	$(VENV)-$*/bin/python -m pip install --quiet --no-deps --constraint constraints.txt torch uv
	$(VENV)-$*/bin/uv pip install --quiet --python $(VENV)-$*/bin/python --editable '.[dev]' \
		--resolution $(if $(filter lowest,$*),lowest-direct,highest)
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-lowest $(VENV)-newest runs

# The front door. Each target installs what it is missing, builds what it needs, and does nothing twice.
SHELL := /bin/bash
.DEFAULT_GOAL := help

BUILD := build/release
DEEP := OFF
# A compiler that reads LibTorch's headers takes up to 2 GB.
JOBS := $(shell n=$$(nproc); g=$$(awk '/MemAvailable/ {print int($$2 / 2097152)}' /proc/meminfo); echo $$(( g < 1 ? 1 : g < n ? g : n )))
CONFIGURE = cmake --preset $(1) $(2) > build/$(1)-configure.log 2>&1 || { cat build/$(1)-configure.log; exit 1; }

.PHONY: help train build test deep bench format lint clean

help:  ## this list
	@grep -hE '^[a-z]+:.*##' Makefile | sed 's/:.*##/\t/' | expand -t 12

train:  ## a small GPT on Shakespeare, 2 ranks, with checkpoints and a sample; again: goes on or says it is done
	@cmake/setup.sh runtime
	@mkdir -p build && $(call CONFIGURE,release,-DLOCKSTEP_BUILD_TESTS=OFF)
	@cmake --build $(BUILD) -j $(JOBS) --target lockstep tokenize gpt
	@examples/gpt/fetch_data.sh
	$(BUILD)/bin/lockstep run -n 2 -- $(BUILD)/bin/gpt --flagfile=examples/gpt/shakespeare.flags

build:  ## everything, tests included
	@cmake/setup.sh test
	@mkdir -p build && $(call CONFIGURE,release,-DLOCKSTEP_BUILD_TESTS=ON -DLOCKSTEP_DEEP=$(DEEP))
	@cmake --build $(BUILD) -j $(JOBS)

test: build  ## all tests, then those without torch under the sanitizers
	@examples/gpt/fetch_data.sh && examples/image_classification/fetch_data.sh
	@tests/python/fetch_smollm2.sh || echo "SmolLM2 did not come; its test will say so"
	@tests/run.sh

deep: DEEP := ON
deep: build  ## the long numbers: hours
	@examples/gpt/fetch_data.sh && examples/image_classification/fetch_data.sh
	@tests/python/fetch_smollm2.sh || echo "SmolLM2 did not come; its test will say so"
	@LOCKSTEP_DEEP=1 tests/run.sh

bench:  ## training, start-up, exchange and checkpoints beside their peers on this machine; writes build/bench.json, fails where a goal is missed
	@cmake/setup.sh test
	@mkdir -p build && $(call CONFIGURE,release,)
	@cmake --build $(BUILD) -j $(JOBS) --target lockstep tokenize gpt all_reduce_bench checkpoint_bench checkpoint_unchecked_bench overlap_bench
	@examples/gpt/fetch_data.sh
	@build/deps/venv/bin/python tests/bench/bench.py

SOURCES = $(shell git ls-files '*.h' '*.cc')

format:  ## rewrites sources in the project's format
	@cmake/setup.sh lint
	@clang-format-14 -i $(SOURCES)

lint: build  ## format check and clang-tidy
	@cmake/setup.sh lint
	@clang-format-14 --dry-run -Werror $(SOURCES)
	@tests/lint.sh $(BUILD) $(JOBS)

clean:  ## removes what was built; keeps what was downloaded
	@rm -rf build/release build/dev build/asan build/tsan

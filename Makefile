# spurmem - one header, its tool, examples and tests.  Needs cc and make, nothing else.
#
#   make          the tool, the data tools and the examples, below build/
#   make demo     the main job on drawn pictures: train, localize, repair; table, summary.json, report.html
#   make test     the test suite; closes with `N passed, N failed`
#   make check    the matrix: compilers, standards, sanitizers, cross targets, lint (uses what is installed)
#   make bench    speed of this machine
#   make study    the study behind the README's tables, overnight on 2 cores; STUDY=quick: a quarter of an hour
#   make bench-peers   the same beside PyTorch and ONNX Runtime, where a Python has them; ROWS="train-vit-b ..." for some
#   make clean

CC ?= cc
CFLAGS ?= -O2
LDLIBS = -lm -lpthread
BUILD = build
JOBS ?= $(shell nproc 2>/dev/null || echo 2)
MAKEFLAGS += -j$(JOBS)
FLAGS = $(CFLAGS) -DSPURMEM_THREADS -I.

TOOLS = $(BUILD)/spurmem $(BUILD)/repair $(patsubst data_tools/%.c,$(BUILD)/%,$(wildcard data_tools/*.c)) \
        $(patsubst examples/%.c,$(BUILD)/%,$(filter-out examples/spurmem.c examples/repair.c,$(wildcard examples/*.c)))
TESTS = $(patsubst tests/%.c,$(BUILD)/tests/%,$(wildcard tests/test_*.c))
SHARED = $(wildcard ../shared/data/*.tar)

all: $(TOOLS)

# The implementation is compiled once; every program below is small beside it.  One program alone needs no object:
# cc -O2 -DSPURMEM_THREADS examples/spurmem.c -lm -lpthread
$(BUILD)/spurmem.o: tests/spurmem.c spurmem.h
	@mkdir -p $(BUILD)
	$(CC) $(FLAGS) -c -o $@ $<

$(BUILD)/%: examples/%.c $(wildcard examples/*.h) $(BUILD)/spurmem.o
	$(CC) $(FLAGS) -DSPURMEM_LINKED -o $@ $< $(BUILD)/spurmem.o $(LDLIBS)

$(BUILD)/%: data_tools/%.c $(wildcard data_tools/*.h) $(BUILD)/spurmem.o
	$(CC) $(FLAGS) -DSPURMEM_LINKED -o $@ $< $(BUILD)/spurmem.o $(LDLIBS)

# Tests that look inside include the implementation themselves.
$(BUILD)/tests/%: tests/%.c $(wildcard tests/*.h) $(BUILD)/spurmem.o
	@mkdir -p $(BUILD)/tests
	$(CC) $(FLAGS) -Itests -o $@ $< $(BUILD)/spurmem.o $(LDLIBS)

demo: $(BUILD)/synth_birds $(BUILD)/repair
	@rm -rf $(BUILD)/demo && mkdir -p $(BUILD)/demo
	$(BUILD)/synth_birds --out $(BUILD)/demo/birds
	$(BUILD)/repair $(BUILD)/demo/birds $(BUILD)/demo

# Stopped, it goes on where it was: finished runs are kept in build/study-quick or build/study-full.
STUDY = full
study: $(BUILD)/synth_birds $(BUILD)/study $(BUILD)/data.stamp
	@[ -f $(BUILD)/study-birds/metadata.csv ] || $(BUILD)/synth_birds --out $(BUILD)/study-birds --val 1000 --test 2000 --quiet
	$(BUILD)/study $(BUILD)/study-$(STUDY) $(BUILD)/study-birds $(BUILD)/data $(STUDY)

test: $(TOOLS) $(TESTS) $(BUILD)/data.stamp
	@SPURMEM_BUILD=$(BUILD) SPURMEM_TEST_DATA=$$(cat $(BUILD)/data.stamp) sh tests/run.sh $(sort $(TESTS))

# Real data for some tests, where it lies beside the checkout.
$(BUILD)/data.stamp: $(SHARED)
	@mkdir -p $(BUILD)
	@if [ -n "$(SHARED)" ]; then mkdir -p $(BUILD)/data && for t in $(SHARED); do tar -xf $$t -C $(BUILD)/data; done; echo $(BUILD)/data > $@; else : > $@; fi

check: all $(BUILD)/data.stamp
	sh tests/check.sh

bench: $(BUILD)/spurmem
	$(BUILD)/spurmem bench

bench-peers: $(BUILD)/spurmem
	python3 tests/bench/peers.py --spurmem $(BUILD)/spurmem $(ROWS)

lint:
	sh tests/lint.sh

clean:
	rm -rf $(BUILD)

.PHONY: all demo test check bench study bench-peers lint clean

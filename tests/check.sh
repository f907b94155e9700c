#!/bin/sh
# The matrix behind `make check`: every compiler, standard, sanitizer and target that is installed.
# Each part closes with a line; the last line counts.  What is not installed is named and skipped.
work=${BUILD:-build}/check
mkdir -p "$work"
passed=0; failed=0; skipped=0
strict="-Wall -Wextra -Wpedantic -Wconversion -Wsign-conversion -Wshadow -Wdouble-promotion -Wcast-qual -Wundef"
have() { command -v "$1" >/dev/null 2>&1; }
ok() { passed=$((passed + 1)); echo "  ok   $1"; }
no() { failed=$((failed + 1)); echo "  FAIL $1"; [ -f "$work/out" ] && head -n 15 "$work/out"; }
skip() { skipped=$((skipped + 1)); echo "  skip $1"; }
# try NAME COMMAND...: must succeed and say nothing
try() { name=$1; shift; if "$@" >"$work/out" 2>&1 && [ ! -s "$work/out" ]; then ok "$name"; else no "$name"; fi; }
# run NAME COMMAND...: must succeed, may talk
run() { name=$1; shift; if "$@" >"$work/out" 2>&1; then ok "$name"; else no "$name"; tail -n 15 "$work/out"; fi; }

printf '#define SPURMEM_IMPLEMENTATION\n#include "spurmem.h"\n' >"$work/full.c"
printf '#define SPURMEM_STATIC\n#include "spurmem.h"\n' >"$work/static.c"
printf '#include "spurmem.h"\nint other(void);\nint other(void) { return spm_context_create(0) != 0; }\n' >"$work/user.c"
printf '#include "spurmem.h"\nint other(void);\nint main(void) { return !other() + !spm_context_create(0); }\n' >"$work/main.c"
for f in full static user main; do cp "$work/$f.c" "$work/$f.cc"; done

echo "strict warnings"
for row in "gcc c99" "gcc c11" "gcc c17" "gcc c2x" "clang c99" "clang c11" "clang c17" "clang c2x" \
           "g++ c++11" "g++ c++14" "g++ c++17" "g++ c++20" "clang++ c++11" "clang++ c++14" "clang++ c++17" "clang++ c++20"; do
    set -- $row
    if ! have "$1"; then skip "$row"; continue; fi
    case $2 in c++*) end=cc extra= ;; *) end=c extra=-Wstrict-prototypes ;; esac
    try "$row" $1 -std=$2 $strict $extra -DSPURMEM_THREADS -I. -fsyntax-only "$work/full.$end"
    try "$row SPURMEM_STATIC" $1 -std=$2 $strict $extra -I. -fsyntax-only "$work/static.$end"
done
have clang && try "clang without atomic counters" clang -std=c99 $strict -DSPURMEM_THREADS -U__GCC_ATOMIC_LLONG_LOCK_FREE \
    -D__GCC_ATOMIC_LLONG_LOCK_FREE=1 -Wno-builtin-macro-redefined -I. -fsyntax-only "$work/full.c"
try "cc -O2, everything" ${CC:-cc} -O2 $strict -DSPURMEM_THREADS -I. -c -o "$work/full.o" "$work/full.c"
for f in examples/*.c data_tools/*.c; do try "$f" ${CC:-cc} -O2 -std=c99 $strict -DSPURMEM_THREADS -I. -fsyntax-only "$f"; done

echo "linking"
run "two files include the header" sh -c "${CC:-cc} -O1 -I. -c -o $work/user.o $work/user.c && ${CC:-cc} -O1 -I. -c -o $work/main.o $work/main.c && ${CC:-cc} -o $work/two $work/main.o $work/user.o $work/full.o -lm -lpthread && $work/two"
nm "$work/full.o" | awk 'NF == 3 && $2 ~ /^[TDBRCVW]$/ && $3 !~ /^_?spm_/' >"$work/out"; if [ -s "$work/out" ]; then no "only spm_ names are visible"; else ok "only spm_ names are visible"; fi
nm "$work/full.o" | awk 'NF == 3 && $2 ~ /^[DdBbC]$/' >"$work/out"; if [ -s "$work/out" ]; then no "no writable globals"; else ok "no writable globals"; fi

echo "other compilers and targets"
if have tcc; then try "tcc" tcc -I. -DSPURMEM_THREADS -c -o "$work/tcc.o" "$work/full.c"; else skip tcc; fi
if have musl-gcc; then try "musl" musl-gcc -O1 -std=c99 -DSPURMEM_THREADS -I. -c -o "$work/musl.o" "$work/full.c"; else skip musl-gcc; fi
if have x86_64-w64-mingw32-gcc; then try "MinGW" x86_64-w64-mingw32-gcc -O1 -DSPURMEM_THREADS -I. -c -o "$work/mingw.o" "$work/full.c"; else skip MinGW; fi
if printf 'int main(void){return 0;}' | ${CC:-cc} -m32 -x c -o "$work/m32" - 2>/dev/null; then try "32 bit" ${CC:-cc} -m32 -O1 -DSPURMEM_THREADS -I. -c -o "$work/m32.o" "$work/full.c"; else skip "32 bit"; fi
if have aarch64-linux-gnu-gcc && have qemu-aarch64; then
    for t in kern conv ops nets; do
        [ -f tests/test_$t.c ] || continue
        only=; [ $t = nets ] && only=logits # of whole networks, against PyTorch
        run "NEON under qemu: test_$t $only" sh -c "aarch64-linux-gnu-gcc -O2 -static -DSPURMEM_THREADS -I. -Itests -o $work/arm_$t tests/test_$t.c \$(grep -q 'define SPURMEM_' tests/test_$t.c || echo tests/spurmem.c) -lm -lpthread && ${only:+env SPURMEM_ISA=neon} qemu-aarch64 $work/arm_$t $only"
    done
else skip "NEON under qemu"; fi

echo "sanitizers"
data=$(cat build/data.stamp 2>/dev/null)
sanitizes() { printf 'int main(void){return 0;}' | $1 $asan -x c -o "$work/probe" - 2>/dev/null && "$work/probe"; }
asan="-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer"
if sanitizes "${CC:-cc}"; then
    ${CC:-cc} $asan -DSPURMEM_THREADS -I. -c -o "$work/asan.o" tests/spurmem.c
    for f in tests/test_*.c; do
        t=$(basename "$f" .c)
        ${CC:-cc} $asan -DSPURMEM_THREADS -I. -Itests -o "$work/$t" "$f" "$work/asan.o" -lm -lpthread >"$work/out" 2>&1 || { no "$t builds"; continue; }
        run "ASan+UBSan: $t" env SPURMEM_BUILD=build ${data:+SPURMEM_TEST_DATA="$data"} SPURMEM_SANITIZED=1 timeout 900 "$work/$t"
    done
else skip "ASan"; fi
tsan="-O1 -g -fsanitize=thread"
if printf 'int main(void){return 0;}' | ${CC:-cc} $tsan -x c -o "$work/probe" - 2>/dev/null && "$work/probe"; then
    ${CC:-cc} $tsan -DSPURMEM_THREADS -I. -c -o "$work/tsan.o" tests/spurmem.c
    for t in test_core test_tape test_data; do
        [ -f tests/$t.c ] || continue
        ${CC:-cc} $tsan -DSPURMEM_THREADS -I. -Itests -o "$work/$t" tests/$t.c "$work/tsan.o" -lm -lpthread >"$work/out" 2>&1 || { no "$t builds"; continue; }
        run "TSan: $t" env SPURMEM_BUILD=build SPURMEM_SANITIZED=1 timeout 900 "$work/$t"
    done
else skip "TSan"; fi
if have valgrind; then
    for t in test_core test_pack; do
        [ -f tests/$t.c ] || continue
        ${CC:-cc} -O1 -g -DSPURMEM_THREADS -I. -Itests -o "$work/vg_$t" tests/$t.c tests/spurmem.c -lm -lpthread >"$work/out" 2>&1 || { no "$t builds"; continue; }
        run "valgrind: $t" env SPURMEM_BUILD=build SPURMEM_ISA=avx2 timeout 900 valgrind -q --error-exitcode=9 --leak-check=full "$work/vg_$t"
    done
else skip valgrind; fi

echo "fuzz corpora"
judge=${CC:-cc} # clang sees more undefined behaviour, where its runtime is installed
have clang && sanitizes clang && judge=clang
if sanitizes "$judge"; then
    for f in tests/fuzz/fuzz_*.c; do
        t=$(basename "$f" .c)
        [ -d "tests/fuzz/corpus/${t#fuzz_}" ] || { no "$t has a corpus"; continue; }
        $judge $asan -DFUZZ_STANDALONE -I. -o "$work/$t" "$f" -lm >"$work/out" 2>&1 || { no "$t builds"; continue; }
        run "ASan+UBSan: $t" sh -c "timeout 300 $work/$t tests/fuzz/corpus/${t#fuzz_}/*"
    done
else skip "fuzz corpora"; fi

echo "house rules"
run "lint" sh tests/lint.sh
echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" = 0 ]

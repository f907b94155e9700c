#!/bin/sh
# Runs test programs, shows what failed, closes with the sum of their counts.
[ -n "$SPURMEM_TEST_DATA" ] || unset SPURMEM_TEST_DATA # no real data beside the checkout: those tests skip
passed=0; failed=0; skipped=0
programs=$*
for program in $programs; do
    started=$(date +%s)
    output=$("$program" 2>&1); code=$?
    line=$(printf '%s\n' "$output" | grep -E '^[a-z_0-9]+\.c: [0-9]+ passed, [0-9]+ failed' | tail -n 1)
    if [ -z "$line" ] || { [ "$code" != 0 ] && printf '%s' "$line" | grep -q ' 0 failed'; }; then
        line="$(basename "$program").c: 0 passed, 1 failed, 0 skipped"
        output="$output
    ended with code $code before its summary"
    fi
    set -- $(printf '%s' "$line" | tr -c '0-9a-z_.:' ' ')
    passed=$((passed + $2)); failed=$((failed + $4)); skipped=$((skipped + ${6:-0}))
    printf '%-18s %4d passed %3d failed %3d skipped  %3d s\n' "$(basename "$program")" "$2" "$4" "${6:-0}" "$(($(date +%s) - started))"
    printf '%s\n' "$output" | grep -E '^    |FAIL|ERROR:|runtime error' | head -n 40
done
echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" = 0 ] && [ "$passed" -gt 0 ]

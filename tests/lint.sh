#!/bin/sh
# House rules that a compiler does not check.  Prints what breaks them; exit 1 if anything does.
header=${1:-spurmem.h}
bad=0
say() { echo "lint: $1"; bad=1; }

# The library never aborts, exits or prints.
grep -nE '(^|[^_[:alnum:]])(abort|exit|printf|puts|fprintf) *\(' "$header" | grep -vE '^[0-9]+: *(\*|/\*|//)' | grep -vE '__attribute__' && say "the library must never abort, exit or print"
# No private function ahead of its definition.
grep -nE '^static [^=]*\) *;' "$header" && say "private functions are defined before they are used, not declared"
# No arrays of pointers at file scope or static in functions: they are writable data once relocated.
grep -nE '^ *static const (char|void|struct [a-z_]+) *\*' "$header" | grep '\[' && say "no static arrays of pointers"
grep -nE '\b(TODO|FIXME|XXX|HACK)\b' "$header" && say "marks of unfinished work"
awk 'length($0) > 160 { print FILENAME ":" FNR ": " length($0) " columns"; n++ } END { exit n > 0 }' "$header" || say "lines longer than 160 columns"

# API and implementation have the same numbered sections in the same order, and a section calls only sections above it.
awk '
    /^ \* >>API-[A-Z]+ +[0-9]+/ { api[$3 + 0] = substr($2, 7); api_order = api_order " " ($3 + 0); section = 0; in_api = 1 }
    /^ \* >>[A-Z]+ +[0-9]+/ && !/>>API-/ { section = $3 + 0; name[section] = substr($2, 3); order = order " " section; in_api = 0 }
    !in_api && section && /^(SPMDEF|static|SPMI_FORMAT)/ && /\(/ && !/;$/ {
        line = $0; sub(/\(.*/, "", line); n = split(line, word, /[ *]+/); f = word[n]
        if (line ~ /SPMI_K$/) { line = $0; sub(/.*SPMI_K\(/, "", line); sub(/\).*/, "", line); f = "spmi_" line }
        if (f ~ /^spmi?_/) home[f] = section
    }
    { text[FNR] = $0; where[FNR] = in_api ? 0 : section }
    END {
        for (s in api) if (name[s] != api[s]) { print "section " s ": API says " api[s] ", implementation says " name[s]; bad = 1 }
        last = 0; n = split(order, o, " "); for (i = 1; i <= n; i++) { if (o[i] < last) { print "sections out of order: " order; bad = 1; break } last = o[i] }
        for (i = 1; i <= FNR; i++) {
            if (!where[i]) continue
            line = text[i]; gsub(/"[^"]*"/, "", line); sub(/^ *\*.*/, "", line); sub(/\/\*.*/, "", line)
            while (match(line, /spmi?_[a-z0-9_]+\(/)) {
                f = substr(line, RSTART, RLENGTH - 1); line = substr(line, RSTART + RLENGTH)
                if (f in home && home[f] > where[i]) { print "line " i ": section " where[i] " calls " f " of section " home[f]; bad = 1 }
            }
        }
        exit bad
    }' "$header" || say "order of sections"
# Every anchor of the contents exists.
for anchor in $(grep -oE '^ \*  ?>>[A-Z-]+' "$header" | grep -oE '>>[A-Z-]+' | sort | uniq -d); do
    [ "$(grep -c -E "^ \* $anchor( |\$)" "$header")" -ge 1 ] || say "contents name $anchor, which is nowhere"
done
[ $bad = 0 ] && echo "lint: nothing to say"
exit $bad

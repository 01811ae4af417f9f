# Sourced by test/bench: one measurement, and the table of all of them.
#
#   measure WHAT WAY ROWS PREPARE RUN [FINISH]   one line of results: psql scripts, of which RUN is measured
#   compare WHAT TITLE MEANING BASE [ZERO]       how the ways of WHAT are to be compared, see report()
#
# A result is a line of $T/results: WHAT|WAY|run|rows|seconds|cpu seconds|bytes of WAL|a worker's MB of private memory (of all).

ask() { as_user psql -X -q -At -v ON_ERROR_STOP=1 -d bench -c "$1" 2>>"$T/log/bench.err"; }
sql_file() { as_user psql -X -q -v ON_ERROR_STOP=1 -d bench -f "$1" >>"$T/log/bench.out" 2>&1 || { tail -5 "$T/log/bench.out"; return 1; }; }

# Makes $T/server_cpu, which prints the CPU time in ns that the server's processes have used: those that run, by the scheduler's
# account, and those that have ended, by their parent's.
begin_measuring() {
    results=$T/results comparisons=$T/comparisons
    : >"$results" && : >"$comparisons"
    run=1
    cat >"$T/server_cpu" <<EOS
#!/bin/bash
# A process that ends meanwhile would be missed or counted twice: then look again.
server=$(head -1 "$T/bench/data/postmaster.pid") tick=$((1000000000 / $(getconf CLK_TCK)))
while :; do
    list=\$(<"/proc/\$server/task/\$server/children")
    read -r total rest <"/proc/\$server/schedstat"
    read -r -a stat <"/proc/\$server/stat"
    total=\$((total + (stat[15] + stat[16]) * tick)) gone=0
    for child in \$list; do
        { read -r ns rest <"/proc/\$child/schedstat"; } 2>/dev/null && total=\$((total + ns)) || gone=1
    done
    [ \$gone = 0 ] && [ "\$list" = "\$(<"/proc/\$server/task/\$server/children")" ] && break
    sleep 0.01
done
echo "\$total"
EOS
    chmod 755 "$T/server_cpu"
    [ "$("$T/server_cpu")" -gt 0 ] || die "the CPU time of the server's processes cannot be read from /proc"
}

# The largest private memory (RssAnon, so without the shared buffers that a process has touched) of our workers, in MB, sampled
# until $1 exists; and what the kernel says was their largest memory with all of those (VmHWM).
watch_memory() {
    local server child children name key kb rest most=0 with_shared=0
    server=$(head -1 "$T/bench/data/postmaster.pid")
    while [ ! -e "$1" ]; do
        read -r -a children <"/proc/$server/task/$server/children"
        for child in "${children[@]}"; do
            name= && IFS= read -r -d '' name <"/proc/$child/cmdline"
            [[ $name == *migrate_ext* ]] || continue
            while read -r key kb rest; do
                case $key in
                    VmHWM:) [ "$kb" -gt "$with_shared" ] && with_shared=$kb ;;
                    RssAnon:) [ "$kb" -gt "$most" ] && most=$kb ;;
                esac
            done <"/proc/$child/status"
        done
        sleep 0.05
    done 2>/dev/null
    echo "$(((most + 512) / 1024)) ($(((with_shared + 512) / 1024)))" >"$1.mb"
}

measure() {
    local what=$1 way=$2 n=$3 prepare=$4 script=$5 finish=${6:-} status ended=$T/tmp/ended watch
    rm -f "$ended" "$ended.mb"
    watch=
    if [[ $script == *migrate.start* ]]; then watch_memory "$ended" & watch=$!; fi
    as_user psql -X -q -At -v ON_ERROR_STOP=1 -d bench >"$T/log/measured" 2>"$T/log/measure.err" <<EOS
SET client_min_messages = warning;
\\o /dev/null
$prepare
CHECKPOINT;
\\connect
SET client_min_messages = warning;
SELECT pg_current_wal_insert_lsn() - '0/0' AS wal0 \\gset
\\set cpu0 \`$T/server_cpu\`
SELECT extract(epoch FROM clock_timestamp()) AS time0 \\gset
$script
SELECT extract(epoch FROM clock_timestamp()) AS time1, pg_current_wal_insert_lsn() - '0/0' AS wal1 \\gset
\\set cpu1 \`$T/server_cpu\`
\\o
SELECT 'measured|', (:time1 - :time0), (:cpu1 - :cpu0) / 1e9, :wal1 - :wal0;
\\o /dev/null
$finish
EOS
    status=$?
    touch "$ended"
    [ -z "$watch" ] || wait "$watch"
    if [ $status != 0 ] || ! grep -q '^measured' "$T/log/measured"; then
        echo "$what: $way:"
        tail -5 "$T/log/measure.err"
        return 1
    fi
    sed -n 's/^measured||//p' "$T/log/measured" | while IFS='|' read -r seconds cpu wal; do
        echo "$what|$way|$run|$n|$seconds|$cpu|$wal|$(cat "$ended.mb" 2>/dev/null)" >>"$results"
        printf '   %s/%s  %-34s %-62s %9.3f s %8.2f µs CPU/row %7.0f B WAL/row\n' "$run" "$runs" "$what" "$way" "$seconds" \
            "$(awk "BEGIN { print $cpu * 1e6 / $n }")" "$(awk "BEGIN { print $wal / $n }")"
    done
}

# MEANING: speed (rows a second, as a multiple of BASE's), or added (CPU a row beyond ZERO's, as a multiple of what BASE adds).
compare() { echo "$1|$2|$3|$4|${5:-}" >>"$comparisons"; }

# Of a list of numbers, for awk.
median='
function median(list,    n, part, i, j, t) {
    n = split(list, part, " ")
    for (i = 2; i <= n; i++) for (j = i; j > 1 && part[j - 1] + 0 > part[j] + 0; j--) { t = part[j]; part[j] = part[j - 1]; part[j - 1] = t }
    return n % 2 ? part[(n + 1) / 2] : (part[n / 2] + part[n / 2 + 1]) / 2
}
'

# The results as a Markdown table, by the order in which the ways came first.
report() {
    [ -s "$results" ] || return 0
    echo
    echo '| what | way | ratio | CPU µs a row | WAL bytes a row | MB | n |'
    echo '|---|---|--:|--:|--:|--:|--:|'
    awk -F '|' "$median"'
        FNR == NR { title[$1] = $2; meaning[$1] = $3; base[$1] = $4; zero[$1] = $5; next }
        {
            if (!($1 SUBSEP $2 in seen)) { seen[$1, $2] = 1; order[++count] = $1 "|" $2; if (!($1 in ways)) whats[++kinds] = $1; ways[$1] = 1 }
            key = $1 "|" $2 "|" $3
            seconds[key] = $5 / $4; cpu[key] = $6 * 1e6 / $4; wal[key] = $7 / $4; memory[key] = $8
            if ($3 > runs) runs = $3
            rows[$1 "|" $2] = $4
        }
        END {
            for (k = 1; k <= kinds; k++) for (o = 1; o <= count; o++) {
                split(order[o], part, "|")
                what = part[1]
                if (what != whats[k]) continue
                ratios = cpus = wals = memory_of = ""
                for (r = 1; r <= runs; r++) {
                    key = order[o] "|" r; b = what "|" base[what] "|" r; z = what "|" zero[what] "|" r
                    if (!(key in cpu)) continue
                    if (meaning[what] == "speed" && (b in cpu)) ratios = ratios " " seconds[b] / seconds[key]
                    if (meaning[what] == "added" && (b in cpu) && (z in cpu) && cpu[b] > cpu[z]) ratios = ratios " " (cpu[key] - cpu[z]) / (cpu[b] - cpu[z])
                    cpus = cpus " " cpu[key]; wals = wals " " wal[key]; if (memory[key] + 0 > memory_of + 0) memory_of = memory[key]
                }
                printf "| %s | %s | %s | %.2f | %.0f | %s | %d |\n", title[what], part[2], ratios == "" ? "" : sprintf("%.2f", median(ratios)),
                    median(cpus), median(wals), memory_of, rows[order[o]]
            }
        }' "$comparisons" "$results"
    echo
    echo 'Ratio: rows a second as a multiple of the first way of the same lines, measured in the same run; for dual writes the CPU'
    echo 'added to the statement, as a multiple of what the PL/pgSQL row trigger adds. MB: private memory of the worker (with the shared'
    echo 'buffers that it has touched), the most of any run. fsync and autovacuum are off.'
}

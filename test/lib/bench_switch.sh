# Sourced by test/bench: what an application notices of a switch. Clients read and write by key, a statement each, while somebody
# keeps a transaction open for five seconds that has read the same; the same load without a switch is what it is compared with.

seconds=24

# The application's statements: relation $1, key $2 and a column $3.
client_scripts() {
    local key="\\set id random(1, $table_rows)"
    printf '%s\n' "$key" "SELECT $3, bio FROM $1 WHERE $2 = :id;" >"$T/tmp/read.sql"
    printf '%s\n' "$key" "UPDATE $1 SET $3 = 'name ' || :client_id WHERE $2 = :id;" >"$T/tmp/write.sql"
}

# Reads $1, and stays in the way for five seconds.
stay_in_the_way() { ask "BEGIN; SELECT count(*) FROM $1; SELECT pg_sleep(5); COMMIT" >/dev/null; }

# under_load WHAT WAY RELATION THERE BACK: eight clients; somebody stays in the way twice, and each time a second later comes
# the statement THERE or BACK.
under_load() {
    local what=$1 way=$2 relation=$3 there=$4 back=$5 load holder log=$T/tmp/latency
    rm -f "$log".* && ask "VACUUM ANALYZE" >/dev/null && ask CHECKPOINT >/dev/null || return
    as_user pgbench -n -M prepared -c 8 -j 2 -T $seconds -f "$T/tmp/read.sql" -f "$T/tmp/write.sql" --log --log-prefix="$log" bench >"$T/tmp/pgbench.out" 2>&1 &
    load=$!
    local statement
    for statement in "$there" "$back"; do
        sleep 2
        stay_in_the_way "$relation" & holder=$!
        sleep 1
        ask "SET client_min_messages = warning; $statement" >/dev/null || { echo "$what: $way: $(tail -3 "$T/log/bench.err")"; return 1; }
        wait $holder
    done
    wait $load || { tail -5 "$T/tmp/pgbench.out"; return 1; }
    local failed
    failed=$(sed -n 's/^number of failed transactions: \([0-9]*\).*/\1/p' "$T/tmp/pgbench.out")
    # Column 3 of pgbench's log is a transaction's time in microseconds.
    cat "$log".* | awk '{ print $3 }' | sort -n | awk -v line="$what|$way|$run" -v failed="${failed:-0}" '
        { t[NR] = $1 } END { printf "%s|%d|%.3f|%.3f|%d\n", line, NR, t[int(NR * 0.999)] / 1000, t[NR] / 1000, failed }' >>"$T/switches"
    tail -1 "$T/switches" | awk -F '|' -v runs="$runs" '{ printf "   %s/%s  %-34s %-40s %9d transactions, 99.9 %% within %.1f ms, worst %.1f ms, %d failed\n", $3, runs, $1, $2, $4, $5, $6, $7 }'
}

# The same load without a switch and with one of MIGRATION, to and fro.
both_ways() {
    local what=$1 relation=$2 migration=$3
    under_load "$what" 'no switch' "$relation" 'SELECT pg_sleep(4)' 'SELECT pg_sleep(4)' &&
        under_load "$what" '**cutover, then rollback**' "$relation" "SELECT migrate.cutover('$migration')" "SELECT migrate.rollback('$migration')"
}

bench_switch() {
    table_rows=$((rows < 100000 ? rows : 100000))
    : >"$T/switches"
    ask "CALL make_users('users_viewed', $table_rows); CALL make_profiles('profiles_viewed', 'users_viewed');
         CALL make_users('users_swapped', $table_rows); CALL make_users('users_wide', 0)" &&
        ask "SELECT migrate.define('viewed', 'users_viewed', 'profiles_viewed', '$mapping', reverse => 'user_id AS id, display_name AS name, bio, created_at', on_target_delete => 'delete');
             SELECT migrate.add_view('viewed', 'profile'), migrate.start('viewed');
             SELECT migrate.define('swapped', 'users_swapped', 'users_wide', on_target_delete => 'delete');
             SELECT migrate.set('swapped', 'cutover', 'swap'), migrate.start('swapped')" >/dev/null &&
        ask "CALL migrate.wait('viewed')" >/dev/null && ask "CALL migrate.wait('swapped')" >/dev/null || return
    for run in $(seq "$runs"); do
        client_scripts profile user_id display_name
        both_ways 'through a view' profile viewed || return
        client_scripts users_swapped id name
        both_ways 'by swap, by table name' users_swapped swapped || return
    done
    ask "SELECT migrate.cancel(m), migrate.drop(m) FROM unnest('{viewed,swapped}'::text[]) m" >/dev/null
}

# Medians, and of the pairs within each run what the switch added to the worst, and the ratio of the 99.9th percentiles.
report_switches() {
    [ -s "$T/switches" ] || return 0
    echo
    echo '| switch beside a transaction of 5 s, 8 clients | way | 99.9 % within ms | worst ms | failed | worst, added ms | 99.9 %, ratio |'
    echo '|---|---|--:|--:|--:|--:|--:|'
    awk -F '|' "$median"'
        {
            key = $1 "|" $2
            if (!(key in failed)) order[++count] = key
            failed[key] += $7
            p999[key] = p999[key] " " $5; worst[key] = worst[key] " " $6
            if ($2 == "no switch") { base_p999[$1, $3] = $5; base_worst[$1, $3] = $6 }
            else { added[key] = added[key] " " $6 - base_worst[$1, $3]; ratio[key] = ratio[key] " " $5 / base_p999[$1, $3] }
        }
        END {
            for (o = 1; o <= count; o++) {
                split(order[o], part, "|")
                k = order[o]
                printf "| %s | %s | %.1f | %.1f | %d | %s | %s |\n", part[1], part[2], median(p999[k]), median(worst[k]), failed[k],
                    added[k] == "" ? "" : sprintf("%.1f", median(added[k])), ratio[k] == "" ? "" : sprintf("%.2f", median(ratio[k]))
            }
        }' "$T/switches"
}

# Sourced by test/run: the isolation specs. Those that call prepare() are the matrix: they share test/isolation/setup.sql and run in two
# databases: in one src is migrated, in the other, the control, nothing knows of the extension. An application must not see which of
# them it is in. The others bring what they need.

# Puts the specs asked for into `names` and, those of the matrix, `matrix` of the caller, without those that this server cannot run.
list_isolation() {
    local file name needed
    for file in "$TREE"/test/isolation/specs/*.spec; do
        name=$(basename "$file" .spec)
        [ -e "$file" ] && is_wanted isolation "$name" || continue
        needed=$(sed -n 's/^# needs: PostgreSQL \([0-9]*\)$/\1/p' "$file")
        if [ -n "$needed" ] && [ "$PG_MAJOR" -lt "$needed" ]; then
            echo "note: isolation $name needs PostgreSQL $needed"
        elif grep -q 'PERFORM prepare(' "$file"; then
            matrix+=("$name")
        else
            names+=("$name")
        fi
    done
}

prepare_matrix() {
    local setup=$TREE/test/isolation/setup.sql
    as_user createdb contrib_regression && as_user createdb control &&
        as_user psql -Xq -d contrib_regression -c 'CREATE EXTENSION migrate_ext' &&
        as_user psql -Xq -d contrib_regression -v dual_writes=on -f "$setup" &&
        as_user psql -Xq -d control -v dual_writes=off -f "$setup"
}

# compare_matrix TESTER OUTPUT NAME…: runs each spec once more, in the control, and compares.
compare_matrix() {
    local tester=$1 out=$2 name spec control figures
    shift 2
    for name in "$@"; do
        spec=$TREE/test/isolation/specs/$name.spec control=$T/log/$name.control
        grep -q '^# no control: ' "$spec" && control=
        if [ -n "$control" ] && ! (as_user timeout -k 10 300 "$tester" "host=$PGHOST port=$PGPORT user=postgres dbname=control" <"$spec") >"$control" 2>"$control.err"; then
            fail "matrix $name in the control"
            show "$control.err" 10
        elif figures=$("$TREE/test/lib/compare_control" ${only_sql:+--sql} "$spec" "$out/results/$name.out" ${control:+"$control"} 2>&1); then
            pass "matrix $name, what the application sees: ${figures##*$'\n'}"
        else
            fail "matrix $name, what the application sees"
            echo "$figures" | tail -40 | sed 's/^/    /'
        fi
    done
}

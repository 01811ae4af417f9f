# Sourced by test/run: the suite against builds in which one safeguard of the protocol is removed (src/mutant.hpp). Each of them
# must make a test fail: a suite that passes without a safeguard would not notice its loss.

# The tests that guard the protocol. They run as always, but on the mutant's installation and in a folder of their own.
MUTANT_TESTS=(dual_write place isolation checker)

list_mutants() { sed -n '/^enum Name/,/^}/s/^ *\([a-z_]*\),.*/\1/p' "$TREE/src/mutant.hpp" | grep -vx none; }

# Prints the report of the tests that fail on variant $1; in a subshell, for it changes what the runners go by.
report_variant() (
    local config
    config=$(variant_pg_config "$1")
    export PG_CONFIG=$config BIN=${config%/*} PATH=${config%/*}:$PATH
    T=$T/mutant_$1 long=0 failed=0
    shift
    wanted=("$@")
    as_user mkdir -p "$T/log"
    run_regressions
    run_tap
)

run_mutants() {
    local name noticed
    for name in $(list_mutants); do
        is_wanted mutants "$name" || continue
        if ! build_variant "$name" "MIGRATE_MUTANT=$name"; then
            fail "mutant $name: the build failed"
            show "$T/log/build.$name.log" 50
            continue
        fi
        report_variant "$name" "${MUTANT_TESTS[@]}" >"$T/log/mutant.$name"
        noticed=$(sed -n 's/^FAILED  \([a-z]* [a-z0-9_]*\).*/\1/p' "$T/log/mutant.$name" | sort -u | paste -sd, | sed 's/,/, /g')
        if [ -n "$noticed" ]; then
            pass "mutant $name is noticed by $noticed"
        else
            fail "mutant $name passes the suite"
            show "$T/log/mutant.$name"
        fi
    done
}

# The tests of the protocol, on a build whose dual writes all go through SQL: both paths must pass them. What only concerns the choice
# between them, and what differs for the better without SQL (expected_sql), is not asked of it.
SQL_TESTS=(dual_write state state_links state_types cutover worker isolation checker)

run_only_sql() {
    is_wanted only_sql only_sql || return
    if ! build_variant only_sql MIGRATE_PATH=spi; then
        fail "only SQL: the build failed"
        show "$T/log/build.only_sql.log" 50
        return
    fi
    as_user cp "$T/tree_only_sql/test/isolation/expected_sql/"*.out "$T/tree_only_sql/test/isolation/expected/"
    as_user rm "$T/tree_only_sql/test/isolation/specs/"{direct_path,batch_and_retry}.spec
    only_sql=1 TREE=$T/tree_only_sql report_variant only_sql "${SQL_TESTS[@]}" >"$T/log/only_sql"
    if grep -q '^FAILED' "$T/log/only_sql" || ! grep -q '^ok' "$T/log/only_sql"; then fail "only SQL"; show "$T/log/only_sql"; else pass "only SQL"; fi
}

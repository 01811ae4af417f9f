# Sourced by test/run: the suite against builds in which one safeguard of the protocol is removed (src/mutant.hpp). Each of them
# must make a test fail: a suite that passes without a safeguard would not notice its loss.

# The tests that guard the protocol. They run as always, but on the mutant's installation and in a folder of their own.
MUTANT_TESTS=(dual_write isolation checker)

list_mutants() { sed -n '/^enum Name/,/^}/s/^ *\([a-z_]*\),.*/\1/p' "$TREE/src/mutant.hpp" | grep -vx none; }

# Prints the report of the tests that fail on mutant $1; in a subshell, for it changes what the runners go by.
report_mutant() (
    local config
    config=$(variant_pg_config "$1")
    export PG_CONFIG=$config BIN=${config%/*} PATH=${config%/*}:$PATH
    T=$T/mutant_$1 long=0 failed=0 wanted=("${MUTANT_TESTS[@]}")
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
        report_mutant "$name" >"$T/log/mutant.$name"
        noticed=$(sed -n 's/^FAILED  \([a-z]* [a-z0-9_]*\).*/\1/p' "$T/log/mutant.$name" | sort -u | paste -sd, | sed 's/,/, /g')
        if [ -n "$noticed" ]; then
            pass "mutant $name is noticed by $noticed"
        else
            fail "mutant $name passes the suite"
            show "$T/log/mutant.$name"
        fi
    done
}

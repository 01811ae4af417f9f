# Sourced by test/bench: the cost of a row and the memory of a worker must not grow with the table.

bench_sizes() {
    local n sizes=(100000 1000000)
    [ $long = 1 ] && sizes+=(5000000)
    [ "$rows" -ge 1000000 ] || sizes=($((rows / 10 > 0 ? rows / 10 : 1)) "$rows")
    for n in "${sizes[@]}"; do
        compare "size_$n" "$(sed ':a; s/\B[0-9]\{3\}\>/,&/; ta' <<<"$n") rows" speed 'one INSERT … SELECT'
    done
    for run in $(seq "$runs"); do
        for n in "${sizes[@]}"; do
            ask "CALL make_users('users', $n)" || return
            measure "size_$n" 'one INSERT … SELECT' "$n" "CALL make_profiles('profiles', 'users'); VACUUM ANALYZE users;" "$copy_sql" || return
            ours "size_$n" '**migrate_ext, 1 worker**' "$n" 1 false || return
            measure "size_$n" '**validate: ranges**' "$n" "
                VACUUM ANALYZE users; VACUUM ANALYZE profiles;
                SELECT migrate.define('copy', 'users', 'profiles', '$mapping', on_target_delete => 'delete');" "
                SELECT 1 / (verdict = 'equal')::int FROM migrate.validate('copy');" "SELECT migrate.drop('copy');" || return
        done
    done
}

# Sourced by test/bench: are two tables equal, and what is a table's checksum?

# Each must say that both sides are equal: a division by zero says otherwise.
validate() {
    measure digests "$1" "$rows" 'VACUUM users; VACUUM profiles;' "SELECT 1 / (verdict = 'equal')::int FROM migrate.validate('digests', '$2');"
}

full_join="SELECT 1 / (count(*) = 0)::int FROM users u FULL JOIN profiles p ON p.user_id = u.id
    WHERE u.id IS NULL OR p.user_id IS NULL OR (u.name, coalesce(u.bio, ''), u.created_at) IS DISTINCT FROM (p.display_name, p.bio, p.created_at);"
# As it has to be written where a NULL, an -0 or a 1.00 must not pass for something else: by the text of whole rows.
full_join_text="SELECT 1 / (count(*) = 0)::int FROM (SELECT id AS user_id, name AS display_name, coalesce(bio, '') AS bio, created_at FROM users) u
    FULL JOIN profiles p USING (user_id) WHERE u IS NULL OR p IS NULL OR u::text <> p::text;"

bench_digests() {
    ask "CALL make_users('users', $rows); CALL make_profiles('profiles', 'users'); $copy_sql
         SELECT migrate.define('digests', 'users', 'profiles', '$mapping', on_target_delete => 'delete');" >/dev/null || return
    ask "VACUUM ANALYZE users" && ask "VACUUM ANALYZE profiles" || return
    compare digests 'both sides equal?' speed 'full join by hand, by ='
    compare checksums 'checksum of a table' speed 'md5(string_agg(row::text, … ORDER BY key))'
    for run in $(seq "$runs"); do
        measure digests 'full join by hand, by =' "$rows" 'VACUUM users; VACUUM profiles;' "$full_join" || return
        measure digests 'full join by hand, by the text of rows' "$rows" 'VACUUM users; VACUUM profiles;' "$full_join_text" || return
        validate '**validate: rows** (every row, by image)' rows || return
        validate '**validate: ranges** (MD5 by range)' ranges || return
        validate '**validate: checksum** (one MD5)' checksum || return
        validate '**validate: sums** (parallel)' sums || return
        # string_agg holds the whole table as one value, which can have 1 GB at most.
        if [ "$rows" -le 3000000 ]; then
            measure checksums 'md5(string_agg(row::text, … ORDER BY key))' "$rows" 'VACUUM users;' "SELECT md5(string_agg(u::text, E'\\n' ORDER BY id)) FROM users u;" || return
        fi
        measure checksums '**migrate.md5_agg(row::text, … ORDER BY key)**' "$rows" 'VACUUM users;' "SELECT migrate.md5_agg(u::text, E'\\n' ORDER BY id) FROM users u;" || return
        measure checksums '**migrate.checksum(table)**' "$rows" 'VACUUM users;' "SELECT migrate.checksum('users');" || return
        measure checksums '**migrate.range_checksums(table)**' "$rows" 'VACUUM users;' "SELECT count(md5) FROM migrate.range_checksums('users');" || return
        measure checksums '**migrate.row_sum(row)** (parallel)' "$rows" 'VACUUM users;' "SELECT migrate.row_sum(id, name, bio, created_at, last_login) FROM users;" || return
    done
    ask "SELECT migrate.drop('digests')" >/dev/null
}

# Sourced by test/bench: copying all rows of a table into another of a new shape.

copy_sql="INSERT INTO profiles SELECT id, name, coalesce(bio, ''), created_at FROM users;"
mapping="id AS user_id, name AS display_name, coalesce(bio, '''') AS bio, created_at"

# ours WHAT WAY ROWS WORKERS FULL_DRESS: from start until the last row is copied. Dual writes are on from the start.
ours() {
    measure "$1" "$2" "$3" "
        CALL make_profiles('profiles', 'users', $5);
        VACUUM ANALYZE users;
        SELECT migrate.define('copy', 'users', 'profiles', '$mapping', on_target_delete => 'delete');
        SELECT migrate.set('copy', 'workers', '$4');" "
        SELECT migrate.start('copy');
        CALL await_copy('copy');" "
        CALL migrate.wait('copy');" || return
    same_rows "$1: $2" || return
    # (A target with a foreign key is emptied again.)
    ask "SELECT migrate.cancel('copy'), migrate.drop('copy')" >/dev/null
}

# A benchmark of something that does not do the work would be worth nothing.
same_rows() {
    local differ
    differ=$(ask "SELECT count(*) FROM (SELECT id, name, coalesce(bio, '') AS bio, created_at FROM users EXCEPT ALL SELECT * FROM profiles) x")
    [ "$differ" = 0 ] || die "$1: $differ rows were not copied"
}

# by_hand WHAT WAY SQL FULL_DRESS
by_hand() {
    measure "$1" "$2" "$rows" "CALL make_profiles('profiles', 'users', $4); VACUUM ANALYZE users;" "$3" && same_rows "$1: $2"
}

# As an application's script does it: a SELECT and an INSERT for each row, prepared, over a socket. Fewer rows; the ratio is by row.
script_row_by_row() {
    local n=$((rows < 10000 ? rows : 10000))
    cat >"$T/tmp/row.sql" <<'SQL'
\set id :id + 1
SELECT name AS name, coalesce(bio, '') AS bio, created_at AS created FROM users WHERE id = :id \gset
INSERT INTO profiles VALUES (:id, :name, :bio, :created);
SQL
    measure backfill "application's script, row by row (pgbench, prepared)" "$n" "CALL make_profiles('profiles', 'users', false); VACUUM ANALYZE users;" \
        "\\! pgbench -n -M prepared -D id=0 -c 1 -t $n -f $T/tmp/row.sql bench >$T/tmp/pgbench.out 2>&1" || return
    [ "$(ask 'SELECT count(*) FROM profiles')" = "$n" ] || { tail -5 "$T/tmp/pgbench.out"; die "the script copied something else"; }
}

# pg_repack rewrites a table into its own shape: no migration, but the nearest tool that many have.
repack() {
    command -v pg_repack >/dev/null && [ "$(ask "SELECT count(*) FROM pg_available_extensions WHERE name = 'pg_repack'")" = 1 ] ||
        { [ "$run" != 1 ] || echo "   note: pg_repack is not installed, so it is not compared"; return 0; }
    measure backfill "pg_repack of the source (same shape)" "$rows" "CREATE EXTENSION IF NOT EXISTS pg_repack; VACUUM ANALYZE users;" \
        "\\! pg_repack -k -t users bench >$T/tmp/repack.out 2>&1"
}

bench_backfill() {
    ask "CALL make_users('users', $rows)" || return
    compare backfill 'backfill, key only' speed 'one INSERT … SELECT'
    compare backfill_dressed 'backfill, key + index + foreign key' speed 'one INSERT … SELECT'
    for run in $(seq "$runs"); do
        by_hand backfill 'one INSERT … SELECT' "$copy_sql" false || return
        by_hand backfill 'CREATE TABLE AS, then the key' "DROP TABLE profiles; CREATE TABLE profiles AS SELECT id AS user_id, name AS display_name,
            coalesce(bio, '') AS bio, created_at FROM users; ALTER TABLE profiles ADD PRIMARY KEY (user_id);" false || return
        by_hand backfill 'SQL loop, batches of 10,000' 'CALL copy_in_batches(false);' false || return
        by_hand backfill 'SQL loop, batches of 10,000, rows locked' 'CALL copy_in_batches(true);' false || return
        script_row_by_row || return
        repack || return
        ours backfill '**migrate_ext, 1 worker**' "$rows" 1 false || return
        ours backfill '**migrate_ext, 2 workers**' "$rows" 2 false || return
        by_hand backfill_dressed 'one INSERT … SELECT' "$copy_sql" true || return
        by_hand backfill_dressed 'SQL loop, batches of 10,000, rows locked' 'CALL copy_in_batches(true);' true || return
        ours backfill_dressed '**migrate_ext, 1 worker**' "$rows" 1 true || return
        ours backfill_dressed '**migrate_ext, 2 workers**' "$rows" 2 true || return
    done
}

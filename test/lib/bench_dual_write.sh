# Sourced by test/bench: what a write costs more when it goes to two tables. Each way has tables of its own, so that none stands in
# the way of another.

# one OPERATION SUFFIX WAY: writes of the server's own loop, or with client_update of a client's.
one() {
    local operation=$1 suffix=$2 way=$3 n=$writes vacuum="VACUUM ANALYZE users_$2;"
    [ "$suffix" = none ] || vacuum+=" VACUUM ANALYZE profiles_$suffix;"
    case $operation in
        client_update) by_client "$suffix" "$way" "$vacuum" ;;
        bulk) measure dual_bulk "$way" "$n" "$vacuum" "UPDATE users_$suffix SET name = 'bulk ' || id WHERE id <= $n;" "UPDATE users_$suffix SET name = 'user ' || id WHERE id <= $n;" ;;
        *) measure "dual_$operation" "$way" "$n" "$vacuum" "CALL write_$suffix('$operation', $n);" "DELETE FROM users_$suffix WHERE id > 1000000000;" ;;
    esac
}

# As an application does it: prepared statements over a socket; with suffix "both" it writes to both tables, in a transaction.
by_client() {
    local suffix=$1 way=$2 script=$T/tmp/update.sql
    {
        echo '\set id :id + 1'
        [ "$suffix" = both ] && echo 'BEGIN;'
        echo "UPDATE users_$suffix SET name = 'changed ' || :id WHERE id = :id;"
        [ "$suffix" = both ] && echo "UPDATE profiles_both SET display_name = 'changed ' || :id WHERE user_id = :id;" && echo 'COMMIT;'
    } >"$script"
    measure dual_client_update "$way" "$transactions" "$3" "\\! pgbench -n -M prepared -D id=0 -c 1 -t $transactions -f $script bench >$T/tmp/pgbench.out 2>&1" || return
    grep -q "actually processed: $transactions/$transactions" "$T/tmp/pgbench.out" || { tail -5 "$T/tmp/pgbench.out"; return 1; }
}

# Every way but the one without a target must have kept both tables equal.
in_step() {
    local suffix differ
    for suffix in row stmt both ours; do
        differ=$(ask "SELECT count(*) FROM users_$suffix u FULL JOIN profiles_$suffix p ON p.user_id = u.id
                      WHERE u.id IS NULL OR p.user_id IS NULL OR (u.name, coalesce(u.bio, '')) IS DISTINCT FROM (p.display_name, p.bio)")
        [ "$differ" = 0 ] || die "dual writes ($suffix): $differ rows differ"
    done
}

make_ways() {
    local suffix
    for suffix in none row stmt both ours; do
        ask "CALL make_users('users_$suffix', $table_rows)" || return
        ask "CALL make_writer('$suffix')" || return
        [ "$suffix" = none ] && continue
        ask "CALL make_profiles('profiles_$suffix', 'users_$suffix')" || return
        [ "$suffix" = ours ] || ask "INSERT INTO profiles_$suffix SELECT id, name, coalesce(bio, ''), created_at FROM users_$suffix" || return
    done
    ask "CREATE TRIGGER upsert AFTER INSERT OR UPDATE OR DELETE ON users_row FOR EACH ROW EXECUTE FUNCTION row_upsert();
         CREATE TRIGGER upsert AFTER UPDATE ON users_stmt REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows FOR EACH STATEMENT EXECUTE FUNCTION statement_upsert();
         CREATE TRIGGER inserted AFTER INSERT ON users_stmt REFERENCING NEW TABLE AS new_rows FOR EACH STATEMENT EXECUTE FUNCTION statement_upsert();
         CREATE FUNCTION statement_delete() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN DELETE FROM profiles_stmt p USING old_rows o WHERE p.user_id = o.id; RETURN NULL; END';
         CREATE TRIGGER deleted AFTER DELETE ON users_stmt REFERENCING OLD TABLE AS old_rows FOR EACH STATEMENT EXECUTE FUNCTION statement_delete();
         SELECT migrate.define('dual', 'users_ours', 'profiles_ours', '$mapping', on_target_delete => 'delete');
         SELECT migrate.start('dual')" >/dev/null || return
    # Paused: dual writes go on, and no worker's CPU is counted.
    ask "CALL migrate.wait('dual')" >/dev/null && ask "SELECT migrate.pause('dual')" >/dev/null
}

bench_dual_write() {
    local operation
    table_rows=$((rows < 200000 ? rows : 200000))
    writes=$((table_rows < 60000 ? table_rows : 60000))
    transactions=$writes
    make_ways || return
    for operation in 'update UPDATE of a row' 'insert INSERT of a row' 'unmapped UPDATE of an unmapped column' "bulk UPDATE of $writes rows at once" 'client_update UPDATE of a row by a client (pgbench)'; do
        compare "dual_${operation%% *}" "dual write: ${operation#* }" added 'PL/pgSQL row trigger, upsert' 'no dual write'
    done
    for run in $(seq "$runs"); do
        for operation in update insert unmapped bulk client_update; do
            one "$operation" none 'no dual write' || return
            one "$operation" row 'PL/pgSQL row trigger, upsert' || return
            one "$operation" stmt 'PL/pgSQL statement trigger, transition tables' || return
            [ "$operation" != client_update ] || one "$operation" both 'the application writes both, in a transaction' || return
            one "$operation" ours '**migrate_ext**' || return
        done
        in_step
    done
    ask "SELECT migrate.cancel('dual'), migrate.drop('dual')" >/dev/null
}

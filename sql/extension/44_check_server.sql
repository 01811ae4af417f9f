-- Preflight checks of the server: versions, replicas, old transactions, slots, room.

-- How many replicas a commit waits for, and how many of them answer: those with nothing to say, and those that said something
-- within the last second.
CREATE FUNCTION migrate._synchronous_replicas(OUT wanted integer, OUT answering integer)
LANGUAGE sql STABLE AS $$
    SELECT CASE WHEN names = '' OR pg_is_in_recovery() THEN 0 ELSE coalesce((regexp_match(names, '^\s*(?:FIRST|ANY)?\s*(\d+)\s*\(', 'i'))[1]::integer, 1) END,
           (SELECT count(*)::integer FROM pg_stat_replication r
            WHERE r.sync_state IN ('sync', 'quorum') AND r.state = 'streaming'
              AND CASE WHEN NOT pg_is_in_recovery() THEN r.flush_lsn >= pg_current_wal_flush_lsn() OR r.reply_time > clock_timestamp() - interval '1 s' END)
    FROM current_setting('synchronous_standby_names') AS names
$$;

CREATE FUNCTION migrate._check_server(m migrate._migration) RETURNS SETOF migrate._check
LANGUAGE sql STABLE AS $$
    SELECT 'server_version', 'error', format('server version %s is not one of 13 to 18', current_setting('server_version')), 'Upgrade the server first.'
    WHERE current_setting('server_version_num')::int NOT BETWEEN 130000 AND 189999
    UNION ALL
    SELECT 'recovery', 'error', 'the server is in recovery and accepts no writes', 'Run the migration on the primary.' WHERE pg_is_in_recovery()
    UNION ALL
    SELECT 'wal_level', 'warning', 'wal_level = minimal: no replica or archive can follow the migration', 'ALTER SYSTEM SET wal_level = replica; and restart the server.'
    WHERE current_setting('wal_level') = 'minimal'
    UNION ALL
    SELECT 'replicas', CASE WHEN lag.ms > migrate._opt_ms(m.id, 'max_replica_lag') THEN 'warning' ELSE 'info' END,
           format('replica %s (pid %s) is %s and lags %s ms; the backfill waits while a lag is above %s', quote_literal(r.application_name), r.pid, r.state, lag.ms,
                  coalesce(migrate._opt_ms(m.id, 'max_replica_lag') || ' ms', 'no limit')),
           format('SELECT migrate.set(%L, ''max_replica_lag'', ''…''); sets the limit.', m.name)
    FROM pg_stat_replication r CROSS JOIN LATERAL (SELECT round(coalesce(extract(epoch FROM r.replay_lag), 0)::numeric * 1000)) AS lag(ms)
    UNION ALL
    SELECT 'synchronous_replicas', CASE WHEN s.answering < s.wanted THEN 'error' ELSE 'info' END,
           format('synchronous_standby_names = %s: ', quote_literal(current_setting('synchronous_standby_names')))
               || CASE WHEN s.answering < s.wanted THEN format('%s of %s replicas answer; start and cutover would hold their locks until they do', s.answering, s.wanted)
                       ELSE 'every dual write waits for a replica at commit' END,
           CASE WHEN s.answering < s.wanted THEN 'Wait for the replica, or take it out of synchronous_standby_names.' ELSE '' END
    FROM migrate._synchronous_replicas() s WHERE s.wanted > 0
    UNION ALL
    SELECT 'slots', CASE WHEN age > 10000000 OR NOT s.active THEN 'warning' ELSE 'info' END,
           format('replication slot %s (%s) holds back old rows: its oldest transaction is %s transactions old', quote_ident(s.slot_name), CASE WHEN s.active THEN 'active' ELSE 'inactive' END, age),
           CASE WHEN s.active THEN '' ELSE format('SELECT pg_drop_replication_slot(%L); if nobody needs it.', s.slot_name) END
    FROM pg_replication_slots s CROSS JOIN LATERAL (SELECT greatest(age(s.xmin), age(s.catalog_xmin))) AS a(age)
    WHERE s.xmin IS NOT NULL OR s.catalog_xmin IS NOT NULL
    UNION ALL
    SELECT 'xid_age', 'warning', format('the oldest row of source %s is %s transactions old (autovacuum_freeze_max_age = %s); a migration holds back freezing only for single batches, but the room is small',
               f.source, age(c.relfrozenxid), current_setting('autovacuum_freeze_max_age')), format('VACUUM FREEZE %s;', f.source)
    FROM (SELECT DISTINCT w.source FROM migrate._flow w WHERE w.migration = m.id) f JOIN pg_class c ON c.oid = f.source AND c.relkind = 'r'
    WHERE age(c.relfrozenxid) > 1000000000
    UNION ALL
    SELECT 'worker_slots', CASE WHEN slot.total = 0 THEN 'error' ELSE 'warning' END,
           format('%s of %s background worker slots are free, the migration asks for %s', greatest(slot.total - slot.used, 0), slot.total, slot.wanted),
           format('ALTER SYSTEM SET max_worker_processes = %s; and restart the server. Until one is free, the migration waits.', slot.total + slot.wanted)
    FROM (SELECT current_setting('max_worker_processes')::int AS total,
                 (SELECT count(*) FROM pg_stat_activity a WHERE a.backend_type NOT IN ('client backend', 'autovacuum launcher', 'autovacuum worker', 'background writer',
                      'checkpointer', 'startup', 'walwriter', 'walsender', 'walreceiver', 'archiver', 'logger', 'walsummarizer', 'slotsync worker', 'io worker', 'standalone backend'))::int AS used,
                 migrate._opt(m.id, 'workers')::int AS wanted) AS slot
    WHERE m.phase = 'planned' AND slot.total - slot.used < slot.wanted
$$;

CREATE FUNCTION migrate._check_transactions(m migrate._migration) RETURNS SETOF migrate._check
LANGUAGE sql STABLE AS $$
    SELECT 'prepared_transactions', 'warning', format('prepared transaction %s of role %s in database %s is %s old: cutover waits for it, and start too where it has written to a source',
               quote_literal(p.gid), p.owner, quote_ident(p.database), date_trunc('second', clock_timestamp() - p.prepared)),
           format('COMMIT PREPARED %L; or ROLLBACK PREPARED %L;', p.gid, p.gid)
    FROM pg_prepared_xacts p
    UNION ALL
    SELECT 'long_transactions', 'warning', format('pid %s (role %s, %s) has been in a transaction for %s, which is longer than cutover_timeout = %s ms: cutover would give up before it ends',
               a.pid, coalesce(a.usename::text, '?'), coalesce(a.state, a.backend_type), date_trunc('second', clock_timestamp() - a.xact_start), migrate._opt_ms(m.id, 'cutover_timeout')),
           format('SELECT pg_terminate_backend(%s); ends it.', a.pid)
    FROM pg_stat_activity a
    WHERE a.pid <> pg_backend_pid() AND a.datid = m.database_oid AND (a.backend_xid IS NOT NULL OR a.backend_xmin IS NOT NULL) AND a.backend_type <> 'walsender'
      AND clock_timestamp() - a.xact_start > migrate._opt_ms(m.id, 'cutover_timeout') * interval '1 ms'
$$;

-- How full the disk is cannot be told from SQL; what will be needed can.
CREATE FUNCTION migrate._check_size(m migrate._migration) RETURNS SETOF migrate._check
LANGUAGE sql STABLE AS $$
    SELECT 'size', CASE WHEN e.rows_known THEN 'info' ELSE 'warning' END,
           format('flow "%s": about %s rows%s, source %s; the copy needs about %s on disk and writes about %s of WAL', f.name, e.row_count,
                  CASE WHEN e.rows_known THEN '' ELSE ' (guessed: the table was never analyzed)' END, pg_size_pretty(e.source_bytes), pg_size_pretty(e.target_bytes), pg_size_pretty(e.wal_bytes)),
           CASE WHEN e.rows_known THEN '' ELSE format('ANALYZE %s;', f.source) END
    FROM migrate._flow f JOIN pg_class c ON c.oid = f.source JOIN pg_class t ON t.oid = f.target CROSS JOIN LATERAL migrate._estimate(f) e
    WHERE f.migration = m.id
$$;

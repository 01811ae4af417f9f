-- When the workers hold still: signals of the server and of the DBA. Each gives a reason with value and limit, or NULL.
-- A signal that cannot be read is a reason too.

-- Adds a sample of the WAL position to this worker's memory; how long ago the WAL went past lsn; bytes of WAL a second.
CREATE FUNCTION migrate._sample_wal() RETURNS void LANGUAGE C STRICT AS 'MODULE_PATHNAME', 'migrate_sample_wal';
CREATE FUNCTION migrate._lsn_age_ms(lsn pg_lsn) RETURNS double precision LANGUAGE C STRICT AS 'MODULE_PATHNAME', 'migrate_lsn_age_ms';
CREATE FUNCTION migrate._wal_rate() RETURNS double precision LANGUAGE C STRICT AS 'MODULE_PATHNAME', 'migrate_wal_rate';

-- The replica that lags most. Its own report alone would not do: a stuck replica reports nothing new.
CREATE FUNCTION migrate._throttle_replica(limit_ms bigint) RETURNS text
LANGUAGE sql VOLATILE AS $$
    SELECT CASE WHEN r.lag IS NULL THEN format('replica lag of %s cannot be read, limit %s ms', r.name, limit_ms)
                ELSE format('replica lag %s ms > %s ms (%s)', round(r.lag), limit_ms, r.name) END
    FROM (SELECT coalesce(nullif(s.application_name, ''), 'PID ' || s.pid) AS name,
                 CASE WHEN s.replay_lsn IS NOT NULL
                      THEN greatest(migrate._lsn_age_ms(s.replay_lsn), extract(epoch FROM s.replay_lag) * 1000) END AS lag
          FROM pg_catalog.pg_stat_replication s WHERE s.state IN ('streaming', 'catchup')) r
    WHERE r.lag IS NULL OR r.lag > limit_ms
    ORDER BY r.lag DESC NULLS FIRST LIMIT 1
$$;

CREATE FUNCTION migrate._throttle_backends(most bigint) RETURNS text
LANGUAGE sql VOLATILE AS $$
    SELECT format('active backends %s > %s', count(*), most)
    FROM pg_catalog.pg_stat_activity a WHERE a.backend_type = 'client backend' AND a.state = 'active'
    HAVING count(*) > most
$$;

CREATE FUNCTION migrate._throttle_wal(most bigint) RETURNS text
LANGUAGE sql VOLATILE AS $$
    SELECT CASE WHEN r.rate IS NULL THEN format('WAL rate is not measured yet, limit %s/s', pg_size_pretty(most))
                WHEN r.rate > most THEN format('WAL rate %s/s > %s/s', pg_size_pretty(r.rate::bigint), pg_size_pretty(most)) END
    FROM (SELECT migrate._wal_rate() AS rate) r
$$;

-- The DBA's own query, as the migration's owner.
CREATE FUNCTION migrate._throttle_by_query(owner regrole, query text) RETURNS text
LANGUAGE plpgsql AS $$
DECLARE
    answer text;
BEGIN
    SELECT r[1] INTO answer FROM migrate._as(owner, query) AS r LIMIT 1;
    RETURN CASE WHEN answer IS NULL THEN 'throttle_query gives NULL, limit false'
                WHEN answer::boolean THEN 'throttle_query gives true, limit false' END;
EXCEPTION WHEN query_canceled OR OTHERS THEN
    RETURN format('throttle_query cannot be read: %s (%s), limit false', SQLERRM, SQLSTATE);
END $$;

-- 'HH:MM-HH:MM zone', over midnight too. The end is not part of the window.
CREATE FUNCTION migrate._throttle_window(hours text, moment timestamptz) RETURNS text
LANGUAGE plpgsql STABLE AS $$
DECLARE
    part text[] := regexp_match(hours, '^(\d\d:\d\d)-(\d\d:\d\d)(?: (.+))?$');
    zone text := coalesce(part[3], (SELECT s.reset_val FROM pg_settings s WHERE s.name = 'TimeZone'));
    local_time text := to_char(moment AT TIME ZONE zone, 'HH24:MI');
    inside boolean;
BEGIN
    IF hours = 'always' THEN
        RETURN NULL;
    ELSIF part IS NULL THEN
        RETURN format('window cannot be read: %s', hours);
    END IF;
    inside := CASE WHEN part[1] <= part[2] THEN local_time >= part[1] AND local_time < part[2]
                   ELSE local_time >= part[1] OR local_time < part[2] END;
    RETURN CASE WHEN NOT inside THEN format('window %s, it is %s (%s)', part[1] || '-' || part[2], local_time, zone) END;
END $$;

-- Why the workers of a migration must hold still now; NULL when they need not.
CREATE FUNCTION migrate._throttle_reason(migration_id integer) RETURNS text
LANGUAGE plpgsql AS $$
DECLARE
    m migrate._migration;
    reason text;
BEGIN
    SELECT * INTO m FROM migrate._migration x WHERE x.id = migration_id;
    PERFORM migrate._sample_wal();
    reason := coalesce(
        migrate._throttle_window(migrate._opt(m.id, 'window'), clock_timestamp()),
        CASE WHEN migrate._opt_ms(m.id, 'max_replica_lag') IS NOT NULL
             THEN migrate._throttle_replica(migrate._opt_ms(m.id, 'max_replica_lag')) END,
        CASE WHEN migrate._opt(m.id, 'max_active_backends') IS NOT NULL
             THEN migrate._throttle_backends(migrate._opt(m.id, 'max_active_backends')::bigint) END,
        CASE WHEN migrate._opt(m.id, 'max_wal_rate') IS NOT NULL
             THEN migrate._throttle_wal(migrate._opt(m.id, 'max_wal_rate')::bigint) END,
        CASE WHEN migrate._opt(m.id, 'throttle_query') IS NOT NULL
             THEN migrate._throttle_by_query(m.owner, migrate._opt(m.id, 'throttle_query')) END);
    RETURN reason;
END $$;

-- Writes the reason down. The beginning of a throttle is an event, though not more often than every ten seconds: a signal
-- may swing around its limit for days. On a full disk there may be room for the reason, but not for the event.
CREATE FUNCTION migrate._note_throttle(m migrate._migration, reason text) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    last migrate._event;
BEGIN
    IF reason IS NOT DISTINCT FROM m.throttled_reason THEN
        RETURN;
    END IF;
    UPDATE migrate._migration x
    SET throttled_since = CASE WHEN reason IS NULL THEN NULL ELSE coalesce(x.throttled_since, clock_timestamp()) END,
        throttled_reason = reason
    WHERE x.id = m.id AND x.paused_since IS NULL;
    IF NOT FOUND OR (reason IS NULL) = (m.throttled_reason IS NULL) THEN
        RETURN;
    END IF;
    SELECT * INTO last FROM migrate._event e WHERE e.migration = m.id AND e.kind IN ('throttled', 'unthrottled') ORDER BY e.id DESC LIMIT 1;
    IF reason IS NOT NULL AND coalesce(last.at < clock_timestamp() - interval '10 s', true) THEN
        BEGIN
            PERFORM migrate._event(m, NULL, 'throttled', reason);
        EXCEPTION WHEN insufficient_resources THEN
            NULL;
        END;
    ELSIF reason IS NULL AND last.kind = 'throttled' THEN
        PERFORM migrate._event(m, NULL, 'unthrottled', m.throttled_reason);
    END IF;
END $$;

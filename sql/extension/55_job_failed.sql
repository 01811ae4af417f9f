-- After an error: whose fault it is, and what becomes of the job.

-- Whose fault an error is, by its SQLSTATE:
--   lock    somebody was in the way: try again with a smaller batch
--   cancel  somebody cancelled it: try again later
--   server  no disk, no memory, no connection: wait until it is better, however long
--   object  the tables or the code are not what they were: a person must look
--   row     everything else: the data, or code that the user gave, refused this row
CREATE FUNCTION migrate._blame(sqlstate text) RETURNS text
LANGUAGE sql IMMUTABLE AS $$
    SELECT CASE WHEN sqlstate IN ('40001', '40P01', '55P03') THEN 'lock'
                WHEN sqlstate = '57014' THEN 'cancel'
                WHEN left(sqlstate, 2) IN ('53', '57', '58', '08') THEN 'server'
                WHEN sqlstate = '42804' THEN 'row'
                WHEN left(sqlstate, 2) IN ('42', 'XX', '0A', '25', '28', '3D', '3F', '55', 'F0') THEN 'object'
                ELSE 'row' END
$$;

-- A verb whose transaction is still open holds the migration's row; helpers that share it do not matter.
CREATE FUNCTION migrate._verb_in_the_way(m_id integer) RETURNS text
LANGUAGE sql VOLATILE AS $$
    SELECT '; in the way: ' || string_agg(DISTINCT h, ', ') FROM migrate._migration x, unnest(migrate._holders(x.xmax)) h
    WHERE x.id = m_id AND h NOT IN (SELECT 'PID ' || w.pid FROM migrate._worker w)
$$;

-- Decides what becomes of a job that raised an error, in a transaction of its own. Nothing done before is lost: the
-- checkpoint stands where the last batch that was committed left it. tries: turns that failed in a row.
CREATE FUNCTION migrate._job_failed(migration_id integer, worker integer, j migrate._job, sqlstate text, message text, object text,
                                    tries integer, batch integer, OUT wait_ms integer, OUT next_batch integer)
LANGUAGE plpgsql AS $$
DECLARE
    m migrate._migration;
    blame text := migrate._blame(sqlstate);
BEGIN
    SELECT * INTO m FROM migrate._migration x WHERE x.id = migration_id;
    IF NOT FOUND THEN
        wait_ms := 0;
        RETURN;
    END IF;
    IF blame <> 'lock' OR tries > 5 THEN
        PERFORM migrate._note_error(m.id, worker, format('%s: %s%s', sqlstate, message, CASE blame WHEN 'lock' THEN coalesce(migrate._restore_blockers(m, j), migrate._verb_in_the_way(m.id)) END));
    END IF;
    IF sqlstate = '42501' THEN  -- a table may have got another owner; another worker may have lent him the views meanwhile
        PERFORM FROM migrate._migration x WHERE x.id = m.id FOR UPDATE;
        IF migrate._lend_views(m) OR tries = 1 THEN
            wait_ms := 0;
            RETURN;
        END IF;
    END IF;
    CASE blame
    WHEN 'lock' THEN
        wait_ms := migrate._backoff_ms(tries, 50, 1000);
        next_batch := CASE WHEN j.action = 'copy' THEN migrate._halved_batch(batch) END;
    WHEN 'cancel' THEN
        wait_ms := migrate._backoff_ms(tries, 1000, 60000);
    WHEN 'server' THEN
        wait_ms := migrate._backoff_ms(tries, 1000, 60000);
        PERFORM migrate._note_throttle(m, format('could not write: %s (%s)', message, sqlstate));
    ELSE
        wait_ms := 0;
        IF blame = 'row' AND j.action = 'copy' THEN
            PERFORM migrate._isolate(m, j, sqlstate, object);
        ELSIF j.action = 'validate_key' AND sqlstate IN ('42P01', '42704') AND tries <= 3 THEN
            NULL;  -- a swap, of another migration maybe, may just have renamed the table or taken the key away: the next turn looks again
        ELSIF j.action IN ('index', 'add_key', 'validate_key') THEN
            PERFORM migrate._restore_failed(m, j, sqlstate, message);
        ELSIF j.action IN ('watch', 'rollback') THEN  -- what else the worker does must go on
            wait_ms := migrate._backoff_ms(tries, 1000, 60000);
        ELSE
            PERFORM migrate._fail(m, format('%s: %s (SQLSTATE %s)', coalesce(j.action, 'worker'), message, sqlstate)
                -- (Something was dropped, renamed or revoked; what it takes to go on is told there.)
                || CASE WHEN sqlstate ~ '^42' THEN format('; SELECT * FROM migrate.preflight(%L) WHERE severity = ''error''; may tell why', m.name) ELSE '' END);
        END IF;
    END CASE;
END $$;

-- The key of the range's next row, and what its checkpoint is behind it. Read from the source without the mapping, for it is the
-- mapping that may fail.
CREATE FUNCTION migrate._next_row(f migrate._flow, r migrate._range, OUT key text[], OUT reached text[])
LANGUAGE plpgsql AS $$
DECLARE
    k record;
BEGIN
    IF f.by_place THEN
        SELECT migrate._key_row(n.keys, 1), n.reached INTO key, reached FROM migrate._next_places(f.id, f.copied_file, coalesce(r.checkpoint, r.low), r.high, 1) n;
        RETURN;
    END IF;
    SELECT * INTO k FROM migrate._source_key(f.id);
    SELECT x INTO key FROM migrate._as(migrate._table_owner(k.source), format('SELECT %1$s FROM %2$s WHERE %3$s ORDER BY %1$s LIMIT 1',
        array_to_string(k.names, ', '), k.source, CASE WHEN coalesce(r.checkpoint, r.low) IS NULL THEN '$1::text[] IS NULL' ELSE k.above END),
        coalesce(r.checkpoint, r.low)::text) AS x;
    reached := key;
END $$;

-- A row refuses a batch: halves it, down to the row, which goes to _failure and is passed.
CREATE FUNCTION migrate._isolate(m migrate._migration, j migrate._job, sqlstate text, object text) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    r migrate._range;
    failed record;
    failed_keys bigint;
    most bigint := migrate._opt(m.id, 'max_failures')::bigint;
BEGIN
    SELECT * INTO r FROM migrate._range x WHERE x.flow = j.flow AND x.ordinal = j.ordinal FOR UPDATE;
    IF j.rows > 1 THEN
        UPDATE migrate._range x SET row_limit = j.rows / 2 WHERE x.flow = r.flow AND x.ordinal = r.ordinal;
        -- @point isolate: batch halved
        RETURN;
    END IF;
    SELECT n.* INTO failed FROM migrate._flow f, LATERAL migrate._next_row(f, r) n WHERE f.id = j.flow;
    IF failed.key IS NULL THEN
        RETURN;  -- it is gone by now
    END IF;
    PERFORM migrate._record_failure(j.flow, failed.key, sqlstate, object);
    -- @point isolate: row recorded
    UPDATE migrate._range x SET checkpoint = failed.reached WHERE x.flow = r.flow AND x.ordinal = r.ordinal;
    -- @point isolate: checkpoint behind it
    failed_keys := (SELECT count(DISTINCT (x.flow, x.key)) FROM migrate._failure x JOIN migrate._flow w ON w.id = x.flow WHERE w.migration = m.id);
    IF failed_keys > most THEN
        PERFORM migrate._fail(m, format('%s keys could not be copied > max_failures %s; the last with SQLSTATE %s%s', failed_keys, most, sqlstate,
                                        coalesce(' by ' || object, '')));
    END IF;
END $$;

-- Sets the failed flag; the phase stays, and retry() goes on from there.
CREATE FUNCTION migrate._fail(m migrate._migration, reason text) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
    UPDATE migrate._migration x SET failed_since = clock_timestamp(), failed_reason = reason, throttled_since = NULL, throttled_reason = NULL
    WHERE x.id = m.id AND x.failed_since IS NULL AND migrate._is_under_way(x.phase);  -- a cancel may have come first
    IF FOUND THEN
        PERFORM migrate._event(m, NULL, 'failed', reason);
    END IF;
END $$;

CREATE FUNCTION migrate._fail_gap(m migrate._migration, flow text) RETURNS void
LANGUAGE sql AS $$
    SELECT migrate._fail(m, format('the dual writes of flow "%s" have a gap: a trigger was dropped or disabled, or a partition attached or detached. '
                                   'SELECT migrate.retry(%L); arms them again', flow, m.name))
$$;

CREATE FUNCTION migrate._report(m_id integer, worker integer, rows_per_second double precision, batch integer) RETURNS void
LANGUAGE sql AS $$
    INSERT INTO migrate._pace AS p (migration, worker, rows_per_second) VALUES (m_id, worker, rows_per_second)
    ON CONFLICT (migration, worker) DO UPDATE SET at = clock_timestamp(), rows_per_second = CASE
        WHEN p.rows_per_second IS NULL OR p.at < clock_timestamp() - interval '10 s' THEN excluded.rows_per_second
        ELSE 0.7 * p.rows_per_second + 0.3 * excluded.rows_per_second END;
    UPDATE migrate._migration m SET batch_rows = batch WHERE m.id = m_id AND worker = 0 AND batch > 0 AND m.batch_rows <> batch
$$;

CREATE FUNCTION migrate._note(m_id integer, worker integer, note text) RETURNS void
LANGUAGE sql AS $$
    INSERT INTO migrate._pace AS p (migration, worker, note) VALUES (m_id, worker, note)
    ON CONFLICT (migration, worker) DO UPDATE SET note = excluded.note WHERE p.note IS DISTINCT FROM excluded.note
$$;

CREATE FUNCTION migrate._note_error(m_id integer, worker integer, error text) RETURNS void
LANGUAGE sql AS $$
    INSERT INTO migrate._pace AS p (migration, worker, last_error, last_error_at) VALUES (m_id, worker, error, clock_timestamp())
    ON CONFLICT (migration, worker) DO UPDATE SET last_error = excluded.last_error, last_error_at = excluded.last_error_at
$$;

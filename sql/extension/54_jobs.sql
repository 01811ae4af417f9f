-- The jobs themselves: a batch, the re-queue, failures that are due, the end of the backfill, validation, shadow reads.

-- The bytes that a batch may have, NULL: no limit is needed. Without values stored out of line rows are small, and the number of
-- rows limits a batch well enough; looking at their sizes costs a little. (PL/pgSQL, so that it is planned once a worker.)
CREATE FUNCTION migrate._batch_bytes(source regclass) RETURNS bigint
LANGUAGE plpgsql AS $$
BEGIN
    RETURN (SELECT 16 * 1024 * 1024 WHERE EXISTS (
        SELECT FROM migrate._partition_tree(source) r
        WHERE pg_relation_size((SELECT nullif(c.reltoastrelid, 0) FROM pg_class c WHERE c.oid = r)) > 0));
END $$;

-- One batch: rows, skipped keys and checkpoint in one transaction.
CREATE FUNCTION migrate._run_copy(m migrate._migration, j migrate._job, OUT rows bigint, OUT wait_ms integer, OUT next_batch integer)
LANGUAGE plpgsql AS $$
DECLARE
    f migrate._flow;
    r migrate._range;
    done record;
    began timestamptz := clock_timestamp();
    busy_ms double precision;
    ordinary integer := coalesce(m.batch_rows, j.rows);
BEGIN
    rows := 0;
    wait_ms := 0;
    SELECT * INTO f FROM migrate._flow x WHERE x.id = j.flow;
    IF migrate._has_gap(f) THEN
        PERFORM migrate._fail_gap(m, f.name);
        RETURN;
    END IF;
    SELECT * INTO r FROM migrate._range x WHERE x.flow = j.flow AND x.ordinal = j.ordinal;
    IF f.by_place THEN
        SELECT * INTO done FROM migrate._apply_places(f.id, f.copied_file, coalesce(r.checkpoint, r.low), r.high, j.rows, migrate._batch_bytes(f.source));
        IF done.rewritten THEN
            wait_ms := migrate._begin_anew(m, f);
            RETURN;
        END IF;
    ELSE
        SELECT * INTO done FROM migrate._apply_range(f.id, coalesce(r.checkpoint, r.low), r.high, j.rows, migrate._batch_bytes(f.source));
    END IF;
    PERFORM migrate._requeue_keys(f.id, done.skipped);
    -- @point batch: skipped keys queued
    -- After a failure sizes grow back until they are ordinary again.
    UPDATE migrate._range x
    SET checkpoint = coalesce(done.reached, x.checkpoint), done = done.reached IS NULL, rows_done = x.rows_done + done.rows_done,
        row_limit = CASE WHEN x.row_limit * 2 < ordinary THEN x.row_limit * 2 END
    WHERE x.flow = r.flow AND x.ordinal = r.ordinal;
    -- @point batch: checkpoint written
    busy_ms := extract(epoch FROM clock_timestamp() - began) * 1000;
    rows := done.rows_done;
    wait_ms := migrate._sleep_ms(busy_ms, migrate._opt(m.id, 'throttle_ratio')::double precision, rows,
                                 coalesce(migrate._rate(m.id), 0)::double precision, migrate._opt_ms(m.id, 'sleep'));
    IF r.row_limit IS NULL AND done.reached IS NOT NULL THEN
        -- What a limit of bytes has cut says nothing of so many rows.
        next_batch := migrate._next_batch(least(j.rows, greatest(1, rows + coalesce(array_length(done.skipped, 1), 0)))::integer, busy_ms, migrate._opt_ms(m.id, 'batch_time'));
    END IF;
END $$;

-- keys: a list (2-D), or NULL
CREATE FUNCTION migrate._requeue_keys(flow integer, keys text[]) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    one text[];
BEGIN
    IF array_length(keys, 1) > 0 THEN
        FOREACH one SLICE 1 IN ARRAY keys LOOP
            INSERT INTO migrate._requeue (flow, key, at) VALUES (flow, one, clock_timestamp());
        END LOOP;
    END IF;
END $$;

-- Rows that a batch skipped because they were locked: a portion of the queue, the next one after each that was locked altogether.
-- Keys that still are stay where they are, for whoever locks them for hours keeps dead rows from being vacuumed away. Returns how
-- many are locked, if all of the portion are.
CREATE FUNCTION migrate._run_requeue(m migrate._migration, flow integer, tries integer) RETURNS bigint
LANGUAGE plpgsql AS $$
DECLARE
    places tid[];
    keys text[];
    locked text[];
    rest bigint;
    -- Few where rows are large: they are read and written all at once.
    portion CONSTANT bigint := CASE WHEN migrate._batch_bytes((SELECT f.source FROM migrate._flow f WHERE f.id = _run_requeue.flow)) IS NULL THEN 1000 ELSE 20 END;
    behind bigint := 0;
BEGIN
    IF tries > 1 THEN  -- (Counted only where somebody holds locks: each portion of a long queue would look at all of it.)
        behind := portion * ((tries - 1) % greatest((SELECT (count(*) + portion - 1) / portion FROM migrate._requeue q WHERE q.flow = _run_requeue.flow), 1));
    END IF;
    SELECT array_agg(q.ctid), array_agg(q.key) INTO places, keys
    FROM (SELECT x.ctid, x.key FROM migrate._requeue x WHERE x.flow = _run_requeue.flow ORDER BY x.at
          LIMIT portion OFFSET behind) q;
    BEGIN
        locked := migrate._apply_keys(flow, 'forward', keys);
    EXCEPTION WHEN OTHERS THEN
        IF migrate._blame(SQLSTATE) <> 'row' THEN
            RAISE;
        END IF;
        keys := (SELECT array_agg(q.key) FROM migrate._requeue q WHERE q.ctid = ANY (places[1:32]));
        places := places[1:32];
        locked := migrate._apply_each(flow, keys);
    END;
    -- @point requeue: keys applied
    DELETE FROM migrate._requeue q WHERE q.ctid = ANY (places)
        AND q.key NOT IN (SELECT migrate._key_row(locked, i) FROM generate_subscripts(locked, 1) i);
    -- @point requeue: keys taken off
    rest := coalesce(array_length(locked, 1), 0);
    PERFORM migrate._note(m.id, 0, CASE WHEN rest > 0 THEN format('waiting for %s locked rows%s',
        (SELECT count(*) FROM migrate._requeue q WHERE q.flow = _run_requeue.flow), coalesce(', locked by ' || migrate._lockers(flow, locked), '')) END);
    RETURN CASE WHEN rest = cardinality(places) THEN rest ELSE 0 END;
END $$;

-- Key by key, each in a subtransaction; those that fail go to _failure. Returns the keys that are locked.
CREATE FUNCTION migrate._apply_each(flow integer, keys text[]) RETURNS text[]
LANGUAGE plpgsql AS $$
DECLARE
    one text[];
    busy text[];
    locked text[];
    refused_by text;
BEGIN
    FOREACH one SLICE 1 IN ARRAY keys LOOP
        BEGIN
            busy := migrate._apply_keys(flow, 'forward', ARRAY[one]);
            locked := locked || busy;
        EXCEPTION WHEN OTHERS THEN
            IF migrate._blame(SQLSTATE) <> 'row' THEN
                RAISE;
            END IF;
            GET STACKED DIAGNOSTICS refused_by = CONSTRAINT_NAME;
            PERFORM migrate._record_failure(flow, one, SQLSTATE, refused_by);
            -- @point requeue: refused key recorded
        END;
    END LOOP;
    RETURN locked;
END $$;

CREATE FUNCTION migrate._record_failure(flow integer, key text[], sqlstate text, object text) RETURNS void
LANGUAGE sql AS $$
    INSERT INTO migrate._failure (flow, direction, key, sqlstate, object, origin, retry_at)
    VALUES (flow, 'forward', key, sqlstate, nullif(object, ''), 'backfill', clock_timestamp() + interval '1 s')
$$;

-- Who holds locks on some of these rows, for people; NULL when nobody is found (any more).
CREATE FUNCTION migrate._lockers(flow integer, keys text[]) RETURNS text
LANGUAGE plpgsql AS $$
DECLARE
    s regclass;
    condition text;
    one text[];
    holder xid;
    holders text[] := '{}';
BEGIN
    SELECT f.source, (SELECT string_agg(format('%I %s ($1::text[])[%s]::%s', k.origin_column, migrate._operator(a.atttypid, 3::smallint), k.ordinal, k.origin_type), ' AND ')
                      FROM migrate._key(f.id, 'forward') k JOIN pg_attribute a ON a.attrelid = f.source AND a.attname = k.origin_column)
    INTO s, condition FROM migrate._flow f WHERE f.id = flow;
    FOREACH one SLICE 1 IN ARRAY keys[1:5] LOOP
        FOR holder IN SELECT r[1]::xid FROM migrate._as(migrate._table_owner(s), format('SELECT xmax FROM %s WHERE %s', s, condition), one::text) r LOOP
            holders := holders || migrate._holders(holder);
        END LOOP;
    END LOOP;
    RETURN (SELECT string_agg(DISTINCT h, ', ' ORDER BY h) FROM unnest(holders) h);
END $$;

-- The transactions of a row's xmax, which is one of them or a multixact.
CREATE FUNCTION migrate._holders(holder xid) RETURNS text[]
LANGUAGE plpgsql AS $$
DECLARE
    holders text[] := ARRAY(SELECT migrate._holder(l.transactionid, l.pid) FROM pg_locks l WHERE l.locktype = 'transactionid' AND l.granted AND l.transactionid = holder);
BEGIN
    IF holders = '{}' AND holder <> '0'::xid THEN
        holders := ARRAY(SELECT migrate._holder(x.xid, l.pid) FROM pg_get_multixact_members(holder) x JOIN pg_locks l ON l.transactionid = x.xid
                         WHERE l.locktype = 'transactionid' AND l.granted);
    END IF;
    RETURN holders;
EXCEPTION WHEN OTHERS THEN  -- it was no multixact
    RETURN '{}';
END $$;

-- A prepared transaction has no PID.
CREATE FUNCTION migrate._holder(transaction xid, pid integer) RETURNS text
LANGUAGE sql STABLE AS $$
    SELECT coalesce('PID ' || pid, (SELECT format('prepared transaction %L', p.gid) FROM pg_prepared_xacts p WHERE p.transaction = _holder.transaction), 'a transaction')
$$;

-- Failures that are due, at most 32 keys of one flow and direction, each in a subtransaction. Success deletes the key's
-- records that were there before: one that came meanwhile is of a newer write. Returns how many keys are locked if all are.
CREATE FUNCTION migrate._run_retry(m migrate._migration, j migrate._job) RETURNS bigint
LANGUAGE plpgsql AS $$
DECLARE
    x record;
    state text;
    refused_by text;
    blame text;
BEGIN
    FOR x IN SELECT d.key, array_agg(d.id) AS ids, max(d.attempts) AS attempts FROM migrate._failure d
             WHERE d.flow = j.flow AND d.direction = j.direction
               AND d.key IN (SELECT e.key FROM migrate._failure e WHERE e.flow = j.flow AND e.direction = j.direction
                             AND e.retry_at <= clock_timestamp() ORDER BY e.retry_at LIMIT 32)
             GROUP BY d.key LOOP
        BEGIN
            IF migrate._apply_keys(j.flow, j.direction, ARRAY[x.key]) IS NULL THEN
                DELETE FROM migrate._failure d WHERE d.id = ANY (x.ids);
                UPDATE migrate._watch w SET mended = w.mended + 1 WHERE w.migration = m.id AND w.last_failure < ANY (x.ids);
                -- @point retry: records deleted
            ELSE
                -- The longer it has lasted, the less often: each look leaves a dead row, which whoever holds the lock keeps.
                UPDATE migrate._failure d SET retry_at = clock_timestamp() + least(interval '10 s', greatest(interval '200 ms', (clock_timestamp() - d.first_at) / 10))
                WHERE d.id = ANY (x.ids);
            END IF;
        EXCEPTION WHEN OTHERS THEN
            state := SQLSTATE;
            blame := migrate._blame(state);
            IF blame NOT IN ('row', 'lock') THEN
                RAISE;
            END IF;
            GET STACKED DIAGNOSTICS refused_by = CONSTRAINT_NAME;
            UPDATE migrate._failure d
            SET attempts = x.attempts + CASE blame WHEN 'row' THEN 1 ELSE 0 END,
                sqlstate = CASE blame WHEN 'row' THEN state ELSE d.sqlstate END,
                object = CASE blame WHEN 'row' THEN nullif(refused_by, '') ELSE d.object END,
                retry_at = clock_timestamp() + migrate._backoff_ms(x.attempts, 1000, 300000) * interval '1 ms'
            WHERE d.id = ANY (x.ids);
            IF blame = 'row' THEN
                PERFORM migrate._tell_refusal(m, j, state, refused_by);
            END IF;
            -- @point retry: refusal noted
        END;
    END LOOP;
    RETURN 0;
END $$;

-- An event for each reason why writes are not carried, once in a stay in this phase: thousands of rows may have one reason.
CREATE FUNCTION migrate._tell_refusal(m migrate._migration, j migrate._job, state text, object text) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    told text := (SELECT format('writes of %s cannot be carried to %s: SQLSTATE %s%s; their keys are in migrate.failures',
                                p.origin, p.dest, state, coalesce(', ' || nullif(object, ''), ''))
                  FROM migrate._mapping p WHERE p.flow = j.flow AND p.direction = j.direction);
BEGIN
    IF NOT EXISTS (SELECT FROM migrate._event e WHERE e.migration = m.id AND e.kind = 'refused' AND e.why = told AND e.at >= m.phase_since) THEN
        PERFORM migrate._event(m, NULL, 'refused', told);
    END IF;
END $$;

-- The ledger must be whole before the phase may change: every flow has ranges, all are done, nothing is queued.
CREATE FUNCTION migrate._end_backfill(m migrate._migration) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    f migrate._flow;
    failures bigint;
BEGIN
    IF migrate._is_restoring(m.id) THEN
        PERFORM migrate._raise('XX000', 'the backfill is not done: indexes or foreign keys of a target are set aside');
    END IF;
    FOR f IN SELECT * FROM migrate._flow x WHERE x.migration = m.id LOOP
        IF migrate._has_gap(f) THEN
            PERFORM migrate._fail_gap(m, f.name);
            RETURN;
        ELSIF NOT EXISTS (SELECT FROM migrate._range r WHERE r.flow = f.id)
              OR EXISTS (SELECT FROM migrate._range r WHERE r.flow = f.id AND NOT r.done)
              OR EXISTS (SELECT FROM migrate._requeue q WHERE q.flow = f.id) THEN
            PERFORM migrate._raise('XX000', format('the backfill of flow "%s" is not done', f.name));
        END IF;
    END LOOP;
    failures := (SELECT count(DISTINCT (x.flow, x.key)) FROM migrate._failure x JOIN migrate._flow w ON w.id = x.flow WHERE w.migration = m.id);
    -- (A signal that is over its limit stays so: validation goes by it from its first range on.)
    UPDATE migrate._migration x SET backfilled_at = clock_timestamp() WHERE x.id = m.id RETURNING * INTO m;
    UPDATE migrate._pace p SET note = NULL, rows_per_second = NULL WHERE p.migration = m.id;
    PERFORM migrate._invalidate(x.source) FROM migrate._flow x WHERE x.migration = m.id AND x.by_place;  -- updates of unmapped columns cost little again
    -- @point backfill: figures written
    PERFORM migrate._move(m, NULL, 'validating', format('%s rows copied, %s keys in failures',
        (SELECT sum(r.rows_done) FROM migrate._range r JOIN migrate._flow x ON x.id = r.flow WHERE x.migration = m.id), failures));
    -- @point backfill: phase moved
END $$;

-- One step of validation. A mismatch stops here: nothing is repaired unasked. Returns how long to wait before the next, in ms.
CREATE FUNCTION migrate._run_validate(m migrate._migration) RETURNS integer
LANGUAGE plpgsql AS $$
DECLARE
    verdict text;
    gap migrate._flow;
BEGIN
    SELECT * INTO gap FROM migrate._gaps(m.id) LIMIT 1;
    IF FOUND THEN
        PERFORM migrate._fail_gap(m, gap.name);
        RETURN 0;
    END IF;
    verdict := migrate._validate_step(m.id);
    IF verdict = 'equal' THEN
        m := migrate._move(m, NULL, 'shadowing', 'both sides are equal');
        -- @point validate: phase moved
        IF migrate._opt(m.id, 'shadow_rate')::numeric = 0 OR migrate._opt_ms(m.id, 'shadow_time') = 0 THEN
            PERFORM migrate._move(m, NULL, 'ready', 'no shadow reads: shadow_rate or shadow_time is 0');
        END IF;
    ELSIF verdict NOT IN ('more', 'wait') THEN
        PERFORM migrate._fail(m, verdict);
    END IF;
    RETURN CASE verdict WHEN 'wait' THEN 100 ELSE 0 END;
END $$;

-- Returns how long to wait before the next shadow reads, in ms.
CREATE FUNCTION migrate._run_shadow(m migrate._migration) RETURNS integer
LANGUAGE plpgsql AS $$
DECLARE
    verdict text := migrate._shadow_step(m.id);
BEGIN
    IF m.phase = 'shadowing' AND verdict = 'done' THEN
        PERFORM migrate._move(m, NULL, 'ready', 'shadow reads agree');
        -- @point shadow: phase moved
    ELSIF m.phase = 'shadowing' AND verdict <> 'more' THEN
        PERFORM migrate._fail(m, verdict);
    END IF;
    RETURN 100;
END $$;

-- What the worker does each turn (src/worker.cpp): _pick gives it a job, _run does the job in the same transaction (those
-- that compare both sides: in one of their own), and after an error _job_failed decides in a new transaction what becomes
-- of it. A turn locks the migration's row FOR KEY SHARE: verbs, which lock it FOR UPDATE, come before or after it, never within.

CREATE FUNCTION migrate._next_batch(rows integer, elapsed_ms double precision, target_ms double precision) RETURNS integer
LANGUAGE C STRICT IMMUTABLE AS 'MODULE_PATHNAME', 'migrate_next_batch';
CREATE FUNCTION migrate._halved_batch(rows integer) RETURNS integer
LANGUAGE C STRICT IMMUTABLE AS 'MODULE_PATHNAME', 'migrate_halved_batch';
CREATE FUNCTION migrate._sleep_ms(busy_ms double precision, ratio double precision, rows bigint, rate double precision, fixed_ms double precision)
RETURNS double precision LANGUAGE C STRICT IMMUTABLE AS 'MODULE_PATHNAME', 'migrate_sleep_ms';
CREATE FUNCTION migrate._backoff_ms(tries integer, first_ms double precision, limit_ms double precision) RETURNS double precision
LANGUAGE C STRICT IMMUTABLE AS 'MODULE_PATHNAME', 'migrate_backoff_ms';

CREATE TABLE migrate._pace (
    migration integer NOT NULL REFERENCES migrate._migration ON DELETE CASCADE,
    worker    integer NOT NULL,
    at        timestamptz NOT NULL DEFAULT clock_timestamp(),
    rows_per_second double precision,
    rows_estimated  bigint,
    note      text,
    last_error text,
    last_error_at timestamptz,
    PRIMARY KEY (migration, worker)
);
COMMENT ON TABLE migrate._pace IS 'what each worker tells of itself, for the views only: about one write a second';
COMMENT ON COLUMN migrate._pace.rows_estimated IS 'of worker 0: the source rows to copy, estimated from a sample when the backfill began';
COMMENT ON COLUMN migrate._pace.note IS 'what the worker waits for, though it is not throttled';

CREATE TYPE migrate._job AS (
    migration integer, worker integer, action text, phase text, flow integer, ordinal integer, direction text,
    rows integer, wait_ms integer, own_snapshot boolean, batch integer, activity text);
COMMENT ON TYPE migrate._job IS
    'action: exit, wait, ranges, copy, requeue, retry, advance, validate, shadow; batch: the batch size the worker is to take up';

-- ---------------------------------------------------------------------------------------------------------------------------
-- Choosing
-- ---------------------------------------------------------------------------------------------------------------------------

-- The next job of this worker, with all that is needed locked. turn: a counter; first: the worker's first turn; check: the
-- throttle's signals have not been looked at for a while.
CREATE FUNCTION migrate._pick(migration_id integer, worker integer, batch integer, turn integer, first boolean, look boolean) RETURNS migrate._job
LANGUAGE plpgsql AS $$
DECLARE
    m migrate._migration;
    j migrate._job;
BEGIN
    SELECT * INTO m FROM migrate._migration x WHERE x.id = migration_id;
    IF first AND FOUND AND migrate._is_under_way(m.phase) AND m.paused_since IS NULL AND migrate._is_clone(m) THEN
        PERFORM migrate._pause_clone(m);
        SELECT * INTO m FROM migrate._migration x WHERE x.id = migration_id;
    END IF;
    IF m.id IS NULL OR NOT migrate._is_under_way(m.phase) OR m.paused_since IS NOT NULL OR m.failed_since IS NOT NULL THEN
        j := migrate._wait_job(m, worker, NULL);
        RETURN j;
    END IF;
    IF m.batch_rows IS NULL OR batch = 0 THEN
        j.batch := coalesce(m.batch_rows, migrate._opt(m.id, 'batch_size')::integer);
    END IF;
    IF m.phase IN ('backfilling', 'validating') THEN
        m := migrate._throttle_state(m, worker, look);
    END IF;
    j := migrate._choose(m, worker, coalesce(j.batch, batch), turn, look, j.batch);
    -- Waiting needs no lock and leaves no trace in the WAL.
    IF j.action IN ('exit', 'wait') THEN
        RETURN j;
    END IF;
    PERFORM FROM migrate._migration x
    WHERE x.id = m.id AND x.phase = m.phase AND x.paused_since IS NULL AND x.failed_since IS NULL FOR KEY SHARE;
    IF NOT FOUND THEN
        RETURN migrate._wait_job(m, worker, 0);
    END IF;
    IF m.batch_rows IS NULL THEN
        UPDATE migrate._migration x SET batch_rows = j.batch WHERE x.id = m.id;
    END IF;
    IF worker = 0 AND m.phase NOT IN ('backfilling', 'validating') THEN
        PERFORM migrate._note_throttle(m, NULL);  -- a full disk may have been noted; undone when it still is
    END IF;
    RETURN j;
END $$;

-- A job that is none: wait so long, or exit (NULL).
CREATE FUNCTION migrate._wait_job(m migrate._migration, worker integer, wait_ms integer) RETURNS migrate._job
LANGUAGE sql IMMUTABLE AS $$
    SELECT ROW(m.id, worker, CASE WHEN wait_ms IS NULL THEN 'exit' ELSE 'wait' END, m.phase, NULL, NULL, NULL, NULL, wait_ms,
               false, NULL, NULL)::migrate._job
$$;

-- The leader looks at the signals and writes down what it sees; helpers go by what it wrote.
CREATE FUNCTION migrate._throttle_state(m migrate._migration, worker integer, look boolean) RETURNS migrate._migration
LANGUAGE plpgsql AS $$
BEGIN
    IF worker = 0 AND (look OR m.throttled_reason IS NOT NULL) THEN
        PERFORM migrate._note_throttle(m, migrate._throttle_reason(m.id));
        SELECT * INTO m FROM migrate._migration x WHERE x.id = m.id;
    END IF;
    RETURN m;
END $$;

-- Failures that are due come first, though only every other turn: whatever else there is must go on too.
CREATE FUNCTION migrate._choose(m migrate._migration, worker integer, batch integer, turn integer, look boolean, new_batch integer) RETURNS migrate._job
LANGUAGE plpgsql AS $$
DECLARE
    j migrate._job := ROW(m.id, worker, NULL, m.phase, NULL, NULL, NULL, NULL, 0, false, new_batch, NULL);
    due record;
BEGIN
    IF worker = 0 THEN
        SELECT x.flow, x.direction, x.retry_at INTO due FROM migrate._failure x JOIN migrate._flow f ON f.id = x.flow
        WHERE f.migration = m.id ORDER BY x.retry_at LIMIT 1;
        IF due.retry_at <= clock_timestamp() AND (turn % 2 = 0 OR m.phase IN ('ready', 'cut_over')) THEN
            j.action := 'retry';
            j.flow := due.flow;
            j.direction := due.direction;
            j.activity := format('%s: retrying failed writes', m.name);
            RETURN j;
        END IF;
    END IF;
    IF m.phase = 'backfilling' THEN
        RETURN migrate._choose_backfill(m, j, batch, look);
    ELSIF worker > 0 THEN
        RETURN migrate._wait_job(m, worker, NULL);
    ELSIF m.phase = 'dual_writing' THEN
        j.action := 'ranges';
        j.activity := format('%s: dividing the source into ranges', m.name);
    ELSIF m.phase = 'validating' AND m.throttled_reason IS NOT NULL THEN
        RETURN migrate._wait_job(m, worker, 500);
    ELSIF m.phase = 'validating' THEN
        j.action := 'validate';
        j.own_snapshot := true;
        j.activity := format('%s: validating', m.name);
    ELSIF m.phase = 'shadowing' OR migrate._opt(m.id, 'shadow_rate')::numeric > 0 THEN
        j.action := 'shadow';
        j.own_snapshot := true;
        j.activity := format('%s: shadow reads', m.name);
    ELSIF due.retry_at IS NOT NULL THEN
        -- Looked at each second, so that a verb's change is seen soon.
        RETURN migrate._wait_job(m, worker, ceil(least(1000, greatest(1, extract(epoch FROM due.retry_at - clock_timestamp()) * 1000)))::integer);
    ELSE
        RETURN migrate._wait_job(m, worker, NULL);
    END IF;
    RETURN j;
END $$;

-- A range to copy a batch of; when all are done, the re-queue; when that is empty, the next phase.
CREATE FUNCTION migrate._choose_backfill(m migrate._migration, j migrate._job, batch integer, look boolean) RETURNS migrate._job
LANGUAGE plpgsql AS $$
DECLARE
    r migrate._range;
    rate numeric;
BEGIN
    IF j.worker = 0 AND look THEN
        PERFORM migrate._launch_helpers(m);
    END IF;
    IF m.throttled_reason IS NULL THEN
        SELECT x.* INTO r FROM migrate._range x JOIN migrate._flow f ON f.id = x.flow
        WHERE f.migration = m.id AND NOT x.done ORDER BY x.flow, x.ordinal LIMIT 1 FOR UPDATE OF x SKIP LOCKED;
    END IF;
    IF r.flow IS NOT NULL THEN
        rate := migrate._rate(m.id);
        j.action := 'copy';
        j.flow := r.flow;
        j.ordinal := r.ordinal;
        j.rows := least(batch, r.row_limit, CASE WHEN rate IS NOT NULL THEN greatest(rate, 1) END);
        j.activity := format('%s: backfill batch of %s rows%s', m.name, j.rows,
                             coalesce(' at key ' || array_to_string(coalesce(r.checkpoint, r.low), ', '), ''));
    ELSIF EXISTS (SELECT FROM migrate._range x JOIN migrate._flow f ON f.id = x.flow WHERE f.migration = m.id AND NOT x.done) THEN
        -- other workers have them, or all hold still
        RETURN migrate._wait_job(m, j.worker, CASE WHEN m.throttled_reason IS NULL THEN 100 ELSE 500 END);
    ELSIF j.worker > 0 THEN
        RETURN migrate._wait_job(m, j.worker, NULL);
    ELSE
        SELECT q.flow INTO j.flow FROM migrate._requeue q JOIN migrate._flow f ON f.id = q.flow WHERE f.migration = m.id ORDER BY q.at LIMIT 1;
        j.action := CASE WHEN FOUND THEN 'requeue' ELSE 'advance' END;
        j.activity := format(CASE WHEN FOUND THEN '%s: copying rows that were locked' ELSE '%s: ending the backfill' END, m.name);
    END IF;
    RETURN j;
END $$;

-- Rows a second that one worker may write, by options and throttle(); NULL: no limit.
CREATE FUNCTION migrate._rate(m_id integer) RETURNS numeric
LANGUAGE plpgsql AS $$
DECLARE
    total numeric := least(migrate._opt(m_id, 'max_rows_per_second')::numeric,
        (SELECT o.value::numeric FROM migrate._option o
         WHERE o.migration = m_id AND o.name = 'throttle_rate' AND o.expires_at > clock_timestamp()));
BEGIN
    RETURN total / CASE WHEN total IS NOT NULL THEN greatest(1, (SELECT count(*) FROM migrate._worker w WHERE w.migration = m_id)) END;
END $$;

-- Copying workers beside the leader, as many as option "workers" says; fewer where no slots are free.
CREATE FUNCTION migrate._launch_helpers(m migrate._migration) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    wanted integer := migrate._opt(m.id, 'workers')::integer;
    helper integer;
BEGIN
    IF wanted < 2 THEN
        RETURN;
    END IF;
    FOR helper IN SELECT n FROM generate_series(1, wanted - 1) n
                  WHERE n NOT IN (SELECT w.worker FROM migrate._worker w WHERE w.migration = m.id) LOOP
        IF NOT migrate._launch_worker(m.id, helper) THEN
            PERFORM migrate._note(m.id, 0, format('no background worker slot is free for worker %s of %s', helper + 1, wanted));
            RETURN;
        END IF;
    END LOOP;
END $$;

-- ---------------------------------------------------------------------------------------------------------------------------
-- Doing
-- ---------------------------------------------------------------------------------------------------------------------------

-- Does the job. locked: it found rows that others hold; tries: how often that has been so in a row, this time included.
-- next_batch: the size the worker's next batch should have; NULL: as it was.
CREATE FUNCTION migrate._run(j migrate._job, tries integer, OUT rows bigint, OUT wait_ms integer, OUT next_batch integer, OUT locked boolean)
LANGUAGE plpgsql AS $$
DECLARE
    m migrate._migration;
    rest bigint;
BEGIN
    rows := 0;
    wait_ms := 0;
    next_batch := j.batch;
    locked := false;
    SELECT * INTO m FROM migrate._migration x
    WHERE x.id = j.migration AND x.phase = j.phase AND x.paused_since IS NULL AND x.failed_since IS NULL FOR KEY SHARE;
    IF NOT FOUND THEN
        RETURN;
    END IF;
    CASE j.action
    WHEN 'ranges' THEN
        PERFORM migrate._make_ranges(m);
    WHEN 'copy' THEN
        SELECT c.rows, c.wait_ms, coalesce(c.next_batch, j.batch) INTO rows, wait_ms, next_batch FROM migrate._run_copy(m, j) c;
    WHEN 'requeue' THEN
        rest := migrate._run_requeue(m, j.flow);
    WHEN 'retry' THEN
        rest := migrate._run_retry(m, j);
    WHEN 'advance' THEN
        PERFORM migrate._end_backfill(m);
    WHEN 'validate' THEN
        PERFORM migrate._run_validate(m);
    WHEN 'shadow' THEN
        wait_ms := migrate._run_shadow(m);
    END CASE;
    IF rest > 0 THEN
        locked := true;
        wait_ms := migrate._backoff_ms(tries, 50, 1000);
    END IF;
END $$;

-- The names of the columns of origin that make up a flow's key, and the condition "key > $1", $1 being a key as text[].
CREATE FUNCTION migrate._source_key(flow integer, OUT source regclass, OUT names text[], OUT above text)
LANGUAGE sql STABLE AS $$
    SELECT f.source, k.names, migrate._beyond(k.names, k.bounds, k.types, '>')
    FROM migrate._flow f,
         LATERAL (SELECT array_agg(quote_ident(x.origin_column) ORDER BY x.ordinal) AS names,
                         array_agg(format('($1::text[])[%s]::%s', x.ordinal, x.origin_type) ORDER BY x.ordinal) AS bounds,
                         array_agg(a.atttypid ORDER BY x.ordinal) AS types
                  FROM migrate._key(f.id, 'forward') x
                  JOIN pg_attribute a ON a.attrelid = f.source AND a.attname = x.origin_column) k
    WHERE f.id = flow
$$;

-- Divides each flow's key space into ranges, from a sample of the source, and sets the upper bound of the work: the highest
-- key there is now. Rows that come later are the business of the dual writes, which were on before this transaction.
CREATE FUNCTION migrate._make_ranges(m migrate._migration) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    f migrate._flow;
    workers integer := migrate._opt(m.id, 'workers')::integer;
    estimated bigint := 0;
BEGIN
    FOR f IN SELECT * FROM migrate._flow x WHERE x.migration = m.id ORDER BY x.id LOOP
        IF f.fingerprint IS DISTINCT FROM migrate._fingerprint(f.id) THEN
            PERFORM migrate._fail_gap(m, f.name);
            RETURN;
        END IF;
        estimated := estimated + migrate._make_flow_ranges(f.id, CASE workers WHEN 1 THEN 1 ELSE workers * 4 END);
    END LOOP;
    INSERT INTO migrate._pace (migration, worker, rows_estimated) VALUES (m.id, 0, estimated)
    ON CONFLICT (migration, worker) DO UPDATE SET rows_estimated = excluded.rows_estimated;
    PERFORM migrate._move(m, NULL, 'backfilling', format('%s, about %s rows',
        (SELECT count(*) || CASE count(*) WHEN 1 THEN ' range' ELSE ' ranges' END FROM migrate._range r JOIN migrate._flow x ON x.id = r.flow WHERE x.migration = m.id), estimated));
END $$;

-- Returns the estimated number of rows.
CREATE FUNCTION migrate._make_flow_ranges(flow integer, pieces integer) RETURNS bigint
LANGUAGE plpgsql AS $$
DECLARE
    k record;
    owner regrole;
    columns text;
    descending text;
    sample text;
    share numeric;
    highest text[];
    bound text[];
    low text[];
    rows bigint;
BEGIN
    SELECT * INTO k FROM migrate._source_key(flow);
    owner := migrate._table_owner(k.source);
    columns := array_to_string(k.names, ', ');
    descending := array_to_string(k.names, ' DESC, ') || ' DESC';
    SELECT r INTO highest FROM migrate._as(owner, format('SELECT %s FROM %s ORDER BY %s LIMIT 1', columns, k.source, descending)) AS r;
    DELETE FROM migrate._range r WHERE r.flow = _make_flow_ranges.flow;
    IF highest IS NULL THEN
        INSERT INTO migrate._range (flow, ordinal, done) VALUES (flow, 1, true);
        RETURN 0;
    END IF;
    share := migrate._sample_share(k.source);
    sample := format('%s TABLESAMPLE SYSTEM (%s) REPEATABLE (0)', k.source, share * 100);
    SELECT r[1]::numeric / share INTO rows FROM migrate._as(owner, format('SELECT count(*) FROM %s', sample)) AS r;
    FOR bound IN SELECT r FROM migrate._as(owner,
            format('SELECT %1$s FROM (SELECT DISTINCT ON (piece) piece, %1$s FROM (SELECT %1$s, ntile($1::integer) OVER (ORDER BY %1$s) AS piece FROM %2$s) s'
                   ' ORDER BY piece, %3$s) b WHERE piece < $1::integer ORDER BY piece', columns, sample, descending), pieces::text) AS r
            WHERE pieces > 1 LOOP
        CONTINUE WHEN bound = low OR bound = highest;
        INSERT INTO migrate._range (flow, ordinal, low, high)
        VALUES (flow, 1 + (SELECT count(*) FROM migrate._range r WHERE r.flow = _make_flow_ranges.flow), low, bound);
        low := bound;
    END LOOP;
    INSERT INTO migrate._range (flow, ordinal, low, high)
    VALUES (flow, 1 + (SELECT count(*) FROM migrate._range r WHERE r.flow = _make_flow_ranges.flow), low, highest);
    RETURN rows * migrate._filter_share(flow, columns, sample);
END $$;

-- The share of a table's pages that makes a sample of about 1000.
CREATE FUNCTION migrate._sample_share(relation regclass) RETURNS numeric
LANGUAGE sql VOLATILE AS $$
    SELECT least(1, 1000 * current_setting('block_size')::numeric / greatest(sum(pg_relation_size(p.relid)), 1))
    FROM (SELECT t.relid FROM pg_partition_tree(relation) t UNION SELECT relation) p
$$;

-- The share of the sampled rows that the mapping's filter lets through; 1 where that cannot be told.
CREATE FUNCTION migrate._filter_share(flow integer, columns text, sample text) RETURNS numeric
LANGUAGE plpgsql AS $$
DECLARE
    v record;
    share numeric;
BEGIN
    SELECT x.view, migrate._table_owner(x.dest) AS owner,
           (SELECT string_agg(quote_ident(k.view_column), ', ' ORDER BY k.ordinal) FROM migrate._key(x.flow, 'forward') k) AS key
    INTO v FROM migrate._mapping x WHERE x.flow = _filter_share.flow AND x.direction = 'forward' AND x.filtered;
    IF NOT FOUND THEN
        RETURN 1;
    END IF;
    SELECT r[1]::numeric / nullif(r[2]::numeric, 0) INTO share FROM migrate._as(v.owner,
        format('WITH s AS MATERIALIZED (SELECT %s FROM %s LIMIT 1000) SELECT (SELECT count(*) FROM %s WHERE (%s) IN (SELECT * FROM s)), (SELECT count(*) FROM s)',
               columns, sample, v.view, v.key)) AS r;
    RETURN coalesce(share, 1);
EXCEPTION WHEN OTHERS THEN
    RETURN 1;
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
    IF f.fingerprint IS DISTINCT FROM migrate._fingerprint(f.id) THEN
        PERFORM migrate._fail_gap(m, f.name);
        RETURN;
    END IF;
    SELECT * INTO r FROM migrate._range x WHERE x.flow = j.flow AND x.ordinal = j.ordinal;
    SELECT * INTO done FROM migrate._apply_range(f.id, coalesce(r.checkpoint, r.low), r.high, j.rows);
    PERFORM migrate._requeue_keys(f.id, done.skipped);
    -- After a failure sizes grow back until they are ordinary again.
    UPDATE migrate._range x
    SET checkpoint = coalesce(done.reached, x.checkpoint), done = done.reached IS NULL, rows_done = x.rows_done + done.rows_done,
        row_limit = CASE WHEN x.row_limit * 2 < ordinary THEN x.row_limit * 2 END
    WHERE x.flow = r.flow AND x.ordinal = r.ordinal;
    busy_ms := extract(epoch FROM clock_timestamp() - began) * 1000;
    rows := done.rows_done;
    wait_ms := migrate._sleep_ms(busy_ms, migrate._opt(m.id, 'throttle_ratio')::double precision, rows,
                                 coalesce(migrate._rate(m.id), 0)::double precision, migrate._opt_ms(m.id, 'sleep'));
    IF r.row_limit IS NULL AND done.reached IS NOT NULL THEN
        next_batch := migrate._next_batch(j.rows, busy_ms, migrate._opt_ms(m.id, 'batch_time'));
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

-- Rows that a batch skipped because they were locked. Returns how many still are.
CREATE FUNCTION migrate._run_requeue(m migrate._migration, flow integer) RETURNS bigint
LANGUAGE plpgsql AS $$
DECLARE
    places tid[];
    keys text[];
    locked text[];
    rest bigint;
BEGIN
    SELECT array_agg(q.ctid), array_agg(q.key) INTO places, keys
    FROM (SELECT x.ctid, x.key FROM migrate._requeue x WHERE x.flow = _run_requeue.flow ORDER BY x.at LIMIT 1000) q;
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
    DELETE FROM migrate._requeue q WHERE q.ctid = ANY (places);
    PERFORM migrate._requeue_keys(flow, locked);
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
        END;
    END LOOP;
    RETURN locked;
END $$;

CREATE FUNCTION migrate._record_failure(flow integer, key text[], sqlstate text, object text) RETURNS void
LANGUAGE sql AS $$
    INSERT INTO migrate._failure (flow, direction, key, sqlstate, object, origin, retry_at)
    VALUES (flow, 'forward', key, sqlstate, nullif(object, ''), 'backfill', clock_timestamp() + interval '1 s')
$$;

-- The PIDs that hold locks on some of these rows, for people; NULL when nobody is found (any more).
CREATE FUNCTION migrate._lockers(flow integer, keys text[]) RETURNS text
LANGUAGE plpgsql AS $$
DECLARE
    s regclass;
    condition text;
    one text[];
    holder xid;
    pids integer[] := '{}';
BEGIN
    SELECT f.source, (SELECT string_agg(format('%I %s ($1::text[])[%s]::%s', k.origin_column, migrate._operator(a.atttypid, 3::smallint), k.ordinal, k.origin_type), ' AND ')
                      FROM migrate._key(f.id, 'forward') k JOIN pg_attribute a ON a.attrelid = f.source AND a.attname = k.origin_column)
    INTO s, condition FROM migrate._flow f WHERE f.id = flow;
    FOREACH one SLICE 1 IN ARRAY keys[1:5] LOOP
        FOR holder IN SELECT r[1]::xid FROM migrate._as(migrate._table_owner(s), format('SELECT xmax FROM %s WHERE %s', s, condition), one::text) r LOOP
            pids := pids || migrate._holders(holder);
        END LOOP;
    END LOOP;
    RETURN (SELECT 'PID ' || string_agg(p::text, ', ' ORDER BY p) FROM (SELECT DISTINCT p FROM unnest(pids) p WHERE p IS NOT NULL) d);
END $$;

-- The PIDs of a row's xmax, which is a transaction or a multixact.
CREATE FUNCTION migrate._holders(holder xid) RETURNS integer[]
LANGUAGE plpgsql AS $$
DECLARE
    pids integer[] := ARRAY(SELECT l.pid FROM pg_locks l WHERE l.locktype = 'transactionid' AND l.granted AND l.transactionid = holder);
BEGIN
    IF pids = '{}' AND holder <> '0'::xid THEN
        pids := ARRAY(SELECT l.pid FROM pg_get_multixact_members(holder) x JOIN pg_locks l ON l.transactionid = x.xid
                      WHERE l.locktype = 'transactionid' AND l.granted);
    END IF;
    RETURN pids;
EXCEPTION WHEN OTHERS THEN  -- it was no multixact
    RETURN '{}';
END $$;

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
            ELSE
                UPDATE migrate._failure d SET retry_at = clock_timestamp() + interval '200 ms' WHERE d.id = ANY (x.ids);
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
        END;
    END LOOP;
    RETURN 0;
END $$;

-- The ledger must be whole before the phase may change: every flow has ranges, all are done, nothing is queued.
CREATE FUNCTION migrate._end_backfill(m migrate._migration) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    f migrate._flow;
    failures bigint;
BEGIN
    FOR f IN SELECT * FROM migrate._flow x WHERE x.migration = m.id LOOP
        IF f.fingerprint IS DISTINCT FROM migrate._fingerprint(f.id) THEN
            PERFORM migrate._fail_gap(m, f.name);
            RETURN;
        ELSIF NOT EXISTS (SELECT FROM migrate._range r WHERE r.flow = f.id)
              OR EXISTS (SELECT FROM migrate._range r WHERE r.flow = f.id AND NOT r.done)
              OR EXISTS (SELECT FROM migrate._requeue q WHERE q.flow = f.id) THEN
            PERFORM migrate._raise('XX000', format('the backfill of flow "%s" is not done', f.name));
        END IF;
    END LOOP;
    failures := (SELECT count(DISTINCT (x.flow, x.key)) FROM migrate._failure x JOIN migrate._flow w ON w.id = x.flow WHERE w.migration = m.id);
    UPDATE migrate._migration x SET backfilled_at = clock_timestamp(), throttled_since = NULL, throttled_reason = NULL WHERE x.id = m.id
    RETURNING * INTO m;
    UPDATE migrate._pace p SET note = NULL, rows_per_second = NULL WHERE p.migration = m.id;
    PERFORM migrate._move(m, NULL, 'validating', format('%s rows copied, %s keys in failures',
        (SELECT sum(r.rows_done) FROM migrate._range r JOIN migrate._flow x ON x.id = r.flow WHERE x.migration = m.id), failures));
END $$;

-- One step of validation. A mismatch stops here: nothing is repaired unasked.
CREATE FUNCTION migrate._run_validate(m migrate._migration) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    verdict text;
    gap migrate._flow;
BEGIN
    SELECT * INTO gap FROM migrate._gaps(m.id) LIMIT 1;
    IF FOUND THEN
        PERFORM migrate._fail_gap(m, gap.name);
        RETURN;
    END IF;
    verdict := migrate._validate_step(m.id);
    IF verdict = 'equal' THEN
        m := migrate._move(m, NULL, 'shadowing', 'both sides are equal');
        IF migrate._opt(m.id, 'shadow_rate')::numeric = 0 OR migrate._opt_ms(m.id, 'shadow_time') = 0 THEN
            PERFORM migrate._move(m, NULL, 'ready', 'no shadow reads: shadow_rate or shadow_time is 0');
        END IF;
    ELSIF verdict <> 'more' THEN
        PERFORM migrate._fail(m, verdict);
    END IF;
END $$;

-- Returns how long to wait before the next shadow reads, in ms.
CREATE FUNCTION migrate._run_shadow(m migrate._migration) RETURNS integer
LANGUAGE plpgsql AS $$
DECLARE
    verdict text := migrate._shadow_step(m.id);
BEGIN
    IF m.phase = 'shadowing' AND verdict = 'done' THEN
        PERFORM migrate._move(m, NULL, 'ready', 'shadow reads agree');
    ELSIF m.phase = 'shadowing' AND verdict <> 'more' THEN
        PERFORM migrate._fail(m, verdict);
    END IF;
    RETURN 100;
END $$;

-- ---------------------------------------------------------------------------------------------------------------------------
-- After an error
-- ---------------------------------------------------------------------------------------------------------------------------

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
        PERFORM migrate._note_error(m.id, worker, format('%s: %s', sqlstate, message));
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
        ELSE
            PERFORM migrate._fail(m, format('%s: %s (SQLSTATE %s)', coalesce(j.action, 'worker'), message, sqlstate));
        END IF;
    END CASE;
END $$;

-- A row refuses a batch: halves it, down to the row, which goes to _failure and is passed. Its key is read from the source
-- without the mapping, for it is the mapping that may fail.
CREATE FUNCTION migrate._isolate(m migrate._migration, j migrate._job, sqlstate text, object text) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    r migrate._range;
    k record;
    failed_key text[];
    failed_keys bigint;
    most bigint := migrate._opt(m.id, 'max_failures')::bigint;
BEGIN
    SELECT * INTO r FROM migrate._range x WHERE x.flow = j.flow AND x.ordinal = j.ordinal FOR UPDATE;
    IF j.rows > 1 THEN
        UPDATE migrate._range x SET row_limit = j.rows / 2 WHERE x.flow = r.flow AND x.ordinal = r.ordinal;
        RETURN;
    END IF;
    SELECT * INTO k FROM migrate._source_key(j.flow);
    SELECT x INTO failed_key FROM migrate._as(migrate._table_owner(k.source), format('SELECT %1$s FROM %2$s WHERE %3$s ORDER BY %1$s LIMIT 1',
        array_to_string(k.names, ', '), k.source, CASE WHEN coalesce(r.checkpoint, r.low) IS NULL THEN '$1::text[] IS NULL' ELSE k.above END),
        coalesce(r.checkpoint, r.low)::text) AS x;
    IF failed_key IS NULL THEN
        RETURN;  -- it is gone by now
    END IF;
    PERFORM migrate._record_failure(j.flow, failed_key, sqlstate, object);
    UPDATE migrate._range x SET checkpoint = failed_key WHERE x.flow = r.flow AND x.ordinal = r.ordinal;
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
    WHERE x.id = m.id AND x.failed_since IS NULL;
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

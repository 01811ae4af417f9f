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
    'action: exit, wait, ranges, copy, requeue, retry, index, add_key, validate_key, advance, validate, shadow, watch, rollback; batch: the batch size the worker is to take up';

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
    IF m.id IS NULL OR NOT (migrate._is_under_way(m.phase) OR m.phase = 'cancelled' AND migrate._is_restoring(m.id)) OR m.paused_since IS NOT NULL OR m.failed_since IS NOT NULL THEN
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
    -- Waiting needs no lock and leaves no trace in the WAL; a rollback locks as the verb does.
    IF j.action IN ('exit', 'wait', 'rollback') THEN
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
    IF first AND worker = 0 THEN
        PERFORM migrate._note(m.id, 0, NULL);  -- it may have been noted that there is no slot for this worker
    END IF;
    IF j.action IN ('index', 'validate_key') THEN
        PERFORM migrate._begin_restore(j);
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

-- Failures that are due come first, though only every other turn: whatever else there is must go on too. Those that were due when the
-- phase began have their turn before it, once: a validation that did not wait for them would call rows missing that nothing refuses any more.
CREATE FUNCTION migrate._choose(m migrate._migration, worker integer, batch integer, turn integer, look boolean, new_batch integer) RETURNS migrate._job
LANGUAGE plpgsql AS $$
DECLARE
    j migrate._job := ROW(m.id, worker, NULL, m.phase, NULL, NULL, NULL, NULL, 0, false, new_batch, NULL);
    due record;
BEGIN
    IF worker = 0 AND m.phase = 'cut_over' THEN
        j.action := migrate._watch_is_due(m);
        j.activity := format('%s: watching after the cutover', m.name);
        IF j.action IN ('watch', 'rollback') THEN
            RETURN j;
        END IF;
    END IF;
    IF worker = 0 THEN
        SELECT x.flow, x.direction, x.retry_at INTO due FROM migrate._failure x JOIN migrate._flow f ON f.id = x.flow
        WHERE f.migration = m.id ORDER BY x.retry_at LIMIT 1;
        IF due.retry_at <= clock_timestamp() AND (turn % 2 = 0 OR m.phase IN ('ready', 'cut_over') OR m.phase = 'validating' AND due.retry_at <= m.phase_since) THEN
            j.action := 'retry';
            j.flow := due.flow;
            j.direction := due.direction;
            j.activity := format('%s: retrying failed writes', m.name);
            RETURN j;
        END IF;
    END IF;
    IF worker = 0 AND m.phase NOT IN ('dual_writing', 'backfilling') AND migrate._is_restoring(m.id) THEN
        RETURN migrate._choose_restore(m, j);
    ELSIF m.phase = 'backfilling' THEN
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
    ELSIF due.retry_at IS NOT NULL OR j.action = 'wait' THEN
        -- Looked at each second, so that a verb's change is seen soon.
        RETURN migrate._wait_job(m, worker, ceil(least(CASE j.action WHEN 'wait' THEN 500 ELSE 1000 END, greatest(1, coalesce(extract(epoch FROM due.retry_at - clock_timestamp()) * 1000, 1000))))::integer);
    ELSE
        RETURN migrate._wait_job(m, worker, NULL);
    END IF;
    RETURN j;
END $$;

-- A range to copy a batch of; when all are done, the re-queue; when that is empty, what was set aside; at last the next phase.
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
                             coalesce(' at ' || array_to_string(coalesce(r.checkpoint, r.low), ', '), ''));
    ELSIF EXISTS (SELECT FROM migrate._range x JOIN migrate._flow f ON f.id = x.flow WHERE f.migration = m.id AND NOT x.done) THEN
        -- other workers have them, or all hold still
        RETURN migrate._wait_job(m, j.worker, CASE WHEN m.throttled_reason IS NULL THEN 100 ELSE 500 END);
    ELSIF j.worker > 0 THEN
        RETURN migrate._wait_job(m, j.worker, NULL);
    ELSE
        SELECT f.id INTO j.flow FROM migrate._flow f, LATERAL (SELECT x.at FROM migrate._requeue x WHERE x.flow = f.id ORDER BY x.at LIMIT 1) q
        WHERE f.migration = m.id ORDER BY q.at LIMIT 1;
        IF NOT FOUND AND migrate._is_restoring(m.id) THEN
            RETURN migrate._choose_restore(m, j);
        END IF;
        j.action := CASE WHEN j.flow IS NOT NULL THEN 'requeue' ELSE 'advance' END;
        j.activity := format(CASE WHEN j.flow IS NOT NULL THEN '%s: copying rows that were locked' ELSE '%s: ending the backfill' END, m.name);
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
    IF j.action = 'rollback' THEN
        PERFORM migrate._roll_back_by_itself(j.migration);
        RETURN;
    END IF;
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
        rest := migrate._run_requeue(m, j.flow, tries);
    WHEN 'retry' THEN
        rest := migrate._run_retry(m, j);
    WHEN 'add_key' THEN
        rest := migrate._run_add_key(m, j);
    WHEN 'advance' THEN
        PERFORM migrate._end_backfill(m);
    WHEN 'validate' THEN
        wait_ms := migrate._run_validate(m);
    WHEN 'shadow' THEN
        wait_ms := migrate._run_shadow(m);
    WHEN 'watch' THEN
        PERFORM migrate._run_watch(m);
    END CASE;
    IF rest > 0 THEN
        locked := true;
        wait_ms := migrate._backoff_ms(tries, 50, 1000);
    END IF;
END $$;

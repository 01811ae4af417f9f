-- Run control: pause, resume, cancel, retry, throttle, unthrottle; and how a migration's worker is started.

-- False when no worker slot is free. Worker 0 leads, others only copy. See src/worker.cpp.
CREATE FUNCTION migrate._launch_worker(migration integer, worker integer) RETURNS boolean
LANGUAGE C STRICT AS 'MODULE_PATHNAME', 'migrate_launch_worker';

-- The workers there are, by the lock that each holds while it lives (src/worker.cpp).
CREATE VIEW migrate._worker AS
    SELECT l.objid::integer AS migration, l.objsubid::integer AS worker, l.pid
    FROM pg_catalog.pg_locks l
    WHERE l.locktype = 'object' AND l.granted AND l.mode = 'ExclusiveLock'
      AND l.database = (SELECT d.oid FROM pg_catalog.pg_database d WHERE d.datname = current_database())
      AND l.classid = 'migrate._migration'::regclass;

-- Phases in which there is, or may be, something for a worker to do.
CREATE FUNCTION migrate._is_under_way(phase text) RETURNS boolean
LANGUAGE sql IMMUTABLE AS $$
    SELECT phase IN ('dual_writing', 'backfilling', 'validating', 'shadowing', 'ready', 'cut_over')
$$;

-- Whether indexes or foreign keys that start set aside are still to be built. After cancel a worker does that, too.
CREATE FUNCTION migrate._is_restoring(m_id integer) RETURNS boolean
LANGUAGE sql STABLE AS $$
    SELECT EXISTS (SELECT FROM migrate._deferred d JOIN migrate._flow f ON f.id = d.flow WHERE f.migration = m_id AND d.state NOT IN ('restored', 'given_up'))
$$;

-- Whether a worker would find something to do. A worker that does not, ends.
CREATE FUNCTION migrate._has_work(m migrate._migration) RETURNS boolean
LANGUAGE sql STABLE AS $$
    SELECT migrate._is_under_way(m.phase) AND m.paused_since IS NULL AND m.failed_since IS NULL
       AND (m.phase NOT IN ('ready', 'cut_over')
            OR migrate._opt(m.id, 'shadow_rate')::numeric > 0
            OR m.phase = 'cut_over' AND EXISTS (SELECT FROM migrate._watch w WHERE w.migration = m.id)
            OR EXISTS (SELECT FROM migrate._failure x JOIN migrate._flow f ON f.id = x.flow WHERE f.migration = m.id)
            OR migrate._is_restoring(m.id))
        OR m.phase = 'cancelled' AND migrate._is_restoring(m.id)
$$;

-- The migrations that were started in another system or database than this one, which is a copy of it, and what is to be
-- done about that. A view, so that whoever looks sees it before any worker has come to write it down.
CREATE VIEW migrate._clone AS
    SELECT m.id AS migration, format('this is a clone: the migration was started on system %s, database %s; SELECT migrate.resume(%L); makes it run here',
                                     m.system_identifier, m.database_oid, m.name) AS why
    FROM migrate._migration m
    WHERE (m.system_identifier <> (SELECT c.system_identifier FROM pg_catalog.pg_control_system() c)
           OR m.database_oid <> (SELECT d.oid FROM pg_catalog.pg_database d WHERE d.datname = current_database()))
      AND m.phase IN ('dual_writing', 'backfilling', 'validating', 'shadowing', 'ready', 'cut_over');

CREATE FUNCTION migrate._is_clone(m migrate._migration) RETURNS boolean
LANGUAGE sql VOLATILE AS $$ SELECT EXISTS (SELECT FROM migrate._clone c WHERE c.migration = m.id) $$;

-- A clone must not go on by itself with what its original is doing.
CREATE FUNCTION migrate._pause_clone(m migrate._migration) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    why text := (SELECT c.why FROM migrate._clone c WHERE c.migration = m.id);
BEGIN
    UPDATE migrate._migration x SET paused_since = clock_timestamp(), paused_reason = why, throttled_since = NULL, throttled_reason = NULL
    WHERE x.id = m.id AND x.paused_since IS NULL AND why IS NOT NULL;
    IF FOUND THEN
        PERFORM migrate._event(m, NULL, 'paused', why);
    END IF;
END $$;

-- Starts the worker of a migration that has work: the tail of start, resume and retry. Registering is not undone by a
-- rollback; the worker waits for the end of this transaction, finds nothing to do and ends.
CREATE FUNCTION migrate._launch(m migrate._migration) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
    SELECT * INTO m FROM migrate._migration x WHERE x.id = m.id;
    IF NOT migrate._has_work(m) OR migrate._launch_worker(m.id, 0) THEN
        RETURN;
    END IF;
    IF EXISTS (SELECT FROM migrate._worker w WHERE w.migration = m.id AND w.worker = 0) THEN
        RETURN;
    END IF;
    PERFORM migrate._raise('53400', format('no background worker slot is free for migration "%s"', m.name),
        format('max_worker_processes is %s, and all of them are in use.', current_setting('max_worker_processes')),
        'Raise max_worker_processes (which takes a restart of the server), or call this again when another worker has ended.');
END $$;

-- What the launcher does in each database. Returns a migration that got no slot, for which the caller's own may do.
CREATE FUNCTION migrate._launch_unfinished() RETURNS integer
LANGUAGE plpgsql AS $$
DECLARE
    m migrate._migration;
    left_over integer;
BEGIN
    FOR m IN SELECT x.* FROM migrate._migration x JOIN migrate._clone c ON c.migration = x.id LOOP
        PERFORM migrate._pause_clone(m);
    END LOOP;
    FOR m IN SELECT * FROM migrate._migration x
             WHERE migrate._has_work(x) AND x.id NOT IN (SELECT w.migration FROM migrate._worker w WHERE w.worker = 0) ORDER BY x.id LOOP
        IF NOT migrate._launch_worker(m.id, 0) THEN
            left_over := coalesce(left_over, m.id);
            PERFORM migrate._note(m.id, 0, format('no background worker slot is free: all %s of max_worker_processes are in use', current_setting('max_worker_processes')));
        END IF;
    END LOOP;
    RETURN left_over;
END $$;

-- The state as verbs answer it: 'backfilling', 'backfilling, paused'.
CREATE FUNCTION migrate._state(m_id integer) RETURNS text
LANGUAGE sql VOLATILE AS $$
    SELECT m.phase || CASE WHEN m.paused_since IS NULL AND NOT migrate._is_clone(m) THEN '' ELSE ', paused' END
                   || CASE WHEN m.failed_since IS NULL THEN '' ELSE ', failed' END
    FROM migrate._migration m WHERE m.id = m_id
$$;

CREATE FUNCTION migrate._require_under_way(m migrate._migration, verb text) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
    IF NOT migrate._is_under_way(m.phase) THEN
        PERFORM migrate._raise('55000', format('migration "%s" cannot be %s in phase %s', m.name, verb, m.phase),
            'It can be in the phases dual_writing, backfilling, validating, shadowing, ready and cut_over.',
            CASE WHEN m.phase = 'planned' THEN format('SELECT migrate.start(%L); starts it.', m.name) ELSE '' END);
    END IF;
END $$;

-- Stops the worker after its current batch; dual writes go on, so that nothing is missed meanwhile.
CREATE FUNCTION migrate._pause(caller regrole, name text) RETURNS text
LANGUAGE plpgsql AS $$
DECLARE
    m migrate._migration := migrate._lock(caller, name);
    before text := migrate._state(m.id);
BEGIN
    PERFORM migrate._require_under_way(m, 'paused');
    IF m.paused_since IS NOT NULL THEN
        RAISE NOTICE 'migration "%" is paused already', m.name USING DETAIL = m.paused_reason;
        RETURN before || ' -> ' || before;
    END IF;
    PERFORM migrate._interrupt_restore(m);
    UPDATE migrate._migration x SET paused_since = clock_timestamp(), paused_reason = format('paused by %s', caller),
           throttled_since = NULL, throttled_reason = NULL
    WHERE x.id = m.id;
    PERFORM migrate._event(m, caller, 'paused', format('paused by %s', caller));
    -- @point pause: flag set
    RETURN before || ' -> ' || migrate._state(m.id);
END $$;

-- Goes on where it was. In a clone this is the explicit decision that the clone is to run the migration by itself.
CREATE FUNCTION migrate._resume(caller regrole, name text) RETURNS text
LANGUAGE plpgsql AS $$
DECLARE
    m migrate._migration := migrate._lock(caller, name);
    before text := migrate._state(m.id);
BEGIN
    PERFORM migrate._require_under_way(m, 'resumed');
    IF m.paused_since IS NULL AND NOT migrate._is_clone(m) THEN
        RAISE NOTICE 'migration "%" is not paused', m.name USING HINT =
            CASE WHEN m.failed_since IS NULL THEN format('SELECT * FROM migrate.progress WHERE migration = %L; shows what it does.', m.name)
                 ELSE format('It has failed: %s. SELECT migrate.retry(%L); tries again.', m.failed_reason, m.name) END;
        PERFORM migrate._launch(m);
        RETURN before || ' -> ' || before;
    END IF;
    IF migrate._is_clone(m) THEN
        PERFORM migrate._adopt_clone(m, caller);
    END IF;
    UPDATE migrate._migration x SET paused_since = NULL, paused_reason = NULL WHERE x.id = m.id;
    PERFORM migrate._event(m, caller, 'resumed', m.paused_reason);
    -- @point resume: flag cleared
    PERFORM migrate._launch(m);
    -- @point resume: worker launched
    RETURN before || ' -> ' || migrate._state(m.id);
END $$;

CREATE FUNCTION migrate._adopt_clone(m migrate._migration, caller regrole) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    problem record;
BEGIN
    SELECT p.message, p.hint INTO problem FROM migrate._preflight(caller, m.name) p WHERE p.severity = 'error' LIMIT 1;
    IF FOUND THEN
        PERFORM migrate._raise('55000', format('the clone of migration "%s" cannot be resumed', m.name), problem.message, coalesce(problem.hint, ''));
    END IF;
    PERFORM migrate._belongs_here(m.id);
    UPDATE migrate._flow f SET copied_file = NULL WHERE f.migration = m.id;  -- a restored table has its rows at other places
    INSERT INTO migrate._pace (migration, worker, rows_estimated)
    SELECT m.id, 0, sum(e.row_count) FROM migrate._flow f, LATERAL migrate._estimate(f) e WHERE f.migration = m.id ON CONFLICT DO NOTHING;
    PERFORM migrate._event(m, caller, 'adopted', format('clone of system %s, database %s', m.system_identifier, m.database_oid));
    -- A restored dump has other triggers than the original, and no failures: arm them and look at every row again.
    IF EXISTS (SELECT FROM migrate._gaps(m.id)) THEN
        PERFORM migrate._rearm(m, caller);
    END IF;
END $$;

CREATE FUNCTION migrate._belongs_here(m_id integer) RETURNS void
LANGUAGE sql AS $$
    UPDATE migrate._migration x
    SET system_identifier = (SELECT c.system_identifier FROM pg_control_system() c),
        database_oid = (SELECT d.oid FROM pg_database d WHERE d.datname = current_database())
    WHERE x.id = m_id
$$;

-- Only while nothing is switched: the source is left as it was, the target with its indexes and foreign keys, and with the rows copied
-- so far, unless they would stand in the application's way (77_leave.sql).
CREATE FUNCTION migrate._cancel(caller regrole, name text) RETURNS text
LANGUAGE plpgsql AS $$
DECLARE
    m migrate._migration := migrate._lock(caller, name);
    before text := migrate._state(m.id);
    emptied regclass[];
BEGIN
    IF m.phase = 'cancelled' THEN
        RAISE NOTICE 'migration "%" is cancelled already', m.name;
        RETURN before || ' -> ' || before;
    ELSIF m.phase IN ('cut_over', 'finalized') THEN
        PERFORM migrate._raise('55000', format('migration "%s" cannot be cancelled in phase %s', m.name, m.phase),
            'The target serves; cancel is for before the cutover.',
            CASE WHEN m.phase = 'cut_over' THEN format('SELECT migrate.rollback(%L); goes back to the source first.', m.name)
                 ELSE format('SELECT migrate.drop(%L); forgets the migration.', m.name) END);
    END IF;
    PERFORM migrate._interrupt_restore(m);
    emptied := migrate._leave(m, caller);
    -- @point cancel: triggers dropped
    UPDATE migrate._migration x SET paused_since = NULL, paused_reason = NULL, failed_since = NULL, failed_reason = NULL,
           throttled_since = NULL, throttled_reason = NULL, both_directions = false
    WHERE x.id = m.id RETURNING * INTO m;
    DELETE FROM migrate._requeue q USING migrate._flow f WHERE f.id = q.flow AND f.migration = m.id;
    PERFORM migrate._tell_not_carried_back(m);
    DELETE FROM migrate._failure x USING migrate._flow f WHERE f.id = x.flow AND f.migration = m.id;
    PERFORM migrate._move(m, caller, 'cancelled', format('cancelled by %s', caller));
    -- @point cancel: phase moved
    RAISE NOTICE 'migration "%" is cancelled: no dual write is left on its tables', m.name
        USING HINT = concat_ws(' ', 'Rows copied so far stay in ' || (SELECT string_agg(DISTINCT f.target::text, ', ') FROM migrate._flow f JOIN pg_class c ON c.oid = f.target
                                                                      WHERE f.migration = m.id AND m.started_at IS NOT NULL AND f.target <> ALL (emptied)) || '.',
                               (SELECT string_agg(t::text, ', ') FROM unnest(emptied) t) || ' is empty again, as it was before start: its foreign keys would have let its rows refuse deletes.',
                               format('SELECT migrate.drop(%L); forgets the migration.', m.name));
    PERFORM migrate._leave_rest(m);
    RETURN before || ' -> ' || migrate._state(m.id);
END $$;

-- Writes that one side has and the other refused, a line for each flow that has some. direction: 'forward', of a source; 'reverse', of a target.
CREATE FUNCTION migrate._refused_writes(m_id integer, direction text) RETURNS TABLE (line text, keys text, states text)
LANGUAGE sql STABLE AS $$
    SELECT format('what was written to %s rows of %s is not in %s', cardinality(x.keys), CASE direction WHEN 'forward' THEN f.source ELSE f.target END,
                  CASE direction WHEN 'forward' THEN f.target ELSE f.source END),
           format('Their keys are %s.', array_to_string(x.keys[1:20], ', ') || CASE WHEN cardinality(x.keys) > 20 THEN ', …' ELSE '' END),
           format('It was refused with SQLSTATE %s.', x.states)
    FROM migrate._flow f, LATERAL (SELECT array_agg(DISTINCT r.key::text) AS keys, string_agg(DISTINCT r.sqlstate, ', ') AS states
                                   FROM migrate._failure r WHERE r.flow = f.id AND r.direction = _refused_writes.direction) x
    WHERE f.migration = m_id AND x.keys IS NOT NULL ORDER BY f.id
$$;

-- After a rollback some client may still have written to a target what its source refused: the record of that goes, but not silently.
CREATE FUNCTION migrate._tell_not_carried_back(m migrate._migration) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    w record;
BEGIN
    FOR w IN SELECT * FROM migrate._refused_writes(m.id, 'reverse') LOOP
        RAISE WARNING '%', w.line USING DETAIL = w.keys;
    END LOOP;
END $$;

-- Clears the failed flag, makes all failures due and closes gaps in the dual writes.
CREATE FUNCTION migrate._retry(caller regrole, name text) RETURNS text
LANGUAGE plpgsql AS $$
DECLARE
    m migrate._migration := migrate._lock(caller, name);
    before text := migrate._state(m.id);
    due bigint;
    gap boolean;
BEGIN
    PERFORM migrate._require_under_way(m, 'retried');
    PERFORM migrate._require_whole(m);
    -- (Before this phase began: so they are tried before a validation judges the rows.)
    UPDATE migrate._failure x SET retry_at = m.phase_since FROM migrate._flow f WHERE f.id = x.flow AND f.migration = m.id;
    GET DIAGNOSTICS due = ROW_COUNT;
    BEGIN  -- undone, so that no lock of what is read here stays
        gap := EXISTS (SELECT FROM migrate._gaps(m.id));
        PERFORM migrate._undo();
    EXCEPTION WHEN SQLSTATE 'MGUND' THEN NULL;
    END;
    IF m.failed_since IS NULL AND due = 0 AND NOT gap THEN
        RAISE NOTICE 'migration "%" has nothing to retry', m.name;
        PERFORM migrate._launch(m);
        RETURN before || ' -> ' || before;
    END IF;
    UPDATE migrate._migration x SET failed_since = NULL, failed_reason = NULL WHERE x.id = m.id RETURNING * INTO m;
    UPDATE migrate._pace p SET last_error = NULL, last_error_at = NULL WHERE p.migration = m.id;  -- what is shown from now on is new
    PERFORM migrate._event(m, caller, 'retried', format('%s failures are due again%s', due, CASE WHEN gap THEN ', dual writes armed again' ELSE '' END));
    IF gap THEN
        PERFORM migrate._rearm(m, caller);
        -- @point rearm: triggers created
    END IF;
    -- @point retry verb: flag cleared
    PERFORM migrate._launch(m);
    RETURN before || ' -> ' || migrate._state(m.id);
END $$;

-- The throttle in force, for people.
CREATE FUNCTION migrate._throttle_text(m_id integer) RETURNS text
LANGUAGE sql VOLATILE AS $$
    SELECT coalesce(string_agg(CASE o.name WHEN 'throttle_ratio' THEN format('ratio %s', o.value) ELSE format('%s rows/s', o.value) END
                               || coalesce(format(' until %s', date_trunc('second', o.expires_at)), ''), ', ' ORDER BY o.name), 'none')
    FROM migrate._option o
    WHERE o.migration = m_id AND o.name IN ('throttle_ratio', 'throttle_rate')
      AND (o.expires_at IS NULL OR o.expires_at > clock_timestamp())
$$;

-- Slows the worker for a time: by a share of the time that it sleeps, or by a rate.
CREATE FUNCTION migrate._throttle(caller regrole, name text, ratio double precision, rows_per_second bigint, for_time interval) RETURNS text
LANGUAGE plpgsql AS $$
DECLARE
    m migrate._migration := migrate._lock(caller, name);
    before text := migrate._throttle_text(m.id);
BEGIN
    IF (ratio IS NULL) = (rows_per_second IS NULL) THEN
        PERFORM migrate._raise('22023', 'a throttle is either a ratio or a rate',
            format('ratio is %s, rows_per_second is %s; exactly one must be given.', coalesce(ratio::text, 'NULL'), coalesce(rows_per_second::text, 'NULL')),
            format('SELECT migrate.throttle(%L, ratio => 0.5);', m.name));
    ELSIF ratio IS NOT NULL AND NOT (ratio >= 0 AND ratio <= 0.99) THEN
        PERFORM migrate._raise('22023', format('invalid throttle ratio: %s', ratio),
            'It must be from 0 (no throttle) to 0.99 (the worker sleeps 99 % of the time).', format('SELECT migrate.pause(%L); stops the worker.', m.name));
    ELSIF rows_per_second < 1 THEN
        PERFORM migrate._raise('22023', format('invalid throttle rate: %s rows per second', rows_per_second), 'It must be at least 1.',
            format('SELECT migrate.pause(%L); stops the worker.', m.name));
    ELSIF for_time IS NULL OR for_time <= interval '0' THEN
        PERFORM migrate._raise('22023', format('invalid time for a throttle: %s', coalesce(for_time::text, 'NULL')), 'It must be more than 0.',
            format('SELECT migrate.set(%L, ''max_rows_per_second'', ''5000''); sets a lasting limit.', m.name));
    ELSIF m.phase IN ('finalized', 'cancelled') THEN
        PERFORM migrate._raise('55000', format('migration "%s" is %s', m.name, m.phase), 'There is nothing to throttle any more.');
    END IF;
    DELETE FROM migrate._option o WHERE o.migration = m.id AND o.name IN ('throttle_ratio', 'throttle_rate');
    INSERT INTO migrate._option (migration, name, value, expires_at)
    VALUES (m.id, CASE WHEN ratio IS NULL THEN 'throttle_rate' ELSE 'throttle_ratio' END,
            coalesce(ratio::text, rows_per_second::text), clock_timestamp() + for_time);
    PERFORM migrate._event(m, caller, 'throttle', migrate._throttle_text(m.id));
    RETURN format('throttle %s -> %s', before, migrate._throttle_text(m.id));
END $$;

CREATE FUNCTION migrate._unthrottle(caller regrole, name text) RETURNS text
LANGUAGE plpgsql AS $$
DECLARE
    m migrate._migration := migrate._lock(caller, name);
    before text := migrate._throttle_text(m.id);
BEGIN
    DELETE FROM migrate._option o WHERE o.migration = m.id AND o.name IN ('throttle_ratio', 'throttle_rate');
    IF before = 'none' THEN
        RAISE NOTICE 'migration "%" is not throttled', m.name
            USING HINT = 'Lasting limits are options: max_rows_per_second, sleep, max_replica_lag, window and more.';
    ELSE
        PERFORM migrate._event(m, caller, 'throttle', 'none');
    END IF;
    RETURN format('throttle %s -> none', before);
END $$;

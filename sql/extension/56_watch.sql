-- The watch after cutover: for watch_time the worker looks once a second at what tells that the application fares worse than before,
-- in short transactions. A limit that is passed is an event; with on_limit = rollback the worker then does what a person would: it rolls back,
-- by the verb's own code with all its gates, and where it is refused, says so and tries again. What has been passed stays passed.

-- Counters of this database: all transactions, and those that were aborted.
CREATE FUNCTION migrate._transactions(OUT transactions bigint, OUT aborts bigint)
LANGUAGE sql VOLATILE AS $$
    SELECT pg_stat_clear_snapshot();
    SELECT d.xact_commit + d.xact_rollback, d.xact_rollback FROM pg_stat_database d WHERE d.datname = current_database()
$$;

-- The view of the extension of that name, and no other; NULL where there is none.
CREATE FUNCTION migrate._statements_view() RETURNS regclass
LANGUAGE sql STABLE AS $$
    SELECT c.oid::regclass FROM pg_extension e JOIN pg_depend d ON d.refclassid = 'pg_extension'::regclass AND d.refobjid = e.oid AND d.deptype = 'e'
    JOIN pg_class c ON d.classid = 'pg_class'::regclass AND c.oid = d.objid AND c.relkind = 'v' WHERE e.extname = 'pg_stat_statements' AND c.relname = 'pg_stat_statements'
$$;

CREATE FUNCTION migrate._require_statements() RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    statements regclass := migrate._statements_view();
BEGIN
    IF statements IS NULL THEN
        PERFORM migrate._raise('55000', 'pg_stat_statements is not installed in this database', 'Only it knows how long statements take.',
            'CREATE EXTENSION pg_stat_statements; as a superuser, with shared_preload_libraries = ''pg_stat_statements'' in force.');
    END IF;
    EXECUTE format('SELECT FROM %s LIMIT 1', migrate._relation_name(statements));
END $$;

-- Calls, and the time they took, of the statements that name a table or view of the migration. NULL where nobody counts them.
CREATE FUNCTION migrate._statements(m_id integer, OUT calls bigint, OUT ms double precision)
LANGUAGE plpgsql AS $$
DECLARE
    statements regclass := migrate._statements_view();
    names text := (SELECT string_agg(DISTINCT regexp_replace(c.relname, '([^[:alnum:]_])', '\\\1', 'g'), '|') FROM pg_class c WHERE c.oid IN (
        SELECT f.source FROM migrate._flow f WHERE f.migration = m_id UNION SELECT f.target FROM migrate._flow f WHERE f.migration = m_id UNION
        SELECT v.view FROM migrate._view v WHERE v.migration = m_id));
BEGIN
    IF statements IS NOT NULL THEN
        EXECUTE format('SELECT sum(s.calls)::bigint, sum(s.total_exec_time) FROM %s s WHERE s.dbid = (SELECT d.oid FROM pg_database d WHERE d.datname = current_database())
                        AND s.query ~* $1 AND s.query ~* $2 AND s.query !~* $3', migrate._relation_name(statements))
        INTO calls, ms USING format('(^|[^[:alnum:]_])(%s)($|[^[:alnum:]_])', names), '^\s*(select|insert|update|delete|merge|with)\M', '\mmigrate\.';
        calls := coalesce(calls, 0);
        ms := coalesce(ms, 0);
    END IF;
EXCEPTION WHEN object_not_in_prerequisite_state THEN  -- it is not preloaded any more
    NULL;
END $$;

-- Begins a watch, or ends it, as phase and option say. Under the migration's lock; in a switch, under all of its locks, so what takes
-- time is left to the worker's first look.
CREATE FUNCTION migrate._change_watch(m migrate._migration, by_whom regrole) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    lasts bigint := migrate._opt_ms(m.id, 'watch_time');
BEGIN
    IF m.phase <> 'cut_over' OR lasts = 0 THEN
        DELETE FROM migrate._watch w WHERE w.migration = m.id;
        PERFORM migrate._event(m, by_whom, 'watch', 'ended') WHERE FOUND AND m.phase = 'cut_over';
    ELSIF NOT EXISTS (SELECT FROM migrate._watch w WHERE w.migration = m.id) THEN
        INSERT INTO migrate._watch (migration, caller, last_failure) VALUES (m.id, by_whom, coalesce((SELECT max(x.id) FROM migrate._failure x), 0));
        PERFORM migrate._event(m, by_whom, 'watch', format('begins, for %s; on_limit is %s', migrate._opt(m.id, 'watch_time'), migrate._opt(m.id, 'on_limit')));
    END IF;
    PERFORM migrate._launch_watch(m) WHERE m.phase = 'cut_over' AND m.cut_over_at IS NOT NULL;
END $$;

-- A cutover is not undone for want of a worker, but it is said.
CREATE FUNCTION migrate._launch_watch(m migrate._migration) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
    IF NOT EXISTS (SELECT FROM migrate._watch w WHERE w.migration = m.id) OR migrate._launch_worker(m.id, 0)
       OR EXISTS (SELECT FROM migrate._worker w WHERE w.migration = m.id AND w.worker = 0) THEN
        RETURN;
    END IF;
    RAISE WARNING 'no background worker slot is free: migration "%" is not watched yet', m.name
        USING HINT = format('SELECT migrate.resume(%L); when one is. max_worker_processes is %s.', m.name, current_setting('max_worker_processes'));
END $$;

-- What the worker has to do for the watch: watch, rollback, or nothing at the moment (wait); NULL: there is none.
CREATE FUNCTION migrate._watch_is_due(m migrate._migration) RETURNS text
LANGUAGE sql VOLATILE AS $$
    SELECT CASE WHEN w.why IS NOT NULL AND w.retry_at <= clock_timestamp() AND migrate._opt(m.id, 'on_limit') = 'rollback' THEN 'rollback'
                WHEN coalesce(w.looked_at < clock_timestamp() - interval '1 s', true) THEN 'watch'
                ELSE 'wait' END
    FROM migrate._watch w WHERE w.migration = m.id
$$;

-- The counters as they are now, compared with those of the first look. Those that have shrunk were reset (by a crash, say), and are compared
-- with themselves from then on. The time of statements is looked at every five seconds, for that is dear, and from 100 statements on.
CREATE FUNCTION migrate._compare_counters(w migrate._watch) RETURNS migrate._watch
LANGUAGE plpgsql AS $$
DECLARE
    t record;
    s record;
BEGIN
    SELECT * INTO t FROM migrate._transactions();
    IF w.transactions IS NULL OR t.transactions < w.transactions OR t.aborts < w.aborts THEN
        w.transactions := t.transactions;
        w.aborts := t.aborts;
    END IF;
    IF migrate._opt(w.migration, 'watch_latency') IS NULL OR w.latency_at > clock_timestamp() - interval '5 s' THEN
        RETURN w;
    END IF;
    SELECT * INTO s FROM migrate._statements(w.migration);
    IF w.latency_at IS NULL AND s.calls >= 100 THEN
        w.mean_before := s.ms / s.calls;
    END IF;
    IF w.latency_at IS NULL OR s.calls < w.calls OR s.ms < w.ms THEN
        w.calls := s.calls;
        w.ms := s.ms;
    ELSIF s.calls >= w.calls + 100 AND w.mean_before IS NOT NULL THEN
        w.latency := round(((s.ms - w.ms) / (s.calls - w.calls) / greatest(w.mean_before, 0.001))::numeric, 2);
    END IF;
    w.latency_at := clock_timestamp();
    RETURN w;
END $$;

-- Each limit with its value, as far as there is one. A share of fewer than 100 transactions says nothing.
CREATE FUNCTION migrate._watch_limits(m migrate._migration, w migrate._watch) RETURNS TABLE (name text, value numeric, shown text)
LANGUAGE sql VOLATILE AS $$
    SELECT 'watch_failures', c.n, format('%s keys', c.n)
    FROM (SELECT w.mended + count(DISTINCT (x.flow, x.direction, x.key))::numeric AS n
          FROM migrate._failure x JOIN migrate._flow f ON f.id = x.flow WHERE f.migration = m.id AND x.id > w.last_failure) c
    UNION ALL
    SELECT 'watch_abort_rate', r.rate, format('%s of %s transactions of the database', r.rate, t.transactions - w.transactions)
    FROM migrate._transactions() t, LATERAL (SELECT trim_scale(round((t.aborts - w.aborts)::numeric / nullif(t.transactions - w.transactions, 0), 4)) AS rate) r
    WHERE t.transactions >= w.transactions + 100
    UNION ALL
    SELECT 'watch_latency', w.latency, format('statements take %s times as long as before', w.latency) WHERE w.latency IS NOT NULL
    UNION ALL
    SELECT 'max_shadow_mismatch_rate', max(migrate._shadow_rate(s)), format('%s of shadow reads', max(migrate._shadow_rate(s)))
    FROM migrate._shadow s JOIN migrate._flow f ON f.id = s.flow WHERE f.migration = m.id AND s.direction = 'reverse' AND s.since >= w.since AND s.reads > 0 HAVING count(*) > 0
$$;

-- One look.
CREATE FUNCTION migrate._run_watch(m migrate._migration) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    w migrate._watch;
    l record;
    ends timestamptz;
BEGIN
    SELECT * INTO w FROM migrate._watch x WHERE x.migration = m.id;
    IF w.looked_at < clock_timestamp() - interval '10 s' THEN
        PERFORM migrate._event(m, NULL, 'watch', format('goes on: nobody has looked since %s', date_trunc('second', w.looked_at)));
    END IF;
    w := migrate._compare_counters(w);
    ends := w.since + migrate._opt_ms(m.id, 'watch_time') * interval '1 ms';
    w.shows := format('watched until %s', date_trunc('second', ends));
    FOR l IN SELECT x.*, migrate._opt(m.id, x.name) AS most FROM migrate._watch_limits(m, w) x WHERE migrate._opt(m.id, x.name) IS NOT NULL LOOP
        w.shows := format('%s; %s: %s (limit %s)', w.shows, l.name, l.shown, l.most);
        IF l.value > l.most::numeric AND l.name <> ALL (w.passed) THEN
            w.passed := w.passed || l.name;
            w.why := coalesce(w.why, format('%s > %s (%s)', l.shown, l.most, l.name));
            PERFORM migrate._event(m, NULL, 'limit', format('%s > %s (%s)%s', l.shown, l.most, l.name,
                CASE migrate._opt(m.id, 'on_limit') WHEN 'rollback' THEN '; rolling back' ELSE '' END));
        END IF;
    END LOOP;
    w.looked_at := clock_timestamp();
    IF w.looked_at < ends THEN
        UPDATE migrate._watch x SET looked_at = w.looked_at, transactions = w.transactions, aborts = w.aborts, mean_before = w.mean_before, calls = w.calls, ms = w.ms, latency = w.latency,
            latency_at = w.latency_at, passed = w.passed, why = w.why, shows = concat_ws('; ', w.shows, 'rollback is refused: ' || w.refused) WHERE x.migration = m.id;
    ELSE
        DELETE FROM migrate._watch x WHERE x.migration = m.id;
        PERFORM migrate._event(m, NULL, 'watch', concat_ws('; ', 'ended: ' || coalesce('a limit was passed, ' || w.why, 'no limit was passed'),
            'the rollback was refused to the last: ' || w.refused));
    END IF;
    -- @point watch: looked
END $$;

-- The verb's own rollback, as the role that cut over, in a transaction that holds nothing else.
CREATE FUNCTION migrate._roll_back_by_itself(m_id integer) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    m migrate._migration := (SELECT x FROM migrate._migration x WHERE x.id = m_id);
    w migrate._watch := (SELECT x FROM migrate._watch x WHERE x.migration = m_id);
    caller regrole := coalesce((SELECT r.oid::regrole FROM pg_roles r WHERE r.oid = w.caller), m.owner);
    message text;
    detail text;
BEGIN
    m := migrate._lock(caller, m.name);
    IF migrate._watch_is_due(m) IS DISTINCT FROM 'rollback' OR m.paused_since IS NOT NULL THEN
        RETURN;  -- while the lock was waited for, somebody has rolled back, paused or ended the watch
    END IF;
    PERFORM migrate._switch(caller, ARRAY[m.name], 'source', false, '{}');
    PERFORM migrate._event(m, NULL, 'watch', format('rolled back by itself: %s', w.why));
    -- @point watch: rolled back
EXCEPTION WHEN OTHERS THEN
    GET STACKED DIAGNOSTICS message = MESSAGE_TEXT, detail = PG_EXCEPTION_DETAIL;
    UPDATE migrate._watch x SET tries = x.tries + 1, retry_at = clock_timestamp() + migrate._backoff_ms(x.tries + 1, 1000, 30000) * interval '1 ms', refused = message,
        looked_at = clock_timestamp() WHERE x.migration = m_id;
    PERFORM migrate._event(m, NULL, 'rollback refused', concat_ws(E'\n', message, nullif(detail, ''))) WHERE message IS DISTINCT FROM w.refused;
    -- @point watch: refused
END $$;

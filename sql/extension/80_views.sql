-- What users see. Each view shows the migrations whose owner the current user is a member of, and no others.

-- Everything that progress and wait() show, of all migrations, for the extension's own use. No function of ours is called
-- here: whoever reads a view needs the right to call its functions, and nobody has that for internal ones.
CREATE VIEW migrate._progress AS
    SELECT m.id, m.name, m.owner, m.phase,
           CASE WHEN m.phase IN ('planned', 'finalized') OR m.phase = 'cancelled' AND d.deferred = 0 THEN 'idle'
                WHEN m.failed_since IS NOT NULL OR l.lost IS NOT NULL THEN 'failed'
                WHEN m.paused_since IS NOT NULL OR c.why IS NOT NULL THEN 'paused'
                WHEN m.throttled_since IS NOT NULL THEN 'throttled'
                WHEN m.phase IN ('ready', 'cut_over') AND x.failures = 0 AND NOT t.shadows AND d.deferred = 0 AND v.migration IS NULL THEN 'idle'
                WHEN w.pids IS NULL OR p.note IS NOT NULL AND NOT d.building THEN 'waiting'
                ELSE 'running' END AS state,
           CASE WHEN m.phase IN ('planned', 'dual_writing') THEN 0.0
                WHEN m.phase = 'backfilling' THEN CASE WHEN p.rows_estimated IS NOT NULL THEN least(99.9, round(100.0 * r.rows_copied / greatest(p.rows_estimated, 1), 1)) END
                WHEN m.phase <> 'cancelled' THEN 100.0 END AS percent,
           coalesce(r.rows_copied, 0) AS rows_copied, p.rows_estimated,
           CASE WHEN m.phase = 'backfilling' AND w.pids IS NOT NULL THEN round(p.rows_per_second) END AS rows_per_second,
           CASE WHEN m.phase = 'backfilling' AND w.pids IS NOT NULL AND r.rows_copied * 100 >= p.rows_estimated AND p.rows_per_second >= 1
                THEN make_interval(secs => round(greatest(p.rows_estimated - r.rows_copied, 0) / p.rows_per_second)::double precision) END AS eta,
           m.batch_rows AS batch_size, r.checkpoint, m.throttled_since,
           coalesce(m.throttled_reason, t.by_verb) AS throttled_by,
           coalesce(p.note || coalesce(b.detail, ''), v.shows) AS note, x.failures, q.requeued, w.pids AS workers,
           coalesce(l.lost, CASE WHEN m.failed_since IS NOT NULL THEN m.failed_reason ELSE p.last_error END) AS last_error,
           coalesce(m.paused_reason, c.why) AS paused_reason, coalesce(l.lost, m.failed_reason) AS failed_reason
    FROM migrate._migration m
    LEFT JOIN migrate._clone c ON c.migration = m.id
    LEFT JOIN migrate._watch v ON v.migration = m.id AND m.phase = 'cut_over'
    LEFT JOIN (SELECT migration, array_agg(pid ORDER BY worker) AS pids FROM migrate._worker GROUP BY migration) w ON w.migration = m.id
    -- What a worker would stumble over, had it work: in phase ready there is none.
    LEFT JOIN LATERAL (SELECT string_agg(format('flow "%s" has lost its %s', f.name, t.part), '; ' ORDER BY f.id, t.part)
                              || format('; SELECT * FROM migrate.preflight(%L) WHERE severity = ''error''; tells what ends it', m.name) AS lost
                       FROM migrate._flow f CROSS JOIN LATERAL (VALUES ('source', f.source), ('target', f.target)) AS t(part, relation)
                       WHERE f.migration = m.id AND NOT EXISTS (SELECT FROM pg_catalog.pg_class k WHERE k.oid = t.relation)) l ON m.phase NOT IN ('planned', 'cancelled', 'finalized')
    LEFT JOIN LATERAL (SELECT max(a.rows_estimated) AS rows_estimated,
                              sum(a.rows_per_second) FILTER (WHERE a.at > clock_timestamp() - interval '10 s')::numeric AS rows_per_second,
                              max(a.note) AS note, (array_agg(a.last_error ORDER BY a.last_error_at DESC NULLS LAST))[1] AS last_error
                       FROM migrate._pace a WHERE a.migration = m.id) p ON true
    LEFT JOIN LATERAL (SELECT sum(b.rows_done)::bigint AS rows_copied,
                              string_agg(f.name || ': ' || array_to_string(b.checkpoint, ', '), '; ' ORDER BY f.id, b.ordinal)
                                  FILTER (WHERE NOT b.done AND b.checkpoint IS NOT NULL) AS checkpoint
                       FROM migrate._range b JOIN migrate._flow f ON f.id = b.flow WHERE f.migration = m.id) r ON true
    LEFT JOIN LATERAL (SELECT count(DISTINCT (e.flow, e.direction, e.key)) AS failures
                       FROM migrate._failure e JOIN migrate._flow f ON f.id = e.flow WHERE f.migration = m.id) x ON true
    LEFT JOIN LATERAL (SELECT count(*) AS requeued
                       FROM migrate._requeue e JOIN migrate._flow f ON f.id = e.flow WHERE f.migration = m.id) q ON true
    LEFT JOIN LATERAL (SELECT count(*) AS deferred, coalesce(bool_or(e.state IN ('building', 'validating')), false) AS building
                       FROM migrate._deferred e JOIN migrate._flow f ON f.id = e.flow
                       WHERE f.migration = m.id AND e.state NOT IN ('restored', 'given_up')) d ON true
    -- (Of another role's backend, only who may read all statistics sees more than the PID.)
    LEFT JOIN LATERAL (SELECT max(concat(': ' || i.phase, ' ' || round(100.0 * i.blocks_done / nullif(i.blocks_total, 0)) || ' %', ', for PID ' || nullif(i.current_locker_pid, 0))) AS detail
                       FROM pg_catalog.pg_stat_progress_create_index i WHERE i.pid = ANY (w.pids)) b ON true
    LEFT JOIN LATERAL (SELECT coalesce(bool_or(o.name = 'shadow_rate' AND o.value::numeric > 0), false) AS shadows,
                              string_agg(CASE o.name WHEN 'throttle_ratio' THEN 'ratio ' || o.value ELSE o.value || ' rows/s' END || ' by throttle()'
                                         || coalesce(' until ' || to_char(o.expires_at, 'YYYY-MM-DD HH24:MI:SSOF'), ''), ', ')
                                  FILTER (WHERE o.name IN ('throttle_ratio', 'throttle_rate')) AS by_verb
                       FROM migrate._option o
                       WHERE o.migration = m.id AND o.name IN ('shadow_rate', 'throttle_ratio', 'throttle_rate')
                         AND (o.expires_at IS NULL OR o.expires_at > clock_timestamp())) t ON true;

CREATE VIEW migrate.migration WITH (security_barrier) AS
    SELECT m.name, m.owner, m.phase, m.phase_since, m.paused_since,
           coalesce(m.paused_reason, (SELECT c.why FROM migrate._clone c WHERE c.migration = m.id)) AS paused_reason, m.failed_since, m.failed_reason,
           CASE WHEN m.phase IN ('cut_over', 'finalized') THEN 'target' ELSE 'source' END AS serves,
           m.started_at, m.backfilled_at, m.cut_over_at,
           (SELECT array_agg(f.name ORDER BY f.id) FROM migrate._flow f WHERE f.migration = m.id) AS flows
    FROM migrate._migration m WHERE pg_has_role(m.owner, 'MEMBER');
COMMENT ON VIEW migrate.migration IS 'your migrations: phase, flags with reason and time, and which side serves';

CREATE VIEW migrate.progress WITH (security_barrier) AS
    SELECT p.name AS migration, p.phase, p.state, p.percent, p.rows_copied, p.rows_estimated, p.rows_per_second, p.eta, p.batch_size,
           p.checkpoint, p.throttled_since, coalesce(CASE WHEN p.state = 'paused' THEN p.paused_reason
                                      -- (What the last one noted is over. Why the launcher has started none is not.)
                                      WHEN p.state IN ('waiting', 'throttled') AND p.workers IS NULL AND NOT pg_is_in_recovery() AND p.note ~ '^no background worker slot is free: ' IS NOT TRUE
                                      THEN format('no worker is running: SELECT migrate.resume(%L); starts one', p.name) END, p.throttled_by, p.note) AS throttled_by, p.failures, p.requeued, p.workers, p.last_error
    FROM migrate._progress p WHERE pg_has_role(p.owner, 'MEMBER');
COMMENT ON VIEW migrate.progress IS
    'what the workers of your migrations do now, and what they wait for, with value and limit; eta is NULL before 1 percent';

CREATE VIEW migrate.events WITH (security_barrier) AS
    SELECT e.id, e.at, e.name AS migration, e.by, e.kind, e.from_phase, e.to_phase, e.why
    FROM migrate._event e WHERE pg_has_role(e.owner, 'MEMBER');
COMMENT ON VIEW migrate.events IS 'append-only: who, when, from, to, why; each is sent on channel migrate as JSON too';

CREATE VIEW migrate.failures WITH (security_barrier) AS
    SELECT m.name AS migration, f.name AS flow, x.direction, x.key, x.sqlstate, x.object, x.origin, x.attempts, x.first_at, x.retry_at
    FROM migrate._failure x JOIN migrate._flow f ON f.id = x.flow JOIN migrate._migration m ON m.id = f.migration
    WHERE pg_has_role(m.owner, 'MEMBER');
COMMENT ON VIEW migrate.failures IS 'keys that could not be copied or dual-written, with SQLSTATE and what refused them; never the row';

-- A bar of `width` cells, filled to an eighth of a cell, or to a whole one where only ASCII can be shown. (The characters are
-- made when they are needed: a database of another encoding has none of them.)
CREATE FUNCTION migrate._bar(percent numeric, width integer, utf8 boolean) RETURNS text
LANGUAGE plpgsql IMMUTABLE AS $$
DECLARE
    eighths integer := floor(least(greatest(percent, 0), 100) / 100 * width * 8);
BEGIN
    IF utf8 THEN
        RETURN rpad(repeat(chr(9608), eighths / 8) || CASE WHEN eighths % 8 > 0 THEN chr(9616 - eighths % 8) ELSE '' END, width);
    END IF;
    RETURN '[' || rpad(repeat('#', eighths / 8), width, '.') || ']';
END $$;

-- 3m03s, 2h05m, 41s
CREATE FUNCTION migrate._short_time(span interval) RETURNS text
LANGUAGE sql IMMUTABLE AS $$
    SELECT CASE WHEN s >= 3600 THEN format('%sh%sm', s / 3600, lpad((s / 60 % 60)::text, 2, '0'))
                WHEN s >= 60 THEN format('%sm%ss', s / 60, lpad((s % 60)::text, 2, '0')) ELSE s || 's' END
    FROM (SELECT round(extract(epoch FROM span))::integer AS s) t
$$;

-- One line that is easy to read: backfill  46 % <bar>  7,550,855 / 16,370,180  48,210 rows/s  ETA 3m03s
CREATE FUNCTION migrate._progress_line(p migrate._progress, utf8 boolean) RETURNS text
LANGUAGE sql STABLE AS $$
    SELECT rtrim(CASE WHEN p.phase = 'backfilling'
               THEN format('backfill %s %% %s %s / %s', coalesce(lpad(floor(p.percent)::text, 3), '  ?'), migrate._bar(p.percent, 20, utf8),
                           to_char(p.rows_copied, 'FM999,999,999,999,990'), to_char(p.rows_estimated, 'FM999,999,999,999,990'))
                    || coalesce('  ' || to_char(p.rows_per_second, 'FM999,999,999,990') || ' rows/s', '')
                    || coalesce('  ETA ' || migrate._short_time(p.eta), '')
               ELSE rpad(p.phase, 12) END
           || CASE p.state WHEN 'paused' THEN '  ' || p.paused_reason WHEN 'failed' THEN '  failed: ' || p.failed_reason ELSE '' END
           || CASE WHEN p.failures > 0 THEN format('  %s in migrate.failures', p.failures) ELSE '' END
           || coalesce('  throttled: ' || p.throttled_by, '') || coalesce('  ' || p.note, ''))
$$;

-- What wait() looks at five times a second.
CREATE FUNCTION migrate._wait_look(caller regrole, name text, to_phase text, utf8 boolean, OUT reached boolean, OUT never boolean,
    OUT worker_missing boolean, OUT state text, OUT line text, OUT reason text, OUT hint text, OUT phase text, OUT changed_by xid)
LANGUAGE plpgsql AS $$
DECLARE
    p migrate._progress;
    held_up boolean;
    phases text[] := '{planned,dual_writing,backfilling,validating,shadowing,ready,cut_over,finalized}';
BEGIN
    IF to_phase <> ALL (phases) THEN
        PERFORM migrate._raise('22023', format('there is no phase "%s" to wait for', to_phase),
            format('The phases are %s.', array_to_string(phases, ', ')), format('CALL migrate.wait(%L);', name));
    END IF;
    IF clock_timestamp() - now() > interval '1 s' THEN
        PERFORM pg_stat_clear_snapshot();  -- within a transaction block, what a worker does would be as it was at the first look
    END IF;
    SELECT * INTO p FROM migrate._progress x WHERE x.name = _wait_look.name;
    IF NOT FOUND OR NOT pg_has_role(caller, p.owner, 'MEMBER') THEN
        PERFORM migrate._raise('42704', format('migration "%s" does not exist', name), '', 'SELECT name, phase FROM migrate.migration; lists yours.');
    END IF;
    SELECT m.xmin INTO changed_by FROM migrate._migration m WHERE m.id = p.id;
    phase := p.phase;
    reached := coalesce(array_position(phases, p.phase) >= array_position(phases, to_phase), false);
    -- A wait that ends its transaction between two looks is in nobody's way for so long.
    held_up := p.note ~ (' for PID ' || pg_backend_pid() || '$') AND clock_timestamp() - now() > interval '3 s';
    never := NOT reached AND (p.phase IN ('planned', 'cancelled') OR p.state = 'failed' OR coalesce(held_up, false));
    reason := CASE WHEN p.phase = 'planned' THEN 'It is not started.' WHEN p.phase = 'cancelled' THEN 'It is cancelled.'
                   WHEN p.state = 'failed' THEN format('It failed in phase %s: %s', p.phase, p.failed_reason)
                   WHEN held_up THEN 'An index is being built, which waits until this transaction ends.' ELSE '' END;
    hint := CASE WHEN p.phase = 'planned' THEN format('SELECT migrate.start(%L);', p.name)
                 WHEN p.state = 'failed' THEN format('SELECT migrate.retry(%L); goes on after the cause is gone.', p.name)
                 WHEN p.state = 'paused' THEN format('SELECT migrate.resume(%L); goes on.', p.name)
                 WHEN held_up THEN format('CALL migrate.wait(%L); outside of a transaction block.', p.name) END;
    worker_missing := NOT reached AND NOT never AND p.workers IS NULL AND p.state IN ('waiting', 'throttled');
    state := concat_ws(' ', p.phase, p.state, CASE WHEN p.throttled_since IS NOT NULL THEN 'throttled' END);
    line := migrate._progress_line(p, utf8);
END $$;

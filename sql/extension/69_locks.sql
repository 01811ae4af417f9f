-- Locks that the application hardly notices: short attempts, all of an attempt's locks within lock_timeout, nothing held
-- between attempts, and whoever is in the way is named. Used by the switch, the views and finalize.

CREATE FUNCTION migrate._old_snapshots(timeout_ms bigint) RETURNS integer[]
LANGUAGE C STRICT AS 'MODULE_PATHNAME', 'migrate_old_snapshots';

CREATE FUNCTION migrate._lock_relations(relations regclass[], modes text[], budget_ms integer, more boolean DEFAULT false) RETURNS double precision
LANGUAGE C STRICT AS 'MODULE_PATHNAME', 'migrate_lock_relations';

-- Ends a block that is to be undone: BEGIN …; PERFORM migrate._undo(); EXCEPTION WHEN SQLSTATE 'MGUND' THEN NULL; END. What it read
-- into variables stays, its locks do not. A verb reads first and then waits, and while it waits, even a lock for reading would
-- hold up the application's TRUNCATE or LOCK TABLE, and everybody behind that.
CREATE FUNCTION migrate._undo() RETURNS void
LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION USING ERRCODE = 'MGUND'; END $$;

CREATE FUNCTION migrate._seconds(duration interval) RETURNS text
LANGUAGE sql IMMUTABLE AS $$ SELECT round(greatest(extract(epoch FROM duration), 0)::numeric, 1) || ' s' $$;

-- One line on a backend; its query only for who may see it.
CREATE FUNCTION migrate._describe_backend(caller regrole, pid integer) RETURNS text
LANGUAGE sql STABLE AS $$
    SELECT coalesce((SELECT format('PID %s (%s)', a.pid, concat_ws(', ',
               'role ' || a.usename,
               'application ' || nullif(a.application_name, ''),
               a.state || ' for ' || migrate._seconds(clock_timestamp() - a.state_change),
               'transaction open for ' || migrate._seconds(clock_timestamp() - a.xact_start),
               CASE WHEN pg_has_role(caller, a.usesysid, 'USAGE') OR pg_has_role(caller, 'pg_read_all_stats', 'USAGE')
                    THEN 'query: ' || left(regexp_replace(a.query, '\s+', ' ', 'g'), 60) END))
        FROM pg_stat_activity a WHERE a.pid = _describe_backend.pid), format('PID %s (gone meanwhile)', pid))
$$;

-- Who holds a lock that conflicts with the wanted ones, and was there already when the attempt began: short transactions come
-- and go. Prepared transactions have no PID (0 here).
CREATE FUNCTION migrate._blockers(caller regrole, relations regclass[], modes text[], attempt_began timestamptz)
RETURNS TABLE (pid integer, description text, ending text)
LANGUAGE sql VOLATILE AS $$
    SELECT pg_stat_clear_snapshot();
    WITH wanted AS (
        SELECT u.relation, u.mode FROM unnest(relations, modes) AS u(relation, mode)
    ), holder AS (
        SELECT coalesce(l.pid, 0) AS pid, l.virtualtransaction,
               string_agg(DISTINCT upper(regexp_replace(replace(l.mode, 'Lock', ''), '([a-z])([A-Z])', '\1 \2', 'g')) || ' on '
                          || w.relation::text, ', ') AS holds
        FROM wanted w JOIN pg_locks l ON l.locktype = 'relation' AND l.relation = w.relation
             AND l.database = (SELECT d.oid FROM pg_database d WHERE d.datname = current_database())
        WHERE l.granted AND l.pid IS DISTINCT FROM pg_backend_pid()
          AND l.mode NOT IN (SELECT unnest(CASE w.mode WHEN 'ACCESS EXCLUSIVE' THEN '{}'::text[]
                                           WHEN 'ROW SHARE' THEN '{AccessShareLock,RowShareLock,RowExclusiveLock,ShareUpdateExclusiveLock,ShareLock,ShareRowExclusiveLock}'
                                           WHEN 'SHARE UPDATE EXCLUSIVE' THEN '{AccessShareLock,RowShareLock,RowExclusiveLock}' ELSE '{AccessShareLock,RowShareLock}' END))
        GROUP BY 1, 2
    )
    SELECT h.pid, CASE WHEN h.pid > 0 THEN migrate._describe_backend(caller, h.pid) ELSE coalesce(format('prepared transaction %L', p.gid), 'a prepared transaction') END
                  || ' holds ' || h.holds,
           CASE WHEN h.pid > 0 THEN format('SELECT pg_terminate_backend(%s);', h.pid) ELSE format('COMMIT PREPARED %1$L; or ROLLBACK PREPARED %1$L;', p.gid) END
    FROM holder h
    -- A prepared transaction is known by the lock on its own ID.
    LEFT JOIN (pg_locks x JOIN pg_prepared_xacts p ON p.transaction = x.transactionid)
        ON h.pid = 0 AND x.locktype = 'transactionid' AND x.granted AND x.pid IS NULL AND x.virtualtransaction = h.virtualtransaction
    WHERE h.pid = 0 OR EXISTS (SELECT FROM pg_stat_activity a WHERE a.pid = h.pid AND a.xact_start <= attempt_began)
    ORDER BY h.pid
$$;

-- As pg_cancel_backend() has it, which asks for the rights of who calls it: here of the verb's caller.
CREATE FUNCTION migrate._may_signal(caller regrole, backend_role oid) RETURNS boolean
LANGUAGE sql STABLE AS $$
    SELECT (SELECT r.rolsuper FROM pg_roles r WHERE r.oid = caller)
        OR NOT coalesce((SELECT r.rolsuper FROM pg_roles r WHERE r.oid = backend_role), true)
           AND (pg_has_role(caller, backend_role, 'USAGE') OR pg_has_role(caller, 'pg_signal_backend', 'USAGE'))
$$;

-- Cancels the statement of each of these backends, or ends its session where it is idle in a transaction, for then there is nothing to
-- cancel. Only who has been there since then, is no process of the server's own but autovacuum (which may go on later, unless it
-- prevents a wraparound), and may be signalled by the caller. All are named: before it is due, too. Gives until when to go on trying
-- if that is later than the deadline: nobody is to be ended for nothing, and even a session that is ended needs a moment to go.
CREATE FUNCTION migrate._end_blockers(m migrate._migration, caller regrole, pids integer[], there_since timestamptz, due timestamptz) RETURNS timestamptz
LANGUAGE plpgsql STRICT AS $$
DECLARE
    b record;
    last timestamptz;
BEGIN
    PERFORM pg_stat_clear_snapshot();
    FOR b IN SELECT a.pid, migrate._describe_backend(caller, a.pid) AS description,
                    i.idle, CASE WHEN i.idle THEN 'its session is ended' ELSE 'its statement is cancelled' END AS what
             FROM pg_stat_activity a CROSS JOIN LATERAL (SELECT a.state LIKE 'idle in transaction%' AS idle) i
             WHERE a.pid = ANY (pids) AND a.xact_start <= there_since AND migrate._may_signal(caller, a.usesysid)
               AND (a.backend_type = 'client backend' OR a.backend_type = 'autovacuum worker' AND a.query NOT LIKE '%to prevent wraparound%') ORDER BY a.pid LOOP
        IF clock_timestamp() < due THEN
            RAISE NOTICE 'in the way of migration "%": %; in % %', m.name, b.description, migrate._seconds(due - clock_timestamp()), b.what;
            CONTINUE;
        END IF;
        RAISE WARNING 'in the way of migration "%": %; %', m.name, b.description, b.what;
        PERFORM CASE WHEN b.idle THEN pg_terminate_backend(b.pid) ELSE pg_cancel_backend(b.pid) END;
        PERFORM migrate._event(m, caller, 'blocker ended', format('option cancel_blockers: %s; %s', b.description, b.what));
        last := due + interval '5 s';
    END LOOP;
    RETURN last;
END $$;

-- Whether this transaction keeps the application waiting already, as a second switch in one transaction does. (The application
-- knows nothing of our own views and tables.)
CREATE FUNCTION migrate._holds_locks() RETURNS boolean
LANGUAGE sql VOLATILE AS $$
    SELECT EXISTS (SELECT FROM pg_locks l WHERE l.pid = pg_backend_pid() AND l.locktype = 'relation' AND l.granted
                   AND l.mode IN ('ShareLock', 'ShareRowExclusiveLock', 'ExclusiveLock', 'AccessExclusiveLock')
                   AND NOT EXISTS (SELECT FROM pg_class c WHERE c.oid = l.relation AND c.relnamespace = 'migrate'::regnamespace))
$$;

-- When whoever is in the way is to be ended, by option cancel_blockers; NULL: never. A rehearsal ends nobody. Neither does who keeps
-- the application waiting already: he has no time to go on trying, so it might be for nothing.
CREATE FUNCTION migrate._ends_blockers_at(m_id integer, dry_run boolean) RETURNS timestamptz
LANGUAGE sql VOLATILE AS $$
    SELECT clock_timestamp() + migrate._opt_ms(m_id, 'cancel_blockers') * interval '1 ms' WHERE NOT dry_run AND NOT migrate._holds_locks()
$$;

CREATE FUNCTION migrate._holding_detail() RETURNS text
LANGUAGE sql IMMUTABLE AS $$ SELECT 'This transaction holds locks of an earlier step, so the application is not kept waiting any longer, and nobody is ended.' $$;

CREATE FUNCTION migrate._together_hint() RETURNS text
LANGUAGE sql IMMUTABLE AS $$
    SELECT 'End this transaction and call it again. Several are switched best in one call, which gets all locks before it holds any for long: SELECT migrate.cutover(ARRAY[''…'', ''…'']);'
$$;

-- Executes `body`, one query that gives a text, under the locks, and returns it. An attempt that does not get its locks within
-- option lock_timeout is undone, so that nothing is held, and made again after a pause that grows, until `deadline` (or soon, where
-- the transaction holds locks of an earlier step); then 55P03 with the blockers. dry_run: the attempt that succeeded is undone too.
CREATE FUNCTION migrate._under_locks(m migrate._migration, caller regrole, goal text, relations regclass[], modes text[], body text,
                                     deadline timestamptz, dry_run boolean DEFAULT false,
                                     OUT result text, OUT attempts integer, OUT lock_ms numeric, OUT held_ms numeric, OUT blockers text[])
LANGUAGE plpgsql AS $$
DECLARE
    budget integer := migrate._opt_ms(m.id, 'lock_timeout');
    -- What the body locks beyond the relations (a foreign table's partner, a catalog) is no reason to queue either; and nobody's
    -- deadlock detector must come to look while we wait with all these locks in hand, for it would fail the application's statement.
    body_budget integer := greatest(1, least(budget, (SELECT s.setting::integer / 2 FROM pg_settings s WHERE s.name = 'deadlock_timeout')));
    before text := current_setting('lock_timeout');
    attempt_began timestamptz;
    holding boolean := migrate._holds_locks();
    last timestamptz := CASE WHEN holding THEN least(deadline, clock_timestamp() + interval '1 s') ELSE deadline END;
    pause_ms numeric := CASE WHEN holding THEN 20 ELSE 200 END;
    got timestamptz;
    endings text[];
    present text[];
    crossed integer;
    in_the_way integer[];
    ends_blockers_at timestamptz := migrate._ends_blockers_at(m.id, dry_run);
    until timestamptz;
BEGIN
    attempts := 0;
    blockers := '{}';
    LOOP
        attempts := attempts + 1;
        attempt_began := clock_timestamp();
        BEGIN
            lock_ms := round(migrate._lock_relations(relations, modes, budget, holding)::numeric, 1);
            got := clock_timestamp();
            PERFORM set_config('lock_timeout', body_budget::text, true);
            EXECUTE body INTO result;
            PERFORM set_config('lock_timeout', before, true);
            held_ms := round((extract(epoch FROM clock_timestamp() - got) * 1000)::numeric, 1);
            IF dry_run THEN
                PERFORM migrate._undo();
            END IF;
            RETURN;
        EXCEPTION
            WHEN SQLSTATE 'MGUND' THEN RETURN;
            WHEN lock_not_available OR deadlock_detected THEN
                SELECT array_agg(b.ending), array_agg(b.description), min(b.pid) FILTER (WHERE holding AND pg_backend_pid() = ANY (pg_blocking_pids(b.pid))), array_agg(b.pid)
                INTO endings, present, crossed, in_the_way FROM migrate._blockers(caller, relations, modes, attempt_began) b;
        END;
        blockers := coalesce(present, blockers);
        IF ends_blockers_at IS NOT NULL AND (attempts = 1 OR clock_timestamp() >= ends_blockers_at) THEN
            until := migrate._end_blockers(m, caller, in_the_way, attempt_began, ends_blockers_at);
            IF until IS NOT NULL THEN
                last := greatest(last, until);
                pause_ms := least(pause_ms, 200);
            END IF;
        END IF;
        -- (Who waits for what this transaction holds already cannot go away before it.)
        EXIT WHEN crossed IS NOT NULL OR clock_timestamp() + pause_ms * interval '1 ms' > last;
        PERFORM pg_sleep(pause_ms * (0.75 + random() / 2) / 1000);
        pause_ms := least(pause_ms * 1.3, 2000);
    END LOOP;
    PERFORM migrate._raise('55P03', format('migration "%s" could not %s within cutover_timeout (%s ms)', m.name, goal, migrate._opt_ms(m.id, 'cutover_timeout')),
        concat_ws(E'\n', format('%s attempts of %s ms each (option lock_timeout) did not get their locks; nothing has changed.',
                                attempts, budget),
                  CASE WHEN holding THEN migrate._holding_detail() END,
                  'PID ' || crossed || ' waits for these in turn.',
                  array_to_string(nullif(blockers, '{}'), E'\n')),
        CASE WHEN endings[1] IS NOT NULL AND crossed IS NULL THEN format('Wait until it ends, or end it with %s then call this again.', endings[1])
             WHEN holding THEN migrate._together_hint()
             ELSE 'Call it again when there is less traffic.' END);
END $$;

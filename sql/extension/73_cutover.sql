-- The switch: one transaction that turns which side serves, in either direction. cutover goes to the target, rollback to the source;
-- gates, barrier, locks and views are the same code.

-- Everything to lock, in the one order that does not deadlock with an application, which locks the view first, then its table, then the
-- table's sequence: of several migrations all views, then all tables, then all sequences.
CREATE FUNCTION migrate._switch_locks(m_ids integer[], side text, OUT relations regclass[], OUT modes text[])
LANGUAGE sql VOLATILE AS $$
    WITH wanted AS (
        SELECT 1 AS rank, v.view AS relation, 'ACCESS EXCLUSIVE' AS mode FROM migrate._view v JOIN pg_class c ON c.oid = v.view WHERE v.migration = ANY (m_ids)
        UNION SELECT 2, r, 'SHARE ROW EXCLUSIVE' FROM migrate._flow f, LATERAL (SELECT migrate._partition_tree(f.source) UNION
              SELECT migrate._partition_tree(f.target)) AS t(r) WHERE f.migration = ANY (m_ids)
        UNION SELECT 3, s.sequence, 'SHARE ROW EXCLUSIVE' FROM unnest(m_ids) m(id), LATERAL migrate._sequences(m.id) s
        UNION SELECT * FROM migrate._swap_locks(m_ids, side)
    ), strongest AS (SELECT w.rank, w.relation, min(w.mode) AS mode FROM wanted w GROUP BY 1, 2)  -- (the names are in that order)
    SELECT array_agg(w.relation ORDER BY w.rank, w.relation::oid), array_agg(w.mode ORDER BY w.rank, w.relation::oid) FROM strongest w
$$;

-- The switch itself, under the locks. Returns what it did, one line each.
CREATE FUNCTION migrate._switch_sides(m_id integer, caller regrole, side text, skipped text[], floors jsonb, swap jsonb, move_sequences boolean) RETURNS text
LANGUAGE plpgsql AS $$
DECLARE
    m migrate._migration := (SELECT x FROM migrate._migration x WHERE x.id = m_id);
    intact integer[];
    did text[] := '{}';
    v migrate._view;
    s record;
BEGIN
    -- @point switch: locks taken
    PERFORM migrate._require_gates(m, caller, side, true, skipped);
    -- @point switch: gates checked again
    IF side = 'target' AND NOT m.both_directions THEN
        intact := ARRAY(SELECT f.id FROM migrate._flow f WHERE f.migration = m_id AND NOT migrate._has_gap(f));
        UPDATE migrate._migration x SET both_directions = true WHERE x.id = m_id RETURNING * INTO m;
        PERFORM migrate._create_triggers(m, 'reverse');
        UPDATE migrate._flow f SET fingerprint = migrate._fingerprint(f.id) WHERE f.id = ANY (intact);
        did := did || (SELECT coalesce('dual writes from ' || string_agg(DISTINCT p.origin::text, ', ') || ' back to ' || string_agg(DISTINCT p.dest::text, ', '),
                                       'no dual writes back: there is no reverse mapping')
                       FROM migrate._mapping p JOIN migrate._flow f ON f.id = p.flow WHERE f.migration = m_id AND p.direction = 'reverse');
        -- @point switch: reverse triggers created
    END IF;
    did := did || CASE side WHEN 'target' THEN migrate._swap_there(m, caller, skipped, swap) ELSE migrate._swap_back(m, caller) END;
    -- @point switch: names swapped
    FOR v IN SELECT x.* FROM migrate._view x JOIN pg_class c ON c.oid = x.view WHERE x.migration = m_id ORDER BY x.view LOOP
        PERFORM migrate._replace_view(v, side, caller);
        -- @point switch: one view replaced
        did := did || (SELECT format('view %s reads %s', v.view, CASE side WHEN 'target' THEN f.target ELSE f.source END) FROM migrate._flow f WHERE f.id = v.flow);
    END LOOP;
    FOR s IN SELECT * FROM migrate._sequence_targets(m_id, floors) t WHERE t.goal IS NOT NULL LOOP
        IF move_sequences THEN
            PERFORM setval(s.sequence, s.goal::bigint);
        END IF;
        did := did || format('sequence %s is set to %s', s.sequence, s.goal);
    END LOOP;
    -- @point switch: sequences advanced
    PERFORM migrate._commit_synchronously();
    m := migrate._move(m, caller, CASE side WHEN 'target' THEN 'cut_over' ELSE 'ready' END,
                       CASE side WHEN 'target' THEN 'cutover' ELSE 'rollback' END);
    -- @point switch: phase moved
    UPDATE migrate._migration x SET cut_over_at = CASE side WHEN 'target' THEN clock_timestamp() END WHERE x.id = m_id;
    PERFORM migrate._change_watch(m, caller);
    RETURN array_to_string(did || format('the %s serves', side), E'\n');
END $$;

-- The migrations of a switch as a JSON array, what is found out about each put in as it goes on.
CREATE FUNCTION migrate._switch_parts(parts jsonb)
RETURNS TABLE (place integer, id integer, name text, phase text, due boolean, rehearsal boolean, skipped text[], floors jsonb, swap jsonb, locks text, did text)
LANGUAGE sql IMMUTABLE AS $$
    SELECT (u.i - 1)::integer, p.* FROM jsonb_array_elements(parts) WITH ORDINALITY AS u(part, i),
           jsonb_to_record(u.part) AS p(id integer, name text, phase text, due boolean, rehearsal boolean, skipped text[], floors jsonb, swap jsonb, locks text, did text)
    ORDER BY u.i
$$;

-- The switch of all of them under the locks of all. What was switched last goes back first, for a swap knows the others as they were then.
-- A rehearsal of the rollback before the first cutover goes there first.
CREATE FUNCTION migrate._switch_all(parts jsonb, caller regrole, side text, move_sequences boolean) RETURNS text
LANGUAGE plpgsql AS $$
DECLARE
    p record;
BEGIN
    FOR p IN SELECT x.* FROM migrate._switch_parts(parts) x JOIN migrate._migration m USING (id) WHERE x.due
             ORDER BY CASE side WHEN 'source' THEN m.cut_over_at END DESC, CASE side WHEN 'source' THEN -x.place ELSE x.place END LOOP
        parts := jsonb_set(parts, ARRAY[p.place::text, 'did'], to_jsonb(concat_ws(E'\n',
            CASE WHEN p.rehearsal THEN migrate._switch_sides(p.id, caller, 'target', p.skipped, p.floors, p.swap, move_sequences) END,
            migrate._switch_sides(p.id, caller, side, p.skipped, p.floors, p.swap, move_sequences))));
        -- @point switch: one migration switched
    END LOOP;
    RETURN parts::text;
END $$;

-- Waits, holding no lock of this call, until nobody can see a state from before now; raises with who still does at the deadline.
CREATE FUNCTION migrate._wait_for_snapshots(m migrate._migration, caller regrole, goal text, deadline timestamptz, dry_run boolean, without text) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    began timestamptz := clock_timestamp();
    ends_blockers_at timestamptz := migrate._ends_blockers_at(m.id, dry_run);
    last timestamptz := deadline;
    pids integer[];
    step timestamptz;
BEGIN
    -- Named after a moment, ended when that is due, and at last waited for as long as it may take.
    FOREACH step IN ARRAY CASE WHEN ends_blockers_at IS NULL THEN ARRAY[last] ELSE ARRAY[least(began + interval '100 ms', ends_blockers_at), ends_blockers_at, NULL] END LOOP
        pids := migrate._old_snapshots(greatest(extract(epoch FROM least(step, last) - clock_timestamp()) * 1000, 0)::bigint);
        EXIT WHEN pids = '{}' OR clock_timestamp() >= last;
        last := greatest(last, migrate._end_blockers(m, caller, pids, began, ends_blockers_at));
    END LOOP;
    IF pids = '{}' THEN
        RETURN;
    END IF;
    PERFORM pg_stat_clear_snapshot();
    PERFORM migrate._raise('55P03', format('migration "%s" could not %s within cutover_timeout (%s ms)', m.name, goal, migrate._opt_ms(m.id, 'cutover_timeout')),
        concat_ws(E'\n', 'Transactions with a snapshot from before this call would see the other side as it was then. Nothing has changed.',
            CASE WHEN migrate._holds_locks() THEN migrate._holding_detail() END,
            (SELECT string_agg(migrate._describe_backend(caller, p) || ' holds an old snapshot', E'\n') FROM unnest(pids) p)),
        format('Wait until they end, or end them: SELECT pg_terminate_backend(%s); where they read nothing of these tables: SELECT %s;', pids[1], without));
END $$;

-- Whether a switch has anything to do; raises where it is not allowed in this phase.
CREATE FUNCTION migrate._switch_is_due(m migrate._migration, side text, rehearsal boolean) RETURNS boolean
LANGUAGE plpgsql AS $$
DECLARE
    starts_in text := CASE side WHEN 'target' THEN 'ready' ELSE 'cut_over' END;
    ends_in text := CASE side WHEN 'target' THEN 'cut_over' ELSE 'ready' END;
BEGIN
    IF m.phase = starts_in OR rehearsal THEN
        RETURN true;
    ELSIF m.phase = ends_in OR side = 'target' AND m.phase = 'finalized' THEN
        RAISE NOTICE 'migration "%": the % serves already', m.name, side;
        RETURN false;
    END IF;
    PERFORM migrate._raise('55000', format('migration "%s" cannot %s in phase %s', m.name, CASE side WHEN 'target' THEN 'cut over' ELSE 'roll back' END, m.phase),
        format('It can in phase %s.', starts_in),
        CASE WHEN m.phase = 'planned' THEN format('SELECT migrate.start(%L);', m.name)
             WHEN m.phase = 'finalized' THEN 'After finalize there is no way back.'
             WHEN m.phase = 'cancelled' OR side = 'source' THEN ''
             ELSE format('CALL migrate.wait(%L);', m.name) END);
END $$;

-- The switch of one or several migrations, all or none, from gates to commit. side: who is to serve. The options lock_timeout and
-- cutover_timeout are those of the first. Plans are generic, so that what is checked before the locks need not be planned again under them.
CREATE FUNCTION migrate._switch(caller regrole, names text[], side text, dry_run boolean, skip text[]) RETURNS text
LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan AS $$
DECLARE
    verb text := CASE side WHEN 'target' THEN 'cutover' ELSE 'rollback' END;
    goal text := CASE side WHEN 'target' THEN 'cut over' ELSE 'roll back' END;
    parts jsonb;
    first migrate._migration;
    deadline timestamptz;
    locks record;
    done record;
BEGIN
    IF current_setting('transaction_isolation') <> 'read committed' AND current_setting('transaction_isolation') <> 'read uncommitted' THEN
        PERFORM migrate._raise('25001', format('%s cannot run at isolation level %s', verb, current_setting('transaction_isolation')),
            'Its snapshot would be older than the switch.', 'SET default_transaction_isolation = ''read committed''; outside of a transaction block, and call it again.');
    ELSIF coalesce(cardinality(names), 0) = 0 THEN
        PERFORM migrate._raise('22023', format('%s needs the name of a migration', verb));
    END IF;
    parts := migrate._lock_for_switch(caller, names, side, dry_run, coalesce(skip, '{}'));
    SELECT x.* INTO first FROM migrate._switch_parts(parts) p JOIN migrate._migration x USING (id) WHERE p.due ORDER BY p.name <> names[1], p.place LIMIT 1;
    IF NOT FOUND THEN
        RETURN migrate._switch_answer(names, parts, dry_run, side, NULL);
    END IF;
    goal := goal || coalesce(' together with ' || (SELECT string_agg(format('"%s"', p.name), ', ' ORDER BY p.place) FROM migrate._switch_parts(parts) p
                                                   WHERE p.due AND p.id <> first.id), '');
    deadline := clock_timestamp() + migrate._opt_ms(first.id, 'cutover_timeout') * interval '1 ms';
    IF migrate._holds_locks() THEN
        deadline := least(deadline, clock_timestamp() + interval '1 s');
    END IF;
    BEGIN  -- undone, so that no lock of what is read here stays
        parts := migrate._switch_gates(parts, caller, side);
        SELECT * INTO locks FROM migrate._switch_locks(ARRAY(SELECT p.id FROM migrate._switch_parts(parts) p WHERE p.due), side);
        PERFORM migrate._prepare_view(v, side) FROM migrate._switch_parts(parts) p JOIN migrate._view v ON v.migration = p.id JOIN pg_class c ON c.oid = v.view WHERE p.due;
        PERFORM migrate._undo();
    EXCEPTION WHEN SQLSTATE 'MGUND' THEN NULL;
    END;
    -- @point switch: gates checked
    PERFORM migrate._interrupt_restore(m) FROM migrate._switch_parts(parts) p JOIN migrate._migration m USING (id)
        WHERE p.due AND EXISTS (SELECT FROM migrate._still_deferred(m.id) d WHERE d.relation IS NOT NULL);
    PERFORM migrate._swap_analyze(m) FROM migrate._switch_parts(parts) p JOIN migrate._migration m USING (id) WHERE p.due AND side = 'target' AND NOT dry_run;
    IF EXISTS (SELECT FROM migrate._switch_parts(parts) p WHERE p.due AND 'snapshots' <> ALL (p.skipped)) THEN
        PERFORM migrate._wait_for_snapshots(first, caller, goal, deadline, dry_run, format('migrate.%s(%s, skip => ''{snapshots}'')', verb,
            CASE cardinality(names) WHEN 1 THEN quote_literal(names[1]) ELSE format('%L::text[]', names) END));
    END IF;
    -- @point switch: old snapshots gone
    SELECT * INTO done FROM migrate._under_locks(first, caller, goal, locks.relations, locks.modes,
        format('SELECT migrate._switch_all(%L, %L, %L, %L)', parts, caller, side, NOT dry_run), deadline, dry_run);
    parts := done.result::jsonb;
    IF NOT dry_run THEN
        PERFORM migrate._event(m, caller, verb, format('attempts: %s; waited for locks: %s ms; last blockers: %s; gates skipped: %s; %s', done.attempts, done.lock_ms,
            coalesce(array_to_string(nullif(done.blockers, '{}'), ', '), 'none'), coalesce(array_to_string(nullif(p.skipped, '{}'), ', '), 'none'),
            replace(p.did, E'\n', '; '))), migrate._launch_watch(m) FROM migrate._switch_parts(parts) p JOIN migrate._migration m USING (id) WHERE p.due;
    END IF;
    -- @point switch: event written
    -- (Foreign keys that were swapped are to be validated. Without a free slot that waits.)
    PERFORM migrate._launch_worker(m.id, 0) FROM migrate._switch_parts(parts) p JOIN migrate._migration m USING (id) WHERE p.due AND NOT dry_run AND migrate._is_restoring(m.id);
    RETURN migrate._switch_answer(names, parts, dry_run, side,
        format('locks: all got at attempt %s within %s ms, held for %s ms', done.attempts, done.lock_ms, done.held_ms));
END $$;

-- Locks the migrations, in the order of their IDs, so that two calls do not wait for each other. While this transaction keeps the
-- application waiting, it does not itself wait long for other verbs. Gives the parts.
CREATE FUNCTION migrate._lock_for_switch(caller regrole, names text[], side text, dry_run boolean, skip text[]) RETURNS jsonb
LANGUAGE plpgsql AS $$
DECLARE
    before text := current_setting('lock_timeout');
    n record;
    m migrate._migration;
    rehearsal boolean;
    parts jsonb := '[]';
BEGIN
    IF migrate._holds_locks() THEN
        PERFORM set_config('lock_timeout', '500ms', true);
    END IF;
    FOR n IN SELECT DISTINCT u.name, x.id FROM unnest(names) u(name) LEFT JOIN migrate._migration x ON x.name = u.name ORDER BY x.id, u.name LOOP
        m := migrate._lock(caller, n.name);
        PERFORM migrate._require_whole(m), migrate._require_rights(m) WHERE m.phase IN ('ready', 'cut_over');
        rehearsal := side = 'source' AND m.phase = 'ready' AND dry_run;
        parts := parts || jsonb_build_object('id', m.id, 'name', m.name, 'phase', m.phase, 'due', migrate._switch_is_due(m, side, rehearsal),
                                             'rehearsal', rehearsal, 'skipped', migrate._skipped_gates(m, skip));
    END LOOP;
    PERFORM set_config('lock_timeout', before, true);
    RETURN parts;
EXCEPTION WHEN lock_not_available OR deadlock_detected THEN
    IF migrate._holds_locks() THEN
        PERFORM migrate._raise('55P03', format('migration "%s" is in use by another verb or a worker', n.name), migrate._holding_detail(), migrate._together_hint());
    END IF;
    RAISE;
END $$;

-- Raises with the gates that do not pass; gives the parts with what is to be locked and where their sequences must go at least.
CREATE FUNCTION migrate._switch_gates(parts jsonb, caller regrole, side text) RETURNS jsonb
LANGUAGE plpgsql AS $$
DECLARE
    p record;
BEGIN
    FOR p IN SELECT x.*, m AS migration FROM migrate._switch_parts(parts) x JOIN migrate._migration m USING (id) WHERE x.due ORDER BY x.place LOOP
        PERFORM migrate._require_gates(p.migration, caller, CASE WHEN p.rehearsal THEN 'target' ELSE side END, false, p.skipped);
        parts := jsonb_set(parts, ARRAY[p.place::text, 'floors'],
            (SELECT coalesce(jsonb_object_agg(t.sequence::oid::text, t.reached), '{}') FROM migrate._sequence_targets(p.id) t));
        IF side = 'target' OR p.rehearsal THEN
            parts := jsonb_set(parts, ARRAY[p.place::text, 'swap'], coalesce(migrate._swap_planned(p.migration, caller), 'null'));
        END IF;
        parts := jsonb_set(parts, ARRAY[p.place::text, 'locks'], (SELECT to_jsonb(string_agg(format('locked: %s, %s', u.relation, u.mode), E'\n' ORDER BY u.i))
            FROM migrate._switch_locks(ARRAY[p.id], side) l, unnest(l.relations, l.modes) WITH ORDINALITY AS u(relation, mode, i)));
    END LOOP;
    RETURN parts;
END $$;

-- What the verb answers: the phase before and after, of several each with its name, in the order in which they were named.
CREATE FUNCTION migrate._switch_answer(names text[], parts jsonb, dry_run boolean, side text, attempt text) RETURNS text
LANGUAGE sql AS $$
    SELECT string_agg(CASE WHEN cardinality(names) > 1 THEN p.name || ': ' ELSE '' END || CASE
        WHEN NOT p.due THEN format('%s -> %1$s', p.phase)
        WHEN dry_run THEN format(E'%s -> %1$s (dry run: undone)\n', p.phase) || migrate._switch_report(CASE WHEN p.rehearsal THEN 'target' ELSE side END, p.skipped, p.locks, p.did, attempt)
        ELSE format('%s -> %s', p.phase, CASE side WHEN 'target' THEN 'cut_over' ELSE 'ready' END) END, E'\n' ORDER BY array_position(names, p.name))
    FROM migrate._switch_parts(parts) p
$$;

CREATE FUNCTION migrate._switch_report(side text, skipped text[], locks text, did text, attempt text) RETURNS text
LANGUAGE sql AS $$
    SELECT concat_ws(E'\n',
        (SELECT string_agg(CASE WHEN g = ANY (skipped) THEN 'skipped: gate ' ELSE 'passed: gate ' END || g, E'\n' ORDER BY i)
         FROM unnest(migrate._gates_of(side)) WITH ORDINALITY AS n(g, i)),
        locks, 'done: ' || replace(did, E'\n', E'\ndone: '), attempt)
$$;

CREATE FUNCTION migrate._cutover(caller regrole, name text, dry_run boolean DEFAULT false, skip text[] DEFAULT '{}') RETURNS text
LANGUAGE sql AS $$ SELECT migrate._switch(caller, ARRAY[name], 'target', coalesce(dry_run, false), skip) $$;

CREATE FUNCTION migrate._cutover(caller regrole, names text[], dry_run boolean DEFAULT false, skip text[] DEFAULT '{}') RETURNS text
LANGUAGE sql AS $$ SELECT migrate._switch(caller, names, 'target', coalesce(dry_run, false), skip) $$;

CREATE FUNCTION migrate._rollback(caller regrole, name text, dry_run boolean DEFAULT false, skip text[] DEFAULT '{}') RETURNS text
LANGUAGE sql AS $$ SELECT migrate._switch(caller, ARRAY[name], 'source', coalesce(dry_run, false), skip) $$;

CREATE FUNCTION migrate._rollback(caller regrole, names text[], dry_run boolean DEFAULT false, skip text[] DEFAULT '{}') RETURNS text
LANGUAGE sql AS $$ SELECT migrate._switch(caller, names, 'source', coalesce(dry_run, false), skip) $$;

-- Which side serves. Applications poll this, so it takes no lock; whoever may read one of the tables or views may ask.
CREATE FUNCTION migrate._serves(caller regrole, name text) RETURNS text
LANGUAGE plpgsql AS $$
DECLARE
    m migrate._migration;
BEGIN
    SELECT * INTO m FROM migrate._migration x WHERE x.name = _serves.name;
    IF NOT FOUND OR NOT pg_has_role(caller, m.owner, 'MEMBER') AND NOT EXISTS (
            SELECT FROM migrate._flow f WHERE f.migration = m.id AND (has_any_column_privilege(caller, f.source, 'SELECT') OR has_any_column_privilege(caller, f.target, 'SELECT'))
            UNION ALL SELECT FROM migrate._view v WHERE v.migration = m.id AND has_any_column_privilege(caller, v.view, 'SELECT')) THEN
        PERFORM migrate._raise('42704', format('migration "%s" does not exist', name));
    END IF;
    RETURN CASE WHEN m.phase IN ('cut_over', 'finalized') THEN 'target' ELSE 'source' END;
END $$;

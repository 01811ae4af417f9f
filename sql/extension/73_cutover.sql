-- The switch: one transaction that turns which side serves, in either direction. cutover goes to the target, rollback to the source;
-- gates, barrier, locks and views are the same code.

-- Sequences that feed a column of a source or target (owned by it, its identity, or named in its default), with all columns on either side
-- that hold the same values.
CREATE FUNCTION migrate._sequences(m_id integer) RETURNS TABLE (sequence regclass, relation regclass, attnum int2)
LANGUAGE sql STABLE AS $$
    WITH side AS (
        SELECT f.source AS relation FROM migrate._flow f WHERE f.migration = m_id UNION SELECT f.target FROM migrate._flow f WHERE f.migration = m_id
    ), feeds AS (
        SELECT d.objid AS sequence, d.refobjid AS relation, d.refobjsubid AS attnum FROM side s JOIN pg_depend d ON d.refobjid = s.relation
        WHERE d.classid = 'pg_class'::regclass AND d.refclassid = 'pg_class'::regclass AND d.refobjsubid > 0 AND d.deptype IN ('a', 'i')
        UNION
        SELECT d.refobjid, e.adrelid, e.adnum FROM side s JOIN pg_attrdef e ON e.adrelid = s.relation
        JOIN pg_depend d ON d.classid = 'pg_attrdef'::regclass AND d.objid = e.oid AND d.refclassid = 'pg_class'::regclass
    ), bare AS (
        SELECT p.origin, o.attnum AS origin_attnum, p.dest, p.columns[e.i] AS dest_attnum
        FROM migrate._mapping p JOIN migrate._flow f ON f.id = p.flow, LATERAL migrate._view_body(p.view) b,
             unnest(b.expressions) WITH ORDINALITY AS e(expression, i), pg_attribute o
        WHERE f.migration = m_id AND p.direction = 'forward' AND o.attrelid = p.origin AND o.attnum > 0 AND e.expression = quote_ident(o.attname)
        UNION
        SELECT p.origin, k.origin_attnum, p.dest, k.dest_attnum FROM migrate._mapping p JOIN migrate._flow f ON f.id = p.flow,
             unnest(p.key_origin, p.key_dest) AS k(origin_attnum, dest_attnum)
        WHERE f.migration = m_id AND p.direction = 'forward' AND k.origin_attnum > 0
    ), linked AS (
        SELECT sequence, relation, attnum FROM feeds
        UNION SELECT x.sequence, b.dest, b.dest_attnum FROM feeds x JOIN bare b ON b.origin = x.relation AND b.origin_attnum = x.attnum
        UNION SELECT x.sequence, b.origin, b.origin_attnum FROM feeds x JOIN bare b ON b.dest = x.relation AND b.dest_attnum = x.attnum
    )
    SELECT l.sequence::regclass, l.relation::regclass, l.attnum::int2
    FROM linked l JOIN pg_class c ON c.oid = l.sequence AND c.relkind = 'S'
$$;

-- The extreme value of a whole-number column (the largest, or the smallest where the sequence descends), read as the table's owner; NULL where
-- there is none. indexed_only: NULL too where it would take a scan of the table.
CREATE FUNCTION migrate._extreme(relation regclass, attnum int2, descending boolean, indexed_only boolean) RETURNS numeric
LANGUAGE plpgsql AS $$
DECLARE
    column_name name;
BEGIN
    SELECT a.attname INTO column_name FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid
    WHERE a.attrelid = relation AND a.attnum = _extreme.attnum
      AND coalesce(nullif(t.typbasetype, 0), t.oid) IN ('int2'::regtype, 'int4'::regtype, 'int8'::regtype, 'numeric'::regtype);
    IF NOT FOUND OR indexed_only AND NOT EXISTS (SELECT FROM pg_index i JOIN pg_class x ON x.oid = i.indexrelid JOIN pg_am a ON a.oid = x.relam
            WHERE i.indrelid = relation AND i.indkey[0] = attnum AND i.indisvalid AND i.indpred IS NULL AND a.amname = 'btree') THEN
        RETURN NULL;
    END IF;
    RETURN (SELECT trunc(r[1]::numeric) FROM migrate._as(migrate._table_owner(relation), format(
        'SELECT %s(%I)::numeric::text FROM %s WHERE %2$I::numeric <> ''NaN''', CASE WHEN descending THEN 'min' ELSE 'max' END, column_name,
        migrate._relation_name(relation))) r);
END $$;

-- As pg_sequence_last_value(), which would lock the sequence until the transaction ends (even if it is undone). Read as the sequence's
-- owner: while the name waits for a lock he may give it to a view, whose functions must not run as the extension's owner.
CREATE FUNCTION migrate._last_value(sequence regclass) RETURNS bigint
LANGUAGE sql AS $$
    SELECT r[1]::bigint FROM migrate._as(migrate._table_owner(sequence),
        format('SELECT last_value FROM %s WHERE is_called', migrate._relation_name(sequence))) r
$$;

-- Where each sequence must stand so that its next value is new on both sides: past every value of the columns and past every sequence
-- that feeds them, in its own step. beyond: that value, where the sequence cannot reach it. floors: values found earlier, by a scan.
CREATE FUNCTION migrate._sequence_targets(m_id integer, floors jsonb DEFAULT NULL)
RETURNS TABLE (sequence regclass, goal numeric, beyond numeric, reached numeric)
LANGUAGE sql VOLATILE AS $$
    WITH links AS MATERIALIZED (SELECT * FROM migrate._sequences(m_id)),
    own AS (SELECT DISTINCT l.sequence FROM links l),
    found AS (
        SELECT l.sequence, migrate._extreme(l.relation, l.attnum, s.seqincrement < 0, floors IS NOT NULL) AS value
        FROM links l JOIN pg_sequence s ON s.seqrelid = l.sequence
        UNION ALL
        SELECT l.sequence, migrate._last_value(k.sequence) FROM links l JOIN links k USING (relation, attnum)
        UNION ALL
        SELECT o.sequence, (floors ->> o.sequence::oid::text)::numeric FROM own o
    ), best AS (
        SELECT f.sequence, s.*, CASE WHEN s.seqincrement > 0 THEN max(f.value) ELSE min(f.value) END AS value
        FROM found f JOIN pg_sequence s ON s.seqrelid = f.sequence GROUP BY f.sequence, s.seqrelid, s.seqtypid, s.seqstart, s.seqincrement, s.seqmax, s.seqmin, s.seqcache, s.seqcycle
    ), stepped AS (
        SELECT b.*, b.seqstart + ceil((b.value - b.seqstart) / b.seqincrement) * b.seqincrement AS goal, migrate._last_value(b.sequence) AS now
        FROM best b
    )
    SELECT t.sequence,
           CASE WHEN t.goal BETWEEN t.seqmin AND t.seqmax
                 AND CASE WHEN t.seqincrement > 0 THEN t.goal > coalesce(t.now, t.seqstart - 1) ELSE t.goal < coalesce(t.now, t.seqstart + 1) END
                THEN t.goal END,
           CASE WHEN NOT t.seqcycle AND (t.seqincrement > 0 AND t.goal >= t.seqmax OR t.seqincrement < 0 AND t.goal <= t.seqmin) THEN t.value END,
           t.value
    FROM stepped t ORDER BY t.sequence::oid
$$;

-- Everything to lock, in the one order that does not deadlock with an application, which locks the view first, then its table, then the
-- table's sequence.
CREATE FUNCTION migrate._switch_locks(m_id integer, OUT relations regclass[], OUT modes text[])
LANGUAGE sql STABLE AS $$
    WITH wanted AS (
        SELECT 1 AS rank, v.view AS relation, 'ACCESS EXCLUSIVE' AS mode FROM migrate._view v JOIN pg_class c ON c.oid = v.view WHERE v.migration = m_id
        UNION SELECT 2, r, 'SHARE ROW EXCLUSIVE' FROM migrate._flow f, LATERAL (SELECT migrate._partition_tree(f.source) UNION
              SELECT migrate._partition_tree(f.target)) AS t(r) WHERE f.migration = m_id
        UNION SELECT 3, s.sequence, 'SHARE ROW EXCLUSIVE' FROM migrate._sequences(m_id) s
    )
    SELECT array_agg(w.relation ORDER BY w.rank, w.relation::oid), array_agg(w.mode ORDER BY w.rank, w.relation::oid) FROM wanted w
$$;

-- The switch itself, under the locks. Returns what it did, one line each.
CREATE FUNCTION migrate._switch_sides(m_id integer, caller regrole, side text, skipped text[], floors jsonb, move_sequences boolean) RETURNS text
LANGUAGE plpgsql AS $$
DECLARE
    m migrate._migration := (SELECT x FROM migrate._migration x WHERE x.id = m_id);
    intact integer[] := ARRAY(SELECT f.id FROM migrate._flow f WHERE f.migration = m_id AND f.fingerprint = migrate._fingerprint(f.id));
    did text[] := '{}';
    v migrate._view;
    s record;
BEGIN
    -- @point switch: locks taken
    PERFORM migrate._require_gates(m, caller, side, true, skipped);
    -- @point switch: gates checked again
    IF side = 'target' AND NOT m.both_directions THEN
        UPDATE migrate._migration x SET both_directions = true WHERE x.id = m_id RETURNING * INTO m;
        PERFORM migrate._create_triggers(m, 'reverse');
        UPDATE migrate._flow f SET fingerprint = migrate._fingerprint(f.id) WHERE f.id = ANY (intact);
        did := did || (SELECT coalesce('dual writes from ' || string_agg(DISTINCT p.origin::text, ', ') || ' back to ' || string_agg(DISTINCT p.dest::text, ', '),
                                       'no dual writes back: there is no reverse mapping')
                       FROM migrate._mapping p JOIN migrate._flow f ON f.id = p.flow WHERE f.migration = m_id AND p.direction = 'reverse');
        -- @point switch: reverse triggers created
    END IF;
    FOR v IN SELECT x.* FROM migrate._view x JOIN pg_class c ON c.oid = x.view WHERE x.migration = m_id ORDER BY x.view LOOP
        PERFORM migrate._replace_view(v, side);
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
    RETURN array_to_string(did || format('the %s serves', side), E'\n');
END $$;

-- There and back, for a rehearsal of the rollback before the first cutover.
CREATE FUNCTION migrate._switch_there_and_back(m_id integer, caller regrole, skipped text[], floors jsonb) RETURNS text
LANGUAGE plpgsql AS $$
DECLARE
    there text := migrate._switch_sides(m_id, caller, 'target', skipped, floors, false);
    back text := migrate._switch_sides(m_id, caller, 'source', skipped, floors, false);
BEGIN
    RETURN there || E'\n' || back;
END $$;

-- Waits, holding no lock, until nobody can see a state from before now; raises with who still does at the deadline.
CREATE FUNCTION migrate._wait_for_snapshots(m migrate._migration, caller regrole, goal text, deadline timestamptz) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    began timestamptz := clock_timestamp();
    timeout_ms bigint := extract(epoch FROM CASE WHEN migrate._holds_locks() THEN least(deadline, began + interval '1 s') ELSE deadline END - began) * 1000;
    pids integer[] := migrate._old_snapshots(greatest(timeout_ms, 0));
BEGIN
    IF pids = '{}' THEN
        RETURN;
    END IF;
    PERFORM pg_stat_clear_snapshot();
    PERFORM migrate._raise('55P03', format('migration "%s" could not %s within cutover_timeout (%s ms)', m.name, goal, migrate._opt_ms(m.id, 'cutover_timeout')),
        concat_ws(E'\n', 'Transactions with a snapshot from before this call would see the other side as it was then. Nothing has changed.',
            (SELECT string_agg(migrate._describe_backend(caller, p) || ' holds an old snapshot', E'\n') FROM unnest(pids) p)),
        format('Wait until they end, or end them: SELECT pg_terminate_backend(%s); where they read nothing of these tables: SELECT migrate.%s(%L, skip => ''{snapshots}'');',
            pids[1], CASE goal WHEN 'roll back' THEN 'rollback' ELSE 'cutover' END, m.name));
END $$;

-- The switch from gates to commit. side: who is to serve.
CREATE FUNCTION migrate._switch(caller regrole, name text, side text, dry_run boolean, skip text[]) RETURNS text
LANGUAGE plpgsql AS $$
DECLARE
    m migrate._migration;
    verb text := CASE side WHEN 'target' THEN 'cutover' ELSE 'rollback' END;
    goal text := CASE side WHEN 'target' THEN 'cut over' ELSE 'roll back' END;
    skipped text[];
    deadline timestamptz;
    locks record;
    floors jsonb;
    done record;
    rehearsal boolean;
    starts_in text := CASE side WHEN 'target' THEN 'ready' ELSE 'cut_over' END;
    ends_in text := CASE side WHEN 'target' THEN 'cut_over' ELSE 'ready' END;
BEGIN
    IF current_setting('transaction_isolation') <> 'read committed' AND current_setting('transaction_isolation') <> 'read uncommitted' THEN
        PERFORM migrate._raise('25001', format('%s cannot run at isolation level %s', verb, current_setting('transaction_isolation')),
            'Its snapshot would be older than the switch.', 'Call it at isolation level READ COMMITTED.');
    END IF;
    m := migrate._lock(caller, name);
    skipped := migrate._skipped_gates(m, coalesce(skip, '{}'));
    rehearsal := side = 'source' AND m.phase = 'ready' AND dry_run;
    IF (m.phase = ends_in OR side = 'target' AND m.phase = 'finalized') AND NOT rehearsal THEN
        RAISE NOTICE 'migration "%": the % serves already', m.name, side;
        RETURN format('%s -> %s', m.phase, m.phase);
    ELSIF m.phase <> starts_in AND NOT rehearsal THEN
        PERFORM migrate._raise('55000', format('migration "%s" cannot %s in phase %s', m.name, goal, m.phase),
            format('It can in phase %s.', starts_in),
            CASE WHEN m.phase = 'planned' THEN format('SELECT migrate.start(%L);', m.name)
                 WHEN m.phase = 'finalized' THEN 'After finalize there is no way back.'
                 WHEN m.phase = 'cancelled' OR side = 'source' THEN ''
                 ELSE format('CALL migrate.wait(%L);', m.name) END);
    END IF;

    deadline := clock_timestamp() + migrate._opt_ms(m.id, 'cutover_timeout') * interval '1 ms';
    BEGIN  -- undone, so that no lock of what is read here stays
        PERFORM migrate._require_gates(m, caller, CASE WHEN rehearsal THEN 'target' ELSE side END, false, skipped);
        SELECT coalesce(jsonb_object_agg(t.sequence::oid::text, t.reached), '{}') INTO floors FROM migrate._sequence_targets(m.id) t;
        SELECT * INTO locks FROM migrate._switch_locks(m.id);
        PERFORM migrate._undo();
    EXCEPTION WHEN SQLSTATE 'MGUND' THEN NULL;
    END;
    -- @point switch: gates checked
    IF 'snapshots' <> ALL (skipped) THEN
        PERFORM migrate._wait_for_snapshots(m, caller, goal, deadline);
    END IF;
    -- @point switch: old snapshots gone
    SELECT * INTO done FROM migrate._under_locks(m, caller, goal, locks.relations, locks.modes,
        CASE WHEN rehearsal THEN format('SELECT migrate._switch_there_and_back(%s, %L, %L, %L)', m.id, caller, skipped, floors)
             ELSE format('SELECT migrate._switch_sides(%s, %L, %L, %L, %L, %L)', m.id, caller, side, skipped, floors, NOT dry_run) END,
        deadline, dry_run);
    IF dry_run THEN
        RETURN format(E'%s -> %s (dry run: undone)\n%s', m.phase, m.phase, migrate._switch_report(CASE WHEN rehearsal THEN 'target' ELSE side END, skipped, locks.relations, locks.modes, done.result));
    END IF;
    PERFORM migrate._event(m, caller, verb, format('attempts: %s; waited for locks: %s ms; last blockers: %s; gates skipped: %s; %s', done.attempts, done.lock_ms,
        coalesce(array_to_string(nullif(done.blockers, '{}'), ', '), 'none'), coalesce(array_to_string(nullif(skipped, '{}'), ', '), 'none'),
        replace(done.result, E'\n', '; ')));
    -- @point switch: event written
    RETURN format('%s -> %s', m.phase, ends_in);
END $$;

CREATE FUNCTION migrate._switch_report(side text, skipped text[], relations regclass[], modes text[], did text) RETURNS text
LANGUAGE sql AS $$
    SELECT concat_ws(E'\n',
        (SELECT string_agg(CASE WHEN g = ANY (skipped) THEN 'skipped: gate ' ELSE 'passed: gate ' END || g, E'\n' ORDER BY i)
         FROM unnest(migrate._gates_of(side)) WITH ORDINALITY AS n(g, i)),
        (SELECT string_agg(format('locked: %s, %s', u.relation, u.mode), E'\n' ORDER BY i) FROM unnest(relations, modes) WITH ORDINALITY AS u(relation, mode, i)),
        'done: ' || replace(did, E'\n', E'\ndone: '))
$$;

CREATE FUNCTION migrate._cutover(caller regrole, name text, dry_run boolean DEFAULT false, skip text[] DEFAULT '{}') RETURNS text
LANGUAGE sql AS $$ SELECT migrate._switch(caller, name, 'target', coalesce(dry_run, false), skip) $$;

CREATE FUNCTION migrate._rollback(caller regrole, name text, dry_run boolean DEFAULT false, skip text[] DEFAULT '{}') RETURNS text
LANGUAGE sql AS $$ SELECT migrate._switch(caller, name, 'source', coalesce(dry_run, false), skip) $$;

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

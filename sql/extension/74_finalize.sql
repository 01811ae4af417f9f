-- The contract: what the migration added goes, and on demand, by name, the old table or its moved columns; and drop, which
-- forgets a migration that has ended or not begun.

-- The window, and whether finalize may pass it.
CREATE FUNCTION migrate._require_window_closed(m migrate._migration, force text) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    closes timestamptz := m.cut_over_at + migrate._opt_ms(m.id, 'rollback_window') * interval '1 ms';
BEGIN
    IF force IS NOT NULL AND force <> m.name THEN
        PERFORM migrate._raise('22023', format('force is "%s", not the name of the migration', force), '',
            format('SELECT migrate.finalize(%L, force => %L); finalizes although the rollback window is open.', m.name, m.name));
    ELSIF force IS NULL AND clock_timestamp() < closes THEN
        PERFORM migrate._raise('55000', format('the rollback window of migration "%s" is open until %s', m.name, date_trunc('second', closes)),
            format('It was cut over at %s, and rollback_window is %s.', date_trunc('second', m.cut_over_at), migrate._opt(m.id, 'rollback_window')),
            format('Wait until then, or give up the way back now: SELECT migrate.finalize(%L, force => %L);', m.name, m.name));
    END IF;
END $$;

-- How to look for the rows of a source that no flow of these has, by its filter.
CREATE FUNCTION migrate._count_left_out(flows integer[]) RETURNS text
LANGUAGE sql STABLE AS $$
    SELECT string_agg(format('SELECT count(*) FROM %s WHERE %s; counts the rows that %s out.', x.source, x.condition, CASE x.n WHEN 1 THEN 'the filter leaves' ELSE 'all filters leave' END), ' ')
    FROM (SELECT f.source, string_agg(format('(%s) IS NOT TRUE', btrim(f.filter, E' \n\t')), ' AND ' ORDER BY f.id) AS condition, count(*) AS n
          FROM migrate._flow f WHERE f.id = ANY (flows) GROUP BY f.source ORDER BY min(f.id)) x
$$;

-- A source goes with the rows that a filter kept out of a target, and with columns that were added since define: not without the
-- migration's name. (That the filters of several flows leave no row out together cannot be proven.)
CREATE FUNCTION migrate._require_nothing_left_out(m migrate._migration, force text) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    lines text := (SELECT string_agg(c, E'\n') FROM migrate._columns_added(m.id) c);
    flows integer[];
BEGIN
    IF lines IS NOT NULL AND force IS DISTINCT FROM m.name THEN
        PERFORM migrate._raise('55000', format('the source of migration "%s" has columns that are nowhere else', m.name), lines,
            format('Copy them to where they belong. If they may be lost: SELECT migrate.finalize(%L, drop_source => true, force => %L);', m.name, m.name));
    END IF;
    SELECT string_agg(l.line, E'\n' ORDER BY l.flow), array_agg(l.flow) INTO lines, flows FROM migrate._rows_left_out(m.id) l;
    IF flows IS NOT NULL AND force IS DISTINCT FROM m.name THEN
        PERFORM migrate._raise('55000', format('the source of migration "%s" may have rows that are nowhere else', m.name), lines,
            format('%s If they may be lost: SELECT migrate.finalize(%L, drop_source => true, force => %L);', migrate._count_left_out(flows), m.name, m.name));
    END IF;
END $$;

-- After cutover some old client may have written to a source what its target refused: with the record of that would go the last trace of
-- a write that was acknowledged, and with the source the write itself.
CREATE FUNCTION migrate._require_writes_carried(m migrate._migration, drop_source boolean, force text) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    w record;
BEGIN
    FOR w IN SELECT * FROM migrate._refused_writes(m.id, 'forward') LOOP
        IF NOT drop_source AND force IS NOT DISTINCT FROM m.name THEN
            RAISE WARNING '%', w.line USING DETAIL = w.states;
            CONTINUE;
        END IF;
        PERFORM migrate._raise('55000', w.line, w.states,
            format('SELECT * FROM migrate.failures WHERE migration = %1$L; names them. Mend the rows, or the target, then SELECT migrate.retry(%1$L); or let them stay in the source alone: SELECT migrate.finalize(%1$L, force => %1$L);', m.name));
    END LOOP;
END $$;

-- What a filter kept out of a target, one line for each flow that has one and whose source is still there.
CREATE FUNCTION migrate._rows_left_out(m_id integer) RETURNS TABLE (flow integer, source regclass, line text)
LANGUAGE sql STABLE AS $$
    SELECT f.id, f.source, format('rows of %s that the filter of flow "%s" leaves out (%s) are not in %s', f.source, f.name, btrim(f.filter, E' \n\t'), f.target)
    FROM migrate._flow f JOIN pg_class c ON c.oid = f.source WHERE f.migration = m_id AND f.filter IS NOT NULL
$$;

-- Raises: the column is carried for no row, or for those of filters alone.
CREATE FUNCTION migrate._refuse_not_carried(m migrate._migration, relation regclass, column_name name) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    flows integer[] := ARRAY(SELECT f.id FROM migrate._flow f JOIN migrate._mapping p ON p.flow = f.id AND p.direction = 'forward' JOIN pg_class c ON c.oid = p.view,
        LATERAL migrate._view_body(p.view) b JOIN pg_attribute a ON a.attnum > 0 AND b.yields && ARRAY[a.attnum, 0::int2]
        WHERE f.migration = m.id AND f.source = relation AND p.filtered AND a.attrelid = relation AND a.attname = column_name);
    last_resort text := format('If they may be lost: ALTER TABLE %s DROP COLUMN %I; after finalize.', relation, column_name);
BEGIN
    IF flows = '{}' THEN
        PERFORM migrate._raise('55000', format('column "%s" of %s is not carried to a target', column_name, relation), 'Its values are nowhere else.', last_resort);
    END IF;
    PERFORM migrate._raise('55000', format('column "%s" of %s is not carried to a target for every row', column_name, relation),
        concat_ws(E'\n', (SELECT string_agg(l.line, E'\n' ORDER BY l.flow) FROM migrate._rows_left_out(m.id) l WHERE l.flow = ANY (flows)), 'Their values are nowhere else.'),
        concat_ws(' ', migrate._count_left_out(flows), last_resort));
END $$;

-- The columns to drop, each with its source: carried for every row, and part of no key.
CREATE FUNCTION migrate._columns_to_drop(m migrate._migration, names text[]) RETURNS TABLE (relation regclass, column_name name)
LANGUAGE plpgsql AS $$
DECLARE
    n text;
    hits integer;
    carried boolean;
    keyed boolean;
BEGIN
    FOR n IN SELECT u.name FROM unnest(names) WITH ORDINALITY AS u(name, i) GROUP BY u.name ORDER BY min(u.i) LOOP
        SELECT count(DISTINCT a.attrelid), bool_or(NOT p.filtered AND p.reads && ARRAY[a.attnum, 0::int2]), bool_or(a.attnum = ANY (p.key_origin)), min(a.attrelid)::regclass, min(a.attname::text)::name
        INTO hits, carried, keyed, relation, column_name
        FROM migrate._flow f JOIN migrate._mapping p ON p.flow = f.id AND p.direction = 'forward' JOIN pg_attribute a ON a.attrelid = f.source
        WHERE f.migration = m.id AND a.attname = n AND a.attnum > 0 AND NOT a.attisdropped;
        IF hits = 0 OR n IS NULL THEN
            PERFORM migrate._raise('42703', format('no source of migration "%s" has a column "%s"', m.name, n));
        ELSIF hits > 1 THEN
            PERFORM migrate._raise('42702', format('%s sources of migration "%s" have a column "%s"', hits, m.name, n), '',
                'Finalize without it, then drop it by ALTER TABLE … DROP COLUMN ….');
        ELSIF keyed THEN
            PERFORM migrate._raise('42P10', format('column "%s" of %s is part of the key', n, relation), 'Without it the rest of the table''s rows cannot be told apart.');
        ELSIF NOT carried THEN
            PERFORM migrate._refuse_not_carried(m, relation, column_name);
        END IF;
        RETURN NEXT;
    END LOOP;
END $$;

-- What stands in the way of dropping tables, or a column, as statements that take it away: the views that read a view before that one.
CREATE FUNCTION migrate._drop_hints(tables regclass[], column_name text DEFAULT NULL) RETURNS text
LANGUAGE sql STABLE AS $$
    WITH RECURSIVE reads AS (
        SELECT d.refobjid AS relation, d.refobjsubid AS attnum, r.ev_class AS reader FROM pg_depend d JOIN pg_rewrite r ON d.classid = 'pg_rewrite'::regclass AND r.oid = d.objid
        WHERE d.refclassid = 'pg_class'::regclass AND r.ev_class <> d.refobjid
    ), reader AS (
        SELECT x.reader, 1 AS depth FROM reads x LEFT JOIN pg_attribute a ON a.attrelid = x.relation AND a.attnum = x.attnum
        WHERE x.relation = ANY (tables) AND x.reader <> ALL (tables) AND (column_name IS NULL OR a.attname = column_name)
        UNION SELECT x.reader, v.depth + 1 FROM reader v JOIN reads x ON x.relation = v.reader AND v.depth < 100
    )
    SELECT coalesce(string_agg(h, ' ' ORDER BY depth DESC, h), 'Change what depends on it, then call this again.') FROM (
        SELECT format('ALTER TABLE %s DROP CONSTRAINT %I;', c.conrelid::regclass, c.conname) AS h, 101 AS depth FROM pg_constraint c
        WHERE c.contype = 'f' AND c.confrelid = ANY (tables) AND c.conrelid <> ALL (tables) AND c.conparentid = 0
          AND (column_name IS NULL OR EXISTS (SELECT FROM pg_attribute a WHERE a.attrelid = c.confrelid AND a.attname = column_name AND a.attnum = ANY (c.confkey)))
        UNION ALL
        SELECT format('DROP %sVIEW %s;', CASE c.relkind WHEN 'm' THEN 'MATERIALIZED ' ELSE '' END, c.oid::regclass), max(v.depth)
        FROM reader v JOIN pg_class c ON c.oid = v.reader GROUP BY c.oid, c.relkind) x
$$;

-- What goes by itself with a column, or with a whole table: indexes, constraints, owned sequences; triggers and policies. (NOT NULL, which
-- is a constraint since PostgreSQL 18, is of the column.)
CREATE FUNCTION migrate._goes_along(relation oid, column_name text DEFAULT NULL) RETURNS text
LANGUAGE sql STABLE AS $$
    SELECT coalesce(', with ' || string_agg(DISTINCT pg_describe_object(d.classid, d.objid, d.objsubid), ', '), '')
    FROM pg_depend d LEFT JOIN pg_attribute a ON a.attrelid = d.refobjid AND a.attnum = d.refobjsubid
    WHERE d.refclassid = 'pg_class'::regclass AND d.refobjid = relation AND (column_name IS NULL OR a.attname = column_name) AND d.deptype = 'a'
      AND d.classid IN ('pg_class'::regclass, 'pg_constraint'::regclass, 'pg_trigger'::regclass, 'pg_policy'::regclass)
      AND NOT EXISTS (SELECT FROM pg_constraint k WHERE d.classid = 'pg_constraint'::regclass AND k.oid = d.objid AND k.contype = 'n')
$$;

-- Runs a DROP that cascades to nothing; what depends on the object is reported with the statements that would free it: as an error,
-- or, where `report`, as text.
CREATE FUNCTION migrate._drop_restricted(command text, what text, relation regclass, column_name text, report boolean) RETURNS text
LANGUAGE plpgsql AS $$
DECLARE
    dependents text;
    hints text := migrate._drop_hints(ARRAY[relation], column_name);
    along text := migrate._goes_along(relation, column_name);
BEGIN
    EXECUTE command;
    RETURN what || ' is dropped' || along;
EXCEPTION WHEN dependent_objects_still_exist THEN
    GET STACKED DIAGNOSTICS dependents = PG_EXCEPTION_DETAIL;
    IF report THEN
        RETURN format(E'%s cannot be dropped:\n%s\n%s', what, dependents, hints);
    END IF;
    PERFORM migrate._raise('2BP01', format('%s cannot be dropped because other objects depend on it', what),
        dependents || E'\nNothing was finalized.', hints);
END $$;

-- The migration's own objects, which finalize drops.
CREATE FUNCTION migrate._finalize_list(m_id integer) RETURNS SETOF text
LANGUAGE sql STABLE AS $$
    SELECT l.line FROM (
        SELECT 1 AS rank, format('trigger %I on %s', g.tgname, g.tgrelid::regclass) AS line FROM pg_trigger g JOIN migrate._mapping p
            ON g.tgname IN (format('!migrate_%s_%s_row', p.flow, p.direction), format('!migrate_%s_%s_flush', p.flow, p.direction), format('!migrate_%s_%s_truncate', p.flow, p.direction))
        JOIN migrate._flow f ON f.id = p.flow WHERE f.migration = m_id AND g.tgparentid = 0 AND NOT g.tgisinternal
        UNION ALL
        SELECT 2, format('%s mapping, view %s', p.direction, p.view) FROM migrate._mapping p JOIN migrate._flow f ON f.id = p.flow WHERE f.migration = m_id
    ) l ORDER BY l.rank, l.line
$$;

-- Sequences of a table that is to go with its partitions, on which a default elsewhere still depends: they go over to that column, or to
-- nobody where owner or schema differ.
CREATE FUNCTION migrate._keep_sequences(source regclass) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    goes regclass[] := ARRAY(SELECT migrate._partition_tree(source));
    s record;
BEGIN
    FOR s IN
        SELECT DISTINCT ON (q.oid) q.oid::regclass AS sequence, e.adrelid::regclass AS heir, a.attname, t.relkind IN ('r', 'p')
               AND t.relowner = q.relowner AND t.relnamespace = q.relnamespace AS fits
        FROM pg_depend o JOIN pg_class q ON q.oid = o.objid AND q.relkind = 'S'
        JOIN pg_depend d ON d.classid = 'pg_attrdef'::regclass AND d.refclassid = 'pg_class'::regclass AND d.refobjid = q.oid
        JOIN pg_attrdef e ON e.oid = d.objid AND e.adrelid <> ALL (goes)
        JOIN pg_attribute a ON a.attrelid = e.adrelid AND a.attnum = e.adnum
        JOIN pg_class t ON t.oid = e.adrelid
        WHERE o.classid = 'pg_class'::regclass AND o.refclassid = 'pg_class'::regclass AND o.refobjid = ANY (goes) AND o.refobjsubid > 0 AND o.deptype = 'a'
        ORDER BY q.oid, t.relkind IN ('r', 'p') DESC, t.relispartition, e.adrelid
    LOOP
        EXECUTE format('ALTER SEQUENCE %s OWNED BY %s', migrate._relation_name(s.sequence),
                       CASE WHEN s.fits THEN format('%s.%I', migrate._relation_name(s.heir), s.attname) ELSE 'NONE' END);
        RAISE NOTICE 'sequence % stays for column % of %', s.sequence, s.attname, s.heir;
    END LOOP;
END $$;

-- Under the locks. `columns` is a JSON array of {relation, column_name}. dry_run: gives more lines, and goes on where a DROP is refused.
CREATE FUNCTION migrate._finalize_now(m_id integer, caller regrole, drop_source boolean, columns jsonb, dry_run boolean, force text) RETURNS text
LANGUAGE plpgsql AS $$
DECLARE
    m migrate._migration := (SELECT x FROM migrate._migration x WHERE x.id = m_id);
    did text[] := CASE WHEN dry_run THEN ARRAY(SELECT l || ' is dropped' FROM migrate._finalize_list(m_id) l) ELSE '{}' END;
    lost text[] := CASE WHEN drop_source THEN ARRAY(SELECT x.line FROM migrate._rows_left_out(m_id) x ORDER BY x.flow) || ARRAY(SELECT migrate._columns_added(m_id)) ELSE '{}' END;
    r record;
    l text;
BEGIN
    IF m.phase <> 'finalized' THEN
        -- @point finalize: locks taken
        PERFORM migrate._require_writes_carried(m, drop_source, force) WHERE NOT dry_run;
        PERFORM migrate._drop_triggers(m, 'forward');
        PERFORM migrate._drop_triggers(m, 'reverse');
        -- @point finalize: triggers dropped
        PERFORM migrate._drop_mapping_views(m_id);
        -- @point finalize: mapping views dropped
        DELETE FROM migrate._requeue q USING migrate._flow f WHERE f.id = q.flow AND f.migration = m_id;
        DELETE FROM migrate._failure x USING migrate._flow f WHERE f.id = x.flow AND f.migration = m_id;
        DELETE FROM migrate._swapped x WHERE x.migration = m_id;
        DELETE FROM migrate._watch w WHERE w.migration = m_id;
        UPDATE migrate._migration x SET both_directions = false, throttled_since = NULL, throttled_reason = NULL WHERE x.id = m_id RETURNING * INTO m;
        m := migrate._move(m, caller, 'finalized', 'finalize');
        -- @point finalize: phase moved
        did := did || 'dual writes and mapping views are removed'::text;
    END IF;
    FOR r IN SELECT * FROM jsonb_to_recordset(columns) AS c(relation oid, column_name text) LOOP
        did := did || migrate._drop_restricted(format('ALTER TABLE %s DROP COLUMN %I', migrate._relation_name(r.relation), r.column_name),
                                               format('column "%s" of %s', r.column_name, r.relation::regclass), r.relation, r.column_name, dry_run);
        -- @point finalize: column dropped
    END LOOP;
    FOREACH l IN ARRAY lost LOOP
        IF NOT dry_run THEN
            RAISE WARNING '%: they go with the table', l;
        END IF;
        did := did || l;
    END LOOP;
    FOR r IN SELECT DISTINCT f.source AS relation FROM migrate._flow f JOIN pg_class c ON c.oid = f.source
             WHERE f.migration = m_id AND drop_source LOOP
        PERFORM migrate._keep_sequences(r.relation);
        did := did || migrate._drop_restricted(format('DROP TABLE %s', migrate._relation_name(r.relation)), 'table ' || r.relation::regclass, r.relation, NULL, dry_run);
        -- @point finalize: source dropped
    END LOOP;
    PERFORM migrate._event(m, caller, 'finalize', array_to_string(did, '; '));
    -- @point finalize: event written
    RETURN array_to_string(did, CASE WHEN dry_run THEN E'\n' ELSE '; ' END);
END $$;

CREATE FUNCTION migrate._drop_mapping_views(m_id integer) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    v regclass;
BEGIN
    FOR v IN SELECT p.view FROM migrate._mapping p JOIN migrate._flow f ON f.id = p.flow JOIN pg_class c ON c.oid = p.view WHERE f.migration = m_id LOOP
        EXECUTE format('DROP VIEW %s', migrate._relation_name(v));
    END LOOP;
    DELETE FROM migrate._mapping p USING migrate._flow f WHERE f.id = p.flow AND f.migration = m_id;
END $$;

CREATE FUNCTION migrate._finalize(caller regrole, name text, drop_source boolean DEFAULT false, drop_columns text[] DEFAULT '{}', force text DEFAULT NULL,
                                  dry_run boolean DEFAULT false) RETURNS text
LANGUAGE plpgsql AS $$
DECLARE
    m migrate._migration := migrate._lock(caller, name);
    columns jsonb;
    tables regclass[];
    done record;
    refused text;
BEGIN
    dry_run := coalesce(dry_run, false);
    drop_source := coalesce(drop_source, false);
    drop_columns := coalesce(drop_columns, '{}');
    IF m.phase = 'finalized' AND drop_columns <> '{}' THEN
        PERFORM migrate._raise('55000', format('migration "%s" is finalized', m.name), 'Which columns it carried is not known any more.',
            'ALTER TABLE … DROP COLUMN …; drops a column.');
    ELSIF m.phase = 'finalized' AND NOT (drop_source AND EXISTS (SELECT FROM migrate._flow f JOIN pg_class c ON c.oid = f.source WHERE f.migration = m.id)) THEN
        RAISE NOTICE 'migration "%" is finalized already', m.name;
        RETURN 'finalized -> finalized';
    ELSIF m.phase NOT IN ('cut_over', 'finalized') THEN
        PERFORM migrate._raise('55000', format('migration "%s" cannot be finalized in phase %s', m.name, m.phase), 'It can in phase cut_over.',
            CASE m.phase WHEN 'ready' THEN format('SELECT migrate.cutover(%L); comes first.', m.name)
                         WHEN 'cancelled' THEN format('SELECT migrate.drop(%L); forgets it.', m.name) ELSE '' END);
    ELSIF drop_source AND drop_columns <> '{}' THEN
        PERFORM migrate._raise('22023', 'drop_source and drop_columns exclude each other', 'The columns go with the table.');
    END IF;
    BEGIN
        IF m.phase = 'cut_over' THEN
            PERFORM migrate._require_window_closed(m, force);
            PERFORM migrate._require_writes_carried(m, drop_source, force) WHERE drop_source OR force IS NULL;
        END IF;
        IF drop_source THEN
            PERFORM migrate._require_nothing_left_out(m, force);
        END IF;
    EXCEPTION WHEN object_not_in_prerequisite_state THEN
        IF NOT dry_run THEN
            RAISE;
        END IF;
        refused := 'refused now: ' || sqlerrm;
    END;
    PERFORM migrate._require_restored(m, 'finalized');
    BEGIN  -- undone, so that no lock of what is read here stays
        SELECT coalesce(jsonb_agg(jsonb_build_object('relation', c.relation::oid, 'column_name', c.column_name)), '[]') INTO columns
        FROM migrate._columns_to_drop(m, drop_columns) c;
        WITH own AS (
            SELECT r, s.root = f.source AS old FROM migrate._flow f, LATERAL unnest(ARRAY[f.source, f.target]) s(root), LATERAL migrate._partition_tree(s.root) r
            WHERE f.migration = m.id AND EXISTS (SELECT FROM pg_class c WHERE c.oid = s.root)
        ), referenced AS (  -- by a foreign key that goes along, which is dropped on both tables
            SELECT k.confrelid::regclass FROM own JOIN pg_constraint k ON k.contype = 'f' AND k.conrelid = own.r
            WHERE own.old AND (drop_source OR EXISTS (SELECT FROM pg_attribute a WHERE a.attrelid = k.conrelid AND a.attnum = ANY (k.conkey) AND a.attname = ANY (drop_columns)))
        ) SELECT coalesce(array_agg(x.r ORDER BY x.r), '{}') INTO tables FROM (SELECT own.r FROM own UNION TABLE referenced) x;
        PERFORM migrate._undo();
    EXCEPTION WHEN SQLSTATE 'MGUND' THEN NULL;
    END;
    SELECT * INTO done FROM migrate._under_locks(m, caller, 'be finalized', tables, array_fill('ACCESS EXCLUSIVE'::text, ARRAY[cardinality(tables)]),
        format('SELECT migrate._finalize_now(%s, %L, %L, %L, %L, %L)', m.id, caller, drop_source, columns, dry_run, force),
        clock_timestamp() + migrate._opt_ms(m.id, 'cutover_timeout') * interval '1 ms', dry_run);
    IF dry_run THEN
        RETURN concat_ws(E'\n', format('%s -> %s (dry run: undone)', m.phase, m.phase), refused, done.result,
            format('locks: all got at attempt %s within %s ms, held for %s ms', done.attempts, done.lock_ms, done.held_ms));
    END IF;
    RETURN format('%s -> finalized: %s', m.phase, done.result);
END $$;

-- Deletes the migration with everything that hangs on it, but its events.
CREATE FUNCTION migrate._forget(m_id integer) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    flows integer[] := ARRAY(SELECT f.id FROM migrate._flow f WHERE f.migration = m_id);
BEGIN
    DELETE FROM migrate._failure x WHERE x.flow = ANY (flows);
    DELETE FROM migrate._requeue x WHERE x.flow = ANY (flows);
    DELETE FROM migrate._gap x WHERE x.flow = ANY (flows);
    DELETE FROM migrate._range x WHERE x.flow = ANY (flows);
    DELETE FROM migrate._deferred x WHERE x.flow = ANY (flows);
    DELETE FROM migrate._view x WHERE x.migration = m_id;
    DELETE FROM migrate._swapped x WHERE x.migration = m_id;
    DELETE FROM migrate._mapping x WHERE x.flow = ANY (flows);
    DELETE FROM migrate._flow x WHERE x.migration = m_id;
    DELETE FROM migrate._option x WHERE x.migration = m_id;
    DELETE FROM migrate._migration x WHERE x.id = m_id;
END $$;

-- Forgets a migration. Its events stay.
CREATE FUNCTION migrate._drop(caller regrole, name text) RETURNS text
LANGUAGE plpgsql AS $$
DECLARE
    m migrate._migration;
    left_over text;
BEGIN
    IF NOT EXISTS (SELECT FROM migrate._migration x WHERE x.name = _drop.name)
       AND EXISTS (SELECT FROM migrate._event e WHERE e.name = _drop.name AND e.kind = 'drop'
                   AND EXISTS (SELECT FROM pg_roles r WHERE r.oid = e.owner) AND pg_has_role(caller, e.owner, 'MEMBER')) THEN
        RAISE NOTICE 'migration "%" is dropped already', name;
        RETURN 'dropped -> dropped';
    END IF;
    m := migrate._lock(caller, name);
    IF m.phase NOT IN ('planned', 'cancelled', 'finalized') THEN
        PERFORM migrate._raise('55000', format('migration "%s" cannot be dropped in phase %s', m.name, m.phase),
            'It can in phases planned, cancelled and finalized.',
            CASE m.phase WHEN 'cut_over' THEN format('SELECT migrate.finalize(%L); ends it.', m.name) ELSE format('SELECT migrate.cancel(%L); ends it.', m.name) END);
    END IF;
    PERFORM migrate._require_restored(m, 'dropped');
    PERFORM migrate._tell_given_up(m);
    IF m.phase <> 'finalized' THEN
        -- A validation of the migration may still be reading the mapping views.
        left_over := migrate._dismantle(m, caller, 'be dropped',
            ARRAY(SELECT p.view FROM migrate._mapping p JOIN migrate._flow f ON f.id = p.flow JOIN pg_class c ON c.oid = p.view WHERE f.migration = m.id ORDER BY 1));
        -- @point drop: views restored
    END IF;
    PERFORM migrate._drop_mapping_views(m.id);
    -- @point drop: mapping views dropped
    PERFORM migrate._event(m, caller, 'drop', left_over);
    PERFORM migrate._forget(m.id);
    -- @point drop: migration deleted
    RETURN format('%s -> dropped', m.phase) || coalesce(', ' || left_over, '');
END $$;

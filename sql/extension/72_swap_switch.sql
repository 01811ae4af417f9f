-- A swap as the switch sees it: what may be set, its gate, its locks, and there and back under them.

-- Whether this migration's target has its source's name now.
CREATE FUNCTION migrate._is_swapped(m_id integer) RETURNS boolean
LANGUAGE sql STABLE AS $$ SELECT EXISTS (SELECT FROM migrate._swapped s WHERE s.migration = m_id) $$;

-- Option cutover is to become swap, or is it no more.
CREATE FUNCTION migrate._require_swap_change(m migrate._migration, after text) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    s migrate._swap_step;
BEGIN
    IF m.phase = 'cut_over' THEN
        PERFORM migrate._raise('55000', 'option "cutover" cannot be changed to or from swap while the target serves', format('Migration "%s" is cut over.', m.name), format('SELECT migrate.rollback(%L); comes first.', m.name));
    ELSIF after = 'swap' THEN
        SELECT * INTO s FROM migrate._swap_structure(m) LIMIT 1;
        IF FOUND THEN
            PERFORM migrate._raise('55000', format('migration "%s" cannot be cut over by swap', m.name), s.says || '.', s.forward[1]);
        END IF;
    END IF;
END $$;

-- For preflight: what a swap does, what it leaves behind, what it cannot do.
CREATE FUNCTION migrate._check_swap(m migrate._migration, caller regrole) RETURNS SETOF migrate._check
LANGUAGE plpgsql STABLE AS $$
BEGIN
    IF migrate._opt(m.id, 'cutover') = 'swap' AND m.phase NOT IN ('cut_over', 'finalized', 'cancelled') AND NOT EXISTS (SELECT FROM migrate._check_flows(m)) THEN
        RETURN QUERY SELECT 'swap', CASE s.kind WHEN 'refused' THEN 'error' WHEN 'warning' THEN 'warning' ELSE 'info' END, s.says, CASE WHEN s.kind IN ('refused', 'warning') THEN s.forward[1] ELSE '' END
                     FROM migrate._swap_steps(m, caller) s;
    END IF;
END $$;

-- What a preflight finds of what a switch leaves behind is not so where a swap carries it.
CREATE FUNCTION migrate._swap_answers(m_id integer, found migrate._check) RETURNS boolean
LANGUAGE sql STABLE AS $$
    SELECT found.severity <> 'error' AND found.name IN ('referencing_keys', 'dependents', 'sequences', 'grants', 'publication', 'defaults', 'row_security')
       AND migrate._opt(m_id, 'cutover') = 'swap'
$$;

CREATE FUNCTION migrate._plan_swap(m migrate._migration, caller regrole) RETURNS text
LANGUAGE plpgsql STABLE AS $$
BEGIN
    IF migrate._opt(m.id, 'cutover') IS DISTINCT FROM 'swap' THEN
        RETURN NULL;
    ELSIF migrate._is_swapped(m.id) THEN
        RETURN E'## What rollback puts back (cutover = swap)\n\n' || (SELECT string_agg('- ' || migrate._plan_cell(s.object), E'\n' ORDER BY s.ordinal) FROM migrate._swapped s WHERE s.migration = m.id AND s.inverse IS NOT NULL);
    END IF;
    RETURN (SELECT E'## What cutover moves (cutover = swap)\n\nIn this order, in one transaction; rollback does it the other way.\n\n'
                   || coalesce(string_agg('- ' || CASE s.kind WHEN 'refused' THEN '**refused**: ' WHEN 'warning' THEN '**mind**: ' WHEN 'note' THEN 'not moved: ' ELSE '' END || migrate._plan_cell(s.says), E'\n' ORDER BY s.i), '')
            FROM migrate._swap_steps(m, caller) WITH ORDINALITY AS s(rank, kind, object, says, relation, role, forward, inverse, validates, i));
END $$;

CREATE FUNCTION migrate._swap_gate(m migrate._migration, caller regrole, side text, OUT problem text, OUT hint text)
LANGUAGE plpgsql STABLE AS $$
BEGIN
    IF side = 'target' AND migrate._opt(m.id, 'cutover') = 'swap' AND NOT migrate._is_swapped(m.id) THEN
        SELECT string_agg(s.says, '; '), string_agg(s.forward[1], E'\n') INTO problem, hint FROM migrate._swap_steps(m, caller) s WHERE s.kind = 'refused';
    ELSIF side = 'source' THEN
        SELECT f.problem, f.hint INTO problem, hint FROM migrate._swapped_foreign(m.id, caller) f;
    END IF;
END $$;

-- What of a swap the caller may not undo, for somebody else owns it.
CREATE FUNCTION migrate._swapped_foreign(m_id integer, caller regrole, OUT problem text, OUT hint text)
LANGUAGE sql STABLE AS $$
    SELECT string_agg(DISTINCT format('%s belongs to %s, of which %s is not a member', s.object, r.role, caller), '; '), min(format('GRANT %s TO %s;', r.role, caller))
    FROM migrate._swapped s, LATERAL (SELECT migrate._swapped_role(s) AS role) r WHERE s.migration = m_id AND NOT pg_has_role(caller, r.role, 'MEMBER')
$$;

-- Who is to undo it: the present owner, where there is one; of an index, a sequence or a statistics object that the step names.
CREATE FUNCTION migrate._swapped_role(s migrate._swapped) RETURNS regrole
LANGUAGE sql STABLE AS $$
    SELECT CASE s.kind WHEN 'publication' THEN s.role
                       WHEN 'function' THEN coalesce((SELECT p.proowner::regrole FROM pg_proc p WHERE p.oid = to_regprocedure(s.object)), s.role)
                       ELSE coalesce(migrate._table_owner(s.relation),
                                     (SELECT c.relowner::regrole FROM pg_class c WHERE n[1] <> 'STATISTICS' AND c.oid = to_regclass(n[2])),
                                     (SELECT e.stxowner::regrole FROM pg_statistic_ext e WHERE n[1] = 'STATISTICS' AND format('%I.%I', (SELECT x.nspname FROM pg_namespace x WHERE x.oid = e.stxnamespace), e.stxname) = n[2]),
                                     s.role) END
    FROM regexp_match(s.inverse[1], '^(?:ALTER|COMMENT ON) (INDEX|SEQUENCE|STATISTICS) ((?:"(?:[^"]|"")+"|[^" .]+)\.(?:"(?:[^"]|"")+"|[^" .]+))') n
$$;

-- What the swap locks beside the tables of the flows: views (1), tables that reference or are referenced (2), sequences (3). A foreign key
-- that is dropped is dropped on both tables: on the way back, and so in its rehearsal, those that cutover adds to the target.
CREATE FUNCTION migrate._swap_locks(m_ids integer[], side text) RETURNS TABLE (rank integer, relation regclass, mode text)
LANGUAGE sql VOLATILE AS $$
    WITH m AS (SELECT x FROM migrate._migration x WHERE x.id = ANY (m_ids) AND (migrate._opt(x.id, 'cutover') = 'swap' OR migrate._is_swapped(x.id))
    ), steps AS (
        SELECT s.* FROM m, LATERAL migrate._swap_steps(m.x, (m.x).owner) s WHERE NOT migrate._is_swapped((m.x).id)
    ), changed AS (
        SELECT s.relation::regclass FROM steps s
        UNION SELECT s.relation FROM m JOIN migrate._swapped s ON s.migration = (m.x).id
        UNION SELECT r FROM m JOIN migrate._flow f ON f.migration = (m.x).id, LATERAL (SELECT migrate._partition_tree(f.source) UNION SELECT migrate._partition_tree(f.target)) t(r)
        UNION SELECT r FROM m JOIN migrate._swapped s ON s.migration = (m.x).id AND s.kind = 'key' JOIN pg_constraint k ON k.contype = 'f' AND k.conrelid = s.relation
              AND starts_with(s.object, format('foreign key %I of ', k.conname)), LATERAL migrate._partition_tree(k.confrelid) r
        UNION SELECT r FROM steps s JOIN pg_constraint k ON k.contype = 'f' AND s.object = format('foreign key %I of %s', k.conname, k.conrelid::regclass),
              LATERAL migrate._partition_tree(k.confrelid) r WHERE side = 'source' AND s.kind = 'key'
    )
    SELECT CASE k.relkind WHEN 'v' THEN 1 WHEN 'S' THEN 3 ELSE 2 END, c.relation, 'ACCESS EXCLUSIVE' FROM changed c JOIN pg_class k ON k.oid = c.relation
    UNION
    SELECT 2, k.confrelid::regclass, 'SHARE ROW EXCLUSIVE' FROM m JOIN migrate._flow f ON f.migration = (m.x).id JOIN pg_constraint k ON k.contype = 'f' AND k.conrelid IN (f.source, f.target)
$$;

-- Everything that _swap_steps() reads, as far as anybody but a switch changes it; so the list that was made before the locks is used
-- under them where nothing has changed meanwhile, and the application does not wait for its making.
CREATE FUNCTION migrate._swap_version(m_id integer) RETURNS text
LANGUAGE plpgsql STABLE AS $$
DECLARE
    tables oid[] := ARRAY(SELECT r.oid FROM migrate._flow f, LATERAL (VALUES (f.source::oid), (f.target::oid)) r(oid) WHERE f.migration = m_id);
    depends oid[] := ARRAY(SELECT d.objid FROM pg_depend d WHERE d.refclassid = 'pg_class'::regclass AND d.refobjid = ANY (tables) AND d.classid <> 'pg_trigger'::regclass);
BEGIN
    RETURN (SELECT md5(string_agg(x.line, ',' ORDER BY x.line)) FROM (
        SELECT concat_ws(' ', c.oid, c.relname, c.relnamespace, c.relowner, c.relacl, c.reloptions, c.relreplident, c.relrowsecurity) AS line FROM pg_class c WHERE c.oid = ANY (tables || depends)
        UNION ALL SELECT concat_ws(' ', d.classid, d.objid, d.objsubid, d.refobjid, d.refobjsubid) FROM pg_depend d WHERE d.refclassid = 'pg_class'::regclass AND d.refobjid = ANY (tables) AND d.classid <> 'pg_trigger'::regclass
        UNION ALL SELECT concat_ws(' ', 'type', d.classid, d.objid) FROM pg_type t JOIN pg_depend d ON d.refclassid = 'pg_type'::regclass AND d.refobjid IN (t.oid, t.typarray) WHERE t.typrelid = ANY (tables)
        UNION ALL SELECT concat_ws(' ', 'column', a.attrelid, a.attnum, a.xmin) FROM pg_attribute a WHERE a.attrelid = ANY (tables)
        UNION ALL SELECT concat_ws(' ', 'default', a.oid, a.xmin) FROM pg_attrdef a WHERE a.adrelid = ANY (tables)
        UNION ALL SELECT concat_ws(' ', 'index', i.indexrelid, i.xmin) FROM pg_index i WHERE i.indrelid = ANY (tables)
        UNION ALL SELECT concat_ws(' ', 'constraint', k.oid, k.xmin) FROM pg_constraint k WHERE k.conrelid = ANY (tables) OR k.oid = ANY (depends)
        UNION ALL SELECT concat_ws(' ', 'trigger', g.oid, g.xmin) FROM pg_trigger g WHERE g.tgrelid = ANY (tables) AND NOT g.tgisinternal AND g.tgname NOT LIKE '!migrate%'
        UNION ALL SELECT concat_ws(' ', 'policy', p.oid, p.xmin) FROM pg_policy p WHERE p.polrelid = ANY (tables)
        UNION ALL SELECT concat_ws(' ', 'statistics', s.oid, s.xmin) FROM pg_statistic_ext s WHERE s.stxrelid = ANY (tables)
        UNION ALL SELECT concat_ws(' ', 'comment', s.objoid, s.objsubid, s.xmin) FROM pg_description s WHERE s.objoid = ANY (tables)
        UNION ALL SELECT concat_ws(' ', 'publication', p.oid, p.xmin, u.xmin) FROM pg_publication_rel p JOIN pg_publication u ON u.oid = p.prpubid WHERE p.prrelid = ANY (tables)
        UNION ALL SELECT concat_ws(' ', 'view', r.oid, r.xmin, c.relname, c.relowner, c.reloptions) FROM pg_rewrite r JOIN pg_class c ON c.oid = r.ev_class WHERE r.oid = ANY (depends)
        UNION ALL SELECT concat_ws(' ', 'function', p.oid, p.xmin) FROM pg_proc p WHERE p.oid = ANY (depends)
        UNION ALL SELECT concat_ws(' ', 'sequence', s.seqrelid, s.xmin) FROM pg_sequence s WHERE s.seqrelid = ANY (depends)) x);
END $$;

-- The steps, made before the locks, or NULL where there is no swap.
CREATE FUNCTION migrate._swap_planned(m migrate._migration, caller regrole) RETURNS jsonb
LANGUAGE sql VOLATILE AS $$
    SELECT jsonb_build_object('version', migrate._swap_version(m.id), 'steps', (SELECT jsonb_agg(to_jsonb(s)) FROM migrate._swap_steps(m, caller) s))
    WHERE migrate._opt(m.id, 'cutover') = 'swap' AND NOT migrate._is_swapped(m.id)
$$;

CREATE FUNCTION migrate._swap_execute(relation oid, pieces text[], role regrole) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    name text;
BEGIN
    SELECT format('%I.%I', n.nspname, c.relname) INTO name FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = relation;
    PERFORM migrate._as(role, array_to_string(pieces, coalesce(name, '')));
END $$;

-- Under the locks. Returns what it did, one line each.
CREATE FUNCTION migrate._swap_there(m migrate._migration, caller regrole, skipped text[], planned jsonb) RETURNS text[]
LANGUAGE plpgsql AS $$
DECLARE
    steps migrate._swap_step[];
    s migrate._swap_step;
BEGIN
    IF planned IS NULL THEN
        RETURN '{}';
    ELSIF planned ->> 'version' = migrate._swap_version(m.id) THEN
        steps := ARRAY(SELECT x FROM jsonb_populate_recordset(NULL::migrate._swap_step, planned -> 'steps') x);
    ELSE
        steps := ARRAY(SELECT x FROM migrate._swap_steps(m, caller) x);
    END IF;
    IF EXISTS (SELECT FROM unnest(steps) x WHERE x.kind = 'refused') AND ('swap' <> ALL (skipped) OR NOT EXISTS (SELECT FROM unnest(steps) x WHERE x.kind = 'name')) THEN
        PERFORM migrate._raise('55000', format('cutover of migration "%s" is refused by gate swap', m.name), (SELECT string_agg(x.says, E'\n') FROM unnest(steps) x WHERE x.kind = 'refused'),
            (SELECT string_agg(x.forward[1], E'\n') FROM unnest(steps) x WHERE x.kind = 'refused'));
    END IF;
    DELETE FROM migrate._deferred d USING migrate._flow f WHERE f.id = d.flow AND f.migration = m.id AND d.relation IS NOT NULL;
    INSERT INTO migrate._swapped
    SELECT m.id, x.i, (SELECT min(f.id) FROM migrate._flow f WHERE f.migration = m.id), x.kind, x.object, x.relation, x.role, x.inverse, x.validates
    FROM unnest(steps) WITH ORDINALITY AS x(rank, kind, object, says, relation, role, forward, inverse, validates, i) WHERE migrate._swap_is_done(x.kind);
    FOREACH s IN ARRAY steps LOOP
        CONTINUE WHEN NOT migrate._swap_is_done(s.kind);
        PERFORM migrate._swap_execute(s.relation, s.forward, s.role);
        -- @point swap: one step there
    END LOOP;
    PERFORM migrate._swap_validates(m);
    RETURN ARRAY(SELECT x.says FROM unnest(steps) x WHERE migrate._swap_is_done(x.kind));
END $$;

-- Undoes these steps. What is gone meanwhile is not made again: a relation or a function, and, where `spares`, whatever else a statement
-- does not find. (Of a table that changes its name, and of a view or a function that is there, a thing that is not found is another one.)
CREATE FUNCTION migrate._swap_undo(steps migrate._swapped[], spares boolean) RETURNS text[]
LANGUAGE plpgsql AS $$
DECLARE
    s migrate._swapped;
    gone boolean;
    did text[] := '{}';
BEGIN
    FOREACH s IN ARRAY steps LOOP
        gone := s.relation IS NOT NULL AND NOT EXISTS (SELECT FROM pg_class c WHERE c.oid = s.relation) OR s.kind = 'function' AND to_regprocedure(s.object) IS NULL;
        IF NOT gone AND spares AND s.kind NOT IN ('name', 'view', 'function') THEN
            BEGIN
                PERFORM migrate._swap_execute(s.relation, s.inverse, migrate._swapped_role(s));
            EXCEPTION WHEN undefined_object OR undefined_table OR undefined_column THEN
                gone := true;
                RAISE NOTICE '% is gone: nothing is put back', s.object USING DETAIL = sqlerrm || '.';
            END;
        ELSIF NOT gone THEN
            PERFORM migrate._swap_execute(s.relation, s.inverse, migrate._swapped_role(s));
        END IF;
        did := did || (s.object || CASE WHEN gone THEN ' is gone: nothing is put back' ELSE ' is put back' END);
        -- @point swap: one step back
    END LOOP;
    RETURN did;
END $$;

-- The other way: the names first, then all the rest, last to first. A view or a function is put back as it is now.
CREATE FUNCTION migrate._swap_back(m migrate._migration, caller regrole) RETURNS text[]
LANGUAGE plpgsql AS $$
DECLARE
    steps migrate._swapped[];
    did text[];
    theirs record;
BEGIN
    SELECT * INTO theirs FROM migrate._swapped_foreign(m.id, caller);
    IF theirs.problem IS NOT NULL THEN  -- (Skipping the gate gives nobody a right.)
        PERFORM migrate._raise('42501', format('role %s may not undo the swap of migration "%s"', caller, m.name), theirs.problem, theirs.hint);
    END IF;
    UPDATE migrate._swapped x SET inverse = CASE x.kind WHEN 'view' THEN migrate._swap_view_text(x.relation) ELSE ARRAY[pg_get_functiondef(to_regprocedure(x.object))] END
    WHERE x.migration = m.id AND (x.kind = 'view' AND EXISTS (SELECT FROM pg_class c WHERE c.oid = x.relation) OR x.kind = 'function' AND to_regprocedure(x.object) IS NOT NULL);
    steps := ARRAY(SELECT x FROM migrate._swapped x WHERE x.migration = m.id AND x.inverse IS NOT NULL ORDER BY x.kind = 'name' DESC, x.kind = 'comment', x.ordinal DESC);
    BEGIN
        did := migrate._swap_undo(steps, false);
    EXCEPTION WHEN undefined_object OR undefined_table OR undefined_column THEN
        did := migrate._swap_undo(steps, true);  -- once more, each in a subtransaction of its own: nobody else is to look through so many
    WHEN duplicate_table OR duplicate_object THEN
        PERFORM migrate._raise(SQLSTATE, format('the swap of migration "%s" cannot be undone: %s', m.name, SQLERRM), 'That name is the migration''s own: it is to be given back.',
            'Rename or drop what has taken it since the cutover, then call this again.');
    END;
    DELETE FROM migrate._deferred d USING migrate._flow f WHERE f.id = d.flow AND f.migration = m.id AND d.relation IS NOT NULL;
    PERFORM migrate._swap_validates(m);
    DELETE FROM migrate._swapped x WHERE x.migration = m.id;
    PERFORM migrate._swap_notice(m);
    RETURN did;
END $$;

-- What came to the new table after the cutover does not know of the old one.
CREATE FUNCTION migrate._swap_notice(m migrate._migration) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    x record;
BEGIN
    FOR x IN SELECT DISTINCT f.target, regexp_replace(pg_describe_object(d.classid, d.objid, 0), '^rule _RETURN on ', '') AS object FROM migrate._flow f JOIN pg_depend d ON d.refclassid = 'pg_class'::regclass AND d.refobjid = f.target
             LEFT JOIN pg_rewrite r ON d.classid = 'pg_rewrite'::regclass AND r.oid = d.objid LEFT JOIN pg_class c ON c.oid = r.ev_class
             LEFT JOIN pg_constraint k ON d.classid = 'pg_constraint'::regclass AND k.oid = d.objid
             WHERE f.migration = m.id AND (d.classid = 'pg_proc'::regclass OR k.confrelid = f.target AND k.conrelid <> f.target
                   OR c.relnamespace <> 'migrate'::regnamespace AND c.oid NOT IN (SELECT v.view FROM migrate._view v)) ORDER BY 2 LOOP
        RAISE NOTICE '% stays with table %', x.object, x.target USING DETAIL = 'It was not there when the table was swapped.';
    END LOOP;
END $$;

-- Foreign keys that the swap has added NOT VALID, and that a worker is to validate.
CREATE FUNCTION migrate._swap_validates(m migrate._migration) RETURNS void
LANGUAGE sql AS $$
    INSERT INTO migrate._deferred (flow, ordinal, kind, name, referenced, head, tail, relation, state)
    SELECT s.flow, coalesce((SELECT max(d.ordinal) FROM migrate._deferred d WHERE d.flow = s.flow), 0) + s.ordinal, 'foreign_key', k.conname, k.confrelid, h.head, substr(pg_get_constraintdef(k.oid), length(h.prefix)), k.conrelid, 'added'
    FROM migrate._swapped s JOIN pg_constraint k ON k.conrelid = s.relation AND k.contype = 'f' AND starts_with(s.object, format('foreign key %I of ', k.conname)), LATERAL migrate._foreign_key_head(k) h
    WHERE s.migration = m.id AND s.kind = 'key' AND s.validates AND NOT k.convalidated
$$;

-- Before the locks: the planner must not meet a table that it knows nothing of. Somebody else's VACUUM is no reason not to switch.
CREATE FUNCTION migrate._swap_analyze(m migrate._migration) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    t regclass;
    before text := current_setting('lock_timeout');
BEGIN
    FOR t IN SELECT f.target FROM migrate._flow f JOIN pg_class c ON c.oid = f.target WHERE f.migration = m.id AND migrate._opt(m.id, 'cutover') = 'swap' AND NOT migrate._is_swapped(m.id)
             AND (NOT EXISTS (SELECT FROM pg_statistic s WHERE s.starelid = f.target) OR pg_stat_get_mod_since_analyze(f.target) > 50 + c.reltuples / 10) LOOP
        BEGIN
            PERFORM set_config('lock_timeout', '1s', true);
            PERFORM migrate._as(migrate._table_owner(t), format('ANALYZE %s', migrate._relation_name(t)));
            PERFORM set_config('lock_timeout', before, true);
        EXCEPTION WHEN lock_not_available OR deadlock_detected THEN NULL;
        END;
    END LOOP;
END $$;

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
    IF migrate._opt(m.id, 'cutover') = 'swap' AND m.phase NOT IN ('cut_over', 'finalized', 'cancelled') THEN
        RETURN QUERY SELECT 'swap', CASE s.kind WHEN 'refused' THEN 'error' ELSE 'info' END, s.says, CASE s.kind WHEN 'refused' THEN s.forward[1] ELSE '' END
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
                   || coalesce(string_agg('- ' || CASE s.kind WHEN 'refused' THEN '**refused**: ' WHEN 'note' THEN 'not moved: ' ELSE '' END || migrate._plan_cell(s.says), E'\n' ORDER BY s.i), '')
            FROM migrate._swap_steps(m, caller) WITH ORDINALITY AS s(rank, kind, object, says, relation, role, forward, inverse, validates, i));
END $$;

CREATE FUNCTION migrate._swap_gate(m migrate._migration, caller regrole, side text, OUT problem text, OUT hint text)
LANGUAGE plpgsql STABLE AS $$
BEGIN
    IF side = 'target' AND migrate._opt(m.id, 'cutover') = 'swap' AND NOT migrate._is_swapped(m.id) THEN
        SELECT string_agg(s.says, '; '), string_agg(s.forward[1], E'\n') INTO problem, hint FROM migrate._swap_steps(m, caller) s WHERE s.kind = 'refused';
    ELSIF side = 'source' THEN
        SELECT string_agg(DISTINCT format('%s belongs to %s, of which %s is not a member', s.object, r.role, caller), '; '), min(format('GRANT %s TO %s;', r.role, caller)) INTO problem, hint
        FROM migrate._swapped s, LATERAL (SELECT migrate._swapped_role(s) AS role) r WHERE s.migration = m.id AND NOT pg_has_role(caller, r.role, 'MEMBER');
    END IF;
END $$;

-- Who is to undo it: the present owner, where there is one.
CREATE FUNCTION migrate._swapped_role(s migrate._swapped) RETURNS regrole
LANGUAGE sql STABLE AS $$ SELECT CASE WHEN s.kind = 'publication' THEN s.role ELSE coalesce(migrate._table_owner(s.relation), s.role) END $$;

-- What the swap locks beside the tables of the flows: views (1), tables that reference or are referenced (2), sequences (3).
CREATE FUNCTION migrate._swap_locks(m_ids integer[]) RETURNS TABLE (rank integer, relation regclass, mode text)
LANGUAGE sql VOLATILE AS $$
    WITH m AS (SELECT x FROM migrate._migration x WHERE x.id = ANY (m_ids) AND (migrate._opt(x.id, 'cutover') = 'swap' OR migrate._is_swapped(x.id))
    ), changed AS (
        SELECT s.relation FROM m, LATERAL migrate._swap_steps(m.x, (m.x).owner) s WHERE NOT migrate._is_swapped((m.x).id)
        UNION SELECT s.relation FROM m JOIN migrate._swapped s ON s.migration = (m.x).id
        UNION SELECT r FROM m JOIN migrate._flow f ON f.migration = (m.x).id, LATERAL (SELECT migrate._partition_tree(f.source) UNION SELECT migrate._partition_tree(f.target)) t(r)
    )
    SELECT CASE k.relkind WHEN 'v' THEN 1 WHEN 'S' THEN 3 ELSE 2 END, c.relation, 'ACCESS EXCLUSIVE' FROM changed c JOIN pg_class k ON k.oid = c.relation
    UNION
    SELECT 2, k.confrelid::regclass, 'SHARE ROW EXCLUSIVE' FROM m JOIN migrate._flow f ON f.migration = (m.x).id JOIN pg_constraint k ON k.contype = 'f' AND k.conrelid IN (f.source, f.target)
$$;

CREATE FUNCTION migrate._swap_execute(s migrate._swapped, pieces text[], role regrole) RETURNS void
LANGUAGE sql AS $$ SELECT migrate._as(role, array_to_string(pieces, coalesce(migrate._relation_name(s.relation), ''))) $$;

-- Under the locks. Returns what it did, one line each.
CREATE FUNCTION migrate._swap_there(m migrate._migration, caller regrole, skipped text[]) RETURNS text[]
LANGUAGE plpgsql AS $$
DECLARE
    steps migrate._swap_step[];
    s migrate._swap_step;
    done migrate._swapped;
    did text[] := '{}';
BEGIN
    IF migrate._opt(m.id, 'cutover') IS DISTINCT FROM 'swap' OR migrate._is_swapped(m.id) THEN
        RETURN did;
    END IF;
    steps := ARRAY(SELECT x FROM migrate._swap_steps(m, caller) x);
    IF EXISTS (SELECT FROM unnest(steps) x WHERE x.kind = 'refused') AND ('swap' <> ALL (skipped) OR NOT EXISTS (SELECT FROM unnest(steps) x WHERE x.kind = 'name')) THEN
        PERFORM migrate._raise('55000', format('cutover of migration "%s" is refused by gate swap', m.name), (SELECT string_agg(x.says, E'\n') FROM unnest(steps) x WHERE x.kind = 'refused'),
            (SELECT string_agg(x.forward[1], E'\n') FROM unnest(steps) x WHERE x.kind = 'refused'));
    END IF;
    DELETE FROM migrate._deferred d USING migrate._flow f WHERE f.id = d.flow AND f.migration = m.id AND d.relation IS NOT NULL;
    FOR s IN SELECT x.* FROM unnest(steps) WITH ORDINALITY AS x(rank, kind, object, says, relation, role, forward, inverse, validates, i) WHERE x.kind NOT IN ('refused', 'note') ORDER BY x.i LOOP
        INSERT INTO migrate._swapped SELECT m.id, coalesce(max(x.ordinal), 0) + 1, (SELECT min(f.id) FROM migrate._flow f WHERE f.migration = m.id), s.kind, s.object, s.relation, s.role, s.inverse, s.validates
        FROM migrate._swapped x WHERE x.migration = m.id RETURNING * INTO done;
        PERFORM migrate._swap_execute(done, s.forward, s.role);
        did := did || s.says;
        -- @point swap: one step there
    END LOOP;
    PERFORM migrate._swap_validates(m);
    RETURN did;
END $$;

-- The other way: the names first, then all the rest, last to first. What is gone meanwhile is not made again; a view or a function is
-- put back as it is now.
CREATE FUNCTION migrate._swap_back(m migrate._migration) RETURNS text[]
LANGUAGE plpgsql AS $$
DECLARE
    steps migrate._swapped[];
    s migrate._swapped;
    did text[] := '{}';
BEGIN
    UPDATE migrate._swapped x SET inverse = CASE WHEN x.kind = 'view' AND EXISTS (SELECT FROM pg_class c WHERE c.oid = x.relation) THEN migrate._swap_view_text(x.relation)
                                                 WHEN x.kind = 'function' AND to_regprocedure(x.object) IS NOT NULL THEN ARRAY[pg_get_functiondef(to_regprocedure(x.object))] END
    WHERE x.migration = m.id AND x.kind IN ('view', 'function');
    steps := ARRAY(SELECT x FROM migrate._swapped x WHERE x.migration = m.id ORDER BY x.kind = 'name' DESC, x.kind = 'comment', x.ordinal DESC);
    FOREACH s IN ARRAY steps LOOP
        CONTINUE WHEN s.inverse IS NULL;
        IF s.relation IS NOT NULL AND NOT EXISTS (SELECT FROM pg_class c WHERE c.oid = s.relation) THEN
            did := did || format('%s is gone: nothing is put back', s.object);
            CONTINUE;
        END IF;
        PERFORM migrate._swap_execute(s, s.inverse, migrate._swapped_role(s));
        did := did || format('%s is put back', s.object);
        -- @point swap: one step back
    END LOOP;
    DELETE FROM migrate._deferred d USING migrate._flow f WHERE f.id = d.flow AND f.migration = m.id AND d.relation IS NOT NULL;
    PERFORM migrate._swap_validates(m);
    DELETE FROM migrate._swapped x WHERE x.migration = m.id;
    RETURN did;
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

-- A source that steps aside for a view with its name, and gets the name back.

-- Logical replication knows tables by their names, and no views: it does not follow a source that steps aside for one.
CREATE FUNCTION migrate._check_name_replicated(source regclass, migration text) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    r record;
BEGIN
    FOR r IN SELECT DISTINCT u.subname FROM pg_subscription_rel s JOIN pg_subscription u ON u.oid = s.srsubid WHERE s.srrelid IN (SELECT t FROM migrate._partition_tree(source) t) LOOP
        PERFORM migrate._raise('55000', format('table %s cannot step aside for a view', source), format('Subscription %I writes it by its name, and would stop at a view.', r.subname),
            format('SELECT migrate.add_view(%L, ''…''); makes a view of shape target, under another name.', migration));
    END LOOP;
    FOR r IN SELECT DISTINCT b.pubname FROM pg_publication_tables b JOIN pg_namespace n ON n.nspname = b.schemaname JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = b.tablename WHERE c.oid = source ORDER BY 1 LOOP
        RAISE WARNING 'publication % publishes table %: under its new name subscribers do not know it, and stop', quote_ident(r.pubname), source
            USING HINT = 'Rename it on the subscribers, too; or leave it, and let applications use a view of shape target.';
    END LOOP;
END $$;

-- Renames the source and creates the view in its place, in one attempt. Returns the new name.
CREATE FUNCTION migrate._step_aside(caller regrole, flow integer, aside text) RETURNS text
LANGUAGE plpgsql AS $$
DECLARE
    f migrate._flow := (SELECT x FROM migrate._flow x WHERE x.id = flow);
    place text := migrate._relation_name(f.source);
    names text[] := (SELECT array_agg(c.name) FROM migrate._columns_of(f.source) c);
    nums int2[] := (SELECT array_agg(c.attnum) FROM migrate._columns_of(f.source) c);
    pairs jsonb := migrate._view_pairs(f.id, 'source', names, nums);
    v migrate._view;
BEGIN
    EXECUTE format('ALTER TABLE %s RENAME TO %I', place, aside);
    EXECUTE format('CREATE VIEW %s%s AS %s', place, migrate._new_view_options(f), migrate._view_select(f.id, 'source', 'source', names, nums));
    INSERT INTO migrate._view VALUES (f.migration, f.id, place::regclass, 'source', true, aside) RETURNING * INTO v;
    EXECUTE format('ALTER VIEW %s OWNER TO %s', place, migrate._table_owner(f.source));
    PERFORM migrate._copy_grants(f.source, v.view, pairs, 'both');
    PERFORM migrate._copy_comments(f.source, v.view, pairs);
    PERFORM migrate._require_view_rights(v);
    PERFORM migrate._try_view(v, caller);
    PERFORM migrate._notice_identity(f, pairs);
    RETURN migrate._relation_name(f.source);
END $$;

-- Before the source is left to itself again (cancel, drop): tables that stepped aside get their names back and the triggers go, all
-- in one attempt, so that no view is held while a table is waited for. Views come before tables, the order in which applications
-- lock them. Reads that were routed to the target come back, too. `also`: what else is to be locked; `own`: the targets among it that _leave_target() puts in order; `patience`: for how long
-- locks are tried for, at most. The other views stay, over the source, for applications may use them. Returns a
-- sentence on what is left, or NULL.
CREATE FUNCTION migrate._dismantle(m migrate._migration, caller regrole, goal text, also regclass[], own regclass[] DEFAULT '{}', patience interval DEFAULT NULL) RETURNS text
LANGUAGE plpgsql AS $$
DECLARE
    relations regclass[];
    left_over text;
BEGIN
    WITH aside AS (
        SELECT v.view, f.source FROM migrate._view v JOIN pg_class c ON c.oid = v.view JOIN migrate._flow f ON f.id = v.flow
        WHERE v.migration = m.id AND v.shape = 'source'
    ), wanted AS (
        SELECT 1 AS rank, a.view AS relation FROM aside a UNION SELECT 1, v FROM migrate._routed_views(m.id) v UNION SELECT 2, a.source FROM aside a UNION SELECT 2, r FROM unnest(also) r
    )
    SELECT array_agg(w.relation ORDER BY w.rank, w.relation::oid) INTO relations FROM wanted w;
    IF relations IS NOT NULL THEN
        PERFORM migrate._under_locks(m, caller, goal, relations, array_fill('ACCESS EXCLUSIVE'::text, ARRAY[cardinality(relations)]),
            format('SELECT migrate._dismantle_now(%s, %L, %L)', m.id, caller, own), clock_timestamp() + least(migrate._opt_ms(m.id, 'cutover_timeout') * interval '1 ms', patience));
    END IF;
    SELECT string_agg(x.view::text, ', ' ORDER BY x.view::text) INTO left_over FROM migrate._view x JOIN pg_class c ON c.oid = x.view
    WHERE x.migration = m.id AND x.shape = 'target';
    RETURN 'left over the source: view ' || left_over;
END $$;

CREATE FUNCTION migrate._dismantle_now(m_id integer, caller regrole, own regclass[]) RETURNS text
LANGUAGE plpgsql AS $$
DECLARE
    m migrate._migration := (SELECT x FROM migrate._migration x WHERE x.id = m_id);
    v oid;
BEGIN
    FOR v IN SELECT x.view FROM migrate._view x JOIN pg_class c ON c.oid = x.view WHERE x.migration = m_id AND x.shape = 'source' ORDER BY x.view LOOP
        PERFORM migrate._step_back(m_id, v);
    END LOOP;
    PERFORM migrate._route_back(m_id, caller);
    -- @point cancel: views restored
    PERFORM migrate._drop_triggers(m, 'forward');
    PERFORM migrate._drop_triggers(m, 'reverse');
    PERFORM migrate._leave_target(m, caller, t) FROM unnest(own) t;
    -- @point cancel: targets left
    RETURN 'dismantled';
END $$;

CREATE FUNCTION migrate._step_back(migration integer, view oid) RETURNS text
LANGUAGE plpgsql AS $$
DECLARE
    f migrate._flow := (SELECT x FROM migrate._flow x JOIN migrate._view v ON v.flow = x.id WHERE v.migration = _step_back.migration AND v.view = _step_back.view);
    original text := (SELECT relname FROM pg_class WHERE oid = view);
    dependents text;
    hints text := migrate._drop_hints(ARRAY[view::regclass]);
BEGIN
    PERFORM migrate._return_grants(f.source, view);
    EXECUTE format('DROP VIEW %s', migrate._relation_name(view));
    EXECUTE format('ALTER TABLE %s RENAME TO %I', migrate._relation_name(f.source), original);
    DELETE FROM migrate._view v WHERE v.migration = _step_back.migration AND v.view = _step_back.view;
    RETURN original;
EXCEPTION WHEN dependent_objects_still_exist THEN
    GET STACKED DIAGNOSTICS dependents = PG_EXCEPTION_DETAIL;
    PERFORM migrate._raise('2BP01', format('view %s cannot give its name back to table %s because other objects depend on it', view::regclass, f.source),
        dependents || E'\nNothing has changed.', hints || ' Afterwards create it again, over the table.');
END $$;

-- What is granted and revoked under the name while the view has it is meant for the table.
CREATE FUNCTION migrate._return_grants(source regclass, view regclass) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    shown record := migrate._view_columns(view, source, (SELECT array_agg(c.attnum) FROM migrate._columns_of(source) c));
    pairs jsonb := (SELECT jsonb_object_agg(n.name, c.name) FROM unnest(shown.names, shown.nums) AS n(name, num) JOIN migrate._columns_of(source) c ON c.attnum = n.num);
    g record;
BEGIN
    FOR g IN
        SELECT a.privilege_type, a.grantee, '' AS columns FROM pg_class c, aclexplode(c.relacl) a WHERE c.oid = source AND a.grantee <> c.relowner AND a.privilege_type IN ('SELECT', 'INSERT', 'UPDATE', 'DELETE')
            AND NOT EXISTS (SELECT FROM pg_class w, aclexplode(w.relacl) b WHERE w.oid = view AND b.grantee = a.grantee AND b.privilege_type = a.privilege_type AND b.is_grantable >= a.is_grantable)
        UNION ALL
        SELECT a.privilege_type, a.grantee, format(' (%I)', t.attname) FROM pg_attribute t JOIN pg_class c ON c.oid = t.attrelid, aclexplode(t.attacl) a, jsonb_each_text(pairs) k(shown, own)
        WHERE t.attrelid = source AND k.own = t.attname AND a.grantee <> c.relowner AND a.privilege_type IN ('SELECT', 'INSERT', 'UPDATE')
            AND NOT EXISTS (SELECT FROM pg_attribute w, aclexplode(w.attacl) b WHERE w.attrelid = view AND w.attname = k.shown AND b.grantee = a.grantee AND b.privilege_type = a.privilege_type AND b.is_grantable >= a.is_grantable)
    LOOP
        EXECUTE format('REVOKE %s%s ON %s FROM %s CASCADE', g.privilege_type, g.columns, migrate._relation_name(source), CASE g.grantee WHEN 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(g.grantee)) END);
    END LOOP;
    PERFORM migrate._copy_grants(view, source, pairs, 'both');
END $$;

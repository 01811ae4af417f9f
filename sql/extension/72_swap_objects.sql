-- What a swap does with what depends on the table: policies, triggers, views, functions, publications; and what it cannot carry.

-- What follows CREATE POLICY … ON …, its columns by the names that `relation` has for their numbers; NULL: without what it says of rows.
CREATE FUNCTION migrate._swap_policy_text(q pg_policy, relation oid) RETURNS text
LANGUAGE sql STABLE AS $$
    SELECT format(' AS %s FOR %s TO %s%s%s', CASE WHEN q.polpermissive THEN 'PERMISSIVE' ELSE 'RESTRICTIVE' END,
        CASE q.polcmd WHEN 'r' THEN 'SELECT' WHEN 'a' THEN 'INSERT' WHEN 'w' THEN 'UPDATE' WHEN 'd' THEN 'DELETE' ELSE 'ALL' END,
        (SELECT string_agg(CASE r WHEN 0 THEN 'PUBLIC' ELSE r::regrole::text END, ', ' ORDER BY r) FROM unnest(q.polroles) r),
        ' USING (' || pg_get_expr(q.polqual, relation) || ')', ' WITH CHECK (' || pg_get_expr(q.polwithcheck, relation) || ')')
$$;

-- Whether the target's policy says what the source's says. (In a subquery PostgreSQL prints the table's name before a column. So the
-- target's is printed by the source's name too, where its columns have the same numbers there.)
CREATE FUNCTION migrate._swap_same_policy(p migrate._swap_pair, ours pg_policy, theirs pg_policy) RETURNS boolean
LANGUAGE sql STABLE AS $$
    SELECT migrate._swap_policy_text(ours, p.source) IN (migrate._swap_policy_text(theirs, p.target), CASE WHEN NOT EXISTS (
        SELECT FROM pg_depend d JOIN pg_attribute b ON b.attrelid = p.target AND b.attnum = d.refobjsubid LEFT JOIN pg_attribute a ON a.attrelid = p.source AND a.attnum = b.attnum
        WHERE d.classid = 'pg_policy'::regclass AND d.objid = theirs.oid AND d.refclassid = 'pg_class'::regclass AND d.refobjid = p.target AND a.attname IS DISTINCT FROM b.attname)
        THEN migrate._swap_policy_text(theirs, p.source) END)
$$;

-- One that both have by the same name must say the same: else rows that the source's hides would become readable.
CREATE FUNCTION migrate._swap_policies(p migrate._swap_pair) RETURNS SETOF migrate._swap_step
LANGUAGE plpgsql STABLE AS $$
DECLARE
    q record;
BEGIN
    FOR q IN SELECT x.polname, x AS ours, y AS theirs, y.oid AS twin, migrate._swap_unlike(p, 'pg_policy', x.oid, false) AS unlike, format('policy %I of %s', x.polname, p.source) AS object
             FROM pg_policy x LEFT JOIN pg_policy y ON y.polrelid = p.target AND y.polname = x.polname WHERE x.polrelid = p.source ORDER BY x.polname LOOP
        IF q.twin IS NOT NULL AND migrate._swap_same_policy(p, q.ours, q.theirs) THEN
            CONTINUE;
        ELSIF q.twin IS NOT NULL AND q.unlike IS NOT NULL AND migrate._swap_policy_text(q.ours, NULL) = migrate._swap_policy_text(q.theirs, NULL) THEN
            RETURN NEXT migrate._swap_warning(q.object, format('is replaced by the target''s policy of that name, which cannot be compared, for %s: it is%s, there%s', q.unlike, migrate._swap_policy_text(q.ours, p.source),
                migrate._swap_policy_text(q.theirs, p.target)), 'See to it that both show the same rows.');
        ELSIF q.twin IS NOT NULL THEN
            RETURN NEXT migrate._swap_refused(q.object, format('is not what the target''s policy of that name is: it is%s, there%s', migrate._swap_policy_text(q.ours, p.source), migrate._swap_policy_text(q.theirs, p.target)),
                format('DROP POLICY %I ON %s; and ', q.polname, p.target) || CASE WHEN q.unlike IS NULL THEN 'cutover makes it as the source''s is.'
                    ELSE format('CREATE POLICY %I ON %s%s …;', q.polname, p.target, migrate._swap_policy_text(q.ours, NULL)) END);
        ELSIF q.unlike IS NOT NULL THEN
            RETURN NEXT migrate._swap_refused(q.object, 'cannot be made on the target: ' || q.unlike, format('CREATE POLICY %I ON %s …;', q.polname, p.target));
        ELSE
            RETURN NEXT migrate._swap_step(12, 'step', 'policy ' || quote_ident(q.polname), format('policy %I is made on the new table', q.polname), p.target, p.owner,
                ARRAY[format('CREATE POLICY %I ON ', q.polname), migrate._swap_policy_text(q.ours, p.source)], ARRAY[format('DROP POLICY %I ON ', q.polname), '']);
            RETURN QUERY SELECT * FROM migrate._swap_comment(p, 'POLICY', q.polname, 'pg_policy', (q.ours).oid, NULL, 12);
        END IF;
    END LOOP;
    IF (SELECT a.relrowsecurity AND NOT b.relrowsecurity FROM pg_class a, pg_class b WHERE a.oid = p.source AND b.oid = p.target) THEN
        RETURN NEXT migrate._swap_step(12, 'step', 'row security', 'row-level security is enabled on the new table', p.target, p.owner,
            ARRAY['ALTER TABLE ', ' ENABLE ROW LEVEL SECURITY'], ARRAY['ALTER TABLE ', ' DISABLE ROW LEVEL SECURITY']);
    END IF;
    RETURN QUERY SELECT w.* FROM migrate._policies_of_target(p.source, p.target) x, LATERAL migrate._swap_warning(x.object, x.why, x.hint) w;
END $$;

-- ALTER TABLE … ENABLE [ALWAYS] TRIGGER, as it is now.
CREATE FUNCTION migrate._swap_enable(enabled "char", trigger name) RETURNS text
LANGUAGE sql IMMUTABLE AS $$
    SELECT format(CASE enabled WHEN 'O' THEN ' ENABLE TRIGGER %I' WHEN 'A' THEN ' ENABLE ALWAYS TRIGGER %I' WHEN 'R' THEN ' ENABLE REPLICA TRIGGER %I' ELSE ' DISABLE TRIGGER %I' END, trigger)
$$;

-- The triggers of the source are made on the target, or enabled there where they wait disabled; and disabled on the old table, where
-- the carried-back writes would make them fire once more. Only one that may fill a column which nothing is carried back into stays.
CREATE FUNCTION migrate._swap_triggers(p migrate._swap_pair) RETURNS SETOF migrate._swap_step
LANGUAGE plpgsql STABLE AS $$
DECLARE
    g record;
    why text;
    alone text := (SELECT string_agg(quote_ident(a.attname), ', ' ORDER BY a.attnum) FROM pg_attribute a WHERE a.attrelid = p.source AND a.attnum > 0 AND NOT a.attisdropped AND a.attgenerated = ''
                   AND NOT EXISTS (SELECT FROM migrate._mapping w WHERE w.flow = p.flow AND w.direction = 'reverse' AND a.attnum = ANY (w.columns)));
BEGIN
    FOR g IN SELECT x.*, migrate._swap_unlike(p, 'pg_trigger', x.oid, false) AS unlike, y.oid AS twin, y.tgenabled AS twin_enabled, format('trigger %I', x.tgname) AS object
             FROM pg_trigger x JOIN pg_proc f ON f.oid = x.tgfoid LEFT JOIN pg_trigger y ON y.tgrelid = p.target AND y.tgname = x.tgname
             WHERE x.tgrelid = p.source AND NOT x.tgisinternal AND f.pronamespace <> 'migrate'::regnamespace ORDER BY x.tgname LOOP
        why := CASE WHEN g.twin IS NOT NULL THEN NULL
                    WHEN g.unlike IS NOT NULL THEN g.unlike
                    WHEN g.tginitdeferred THEN 'it is INITIALLY DEFERRED'
                    WHEN EXISTS (SELECT FROM pg_class c WHERE c.oid IN (p.source, p.target) AND c.relkind = 'p') THEN 'one of the tables is partitioned'
                    WHEN NOT has_function_privilege(p.owner, g.tgfoid, 'EXECUTE') THEN format('role %s may not execute its function', p.owner) END;
        IF why IS NOT NULL THEN
            RETURN NEXT migrate._swap_refused(format('trigger %I of %s', g.tgname, p.source), 'cannot be made on the target: ' || why, format('CREATE TRIGGER %I … ON %s …;', g.tgname, p.target));
            CONTINUE;
        ELSIF g.twin IS NULL THEN
            RETURN NEXT migrate._swap_step(13, 'step', g.object, format('trigger %I is made on the new table', g.tgname), p.target, p.owner,
                ARRAY[pg_get_triggerdef(g.oid)], ARRAY[format('DROP TRIGGER %I ON ', g.tgname), '']);
            RETURN QUERY SELECT * FROM migrate._swap_comment(p, 'TRIGGER', g.tgname, 'pg_trigger', g.oid, NULL, 13);
        END IF;
        IF g.tgenabled <> coalesce(g.twin_enabled, 'O') AND coalesce(g.twin_enabled, 'D') = 'D' THEN
            RETURN NEXT migrate._swap_step(13, 'step', g.object, format('trigger %I of the new table fires as the source''s does', g.tgname), p.target, p.owner,
                ARRAY['ALTER TABLE ', migrate._swap_enable(g.tgenabled, g.tgname)], CASE WHEN g.twin IS NOT NULL THEN ARRAY['ALTER TABLE ', migrate._swap_enable(g.twin_enabled, g.tgname)] END);
        END IF;
        IF g.tgenabled <> 'D' AND g.tgtype & 3 = 3 AND alone IS NOT NULL THEN  -- BEFORE … FOR EACH ROW
            RETURN NEXT migrate._swap_note(format('trigger %I', g.tgname), format('of the old table goes on firing, for it may fill what is not carried back: column %s', alone));
        ELSIF g.tgenabled <> 'D' THEN
            RETURN NEXT migrate._swap_step(13, 'step', g.object, format('trigger %I of the old table is disabled', g.tgname), p.source, p.owner,
                ARRAY['ALTER TABLE ', migrate._swap_enable('D', g.tgname)], ARRAY['ALTER TABLE ', migrate._swap_enable(g.tgenabled, g.tgname)]);
        END IF;
    END LOOP;
END $$;

-- A view as it is, whatever table has the name that it reads.
CREATE FUNCTION migrate._swap_view_text(view regclass) RETURNS text[]
LANGUAGE sql STABLE AS $$ SELECT ARRAY['CREATE OR REPLACE VIEW ', format('%s AS %s', migrate._with_options(view), pg_get_viewdef(view))] $$;

-- Columns that an object uses and the target has not, or a key of the source by which it groups and the target has not.
CREATE FUNCTION migrate._swap_unbindable(p migrate._swap_pair, class regclass, object oid) RETURNS text
LANGUAGE sql STABLE AS $$
    SELECT coalesce(migrate._swap_unlike(p, class, object, true),
        (SELECT 'it groups by a key of the source that the target has none like' WHERE EXISTS (
            SELECT FROM pg_depend d JOIN pg_constraint k ON k.oid = d.refobjid AND k.conrelid = p.source
            WHERE d.classid = class AND d.objid = object AND d.refclassid = 'pg_constraint'::regclass
              AND NOT EXISTS (SELECT FROM pg_constraint t WHERE t.conrelid = p.target AND t.contype = 'p' AND t.conkey = migrate._swap_image(p, k.conkey)))),
        (SELECT format('it reads %s too', p.target) WHERE EXISTS (
            SELECT FROM pg_depend d WHERE d.classid = class AND d.objid = object AND d.refclassid = 'pg_class'::regclass AND d.refobjid = p.target)))
$$;

-- Somebody else's view or function is read anew as him. Where it names a value of a type that somebody has made of others, that may run
-- a domain's check, which may be of the table's owner by now.
CREATE FUNCTION migrate._swap_unsafe_literal(p migrate._swap_pair, owner regrole, class regclass, object oid) RETURNS text
LANGUAGE sql STABLE AS $$
    SELECT format('%s would read a value of type %s anew, which may run the check of a domain', owner, min(format_type(t.oid, NULL)))
    FROM pg_depend d JOIN pg_type t ON t.oid = d.refobjid LEFT JOIN pg_type e ON e.oid = t.typelem AND t.typcategory = 'A' LEFT JOIN pg_type b ON b.oid = t.typbasetype
    WHERE NOT pg_has_role(p.owner, owner, 'MEMBER') AND d.classid = class AND d.objid = object AND d.refclassid = 'pg_type'::regclass
      AND (t.typtype IN ('c', 'r', 'm') OR e.typtype IN ('c', 'r', 'm', 'd') OR t.typtype = 'd' AND (b.typtype IN ('c', 'r', 'm') OR b.typcategory = 'A'))
    HAVING count(*) > 0
$$;

CREATE FUNCTION migrate._swap_views(m migrate._migration, p migrate._swap_pair) RETURNS SETOF migrate._swap_step
LANGUAGE plpgsql STABLE AS $$
DECLARE
    v record;
    why text;
BEGIN
    FOR v IN SELECT DISTINCT c.oid, c.oid::regclass::text AS name, c.relkind, c.relowner::regrole AS owner, c.relnamespace, r.oid AS rule, r.rulename,
                    (SELECT x.name FROM migrate._view w JOIN migrate._migration x ON x.id = w.migration WHERE w.view = c.oid) AS switched_by
             FROM pg_depend d JOIN pg_rewrite r ON d.classid = 'pg_rewrite'::regclass AND r.oid = d.objid JOIN pg_class c ON c.oid = r.ev_class
             WHERE d.refclassid = 'pg_class'::regclass AND d.refobjid = p.source AND c.relnamespace <> 'migrate'::regnamespace ORDER BY c.oid LOOP
        CONTINUE WHEN v.switched_by = m.name;
        why := CASE WHEN v.relkind = 'm' THEN 'a materialized view cannot be replaced'
                    WHEN v.relkind <> 'v' OR (SELECT count(*) FROM pg_rewrite r WHERE r.ev_class = v.oid) > 1 THEN 'it has rules'
                    WHEN v.switched_by IS NOT NULL THEN format('migration "%s" switches it', v.switched_by)
                    WHEN NOT has_schema_privilege(v.owner, v.relnamespace, 'CREATE') THEN format('its owner %s lacks CREATE on its schema', v.owner)
                    ELSE coalesce(migrate._swap_unbindable(p, 'pg_rewrite', v.rule), migrate._swap_unsafe_literal(p, v.owner, 'pg_rewrite', v.rule)) END;
        IF why IS NOT NULL THEN
            RETURN NEXT migrate._swap_refused(format('%s %s', CASE v.relkind WHEN 'm' THEN 'materialized view' WHEN 'v' THEN 'view' ELSE format('rule %I of', v.rulename) END, v.name), 'cannot read the new table: ' || why,
                CASE WHEN v.relkind IN ('v', 'm') THEN format('DROP %sVIEW %s;', CASE v.relkind WHEN 'm' THEN 'MATERIALIZED ' ELSE '' END, v.name)
                     ELSE format('DROP RULE %I ON %s;', v.rulename, v.name) END || ' and create it again, over the new table, after cutover.');
        ELSE
            RETURN NEXT migrate._swap_step(14, 'view', 'view ' || v.name, format('view %s reads the new table', v.name), v.oid, v.owner, migrate._swap_view_text(v.oid), migrate._swap_view_text(v.oid));
        END IF;
    END LOOP;
END $$;

-- Functions whose body PostgreSQL has bound to the table (BEGIN ATOMIC).
CREATE FUNCTION migrate._swap_functions(p migrate._swap_pair) RETURNS SETOF migrate._swap_step
LANGUAGE plpgsql STABLE AS $$
DECLARE
    f record;
    why text;
BEGIN
    FOR f IN SELECT DISTINCT q.oid, q.oid::regprocedure::text AS name, q.proowner::regrole AS owner, q.pronamespace
             FROM pg_depend d JOIN pg_proc q ON q.oid = d.objid WHERE d.classid = 'pg_proc'::regclass AND d.refclassid = 'pg_class'::regclass AND d.refobjid = p.source ORDER BY 2 LOOP
        why := CASE WHEN NOT has_schema_privilege(f.owner, f.pronamespace, 'CREATE') THEN format('its owner %s lacks CREATE on its schema', f.owner)
                    ELSE coalesce(migrate._swap_unbindable(p, 'pg_proc', f.oid), migrate._swap_unsafe_literal(p, f.owner, 'pg_proc', f.oid)) END;
        IF why IS NOT NULL THEN
            RETURN NEXT migrate._swap_refused('function ' || f.name, 'cannot use the new table: ' || why, format('DROP FUNCTION %s; and create it again after cutover, or write its body as a string.', f.name));
        ELSE
            RETURN NEXT migrate._swap_step(15, 'function', f.name, format('function %s uses the new table', f.name), NULL, f.owner, ARRAY[pg_get_functiondef(f.oid)], ARRAY[pg_get_functiondef(f.oid)]);
        END IF;
    END LOOP;
END $$;

-- Subscribers know the table by its name, so the rows of the name are what they get. pg_publication_rel has rows only for tables that are
-- named in a publication; those FOR ALL TABLES have both. (Filters and column lists are of PostgreSQL 15.)
CREATE FUNCTION migrate._swap_publications(p migrate._swap_pair) RETURNS SETOF migrate._swap_step
LANGUAGE plpgsql STABLE AS $$
DECLARE
    b record;
    why text;
    tail text;
    list text;
BEGIN
    FOR b IN SELECT r.oid, u.pubname, u.pubowner::regrole AS owner, u.pubupdate OR u.pubdelete AS changes, w.filter, w.attnums,
                    EXISTS (SELECT FROM pg_publication_rel t WHERE t.prpubid = u.oid AND t.prrelid = p.target) AS has_target
             FROM pg_publication_rel r JOIN pg_publication u ON u.oid = r.prpubid, LATERAL migrate._swap_published(r.oid) w WHERE r.prrelid = p.source ORDER BY u.pubname LOOP
        list := ' (' || (SELECT string_agg(quote_ident(a.attname), ', ' ORDER BY a.attnum) FROM pg_attribute a WHERE a.attrelid = p.source AND a.attnum = ANY (b.attnums)) || ')';
        tail := concat(list, ' WHERE (' || b.filter || ')');
        why := CASE WHEN b.has_target THEN NULL
                    WHEN migrate._swap_unlike(p, 'pg_publication_rel', b.oid, false) IS NOT NULL THEN migrate._swap_unlike(p, 'pg_publication_rel', b.oid, false)
                    WHEN NOT pg_has_role(b.owner, p.owner, 'USAGE') THEN format('its owner %s does not own the table', b.owner)
                    WHEN EXISTS (SELECT FROM pg_class c WHERE c.oid = p.target AND c.relkind = 'p') THEN 'the target is partitioned'
                    WHEN b.changes AND NOT migrate._swap_has_identity(p) THEN 'the target has no replica identity'
                    WHEN b.changes AND tail <> '' AND NOT EXISTS (SELECT FROM pg_index i JOIN pg_index j ON j.indrelid = p.target AND j.indisprimary
                                                  WHERE i.indrelid = p.source AND i.indisprimary AND migrate._swap_image(p, i.indkey::int2[]) = j.indkey[0:j.indnatts - 1]::int2[])
                        THEN 'its filter or column list goes with another primary key' END;
        IF why IS NOT NULL THEN
            RETURN NEXT migrate._swap_refused('publication ' || quote_ident(b.pubname), 'cannot publish the target: ' || why, format('ALTER PUBLICATION %I ADD TABLE %s …; or ALTER PUBLICATION %1$I DROP TABLE %s;', b.pubname, p.target, p.source));
            CONTINUE;
        ELSIF NOT b.has_target THEN
            RETURN NEXT migrate._swap_step(16, 'publication', 'publication ' || quote_ident(b.pubname), format('publication %I publishes the new table', b.pubname), p.target, b.owner,
                ARRAY[format('ALTER PUBLICATION %I ADD TABLE ', b.pubname), tail], ARRAY[format('ALTER PUBLICATION %I DROP TABLE ', b.pubname), '']);
        END IF;
        RETURN NEXT migrate._swap_step(16, 'publication', 'publication ' || quote_ident(b.pubname), format('the old table leaves publication %I', b.pubname), p.source, b.owner,
            ARRAY[format('ALTER PUBLICATION %I DROP TABLE ', b.pubname), ''], ARRAY[format('ALTER PUBLICATION %I ADD TABLE ', b.pubname), tail]);
    END LOOP;
END $$;

-- (Both came with PostgreSQL 15.)
CREATE FUNCTION migrate._swap_published(published oid, OUT filter text, OUT attnums int2[])
LANGUAGE plpgsql STABLE AS $$
BEGIN
    IF current_setting('server_version_num')::integer >= 150000 THEN
        EXECUTE 'SELECT pg_get_expr(r.prqual, r.prrelid), r.prattrs::int2[] FROM pg_publication_rel r WHERE r.oid = $1' INTO filter, attnums USING published;
    END IF;
END $$;

-- Whether the target will have a replica identity (see _swap_storage).
CREATE FUNCTION migrate._swap_has_identity(p migrate._swap_pair) RETURNS boolean
LANGUAGE sql STABLE AS $$
    SELECT CASE t.relreplident WHEN 'f' THEN true WHEN 'n' THEN false WHEN 'i' THEN true
           ELSE s.relreplident IN ('f', 'i') OR s.relreplident = 'd' AND EXISTS (SELECT FROM pg_index i WHERE i.indrelid = p.target AND i.indisprimary AND i.indimmediate) END
    FROM pg_class s, pg_class t WHERE s.oid = p.source AND t.oid = p.target
$$;

-- Everything else that has to do with the source: its row type, the policies and rules of other tables, labels, and whatever is not known here.
CREATE FUNCTION migrate._swap_dependents(p migrate._swap_pair) RETURNS SETOF migrate._swap_step
LANGUAGE plpgsql STABLE AS $$
BEGIN
    RETURN QUERY SELECT y.* FROM (
            SELECT DISTINCT regexp_replace(pg_describe_object(d.classid, d.objid, d.objsubid), '^rule _RETURN on ', '') AS object FROM pg_type t JOIN pg_depend d ON d.refclassid = 'pg_type'::regclass AND d.refobjid IN (t.oid, t.typarray)
            WHERE t.typrelid = p.source AND d.deptype <> 'i' ORDER BY 1) o,
        LATERAL migrate._swap_refused(o.object, format('uses the row type of %s', p.source), 'Drop it, or let it use another type: after cutover the name means another table.') y;
    RETURN QUERY SELECT y.* FROM (
            SELECT DISTINCT pg_describe_object(d.classid, d.objid, d.objsubid) AS object FROM pg_depend d LEFT JOIN pg_class c ON d.classid = 'pg_class'::regclass AND c.oid = d.objid
            WHERE d.refclassid = 'pg_class'::regclass AND d.refobjid = p.source AND d.deptype <> 'i' AND d.objid <> p.source  -- a generated column's, before PostgreSQL 15
              AND d.classid NOT IN ('pg_rewrite'::regclass, 'pg_proc'::regclass, 'pg_constraint'::regclass, 'pg_trigger'::regclass, 'pg_attrdef'::regclass, 'pg_statistic_ext'::regclass, 'pg_publication_rel'::regclass)
              AND NOT (d.classid = 'pg_class'::regclass AND c.relkind IN ('i', 'I', 'S', 't'))
              AND NOT (d.classid = 'pg_class'::regclass AND c.relispartition AND EXISTS (SELECT FROM pg_partition_tree(p.source) x WHERE x.relid = c.oid))
              AND NOT (d.classid = 'pg_policy'::regclass AND EXISTS (SELECT FROM pg_policy q WHERE q.oid = d.objid AND q.polrelid = p.source)) ORDER BY 1) o,
        LATERAL migrate._swap_refused(o.object, format('depends on %s and cannot be carried', p.source), 'Drop it, and create it again after cutover.') y;
    -- (Its worker looks for the name, and skips in silence what comes for a table that the subscription does not know.)
    RETURN QUERY SELECT y.* FROM (SELECT DISTINCT u.subname FROM pg_subscription_rel r JOIN pg_subscription u ON u.oid = r.srsubid WHERE r.srrelid IN (SELECT x.relid FROM pg_partition_tree(p.source) x UNION SELECT p.source)) o,
        LATERAL migrate._swap_refused('subscription ' || quote_ident(o.subname), format('writes %s by its name: what it brings after cutover would be lost', p.source),
            format('Switch by a view of shape target; or let the application stop there, ALTER SUBSCRIPTION %I DISABLE; cut over, and make the subscription anew.', o.subname)) y;
    RETURN QUERY SELECT y.* FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace JOIN pg_publication_tables b ON b.schemaname = n.nspname AND b.tablename = c.relname JOIN pg_publication u ON u.pubname = b.pubname,
        LATERAL (SELECT format('%I.%I', p.schema, migrate._aside_name(p.source, '_old')) AS aside) a,
        LATERAL migrate._swap_warning('publication ' || quote_ident(u.pubname), format('publishes all tables by their present names: after cutover subscribers stop where they have no table %s', a.aside),
            format('CREATE TABLE %s (LIKE %s INCLUDING ALL); on the subscribers, then ALTER SUBSCRIPTION … REFRESH PUBLICATION; there after cutover.', a.aside, p.source)) y
    WHERE c.oid = p.source AND NOT EXISTS (SELECT FROM pg_publication_rel r WHERE r.prpubid = u.oid AND r.prrelid = p.source);
    RETURN QUERY SELECT y.* FROM (SELECT DISTINCT l.provider FROM pg_seclabel l WHERE l.classoid = 'pg_class'::regclass AND l.objoid = p.source) o,
        LATERAL migrate._swap_refused(format('security label of %s (%s)', p.source, o.provider), 'cannot be carried', format('SECURITY LABEL FOR %I ON TABLE %s IS …; then SECURITY LABEL FOR %1$I ON TABLE %s IS NULL;', o.provider, p.target, p.source)) y;
END $$;

-- Preflight checks of the tables themselves: who owns them, what they are, who else writes to them.

-- Raises where a table or a mapping view was dropped: what reads them would only say that some OID is not there.
CREATE FUNCTION migrate._require_whole(m migrate._migration) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    c record;
BEGIN
    SELECT string_agg(x.message, E'\n') AS messages, min(x.hint) AS hint INTO c FROM migrate._check_flows(m) x;
    IF c.messages IS NOT NULL THEN
        PERFORM migrate._raise('55000', format('migration "%s" cannot go on: what it rests on was dropped', m.name), c.messages, c.hint);
    END IF;
END $$;

CREATE FUNCTION migrate._check_flows(m migrate._migration) RETURNS SETOF migrate._check
LANGUAGE sql STABLE AS $$
    WITH way_out AS (SELECT CASE WHEN m.phase = 'cut_over' THEN format('SELECT migrate.finalize(%L, force => %L); ends it.', m.name, m.name)
                                 WHEN m.phase IN ('planned', 'cancelled', 'finalized') THEN format('SELECT migrate.drop(%L); and define it again.', m.name)
                                 ELSE format('SELECT migrate.cancel(%L); SELECT migrate.drop(%L); and define it again.', m.name, m.name) END AS hint)
    SELECT 'flows', 'error', format('migration "%s" has no flow', m.name), format('SELECT migrate.add_flow(%L, source => ''…'', target => ''…'');', m.name)
    WHERE NOT EXISTS (SELECT FROM migrate._flow f WHERE f.migration = m.id)
    UNION ALL
    SELECT 'flows', 'error', format('flow "%s" has lost its %s: table with OID %s is gone', f.name, t.part, t.relation::oid), w.hint
    FROM way_out w, migrate._flow f CROSS JOIN LATERAL (VALUES ('source', f.source), ('target', f.target)) AS t(part, relation)
    WHERE f.migration = m.id AND m.phase <> 'finalized' AND NOT EXISTS (SELECT FROM pg_class c WHERE c.oid = t.relation)
    UNION ALL
    SELECT 'flows', 'error', format('flow "%s" has lost its mapping view', f.name), w.hint
    FROM way_out w, migrate._flow f LEFT JOIN migrate._mapping p ON p.flow = f.id AND p.direction = 'forward'
    WHERE f.migration = m.id AND m.phase <> 'finalized' AND NOT EXISTS (SELECT FROM pg_class c WHERE c.oid = p.view)
$$;

-- What the owners of the tables, as whom these are read and written, lack of the rights that owners have until somebody takes them away.
CREATE FUNCTION migrate._lost_rights(m migrate._migration) RETURNS TABLE (problem text, hint text)
LANGUAGE sql STABLE AS $$
    WITH t AS (SELECT c.oid, c.relowner::regrole AS owner, n.oid AS schema, n.nspname, bool_or(x.part = 'target') AS is_target
               FROM migrate._tables(m.id) x JOIN pg_class c ON c.oid = x.relation JOIN pg_namespace n ON n.oid = c.relnamespace GROUP BY c.oid, c.relowner, n.oid, n.nspname)
    SELECT format('role %s, which owns %s, lacks USAGE on its schema', t.owner, t.oid::regclass), format('GRANT USAGE ON SCHEMA %I TO %s;', t.nspname, t.owner)
    FROM t WHERE NOT has_schema_privilege(t.owner, t.schema, 'USAGE')
    UNION ALL
    SELECT format('role %s lacks %s on its own %s', t.owner, string_agg(p, ', ' ORDER BY p), t.oid::regclass),
           format('GRANT %s ON %s TO %s;', string_agg(p, ', ' ORDER BY p), t.oid::regclass, t.owner)
    FROM t, unnest(CASE WHEN t.is_target THEN '{SELECT,INSERT,UPDATE,DELETE}' ELSE '{SELECT}'::text[] END) p
    WHERE NOT has_table_privilege(t.owner, t.oid, p) GROUP BY t.oid, t.owner
$$;

-- Before anything is read as them: what PostgreSQL would say names no way out.
CREATE FUNCTION migrate._require_rights(m migrate._migration) RETURNS void
LANGUAGE sql AS $$
    SELECT migrate._raise('42501', format('migration "%s" cannot go on: %s', m.name, r.problem), '', r.hint) FROM migrate._lost_rights(m) r LIMIT 1
$$;

CREATE FUNCTION migrate._check_access(m migrate._migration, caller regrole) RETURNS SETOF migrate._check
LANGUAGE sql STABLE AS $$
    SELECT 'ownership', 'error', r.problem, r.hint FROM migrate._lost_rights(m) r
    UNION ALL
    SELECT DISTINCT 'ownership', 'error', format('role %s does not own %s %s; its owner is %s', o.role, t.part, t.relation, c.relowner::regrole),
           format('GRANT %s TO %s;', c.relowner::regrole, o.role)
    FROM migrate._tables(m.id) t JOIN pg_class c ON c.oid = t.relation
    CROSS JOIN LATERAL (SELECT caller UNION SELECT m.owner WHERE m.phase = 'planned') AS o(role)  -- start goes by both
    WHERE NOT pg_has_role(o.role, c.relowner, 'MEMBER')
$$;

-- What the target's own row security changes for whoever reads the source now.
CREATE FUNCTION migrate._policies_of_target(source regclass, target regclass) RETURNS TABLE (object text, why text, hint text)
LANGUAGE sql STABLE AS $$
    SELECT 'row security of ' || target, format('hides what its policies do not show from everybody but its owner; %s has none', source),
           format('ALTER TABLE %s DISABLE ROW LEVEL SECURITY; unless it is meant.', target)
    FROM pg_class a, pg_class b WHERE a.oid = source AND b.oid = target AND b.relrowsecurity AND NOT a.relrowsecurity
    UNION ALL
    SELECT format('policy %I of %s', y.polname, target), format('is none of %s: after cutover it %s for %s', source,
               CASE WHEN y.polpermissive THEN 'lets rows through that the policies there hide,' ELSE 'hides rows,' END, (SELECT string_agg(CASE r WHEN 0 THEN 'PUBLIC' ELSE r::regrole::text END, ', ' ORDER BY r) FROM unnest(y.polroles) r)),
           format('DROP POLICY %I ON %s; unless it is meant.', y.polname, target)
    FROM pg_policy y JOIN pg_class a ON a.oid = source AND a.relrowsecurity
    WHERE y.polrelid = target AND NOT EXISTS (SELECT FROM pg_policy x WHERE x.polrelid = source AND x.polname = y.polname) ORDER BY 1
$$;

CREATE FUNCTION migrate._check_tables(m migrate._migration) RETURNS SETOF migrate._check
LANGUAGE sql STABLE AS $$
    WITH t AS (SELECT t.part, t.relation, c.* FROM migrate._tables(m.id) t JOIN pg_class c ON c.oid = t.relation)
    SELECT 'table_kind', 'error', format('%s %s is a %s', t.part, t.relation,
               CASE t.relkind WHEN 'f' THEN 'foreign table' WHEN 'v' THEN 'view' WHEN 'm' THEN 'materialized view' WHEN 'S' THEN 'sequence'
                              ELSE 'relation of kind ' || t.relkind::text END),
           'Define the migration over a plain or partitioned table: nothing else has row triggers for every event and row locks.'
    FROM t WHERE t.relkind NOT IN ('r', 'p')
    UNION ALL
    SELECT 'persistence', 'error', format('%s %s is %s', t.part, t.relation,
               CASE t.relpersistence WHEN 't' THEN 'a temporary table' ELSE 'unlogged: a crash empties it without a trigger' END),
           CASE t.relpersistence WHEN 't' THEN 'Use a permanent table.' ELSE format('ALTER TABLE %s SET LOGGED;', t.relation) END
    FROM t WHERE t.relpersistence <> 'p'
    UNION ALL
    SELECT 'catalog', 'error', format('%s %s belongs to %s', t.part, t.relation,
               CASE WHEN t.oid < 16384 THEN 'the system' ELSE 'schema migrate' END), 'Use a table of your own.'
    FROM t WHERE t.oid < 16384 OR t.relnamespace = 'migrate'::regnamespace
    UNION ALL
    SELECT 'inheritance', 'error', format('%s %s has inheritance children: %s', t.part, t.relation, k.children),
           'Make it a partitioned table, or migrate every child by a flow of its own.'
    FROM t CROSS JOIN LATERAL (SELECT string_agg(i.inhrelid::regclass::text, ', ' ORDER BY i.inhrelid) FROM pg_inherits i WHERE i.inhparent = t.oid) AS k(children)
    WHERE t.relkind <> 'p' AND k.children IS NOT NULL
    UNION ALL
    SELECT 'inheritance', CASE WHEN t.relispartition AND t.part = 'target' THEN 'warning' ELSE 'error' END,
           format('%s %s %s %s: %s', t.part, t.relation, CASE WHEN t.relispartition THEN 'is a partition of' ELSE 'inherits from' END, i.inhparent::regclass,
                  CASE WHEN t.part = 'source' THEN 'a statement that addresses the parent fires no statement trigger here'
                       ELSE 'rows that belong to another partition are refused' END),
           format('Define the migration over %s.', i.inhparent::regclass)
    FROM t JOIN pg_inherits i ON i.inhrelid = t.oid
    UNION ALL
    SELECT 'partitions', 'error', format('partition %s of %s %s is %s', l.relid, t.part, t.relation,
               CASE c.relkind WHEN 'f' THEN 'a foreign table' ELSE 'unlogged' END),
           CASE c.relkind WHEN 'f' THEN format('ALTER TABLE %s DETACH PARTITION %s;', t.relation, l.relid) ELSE format('ALTER TABLE %s SET LOGGED;', l.relid) END
    FROM t CROSS JOIN LATERAL migrate._partition_tree(t.relation) AS l(relid) JOIN pg_class c ON c.oid = l.relid
    WHERE l.relid <> t.relation AND (c.relkind = 'f' OR c.relpersistence <> 'p')
    UNION ALL
    SELECT 'partitions', 'info', format('%s %s is partitioned (partitions: %s); attaching, detaching or dropping one asks for a new validation', t.part, t.relation,
               (SELECT count(*) FROM pg_partition_tree(t.relation) x WHERE x.isleaf)), ''
    FROM t WHERE t.relkind = 'p'
    UNION ALL
    SELECT 'rules', 'error', format('%s %s has rule %s, which rewrites writes before any trigger sees them', t.part, t.relation, quote_ident(r.rulename)),
           format('DROP RULE %I ON %s; and use a trigger in its place.', r.rulename, t.relation)
    FROM t JOIN pg_rewrite r ON r.ev_class = t.oid WHERE t.relkind IN ('r', 'p')
    UNION ALL
    SELECT 'row_security', 'error', format('%s %s has FORCE ROW LEVEL SECURITY: its owner would copy only the rows that policies show', t.part, t.relation),
           format('ALTER TABLE %s NO FORCE ROW LEVEL SECURITY;', t.relation)
    FROM t WHERE t.relforcerowsecurity
    UNION ALL
    SELECT 'row_security', 'warning', CASE WHEN NOT b.relrowsecurity
               THEN format('source %s has row security and target %s has not: rows that policies hide become readable after cutover', f.source, f.target)
               ELSE format('source %s has policies that target %s has not: %s', f.source, f.target, p.missing) END,
           CASE WHEN NOT b.relrowsecurity THEN format('ALTER TABLE %s ENABLE ROW LEVEL SECURITY; and create its policies.', f.target)
                ELSE format('CREATE POLICY … ON %s …; for each of them.', f.target) END
    FROM migrate._flow f JOIN pg_class a ON a.oid = f.source JOIN pg_class b ON b.oid = f.target
    CROSS JOIN LATERAL (SELECT string_agg(quote_ident(x.polname), ', ' ORDER BY x.polname) FROM pg_policy x WHERE x.polrelid = a.oid AND NOT EXISTS
        (SELECT FROM pg_policy y WHERE y.polrelid = b.oid AND y.polname = x.polname AND y.polcmd = x.polcmd AND y.polroles = x.polroles)) AS p(missing)
    WHERE f.migration = m.id AND a.relrowsecurity AND (NOT b.relrowsecurity OR p.missing IS NOT NULL)
    UNION ALL
    SELECT 'row_security', 'warning', concat_ws(' ', x.object, x.why), x.hint FROM migrate._flow f, LATERAL migrate._policies_of_target(f.source, f.target) x WHERE f.migration = m.id
$$;

CREATE FUNCTION migrate._check_replication(m migrate._migration) RETURNS SETOF migrate._check
LANGUAGE sql STABLE AS $$
    WITH target AS (SELECT DISTINCT f.target FROM migrate._flow f JOIN pg_class c ON c.oid = f.target WHERE f.migration = m.id),
    leaf AS (SELECT t.target, l.relid FROM target t CROSS JOIN LATERAL migrate._partition_tree(t.target) AS l(relid)),
    published AS (
        SELECT c.oid AS relid, p.pubname, p.pubupdate OR p.pubdelete AS changes
        FROM pg_publication_tables pt JOIN pg_publication p ON p.pubname = pt.pubname
        JOIN pg_namespace n ON n.nspname = pt.schemaname JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = pt.tablename)
    SELECT 'subscription', 'error', format('target %s is written by subscription %s', l.target, quote_ident(s.subname)),
           format('ALTER SUBSCRIPTION %I REFRESH PUBLICATION; after the table has left its publication.', s.subname)
    FROM leaf l JOIN pg_subscription_rel r ON r.srrelid = l.relid JOIN pg_subscription s ON s.oid = r.srsubid
    UNION ALL
    SELECT DISTINCT 'publication', 'error', format('target %s is in publication %s and has no replica identity: every update of it would fail', l.relid, quote_ident(p.pubname)),
           format('ALTER TABLE %s REPLICA IDENTITY USING INDEX %s;', l.relid,
                  coalesce((SELECT quote_ident(i.relname) FROM migrate._mapping k JOIN pg_class i ON i.oid = migrate._key_index(k.dest, k.key_dest)
                            WHERE k.dest = l.relid AND k.direction = 'forward' ORDER BY k.flow LIMIT 1), '…'))
    FROM leaf l JOIN pg_class c ON c.oid = l.relid AND c.relkind = 'r'
    JOIN published p ON p.changes AND p.relid IN (SELECT l.relid UNION SELECT relid FROM pg_partition_ancestors(l.relid))
    WHERE NOT (c.relreplident = 'f'
        OR (c.relreplident = 'i' AND EXISTS (SELECT FROM pg_index i WHERE i.indrelid = c.oid AND i.indisreplident AND i.indisvalid))
        OR (c.relreplident = 'd' AND EXISTS (SELECT FROM pg_index i WHERE i.indrelid = c.oid AND i.indisprimary AND i.indimmediate)))
    UNION ALL
    SELECT 'publication', 'warning', format('publication %s is of all tables, those of schema migrate as well: subscribers that have not this extension stop at its first row', quote_ident(p.pubname)),
           'CREATE EXTENSION migrate_ext; on each subscriber, which does nothing there; or publish tables by name.'
    FROM pg_publication p WHERE p.puballtables
    UNION ALL
    SELECT 'publication', 'info', format('source %s is in publications that target %s is not in: %s', f.source, f.target, p.names),
           format('ALTER PUBLICATION … ADD TABLE %s; before cutover, where subscribers shall follow.', f.target)
    FROM migrate._flow f CROSS JOIN LATERAL (SELECT string_agg(quote_ident(p.pubname), ', ' ORDER BY p.pubname) FROM published p
        WHERE p.relid = f.source AND NOT EXISTS (SELECT FROM published q WHERE q.relid = f.target AND q.pubname = p.pubname)) AS p(names)
    WHERE f.migration = m.id AND p.names IS NOT NULL
$$;

-- Views that cutover switches. Both shapes are one thing: a view with the columns of one of the two tables (its `kin`: the target for
-- shape target, the source for shape source), which reads its kin bare or the other table through a mapping. (C or PL/pgSQL, where it
-- runs under a switch's locks: that is planned once a session, before there are any.)

CREATE FUNCTION migrate._view_body(view regclass, OUT expressions text[], OUT filter text, OUT yields int2[])
LANGUAGE C STRICT AS 'MODULE_PATHNAME', 'migrate_view_body';

CREATE FUNCTION migrate._view_name(caller regrole, name text, search_path text, OUT schema text, OUT relation text, OUT existing regclass)
LANGUAGE C STRICT AS 'MODULE_PATHNAME', 'migrate_view_name';

-- The columns of a relation that a view of it shows: those of `attnums`, or all.
CREATE FUNCTION migrate._columns_of(relation regclass, attnums int2[] DEFAULT NULL)
RETURNS TABLE (attnum int2, name name, type text, collation_name text, atttypid oid, atttypmod integer, attcollation oid)
LANGUAGE sql STABLE AS $$
    SELECT a.attnum, a.attname, format_type(a.atttypid, a.atttypmod),
           CASE WHEN a.attcollation <> t.typcollation THEN (SELECT format('%I.%I', n.nspname, c.collname) FROM pg_collation c
                JOIN pg_namespace n ON n.oid = c.collnamespace WHERE c.oid = a.attcollation) END,
           a.atttypid, a.atttypmod, a.attcollation
    FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid
    WHERE a.attrelid = relation AND a.attnum > 0 AND NOT a.attisdropped AND (attnums IS NULL OR a.attnum = ANY (attnums))
    ORDER BY a.attnum
$$;

CREATE FUNCTION migrate._view_kin(v migrate._view) RETURNS regclass
LANGUAGE sql STABLE AS $$ SELECT CASE v.shape WHEN 'target' THEN f.target ELSE f.source END FROM migrate._flow f WHERE f.id = v.flow $$;

-- The columns of the kin that a view of this flow and shape shows.
CREATE FUNCTION migrate._view_attnums(flow integer, shape text) RETURNS int2[]
LANGUAGE sql STABLE AS $$
    SELECT CASE shape
        WHEN 'target' THEN (SELECT p.columns FROM migrate._mapping p WHERE p.flow = _view_attnums.flow AND p.direction = 'forward')
        ELSE (SELECT array_agg(c.attnum) FROM migrate._flow f, migrate._columns_of(f.source) c WHERE f.id = _view_attnums.flow) END
$$;

-- Which column of the kin each column of the view is: by name; those that were renamed since, in their order.
CREATE FUNCTION migrate._view_columns(view regclass, kin regclass, attnums int2[], OUT names text[], OUT nums int2[])
LANGUAGE plpgsql STABLE AS $$
BEGIN
    WITH shown AS (
        SELECT a.attnum AS place, a.attname, k.attnum FROM pg_attribute a
        LEFT JOIN migrate._columns_of(kin, attnums) k ON k.name = a.attname
        WHERE a.attrelid = view AND a.attnum > 0 AND NOT a.attisdropped
    ), renamed AS (
        SELECT l.place, r.attnum
        FROM (SELECT place, row_number() OVER (ORDER BY place) AS i FROM shown WHERE attnum IS NULL) l
        JOIN (SELECT u.attnum, row_number() OVER (ORDER BY u.attnum) AS i FROM unnest(attnums) AS u(attnum)
              WHERE u.attnum NOT IN (SELECT s.attnum FROM shown s WHERE s.attnum IS NOT NULL)) r USING (i)
    )
    SELECT array_agg(s.attname::text ORDER BY s.place), array_agg(coalesce(s.attnum, r.attnum) ORDER BY s.place) INTO names, nums
    FROM shown s LEFT JOIN renamed r USING (place);
END $$;

-- SELECT <expression as the column's exact type> AS <name>, … FROM <origin> [WHERE …] of one mapping: a cast only where the types
-- differ, for a column that is not bare cannot be written through the view.
CREATE FUNCTION migrate._mapped_select(p migrate._mapping, names text[], nums int2[]) RETURNS text
LANGUAGE plpgsql STABLE AS $$
BEGIN
    RETURN (SELECT format('SELECT %s FROM %s%s',
                  (SELECT string_agg(format('%s AS %I',
                              CASE WHEN a.atttypid <> k.atttypid OR a.atttypmod <> k.atttypmod
                                   THEN format('(%s)::%s', b.expressions[e.i], k.type) ELSE b.expressions[e.i] END
                              || CASE WHEN a.attcollation <> k.attcollation THEN
                                   ' COLLATE ' || coalesce(k.collation_name, 'pg_catalog."default"') ELSE '' END,
                              n.name), ', ' ORDER BY n.place)
                   FROM unnest(names, nums) WITH ORDINALITY AS n(name, num, place)
                   JOIN migrate._columns_of(p.dest) k ON k.attnum = n.num
                   JOIN unnest(p.columns) WITH ORDINALITY AS e(num, i) ON e.num = n.num
                   JOIN pg_attribute a ON a.attrelid = p.view AND a.attnum = e.i),
                  migrate._relation_name(p.origin), coalesce(' WHERE ' || b.filter, ''))
    FROM migrate._view_body(p.view) b);
END $$;

-- What the view reads while `side` (source or target) serves.
CREATE FUNCTION migrate._view_select(flow integer, shape text, side text, names text[], nums int2[]) RETURNS text
LANGUAGE plpgsql STABLE AS $$
BEGIN
    RETURN (SELECT CASE
        WHEN shape = side THEN
            (SELECT format('SELECT %s FROM %s', string_agg(format('%I AS %I', k.name, n.name), ', ' ORDER BY n.place), migrate._relation_name(r.kin))
             FROM unnest(names, nums) WITH ORDINALITY AS n(name, num, place) JOIN migrate._columns_of(r.kin) k ON k.attnum = n.num)
        WHEN shape = 'source' THEN
            (SELECT migrate._mapped_select(p, names, nums) FROM migrate._mapping p WHERE p.flow = f.id AND p.direction = 'reverse')
        ELSE -- several sources may fill one target
            (SELECT string_agg(migrate._mapped_select(p, names, nums), ' UNION ALL ' ORDER BY p.flow) FROM migrate._mapping p
             JOIN migrate._flow w ON w.id = p.flow WHERE w.migration = f.migration AND w.target = f.target AND p.direction = 'forward')
        END
    FROM migrate._flow f, LATERAL (SELECT CASE shape WHEN 'target' THEN f.target ELSE f.source END AS kin) r
    WHERE f.id = _view_select.flow);
END $$;

-- The statement that lets the view read `side`; a view for reading that share of the keys, or those rows, from the target. CREATE OR
-- REPLACE keeps owner, grants and comments, but not the options: they are stated again.
CREATE FUNCTION migrate._replacement(v migrate._view, side text, percent numeric, predicate text) RETURNS text
LANGUAGE plpgsql STABLE AS $$
DECLARE
    shown record;
BEGIN
    SELECT * INTO shown FROM migrate._view_columns(v.view, migrate._view_kin(v), migrate._view_attnums(v.flow, v.shape));
    RETURN format('CREATE OR REPLACE VIEW %s%s AS %s', migrate._relation_name(v.view), migrate._with_options(v.view),
                  CASE v.use WHEN 'read' THEN migrate._read_select(v.flow, percent, predicate, shown.names, shown.nums)
                             ELSE migrate._view_select(v.flow, v.shape, side, shown.names, shown.nums) END);
END $$;

CREATE FUNCTION migrate._percent_of(side text) RETURNS numeric
LANGUAGE sql IMMUTABLE AS $$ SELECT CASE side WHEN 'target' THEN 100 ELSE 0 END $$;

CREATE FUNCTION migrate._replace_view(v migrate._view, side text, caller regrole) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
    IF v.use = 'read' THEN
        PERFORM migrate._route_view(v, migrate._percent_of(side), NULL, caller);
        RETURN;
    END IF;
    EXECUTE migrate._replacement(v, side, NULL, NULL);
    PERFORM migrate._lend_defaults(v, side);
END $$;

-- All that replacing the view reads, so that it is planned, and in the session's caches, before anybody waits for us.
CREATE FUNCTION migrate._prepare_view(v migrate._view, side text) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
    PERFORM migrate._replacement(v, side, migrate._percent_of(side), NULL);
    PERFORM FROM migrate._lendable_defaults(v) WHERE v.use = 'both';
END $$;

-- Switches a new view there and back, so that what would fail at cutover fails now; says what cannot be written.
CREATE FUNCTION migrate._try_view(v migrate._view, caller regrole) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    side text;
BEGIN
    FOREACH side IN ARRAY '{target,source}'::text[] LOOP
        PERFORM migrate._replace_view(v, side, caller);
        PERFORM migrate._notice_read_only(v, side) WHERE v.use = 'both';
    END LOOP;
END $$;

CREATE FUNCTION migrate._with_options(view regclass) RETURNS text
LANGUAGE sql STABLE AS $$
    SELECT coalesce((SELECT format(' WITH (%s)', string_agg(format('%I = %L', o.option_name, o.option_value), ', '))
                     FROM pg_class c, pg_options_to_table(c.reloptions) o WHERE c.oid = view HAVING count(*) > 0), '')
$$;

-- Sequences that the table's defaults take values from, with the rights of whoever inserts, and whether this role (0: PUBLIC) has none.
-- (An identity asks for none.)
CREATE FUNCTION migrate._default_sequences(relation regclass, role oid) RETURNS TABLE (attnum int2, sequence regclass, is_closed boolean)
LANGUAGE sql STABLE AS $$
    SELECT e.adnum, c.oid::regclass, CASE c.relkind WHEN 'S' THEN NOT has_sequence_privilege(role, c.oid, 'USAGE, UPDATE') END FROM pg_attrdef e JOIN pg_depend d ON d.classid = 'pg_attrdef'::regclass AND d.objid = e.oid AND d.refclassid = 'pg_class'::regclass
    JOIN pg_class c ON c.oid = d.refobjid AND c.relkind = 'S' WHERE e.adrelid = relation
$$;

-- Sequences that an INSERT into the target takes values from where one into the source need not give them, and that a role (0: PUBLIC) may
-- not use, although it may use the source's.
CREATE FUNCTION migrate._closed_sequences(flow integer, role oid) RETURNS SETOF regclass
LANGUAGE sql STABLE AS $$
    SELECT DISTINCT q.sequence FROM migrate._flow f, LATERAL migrate._default_sequences(f.target, role) q
    WHERE f.id = flow AND q.is_closed AND NOT EXISTS (SELECT FROM migrate._default_sequences(f.source, role) o WHERE o.is_closed)
      AND NOT EXISTS (SELECT FROM migrate._expressions(f.id) x JOIN pg_attribute a ON a.attrelid = f.source AND a.attnum = x.origin_attnum AND x.origin_attnum > 0
                      WHERE x.dest_attnum = q.attnum AND NOT a.atthasdef AND a.attidentity = '')
$$;

-- Who may insert into all of a relation, or into columns of it, but its owner.
CREATE FUNCTION migrate._inserters(relation regclass) RETURNS TABLE (role oid)
LANGUAGE sql STABLE AS $$
    SELECT a.grantee FROM pg_class c, LATERAL (SELECT c.relacl UNION ALL SELECT t.attacl FROM pg_attribute t WHERE t.attrelid = c.oid) l(acl), aclexplode(l.acl) a
    WHERE c.oid = relation AND a.privilege_type = 'INSERT' AND a.grantee <> c.relowner GROUP BY 1
$$;

-- The rights that reading and writing through the view needs on the side it goes to and had on the side it comes from. A view is
-- read with its owner's rights; with security_invoker, with those of everybody it, or a column of it, is granted to. Sequences are asked by whoever inserts.
CREATE FUNCTION migrate._view_rights(v migrate._view, side text) RETURNS TABLE (role text, privileges text, relation regclass)
LANGUAGE sql STABLE AS $$
    WITH place AS (
        SELECT c.relowner, c.relacl, EXISTS (SELECT FROM pg_options_to_table(c.reloptions) o WHERE o.option_name = 'security_invoker' AND o.option_value::boolean) AS invoker,
               CASE side WHEN 'target' THEN f.target ELSE f.source END AS goes_to,
               CASE side WHEN 'target' THEN f.source ELSE f.target END AS comes_from
        FROM migrate._flow f, pg_class c WHERE f.id = v.flow AND c.oid = v.view
    ), used AS (
        SELECT k.privilege, k.i FROM unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE']) WITH ORDINALITY AS k(privilege, i) WHERE v.use = 'both' OR k.i = 1
    ), needed AS (
        SELECT CASE WHEN v.shape = side THEN migrate._view_attnums(v.flow, v.shape)
                    ELSE (SELECT p.reads FROM migrate._mapping p WHERE p.flow = v.flow AND p.direction =
                              CASE v.shape WHEN 'target' THEN 'forward' ELSE 'reverse' END) END AS attnums
    ), want AS (
        SELECT p.relowner AS role, u.privilege, '' AS columns FROM place p, used u WHERE NOT p.invoker
        UNION
        SELECT a.grantee, a.privilege_type, a.columns
        FROM place p, LATERAL (SELECT x.*, '' AS columns FROM aclexplode(coalesce(p.relacl, acldefault('r', p.relowner))) x
                               UNION ALL SELECT x.*, ' (…)' FROM pg_attribute t, aclexplode(t.attacl) x WHERE t.attrelid = v.view) a
        WHERE p.invoker AND a.privilege_type IN (SELECT u.privilege FROM used u)
    )
    SELECT CASE w.role WHEN 0 THEN 'PUBLIC' ELSE w.role::regrole::text END, string_agg(w.privilege || w.columns, ', ' ORDER BY u.i), p.goes_to
    FROM want w JOIN used u USING (privilege), place p, needed n
    WHERE CASE WHEN w.columns <> '' THEN has_any_column_privilege(w.role, p.comes_from, w.privilege) AND NOT has_any_column_privilege(w.role, p.goes_to, w.privilege)
               WHEN w.privilege = 'SELECT' THEN EXISTS (SELECT FROM migrate._columns_of(p.goes_to, nullif(n.attnums, '{0}')) c
                                                        WHERE NOT has_column_privilege(w.role, p.goes_to, c.attnum, 'SELECT'))
               ELSE has_table_privilege(w.role, p.comes_from, w.privilege) AND NOT has_table_privilege(w.role, p.goes_to, w.privilege) END
    GROUP BY w.role, w.columns, p.goes_to
    UNION ALL
    SELECT CASE r.role WHEN 0 THEN 'PUBLIC' ELSE r.role::regrole::text END, 'USAGE', q
    FROM migrate._inserters(v.view) r, LATERAL migrate._closed_sequences(v.flow, r.role) q WHERE v.use = 'both' AND side = 'target'
$$;

-- Columns of the view that are bare columns of the source which have a default there; the view's own default; and whether the target's
-- column has one.
CREATE FUNCTION migrate._lendable_defaults(v migrate._view) RETURNS TABLE (shown name, attnum int2, expression text, own text, has_default boolean)
LANGUAGE plpgsql STABLE AS $$
BEGIN
    RETURN QUERY
        SELECT w.attname, w.attnum, pg_get_expr(e.adbin, e.adrelid),
               (SELECT pg_get_expr(x.adbin, x.adrelid) FROM pg_attrdef x WHERE x.adrelid = v.view AND x.adnum = w.attnum),
               EXISTS (SELECT FROM pg_attribute t WHERE t.attrelid = f.target AND t.attnum = p.columns[u.i] AND (t.atthasdef OR t.attidentity <> ''))
        FROM migrate._flow f JOIN migrate._mapping p ON p.flow = f.id AND p.direction = 'forward', LATERAL migrate._view_body(p.view) b,
             unnest(b.expressions) WITH ORDINALITY AS u(expression, i), pg_attribute a JOIN pg_attrdef e ON e.adrelid = a.attrelid AND e.adnum = a.attnum,
             LATERAL migrate._view_columns(v.view, migrate._view_kin(v), migrate._view_attnums(v.flow, v.shape)) c,
             unnest(c.nums) WITH ORDINALITY AS n(num, place), pg_attribute w
        WHERE f.id = v.flow AND a.attrelid = f.source AND a.attgenerated = '' AND u.expression = quote_ident(a.attname)
          AND n.num = CASE v.shape WHEN 'target' THEN p.columns[u.i] ELSE a.attnum END AND w.attrelid = v.view AND w.attnum = n.place;
END $$;

-- While the target serves, an INSERT that leaves out a column gets the source's default where the target has none of its own. (While the source
-- serves, its own defaults apply; and a column that cannot be written, for its type differs, must not have one.)
CREATE FUNCTION migrate._lend_defaults(v migrate._view, side text) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    d record;
BEGIN
    FOR d IN
        SELECT * FROM migrate._lendable_defaults(v) l
        WHERE CASE side WHEN 'target' THEN l.own IS NULL AND NOT l.has_default AND pg_column_is_updatable(v.view, l.attnum, false)
                        ELSE l.own = l.expression END
    LOOP
        IF side = 'target' THEN  -- as the view's owner: reading a literal in it may run a domain's check
            PERFORM migrate._as(migrate._table_owner(v.view), format('ALTER VIEW %s ALTER COLUMN %I SET DEFAULT %s', migrate._relation_name(v.view), d.shown, d.expression));
        ELSE
            EXECUTE format('ALTER VIEW %s ALTER COLUMN %I DROP DEFAULT', migrate._relation_name(v.view), d.shown);
        END IF;
    END LOOP;
END $$;

-- Columns that cannot be written through the view while `side` serves.
CREATE FUNCTION migrate._notice_read_only(v migrate._view, side text) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    columns text := (SELECT string_agg(a.attname, ', ' ORDER BY a.attnum) FROM pg_attribute a
                     WHERE a.attrelid = v.view AND a.attnum > 0 AND NOT a.attisdropped AND NOT pg_column_is_updatable(v.view, a.attnum, false));
BEGIN
    IF columns IS NOT NULL THEN
        RAISE NOTICE 'column % of view % can be read, but not written, while the % serves', columns, v.view, side
            USING DETAIL = 'It is computed there, or of another type.';
    END IF;
END $$;

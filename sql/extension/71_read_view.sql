-- Views for reading alone (add_view(…, use => 'read')): each row comes from the source or from the target, as route (78_route.sql) says.
-- They are always a UNION ALL, which cannot be written through: a statement that read a row from one side and wrote it to the other
-- would lose what somebody else has written meanwhile. At either end they depend on the tables of one side alone.

CREATE FUNCTION migrate._parse_predicate(view regclass, predicate text, search_path text, caller regrole, OUT expression text, OUT columns int2[])
LANGUAGE C STRICT AS 'MODULE_PATHNAME', 'migrate_parse_predicate';
COMMENT ON FUNCTION migrate._parse_predicate IS 'a condition over the view''s columns as PostgreSQL prints it, and the columns it reads';

-- Only for a view that nobody but its owner may write already.
CREATE FUNCTION migrate._require_unwritten(v migrate._view) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    writer record;
BEGIN
    SELECT CASE a.grantee WHEN 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(a.grantee)) END AS name, string_agg(DISTINCT a.privilege_type, ', ') AS privileges INTO writer
    FROM (SELECT c.relacl AS acl, c.relowner FROM pg_class c WHERE c.oid = v.view UNION ALL
          SELECT t.attacl, c.relowner FROM pg_attribute t JOIN pg_class c ON c.oid = t.attrelid WHERE t.attrelid = v.view) o, aclexplode(o.acl) a
    WHERE a.grantee <> o.relowner AND a.privilege_type IN ('INSERT', 'UPDATE', 'DELETE') GROUP BY 1 LIMIT 1;
    IF FOUND THEN
        PERFORM migrate._raise('55000', format('view %s is not for reading alone', v.view), format('%s may write it: %s.', writer.name, writer.privileges),
            format('REVOKE %s ON %s FROM %s; or let it be switched with the writes: leave out use => ''read''.', writer.privileges, v.view, writer.name));
    END IF;
END $$;

-- A key's place from 0 to 9999, as an expression over the view's columns: by the hash of PostgreSQL's own hash indexes, that of each
-- column seeded with the one before. (Where that is the function of another type, such as timestamp for timestamptz, an array of one finds it.) Equal keys have equal places whichever side they are read from.
CREATE FUNCTION migrate._key_place(flow integer, names text[], nums int2[]) RETURNS text
LANGUAGE plpgsql STABLE AS $$
DECLARE
    place text := '0';
    k record;
BEGIN
    FOR k IN SELECT n.name, p.dest, a.atttypid, t.type, format_type(t.type, -1) AS type_name, (
                 SELECT CASE WHEN f.proargtypes[0] = o.opcintype THEN format('pg_catalog.%I(%%s, %%s)', f.proname) ELSE 'pg_catalog.hash_array_extended(ARRAY[%s], %s)' END FROM pg_opclass o JOIN pg_am m ON m.oid = o.opcmethod AND m.amname = 'hash'
                 JOIN pg_amproc x ON x.amprocfamily = o.opcfamily AND x.amproclefttype = o.opcintype AND x.amprocrighttype = o.opcintype AND x.amprocnum = 2
                 JOIN pg_proc f ON f.oid = x.amproc AND f.pronamespace = 'pg_catalog'::regnamespace
                 WHERE o.opcdefault AND o.opcintype = CASE WHEN t.type = 1043 THEN 25 WHEN t.type = 650 THEN 869 WHEN y.typtype = 'e' THEN 3500 WHEN y.typtype = 'r' THEN 3831 ELSE t.type END) AS hash
             FROM migrate._mapping p CROSS JOIN LATERAL unnest(p.key_dest) WITH ORDINALITY AS d(num, i)
             JOIN unnest(names, nums) AS n(name, num) ON n.num = d.num JOIN pg_attribute a ON a.attrelid = p.dest AND a.attnum = d.num
             CROSS JOIN LATERAL migrate._plain_type(a.atttypid, a.atttypmod) t JOIN pg_type y ON y.oid = t.type
             WHERE p.flow = _key_place.flow AND p.direction = 'forward' ORDER BY d.i LOOP
        IF k.hash IS NULL THEN
            PERFORM migrate._raise('0A000', format('keys of type %s cannot be routed by percent', k.type_name),
                format('Column %I of %s is part of the key, and PostgreSQL itself cannot hash it.', k.name, k.dest), 'Route by a predicate, or all reads at once: percent => 100.');
        END IF;
        place := format(k.hash, quote_ident(k.name) || CASE WHEN k.type <> k.atttypid THEN '::' || k.type_name ELSE '' END, place);
    END LOOP;
    RETURN format('(%s & 9223372036854775807) %% 10000', place);
END $$;

-- What a view for reading is made of. Between the ends, the condition stands over both sides' rows and compares with a column that tells
-- them apart: a condition within each SELECT of the union would keep the planner from its indexes in joins and orders.
CREATE FUNCTION migrate._read_select(flow integer, percent numeric, predicate text, names text[], nums int2[]) RETURNS text
LANGUAGE sql STABLE AS $$
    WITH part AS (
        SELECT false AS is_target, migrate._mapped_select(p, names, nums) AS body, p.flow AS i
        FROM migrate._flow f JOIN migrate._flow w ON w.migration = f.migration AND w.target = f.target JOIN migrate._mapping p ON p.flow = w.id AND p.direction = 'forward'
        WHERE f.id = _read_select.flow AND percent IS DISTINCT FROM 100
        UNION ALL
        SELECT true, migrate._view_select(_read_select.flow, 'target', 'target', names, nums), 0 WHERE percent IS DISTINCT FROM 0
    ), marked AS (
        SELECT format('!side%s', i) AS side FROM generate_series(0, cardinality(names)) i WHERE format('!side%s', i) <> ALL (names) ORDER BY i LIMIT 1
    )
    SELECT CASE WHEN percent IN (0, 100)
        THEN (SELECT string_agg(p.body, ' UNION ALL ' ORDER BY p.i) || format(' UNION ALL SELECT * FROM (%s) AS r WHERE false', min(p.body)) FROM part p)
        ELSE format('SELECT %s FROM (%s) AS r WHERE %s',
                    (SELECT string_agg(format('r.%I', n), ', ' ORDER BY i) FROM unnest(names) WITH ORDINALITY AS u(n, i)),
                    (SELECT string_agg(format('SELECT *, %s AS %I FROM (%s) AS s', CASE WHEN p.is_target THEN 'true' ELSE 'false' END, m.side, p.body), ' UNION ALL ' ORDER BY p.is_target, p.i) FROM part p),
                    CASE WHEN predicate IS NOT NULL THEN format('((%1$s) OR NOT r.%2$I) AND ((%1$s) IS NOT TRUE OR r.%2$I)', predicate, m.side)
                         ELSE format('(%s < %s) = r.%I', migrate._key_place(_read_select.flow, names, nums), (percent * 100)::integer, m.side) END) END
    FROM marked m
$$;

-- Under the view's lock.
CREATE FUNCTION migrate._route_view(v migrate._view, percent numeric, predicate text, caller regrole) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
    EXECUTE migrate._replacement(v, NULL, percent, predicate);
    UPDATE migrate._view x SET percent = _route_view.percent, predicate = _route_view.predicate, routed_since = clock_timestamp(), routed_by = caller::text
    WHERE x.migration = v.migration AND x.view = v.view;
END $$;

CREATE FUNCTION migrate._routed_views(m_id integer) RETURNS SETOF regclass
LANGUAGE sql STABLE AS $$
    SELECT v.view FROM migrate._view v JOIN pg_class c ON c.oid = v.view WHERE v.migration = m_id AND v.use = 'read' AND v.percent IS DISTINCT FROM 0 ORDER BY v.view
$$;

-- Under their locks: all reads come back to the source.
CREATE FUNCTION migrate._route_back(m_id integer, caller regrole) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    v migrate._view;
BEGIN
    FOR v IN SELECT x.* FROM migrate._view x WHERE x.migration = m_id AND x.view IN (SELECT r FROM migrate._routed_views(m_id) r) ORDER BY x.view LOOP
        PERFORM migrate._route_view(v, 0, NULL, caller);
        PERFORM migrate._event(m, caller, 'route', format('reads of view %s come back to the source', v.view)) FROM migrate._migration m WHERE m.id = m_id;
    END LOOP;
END $$;

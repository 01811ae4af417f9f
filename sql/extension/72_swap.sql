-- Cutover by swap: the target takes the source's name, and the old table steps aside under <name>_old. Whatever the application knows
-- the name by, or hangs on it, goes over to the new table. _swap_steps() is the one list of that: plan and preflight show it, the
-- switch executes it, and what it has executed is recorded in _swapped, which rollback goes back through.
--
-- The tables change their names first, in both directions. So every text that PostgreSQL prints of an object that depends on the
-- source (a view, a policy, a trigger) can be executed as it is, and means the table that has the name then.

CREATE TYPE migrate._swap_step AS (rank integer, kind text, object text, says text, relation oid, role regrole, forward text[], inverse text[], validates boolean);
COMMENT ON TYPE migrate._swap_step IS
    'kind: name, view, function, publication, key, comment, step; note (it stays with the old table); warning; refused (it cannot be carried: says why, forward has the hint). Between the pieces of forward and inverse comes the present name of relation';

-- One flow, as its two tables are before the switch. image: by the number of a source column that of the target column that is
-- mapped from it bare; NULL where there is none.
CREATE TYPE migrate._swap_pair AS (flow integer, source regclass, target regclass, owner regrole, schema text, name text, image int2[]);

CREATE FUNCTION migrate._swap_step(rank integer, kind text, object text, says text, relation oid, role regrole, forward text[], inverse text[], validates boolean DEFAULT false)
RETURNS migrate._swap_step LANGUAGE sql IMMUTABLE AS $$ SELECT ROW(rank, kind, object, says, relation, role, forward, inverse, validates)::migrate._swap_step $$;

CREATE FUNCTION migrate._swap_refused(object text, why text, hint text) RETURNS migrate._swap_step
LANGUAGE sql IMMUTABLE AS $$ SELECT ROW(0, 'refused', object, object || ' ' || why, NULL, NULL, ARRAY[hint], NULL, false)::migrate._swap_step $$;

-- It stays with the old table, and nobody's statement fails for that.
CREATE FUNCTION migrate._swap_note(object text, why text) RETURNS migrate._swap_step
LANGUAGE sql IMMUTABLE AS $$ SELECT ROW(0, 'note', object, object || ' ' || why, NULL, NULL, NULL, NULL, false)::migrate._swap_step $$;

CREATE FUNCTION migrate._swap_warning(object text, why text, hint text) RETURNS migrate._swap_step
LANGUAGE sql IMMUTABLE AS $$ SELECT ROW(0, 'warning', object, object || ' ' || why, NULL, NULL, ARRAY[hint], NULL, false)::migrate._swap_step $$;

-- The comment on a thing of the source (an index, a trigger …), for what has its name after the switch and has none; dest: that, where it is
-- there already.
CREATE FUNCTION migrate._swap_comment(p migrate._swap_pair, what text, name text, class regclass, origin oid, dest oid, rank integer DEFAULT 8) RETURNS SETOF migrate._swap_step
LANGUAGE sql STABLE AS $$
    SELECT s.* FROM pg_description d, LATERAL (SELECT what IN ('CONSTRAINT', 'TRIGGER', 'POLICY') AS is_part) k,
        LATERAL (SELECT CASE WHEN k.is_part THEN format('COMMENT ON %s %I ON ', what, name) ELSE format('COMMENT ON %s %I.%I', what, p.schema, name) END AS head) c,
        LATERAL migrate._swap_step(rank, 'step', 'comment', format('the comment of %s %I is carried', lower(what), name), CASE WHEN k.is_part THEN p.target END, p.owner,
            ARRAY[c.head, format(' IS %L', d.description)], CASE WHEN dest IS NOT NULL THEN ARRAY[c.head, ' IS NULL'] END) s
    WHERE d.classoid = class AND d.objoid = origin AND d.objsubid = 0 AND NOT EXISTS (SELECT FROM pg_description e WHERE e.classoid = class AND e.objoid = dest AND e.objsubid = 0)
$$;

CREATE FUNCTION migrate._swap_is_done(kind text) RETURNS boolean
LANGUAGE sql IMMUTABLE AS $$ SELECT kind NOT IN ('note', 'warning', 'refused') $$;

CREATE FUNCTION migrate._swap_pairs(m_id integer) RETURNS SETOF migrate._swap_pair
LANGUAGE sql STABLE AS $$
    SELECT f.id, f.source, f.target, c.relowner::regrole, n.nspname::text, c.relname::text,
           ARRAY(SELECT b.dest FROM generate_series(1, c.relnatts) s(num) LEFT JOIN LATERAL (
                     SELECT p.columns[e.i] AS dest FROM unnest(v.expressions) WITH ORDINALITY AS e(expression, i)
                     JOIN pg_attribute o ON o.attrelid = f.source AND o.attnum = s.num AND NOT o.attisdropped AND e.expression = quote_ident(o.attname)
                     JOIN pg_attribute d ON d.attrelid = f.target AND d.attnum = p.columns[e.i]
                     ORDER BY d.attname = o.attname DESC, d.attnum = ANY (p.key_dest) DESC, d.attnum LIMIT 1) b ON true ORDER BY s.num)
    FROM migrate._flow f JOIN pg_class c ON c.oid = f.source JOIN pg_namespace n ON n.oid = c.relnamespace JOIN pg_class t ON t.oid = f.target
    JOIN migrate._mapping p ON p.flow = f.id AND p.direction = 'forward', LATERAL migrate._view_body(p.view) v
    WHERE f.migration = m_id ORDER BY f.id
$$;

-- What the name will be looked up by, and is bound to after the swap, whichever way it goes.
CREATE FUNCTION migrate._swap_name(p migrate._swap_pair) RETURNS text
LANGUAGE sql IMMUTABLE AS $$ SELECT format('%I.%I', p.schema, p.name) $$;

-- The target columns that these source columns are mapped to; it has a NULL where one is not mapped bare. 0 (an expression) stays.
CREATE FUNCTION migrate._swap_image(p migrate._swap_pair, attnums int2[]) RETURNS int2[]
LANGUAGE sql IMMUTABLE AS $$ SELECT ARRAY(SELECT CASE a WHEN 0 THEN 0::int2 ELSE p.image[a] END FROM unnest(attnums) WITH ORDINALITY u(a, i) ORDER BY i) $$;

-- Source columns that an object depends on for which the target has none of the same name and, exact: the same type, else one that
-- compares alike.
CREATE FUNCTION migrate._swap_unlike(p migrate._swap_pair, class regclass, object oid, exact boolean) RETURNS text
LANGUAGE sql STABLE AS $$
    SELECT string_agg(DISTINCT CASE WHEN b.attnum IS NULL THEN format('column %I is not in the target', a.attname)
                                    ELSE format('column %I is %s in the target', a.attname, format_type(b.atttypid, b.atttypmod)) END, ', ')
    FROM pg_depend d JOIN pg_attribute a ON a.attrelid = p.source AND a.attnum = d.refobjsubid
    LEFT JOIN pg_attribute b ON b.attrelid = p.target AND b.attname = a.attname AND b.attnum > 0 AND NOT b.attisdropped
    WHERE d.classid = class AND d.objid = object AND d.refclassid = 'pg_class'::regclass AND d.refobjid = p.source AND d.refobjsubid > 0
      AND (b.attnum IS NULL OR a.attcollation <> b.attcollation
           OR CASE WHEN exact THEN (a.atttypid, a.atttypmod) <> (b.atttypid, b.atttypmod) ELSE NOT migrate._same_order(a.atttypid, b.atttypid) END)
$$;

-- Why this migration cannot be swapped at all.
CREATE FUNCTION migrate._swap_structure(m migrate._migration) RETURNS SETOF migrate._swap_step
LANGUAGE sql STABLE AS $$
    WITH f AS (SELECT w.*, s.relowner AS s_owner, t.relowner AS t_owner, s.relnamespace AS s_schema, t.relnamespace AS t_schema
               FROM migrate._flow w JOIN pg_class s ON s.oid = w.source JOIN pg_class t ON t.oid = w.target WHERE w.migration = m.id)
    SELECT migrate._swap_refused(format('migration "%s"', m.name), format('has several flows of table %s, whose name only one table can take', r.relation),
               format('SELECT migrate.add_view(%L, …); and SELECT migrate.set(%1$L, ''cutover'', ''default''); switches by views.', m.name))
    FROM (SELECT x AS relation FROM f, LATERAL unnest(ARRAY[f.source, f.target]) x GROUP BY x HAVING count(*) > 1) r
    UNION ALL
    SELECT migrate._swap_refused('table ' || f.target, format('is owned by %s, but %s by %s', f.t_owner::regrole, f.source, f.s_owner::regrole), format('ALTER TABLE %s OWNER TO %s;', f.target, f.s_owner::regrole))
    FROM f WHERE f.s_owner <> f.t_owner
    UNION ALL
    SELECT migrate._swap_refused('table ' || f.target, format('is not in the schema of %s', f.source), format('ALTER TABLE %s SET SCHEMA %s;', f.target, f.s_schema::regnamespace))
    FROM f WHERE f.s_schema <> f.t_schema
    UNION ALL
    SELECT migrate._swap_refused('table ' || f.source, format('cannot be renamed by its owner %s, who lacks CREATE on schema %s', f.s_owner::regrole, f.s_schema::regnamespace),
               format('GRANT CREATE ON SCHEMA %s TO %s;', f.s_schema::regnamespace, f.s_owner::regrole))
    FROM f WHERE NOT has_schema_privilege(f.s_owner, f.s_schema, 'CREATE')
    UNION ALL
    SELECT migrate._swap_refused('view ' || v.view, 'has taken the source''s name already (shape source)', format('SELECT migrate.set(%L, ''cutover'', ''default''); leaves the switch to it.', m.name))
    FROM migrate._view v WHERE v.migration = m.id AND v.shape = 'source'
$$;

-- All of it, in the order of execution; where the migration cannot be swapped at all, only why. What somebody else owns is changed
-- only for a caller who could do so himself.
CREATE FUNCTION migrate._swap_steps(m migrate._migration, caller regrole) RETURNS SETOF migrate._swap_step
LANGUAGE plpgsql STABLE AS $$
DECLARE
    p migrate._swap_pair;
    s migrate._swap_step;
BEGIN
    RETURN QUERY SELECT * FROM migrate._swap_structure(m);
    IF FOUND THEN
        RETURN;
    END IF;
    FOR s IN
        SELECT x.* FROM migrate._swap_pairs(m.id) WITH ORDINALITY AS q(flow, source, target, owner, schema, name, image, place),
            LATERAL (SELECT ROW(q.flow, q.source, q.target, q.owner, q.schema, q.name, q.image)::migrate._swap_pair AS pair) r,
            LATERAL migrate._swap_objects(m, r.pair) WITH ORDINALITY AS x(rank, kind, object, says, relation, role, forward, inverse, validates, nr)
        ORDER BY x.rank, q.place, x.nr
    LOOP
        IF s.role IS NOT NULL AND NOT pg_has_role(caller, s.role, 'MEMBER') THEN
            s.kind := 'refused';
            SELECT x.says, x.forward INTO s.says, s.forward FROM migrate._swap_refused(s.object, format('belongs to %s, of which %s is not a member', s.role, caller), format('GRANT %s TO %s;', s.role, caller)) x;
        END IF;
        RETURN NEXT s;
    END LOOP;
END $$;

CREATE FUNCTION migrate._swap_objects(m migrate._migration, p migrate._swap_pair) RETURNS SETOF migrate._swap_step
LANGUAGE plpgsql STABLE AS $$
DECLARE
    aside text := migrate._aside_name(p.source, '_old');
BEGIN
    RETURN NEXT migrate._swap_step(1, 'name', 'table ' || p.source, format('table %s steps aside as %I', p.source, aside), p.source, p.owner,
        ARRAY['ALTER TABLE ', format(' RENAME TO %I', aside)], ARRAY['ALTER TABLE ', format(' RENAME TO %I', p.name)]);
    RETURN NEXT migrate._swap_step(1, 'name', 'table ' || p.target, format('table %s takes the name %I', p.target, p.name), p.target, p.owner,
        ARRAY['ALTER TABLE ', format(' RENAME TO %I', p.name)], ARRAY['ALTER TABLE ', format(' RENAME TO %I', c.relname)]) FROM pg_class c WHERE c.oid = p.target;
    RETURN QUERY SELECT * FROM migrate._swap_defaults(p);
    RETURN QUERY SELECT * FROM migrate._swap_indexes(p);
    RETURN QUERY SELECT * FROM migrate._swap_checks(p);
    RETURN QUERY SELECT * FROM migrate._swap_statistics(p);
    RETURN QUERY SELECT * FROM migrate._swap_storage(p);
    RETURN QUERY SELECT * FROM migrate._swap_comments(p);
    RETURN QUERY SELECT * FROM migrate._swap_grants(p);
    RETURN QUERY SELECT * FROM migrate._swap_sequence_grants(p);
    RETURN QUERY SELECT * FROM migrate._swap_outgoing_keys(m, p);
    RETURN QUERY SELECT * FROM migrate._swap_incoming_keys(m, p);
    RETURN QUERY SELECT * FROM migrate._swap_policies(p);
    RETURN QUERY SELECT * FROM migrate._swap_triggers(p);
    RETURN QUERY SELECT * FROM migrate._swap_views(m, p);
    RETURN QUERY SELECT * FROM migrate._swap_functions(p);
    RETURN QUERY SELECT * FROM migrate._swap_publications(p);
    RETURN QUERY SELECT * FROM migrate._swap_dependents(p);
    RETURN QUERY SELECT * FROM migrate._swap_prepared(p);
END $$;

-- Sessions that are there before and after know the columns by what they have prepared: that PostgreSQL itself does not let change.
CREATE FUNCTION migrate._swap_prepared(p migrate._swap_pair) RETURNS SETOF migrate._swap_step
LANGUAGE plpgsql STABLE AS $$
DECLARE
    differs text;
BEGIN
    SELECT string_agg(coalesce(a.attname, b.attname) || CASE WHEN a.attname IS NULL THEN ' is new' WHEN b.attname IS NULL THEN ' is not in the target'
                          WHEN a.type <> b.type THEN format(' is %s, then %s', a.type, b.type) ELSE ' has another place' END, ', ' ORDER BY a.place, b.place) INTO differs
    FROM (SELECT quote_ident(c.name) AS attname, c.type, row_number() OVER (ORDER BY c.attnum) AS place FROM migrate._columns_of(p.source) c) a
    FULL JOIN (SELECT quote_ident(c.name) AS attname, c.type, row_number() OVER (ORDER BY c.attnum) AS place FROM migrate._columns_of(p.target) c) b ON b.attname = a.attname
    WHERE (a.type, a.place) IS DISTINCT FROM (b.type, b.place);
    IF differs IS NOT NULL THEN
        RETURN NEXT migrate._swap_warning(format('what sessions have prepared on %s', p.source),
            format('may fail after cutover ("cached plan must not change result type"), and PL/pgSQL that they have compiled goes by the old columns: %s', differs),
            'Let sessions that read these columns by prepared statements, %ROWTYPE or %TYPE connect anew after cutover and rollback, or prepare again at SQLSTATE 0A000.');
    END IF;
END $$;

-- add_view: making a view, or adopting one.

-- ALL that a role could do with `origin` it may do with the view, as far as that is for it. Columns where they bear on the same value.
CREATE FUNCTION migrate._copy_grants(origin regclass, view regclass, pairs jsonb, use text) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    g record;
    copied text[] := CASE use WHEN 'read' THEN '{SELECT}' ELSE '{SELECT,INSERT,UPDATE,DELETE}' END;
BEGIN
    FOR g IN
        SELECT a.*, NULL::text AS column_name FROM pg_class c, aclexplode(c.relacl) a
        WHERE c.oid = origin AND a.grantee <> c.relowner AND a.privilege_type = ANY (copied)
        UNION ALL
        SELECT a.*, pairs ->> t.attname FROM pg_attribute t JOIN pg_class c ON c.oid = t.attrelid, aclexplode(t.attacl) a
        WHERE t.attrelid = origin AND pairs ? t.attname AND a.grantee <> c.relowner AND a.privilege_type = ANY (copied)
    LOOP
        EXECUTE format('GRANT %s%s ON %s TO %s%s', g.privilege_type, coalesce(' (' || quote_ident(g.column_name) || ')', ''), migrate._relation_name(view),
                       CASE g.grantee WHEN 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(g.grantee)) END,
                       CASE WHEN g.is_grantable THEN ' WITH GRANT OPTION' ELSE '' END);
    END LOOP;
END $$;

-- Source columns that the view shows unchanged, as {"source column": "view column"}.
CREATE FUNCTION migrate._view_pairs(flow integer, shape text, names text[], nums int2[]) RETURNS jsonb
LANGUAGE sql STABLE AS $$
    SELECT coalesce(jsonb_object_agg(pair.origin, pair.shown), '{}') FROM (
        SELECT c.name AS origin, n.name AS shown FROM migrate._flow f, migrate._columns_of(f.source) c, unnest(names, nums) AS n(name, num)
        WHERE shape = 'source' AND f.id = _view_pairs.flow AND c.attnum = n.num
        UNION ALL
        SELECT c.name, n.name FROM migrate._mapping p, LATERAL migrate._view_body(p.view) b, migrate._columns_of(p.origin) c,
             unnest(b.expressions) WITH ORDINALITY AS e(expression, i), unnest(names, nums) AS n(name, num)
        WHERE shape = 'target' AND p.flow = _view_pairs.flow AND p.direction = 'forward'
          AND e.expression = quote_ident(c.name) AND n.num = p.columns[e.i]) pair
$$;

CREATE FUNCTION migrate._copy_comments(source regclass, view regclass, pairs jsonb) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    d record;
BEGIN
    FOR d IN SELECT s.description, pairs ->> a.attname AS shown FROM pg_description s
             LEFT JOIN pg_attribute a ON a.attrelid = s.objoid AND a.attnum = s.objsubid AND s.objsubid > 0
             WHERE s.objoid = source AND s.classoid = 'pg_class'::regclass AND (s.objsubid = 0 OR pairs ? a.attname) LOOP
        EXECUTE CASE WHEN d.shown IS NULL THEN format('COMMENT ON VIEW %s IS %L', migrate._relation_name(view), d.description)
                     ELSE format('COMMENT ON COLUMN %s.%I IS %L', migrate._relation_name(view), d.shown, d.description) END;
    END LOOP;
END $$;

-- <stem><suffix>, with a number where that is taken, by what has a name of that kind or among `taken`. A stem that is too long for 63 bytes
-- is shortened, and tells by its hash what it was: a table and its indexes often begin alike.
CREATE FUNCTION migrate._free_name(namespace oid, stem text, suffix text, taken text[]) RETURNS text
LANGUAGE plpgsql STABLE AS $$
DECLARE
    whole text := stem;
    candidate text;
BEGIN
    IF octet_length(stem || suffix || '99') > 63 THEN
        suffix := format('_%s%s', left(md5(whole), 6), suffix);
        WHILE octet_length(stem || suffix || '99') > 63 LOOP
            stem := left(stem, -1);
        END LOOP;
    END IF;
    FOR i IN 1 .. 99 LOOP
        candidate := stem || suffix || CASE i WHEN 1 THEN '' ELSE i::text END;
        IF candidate <> ALL (taken) AND NOT EXISTS (SELECT FROM pg_class c WHERE c.relnamespace = namespace AND c.relname = candidate)
           AND NOT EXISTS (SELECT FROM pg_type t WHERE t.typnamespace = namespace AND t.typname = candidate)
           AND NOT EXISTS (SELECT FROM pg_statistic_ext s WHERE s.stxnamespace = namespace AND s.stxname = candidate) THEN
            RETURN candidate;
        END IF;
    END LOOP;
    PERFORM migrate._raise('42P07', format('no free name for "%s" to step aside under', whole), format('%I to %I are taken.', stem || suffix, candidate));
END $$;

CREATE FUNCTION migrate._aside_name(relation regclass, suffix text DEFAULT '_migrate', taken text[] DEFAULT '{}') RETURNS text
LANGUAGE sql STABLE AS $$ SELECT migrate._free_name(c.relnamespace, c.relname, suffix, taken) FROM pg_class c WHERE c.oid = relation $$;

CREATE FUNCTION migrate._require_create(role regrole, schema text) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
    IF NOT has_schema_privilege(role, schema, 'CREATE') THEN
        PERFORM migrate._raise('42501', format('role %s may not create a view in schema %I', role, schema), '',
            format('GRANT CREATE ON SCHEMA %I TO %s;', schema, role));
    END IF;
END $$;

-- The flow that a view is for: the one named, the only one, the one whose kin (target, source) bears the view's name or columns.
CREATE FUNCTION migrate._flow_for_view(m migrate._migration, flow text, relation text, existing regclass, shape text) RETURNS migrate._flow
LANGUAGE plpgsql STABLE AS $$
DECLARE
    found migrate._flow[];
BEGIN
    SELECT array_agg(f ORDER BY f.id) INTO found FROM migrate._flow f
    WHERE f.migration = m.id AND (flow IS NULL OR f.name = flow) AND NOT EXISTS (
        SELECT FROM migrate._flow e WHERE e.migration = m.id AND e.id < f.id AND flow IS NULL
        AND CASE shape WHEN 'target' THEN e.target = f.target ELSE e.source = f.source END);
    IF found IS NULL THEN
        PERFORM migrate._raise('42704', format('flow "%s" of migration "%s" does not exist', flow, m.name),
            format('Its flows are %s.', (SELECT string_agg(f.name, ', ' ORDER BY f.id) FROM migrate._flow f WHERE f.migration = m.id)));
    ELSIF cardinality(found) > 1 AND shape = 'source' THEN
        SELECT array_agg(f) INTO found FROM unnest(found) f WHERE f.source = existing;
    ELSIF cardinality(found) > 1 THEN
        SELECT coalesce(array_agg(f) FILTER (WHERE relation IN (f.name, (SELECT c.relname FROM pg_class c WHERE c.oid = f.target))),
                        array_agg(f) FILTER (WHERE existing IS NOT NULL AND NOT EXISTS (
                            SELECT k.name FROM migrate._columns_of(f.target, migrate._view_attnums(f.id, 'target')) k
                            EXCEPT SELECT c.name FROM migrate._columns_of(existing) c))) INTO found
        FROM unnest(found) f;
    END IF;
    IF cardinality(found) IS DISTINCT FROM 1 THEN
        PERFORM migrate._raise('22023', format('it is not clear which flow of migration "%s" view "%s" is for', m.name, relation),
            format('Its flows are %s.', (SELECT string_agg(format('%s (%s to %s)', f.name, f.source, f.target), ', ' ORDER BY f.id)
                                         FROM migrate._flow f WHERE f.migration = m.id)),
            'Name the view as the flow, or say it: migrate.add_view(…, flow => ''…'').');
    END IF;
    RETURN found[1];
END $$;

CREATE FUNCTION migrate._add_view(caller regrole, name text, view text, shape text DEFAULT 'target', flow text DEFAULT NULL, use text DEFAULT 'both') RETURNS text
LANGUAGE plpgsql AS $$
DECLARE
    m migrate._migration := migrate._lock(caller, name);
    place record;
    f migrate._flow;
    known migrate._view;
BEGIN
    PERFORM migrate._require_whole(m);
    IF shape IS NULL OR shape NOT IN ('target', 'source') THEN
        PERFORM migrate._raise('22023', format('shape "%s" of a view does not exist', shape), '',
            'Shape target gives the view the target''s columns, shape source lets a view take the source''s name and columns.');
    ELSIF use IS NULL OR use NOT IN ('both', 'read') OR use = 'read' AND shape = 'source' THEN
        PERFORM migrate._raise('22023', CASE use WHEN 'read' THEN 'a view for reading has the shape of the target' ELSE format('use "%s" of a view does not exist', use) END, '',
            'Use both is for reading and writing, through either shape; use read, with shape target, is for reading alone, and migrate.route moves its reads by and by.');
    ELSIF view IS NULL THEN
        PERFORM migrate._raise('22023', 'add_view needs the name of a view');
    ELSIF NOT EXISTS (SELECT FROM migrate._flow x WHERE x.migration = m.id) THEN
        PERFORM migrate._raise('55000', format('migration "%s" has no flow', m.name));
    END IF;
    SELECT * INTO place FROM migrate._view_name(caller, view, migrate._caller_search_path());
    SELECT * INTO known FROM migrate._view v WHERE v.view = place.existing;
    IF FOUND AND known.migration = m.id AND known.shape = _add_view.shape AND known.use = _add_view.use THEN
        RAISE NOTICE 'view % belongs to migration "%" already', place.existing, m.name;
        RETURN format('%s -> %s', m.phase, m.phase);
    ELSIF FOUND THEN
        PERFORM migrate._raise('55000', format('view %s belongs to migration "%s" already, with shape %s%s', place.existing,
            (SELECT x.name FROM migrate._migration x WHERE x.id = known.migration), known.shape, CASE known.use WHEN 'read' THEN ' and use read' ELSE '' END));
    ELSIF m.phase IN ('cut_over', 'finalized', 'cancelled') THEN
        PERFORM migrate._raise('55000', format('migration "%s" is %s', m.name, replace(m.phase, '_', ' ')), 'Views are added while the source serves.',
            CASE m.phase WHEN 'cut_over' THEN format('SELECT migrate.rollback(%L); then add the view.', m.name) ELSE '' END);
    END IF;
    f := migrate._flow_for_view(m, flow, place.relation, place.existing, shape);
    -- It takes the place of one that was dropped, which would bar the cutover for ever.
    DELETE FROM migrate._view v WHERE v.migration = m.id AND v.flow = f.id AND v.shape = _add_view.shape AND v.use = _add_view.use AND NOT EXISTS (SELECT FROM pg_class c WHERE c.oid = v.view);
    IF shape = 'source' THEN
        RETURN migrate._add_source_view(m, caller, f, place.schema, place.relation, place.existing);
    ELSIF place.existing IS NULL THEN
        RETURN migrate._add_new_view(m, caller, f, place.schema, place.relation, use);
    END IF;
    RETURN migrate._adopt_view(m, caller, f, place.existing, use);
END $$;

-- Raises when the view, once switched, could not be read or written as before.
CREATE FUNCTION migrate._require_view_rights(v migrate._view) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    missing record;
BEGIN
    SELECT r.*, s.side, CASE c.relkind WHEN 'S' THEN 'sequence' ELSE 'table' END AS what INTO missing
    FROM unnest(ARRAY['source', 'target']) AS s(side), migrate._view_rights(v, s.side) r JOIN pg_class c ON c.oid = r.relation LIMIT 1;
    IF FOUND THEN
        PERFORM migrate._raise('42501', format('role %s lacks rights on %s %s that view %s needs', missing.role, missing.what, missing.relation, v.view),
            format('Missing: %s. When the %s serves, the view %s with the rights of this role.', missing.privileges, missing.side,
                   CASE missing.what WHEN 'table' THEN 'reads and writes that table' ELSE 'takes defaults from that sequence' END),
            format('GRANT %s ON %s%s TO %s;', missing.privileges, CASE missing.what WHEN 'sequence' THEN 'SEQUENCE ' ELSE '' END, missing.relation, missing.role));
    END IF;
END $$;

-- The rows that policies hide stay hidden only if the view asks for the rights of who reads it.
CREATE FUNCTION migrate._new_view_options(f migrate._flow) RETURNS text
LANGUAGE plpgsql STABLE AS $$
BEGIN
    IF NOT (SELECT relrowsecurity FROM pg_class WHERE oid = f.source) THEN
        RETURN '';
    ELSIF current_setting('server_version_num')::int < 150000 THEN
        PERFORM migrate._raise('0A000', format('table %s has row-level security, which a view of PostgreSQL before 15 would pass by', f.source),
            'Such a view reads with its owner''s rights, and policies do not bind the owner.');
    ELSIF NOT (SELECT relrowsecurity FROM pg_class WHERE oid = f.target) THEN
        PERFORM migrate._raise('55000', format('table %s has row-level security, but %s has not', f.source, f.target),
            'After cutover the view would show the rows that the policies hide now.',
            format('ALTER TABLE %s ENABLE ROW LEVEL SECURITY; and give it policies like those of %s.', f.target, f.source));
    END IF;
    RETURN ' WITH (security_invoker = true)';
END $$;

CREATE FUNCTION migrate._add_new_view(m migrate._migration, caller regrole, f migrate._flow, schema text, relation text, use text) RETURNS text
LANGUAGE plpgsql AS $$
DECLARE
    owner regrole := migrate._table_owner(f.source);
    attnums int2[] := migrate._view_attnums(f.id, 'target');
    names text[] := (SELECT array_agg(c.name) FROM migrate._columns_of(f.target, attnums) c);
    nums int2[] := (SELECT array_agg(c.attnum) FROM migrate._columns_of(f.target, attnums) c);
    pairs jsonb := migrate._view_pairs(f.id, 'target', names, nums);
    v migrate._view;
    missing text;
BEGIN
    PERFORM migrate._require_create(caller, schema);
    PERFORM migrate._require_create(owner, schema);
    EXECUTE format('CREATE VIEW %I.%I%s AS %s', schema, relation, migrate._new_view_options(f),
                   migrate._view_select(f.id, 'target', 'source', names, nums));
    INSERT INTO migrate._view VALUES (m.id, f.id, format('%I.%I', schema, relation)::regclass, 'target', true, NULL, use, CASE use WHEN 'read' THEN 0 END) RETURNING * INTO v;
    EXECUTE format('ALTER VIEW %I.%I OWNER TO %s', schema, relation, owner);
    PERFORM migrate._copy_grants(f.source, v.view, pairs, use);
    PERFORM migrate._require_view_rights(v);
    SELECT string_agg(c.name, ', ') INTO missing FROM migrate._columns_of(f.target) c WHERE c.attnum <> ALL (attnums);
    IF missing IS NOT NULL THEN
        RAISE NOTICE 'view % does not show column % of %, which no mapping fills', v.view, missing, f.target;
    END IF;
    PERFORM migrate._try_view(v, caller);
    PERFORM migrate._notice_identity(f, pairs) WHERE use = 'both';
    PERFORM migrate._event(m, caller, 'view', format('created view %s over %s', v.view, f.source));
    RETURN format('%s -> %s, view %s over %s', m.phase, m.phase, v.view, f.source);
END $$;

-- An identity cannot be lent to a view as a default can.
CREATE FUNCTION migrate._notice_identity(f migrate._flow, pairs jsonb) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    c record;
BEGIN
    FOR c IN SELECT a.attname AS origin, k.attname AS dest FROM pg_attribute a
             JOIN migrate._mapping p ON p.flow = f.id AND p.direction = 'forward' AND a.attnum = ANY (p.key_origin)
             JOIN pg_attribute k ON k.attrelid = f.target AND k.attnum = p.key_dest[array_position(p.key_origin, a.attnum)]
             WHERE a.attrelid = f.source AND a.attidentity <> '' AND NOT k.atthasdef AND k.attidentity = '' LOOP
        RAISE NOTICE 'column % of % is an identity, but column % of % has no default: after cutover an INSERT must give it', c.origin, f.source, c.dest, f.target
            USING HINT = format('ALTER TABLE %s ALTER COLUMN %I ADD GENERATED BY DEFAULT AS IDENTITY; cutover sets its sequence.', f.target, c.dest);
    END LOOP;
END $$;

CREATE FUNCTION migrate._adopt_view(m migrate._migration, caller regrole, f migrate._flow, view regclass, use text) RETURNS text
LANGUAGE plpgsql AS $$
DECLARE
    v migrate._view := (m.id, f.id, view, 'target', false, NULL, use, CASE use WHEN 'read' THEN 0 END, NULL, NULL, NULL);
    kind "char" := (SELECT relkind FROM pg_class WHERE oid = view);
    differences text;
BEGIN
    IF kind <> 'v' THEN
        PERFORM migrate._raise('42809', format('%s is not a view', view), '',
            CASE WHEN view = f.source THEN format('SELECT migrate.add_view(%L, %L, shape => ''source''); lets a view take the table''s name.', m.name, view)
                 ELSE 'Give a name that is free, or that of a view.' END);
    END IF;
    PERFORM migrate._require_member(caller, view);
    SELECT string_agg(CASE WHEN c.name IS NULL THEN format('column "%s" %s is missing', k.name, k.type)
                           WHEN k.name IS NULL THEN format('column "%s" %s is none that the mapping fills', c.name, c.type)
                           ELSE format('column "%s" is %s, but %s in %s', c.name, c.type, k.type, f.target) END, '; ' ORDER BY k.attnum, c.attnum)
    INTO differences
    FROM migrate._columns_of(f.target, migrate._view_attnums(f.id, 'target')) k FULL JOIN migrate._columns_of(view) c ON c.name = k.name
    WHERE (k.name IS NULL) OR (c.name IS NULL) OR (c.atttypid, c.atttypmod, c.attcollation) IS DISTINCT FROM (k.atttypid, k.atttypmod, k.attcollation);
    IF differences IS NOT NULL THEN
        PERFORM migrate._raise('42P16', format('view %s has not the columns of table %s', view, f.target), differences || '.',
            'Give it these columns, with these types (a cast in its select list will do), or choose another name.');
    END IF;
    PERFORM migrate._require_view_rights(v);
    PERFORM migrate._require_unwritten(v) WHERE use = 'read';
    INSERT INTO migrate._view VALUES (v.*);
    PERFORM migrate._under_locks(m, caller, 'adopt view ' || view, ARRAY[view], '{ACCESS EXCLUSIVE}',
        format('SELECT migrate._try_view(v, %L)::text FROM migrate._view v WHERE v.migration = %s AND v.view = %s', caller, m.id, view::oid),
        clock_timestamp() + migrate._opt_ms(m.id, 'cutover_timeout') * interval '1 ms');
    PERFORM migrate._event(m, caller, 'view', format('adopted view %s, now over %s', view, f.source));
    RETURN format('%s -> %s, view %s over %s', m.phase, m.phase, view, f.source);
END $$;

CREATE FUNCTION migrate._add_source_view(m migrate._migration, caller regrole, f migrate._flow, schema text, relation text, existing regclass) RETURNS text
LANGUAGE plpgsql AS $$
DECLARE
    missing text;
    done record;
    d record;
BEGIN
    IF existing IS DISTINCT FROM f.source THEN
        PERFORM migrate._raise('42809', format('%I.%I is not the source of migration "%s"', schema, relation, m.name), '',
            format('SELECT migrate.add_view(%L, %L, shape => ''source''); lets a view take the name of table %s.', m.name, f.source, f.source));
    END IF;
    IF migrate._opt(m.id, 'cutover') = 'swap' THEN
        PERFORM migrate._raise('55000', format('table %s cannot step aside for a view', f.source), format('Option "cutover" of migration "%s" is swap: cutover gives its name to table %s.', m.name, f.target),
            format('SELECT migrate.set(%L, ''cutover'', ''default''); takes that back.', m.name));
    END IF;
    SELECT string_agg(c.name, ', ') INTO missing FROM migrate._columns_of(f.source) c
    WHERE NOT EXISTS (SELECT FROM migrate._mapping p WHERE p.flow = f.id AND p.direction = 'reverse' AND c.attnum = ANY (p.columns));
    IF missing IS NOT NULL THEN
        PERFORM migrate._raise('55000', format('the reverse mapping of flow "%s" does not give every column of %s', f.name, f.source),
            format('Missing: %s. After cutover the view must show them from %s.', missing, f.target),
            format('Give a reverse mapping with all columns at define, or let applications use a view of shape target: SELECT migrate.add_view(%L, ''…'');', m.name));
    END IF;
    PERFORM migrate._require_create(caller, schema);
    PERFORM migrate._require_create(migrate._table_owner(f.source), schema);
    PERFORM migrate._check_name_replicated(f.source, m.name);
    FOR d IN SELECT DISTINCT r.ev_class::regclass AS view FROM pg_depend p JOIN pg_rewrite r ON p.classid = 'pg_rewrite'::regclass AND r.oid = p.objid
             WHERE p.refclassid = 'pg_class'::regclass AND p.refobjid = f.source AND r.ev_class NOT IN (SELECT q.view FROM migrate._mapping q) ORDER BY 1 LOOP
        RAISE NOTICE 'view % reads table % itself and goes on doing so after cutover', d.view, f.source
            USING HINT = 'Create it again after this call, to let it read the view.';
    END LOOP;
    SELECT * INTO done FROM migrate._under_locks(m, caller, format('let table %s step aside', f.source), ARRAY[f.source], '{ACCESS EXCLUSIVE}',
        format('SELECT migrate._step_aside(%L::regrole, %s, %L)', caller, f.id, migrate._aside_name(f.source)),
        clock_timestamp() + migrate._opt_ms(m.id, 'cutover_timeout') * interval '1 ms');
    PERFORM migrate._event(m, caller, 'view', format('view %I.%I took the name of the source, which is now %s', schema, relation, f.source));
    RETURN format('%s -> %s, view %I.%I over %s, the former %s', m.phase, m.phase, schema, relation, done.result, relation);
END $$;

-- define and add_flow: what is to become what. Nothing but the extension's own tables and views is written here.

CREATE FUNCTION migrate._create_mapping_view(view_name text, origin regclass, dest regclass, mapping text, filter text, search_path text, caller regrole,
    OUT view regclass, OUT columns int2[], OUT bare int2[], OUT inverse int2[], OUT constants text[], OUT reads int2[])
LANGUAGE C AS 'MODULE_PATHNAME', 'migrate_create_mapping_view';
CREATE FUNCTION migrate._caller_search_path() RETURNS text
LANGUAGE C AS 'MODULE_PATHNAME', 'migrate_caller_search_path';
CREATE FUNCTION migrate._commit_synchronously() RETURNS void
LANGUAGE C AS 'MODULE_PATHNAME', 'migrate_commit_synchronously';

-- Raises unless the relation is of a kind whose writes row triggers see and whose rows stay put.
CREATE FUNCTION migrate._require_table(relation regclass, role text) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    c pg_class;
    what text;
BEGIN
    SELECT * INTO c FROM pg_class WHERE oid = relation;
    IF NOT FOUND THEN
        PERFORM migrate._raise('42P01', format('%s with OID %s does not exist', role, relation::oid), '', 'Name a table: SELECT oid::regclass FROM pg_class WHERE relkind IN (''r'', ''p''); lists them.');
    END IF;
    what := CASE
        WHEN c.relkind = 'f' THEN 'a foreign table'
        WHEN c.relkind IN ('v', 'm') THEN 'a view'
        WHEN c.relkind NOT IN ('r', 'p') THEN 'not a table'
        WHEN c.relpersistence = 't' THEN 'a temporary table'
        WHEN c.relpersistence = 'u' THEN 'an unlogged table'
        WHEN c.oid < 16384 OR c.relnamespace = 'pg_catalog'::regnamespace THEN 'a system catalog'
        WHEN c.relnamespace = 'migrate'::regnamespace THEN 'one of the extension''s own tables'
        WHEN c.relispartition THEN 'a partition'
        WHEN EXISTS (SELECT FROM pg_inherits WHERE inhrelid = c.oid) THEN 'an inheritance child'
        WHEN c.relkind = 'r' AND EXISTS (SELECT FROM pg_inherits WHERE inhparent = c.oid) THEN 'an inheritance parent'
        WHEN EXISTS (SELECT FROM pg_rewrite WHERE ev_class = c.oid) THEN 'a table with rules'
        WHEN c.relforcerowsecurity THEN 'a table with FORCE ROW LEVEL SECURITY'
    END;
    IF what IS NOT NULL THEN
        PERFORM migrate._raise('42809', format('%s "%s" is %s', role, relation, what), 'Its rows could change, or be hidden, without a trigger seeing it.',
            CASE what WHEN 'an unlogged table' THEN format('ALTER TABLE %s SET LOGGED;', relation)
                      WHEN 'a partition' THEN 'Name the partitioned table itself.'
                      WHEN 'a table with FORCE ROW LEVEL SECURITY' THEN format('ALTER TABLE %s NO FORCE ROW LEVEL SECURITY;', relation)
                      WHEN 'a table with rules' THEN format('Replace the rules of %s by triggers.', relation)
                      ELSE 'Use an ordinary or partitioned table.' END);
    END IF;
END $$;

-- The mapping for equal column names, as text.
CREATE FUNCTION migrate._equal_names(source regclass, target regclass) RETURNS text
LANGUAGE sql STABLE AS $$
    SELECT string_agg(format('%I', s.attname), ', ' ORDER BY t.attnum)
    FROM pg_attribute s JOIN pg_attribute t ON t.attname = s.attname
    WHERE s.attrelid = source AND t.attrelid = target AND s.attnum > 0 AND t.attnum > 0 AND NOT s.attisdropped AND NOT t.attisdropped
      AND t.attgenerated = ''
$$;

-- Types whose order is the same on both sides, so that ranges of keys agree: equal types, the exact numbers, the texts.
CREATE FUNCTION migrate._same_order(a oid, b oid) RETURNS boolean
LANGUAGE sql IMMUTABLE AS $$
    SELECT a = b OR (a IN (20, 21, 23, 1700) AND b IN (20, 21, 23, 1700)) OR (a IN (25, 1043) AND b IN (25, 1043))
$$;

-- Whether a column of type b takes each value of type a as it is, or refuses it, and rounds none: a rounded key would not be found again.
-- (-1 is no modifier. numeric: precision and scale; times: the digits of a second, 6 at most.)
CREATE FUNCTION migrate._keeps_keys(a oid, a_typmod integer, b oid, b_typmod integer) RETURNS boolean
LANGUAGE sql IMMUTABLE AS $$
    SELECT b_typmod = -1 OR (a = b AND a_typmod = b_typmod)
        OR CASE WHEN b = 'numeric'::regtype THEN CASE WHEN a <> b THEN scale.of_b >= 0 ELSE a_typmod <> -1 AND scale.of_b >= scale.of_a END
                WHEN b IN ('timestamp'::regtype, 'timestamptz'::regtype, 'time'::regtype, 'timetz'::regtype) THEN b_typmod >= CASE a_typmod WHEN -1 THEN 6 ELSE a_typmod END
                ELSE b <> 'interval'::regtype END
    FROM (SELECT ((a_typmod - 4) & 2047 # 1024) - 1024, ((b_typmod - 4) & 2047 # 1024) - 1024) AS scale(of_a, of_b)
$$;

-- The key columns of dest that would round what origin has: what is wrong with each, and the statement that mends it.
CREATE FUNCTION migrate._rounded_keys(origin regclass, dest regclass, key_origin int2[], key_dest int2[]) RETURNS TABLE (message text, hint text)
LANGUAGE sql STABLE AS $$
    SELECT format('key column %I of "%s" is of type %s, %I of "%s" of %s: a key that is rounded would not be found again',
                  d.attname, dest, format_type(d.atttypid, d.atttypmod), o.attname, origin, format_type(o.atttypid, o.atttypmod)),
           format('ALTER TABLE %s ALTER %I TYPE %s;', dest, d.attname, format_type(o.atttypid, o.atttypmod))
    FROM unnest(key_origin, key_dest) AS k(from_column, to_column)
    JOIN pg_attribute o ON o.attrelid = origin AND o.attnum = k.from_column
    JOIN pg_attribute d ON d.attrelid = dest AND d.attnum = k.to_column
    WHERE NOT migrate._keeps_keys(o.atttypid, o.atttypmod, d.atttypid, d.atttypmod)
    ORDER BY d.attnum
$$;

-- Chooses the unique index of dest that identifies its rows, and says where each of its columns comes from. Raises with the
-- reason when there is none. columns/bare/constants are those of _create_mapping_view; fixed are the columns of origin that the
-- mapping's filter holds to one value.
CREATE FUNCTION migrate._choose_key(origin regclass, dest regclass, columns int2[], bare int2[], constants text[], fixed int2[],
    OUT key_dest int2[], OUT key_view int2[], OUT key_origin int2[], OUT key_const text[])
LANGUAGE plpgsql AS $$
DECLARE
    i record;
    p int;
    reason text := 'it has no unique index';
    deferrable boolean;
BEGIN
    FOR i IN SELECT x.*, x.indkey[0:x.indnkeyatts - 1] AS keys FROM pg_index x WHERE x.indrelid = dest AND x.indisunique
             ORDER BY x.indisprimary DESC, x.indnkeyatts, x.indexrelid LOOP
        reason := CASE
            WHEN NOT i.indisvalid OR NOT i.indisready THEN 'is not valid'
            WHEN NOT i.indimmediate THEN 'is deferrable'
            WHEN i.indpred IS NOT NULL THEN 'is partial'
            WHEN i.indexprs IS NOT NULL THEN 'is on an expression'
            WHEN NOT migrate._compares_as_columns(i.indexrelid) THEN 'has another collation or operator class than its columns'
            WHEN EXISTS (SELECT FROM pg_attribute a WHERE a.attrelid = dest AND a.attnum = ANY (i.keys) AND NOT a.attnotnull) THEN 'has a nullable column'
            WHEN EXISTS (SELECT FROM unnest(i.keys) k WHERE NOT k = ANY (columns)) THEN 'has a column that is not mapped'
            WHEN EXISTS (SELECT FROM unnest(i.keys) k WHERE bare[array_position(columns, k)] = 0 AND constants[array_position(columns, k)] IS NULL)
                THEN 'has a column that is mapped to an expression'
            WHEN NOT EXISTS (SELECT FROM unnest(i.keys) k WHERE bare[array_position(columns, k)] <> 0) THEN 'has only constants'
            WHEN EXISTS (SELECT FROM unnest(i.keys) k JOIN pg_attribute d ON d.attrelid = dest AND d.attnum = k
                         JOIN pg_attribute o ON o.attrelid = origin AND o.attnum = bare[array_position(columns, k)]
                         WHERE NOT migrate._same_order(o.atttypid, d.atttypid)) THEN 'has a column whose type sorts otherwise than its source''s'
            WHEN EXISTS (SELECT FROM unnest(i.keys) k JOIN pg_attribute d ON d.attrelid = dest AND d.attnum = k
                         JOIN pg_attribute o ON o.attrelid = origin AND o.attnum = bare[array_position(columns, k)]
                         WHERE o.attcollation <> d.attcollation) THEN 'has a column whose collation differs from its source''s'
            WHEN EXISTS (SELECT FROM pg_attribute d JOIN pg_collation c ON c.oid = d.attcollation
                         WHERE d.attrelid = dest AND d.attnum = ANY (i.keys) AND NOT c.collisdeterministic) THEN 'has a column with a nondeterministic collation'
            WHEN EXISTS (SELECT FROM pg_attribute d, migrate._plain_type(d.atttypid, d.atttypmod) t JOIN pg_type y ON y.oid = t.type
                         WHERE d.attrelid = dest AND d.attnum = ANY (i.keys) AND y.typcategory = 'A') THEN 'has a column of an array type'
            WHEN cardinality(i.keys) > 1 AND EXISTS (SELECT FROM pg_attribute d JOIN pg_type t ON t.oid = d.atttypid
                         WHERE d.attrelid = dest AND d.attnum = ANY (i.keys) AND t.typtype = 'c') THEN 'has a column of a composite type beside others'
            WHEN EXISTS (SELECT FROM pg_attribute a WHERE (a.attrelid = dest AND a.attnum = ANY (i.keys) OR a.attrelid = origin AND a.attnum IN (SELECT bare[array_position(columns, k)] FROM unnest(i.keys) k))
                           AND migrate._text_cast(a.atttypid) IS NOT NULL)
                THEN (SELECT format('has a column whose type has a cast of its own, %s', min(migrate._text_cast(a.atttypid))) FROM pg_attribute a
                      WHERE a.attrelid = dest AND a.attnum = ANY (i.keys) OR a.attrelid = origin AND a.attnum IN (SELECT bare[array_position(columns, k)] FROM unnest(i.keys) k))
            WHEN EXISTS (SELECT FROM pg_attribute d JOIN pg_type t ON t.oid = d.atttypid
                         WHERE d.attrelid = dest AND d.attnum = ANY (i.keys)
                           AND NOT EXISTS (SELECT FROM pg_opclass o WHERE o.opcmethod = 403 AND o.opcdefault AND o.opcnamespace = 'pg_catalog'::regnamespace
                                           AND (o.opcintype = t.oid OR o.opcintype = t.typbasetype OR (t.oid = 1043 AND o.opcintype = 25) OR (t.oid = 650 AND o.opcintype = 869)
                                                OR (t.typtype = 'e' AND o.opcintype = 3500) OR (t.typtype = 'r' AND o.opcintype = 3831) OR (t.typtype = 'c' AND o.opcintype = 2249)))) THEN 'has a column of a type that PostgreSQL itself cannot sort'
        END;
        IF reason IS NULL THEN
            key_dest := i.keys::int2[];
            EXIT;
        END IF;
        reason := format('index "%s" %s', i.indexrelid::regclass, reason);
    END LOOP;
    IF key_dest IS NULL THEN
        PERFORM migrate._raise('42P10', format('target "%s" has no usable key for this mapping', dest), format('The last reason: %s.', reason),
            format('Map the columns of a unique index of %1$s to bare NOT NULL columns of %2$s of the same type and collation, as in id AS user_id, or to constants; or make one: ALTER TABLE %1$s ADD PRIMARY KEY (…);', dest, origin));
    END IF;
    FOR n IN 1 .. array_length(key_dest, 1) LOOP
        p := array_position(columns, key_dest[n]);
        key_view[n] := p;
        key_origin[n] := bare[p];
        key_const[n] := CASE WHEN bare[p] = 0 THEN constants[p] END;
    END LOOP;
    PERFORM migrate._raise('42P10', r.message, '', r.hint) FROM migrate._rounded_keys(origin, dest, key_origin, key_dest) r LIMIT 1;
    PERFORM migrate._require_unique(origin, key_origin, fixed, dest);
END $$;

-- Raises unless some unique, not partial index of origin, that compares as its columns do, has just the (non-zero) columns of key, all NOT NULL, and columns that
-- are fixed to one value. It may be deferrable.
CREATE FUNCTION migrate._require_unique(origin regclass, key int2[], fixed int2[], dest regclass) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    names text := (SELECT string_agg(quote_ident(attname), ', ' ORDER BY array_position(key, attnum)) FROM pg_attribute WHERE attrelid = origin AND attnum = ANY (key));
    nullable text := (SELECT string_agg(quote_ident(attname), ', ') FROM pg_attribute WHERE attrelid = origin AND attnum = ANY (array_remove(key, 0::int2)) AND NOT attnotnull);
BEGIN
    IF NOT EXISTS (SELECT FROM pg_index i WHERE i.indrelid = origin AND i.indisunique AND i.indisvalid AND i.indpred IS NULL AND i.indexprs IS NULL AND migrate._compares_as_columns(i.indexrelid)
                   AND (SELECT bool_and(k = ANY (i.indkey[0:i.indnkeyatts - 1])) FROM unnest(key) k WHERE k > 0)
                   AND (SELECT bool_and(a = ANY (key || fixed)) FROM unnest(i.indkey[0:i.indnkeyatts - 1]) a)) THEN
        PERFORM migrate._raise('42P10', format('"%s" has no unique index on the columns (%s) that the key of "%s" is mapped from', origin, names, dest), '',
            format('ALTER TABLE %s ADD UNIQUE (%s);', origin, names));
    END IF;
    IF nullable IS NOT NULL THEN
        PERFORM migrate._raise('42P10', format('column (%s) of "%s" is nullable, but the key of "%s" is mapped from it', nullable, origin, dest), '',
            format('ALTER TABLE %s ALTER COLUMN %s SET NOT NULL;', origin, nullable));
    END IF;
END $$;

-- Makes the mapping view of a flow in one direction and its row in _mapping. Gives back what the view maps bare and invertibly.
CREATE FUNCTION migrate._make_mapping(flow integer, direction text, origin regclass, dest regclass, mapping text, filter text, fixed int2[], search_path text, caller regrole)
RETURNS record LANGUAGE plpgsql AS $$
DECLARE
    v record;
    k record;
    missing text;
BEGIN
    SELECT * INTO v FROM migrate._create_mapping_view(format('flow_%s_%s', flow, direction), origin, dest, mapping, filter, search_path, caller);
    SELECT * INTO k FROM migrate._choose_key(origin, dest, v.columns, v.bare, v.constants, fixed);
    missing := (SELECT string_agg(quote_ident(a.attname), ', ' ORDER BY a.attnum) FROM pg_attribute a
                WHERE a.attrelid = dest AND a.attnum > 0 AND NOT a.attisdropped AND a.attnotnull AND NOT a.atthasdef AND a.attidentity = '' AND NOT a.attnum = ANY (v.columns));
    IF direction = 'forward' AND missing IS NOT NULL THEN
        PERFORM migrate._raise('23502', format('column (%s) of "%s" is NOT NULL, has no default and is not mapped', missing, dest), '',
            format('Add it to the mapping, as in: … AS %1$s; or ALTER TABLE %2$s ALTER COLUMN %1$s SET DEFAULT …;', split_part(missing, ', ', 1), dest));
    END IF;
    INSERT INTO migrate._mapping VALUES (flow, direction, v.view, origin, dest, v.columns, v.reads, k.key_dest, k.key_view, k.key_origin, k.key_const,
        filter IS NOT NULL, (SELECT bool_and(b <> 0 OR c IS NOT NULL) FROM unnest(v.bare, v.constants) x(b, c)));
    EXECUTE format('COMMENT ON VIEW %s IS %L', v.view, format('mapping of migration flow %s, %s: from %s to %s', flow, direction, origin, dest));
    -- A row lock needs the right to UPDATE the view, but what it reads is another's table: not to be written through it.
    EXECUTE format('CREATE RULE read_only AS ON UPDATE TO %s DO INSTEAD NOTHING', v.view);
    PERFORM migrate._revoke_all(v.view, 'TABLE', v.view::text);  -- default privileges are not meant for it
    PERFORM migrate._lend_views(m) FROM migrate._flow f JOIN migrate._migration m ON m.id = f.migration WHERE f.id = flow;
    RETURN v;
END $$;

-- The reverse mapping that follows from the forward one: each invertible column back to its source column, and a filter that
-- keeps to the constants. NULL where the key cannot be mapped back.
CREATE FUNCTION migrate._derive_reverse(m migrate._mapping, inverse int2[], constants text[], OUT mapping text, OUT filter text, OUT fixed int2[], OUT gaps text[])
LANGUAGE plpgsql AS $$
BEGIN
    SELECT string_agg(format('%I AS %I', t.attname, s.attname), ', ' ORDER BY s.attnum) INTO mapping
    FROM (SELECT DISTINCT ON (s) s, t FROM unnest(inverse, m.columns) AS x(s, t) WHERE s > 0 ORDER BY s, (t = ANY (m.key_dest)) DESC, t) x
    JOIN pg_attribute s ON s.attrelid = m.origin AND s.attnum = x.s
    JOIN pg_attribute t ON t.attrelid = m.dest AND t.attnum = x.t
    WHERE s.attgenerated = '';
    SELECT string_agg(format('%I = %L::%s', t.attname, c, format_type(t.atttypid, t.atttypmod)), ' AND ' ORDER BY t.attnum), coalesce(array_agg(t.attnum), '{}') INTO filter, fixed
    FROM unnest(constants, m.columns) AS x(c, t) JOIN pg_attribute t ON t.attrelid = m.dest AND t.attnum = x.t
    WHERE c IS NOT NULL;
    SELECT coalesce(array_agg(format('a write to column %I of %s is not carried back to %s: its expression has no inverse', t.attname, m.dest, m.origin) ORDER BY t.attnum), '{}') INTO gaps
    FROM unnest(inverse, constants, m.columns) AS x(s, c, t) JOIN pg_attribute t ON t.attrelid = m.dest AND t.attnum = x.t
    WHERE s = 0 AND c IS NULL;
    SELECT gaps || coalesce(array_agg(format('a row inserted into %s can be carried back only if %s has a row of its key: column %I of %s is NOT NULL, has no default and is not carried', m.dest, m.origin, a.attname, m.origin) ORDER BY a.attnum), '{}') INTO gaps
    FROM pg_attribute a
    WHERE a.attrelid = m.origin AND a.attnum > 0 AND NOT a.attisdropped AND a.attnotnull AND NOT a.atthasdef AND a.attidentity = '' AND NOT a.attnum = ANY (inverse);
END $$;

-- delete: a row deleted from the target is deleted from the source too (the two are one entity); keep: it is not (the target is a
-- part of the source). NULL where neither the foreign keys nor the columns tell.
CREATE FUNCTION migrate._default_on_target_delete(m migrate._mapping, not_carried text[]) RETURNS text
LANGUAGE sql STABLE AS $$
    SELECT CASE WHEN EXISTS (SELECT FROM pg_constraint c WHERE c.contype = 'f' AND c.conrelid = m.dest AND c.confrelid = m.origin) THEN 'keep'
                WHEN not_carried = '{}' THEN 'delete' END
$$;

-- Makes the reverse mapping. One that was derived, not given, may turn out impossible: then nothing is carried back, and the
-- gap says why.
CREATE FUNCTION migrate._make_reverse(f migrate._flow, mapping text, filter text, fixed int2[], search_path text, caller regrole) RETURNS text[]
LANGUAGE plpgsql AS $$
BEGIN
    IF f.reverse IS NULL AND mapping IS NULL THEN
        RETURN ARRAY[format('nothing written to %s is carried back to %s: no column has an inverse', f.target, f.source)];
    END IF;
    PERFORM migrate._make_mapping(f.id, 'reverse', f.target, f.source, mapping, filter, fixed, search_path, caller);
    RETURN '{}';
EXCEPTION WHEN OTHERS THEN
    IF f.reverse IS NOT NULL THEN
        RAISE;
    END IF;
    RETURN ARRAY[format('nothing written to %s is carried back to %s: %s', f.target, f.source, SQLERRM)];
END $$;

-- Rows of a target that several flows feed go back to one source only. Where a flow's reverse mapping is not held to its share of
-- the target by a constant, it would write every source's rows into its own: it is taken away, and the gap says so.
CREATE FUNCTION migrate._drop_shared_reverse(m migrate._migration) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    r record;
BEGIN
    FOR r IN SELECT p.view, f.id, f.target, f.source FROM migrate._mapping p JOIN migrate._flow f ON f.id = p.flow
             WHERE f.migration = m.id AND p.direction = 'reverse' AND NOT p.filtered
               AND EXISTS (SELECT FROM migrate._flow g WHERE g.migration = f.migration AND g.target = f.target AND g.id <> f.id) LOOP
        EXECUTE format('DROP VIEW %s', r.view);
        DELETE FROM migrate._mapping p WHERE p.flow = r.id AND p.direction = 'reverse';
        UPDATE migrate._flow f SET reverse_gaps = ARRAY[format('nothing written to %s is carried back to %s: several flows feed it, and no column that is mapped to a constant tells whose a row is', r.target, r.source)]
        WHERE f.id = r.id;
    END LOOP;
END $$;

CREATE FUNCTION migrate._create_flow(caller regrole, m migrate._migration, flow_name text, source regclass, target regclass, mapping text, filter text,
                                     reverse text, on_target_delete text) RETURNS void
LANGUAGE plpgsql AS $body$
DECLARE
    f migrate._flow;
    fwd migrate._mapping;
    v record;
    r record;
    path text := migrate._caller_search_path();
BEGIN
    IF source IS NULL OR target IS NULL THEN
        PERFORM migrate._raise('22004', 'source and target must be given', '', 'SELECT migrate.define(''users_to_profiles'', source => ''users'', target => ''user_profiles'');');
    END IF;
    PERFORM migrate._require_member(caller, source);
    PERFORM migrate._require_member(caller, target);
    PERFORM migrate._require_table(source, 'source');
    PERFORM migrate._require_table(target, 'target');
    IF source = target THEN
        PERFORM migrate._raise('22023', format('source and target are the same table "%s"', source), '', 'Create the table in its new shape under another name first.');
    END IF;
    IF on_target_delete NOT IN ('delete', 'keep') THEN
        PERFORM migrate._raise('22023', format('on_target_delete is "%s"', on_target_delete), 'It may be "delete" or "keep".', 'Write on_target_delete => ''keep'' where the target is a part of the source.');
    END IF;
    INSERT INTO migrate._flow (migration, name, source, target, mapping, filter, reverse, on_target_delete)
    VALUES (m.id, flow_name, source, target, mapping, filter, reverse, on_target_delete) RETURNING * INTO f;
    IF mapping IS NULL THEN
        mapping := migrate._equal_names(source, target);
        IF mapping IS NULL THEN
            PERFORM migrate._raise('42703', format('"%s" and "%s" have no column of the same name', source, target), '', 'Give the mapping: mapping => $$ id AS user_id, … $$');
        END IF;
    END IF;
    v := migrate._make_mapping(f.id, 'forward', source, target, mapping, filter, '{}', path, caller);
    SELECT * INTO fwd FROM migrate._mapping x WHERE x.flow = f.id AND x.direction = 'forward';
    f.not_carried := (SELECT coalesce(array_agg(a.attname::text ORDER BY a.attnum), '{}') FROM pg_attribute a, migrate._view_body(fwd.view) b
                      WHERE a.attrelid = source AND a.attnum > 0 AND NOT a.attisdropped AND NOT b.yields && ARRAY[a.attnum, 0::int2]);
    SELECT * INTO r FROM migrate._derive_reverse(fwd, v.inverse, v.constants);
    f.reverse_gaps := r.gaps;
    IF reverse IS NOT NULL THEN
        r.mapping := reverse;
        f.reverse_gaps := '{}';
    END IF;
    IF filter IS NOT NULL THEN
        f.reverse_gaps := f.reverse_gaps || format('a row inserted into %1$s with the key of a row of %2$s that the filter leaves out is written over that row; where defaults of %2$s make it one that the filter leaves out, it stays there when it is deleted from %1$s', target, source);
    END IF;
    f.reverse_gaps := f.reverse_gaps || migrate._make_reverse(f, r.mapping, r.filter, r.fixed, path, caller);
    UPDATE migrate._flow x SET not_carried = f.not_carried, reverse_gaps = f.reverse_gaps,
        on_target_delete = coalesce(x.on_target_delete, migrate._default_on_target_delete(fwd, f.not_carried)) WHERE x.id = f.id;
    PERFORM migrate._drop_shared_reverse(m);
    SELECT * INTO f FROM migrate._flow x WHERE x.id = f.id;
    PERFORM migrate._say_what_is_left_out(m, f, fwd);
END $body$;

-- Notices at define: what is not carried, and what cannot map back.
CREATE FUNCTION migrate._say_what_is_left_out(m migrate._migration, f migrate._flow, fwd migrate._mapping) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    gap text;
    unfilled text := (SELECT string_agg(quote_ident(attname), ', ' ORDER BY attnum) FROM pg_attribute
                      WHERE attrelid = f.target AND attnum > 0 AND NOT attisdropped AND attgenerated = '' AND NOT attnum = ANY (fwd.columns));
BEGIN
    IF f.not_carried <> '{}' THEN
        RAISE NOTICE 'columns of % that are not carried: %', f.source, (SELECT string_agg(quote_ident(c), ', ') FROM unnest(f.not_carried) c);
    END IF;
    IF unfilled IS NOT NULL THEN
        RAISE NOTICE 'columns of % that are left to their default: %', f.target, unfilled;
    END IF;
    FOREACH gap IN ARRAY f.reverse_gaps LOOP
        RAISE NOTICE 'after cutover, %', gap;
    END LOOP;
    IF f.reverse_gaps <> '{}' THEN
        RAISE NOTICE 'give reverse => to define, or acknowledge it before cutover: SELECT migrate.set(%, ''accept_reverse_gaps'', ''on'');', quote_literal(m.name);
    END IF;
END $$;

CREATE FUNCTION migrate._define(caller regrole, name text, source regclass, target regclass, mapping text, filter text, reverse text, on_target_delete text) RETURNS text
LANGUAGE plpgsql AS $$
DECLARE
    m migrate._migration;
BEGIN
    IF name IS NULL OR name = '' OR octet_length(name) > 63 THEN
        PERFORM migrate._raise('42602', format('migration name is %s bytes long', coalesce(octet_length(name), 0)), 'It must have 1 to 63 bytes.', 'Name it after what it does, as in users_to_profiles.');
    END IF;
    IF EXISTS (SELECT FROM migrate._migration x WHERE x.name = _define.name) THEN
        m := migrate._lock(caller, name);
        IF EXISTS (SELECT FROM migrate._flow f WHERE f.migration = m.id AND f.source = _define.source AND f.target = _define.target
                   AND (f.mapping, f.filter, f.reverse) IS NOT DISTINCT FROM (_define.mapping, _define.filter, _define.reverse)
                   AND (_define.on_target_delete IS NULL OR f.on_target_delete = _define.on_target_delete)) THEN
            RAISE NOTICE 'migration "%" is defined like this already', name;
            RETURN format('%s -> %s', m.phase, m.phase);
        END IF;
        PERFORM migrate._raise('42710', format('migration "%s" is already defined, otherwise', name), format('It is in phase %s.', m.phase),
            format('To define it anew:%s%s SELECT migrate.drop(%L);%s', CASE m.phase WHEN 'cut_over' THEN format(' SELECT migrate.rollback(%L);', name) ELSE '' END,
                   CASE WHEN m.phase NOT IN ('planned', 'cancelled', 'finalized') THEN format(' SELECT migrate.cancel(%L);', name) ELSE '' END, name,
                   CASE m.phase WHEN 'planned' THEN format(' to add a second target: SELECT migrate.add_flow(%L, …);', name) ELSE '' END));
    END IF;
    INSERT INTO migrate._migration (name, owner, system_identifier, database_oid)
    VALUES (name, caller, (SELECT system_identifier FROM pg_control_system()), (SELECT oid FROM pg_database WHERE datname = current_database())) RETURNING * INTO m;
    PERFORM migrate._create_flow(caller, m, target::text, source, target, mapping, filter, reverse, on_target_delete);
    PERFORM migrate._event(m, caller, 'define', format('%s to %s', source, target), NULL, 'planned');
    RETURN 'new -> planned';
END $$;

CREATE FUNCTION migrate._add_flow(caller regrole, name text, source regclass, target regclass, mapping text, filter text, reverse text, on_target_delete text, flow text) RETURNS text
LANGUAGE plpgsql AS $$
DECLARE
    m migrate._migration := migrate._lock(caller, name);
    flow_name text := coalesce(flow, target::text);
    same migrate._flow;
BEGIN
    SELECT * INTO same FROM migrate._flow f WHERE f.migration = m.id AND f.source = _add_flow.source AND f.target = _add_flow.target
        AND (f.mapping, f.filter, f.reverse) IS NOT DISTINCT FROM (_add_flow.mapping, _add_flow.filter, _add_flow.reverse) LIMIT 1;
    IF FOUND AND same.on_target_delete IS DISTINCT FROM coalesce(_add_flow.on_target_delete, same.on_target_delete) THEN
        PERFORM migrate._raise('42710', format('migration "%s" has this flow already, otherwise', m.name), format('Its on_target_delete is %s.', coalesce(same.on_target_delete, 'not decided')),
            format('SELECT migrate.set(%L, ''on_target_delete'', %L); changes it, for all flows.', m.name, _add_flow.on_target_delete));
    ELSIF FOUND THEN
        RAISE NOTICE 'migration "%" has this flow already', name;
        RETURN format('%s -> %s', m.phase, m.phase);
    ELSIF m.phase <> 'planned' THEN
        PERFORM migrate._raise('55000', format('migration "%s" is in phase %s', m.name, m.phase), 'Flows are added in phase planned only.', format('Define a second migration for "%s".', target));
    END IF;
    IF EXISTS (SELECT FROM migrate._flow f WHERE f.migration = m.id AND f.name = flow_name) THEN
        flow_name := format('%s to %s', source, target);
        IF flow IS NOT NULL OR EXISTS (SELECT FROM migrate._flow f WHERE f.migration = m.id AND f.name = flow_name) THEN
            PERFORM migrate._raise('42710', format('migration "%s" already has a flow named "%s"', m.name, coalesce(flow, flow_name)), '', 'Give it another name: flow => ''…''');
        END IF;
    END IF;
    PERFORM migrate._create_flow(caller, m, flow_name, source, target, mapping, filter, reverse, on_target_delete);
    PERFORM migrate._event(m, caller, 'add_flow', format('%s to %s', source, target));
    RETURN 'planned -> planned';
END $$;

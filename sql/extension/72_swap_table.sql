-- What a swap does with the parts of the table itself: defaults and sequences, names of indexes and constraints, storage, comments.

-- The sequence that belongs to a column (serial, identity).
CREATE FUNCTION migrate._owned_sequence(relation regclass, attnum int2) RETURNS regclass
LANGUAGE sql STABLE AS $$
    SELECT q.oid::regclass FROM pg_depend d JOIN pg_class q ON q.oid = d.objid AND q.relkind = 'S'
    WHERE d.classid = 'pg_class'::regclass AND d.refclassid = 'pg_class'::regclass AND d.refobjid = relation AND d.refobjsubid = attnum AND d.deptype IN ('a', 'i')
    ORDER BY d.deptype DESC, q.oid LIMIT 1
$$;

-- INSERTs that leave a column out go on as before: where the target's column has no default, it gets the source's, or an identity like
-- the source's. What the sequence of the one is called, that of the other is called then. (The switch advances all of them.)
CREATE FUNCTION migrate._swap_defaults(p migrate._swap_pair) RETURNS SETOF migrate._swap_step
LANGUAGE plpgsql STABLE AS $$
DECLARE
    c record;
    taken text[] := '{}';
    aside text;
BEGIN
    FOR c IN
        SELECT a.attname AS origin, a.attidentity AS identity, b.attname AS dest, b.attnotnull, b.atttypid, b.attidentity = '' AND NOT b.atthasdef AS bare,
               format('column %I', b.attname) AS object, pg_get_expr(e.adbin, e.adrelid) AS expression, x.origin_sequence, x.dest_sequence,
               a.atttypid = b.atttypid OR EXISTS (SELECT FROM pg_cast k WHERE k.castsource = a.atttypid AND k.casttarget = b.atttypid AND k.castcontext IN ('i', 'a')) AS fits,
               EXISTS (SELECT FROM pg_attrdef t JOIN pg_depend d ON d.classid = 'pg_attrdef'::regclass AND d.objid = t.oid WHERE t.adrelid = p.target AND t.adnum = b.attnum AND d.refobjid = x.origin_sequence) AS shared
        FROM unnest(p.image) WITH ORDINALITY AS u(dest, origin) JOIN pg_attribute a ON a.attrelid = p.source AND a.attnum = u.origin
        JOIN pg_attribute b ON b.attrelid = p.target AND b.attnum = u.dest
        LEFT JOIN pg_attrdef e ON e.adrelid = p.source AND e.adnum = a.attnum AND a.attgenerated = ''
        CROSS JOIN LATERAL (SELECT migrate._owned_sequence(p.source, a.attnum) AS origin_sequence, migrate._owned_sequence(p.target, b.attnum) AS dest_sequence) x
        WHERE b.attgenerated = '' AND (e.oid IS NOT NULL OR a.attidentity <> '') ORDER BY a.attnum
    LOOP
        aside := CASE WHEN c.origin_sequence IS NOT NULL THEN migrate._aside_name(c.origin_sequence, '_old', taken) END;
        taken := taken || array_remove(ARRAY[aside], NULL);
        IF c.bare AND NOT c.fits THEN
            RETURN NEXT migrate._swap_refused(c.object || ' of ' || p.target, 'has no default, and that of the source is of a type that does not fit', format('ALTER TABLE %s ALTER %I SET DEFAULT …;', p.target, c.dest));
        ELSIF c.bare AND c.identity <> '' AND current_setting('server_version_num')::integer < 170000 AND (SELECT t.relkind FROM pg_class t WHERE t.oid = p.target) = 'p' THEN
            RETURN NEXT migrate._swap_refused(c.object || ' of ' || p.target, 'cannot be an identity, as it is in the source: the table is partitioned', format('ALTER TABLE %s ALTER %I SET DEFAULT …;', p.target, c.dest));
        ELSIF c.bare AND c.identity <> '' AND NOT (c.attnotnull AND c.atttypid IN ('int2'::regtype, 'int4'::regtype, 'int8'::regtype)) THEN
            RETURN NEXT migrate._swap_refused(c.object || ' of ' || p.target, 'cannot be an identity, as it is in the source: it is not a NOT NULL whole number', format('ALTER TABLE %s ALTER %I SET DEFAULT …;', p.target, c.dest));
        ELSIF c.bare AND c.identity <> '' THEN
            RETURN QUERY SELECT * FROM migrate._swap_identity(p, c.dest, c.identity, c.origin_sequence, aside);
        ELSE
            IF c.bare THEN
                RETURN NEXT migrate._swap_step(3, 'step', c.object, format('column %I gets the default %s', c.dest, c.expression), p.target, p.owner,
                    ARRAY['ALTER TABLE ', format(' ALTER %I SET DEFAULT %s', c.dest, c.expression)], ARRAY['ALTER TABLE ', format(' ALTER %I DROP DEFAULT', c.dest)]);
            END IF;
            IF c.origin_sequence IS NOT NULL AND c.identity = '' AND (c.bare OR c.shared) THEN
                RETURN QUERY SELECT * FROM migrate._swap_owned(p, c.origin, c.dest, c.origin_sequence, c.atttypid);
            ELSIF c.origin_sequence <> c.dest_sequence THEN
                RETURN QUERY SELECT * FROM migrate._swap_sequence_names(p, c.origin_sequence, c.dest_sequence, aside);
            END IF;
        END IF;
    END LOOP;
END $$;

-- A sequence that feeds both columns belongs to the new one, and counts as far as that one's type goes.
CREATE FUNCTION migrate._swap_owned(p migrate._swap_pair, origin name, dest name, sequence regclass, type oid) RETURNS SETOF migrate._swap_step
LANGUAGE plpgsql STABLE AS $$
BEGIN
    RETURN NEXT migrate._swap_step(3, 'step', 'sequence ' || sequence, format('sequence %s belongs to column %I of the new table', sequence, dest), sequence, p.owner,
        ARRAY['ALTER SEQUENCE ', format(' OWNED BY %s.%I', migrate._swap_name(p), dest)], ARRAY['ALTER SEQUENCE ', format(' OWNED BY %s.%I', migrate._swap_name(p), origin)]);
    RETURN QUERY SELECT (migrate._swap_step(3, 'step', 'sequence ' || sequence, format('sequence %s counts as %s', sequence, b.oid::regtype), sequence, p.owner,
        ARRAY['ALTER SEQUENCE ', format(' AS %s', b.oid::regtype)], ARRAY['ALTER SEQUENCE ', format(' AS %s', a.oid::regtype)])).*
    FROM pg_sequence s JOIN pg_type a ON a.oid = s.seqtypid JOIN pg_type b ON b.oid = type
    WHERE s.seqrelid = sequence AND b.oid IN ('int2'::regtype, 'int4'::regtype, 'int8'::regtype) AND b.typlen > a.typlen;
END $$;

-- How an identity like this one counts, as a column of that type. A bound that is the old type's becomes the new type's, and none is
-- beyond that.
CREATE FUNCTION migrate._swap_counting(s pg_sequence, type oid) RETURNS text
LANGUAGE sql STABLE AS $$
    SELECT concat(format('INCREMENT BY %s CACHE %s', s.seqincrement, s.seqcache), CASE WHEN s.seqcycle THEN ' CYCLE' END,
        ' START WITH ' || CASE WHEN s.seqstart BETWEEN -b.size AND b.size - 1 THEN s.seqstart END,
        ' MINVALUE ' || CASE WHEN s.seqmin < b.size - 1 AND s.seqmin <> CASE WHEN s.seqincrement > 0 THEN 1 ELSE -a.size END THEN greatest(s.seqmin, -b.size) END,
        ' MAXVALUE ' || CASE WHEN s.seqmax > -b.size AND s.seqmax <> CASE WHEN s.seqincrement > 0 THEN a.size - 1 ELSE -1 END THEN least(s.seqmax, b.size - 1) END)
    FROM (SELECT trunc(2::numeric ^ (8 * t.typlen - 1)) AS size FROM pg_type t WHERE t.oid = s.seqtypid) a, (SELECT trunc(2::numeric ^ (8 * t.typlen - 1)) AS size FROM pg_type t WHERE t.oid = type) b
$$;

-- An identity has a sequence of its own; the new one is called as the old one was.
CREATE FUNCTION migrate._swap_identity(p migrate._swap_pair, dest name, identity "char", sequence regclass, aside text) RETURNS SETOF migrate._swap_step
LANGUAGE plpgsql STABLE AS $$
DECLARE
    name text := migrate._relation_name(sequence);
    g record;
BEGIN
    RETURN NEXT migrate._swap_rename(2, 'SEQUENCE', p, sequence, aside);
    RETURN QUERY SELECT (migrate._swap_step(3, 'step', 'column ' || quote_ident(dest), format('column %I becomes an identity, by a sequence that is called %s', dest, name), p.target, p.owner,
        ARRAY['ALTER TABLE ', format(' ALTER %I ADD GENERATED %s AS IDENTITY (SEQUENCE NAME %s %s)', dest, CASE identity WHEN 'a' THEN 'ALWAYS' ELSE 'BY DEFAULT' END,
              name, migrate._swap_counting(s, a.atttypid))],
        ARRAY['ALTER TABLE ', format(' ALTER %I DROP IDENTITY', dest)])).*
    FROM pg_sequence s, pg_attribute a WHERE s.seqrelid = sequence AND a.attrelid = p.target AND a.attname = dest;
    RETURN QUERY SELECT x.* FROM pg_class c, LATERAL migrate._swap_comment(p, 'SEQUENCE', c.relname, 'pg_class', c.oid, NULL) x WHERE c.oid = sequence;
    FOR g IN SELECT * FROM migrate._swap_missing_grants(sequence, NULL) LOOP
        RETURN NEXT migrate._swap_step(3, 'step', 'sequence ' || sequence, format('%s on sequence %s is granted to %s', g.privilege, sequence, g.grantee), p.target, p.owner,
            ARRAY[format('GRANT %s ON SEQUENCE %s TO %s%s', g.privilege, name, g.grantee, g.with_option)], NULL);
    END LOOP;
END $$;

-- Both columns have a sequence of their own.
CREATE FUNCTION migrate._swap_sequence_names(p migrate._swap_pair, origin regclass, dest regclass, aside text) RETURNS SETOF migrate._swap_step
LANGUAGE plpgsql STABLE AS $$
DECLARE
    g record;
BEGIN
    RETURN NEXT migrate._swap_rename(2, 'SEQUENCE', p, origin, aside);
    RETURN NEXT migrate._swap_rename(2, 'SEQUENCE', p, dest, (SELECT c.relname::text FROM pg_class c WHERE c.oid = origin));
    RETURN QUERY SELECT x.* FROM pg_class c, LATERAL migrate._swap_comment(p, 'SEQUENCE', c.relname, 'pg_class', origin, dest) x WHERE c.oid = origin;
    FOR g IN SELECT * FROM migrate._swap_missing_grants(origin, dest) LOOP
        RETURN NEXT migrate._swap_step(3, 'step', 'sequence ' || dest, format('%s on sequence %s is granted to %s', g.privilege, dest, g.grantee), dest, p.owner,
            ARRAY[format('GRANT %s ON SEQUENCE ', g.privilege), ' TO ' || g.grantee || g.with_option], ARRAY[format('REVOKE %s ON SEQUENCE ', g.privilege), format(' FROM %s CASCADE', g.grantee)]);
    END LOOP;
END $$;

-- A sequence, which a restored dump has before it has _swapped.
CREATE FUNCTION migrate._swap_rename(rank integer, what text, p migrate._swap_pair, relation regclass, becomes text) RETURNS migrate._swap_step
LANGUAGE sql STABLE AS $$
    SELECT migrate._swap_step(rank, 'step', lower(what) || ' ' || relation, format('%s %s is called %I', lower(what), relation, becomes), relation, p.owner,
        ARRAY[format('ALTER %s ', what), format(' RENAME TO %I', becomes)], ARRAY[format('ALTER %s ', what), format(' RENAME TO %I', c.relname)])
    FROM pg_class c WHERE c.oid = relation
$$;

-- An index (or another object with a name in the schema), by its name. relation: the table that it belongs to, and is gone with; NULL: none.
CREATE FUNCTION migrate._swap_rename_by_name(rank integer, what text, p migrate._swap_pair, relation regclass, name text, becomes text) RETURNS migrate._swap_step
LANGUAGE sql STABLE AS $$
    SELECT migrate._swap_step(rank, 'step', lower(what) || ' ' || quote_ident(name), format('%s %I is called %I', lower(what), name, becomes), relation, p.owner,
        ARRAY[format('ALTER %s %I.%I RENAME TO %I', what, p.schema, name, becomes)], ARRAY[format('ALTER %s %I.%I RENAME TO %I', what, p.schema, becomes, name)])
$$;

-- Whether two indexes over the same columns serve the same statements: as to when and for what a key is unique, what it excludes, and
-- how each column is compared (by the same family of operators, or by what is the default for its type, which may be another one).
CREATE FUNCTION migrate._swap_same_index(ours pg_index, theirs pg_index) RETURNS boolean
LANGUAGE sql STABLE AS $$
    SELECT (ours.indisunique, ours.indimmediate, ours.indisexclusion) = (theirs.indisunique, theirs.indimmediate, theirs.indisexclusion)
       AND to_jsonb(ours) -> 'indnullsnotdistinct' IS NOT DISTINCT FROM to_jsonb(theirs) -> 'indnullsnotdistinct'
       AND ours.indoption::int2[] = theirs.indoption::int2[] AND ours.indnkeyatts = theirs.indnkeyatts AND ours.indcollation::oid[] = theirs.indcollation::oid[]
       AND NOT EXISTS (SELECT FROM generate_series(0, ours.indnkeyatts - 1) n JOIN pg_opclass a ON a.oid = ours.indclass[n] JOIN pg_opclass b ON b.oid = theirs.indclass[n]
                       WHERE a.opcfamily <> b.opcfamily AND NOT (a.opcdefault AND b.opcdefault))
       AND (SELECT array_agg(o.oprname ORDER BY u.i) FROM pg_constraint k, unnest(k.conexclop) WITH ORDINALITY AS u(operator, i) JOIN pg_operator o ON o.oid = u.operator WHERE k.conindid = ours.indexrelid AND k.contype = 'x')
           IS NOT DISTINCT FROM
           (SELECT array_agg(o.oprname ORDER BY u.i) FROM pg_constraint k, unnest(k.conexclop) WITH ORDINALITY AS u(operator, i) JOIN pg_operator o ON o.oid = u.operator WHERE k.conindid = theirs.indexrelid AND k.contype = 'x')
       AND pg_get_expr(ours.indpred, ours.indrelid) IS NOT DISTINCT FROM pg_get_expr(theirs.indpred, theirs.indrelid)
       AND pg_get_expr(ours.indexprs, ours.indrelid) IS NOT DISTINCT FROM pg_get_expr(theirs.indexprs, theirs.indrelid)
$$;

-- Indexes of the target over the same columns, in the same way, take the names of the source's, and constraints that stand on them.
CREATE FUNCTION migrate._swap_indexes(p migrate._swap_pair) RETURNS SETOF migrate._swap_step
LANGUAGE plpgsql STABLE AS $$
DECLARE
    i record;
    twin record;
    used oid[] := '{}';
    taken text[] := '{}';
BEGIN
    FOR i IN SELECT x.*, x AS whole, c.relname::text AS name, c.relam, migrate._swap_image(p, x.indkey::int2[]) AS image FROM pg_index x JOIN pg_class c ON c.oid = x.indexrelid
             WHERE x.indrelid = p.source ORDER BY x.indisprimary DESC, c.relname LOOP
        SELECT y.indexrelid, c.relname::text AS name INTO twin FROM pg_index y JOIN pg_class c ON c.oid = y.indexrelid
        WHERE y.indrelid = p.target AND y.indexrelid <> ALL (used) AND y.indkey[0:y.indnatts - 1]::int2[] = i.image AND c.relam = i.relam AND y.indisvalid AND migrate._swap_same_index(i.whole, y)
        ORDER BY y.indisprimary = i.indisprimary DESC, y.indexrelid LIMIT 1;
        IF NOT FOUND THEN
            RETURN NEXT migrate._swap_note('index ' || quote_ident(i.name), 'stays with the old table: the target has none like it');
            CONTINUE;
        END IF;
        used := used || twin.indexrelid;
        taken := taken || migrate._aside_name(i.indexrelid, '_old', taken);
        RETURN NEXT migrate._swap_rename_by_name(4, 'INDEX', p, p.source, i.name, taken[cardinality(taken)]);
        RETURN NEXT migrate._swap_rename_by_name(4, 'INDEX', p, p.target, twin.name, i.name);
        IF i.indisclustered AND NOT EXISTS (SELECT FROM pg_index y WHERE y.indrelid = p.target AND y.indisclustered) THEN
            RETURN NEXT migrate._swap_step(7, 'step', 'index ' || quote_ident(i.name), format('CLUSTER goes by index %I', i.name), p.target, p.owner,
                ARRAY['ALTER TABLE ', format(' CLUSTER ON %I', i.name)], ARRAY['ALTER TABLE ', ' SET WITHOUT CLUSTER']);
        END IF;
        RETURN QUERY SELECT * FROM migrate._swap_comment(p, 'INDEX', i.name, 'pg_class', i.indexrelid, twin.indexrelid);
        RETURN QUERY SELECT c.* FROM pg_constraint a JOIN pg_constraint b ON b.conindid = twin.indexrelid AND b.conrelid = p.target AND b.contype = a.contype,
            LATERAL migrate._swap_comment(p, 'CONSTRAINT', i.name, 'pg_constraint', a.oid, b.oid) c WHERE a.conindid = i.indexrelid AND a.conrelid = p.source AND a.contype <> 'f';
    END LOOP;
END $$;

-- Checks that say the same are called the same. (NOT NULL has a name since PostgreSQL 18, which nobody asks for.)
CREATE FUNCTION migrate._swap_checks(p migrate._swap_pair) RETURNS SETOF migrate._swap_step
LANGUAGE plpgsql STABLE AS $$
DECLARE
    c record;
    twin name;
    used name[] := ARRAY(SELECT k.conname FROM pg_constraint k JOIN pg_constraint o ON o.conname = k.conname AND o.conrelid = p.source WHERE k.conrelid = p.target);
BEGIN
    RETURN QUERY SELECT y.* FROM unnest(p.image) WITH ORDINALITY AS u(dest, origin) JOIN pg_attribute a ON a.attrelid = p.source AND a.attnum = u.origin AND a.attnotnull
        JOIN pg_attribute b ON b.attrelid = p.target AND b.attnum = u.dest AND NOT b.attnotnull,
        LATERAL migrate._swap_note(format('NOT NULL of column %I', a.attname), 'stays with the old table: the new one''s column may be NULL, which is not carried back') y ORDER BY a.attnum;
    FOR c IN SELECT k.oid, k.conname, pg_get_expr(k.conbin, k.conrelid) AS says FROM pg_constraint k WHERE k.conrelid = p.source AND k.contype = 'c' ORDER BY k.conname LOOP
        CONTINUE WHEN c.conname = ANY (used);
        twin := (SELECT min(k.conname::text) FROM pg_constraint k WHERE k.conrelid = p.target AND k.contype = 'c' AND k.conname <> ALL (used) AND k.conislocal AND k.coninhcount = 0
                 AND pg_get_expr(k.conbin, k.conrelid) = c.says);
        IF twin IS NULL THEN
            RETURN NEXT migrate._swap_note('check ' || quote_ident(c.conname), 'stays with the old table: the target has none like it');
            CONTINUE;
        END IF;
        used := used || twin;
        RETURN NEXT migrate._swap_rename_constraint(p, twin, c.conname);
        RETURN QUERY SELECT x.* FROM pg_constraint k, LATERAL migrate._swap_comment(p, 'CONSTRAINT', c.conname, 'pg_constraint', c.oid, k.oid) x WHERE k.conrelid = p.target AND k.conname = twin;
    END LOOP;
END $$;

CREATE FUNCTION migrate._swap_rename_constraint(p migrate._swap_pair, name name, becomes name) RETURNS migrate._swap_step
LANGUAGE sql STABLE AS $$
    SELECT migrate._swap_step(5, 'step', 'constraint ' || quote_ident(name), format('constraint %I of the new table is called %I', name, becomes), p.target, p.owner,
        ARRAY['ALTER TABLE ', format(' RENAME CONSTRAINT %I TO %I', name, becomes)], ARRAY['ALTER TABLE ', format(' RENAME CONSTRAINT %I TO %I', becomes, name)])
$$;

CREATE FUNCTION migrate._swap_statistics(p migrate._swap_pair) RETURNS SETOF migrate._swap_step
LANGUAGE plpgsql STABLE AS $$
DECLARE
    s pg_statistic_ext;
    twin pg_statistic_ext;
    used oid[] := '{}';
BEGIN
    FOR s IN SELECT * FROM pg_statistic_ext x WHERE x.stxrelid = p.source ORDER BY x.stxname LOOP
        SELECT * INTO twin FROM pg_statistic_ext y WHERE y.stxrelid = p.target AND y.oid <> ALL (used) AND y.stxkind = s.stxkind
          AND ARRAY(SELECT unnest(y.stxkeys::int2[]) ORDER BY 1) = ARRAY(SELECT unnest(migrate._swap_image(p, s.stxkeys::int2[])) ORDER BY 1)
          AND to_jsonb(y) ->> 'stxexprs' IS NULL AND to_jsonb(s) ->> 'stxexprs' IS NULL ORDER BY y.oid LIMIT 1;
        IF NOT FOUND OR twin.stxnamespace <> s.stxnamespace OR s.stxnamespace::regnamespace::text <> quote_ident(p.schema) THEN
            RETURN NEXT migrate._swap_note('statistics ' || quote_ident(s.stxname), 'stay with the old table: the target has none like them, in this schema');
            CONTINUE;
        END IF;
        used := used || twin.oid;
        p.owner := s.stxowner;  -- which is not always the table's, and stays so when that changes
        RETURN NEXT migrate._swap_rename_by_name(6, 'STATISTICS', p, NULL, s.stxname, migrate._free_name(s.stxnamespace, s.stxname, '_old', '{}'));
        p.owner := twin.stxowner;
        RETURN NEXT migrate._swap_rename_by_name(6, 'STATISTICS', p, NULL, twin.stxname, s.stxname);
        RETURN QUERY SELECT * FROM migrate._swap_comment(p, 'STATISTICS', s.stxname, 'pg_statistic_ext', s.oid, twin.oid);
    END LOOP;
END $$;

-- Settings of columns (for ANALYZE) and storage parameters that the target does not have for itself, and the replica identity.
CREATE FUNCTION migrate._swap_storage(p migrate._swap_pair) RETURNS SETOF migrate._swap_step
LANGUAGE plpgsql STABLE AS $$
DECLARE
    s pg_class := (SELECT c FROM pg_class c WHERE c.oid = p.source);
    t pg_class := (SELECT c FROM pg_class c WHERE c.oid = p.target);
    wanted text;
    twin name;
BEGIN
    RETURN QUERY SELECT (migrate._swap_step(7, 'step', 'storage parameter ' || o.name, format('storage parameter %s = %s is set', o.name, o.value), p.target, p.owner,
        ARRAY['ALTER TABLE ', format(' SET (%s = %L)', o.name, o.value)], ARRAY['ALTER TABLE ', format(' RESET (%s)', o.name)])).*
    FROM (SELECT o.option_name AS name, o.option_value AS value FROM pg_options_to_table(s.reloptions) o
          WHERE t.relkind = 'r' AND o.option_name NOT IN (SELECT x.option_name FROM pg_options_to_table(t.reloptions) x)
          UNION ALL
          SELECT 'toast.' || o.option_name, o.option_value FROM pg_class a, pg_class b, pg_options_to_table(a.reloptions) o
          WHERE a.oid = s.reltoastrelid AND b.oid = t.reltoastrelid AND o.option_name NOT IN (SELECT x.option_name FROM pg_options_to_table(b.reloptions) x)) o;
    RETURN QUERY SELECT (migrate._swap_step(7, 'step', 'column ' || quote_ident(o.name), format('column %I: %s is set', o.name, o.setting), p.target, p.owner,
        ARRAY['ALTER TABLE ', format(' ALTER %I %s', o.name, o.there)], ARRAY['ALTER TABLE ', format(' ALTER %I %s', o.name, o.back)])).*
    FROM (SELECT b.attname AS name, x.* FROM unnest(p.image) WITH ORDINALITY AS u(dest, origin) JOIN pg_attribute a ON a.attrelid = p.source AND a.attnum = u.origin
          JOIN pg_attribute b ON b.attrelid = p.target AND b.attnum = u.dest, LATERAL (
              SELECT 'statistics target ' || a.attstattarget AS setting, 'SET STATISTICS ' || a.attstattarget AS there, 'SET STATISTICS -1' AS back
              WHERE nullif(a.attstattarget, -1) IS NOT NULL AND nullif(b.attstattarget, -1) IS NULL
              UNION ALL
              SELECT format('%s = %s', w.option_name, w.option_value), format('SET (%s = %L)', w.option_name, w.option_value), format('RESET (%s)', w.option_name) FROM pg_options_to_table(a.attoptions) w
              WHERE t.relkind = 'r' AND w.option_name LIKE 'n_distinct%' AND w.option_name NOT IN (SELECT y.option_name FROM pg_options_to_table(b.attoptions) y)) x ORDER BY b.attnum) o;
    IF t.relreplident <> 'd' OR s.relreplident = 'd' THEN
        RETURN;
    ELSIF t.relkind = 'p' THEN
        RETURN NEXT migrate._swap_refused('replica identity of ' || p.source, 'cannot be carried: the target is partitioned', format('ALTER TABLE %s REPLICA IDENTITY DEFAULT;', p.source));
    ELSIF s.relreplident IN ('f', 'n') THEN
        wanted := CASE s.relreplident WHEN 'f' THEN 'FULL' ELSE 'NOTHING' END;
    ELSE
        SELECT c.relname INTO twin FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid WHERE i.indrelid = p.source AND i.indisreplident
            AND EXISTS (SELECT FROM migrate._swap_indexes(p) x WHERE x.object = 'index ' || quote_ident(c.relname) AND x.kind = 'step');
        wanted := 'USING INDEX ' || quote_ident(twin);  -- which the target's index is called by then
        IF wanted IS NULL THEN
            RETURN NEXT migrate._swap_refused('replica identity of ' || p.source, 'is an index that the target has none like', format('ALTER TABLE %s REPLICA IDENTITY …;', p.target));
        END IF;
    END IF;
    IF wanted IS NOT NULL THEN
        RETURN NEXT migrate._swap_step(7, 'step', 'replica identity', 'the replica identity becomes ' || wanted, p.target, p.owner,
            ARRAY['ALTER TABLE ', ' REPLICA IDENTITY ' || wanted], ARRAY['ALTER TABLE ', ' REPLICA IDENTITY DEFAULT']);
    END IF;
END $$;

CREATE FUNCTION migrate._swap_comments(p migrate._swap_pair) RETURNS SETOF migrate._swap_step
LANGUAGE plpgsql STABLE AS $$
BEGIN
    RETURN QUERY SELECT (migrate._swap_step(8, 'step', 'comment', 'the comment of the table is carried', p.target, p.owner,
        ARRAY['COMMENT ON TABLE ', format(' IS %L', obj_description(p.source, 'pg_class'))], ARRAY['COMMENT ON TABLE ', ' IS NULL'])).*
    WHERE obj_description(p.source, 'pg_class') IS NOT NULL AND obj_description(p.target, 'pg_class') IS NULL;
    RETURN QUERY SELECT (migrate._swap_step(8, 'step', 'comment', format('the comment of column %I is carried', b.attname), p.target, p.owner,
        ARRAY['COMMENT ON COLUMN ', format('.%I IS %L', b.attname, col_description(p.source, u.origin::integer))], ARRAY['COMMENT ON COLUMN ', format('.%I IS NULL', b.attname)])).*
    FROM unnest(p.image) WITH ORDINALITY AS u(dest, origin) JOIN pg_attribute b ON b.attrelid = p.target AND b.attnum = u.dest
    WHERE col_description(p.source, u.origin::integer) IS NOT NULL AND col_description(p.target, u.dest) IS NULL;
END $$;

-- What somebody may do with `origin` and not with `dest` (NULL: with a thing that is not there yet). The owner's own rights go without saying.
CREATE FUNCTION migrate._swap_missing_grants(origin regclass, dest regclass, OUT privilege text, OUT grantee text, OUT with_option text) RETURNS SETOF record
LANGUAGE sql STABLE AS $$
    SELECT a.privilege_type, CASE a.grantee WHEN 0 THEN 'PUBLIC' ELSE a.grantee::regrole::text END, CASE WHEN bool_or(a.is_grantable) THEN ' WITH GRANT OPTION' ELSE '' END
    FROM pg_class c, aclexplode(c.relacl) a
    WHERE c.oid = origin AND a.grantee <> c.relowner
      AND NOT EXISTS (SELECT FROM pg_class t, aclexplode(t.relacl) b WHERE t.oid = dest AND b.grantee = a.grantee AND b.privilege_type = a.privilege_type AND b.is_grantable >= a.is_grantable)
    GROUP BY a.privilege_type, a.grantee ORDER BY 2, 1
$$;

-- (Where the target has a right without its grant option, rollback takes the option alone. What was granted by it meanwhile goes with it.)
CREATE FUNCTION migrate._swap_grants(p migrate._swap_pair) RETURNS SETOF migrate._swap_step
LANGUAGE plpgsql STABLE AS $$
DECLARE
    g record;
BEGIN
    FOR g IN SELECT x.*, NULL::name AS dest, NULL::name AS origin,
                    EXISTS (SELECT FROM pg_class t, aclexplode(t.relacl) b WHERE t.oid = p.target AND b.privilege_type = x.privilege AND x.grantee = CASE b.grantee WHEN 0 THEN 'PUBLIC' ELSE b.grantee::regrole::text END) AS had
             FROM migrate._swap_missing_grants(p.source, p.target) x LOOP
        RETURN NEXT migrate._swap_step(9, 'step', 'grants', format('%s is granted to %s', g.privilege, g.grantee), p.target, p.owner,
            ARRAY[format('GRANT %s ON ', g.privilege), ' TO ' || g.grantee || g.with_option],
            ARRAY[format('REVOKE %s%s ON ', CASE WHEN g.had THEN 'GRANT OPTION FOR ' ELSE '' END, g.privilege), format(' FROM %s CASCADE', g.grantee)]);
    END LOOP;
    FOR g IN SELECT x.privilege_type AS privilege, CASE x.grantee WHEN 0 THEN 'PUBLIC' ELSE x.grantee::regrole::text END AS grantee, a.attname AS origin, b.attname AS dest,
                    CASE WHEN bool_or(x.is_grantable) THEN ' WITH GRANT OPTION' ELSE '' END AS with_option,
                    EXISTS (SELECT FROM pg_attribute t, aclexplode(t.attacl) y WHERE t.attrelid = p.target AND t.attname = b.attname AND y.grantee = x.grantee AND y.privilege_type = x.privilege_type) AS had
             FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid CROSS JOIN LATERAL aclexplode(a.attacl) x LEFT JOIN pg_attribute b ON b.attrelid = p.target AND b.attnum = p.image[a.attnum]
             WHERE a.attrelid = p.source AND a.attnum > 0 AND NOT a.attisdropped AND x.grantee <> c.relowner
               AND NOT EXISTS (SELECT FROM pg_attribute t, aclexplode(t.attacl) y WHERE t.attrelid = p.target AND (t.attnum = b.attnum OR b.attnum IS NULL AND t.attname = a.attname)
                               AND y.grantee = x.grantee AND y.privilege_type = x.privilege_type AND y.is_grantable >= x.is_grantable)
               AND NOT EXISTS (SELECT FROM pg_class t, aclexplode(t.relacl) y WHERE t.oid = p.target AND y.grantee = x.grantee AND y.privilege_type = x.privilege_type AND y.is_grantable >= x.is_grantable)
             GROUP BY x.privilege_type, x.grantee, a.attname, b.attname, a.attnum ORDER BY a.attnum, 2, 1 LOOP
        IF g.dest IS NULL THEN
            RETURN NEXT migrate._swap_refused(format('%s of %s on column %I of %s', g.privilege, g.grantee, g.origin, p.source), 'cannot be carried: no column of the target is that column, bare',
                format('GRANT %1$s (…) ON %2$s TO %3$s; where it is meant, then REVOKE %1$s (%4$I) ON %5$s FROM %3$s;', g.privilege, p.target, g.grantee, g.origin, p.source));
        ELSE
            RETURN NEXT migrate._swap_step(9, 'step', 'grants', format('%s on column %I is granted to %s', g.privilege, g.dest, g.grantee), p.target, p.owner,
                ARRAY[format('GRANT %s (%I) ON ', g.privilege, g.dest), ' TO ' || g.grantee || g.with_option], ARRAY[format('REVOKE %s%s (%I) ON ', CASE WHEN g.had THEN 'GRANT OPTION FOR ' ELSE '' END, g.privilege, g.dest), format(' FROM %s CASCADE', g.grantee)]);
        END IF;
    END LOOP;
END $$;

-- What the new table alone takes from a sequence (a further serial column, a serial in place of an identity) must not fail whoever inserts.
CREATE FUNCTION migrate._swap_sequence_grants(p migrate._swap_pair) RETURNS SETOF migrate._swap_step
LANGUAGE sql STABLE AS $$
    SELECT s.* FROM (SELECT q, migrate._table_owner(q) AS owner, CASE i.role WHEN 0 THEN 'PUBLIC' ELSE i.role::regrole::text END AS grantee
                     FROM migrate._inserters(p.source) i, LATERAL migrate._closed_sequences(p.flow, i.role) q) g,
        LATERAL migrate._swap_step(9, 'step', 'sequence ' || g.q, format('USAGE on sequence %s is granted to %s, who may insert', g.q, g.grantee), g.q, g.owner,
            ARRAY['GRANT USAGE ON SEQUENCE ', ' TO ' || g.grantee], ARRAY['REVOKE USAGE ON SEQUENCE ', format(' FROM %s CASCADE', g.grantee)]) s
    -- (Where either column has a sequence of its own, the grants are carried from the one to the other.)
    WHERE NOT EXISTS (SELECT FROM unnest(p.image) WITH ORDINALITY AS u(dest, origin) JOIN pg_attribute a ON a.attrelid = p.source AND a.attnum = u.origin AND a.attidentity = ''
                      WHERE migrate._owned_sequence(p.target, u.dest) = g.q AND migrate._owned_sequence(p.source, a.attnum) IS NOT NULL)
    ORDER BY g.q::text, g.grantee
$$;

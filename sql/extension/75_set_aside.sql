-- What start sets aside for the copy: the target's secondary indexes and foreign keys. A copy without them is several times as
-- fast, and an index is built from all rows at once faster than row by row. 76_restore.sql puts them back.
-- What decides which rows are refused stays: unique indexes and the constraints that stand on them, checks, foreign keys to the target.

-- 'index i', 'foreign key k'
CREATE FUNCTION migrate._deferred_name(d migrate._deferred) RETURNS text
LANGUAGE sql IMMUTABLE AS $$ SELECT replace(d.kind, '_', ' ') || ' ' || quote_ident(d.name) $$;

-- What of this migration is not as it was before start.
CREATE FUNCTION migrate._still_deferred(m_id integer) RETURNS SETOF migrate._deferred
LANGUAGE sql STABLE AS $$
    SELECT d.* FROM migrate._deferred d JOIN migrate._flow f ON f.id = d.flow
    WHERE f.migration = m_id AND d.state NOT IN ('restored', 'given_up')
$$;

-- The columns of a foreign key as pg_get_constraintdef() begins, and the same up to the name of the referenced table.
CREATE FUNCTION migrate._foreign_key_head(c pg_constraint, OUT head text, OUT prefix text)
LANGUAGE sql STABLE AS $$
    SELECT h, h || ' REFERENCES ' || c.confrelid::regclass || '('
    FROM (SELECT 'FOREIGN KEY (' || string_agg(quote_ident(a.attname), ', ' ORDER BY k.i) || ')' AS h
          FROM unnest(c.conkey) WITH ORDINALITY AS k(attnum, i) JOIN pg_attribute a ON a.attrelid = c.conrelid AND a.attnum = k.attnum) x
$$;

-- Why a table's indexes and foreign keys stay, all of them; NULL: they need not.
CREATE FUNCTION migrate._table_stays(f migrate._flow) RETURNS text
LANGUAGE sql STABLE AS $$
    SELECT CASE WHEN c.relkind <> 'r' OR c.relispartition OR EXISTS (SELECT FROM pg_inherits i WHERE c.oid IN (i.inhrelid, i.inhparent))
                THEN 'the table is partitioned, a partition, or inherits'
                WHEN EXISTS (SELECT FROM migrate._flow o JOIN migrate._migration m ON m.id = o.migration
                             WHERE o.target = f.target AND o.migration <> f.migration AND m.phase NOT IN ('planned', 'cancelled'))
                THEN 'another migration has the same target' END
    FROM pg_class c WHERE c.oid = f.target
$$;

-- The secondary indexes and foreign keys of a flow's target, in the order they were made, with the reason why one cannot be set
-- aside. As the table's owner it must be possible to make it again, and nothing may be lost that its definition does not tell.
CREATE FUNCTION migrate._secondary(f migrate._flow) RETURNS TABLE (kind text, object oid, name text, stays text)
LANGUAGE sql STABLE AS $$
    SELECT 'index', i.indexrelid, c.relname::text, CASE
        WHEN t.stays IS NOT NULL THEN t.stays
        WHEN NOT (i.indisvalid AND i.indisready AND i.indislive) THEN 'it is invalid'
        WHEN i.indisclustered THEN 'CLUSTER goes by it'
        WHEN EXISTS (SELECT FROM pg_depend d WHERE (d.refclassid = 'pg_class'::regclass AND d.refobjid = i.indexrelid)
                     OR (d.classid = 'pg_class'::regclass AND d.objid = i.indexrelid AND d.deptype IN ('e', 'x'))) THEN 'other objects depend on it, or it on an extension'
        WHEN NOT has_schema_privilege(t.relowner, t.relnamespace, 'CREATE')
            THEN format('role %s could not create it again: it lacks CREATE on schema %s', t.relowner::regrole, t.relnamespace::regnamespace)
        WHEN c.reltablespace <> 0 AND NOT has_tablespace_privilege(t.relowner, c.reltablespace, 'CREATE')
            THEN format('role %s could not create it again: it lacks CREATE on its tablespace', t.relowner::regrole) END
    FROM (SELECT c.*, migrate._table_stays(f) AS stays FROM pg_class c WHERE c.oid = f.target) t
    JOIN pg_index i ON i.indrelid = t.oid AND NOT i.indisunique AND NOT i.indisexclusion JOIN pg_class c ON c.oid = i.indexrelid
    WHERE NOT EXISTS (SELECT FROM pg_constraint k WHERE k.conindid = i.indexrelid AND k.contype IN ('p', 'u', 'x'))
    UNION ALL
    SELECT 'foreign_key', k.oid, k.conname::text, CASE
        WHEN t.stays IS NOT NULL THEN t.stays
        WHEN r.relkind <> 'r' THEN 'the table that it references is partitioned'
        WHEN NOT k.conislocal OR k.coninhcount > 0 THEN 'it is inherited'
        WHEN to_jsonb(k) ->> 'conenforced' = 'false' THEN 'it is not enforced'
        WHEN EXISTS (SELECT FROM pg_trigger g WHERE g.tgconstraint = k.oid AND g.tgenabled <> 'O') THEN 'a trigger of it is not enabled in the ordinary way'
        WHEN EXISTS (SELECT FROM pg_depend d WHERE (d.refclassid = 'pg_constraint'::regclass AND d.refobjid = k.oid AND d.deptype <> 'i')
                     OR (d.classid = 'pg_constraint'::regclass AND d.objid = k.oid AND d.deptype IN ('e', 'x'))) THEN 'other objects depend on it, or it on an extension'
        WHEN NOT has_schema_privilege(t.relowner, r.relnamespace, 'USAGE') OR NOT (has_table_privilege(t.relowner, r.oid, 'REFERENCES')
             OR (SELECT bool_and(has_column_privilege(t.relowner, r.oid, a, 'REFERENCES')) FROM unnest(k.confkey) a))
            THEN format('role %s could not create it again: it may not reference %s', t.relowner::regrole, r.oid::regclass)
        WHEN NOT starts_with(pg_get_constraintdef(k.oid), h.prefix) THEN 'its definition has a form that is not known' END
    FROM (SELECT c.*, migrate._table_stays(f) AS stays FROM pg_class c WHERE c.oid = f.target) t
    JOIN pg_constraint k ON k.conrelid = t.oid AND k.contype = 'f' AND k.conparentid = 0
    JOIN pg_class r ON r.oid = k.confrelid, LATERAL migrate._foreign_key_head(k) h
    ORDER BY 1 DESC, 2
$$;

-- A target's rows in all, as its owner; the preflight asks for those of the flow's own share.
CREATE FUNCTION migrate._is_empty(target regclass) RETURNS boolean
LANGUAGE sql VOLATILE AS $$ SELECT NOT EXISTS (SELECT FROM migrate._as(migrate._table_owner(target), format('SELECT 1 FROM %s LIMIT 1', target))) $$;

-- What start sets aside, of each target once.
CREATE FUNCTION migrate._to_set_aside(m migrate._migration, keys boolean) RETURNS TABLE (f migrate._flow, kind text, object oid, name text, referenced regclass)
LANGUAGE sql VOLATILE AS $$
    SELECT x.f, s.kind, s.object, s.name, k.confrelid::regclass
    FROM (SELECT DISTINCT ON (w.target) w AS f FROM migrate._flow w WHERE w.migration = m.id ORDER BY w.target, w.id) x
    CROSS JOIN LATERAL migrate._secondary(x.f) s
    LEFT JOIN pg_constraint k ON s.kind = 'foreign_key' AND k.oid = s.object
    WHERE s.stays IS NULL AND (keys OR s.kind = 'index')
      AND CASE migrate._opt(m.id, 'defer_indexes') WHEN 'on' THEN true WHEN 'auto' THEN migrate._is_empty((x.f).target) ELSE false END
    ORDER BY (x.f).id, s.kind DESC, s.object
$$;

-- What start locks: to make triggers on each source, and to take what is set aside off its tables (a foreign key off both).
CREATE FUNCTION migrate._start_locks(m migrate._migration, keys boolean, OUT relations regclass[], OUT modes text[], OUT has_keys boolean)
LANGUAGE sql VOLATILE AS $$
    WITH aside AS MATERIALIZED (
        SELECT a.kind, r FROM migrate._to_set_aside(m, keys) a, LATERAL unnest(ARRAY[(a.f).target, a.referenced]) r WHERE r IS NOT NULL
    ), wanted AS (
        SELECT r FROM migrate._flow f, LATERAL migrate._partition_tree(f.source) r WHERE f.migration = m.id UNION SELECT a.r FROM aside a
    )
    SELECT array_agg(w.r ORDER BY w.r), array_agg(CASE WHEN w.r IN (SELECT a.r FROM aside a) THEN 'ACCESS EXCLUSIVE' ELSE 'SHARE ROW EXCLUSIVE' END ORDER BY w.r),
           EXISTS (SELECT FROM aside a WHERE a.kind = 'foreign_key')
    FROM wanted w
$$;

-- Takes them off, as the table's owner, with their definitions kept. The caller holds the locks of _start_locks().
CREATE FUNCTION migrate._set_aside(m migrate._migration, caller regrole, keys boolean) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    a record;
    d migrate._deferred;
    counted integer := 0;
BEGIN
    FOR a IN SELECT * FROM migrate._to_set_aside(m, keys) LOOP
        counted := counted + 1;
        d := migrate._describe_deferred(a.f, counted, a.kind, a.object);
        INSERT INTO migrate._deferred SELECT d.*;
        PERFORM migrate._as(migrate._table_owner((a.f).target), CASE a.kind
            WHEN 'index' THEN format('DROP INDEX %s', migrate._relation_name(a.object))
            ELSE format('ALTER TABLE %s DROP CONSTRAINT %I', migrate._relation_name((a.f).target), a.name) END);
        PERFORM migrate._event(m, caller, 'set aside', format('%s of %s, until the copy is done', migrate._deferred_name(d), (a.f).target));
    END LOOP;
END $$;

CREATE FUNCTION migrate._describe_deferred(f migrate._flow, ordinal integer, kind text, object oid) RETURNS migrate._deferred
LANGUAGE sql STABLE AS $$
    SELECT ROW(f.id, ordinal, kind, c.relname, NULL, '', migrate._index_tail(c.oid), (SELECT t.spcname FROM pg_tablespace t WHERE t.oid = c.reltablespace),
               (SELECT array_agg(nullif(a.attstattarget, -1) ORDER BY a.attnum) FROM pg_attribute a WHERE a.attrelid = c.oid AND a.attnum > 0),
               obj_description(c.oid, 'pg_class'), NULL, 'aside', NULL)::migrate._deferred
    FROM pg_class c WHERE kind = 'index' AND c.oid = object
    UNION ALL
    SELECT ROW(f.id, ordinal, kind, k.conname, k.confrelid, h.head, substr(pg_get_constraintdef(k.oid), length(h.prefix)), NULL, NULL,
               obj_description(k.oid, 'pg_constraint'), NULL, 'aside', NULL)::migrate._deferred
    FROM pg_constraint k, LATERAL migrate._foreign_key_head(k) h WHERE kind = 'foreign_key' AND k.oid = object
$$;

-- USING … of CREATE INDEX name ON table USING …
CREATE FUNCTION migrate._index_tail(index oid) RETURNS text
LANGUAGE sql STABLE AS $$
    SELECT substr(pg_get_indexdef(i.indexrelid), 1 + length(format('CREATE INDEX %I ON %s ', c.relname, migrate._relation_name(i.indrelid))))
    FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid WHERE i.indexrelid = index
$$;

-- Preflight: what start will set aside, and what stays, each with its reason; later, what still is.
CREATE FUNCTION migrate._check_deferred(m migrate._migration) RETURNS SETOF migrate._check
LANGUAGE sql STABLE AS $$
    SELECT 'deferred', 'info', format('%s %s of target %s %s', replace(s.kind, '_', ' '), quote_ident(s.name), (x.f).target, CASE
               WHEN o.value = 'off' THEN 'stays during the copy: defer_indexes = off'
               WHEN s.stays IS NOT NULL THEN 'stays during the copy: ' || s.stays
               ELSE format('is set aside by start%s, and %s after the copy', CASE o.value WHEN 'auto' THEN ' where the target is empty' ELSE '' END,
                           CASE s.kind WHEN 'index' THEN 'built (CONCURRENTLY)' ELSE 'added and validated' END) END),
           CASE WHEN o.value = 'off' OR s.stays IS NOT NULL THEN '' ELSE format('SELECT migrate.set(%L, ''defer_indexes'', ''off''); lets it stay.', m.name) END
    FROM (SELECT DISTINCT ON (w.target) w AS f FROM migrate._flow w JOIN pg_class c ON c.oid = w.target WHERE w.migration = m.id ORDER BY w.target, w.id) x
    CROSS JOIN (SELECT migrate._opt(m.id, 'defer_indexes') AS value) o
    CROSS JOIN LATERAL migrate._secondary(x.f) s
    WHERE m.phase = 'planned'
    UNION ALL
    SELECT 'deferred', 'info', CASE WHEN d.relation IS NULL THEN format('%s of target %s is set aside until the copy is done', migrate._deferred_name(d), f.target)
                                    ELSE format('%s of %s, added NOT VALID by the switch, is to be validated', migrate._deferred_name(d), d.relation) END, ''
    FROM migrate._still_deferred(m.id) d JOIN migrate._flow f ON f.id = d.flow
$$;

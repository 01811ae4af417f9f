-- Sequences at a switch: which ones feed the columns of either side, and where they must stand so that the next value is new on both.

-- Sequences that feed a column of a source or target (owned by it, its identity, or named in its default), with all columns on either side
-- that hold the same values.
CREATE FUNCTION migrate._sequences(m_id integer) RETURNS TABLE (sequence regclass, relation regclass, attnum int2)
LANGUAGE sql STABLE AS $$
    WITH side AS (
        SELECT f.source AS relation FROM migrate._flow f WHERE f.migration = m_id UNION SELECT f.target FROM migrate._flow f WHERE f.migration = m_id
    ), feeds AS (
        SELECT d.objid AS sequence, d.refobjid AS relation, d.refobjsubid AS attnum FROM side s JOIN pg_depend d ON d.refobjid = s.relation
        WHERE d.classid = 'pg_class'::regclass AND d.refclassid = 'pg_class'::regclass AND d.refobjsubid > 0 AND d.deptype IN ('a', 'i')
        UNION
        SELECT d.refobjid, e.adrelid, e.adnum FROM side s JOIN pg_attrdef e ON e.adrelid = s.relation
        JOIN pg_depend d ON d.classid = 'pg_attrdef'::regclass AND d.objid = e.oid AND d.refclassid = 'pg_class'::regclass
    ), bare AS (
        SELECT p.origin, o.attnum AS origin_attnum, p.dest, p.columns[e.i] AS dest_attnum
        FROM migrate._mapping p JOIN migrate._flow f ON f.id = p.flow, LATERAL migrate._view_body(p.view) b,
             unnest(b.expressions) WITH ORDINALITY AS e(expression, i), pg_attribute o
        WHERE f.migration = m_id AND p.direction = 'forward' AND o.attrelid = p.origin AND o.attnum > 0 AND e.expression = quote_ident(o.attname)
        UNION
        SELECT p.origin, k.origin_attnum, p.dest, k.dest_attnum FROM migrate._mapping p JOIN migrate._flow f ON f.id = p.flow,
             unnest(p.key_origin, p.key_dest) AS k(origin_attnum, dest_attnum)
        WHERE f.migration = m_id AND p.direction = 'forward' AND k.origin_attnum > 0
    ), linked AS (
        SELECT sequence, relation, attnum FROM feeds
        UNION SELECT x.sequence, b.dest, b.dest_attnum FROM feeds x JOIN bare b ON b.origin = x.relation AND b.origin_attnum = x.attnum
        UNION SELECT x.sequence, b.origin, b.origin_attnum FROM feeds x JOIN bare b ON b.dest = x.relation AND b.dest_attnum = x.attnum
    )
    SELECT l.sequence::regclass, l.relation::regclass, l.attnum::int2
    FROM linked l JOIN pg_class c ON c.oid = l.sequence AND c.relkind = 'S'
$$;

-- The extreme value of a whole-number column (the largest, or the smallest where the sequence descends), read as the table's owner; NULL where
-- there is none. indexed_only: NULL too where it would take a scan of the table.
CREATE FUNCTION migrate._extreme(relation regclass, attnum int2, descending boolean, indexed_only boolean) RETURNS numeric
LANGUAGE plpgsql AS $$
DECLARE
    column_name name;
BEGIN
    SELECT a.attname INTO column_name FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid
    WHERE a.attrelid = relation AND a.attnum = _extreme.attnum
      AND coalesce(nullif(t.typbasetype, 0), t.oid) IN ('int2'::regtype, 'int4'::regtype, 'int8'::regtype, 'numeric'::regtype);
    IF NOT FOUND OR indexed_only AND NOT EXISTS (SELECT FROM pg_index i JOIN pg_class x ON x.oid = i.indexrelid JOIN pg_am a ON a.oid = x.relam
            WHERE i.indrelid = relation AND i.indkey[0] = attnum AND i.indisvalid AND i.indpred IS NULL AND a.amname = 'btree') THEN
        RETURN NULL;
    END IF;
    RETURN (SELECT trunc(r[1]::numeric) FROM migrate._as(migrate._table_owner(relation), format(
        'SELECT %s(%I)::numeric::text FROM %s WHERE %2$I::numeric <> ''NaN''', CASE WHEN descending THEN 'min' ELSE 'max' END, column_name,
        migrate._relation_name(relation))) r);
END $$;

-- As pg_sequence_last_value(), which would lock the sequence until the transaction ends (even if it is undone). Read as the sequence's
-- owner: while the name waits for a lock he may give it to a view, whose functions must not run as the extension's owner.
CREATE FUNCTION migrate._last_value(sequence regclass) RETURNS bigint
LANGUAGE plpgsql AS $$
BEGIN
    RETURN (SELECT r[1]::bigint FROM migrate._as(migrate._table_owner(sequence),
        format('SELECT last_value FROM %s WHERE is_called', migrate._relation_name(sequence))) r);
END $$;

-- Where each sequence must stand so that its next value is new on both sides: past every value of the columns and past every sequence
-- that feeds them, in its own step. beyond: that value, where the sequence cannot reach it. floors: values found earlier, by a scan.
-- (PL/pgSQL, so that it is planned before it runs under locks.)
CREATE FUNCTION migrate._sequence_targets(m_id integer, floors jsonb DEFAULT NULL)
RETURNS TABLE (sequence regclass, goal numeric, beyond numeric, reached numeric)
LANGUAGE plpgsql AS $$
BEGIN RETURN QUERY
    WITH links AS MATERIALIZED (SELECT * FROM migrate._sequences(m_id)),
    own AS (SELECT DISTINCT l.sequence FROM links l),
    found AS (
        SELECT l.sequence, migrate._extreme(l.relation, l.attnum, s.seqincrement < 0, floors IS NOT NULL) AS value
        FROM links l JOIN pg_sequence s ON s.seqrelid = l.sequence
        UNION ALL
        SELECT l.sequence, migrate._last_value(k.sequence) FROM links l JOIN links k USING (relation, attnum)
        UNION ALL
        SELECT o.sequence, (floors ->> o.sequence::oid::text)::numeric FROM own o
    ), best AS (
        SELECT f.sequence, s.*, CASE WHEN s.seqincrement > 0 THEN max(f.value) ELSE min(f.value) END AS value
        FROM found f JOIN pg_sequence s ON s.seqrelid = f.sequence GROUP BY f.sequence, s.seqrelid, s.seqtypid, s.seqstart, s.seqincrement, s.seqmax, s.seqmin, s.seqcache, s.seqcycle
    ), stepped AS (
        SELECT b.*, b.seqstart + ceil((b.value - b.seqstart) / b.seqincrement) * b.seqincrement AS goal, migrate._last_value(b.sequence) AS now
        FROM best b
    )
    SELECT t.sequence,
           CASE WHEN t.goal BETWEEN t.seqmin AND t.seqmax
                 AND CASE WHEN t.seqincrement > 0 THEN t.goal > coalesce(t.now, t.seqstart - 1) ELSE t.goal < coalesce(t.now, t.seqstart + 1) END
                THEN t.goal END,
           CASE WHEN NOT t.seqcycle AND (t.seqincrement > 0 AND t.goal >= t.seqmax OR t.seqincrement < 0 AND t.goal <= t.seqmin) THEN t.value END,
           t.value
    FROM stepped t ORDER BY t.sequence::oid;
END $$;

-- A sequence that cannot go on past all values, and what helps. One that a swap has let count further goes back to its type, but not from
-- beyond what that holds. A value that the type does not hold is no row's there: only a sequence has been that far.
CREATE FUNCTION migrate._sequence_gate(m_id integer, side text, OUT problem text, OUT hint text)
LANGUAGE plpgsql AS $$
BEGIN
    WITH links AS MATERIALIZED (SELECT * FROM migrate._sequences(m_id)), swapped AS MATERIALIZED (
        SELECT x.relation, substring(x.inverse[2] from 5) AS type FROM migrate._swapped x JOIN pg_class c ON c.oid = x.relation AND c.relkind = 'S'
        WHERE side = 'source' AND x.migration = m_id AND x.inverse[2] ~ '^ AS (smallint|integer)$'
    )
    SELECT format('sequence %s ends before %s', s.sequence, s.value),
           CASE WHEN abs(s.value) < z.size - 1 THEN format('ALTER SEQUENCE %s NO MAXVALUE;', s.sequence)
                ELSE coalesce((SELECT format('Where no row has such a value any more: SELECT setval(%L, (SELECT max(%I) FROM %s));', k.sequence, a.attname, l.relation)
                               FROM links l JOIN links k USING (relation, attnum) JOIN pg_attribute a ON a.attrelid = l.relation AND a.attnum = l.attnum
                               WHERE l.sequence = s.sequence AND migrate._last_value(k.sequence) = s.value ORDER BY l.relation, k.sequence LIMIT 1),
                              format('ALTER SEQUENCE %s AS bigint;', s.sequence)) END INTO problem, hint
    FROM (SELECT t.sequence, t.beyond AS value, q.seqtypid AS type, true AS ends FROM migrate._sequence_targets(m_id) t JOIN pg_sequence q ON q.seqrelid = t.sequence WHERE t.beyond IS NOT NULL
          UNION ALL
          SELECT x.relation, migrate._last_value(x.relation), x.type::regtype, false FROM swapped x) s
    JOIN LATERAL (SELECT trunc(2::numeric ^ (8 * y.typlen - 1)) AS size FROM pg_type y WHERE y.oid = s.type) z ON true
    WHERE s.ends OR abs(s.value) >= z.size - 1 LIMIT 1;
END $$;

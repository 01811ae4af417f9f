-- The primitive (src/flow.cpp) and what it needs to know of a mapping.

CREATE FUNCTION migrate._apply_keys(flow integer, direction text, keys text[]) RETURNS text[]
LANGUAGE C STRICT AS 'MODULE_PATHNAME', 'migrate_apply_keys';
COMMENT ON FUNCTION migrate._apply_keys IS
    'makes the rows of these keys (2-D) equal to the mapping, under row locks; gives the keys locked by others, or NULL';

CREATE FUNCTION migrate._apply_range(flow integer, low text[], high text[], max_rows integer, max_bytes bigint DEFAULT NULL,
                                     OUT rows_done bigint, OUT rows_written bigint, OUT reached text[], OUT skipped text[])
LANGUAGE C AS 'MODULE_PATHNAME', 'migrate_apply_range';
COMMENT ON FUNCTION migrate._apply_range IS
    'copies the next max_rows rows of (low, high] in key order, fewer where they have more than max_bytes; reached: the last key considered (NULL: the range is exhausted); skipped: keys (2-D) of locked rows';

CREATE FUNCTION migrate._invalidate(relation regclass) RETURNS void
LANGUAGE C STRICT AS 'MODULE_PATHNAME', 'migrate_invalidate';
COMMENT ON FUNCTION migrate._invalidate IS 'makes every backend read the mappings of this table again';

CREATE FUNCTION migrate._path(flow integer, direction text) RETURNS text
LANGUAGE C STRICT STABLE AS 'MODULE_PATHNAME', 'migrate_path';
COMMENT ON FUNCTION migrate._path IS 'NULL where the dual writes are made row by row without SQL; else the first reason why not';

CREATE FUNCTION migrate._no_bulk_copy(flow integer) RETURNS text
LANGUAGE C STRICT STABLE AS 'MODULE_PATHNAME', 'migrate_no_bulk_copy';
COMMENT ON FUNCTION migrate._no_bulk_copy IS 'NULL where the backfill copies without a lock on a row; else the first reason why not';

-- The unique index of dest that upserts arbitrate on; NULL when it is gone.
CREATE FUNCTION migrate._key_index(dest regclass, key_dest int2[]) RETURNS regclass
LANGUAGE sql STABLE AS $$
    SELECT i.indexrelid::regclass FROM pg_index i
    WHERE i.indrelid = dest AND i.indisunique AND i.indpred IS NULL AND i.indexprs IS NULL AND i.indkey[0:i.indnkeyatts - 1]::int2[] = key_dest
    ORDER BY i.indisvalid DESC, i.indimmediate DESC, i.indisprimary DESC, i.indexrelid LIMIT 1
$$;

-- Whether a column of the mapping view cannot be NULL: a key column, or a bare NOT NULL column of origin of the same name.
CREATE FUNCTION migrate._never_null(mapping migrate._mapping, view_column int2) RETURNS boolean
LANGUAGE sql STABLE AS $$
    SELECT view_column = ANY (mapping.key_view)
        OR mapping.plain AND NOT EXISTS (SELECT FROM pg_attribute o WHERE o.attrelid = mapping.origin AND o.attnum = ANY (mapping.reads) AND NOT o.attnotnull)
$$;

-- Whether dest's owner, as whom it is written, still has the rights that takes: an owner may change, or lose rights to himself.
CREATE FUNCTION migrate._writable(mapping migrate._mapping) RETURNS boolean
LANGUAGE sql STABLE AS $$
    SELECT has_schema_privilege(c.relowner, c.relnamespace, 'USAGE') AND has_table_privilege(c.relowner, mapping.view, 'SELECT')
       AND (SELECT bool_and(has_table_privilege(c.relowner, c.oid, k)) FROM unnest('{SELECT,INSERT,UPDATE,DELETE}'::text[]) k)
    FROM pg_class c WHERE c.oid = mapping.dest
$$;

-- Whether an upsert into, or a delete from, the mapping's dest could be refused by anything at all. Where it could not, best
-- effort needs no subtransaction. (A filter is an expression like any other; that of a reverse mapping only compares constants.)
CREATE FUNCTION migrate._may_fail(mapping migrate._mapping, OUT upsert_may_fail boolean, OUT delete_may_fail boolean)
LANGUAGE sql STABLE AS $$
    SELECT NOT mapping.plain OR mapping.filtered AND mapping.direction = 'forward' OR NOT migrate._writable(mapping)
        OR migrate._key_index(mapping.dest, mapping.key_dest) IS NULL
        OR EXISTS (SELECT FROM pg_attribute WHERE attrelid = mapping.dest AND attnum = ANY (mapping.columns) AND attisdropped)
        OR (SELECT relkind <> 'r' FROM pg_class WHERE oid = mapping.dest)
        OR EXISTS (SELECT FROM pg_constraint WHERE conrelid = mapping.dest AND contype IN ('c', 'f', 'x', 't'))
        OR EXISTS (SELECT FROM pg_index WHERE indrelid = mapping.dest AND indexrelid <> migrate._key_index(mapping.dest, mapping.key_dest) AND (indisunique OR indisexclusion OR indexprs IS NOT NULL OR indpred IS NOT NULL))
        OR EXISTS (SELECT FROM pg_trigger WHERE tgrelid = mapping.dest AND NOT tgisinternal AND tgname NOT LIKE '!migrate\_%' AND tgtype & 28 <> 8)
        OR EXISTS (SELECT FROM pg_attribute d
                   LEFT JOIN LATERAL (SELECT v.* FROM pg_attribute v
                                      WHERE v.attrelid = mapping.view AND v.attnum = array_position(mapping.columns, d.attnum)) v ON true
                   LEFT JOIN pg_type t ON t.oid = d.atttypid
                   WHERE d.attrelid = mapping.dest AND d.attnum > 0 AND NOT d.attisdropped
                     AND (d.attgenerated <> '' OR t.typtype = 'd'
                          OR (v.attnum IS NULL AND d.attnotnull AND NOT d.atthasdef AND d.attidentity = '')
                          OR (v.attnum IS NOT NULL AND (d.atttypid <> v.atttypid OR (d.atttypmod <> v.atttypmod AND d.atttypmod <> -1)))
                          OR (v.attnum IS NOT NULL AND d.attnotnull AND NOT migrate._never_null(mapping, v.attnum)))),
        mapping.filtered AND mapping.direction = 'forward' OR NOT migrate._writable(mapping)
        OR EXISTS (SELECT FROM pg_constraint WHERE confrelid = mapping.dest AND contype = 'f')
        OR EXISTS (SELECT FROM pg_trigger WHERE tgrelid = mapping.dest AND NOT tgisinternal AND tgname NOT LIKE '!migrate\_%' AND tgtype & 8 <> 0)
$$;

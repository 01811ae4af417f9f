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

CREATE FUNCTION migrate._apply_places(flow integer, file oid, after text[], until text[], max_rows integer, max_bytes bigint DEFAULT NULL,
                                      OUT rows_done bigint, OUT rows_written bigint, OUT reached text[], OUT skipped text[], OUT rewritten boolean)
LANGUAGE C AS 'MODULE_PATHNAME', 'migrate_apply_places';
COMMENT ON FUNCTION migrate._apply_places IS
    'as _apply_range, for the next rows of (after, until] in the order of place; rewritten: the source has another file than this, and nothing was done';

CREATE FUNCTION migrate._next_places(flow integer, file oid, after text[], until text[], max_rows integer, OUT keys text[], OUT reached text[])
LANGUAGE C AS 'MODULE_PATHNAME', 'migrate_next_places';
COMMENT ON FUNCTION migrate._next_places IS 'the keys (2-D) of those rows, without looking at the mapping; NULL where there is none';

CREATE FUNCTION migrate._invalidate(relation regclass) RETURNS void
LANGUAGE C STRICT AS 'MODULE_PATHNAME', 'migrate_invalidate';
COMMENT ON FUNCTION migrate._invalidate IS 'makes every backend read the mappings of this table again';

CREATE FUNCTION migrate._path(flow integer, direction text) RETURNS text
LANGUAGE C STRICT STABLE AS 'MODULE_PATHNAME', 'migrate_path';
COMMENT ON FUNCTION migrate._path IS 'NULL where the dual writes are made row by row without SQL; else the first reason why not';

CREATE FUNCTION migrate._no_bulk_copy(flow integer) RETURNS text
LANGUAGE C STRICT STABLE AS 'MODULE_PATHNAME', 'migrate_no_bulk_copy';
COMMENT ON FUNCTION migrate._no_bulk_copy IS 'NULL where the backfill copies without a lock on a row; else the first reason why not';

-- Whether each key column of the index is a plain one, and compares as that does in SQL: by its collation, and by its type's own order.
-- What another index holds to be equal says nothing of keys.
CREATE FUNCTION migrate._compares_as_columns(index oid) RETURNS boolean
LANGUAGE sql STABLE AS $$
    SELECT bool_and(a.attcollation IS NOT DISTINCT FROM i.indcollation[n]
                    AND EXISTS (SELECT FROM pg_opclass c JOIN pg_opclass d ON d.opcfamily = c.opcfamily AND d.opcdefault WHERE c.oid = i.indclass[n]))
    FROM pg_index i CROSS JOIN LATERAL generate_series(0, i.indnkeyatts - 1) n LEFT JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = i.indkey[n]
    WHERE i.indexrelid = index
$$;

-- The unique index of dest that upserts arbitrate on; NULL when it is gone.
CREATE FUNCTION migrate._key_index(dest regclass, key_dest int2[]) RETURNS regclass
LANGUAGE sql STABLE AS $$
    SELECT i.indexrelid::regclass FROM pg_index i
    WHERE i.indrelid = dest AND i.indisunique AND i.indpred IS NULL AND i.indexprs IS NULL AND i.indkey[0:i.indnkeyatts - 1]::int2[] = key_dest
      AND migrate._compares_as_columns(i.indexrelid)
    ORDER BY i.indisvalid DESC, i.indimmediate DESC, i.indisprimary DESC, i.indexrelid LIMIT 1
$$;

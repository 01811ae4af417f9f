-- Digests, usable on any table by anybody who may read it.

CREATE FUNCTION migrate._md5_step(internal, value text, separator text) RETURNS internal
LANGUAGE C IMMUTABLE PARALLEL RESTRICTED AS 'MODULE_PATHNAME', 'migrate_md5_step';
CREATE FUNCTION migrate._ordered_md5_step(internal, VARIADIC "any") RETURNS internal
LANGUAGE C STABLE PARALLEL RESTRICTED AS 'MODULE_PATHNAME', 'migrate_ordered_md5_step';
CREATE FUNCTION migrate._md5_final(internal) RETURNS text
LANGUAGE C IMMUTABLE PARALLEL RESTRICTED AS 'MODULE_PATHNAME', 'migrate_md5_final';

CREATE AGGREGATE migrate.md5_agg(value text, separator text) (
    SFUNC = migrate._md5_step, STYPE = internal, SSPACE = 1500,
    FINALFUNC = migrate._md5_final, FINALFUNC_MODIFY = READ_WRITE, PARALLEL = RESTRICTED);
COMMENT ON AGGREGATE migrate.md5_agg(text, text) IS
    'md5_agg(value, separator ORDER BY key) equals md5(string_agg(value, separator ORDER BY key)), in constant memory and past 1 GB';

CREATE AGGREGATE migrate.ordered_md5(VARIADIC "any") (
    SFUNC = migrate._ordered_md5_step, STYPE = internal, SSPACE = 10000,
    FINALFUNC = migrate._md5_final, FINALFUNC_MODIFY = READ_WRITE, PARALLEL = RESTRICTED);
COMMENT ON AGGREGATE migrate.ordered_md5("any") IS
    'MD5 of rows in the order they come (give ORDER BY key): each column is a tag (0 NULL, 1 value), its length in 4 bytes, its image; ROW(...) counts as its columns';

-- Parallel safe, as PostgreSQL's own record_send and record_out are, which call the functions of any type too.
CREATE FUNCTION migrate._row_sum_step(internal, VARIADIC "any") RETURNS internal
LANGUAGE C STABLE PARALLEL SAFE AS 'MODULE_PATHNAME', 'migrate_row_sum_step';
CREATE FUNCTION migrate._row_sum_combine(internal, internal) RETURNS internal
LANGUAGE C IMMUTABLE PARALLEL SAFE AS 'MODULE_PATHNAME', 'migrate_row_sum_combine';
CREATE FUNCTION migrate._row_sum_serialize(internal) RETURNS bytea
LANGUAGE C IMMUTABLE STRICT PARALLEL SAFE AS 'MODULE_PATHNAME', 'migrate_row_sum_serialize';
CREATE FUNCTION migrate._row_sum_deserialize(bytea, internal) RETURNS internal
LANGUAGE C IMMUTABLE STRICT PARALLEL SAFE AS 'MODULE_PATHNAME', 'migrate_row_sum_deserialize';
CREATE FUNCTION migrate._row_sum_final(internal) RETURNS text
LANGUAGE C IMMUTABLE PARALLEL SAFE AS 'MODULE_PATHNAME', 'migrate_row_sum_final';

CREATE AGGREGATE migrate.row_sum(VARIADIC "any") (
    SFUNC = migrate._row_sum_step, STYPE = internal, SSPACE = 13000, COMBINEFUNC = migrate._row_sum_combine,
    SERIALFUNC = migrate._row_sum_serialize, DESERIALFUNC = migrate._row_sum_deserialize,
    FINALFUNC = migrate._row_sum_final, PARALLEL = SAFE);
COMMENT ON AGGREGATE migrate.row_sum("any") IS
    'number of rows and the 128-bit sum of their hashes, in any order and by parallel workers: a fast check of tables of one server against chance, no cryptographic proof';

-- The last value that comes: the key at which a scan in key order has arrived.
CREATE FUNCTION migrate._last_step(anyelement, anyelement) RETURNS anyelement
LANGUAGE C IMMUTABLE AS 'MODULE_PATHNAME', 'migrate_last_step';
CREATE AGGREGATE migrate._last(anyelement) (SFUNC = migrate._last_step, STYPE = anyelement);

CREATE FUNCTION migrate.same_image(a anyelement, b anyelement) RETURNS boolean
LANGUAGE C STABLE PARALLEL RESTRICTED AS 'MODULE_PATHNAME', 'migrate_same_image';
COMMENT ON FUNCTION migrate.same_image(anyelement, anyelement) IS
    'whether two values are the same byte for byte, as ordered_md5 sees them: 1.0 and 1.00, -0 and 0, NULL and empty differ';

CREATE FUNCTION migrate._operator(type oid, strategy integer) RETURNS text
LANGUAGE C STABLE STRICT AS 'MODULE_PATHNAME', 'migrate_operator';

-- How a digest of relation reads it: the columns' list, its ordering, and for the walk over ranges the conditions
-- key > $1 (text[]), and the last key of a range. Raises on everything that would make a digest ambiguous. Runs as the caller.
CREATE FUNCTION migrate._digest_parts(relation regclass, columns text[], key text[], OUT digest text, OUT ordering text,
                                      OUT last_key text, OUT above text)
LANGUAGE plpgsql STABLE AS $$
DECLARE
    kind "char" := (SELECT relkind FROM pg_class WHERE oid = relation);
    every text[] := ARRAY(SELECT attname::text FROM pg_attribute WHERE attrelid = relation AND attnum > 0 AND NOT attisdropped ORDER BY attnum);
    wrong text;
    list text[];
    names text[];
    low text[];
BEGIN
    IF kind IS NULL OR kind NOT IN ('r', 'p', 'v', 'm', 'f') THEN
        RAISE EXCEPTION USING ERRCODE = '42809', MESSAGE = coalesce(format('%s is not a table or view', relation), 'relation is NULL');
    END IF;
    columns := coalesce(columns, every);
    IF key IS NULL THEN
        key := ARRAY(SELECT a.attname::text FROM pg_index i, unnest(i.indkey::int2[]) WITH ORDINALITY k(attnum, n)
                     JOIN pg_attribute a ON a.attnum = k.attnum
                     WHERE a.attrelid = relation AND i.indrelid = relation AND i.indisprimary AND k.n <= i.indnkeyatts ORDER BY k.n);
        IF key = '{}' THEN
            RAISE EXCEPTION USING ERRCODE = '42704', MESSAGE = format('%s has no primary key to order its rows by', relation),
                HINT = 'Name columns that are unique and not null: key => ARRAY[''column''].';
        END IF;
    END IF;
    IF columns = '{}' OR key = '{}' THEN
        RAISE EXCEPTION USING ERRCODE = '22023', MESSAGE = 'columns and key need at least one column each';
    END IF;
    SELECT c INTO wrong FROM unnest(columns || key) c WHERE c IS NULL OR c <> ALL (every) LIMIT 1;
    IF FOUND THEN
        RAISE EXCEPTION USING ERRCODE = '42703', MESSAGE = format('column %s of %s does not exist', coalesce(quote_ident(wrong), 'NULL'), relation),
            HINT = format('Its columns are %s.', array_to_string(every, ', '));
    END IF;
    -- Rows with equal or NULL keys have no order of their own. Of views and foreign tables nobody knows: there the rows are counted.
    IF kind IN ('r', 'p', 'm') AND NOT EXISTS (
            SELECT FROM pg_index i
            WHERE i.indrelid = relation AND i.indisunique AND i.indimmediate AND i.indisvalid AND i.indpred IS NULL AND i.indexprs IS NULL
              AND NOT EXISTS (SELECT FROM unnest(i.indkey::int2[]) WITH ORDINALITY k(attnum, n)
                              JOIN pg_attribute a ON a.attrelid = relation AND a.attnum = k.attnum
                              WHERE k.n <= i.indnkeyatts AND (a.attname <> ALL (key) OR NOT (a.attnotnull OR kind = 'm')))) THEN
        RAISE EXCEPTION USING ERRCODE = '22023', MESSAGE = format('key (%s) of %s is not unique and not null', array_to_string(key, ', '), relation),
            DETAIL = 'Rows with equal or NULL keys have no order, so their digest could not be had twice.',
            HINT = 'Give the columns of a unique index without NULLs as key.';
    END IF;

    SELECT array_agg(quote_ident(c) ORDER BY n) INTO list FROM unnest(columns) WITH ORDINALITY x(c, n);
    digest := migrate._digest_call(list);
    SELECT array_agg(quote_ident(k) ORDER BY n), array_agg(format('($1)[%s]::%s', n, format_type(t.atttypid, -1)) ORDER BY n)
        INTO names, low
        FROM unnest(key) WITH ORDINALITY x(k, n) JOIN pg_attribute t ON t.attrelid = relation AND t.attname = k;
    ordering := array_to_string(names, ', ');
    last_key := (SELECT 'ARRAY[' || string_agg(format('migrate._last(%s)::text', n), ', ' ORDER BY i) || ']' FROM unnest(names) WITH ORDINALITY x(n, i));
    list := ARRAY(SELECT t.atttypid::text FROM unnest(key) WITH ORDINALITY x(k, n) JOIN pg_attribute t ON t.attrelid = relation AND t.attname = k ORDER BY n);
    above := migrate._beyond(names, low, list::oid[], '>');
END $$;

-- The aggregate's call over columns (texts of SQL). A function takes 100 arguments at most; ROW() has no such limit.
CREATE FUNCTION migrate._digest_call(columns text[], aggregate text DEFAULT 'ordered_md5') RETURNS text
LANGUAGE sql IMMUTABLE AS $$
    SELECT format(CASE WHEN cardinality(columns) > 90 THEN 'migrate.%s(ROW(%s))' ELSE 'migrate.%s(%s)' END, aggregate, array_to_string(columns, ', '))
$$;

-- The condition that a key lies beyond a bound: (a, b) > (x, y), or <=. Where the columns' operators live in one schema it is
-- a row comparison, for which an index is walked from the bound on; else it is spelled out.
CREATE FUNCTION migrate._beyond(names text[], bounds text[], types oid[], comparison text) RETURNS text
LANGUAGE plpgsql STABLE AS $$
DECLARE
    -- of a row comparison all columns take the same; spelled out, all but the last must lie past it
    whole integer := CASE comparison WHEN '>' THEN 5 WHEN '<=' THEN 2 END;
    past integer := CASE comparison WHEN '>' THEN 5 WHEN '<=' THEN 1 END;
    loose integer := CASE comparison WHEN '>' THEN 4 WHEN '<=' THEN 2 END;
    last integer := cardinality(names);
    same text := '';
    branches text[] := '{}';
BEGIN
    IF (SELECT count(DISTINCT coalesce(migrate._operator(t, whole), t::text)) FROM unnest(types) t) = 1 THEN
        RETURN format(CASE last WHEN 1 THEN '%s %s %s' ELSE '(%s) %s (%s)' END, array_to_string(names, ', '),
                      coalesce(migrate._operator(types[1], whole), comparison), array_to_string(bounds, ', '));
    END IF;
    FOR i IN 1 .. last LOOP
        branches := branches || format('(%s%s %s %s)', same, names[i],
                                       migrate._operator(types[i], CASE i WHEN last THEN whole ELSE past END), bounds[i]);
        same := same || format('%s %s %s AND ', names[i], migrate._operator(types[i], 3), bounds[i]);
    END LOOP;
    -- The first condition follows from the second; an index can use it.
    RETURN format('%s %s %s AND (%s)', names[1], migrate._operator(types[1], loose), bounds[1], array_to_string(branches, ' OR '));
END $$;

-- MD5 of no bytes at all stands for no rows: a digest can always be compared with =.
CREATE FUNCTION migrate.checksum(relation regclass, columns text[] DEFAULT NULL, key text[] DEFAULT NULL) RETURNS text
LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    part record;
    md5 text;
BEGIN
    SELECT * INTO part FROM migrate._digest_parts(relation, columns, key);
    -- From a sorted subquery, not with ORDER BY in the aggregate: so an index can give the order.
    EXECUTE format('SELECT %s FROM (SELECT * FROM %s ORDER BY %s) x', part.digest, relation, part.ordering) INTO md5;
    RETURN coalesce(md5, pg_catalog.md5(''));
END $$;
COMMENT ON FUNCTION migrate.checksum(regclass, text[], text[]) IS 'the ordered MD5 of a whole table, read in key order';

-- STABLE: every range is read in the snapshot of the query that calls it, so that together they are the table at one instant.
CREATE FUNCTION migrate.range_checksums(relation regclass, columns text[] DEFAULT NULL, key text[] DEFAULT NULL,
                                        range_rows integer DEFAULT 10000, OUT low text[], OUT high text[], OUT rows bigint, OUT md5 text)
RETURNS SETOF record LANGUAGE plpgsql STABLE
SET search_path = pg_catalog, pg_temp SET DateStyle = 'ISO, MDY' SET IntervalStyle = postgres SET TimeZone = 'UTC'
SET extra_float_digits = 1 SET bytea_output = hex SET lc_monetary = 'C' SET enable_seqscan = on SET enable_sort = on SET enable_bitmapscan = on AS $$
DECLARE
    part record;
    wanted bigint;
    seen bigint := 0;
    reached text[];
    next_rows bigint;
    next_md5 text;
    next_key text[];
BEGIN
    IF range_rows IS NULL OR range_rows NOT BETWEEN 1 AND 10000000 THEN
        RAISE EXCEPTION USING ERRCODE = '22023', MESSAGE = format('range_rows is %s', coalesce(range_rows::text, 'NULL')),
            DETAIL = 'It must be between 1 and 10000000.', HINT = 'The default is range_rows => 10000.';
    END IF;
    SELECT * INTO part FROM migrate._digest_parts(relation, columns, key);
    -- A table's range is not to be planned as a sort of all that follows, which for a key in random order may look cheaper.
    IF (SELECT relkind IN ('r', 'p', 'm') FROM pg_class WHERE oid = relation) THEN
        PERFORM set_config(s, 'off', true) FROM unnest('{enable_seqscan,enable_sort,enable_bitmapscan}'::text[]) s;
    END IF;
    -- One scan for each range gives its digest and its last key. What follows tells whether that key is the range's end: the last range is open.
    LOOP
        EXECUTE format('SELECT count(*), %s, %s FROM (SELECT * FROM %s WHERE %s ORDER BY %s LIMIT %s) x', part.digest, part.last_key, relation,
                       CASE WHEN reached IS NULL THEN 'true' ELSE part.above END, part.ordering, range_rows) INTO next_rows, next_md5, next_key USING reached;
        IF rows IS NOT NULL THEN
            high := CASE WHEN next_rows > 0 THEN reached END;
            RETURN NEXT;
            seen := seen + rows;
            EXIT WHEN next_rows = 0;
            low := reached;
        END IF;
        rows := next_rows;
        md5 := coalesce(next_md5, pg_catalog.md5(''));
        reached := next_key;
        IF rows < range_rows THEN
            high := NULL;
            RETURN NEXT;
            seen := seen + rows;
            EXIT;
        END IF;
    END LOOP;
    PERFORM set_config('enable_seqscan', 'on', true);
    EXECUTE format('SELECT count(*) FROM %s', relation) INTO wanted;
    IF seen <> wanted THEN
        RAISE EXCEPTION USING ERRCODE = '22023', MESSAGE = format('rows of %s have no order by this key', relation),
            DETAIL = format('Its ranges of %s rows hold %s rows of %s: the key is not unique, or it has NULLs.', range_rows, seen, wanted), HINT = 'Give columns as key that are unique and not null.';
    END IF;
END $$;
COMMENT ON FUNCTION migrate.range_checksums(regclass, text[], text[], integer) IS
    'ordered MD5 of each range (low, high] of about range_rows rows; NULL is open; together they cover the table';

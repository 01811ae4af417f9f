-- Preflight: every policy of the extension as a check that anybody may run at any time. start() and resume() run it too and
-- refuse while there is an error. The checks are rows of one table; 42_check_table.sql, 43_check_flow.sql and
-- 44_check_server.sql find what is wrong with them, and a check that found nothing is reported as ok.

CREATE TABLE migrate._check_definition (
    name    text PRIMARY KEY,
    ordinal integer GENERATED ALWAYS AS IDENTITY,
    promise text NOT NULL
);
COMMENT ON TABLE migrate._check_definition IS 'the checks of preflight(), in the order they are shown';
COMMENT ON COLUMN migrate._check_definition.promise IS 'what holds when the check found nothing';
INSERT INTO migrate._check_definition (name, promise) VALUES
    ('server_version', 'the server is a version that the extension is written for'),
    ('recovery', 'the server accepts writes'),
    ('flows', 'the migration has flows, and each has its mapping view and its tables'),
    ('ownership', 'the caller owns every source and target'),
    ('table_kind', 'sources and targets are plain or partitioned tables'),
    ('persistence', 'sources and targets are logged tables'),
    ('catalog', 'no system table is involved'),
    ('inheritance', 'no table inherits from another; partitions are reached through their root'),
    ('partitions', 'no partition is foreign or unlogged'),
    ('rules', 'no table has rewrite rules'),
    ('row_security', 'row security hides no row from the copy, and source and target agree on it'),
    ('subscription', 'no subscription writes to a target'),
    ('publication', 'no publication would refuse updates of a target'),
    ('key_index', 'each target has a valid, immediate unique index over its mapped key'),
    ('source_key', 'each source has a unique index over the columns of the key'),
    ('key_collation', 'keys sort alike on both sides and equal keys are identical'),
    ('key_type', 'no key is rounded by the type of its target column'),
    ('key_cast', 'keys are written and read as text by their types alone'),
    ('target_empty', 'targets are empty'),
    ('not_null', 'every NOT NULL column of a target gets a value'),
    ('nullable_source', 'no nullable source column goes into a NOT NULL column'),
    ('narrowing', 'every value fits the type of its target column'),
    ('generated', 'no generated column is written to'),
    ('defaults', 'target columns have the defaults that the source''s have'),
    ('constraints', 'no constraint of a target could refuse a row that the source took'),
    ('deferred_constraints', 'no constraint of a target is checked at commit'),
    ('foreign_key_actions', 'no foreign key of a target changes rows by itself'),
    ('deferred', 'no index and no foreign key of a target is set aside for the copy'),
    ('target_triggers', 'targets have no triggers of their own'),
    ('source_triggers', 'no trigger of a source fires for the carried-back writes'),
    ('referencing_keys', 'no foreign key references a source'),
    ('dependents', 'no view and no function depends on a source'),
    ('sequences', 'no sequence belongs to a source'),
    ('swap', 'no table is to take another''s name'),
    ('grants', 'who may use a source may use its target'),
    ('not_carried', 'every source column is carried'),
    ('carried_twice', 'no source column is carried into two targets'),
    ('reverse', 'every write to a target can be carried back after cutover'),
    ('on_target_delete', 'it is decided what deleting a target row does to its source row'),
    ('wal_level', 'wal_level lets replicas and archives follow'),
    ('replicas', 'no replica lags'),
    ('synchronous_replicas', 'commits do not wait for a replica'),
    ('prepared_transactions', 'no prepared transaction stands in the way'),
    ('long_transactions', 'no transaction is older than cutover_timeout'),
    ('slots', 'no replication slot holds back old rows'),
    ('xid_age', 'the sources are far from transaction id wraparound'),
    ('worker_slots', 'background worker slots are free'),
    ('size', 'sizes are known');

CREATE TYPE migrate._check AS (name text, severity text, message text, hint text);

-- 'a, b' with every name quoted where it must be.
CREATE FUNCTION migrate._column_list(relation regclass, attnums int2[]) RETURNS text
LANGUAGE sql STABLE AS $$
    SELECT string_agg(quote_ident(a.attname), ', ' ORDER BY u.i)
    FROM unnest(attnums) WITH ORDINALITY AS u(attnum, i)
    JOIN pg_attribute a ON a.attrelid = relation AND a.attnum = u.attnum
$$;

-- Both tables of every flow, each once, with the part it plays.
CREATE FUNCTION migrate._tables(m_id integer) RETURNS TABLE (part text, relation regclass)
LANGUAGE sql STABLE AS $$
    SELECT 'source', f.source FROM migrate._flow f WHERE f.migration = m_id
    UNION SELECT 'target', f.target FROM migrate._flow f WHERE f.migration = m_id
$$;

-- What each column of a mapping view is computed by. The view's text is cut at its outermost commas: PostgreSQL prints
-- nothing else there, and its FROM on a line of its own.
CREATE FUNCTION migrate._expressions(flow integer, direction text DEFAULT 'forward')
RETURNS TABLE (ordinal integer, dest_attnum int2, dest_column name, dest_type text, view_type text, expression text, origin_attnum int2)
LANGUAGE plpgsql STABLE COST 10000 ROWS 20 AS $$
DECLARE
    mp migrate._mapping;
    token text;
    depth integer := 0;
    piece text := '';
    pieces text[] := '{}';
BEGIN
    SELECT * INTO mp FROM migrate._mapping x WHERE x.flow = _expressions.flow AND x.direction = _expressions.direction;
    FOR token IN SELECT t[1] FROM regexp_matches(regexp_replace(rtrim(pg_get_viewdef(mp.view, 0), ';'), '^\s*SELECT\s+', ''),
                     $re$('(?:[^']|'')*'|"(?:[^"]|"")*"|[(\[]|[)\]]|,|\n   FROM |\n|[^'"()\[\],\n]+)$re$, 'g') AS t LOOP
        IF token IN ('(', '[') THEN
            depth := depth + 1;
        ELSIF token IN (')', ']') THEN
            depth := depth - 1;
        ELSIF token = E'\n   FROM ' AND depth = 0 THEN
            EXIT;
        ELSIF token = ',' AND depth = 0 THEN
            pieces := pieces || btrim(piece, E' \n');
            piece := '';
            CONTINUE;
        END IF;
        piece := piece || token;
    END LOOP;
    pieces := pieces || btrim(piece, E' \n');
    -- Joined by text, so that a thousand columns are no more than a hash table.
    RETURN QUERY
    WITH named AS MATERIALIZED (
        SELECT v.attnum AS position, v.atttypid, v.atttypmod,
               CASE WHEN right(p.text, length(a.alias)) = a.alias THEN left(p.text, -length(a.alias)) ELSE p.text END AS text
        FROM unnest(pieces) WITH ORDINALITY AS p(text, i)
        JOIN pg_attribute v ON v.attrelid = mp.view AND v.attnum = p.i
        CROSS JOIN LATERAL (SELECT ' AS ' || quote_ident(v.attname)) AS a(alias)),
    bare AS MATERIALIZED (
        SELECT n.*, CASE WHEN starts_with(n.text, c.prefix) THEN substr(n.text, length(c.prefix) + 1) ELSE n.text END AS column_text
        FROM named n CROSS JOIN (SELECT quote_ident(relname) || '.' AS prefix FROM pg_class WHERE oid = mp.origin) AS c),
    origin AS MATERIALIZED (
        SELECT o.attnum, quote_ident(o.attname) AS column_text FROM pg_attribute o WHERE o.attrelid = mp.origin AND o.attnum > 0 AND NOT o.attisdropped)
    SELECT b.position::int, d.attnum, d.attname, format_type(d.atttypid, d.atttypmod), format_type(b.atttypid, b.atttypmod),
           coalesce(o.column_text, regexp_replace(b.text, '\s+', ' ', 'g')), coalesce(o.attnum, 0::int2)
    FROM bare b
    JOIN unnest(mp.columns) WITH ORDINALITY AS k(attnum, i) ON k.i = b.position
    JOIN pg_attribute d ON d.attrelid = mp.dest AND d.attnum = k.attnum
    LEFT JOIN origin o ON o.column_text = b.column_text
    ORDER BY b.position;
END $$;

-- Sizes a flow is estimated at. Bytes of the target: 28 of row header and pointer, the columns at their average width, and
-- every index at 16 bytes an entry and its columns, filled by two thirds. WAL: the same, and 310 for a row's share of locks and headers.
CREATE FUNCTION migrate._estimate(f migrate._flow, OUT rows_known boolean, OUT row_count numeric, OUT source_bytes numeric,
                                  OUT target_bytes numeric, OUT wal_bytes numeric)
LANGUAGE sql STABLE AS $$
    WITH heap AS (
        SELECT coalesce(sum(c.reltuples) FILTER (WHERE c.reltuples >= 0), 0)::numeric AS tuples,
               coalesce(bool_or((c.reltuples < 0 OR c.relpages = 0) AND pg_relation_size(c.oid) > 0), false) AS unknown,  -- 0 pages: so say tables never analyzed before 14
               coalesce(sum(pg_relation_size(c.oid)), 0)::numeric AS bytes, coalesce(sum(pg_total_relation_size(c.oid)), 0)::numeric AS total
        FROM migrate._partition_tree(f.source) t(relid) JOIN pg_class c ON c.oid = t.relid AND c.relkind = 'r'
    ), width AS (
        SELECT a.attnum, coalesce((SELECT s.stawidth FROM pg_statistic s WHERE s.starelid = f.source AND s.staattnum = x.origin_attnum
                                   ORDER BY s.stainherit DESC LIMIT 1),
                                  nullif(a.attlen, -1), 32) AS bytes
        FROM migrate._expressions(f.id) x JOIN pg_attribute a ON a.attrelid = f.target AND a.attnum = x.dest_attnum
    ), entry AS (
        SELECT 28 + coalesce((SELECT sum(w.bytes) FROM width w), 0) +
               coalesce((SELECT sum(16 + (SELECT coalesce(sum(w.bytes), 8) FROM width w WHERE w.attnum = ANY (i.indkey::int2[]))) * 1.5
                         FROM pg_index i WHERE i.indrelid = f.target), 0) AS bytes
    ), counted AS (
        SELECT NOT heap.unknown AS known, CASE WHEN heap.unknown THEN heap.tuples + round(heap.bytes / 64) ELSE heap.tuples END AS n FROM heap
    )
    SELECT known, round(n), total, round(n * entry.bytes), round(n * (entry.bytes + 310)) FROM heap, entry, counted
$$;

CREATE FUNCTION migrate._preflight(caller regrole, name text)
RETURNS TABLE (severity text, "check" text, message text, hint text)
LANGUAGE plpgsql STABLE AS $$
DECLARE
    m migrate._migration := migrate._find(caller, name);
    found_rows migrate._check[];
BEGIN
    SELECT array_agg(x) INTO found_rows FROM (
        SELECT * FROM migrate._check_flows(m)
        UNION ALL SELECT * FROM migrate._check_access(m, caller)
        UNION ALL SELECT * FROM migrate._check_tables(m)
        UNION ALL SELECT * FROM migrate._check_replication(m)
        UNION ALL SELECT * FROM migrate._check_key(m)
        UNION ALL SELECT * FROM migrate._check_empty(m)
        UNION ALL SELECT * FROM migrate._check_columns(m)
        UNION ALL SELECT * FROM migrate._check_constraints(m)
        UNION ALL SELECT * FROM migrate._check_exchanges(m)
        UNION ALL SELECT * FROM migrate._check_deferred(m)
        UNION ALL SELECT * FROM migrate._check_triggers(m)
        UNION ALL SELECT * FROM migrate._check_left_behind(m)
        UNION ALL SELECT * FROM migrate._check_reverse(m)
        UNION ALL SELECT * FROM migrate._check_swap(m, caller)
        UNION ALL SELECT * FROM migrate._check_server(m)
        UNION ALL SELECT * FROM migrate._check_transactions(m)
        UNION ALL SELECT * FROM migrate._check_size(m)) x;
    RETURN QUERY
    SELECT coalesce(r.severity, 'ok'), d.name, coalesce(r.message, d.promise), coalesce(r.hint, '')
    FROM migrate._check_definition d LEFT JOIN unnest(found_rows) AS r ON r.name = d.name AND NOT migrate._swap_answers(m.id, r)
    ORDER BY array_position('{error,warning,info}', r.severity), d.ordinal, r.message;
END $$;

-- Raises while preflight finds an error. For start and resume, which have checked their caller.
CREATE FUNCTION migrate._preflight_errors(m_id integer) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    m migrate._migration;
    errors text[];
BEGIN
    SELECT * INTO m FROM migrate._migration x WHERE x.id = m_id;
    SELECT array_agg(p."check" || ': ' || p.message) INTO errors
    FROM migrate._preflight(m.owner, m.name) AS p WHERE p.severity = 'error';
    IF errors IS NOT NULL THEN
        PERFORM migrate._raise('55000', format('preflight of migration "%s" found %s', m.name,
                CASE cardinality(errors) WHEN 1 THEN 'an error' ELSE cardinality(errors) || ' errors' END),
            array_to_string(errors, E'\n'),
            format('SELECT * FROM migrate.preflight(%L) WHERE severity = ''error''; shows how to resolve each.', m.name));
    END IF;
END $$;

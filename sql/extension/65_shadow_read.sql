-- Shadow reads: what an application would see if it read from the new side already. A worker picks keys, reads each of them
-- from the old side (the mapping view) and from the new side (the table it feeds) in one snapshot, times both reads and
-- compares them. Dual writes commit with the write they follow, so a difference within one snapshot is real.
--
-- Which keys: half of them at random from the side that serves, a quarter at random from the other side (a row that should not be
-- there is found from there only), a quarter from those written lately on either side. At random is TABLESAMPLE SYSTEM of
-- as many pages as needed: it works for every type of key and for partitioned tables, and reads no more than those pages. Written
-- lately are rows whose xmin is not older than the previous step, on the pages sampled and on the last two pages of the heap (by
-- ctid, which every supported version finds without an index). Old row versions that were updated in place elsewhere are met by chance.

CREATE TABLE migrate._shadow (
    flow         integer NOT NULL REFERENCES migrate._flow ON DELETE CASCADE,
    direction    text NOT NULL CHECK (direction IN ('forward', 'reverse')),
    since        timestamptz NOT NULL DEFAULT clock_timestamp(),
    stepped_at   timestamptz NOT NULL DEFAULT clock_timestamp(),
    active_ms    numeric NOT NULL DEFAULT 0,
    last_xid     bigint NOT NULL,
    planned      bigint NOT NULL DEFAULT 0,
    picked       bigint NOT NULL DEFAULT 0,
    earlier_reads bigint NOT NULL DEFAULT 0,
    reads        bigint NOT NULL DEFAULT 0,
    recent_reads bigint NOT NULL DEFAULT 0,
    mismatches   bigint NOT NULL DEFAULT 0,
    source_ms     double precision NOT NULL DEFAULT 0,
    source_max_ms double precision NOT NULL DEFAULT 0,
    target_ms     double precision NOT NULL DEFAULT 0,
    target_max_ms double precision NOT NULL DEFAULT 0,
    refused      boolean NOT NULL DEFAULT false,
    PRIMARY KEY (flow, direction)
);
COMMENT ON TABLE migrate._shadow IS 'one run of shadow reads; written by the worker''s steps only';
COMMENT ON COLUMN migrate._shadow.since IS 'a run belongs to one stay in phase shadowing and the ready after it, or to one cutover';
COMMENT ON COLUMN migrate._shadow.active_ms IS 'time the steps have covered; while the migration is paused it stands still';
COMMENT ON COLUMN migrate._shadow.last_xid IS 'oldest transaction in progress at the last step: rows since then are written lately';
COMMENT ON COLUMN migrate._shadow.planned IS 'keys to read in shadow_time: shadow_rate of the rows';
COMMENT ON COLUMN migrate._shadow.picked IS 'keys chosen; those that are in _failure or _requeue, so known to differ, are not read';
COMMENT ON COLUMN migrate._shadow.earlier_reads IS 'reads of runs that ended well while the migration is ready or cut over: there a run is as long as shadow_time, lest old reads hide a new fault';
COMMENT ON COLUMN migrate._shadow.refused IS 'the step said mismatch: when the migration goes on nevertheless, a new run begins';

CREATE TABLE migrate._shadow_mismatch (
    flow      integer NOT NULL REFERENCES migrate._flow ON DELETE CASCADE,
    direction text NOT NULL,
    key       text[] NOT NULL,
    kind      text NOT NULL CHECK (kind IN ('missing', 'extra', 'different', 'error')),
    columns   text[] NOT NULL DEFAULT '{}',
    sqlstate  text,
    found_at  timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE INDEX ON migrate._shadow_mismatch (flow, direction);
ALTER TABLE migrate._shadow_mismatch REPLICA IDENTITY FULL;
COMMENT ON TABLE migrate._shadow_mismatch IS 'keys that shadow reads found to differ, at most 1000 for each run; keys only, never the row';

-- The SQL of one flow's shadow reads. A key is text[] with one element for each column of dest's key index; both reads take
-- these as $1, $2, … and give the same columns.
CREATE TYPE migrate._shadow_query AS (
    direction text, origin regclass, dest regclass, dest_owner regrole, columns text[], types text[], semantic boolean,
    expected text,       -- by the mapping view
    actual text,         -- in dest
    origin_key text[],   -- what a row of origin has for a key
    dest_key text[],     -- the same of dest
    dest_share text,     -- which rows (d) of dest are the flow's
    same_text boolean,   -- a key of dest can be read by in the view
    extra text           -- as actual, of the rows that dest may not have alone; NULL: it may have any
);

-- by: columns of dest to read by instead of those of its key; $1, $2, … are theirs, and 0 is none.
CREATE FUNCTION migrate._shadow_query(f migrate._flow, in_direction text, by int2[] DEFAULT NULL) RETURNS migrate._shadow_query
LANGUAGE plpgsql STABLE AS $$
DECLARE
    mp migrate._mapping;
    q migrate._shadow_query;
BEGIN
    SELECT * INTO mp FROM migrate._mapping p WHERE p.flow = f.id AND p.direction = in_direction;
    IF NOT FOUND THEN
        RETURN NULL;
    END IF;
    q.direction := in_direction;
    q.origin := mp.origin;
    q.dest := mp.dest;
    q.dest_owner := migrate._table_owner(mp.dest);
    q.semantic := migrate._opt(f.migration, 'equality') = 'semantic';
    SELECT array_agg(d.attname::text ORDER BY c.i), array_agg(format_type(d.atttypid, d.atttypmod) ORDER BY c.i) INTO q.columns, q.types
    FROM unnest(mp.columns) WITH ORDINALITY AS c(attnum, i) JOIN pg_attribute d ON d.attrelid = mp.dest AND d.attnum = c.attnum;
    -- SELECT v.a::text_type, … FROM view v WHERE v.key1 = $1::bigint AND …; of every flow that feeds the same rows.
    SELECT string_agg(format('SELECT %s FROM %s v WHERE %s', part.list, part.view, part.condition), ' UNION ALL ') INTO q.expected
    FROM (SELECT s.view,
                 (SELECT string_agg(CASE WHEN v.attname IS NULL THEN 'NULL::' ELSE format('v.%I::', v.attname) END || q.types[c.i], ', ' ORDER BY c.i)
                  FROM unnest(mp.columns) WITH ORDINALITY AS c(attnum, i)
                  LEFT JOIN pg_attribute v ON v.attrelid = s.view AND v.attnum = array_position(s.columns, c.attnum)) AS list,
                 (SELECT string_agg(format('v.%I = $%s::%s', v.attname, k.i, format_type(v.atttypid, -1)), ' AND ' ORDER BY k.i)
                  FROM unnest(coalesce(by, mp.key_dest)) WITH ORDINALITY AS k(attnum, i)
                  JOIN pg_attribute v ON v.attrelid = s.view AND v.attnum = array_position(s.columns, k.attnum)) AS condition
          FROM migrate._mapping s JOIN migrate._flow g ON g.id = s.flow
          WHERE g.migration = f.migration AND s.dest = mp.dest AND s.direction = in_direction AND (s.flow = f.id OR in_direction = 'forward' AND by IS NULL)) AS part;
    SELECT format('SELECT %s FROM %s d WHERE %s',
                  (SELECT string_agg(format('d.%I', c), ', ' ORDER BY i) FROM unnest(q.columns) WITH ORDINALITY AS x(c, i)), mp.dest,
                  string_agg(format('d.%I = $%s::%s', d.attname, k.i, format_type(d.atttypid, -1)), ' AND ' ORDER BY k.i))
    INTO q.actual
    FROM unnest(coalesce(by, mp.key_dest)) WITH ORDINALITY AS k(attnum, i) JOIN pg_attribute d ON d.attrelid = mp.dest AND d.attnum = k.attnum;
    -- Where a sampled row's key is read from, on either side.
    SELECT array_agg(CASE WHEN mp.key_origin[k.i] > 0 THEN format('d.%I::text', o.attname) ELSE quote_literal(mp.key_const[k.i]) END ORDER BY k.i),
           array_agg(format('d.%I::text', d.attname) ORDER BY k.i),
           coalesce(string_agg(format('d.%I = %L::%s', d.attname, mp.key_const[k.i], format_type(d.atttypid, -1)), ' AND ' ORDER BY k.i)
                    FILTER (WHERE mp.key_const[k.i] IS NOT NULL), 'true')
               || migrate._reverse_share(f.id, in_direction),
           bool_and(mp.key_origin[k.i] = 0 OR o.atttypid = d.atttypid OR (o.atttypid IN (20, 21, 23) AND d.atttypid IN (20, 21, 23))
                    OR (o.atttypid IN (25, 1043) AND d.atttypid IN (25, 1043)))
    INTO q.origin_key, q.dest_key, q.dest_share, q.same_text
    FROM unnest(mp.key_dest) WITH ORDINALITY AS k(attnum, i)
    JOIN pg_attribute d ON d.attrelid = mp.dest AND d.attnum = k.attnum
    LEFT JOIN pg_attribute o ON o.attrelid = mp.origin AND o.attnum = mp.key_origin[k.i];
    IF by IS NOT NULL THEN  -- without the key's constants
        q.actual := format('%s AND %s', q.actual, q.dest_share);
    END IF;
    -- After cutover the old table may keep rows that the new one has not, and has those that the filter leaves out.
    IF in_direction = 'forward' OR f.on_target_delete = 'delete' THEN
        q.extra := format('%s AND %s', q.actual, q.dest_share);
    END IF;
    RETURN q;
END $$;

-- Keys of a table, read as its owner: `wanted` at random, and `wanted_recent` written in the last `xids` transactions. Each comes
-- with a last element that tells why it was picked: random or recent.
CREATE FUNCTION migrate._shadow_pick(relation regclass, key text[], share text, wanted integer, wanted_recent integer, xids bigint) RETURNS SETOF text[]
LANGUAGE plpgsql AS $$
DECLARE
    block_size integer := current_setting('block_size')::integer;
    pages bigint;
    leaf regclass;
    leaf_pages bigint;
BEGIN
    SELECT sum(pg_relation_size(c.oid)) / block_size, (array_agg(c.oid ORDER BY random()) FILTER (WHERE pg_relation_size(c.oid) > 0))[1]
    INTO pages, leaf
    FROM migrate._partition_tree(relation) t(relid) JOIN pg_class c ON c.oid = t.relid AND c.relkind = 'r';
    IF leaf IS NULL OR wanted + wanted_recent <= 0 THEN
        RETURN;
    END IF;
    leaf_pages := pg_relation_size(leaf) / block_size;
    -- WITH sampled (a page for each key, at least twenty: a sample of few pages is often empty), newest (the last two pages of one partition)
    -- SELECT key of sampled at random UNION ALL SELECT key of both where the row was written lately
    RETURN QUERY SELECT r FROM migrate._as(migrate._table_owner(relation), format(
        $q$WITH sampled AS MATERIALIZED (SELECT ARRAY[%1$s] AS key, age(d.xmin) AS age FROM %2$s d TABLESAMPLE SYSTEM (%3$s) WHERE %4$s),
           newest AS (SELECT ARRAY[%1$s] AS key, age(d.xmin) AS age FROM ONLY %5$s d WHERE %4$s AND d.ctid = ANY (ARRAY(
               SELECT format('(%%s,%%s)', p, o)::tid FROM generate_series(%6$s, %7$s) p, generate_series(1, %8$s) o))),
           picked AS (
               (SELECT key || 'random'::text AS key FROM sampled ORDER BY random() LIMIT %9$s) UNION ALL
               (SELECT key || 'recent'::text FROM (SELECT * FROM sampled UNION SELECT * FROM newest) x
                WHERE age BETWEEN 0 AND %10$s ORDER BY random() LIMIT %11$s))
           SELECT %12$s FROM picked$q$,
        array_to_string(key, ', '), relation, least(100, round(100.0 * greatest(wanted, 20) / pages, 6)), share, leaf,
        greatest(leaf_pages - 2, 0), leaf_pages - 1, block_size / 28, wanted, xids, wanted_recent,
        (SELECT string_agg(format('key[%s]', i), ', ' ORDER BY i) FROM generate_series(1, cardinality(key) + 1) i))) AS r;
EXCEPTION WHEN data_exception THEN  -- a row that the flow's filter refuses must not stop the worker; the read of its key tells
    IF share = 'true' THEN
        RAISE;
    END IF;
    RETURN QUERY SELECT migrate._shadow_pick(relation, key, 'true', wanted, wanted_recent, xids);
END $$;

-- For reverse reads, the query by the mapping forward, by those columns of the target that a key of the source is read by there.
-- NULL in the other direction, and where the mapping forward does not give these columns.
CREATE FUNCTION migrate._shadow_again(f migrate._flow, in_direction text) RETURNS migrate._shadow_query
LANGUAGE sql STABLE AS $$
    SELECT migrate._shadow_query(f, 'forward', r.key_origin)
    FROM migrate._mapping r JOIN migrate._mapping p ON p.flow = r.flow AND p.direction = 'forward'
    WHERE in_direction = 'reverse' AND r.flow = f.id AND r.direction = 'reverse'
      AND r.key_origin <@ (p.columns || 0::int2) AND EXISTS (SELECT FROM unnest(r.key_origin) k WHERE k > 0)
$$;

-- What the two reads of one key say, by the migration's equality: NULL where they agree, else the kind and the columns of the difference.
CREATE FUNCTION migrate._shadow_compare(old_row text[], new_row text[], columns text[], types text[], role regrole, semantic boolean,
                                        OUT kind text, OUT differing text[])
LANGUAGE plpgsql AS $$
DECLARE
    same boolean;
BEGIN
    differing := '{}';
    IF old_row IS NULL OR new_row IS NULL THEN
        kind := CASE WHEN old_row IS NULL AND new_row IS NULL THEN NULL WHEN new_row IS NULL THEN 'missing' ELSE 'extra' END;
        RETURN;
    END IF;
    FOR i IN 1 .. cardinality(columns) LOOP
        IF old_row[i] IS DISTINCT FROM new_row[i] THEN
            same := false;
            IF semantic THEN
                BEGIN
                    same := (SELECT r[1]::boolean FROM migrate._as(role, format('SELECT $1::%1$s IS NOT DISTINCT FROM $2::%1$s', types[i]), old_row[i], new_row[i]) r);
                EXCEPTION WHEN OTHERS THEN
                    same := false;  -- the type has no equality
                END;
            END IF;
            IF NOT same THEN
                differing := differing || columns[i];
            END IF;
        END IF;
    END LOOP;
    kind := CASE WHEN differing <> '{}' THEN 'different' END;
END $$;

-- Reads one key from both sides, which one first by chance, for the second finds its pages in memory. kind: NULL where they agree.
-- After cutover, what cannot be mapped back exactly was right before, and still is: rows differ only if they do `again`, forward.
CREATE FUNCTION migrate._shadow_read(q migrate._shadow_query, again migrate._shadow_query, key text[], OUT kind text, OUT differing text[], OUT refusal text,
                                     OUT source_ms double precision, OUT target_ms double precision)
LANGUAGE plpgsql AS $$
DECLARE
    expected text[];
    actual text[];
    at timestamptz;
    expected_ms double precision := 0;
    actual_ms double precision := 0;
    actual_first boolean := random() < 0.5;
BEGIN
    FOR turn IN 1 .. 2 LOOP
        at := clock_timestamp();
        IF actual_first = (turn = 1) THEN
            SELECT r INTO actual FROM migrate._as(q.dest_owner, q.actual, VARIADIC key) AS r;
            actual_ms := extract(epoch FROM clock_timestamp() - at) * 1000;
        ELSE
            SELECT r INTO expected FROM migrate._as(q.dest_owner, q.expected, VARIADIC key) AS r;
            expected_ms := extract(epoch FROM clock_timestamp() - at) * 1000;
        END IF;
    END LOOP;
    SELECT c.kind, c.differing INTO kind, differing FROM migrate._shadow_compare(expected, actual, q.columns, q.types, q.dest_owner, q.semantic) c;
    source_ms := CASE q.direction WHEN 'forward' THEN expected_ms ELSE actual_ms END;
    target_ms := CASE q.direction WHEN 'forward' THEN actual_ms ELSE expected_ms END;
    IF kind = 'extra' AND (q.extra IS NULL OR NOT EXISTS (SELECT FROM migrate._as(q.dest_owner, q.extra, VARIADIC key))) THEN
        kind := NULL;
    ELSIF kind = 'different' AND again.actual IS NOT NULL THEN
        SELECT r INTO actual FROM migrate._as(again.dest_owner, again.actual, VARIADIC key) AS r;
        SELECT r INTO expected FROM migrate._as(again.dest_owner, again.expected, VARIADIC key) AS r;
        IF actual IS NOT NULL AND (migrate._shadow_compare(expected, actual, again.columns, again.types, again.dest_owner, again.semantic)).kind IS NULL THEN
            kind := NULL;
        END IF;
    END IF;
EXCEPTION
    WHEN query_canceled THEN
        RAISE;
    WHEN OTHERS THEN  -- the mapping, or the type of a key, refuses this row
        kind := 'error';
        differing := '{}';
        refusal := SQLSTATE;
END $$;

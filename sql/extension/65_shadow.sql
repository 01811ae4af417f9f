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

-- The run that a step of this flow belongs to, begun where there is none or where it is of an earlier stay in the phase.
CREATE FUNCTION migrate._shadow_run(m migrate._migration, f migrate._flow, in_direction text) RETURNS migrate._shadow
LANGUAGE plpgsql AS $$
DECLARE
    s migrate._shadow;
BEGIN
    DELETE FROM migrate._shadow x WHERE x.flow = f.id AND x.direction = in_direction
        AND (x.refused OR x.since < migrate._shadow_begin(m));
    IF FOUND THEN
        DELETE FROM migrate._shadow_mismatch x WHERE x.flow = f.id AND x.direction = in_direction;
    END IF;
    INSERT INTO migrate._shadow (flow, direction, last_xid) VALUES (f.id, in_direction, pg_snapshot_xmin(pg_current_snapshot())::text::bigint) ON CONFLICT DO NOTHING;
    SELECT * INTO s FROM migrate._shadow x WHERE x.flow = f.id AND x.direction = in_direction;
    RETURN s;
END $$;

-- Since when shadow reads count: the last time the migration came into phase shadowing or was cut over.
CREATE FUNCTION migrate._shadow_begin(m migrate._migration) RETURNS timestamptz
LANGUAGE sql STABLE AS $$
    SELECT coalesce(max(e.at), '-infinity') FROM migrate._event e
    WHERE e.migration = m.id AND e.to_phase = CASE m.phase WHEN 'cut_over' THEN 'cut_over' ELSE 'shadowing' END
$$;

-- One flow's share of a step: so many keys as are due by now, in at most 200 ms.
CREATE FUNCTION migrate._shadow_flow(m migrate._migration, f migrate._flow, in_direction text) RETURNS migrate._shadow
LANGUAGE plpgsql AS $$
DECLARE
    s migrate._shadow := migrate._shadow_run(m, f, in_direction);
    q migrate._shadow_query := migrate._shadow_query(f, in_direction);
    again migrate._shadow_query := migrate._shadow_again(f, in_direction);
    began timestamptz := clock_timestamp();
    shadow_ms numeric := greatest(migrate._opt_ms(m.id, 'shadow_time'), 1);
    xids bigint := pg_snapshot_xmax(pg_current_snapshot())::text::bigint - s.last_xid;
    due integer;
    most numeric := migrate._opt(m.id, 'max_shadow_mismatch_rate')::numeric;
    was_good boolean := s.mismatches <= most * s.reads;
    picked record;
    result record;
BEGIN
    IF m.phase <> 'shadowing' AND s.active_ms >= shadow_ms AND was_good THEN
        UPDATE migrate._shadow x SET since = DEFAULT, active_ms = 0, earlier_reads = x.earlier_reads + x.reads, picked = 0, reads = 0, recent_reads = 0,
            mismatches = 0, source_ms = 0, source_max_ms = 0, target_ms = 0, target_max_ms = 0
        WHERE x.flow = s.flow AND x.direction = s.direction RETURNING * INTO s;
    END IF;
    s.active_ms := s.active_ms + least(extract(epoch FROM began - s.stepped_at)::numeric * 1000, 5000);
    s.stepped_at := began;
    s.last_xid := pg_snapshot_xmin(pg_current_snapshot())::text::bigint;
    s.planned := ceil(migrate._opt(m.id, 'shadow_rate')::numeric * migrate._shadow_rows(f, in_direction));
    -- After shadow_time it goes on at the same pace for as long as shadow_rate is set.
    due := least(200, ceil(s.planned * s.active_ms / shadow_ms) - s.picked);
    IF due > 0 AND q.actual IS NOT NULL THEN
        FOR picked IN
            SELECT p.key[:cardinality(p.key) - 1] AS key, p.key[cardinality(p.key)] = 'recent' AS recent
            FROM (SELECT k FROM migrate._shadow_pick(q.origin, q.origin_key, 'true', (due + 1) / 2, (due + 7) / 8, xids) AS k
                  UNION ALL
                  SELECT k FROM migrate._shadow_pick(q.dest, q.dest_key, q.dest_share, CASE WHEN q.same_text THEN (due + 3) / 4 ELSE 0 END,
                                                     CASE WHEN q.same_text THEN (due + 7) / 8 ELSE 0 END, xids) AS k) AS p(key)
        LOOP
            EXIT WHEN clock_timestamp() > began + interval '200 ms';
            s.picked := s.picked + 1;
            CONTINUE WHEN migrate._shadow_is_known(f, in_direction, picked.key);
            result := migrate._shadow_read(q, again, picked.key);
            -- @point shadow: key read
            s.reads := s.reads + 1;
            s.recent_reads := s.recent_reads + picked.recent::integer;
            s.source_ms := s.source_ms + coalesce(result.source_ms, 0);
            s.target_ms := s.target_ms + coalesce(result.target_ms, 0);
            s.source_max_ms := greatest(s.source_max_ms, result.source_ms);
            s.target_max_ms := greatest(s.target_max_ms, result.target_ms);
            IF result.kind IS NOT NULL THEN
                s.mismatches := s.mismatches + 1;
                INSERT INTO migrate._shadow_mismatch (flow, direction, key, kind, columns, sqlstate)
                SELECT f.id, in_direction, picked.key, result.kind, result.differing, result.refusal
                WHERE s.mismatches <= 1000 AND NOT EXISTS
                    (SELECT FROM migrate._shadow_mismatch x WHERE x.flow = f.id AND x.direction = in_direction AND x.key = picked.key);
            END IF;
        END LOOP;
    END IF;
    UPDATE migrate._shadow x SET stepped_at = s.stepped_at, active_ms = s.active_ms, last_xid = s.last_xid, planned = s.planned, picked = s.picked,
        reads = s.reads, recent_reads = s.recent_reads, mismatches = s.mismatches, source_ms = s.source_ms, source_max_ms = s.source_max_ms,
        target_ms = s.target_ms, target_max_ms = s.target_max_ms
    WHERE x.flow = s.flow AND x.direction = s.direction;
    -- @point shadow: figures written
    IF m.phase <> 'shadowing' AND was_good AND s.mismatches > most * s.reads THEN
        PERFORM migrate._event(m, NULL, 'shadow', format('%s of %s keys differ in flow %s', s.mismatches, s.reads, f.name));
    END IF;
    RETURN s;
END $$;

-- Rows of a flow, for shadow_rate to be a share of: what the backfill has copied, or the planner's estimate where it is more.
CREATE FUNCTION migrate._shadow_rows(f migrate._flow, in_direction text) RETURNS bigint
LANGUAGE sql STABLE AS $$
    SELECT greatest((SELECT coalesce(sum(r.rows_done), 0) FROM migrate._range r WHERE r.flow = f.id),
                    (SELECT coalesce(sum(c.reltuples) FILTER (WHERE c.reltuples > 0), 0)
                     FROM migrate._partition_tree(CASE in_direction WHEN 'forward' THEN f.source ELSE f.target END) t(relid) JOIN pg_class c ON c.oid = t.relid AND c.relkind = 'r'), 1)::bigint
$$;

-- Keys in _failure or _requeue differ by what is known already.
CREATE FUNCTION migrate._shadow_is_known(f migrate._flow, in_direction text, key text[]) RETURNS boolean
LANGUAGE sql STABLE AS $$
    WITH own AS (SELECT array_agg(key[i] ORDER BY i) AS key FROM migrate._mapping p, generate_subscripts(p.key_dest, 1) i
                 WHERE p.flow = f.id AND p.direction = in_direction AND p.key_origin[i] > 0)
    SELECT EXISTS (SELECT FROM migrate._failure x, own WHERE x.flow = f.id AND x.direction = in_direction AND x.key = own.key)
        OR EXISTS (SELECT FROM migrate._requeue x, own WHERE in_direction = 'forward' AND x.flow = f.id AND x.key = own.key)
$$;

-- One step, in a REPEATABLE READ transaction of its own: both sides of every comparison are read in one snapshot.
-- 'more'; in phase shadowing also 'done' after shadow_time, or 'mismatch: …' as soon as too many keys differ.
CREATE FUNCTION migrate._shadow_step(migration_id integer) RETURNS text
LANGUAGE plpgsql AS $$
DECLARE
    m migrate._migration;
    f migrate._flow;
    s migrate._shadow;
    in_direction text;
    most numeric := migrate._opt(migration_id, 'max_shadow_mismatch_rate')::numeric;
    all_done boolean := true;
    verdict text;
BEGIN
    SELECT * INTO m FROM migrate._migration x WHERE x.id = migration_id;
    in_direction := CASE m.phase WHEN 'cut_over' THEN 'reverse' ELSE 'forward' END;
    FOR f IN SELECT * FROM migrate._flow x WHERE x.migration = migration_id ORDER BY x.id LOOP
        s := migrate._shadow_flow(m, f, in_direction);
        -- Time is not enough where a worker had no time to read; but where there is nothing to read, it is. A pause does not count.
        all_done := all_done AND s.active_ms >= migrate._opt_ms(m.id, 'shadow_time')
            AND (s.picked >= least(s.planned, 1000) OR s.active_ms >= 2 * migrate._opt_ms(m.id, 'shadow_time') + 1000
                 OR NOT EXISTS (SELECT FROM migrate._partition_tree(f.source) t(relid) WHERE pg_relation_size(t.relid) > 0));
        IF m.phase = 'shadowing' AND s.mismatches > most * greatest(s.planned, s.reads) THEN
            UPDATE migrate._shadow x SET refused = true WHERE x.flow = s.flow AND x.direction = s.direction;
            verdict := coalesce(verdict || '; ', 'mismatch: ') || format('%s of %s keys differ in flow %s, rate %s > %s (max_shadow_mismatch_rate)',
                s.mismatches, s.reads, f.name, migrate._shadow_rate(s), most);
        END IF;
    END LOOP;
    RETURN CASE WHEN verdict IS NOT NULL THEN verdict WHEN m.phase = 'shadowing' AND all_done THEN 'done' ELSE 'more' END;
END $$;

CREATE FUNCTION migrate._shadow_rate(s migrate._shadow) RETURNS numeric
LANGUAGE sql IMMUTABLE AS $$ SELECT trim_scale(round(s.mismatches::numeric / greatest(s.reads, 1), 6)) $$;

-- NULL when shadow reads are no reason against a cutover, else the reason with value and limit.
CREATE FUNCTION migrate._shadow_gate(m_id integer) RETURNS text
LANGUAGE plpgsql STABLE AS $$
DECLARE
    m migrate._migration;
    rate numeric := migrate._opt(m_id, 'shadow_rate')::numeric;
    most numeric := migrate._opt(m_id, 'max_shadow_mismatch_rate')::numeric;
BEGIN
    SELECT * INTO m FROM migrate._migration x WHERE x.id = m_id;
    RETURN (
        SELECT string_agg(CASE WHEN coalesce(s.earlier_reads + s.reads, 0) = 0 THEN format('no shadow read of flow %s yet (shadow_rate %s)', f.name, rate)
                               ELSE format('shadow reads: %s of %s keys differ in flow %s, rate %s > %s (max_shadow_mismatch_rate)',
                                           s.mismatches, s.reads, f.name, migrate._shadow_rate(s), most) END, '; ' ORDER BY f.id)
        FROM migrate._flow f LEFT JOIN migrate._shadow s ON s.flow = f.id AND s.direction = 'forward' AND s.since >= migrate._shadow_begin(m)
        WHERE f.migration = m_id
          AND ((s.reads > 0 AND s.mismatches > most * s.reads)
               OR (rate > 0 AND coalesce(s.earlier_reads + s.reads, 0) = 0 AND EXISTS (SELECT FROM migrate._partition_tree(f.source) t(relid) WHERE pg_relation_size(t.relid) > 0))));
END $$;

CREATE FUNCTION migrate._shadow(caller regrole, name text, rate double precision) RETURNS text
LANGUAGE plpgsql AS $$
DECLARE
    change text := 'shadow_rate ' || migrate._set(caller, name, 'shadow_rate', rate::text);
    m migrate._migration := migrate._find(caller, name);
BEGIN
    IF rate > 0 THEN
        PERFORM migrate._launch(m);
    END IF;
    RETURN change;
END $$;

CREATE VIEW migrate.shadow_reads WITH (security_barrier) AS
    SELECT m.name AS migration, f.name AS flow, s.direction, s.since, s.planned, s.earlier_reads, s.reads, s.recent_reads, s.mismatches,
           round(s.mismatches::numeric / nullif(s.reads, 0), 6) AS mismatch_rate,
           round((s.source_ms / nullif(s.reads, 0))::numeric, 3) AS source_avg_ms, round(s.source_max_ms::numeric, 3) AS source_max_ms,
           round((s.target_ms / nullif(s.reads, 0))::numeric, 3) AS target_avg_ms, round(s.target_max_ms::numeric, 3) AS target_max_ms
    FROM migrate._shadow s JOIN migrate._flow f ON f.id = s.flow JOIN migrate._migration m ON m.id = f.migration
    WHERE pg_has_role(m.owner, 'MEMBER');
COMMENT ON VIEW migrate.shadow_reads IS
    'shadow reads of your migrations: keys read, how many differ, and the time a read by key takes on either side (planning included)';

CREATE VIEW migrate.shadow_mismatches WITH (security_barrier) AS
    SELECT m.name AS migration, f.name AS flow, x.direction, array_to_string(x.key, ', ', 'NULL') AS key, x.kind, x.columns, x.sqlstate, x.found_at
    FROM migrate._shadow_mismatch x JOIN migrate._flow f ON f.id = x.flow JOIN migrate._migration m ON m.id = f.migration
    WHERE pg_has_role(m.owner, 'MEMBER');
COMMENT ON VIEW migrate.shadow_mismatches IS 'keys that shadow reads found to differ, at most 1000 for each flow; repair() looks again at what validate() finds';

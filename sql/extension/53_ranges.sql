-- What the backfill has to do: the ranges of each flow, of keys or of places, which together cover its source without a gap.

-- The names of the columns of origin that make up a flow's key, and the condition "key > $1", $1 being a key as text[].
CREATE FUNCTION migrate._source_key(flow integer, OUT source regclass, OUT names text[], OUT above text)
LANGUAGE sql STABLE AS $$
    SELECT f.source, k.names, migrate._beyond(k.names, k.bounds, k.types, '>')
    FROM migrate._flow f,
         LATERAL (SELECT array_agg(quote_ident(x.origin_column) ORDER BY x.ordinal) AS names,
                         array_agg(format('($1::text[])[%s]::%s', x.ordinal, x.origin_type) ORDER BY x.ordinal) AS bounds,
                         array_agg(a.atttypid ORDER BY x.ordinal) AS types
                  FROM migrate._key(f.id, 'forward') x
                  JOIN pg_attribute a ON a.attrelid = f.source AND a.attname = x.origin_column) k
    WHERE f.id = flow
$$;

-- Divides each flow's key space into ranges, from a sample of the source, and sets the upper bound of the work: the highest
-- key there is now. Rows that come later are the business of the dual writes, which were on before this transaction.
CREATE FUNCTION migrate._make_ranges(m migrate._migration) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    f migrate._flow;
    estimated bigint := 0;
BEGIN
    FOR f IN SELECT * FROM migrate._flow x WHERE x.migration = m.id ORDER BY x.id LOOP
        IF migrate._has_gap(f) THEN
            PERFORM migrate._fail_gap(m, f.name);
            RETURN;
        END IF;
        estimated := estimated + migrate._make_flow_ranges(f.id, migrate._pieces(m.id));
    END LOOP;
    INSERT INTO migrate._pace (migration, worker, rows_estimated) VALUES (m.id, 0, estimated)
    ON CONFLICT (migration, worker) DO UPDATE SET rows_estimated = excluded.rows_estimated;
    -- @point ranges: ledger written
    PERFORM migrate._move(m, NULL, 'backfilling', format('%s, about %s rows',
        (SELECT count(*) || CASE count(*) WHEN 1 THEN ' range' ELSE ' ranges' END FROM migrate._range r JOIN migrate._flow x ON x.id = r.flow WHERE x.migration = m.id), estimated));
    -- @point ranges: phase moved
END $$;

-- Returns the estimated number of rows.
CREATE FUNCTION migrate._make_flow_ranges(flow integer, pieces integer) RETURNS bigint
LANGUAGE plpgsql AS $$
DECLARE
    k record;
BEGIN
    SELECT * INTO k FROM migrate._source_key(flow);
    DELETE FROM migrate._range r WHERE r.flow = _make_flow_ranges.flow;
    IF (SELECT f.by_place FROM migrate._flow f WHERE f.id = flow) THEN
        PERFORM migrate._make_place_ranges(flow, k.source, pieces);
    ELSE
        PERFORM migrate._make_key_ranges(flow, k.source, k.names, pieces);
    END IF;
    RETURN migrate._rows_to_copy(flow, k.source, k.names);
END $$;

-- By blocks. What comes behind the last one was written under dual writes. The file first: if another one takes its place between the
-- two looks, the first batch notices that.
CREATE FUNCTION migrate._make_place_ranges(flow integer, source regclass, pieces integer) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    blocks bigint;
BEGIN
    UPDATE migrate._flow f SET copied_file = pg_relation_filenode(_make_place_ranges.source) WHERE f.id = flow;
    blocks := pg_relation_size(source) / current_setting('block_size')::bigint;
    pieces := least(pieces, greatest(blocks, 1));
    INSERT INTO migrate._range (flow, ordinal, low, high, done)
    SELECT flow, i, CASE WHEN i > 1 THEN ARRAY[format('(%s,0)', blocks * (i - 1) / pieces)] END, ARRAY[format('(%s,0)', blocks * i / pieces)], blocks = 0
    FROM generate_series(1, pieces) i;
END $$;

-- The source has another file than its ranges are of: they are made anew, once no other worker is at one of them. (It is not waited
-- for: it may be here too.) Returns how long to wait, in ms.
CREATE FUNCTION migrate._begin_anew(m migrate._migration, f migrate._flow) RETURNS integer
LANGUAGE plpgsql AS $$
DECLARE
    free integer := (SELECT count(*) FROM (SELECT FROM migrate._range r WHERE r.flow = f.id FOR UPDATE SKIP LOCKED) x);
BEGIN
    IF free < (SELECT count(*) FROM migrate._range r WHERE r.flow = f.id) THEN
        RETURN 20 + random() * 100;
    END IF;
    PERFORM migrate._make_flow_ranges(f.id, migrate._pieces(m.id));
    PERFORM migrate._event(m, NULL, 'copied anew', format('flow "%s" from its beginning: %s', f.name, CASE WHEN f.copied_file IS NULL THEN 'its rows may have moved unseen'
        ELSE format('%s was written anew (by VACUUM FULL, CLUSTER, TRUNCATE or ALTER TABLE)', f.source) END));
    RETURN 0;
END $$;

CREATE FUNCTION migrate._pieces(m_id integer) RETURNS integer
LANGUAGE sql STABLE AS $$ SELECT CASE o.workers WHEN 1 THEN 1 ELSE o.workers * 4 END FROM (SELECT migrate._opt(m_id, 'workers')::integer AS workers) o $$;

CREATE FUNCTION migrate._make_key_ranges(flow integer, source regclass, names text[], pieces integer) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    owner regrole := migrate._table_owner(source);
    columns text := array_to_string(names, ', ');
    descending text := array_to_string(names, ' DESC, ') || ' DESC';
    highest text[];
    bound text[];
    low text[];
BEGIN
    SELECT r INTO highest FROM migrate._as(owner, format('SELECT %s FROM %s ORDER BY %s LIMIT 1', columns, source, descending)) AS r;
    IF highest IS NULL THEN
        INSERT INTO migrate._range (flow, ordinal, done) VALUES (flow, 1, true);
        RETURN;
    END IF;
    FOR bound IN SELECT r FROM migrate._as(owner,
            format('SELECT %1$s FROM (SELECT DISTINCT ON (piece) piece, %1$s FROM (SELECT %1$s, ntile($1::integer) OVER (ORDER BY %1$s) AS piece FROM %2$s) s'
                   ' ORDER BY piece, %3$s) b WHERE piece < $1::integer ORDER BY piece', columns, migrate._sample(source), descending), pieces::text) AS r
            WHERE pieces > 1 LOOP
        CONTINUE WHEN bound = low OR bound = highest;
        INSERT INTO migrate._range (flow, ordinal, low, high)
        VALUES (flow, 1 + (SELECT count(*) FROM migrate._range r WHERE r.flow = _make_key_ranges.flow), low, bound);
        low := bound;
    END LOOP;
    INSERT INTO migrate._range (flow, ordinal, low, high)
    VALUES (flow, 1 + (SELECT count(*) FROM migrate._range r WHERE r.flow = _make_key_ranges.flow), low, highest);
END $$;

-- Estimated from the sample.
CREATE FUNCTION migrate._rows_to_copy(flow integer, source regclass, names text[]) RETURNS bigint
LANGUAGE plpgsql AS $$
DECLARE
    sample text := migrate._sample(source);
    sampled bigint;
BEGIN
    SELECT r[1]::bigint INTO sampled FROM migrate._as(migrate._table_owner(source), format('SELECT count(*) FROM %s', sample)) AS r;
    RETURN (sampled / migrate._sample_share(source))::bigint * migrate._filter_share(flow, array_to_string(names, ', '), sample);
END $$;

CREATE FUNCTION migrate._sample(relation regclass) RETURNS text
LANGUAGE sql VOLATILE AS $$ SELECT format('%s TABLESAMPLE SYSTEM (%s) REPEATABLE (0)', relation, migrate._sample_share(relation) * 100) $$;

-- The share of a table's pages that makes a sample of about 1000.
CREATE FUNCTION migrate._sample_share(relation regclass) RETURNS numeric
LANGUAGE sql VOLATILE AS $$
    SELECT least(1, 1000 * current_setting('block_size')::numeric / greatest(sum(pg_relation_size(p.relid)), 1))
    FROM migrate._partition_tree(relation) p(relid)
$$;

-- The share of the sampled rows that the mapping's filter lets through; 1 where that cannot be told.
CREATE FUNCTION migrate._filter_share(flow integer, columns text, sample text) RETURNS numeric
LANGUAGE plpgsql AS $$
DECLARE
    v record;
    share numeric;
BEGIN
    SELECT x.view, migrate._table_owner(x.dest) AS owner,
           (SELECT string_agg(quote_ident(k.view_column), ', ' ORDER BY k.ordinal) FROM migrate._key(x.flow, 'forward') k) AS key
    INTO v FROM migrate._mapping x WHERE x.flow = _filter_share.flow AND x.direction = 'forward' AND x.filtered;
    IF NOT FOUND THEN
        RETURN 1;
    END IF;
    SELECT r[1]::numeric / nullif(r[2]::numeric, 0) INTO share FROM migrate._as(v.owner,
        format('WITH s AS MATERIALIZED (SELECT %s FROM %s LIMIT 1000) SELECT (SELECT count(*) FROM %s WHERE (%s) IN (SELECT * FROM s)), (SELECT count(*) FROM s)',
               columns, sample, v.view, v.key)) AS r;
    RETURN coalesce(share, 1);
EXCEPTION WHEN OTHERS THEN
    RETURN 1;
END $$;

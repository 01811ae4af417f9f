-- What the backfill has to do: the key ranges of each flow, which together cover its source without a gap.

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
    workers integer := migrate._opt(m.id, 'workers')::integer;
    estimated bigint := 0;
BEGIN
    FOR f IN SELECT * FROM migrate._flow x WHERE x.migration = m.id ORDER BY x.id LOOP
        IF f.fingerprint IS DISTINCT FROM migrate._fingerprint(f.id) THEN
            PERFORM migrate._fail_gap(m, f.name);
            RETURN;
        END IF;
        estimated := estimated + migrate._make_flow_ranges(f.id, CASE workers WHEN 1 THEN 1 ELSE workers * 4 END);
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
    owner regrole;
    columns text;
    descending text;
    sample text;
    share numeric;
    highest text[];
    bound text[];
    low text[];
    rows bigint;
BEGIN
    SELECT * INTO k FROM migrate._source_key(flow);
    owner := migrate._table_owner(k.source);
    columns := array_to_string(k.names, ', ');
    descending := array_to_string(k.names, ' DESC, ') || ' DESC';
    SELECT r INTO highest FROM migrate._as(owner, format('SELECT %s FROM %s ORDER BY %s LIMIT 1', columns, k.source, descending)) AS r;
    DELETE FROM migrate._range r WHERE r.flow = _make_flow_ranges.flow;
    IF highest IS NULL THEN
        INSERT INTO migrate._range (flow, ordinal, done) VALUES (flow, 1, true);
        RETURN 0;
    END IF;
    share := migrate._sample_share(k.source);
    sample := format('%s TABLESAMPLE SYSTEM (%s) REPEATABLE (0)', k.source, share * 100);
    SELECT r[1]::numeric / share INTO rows FROM migrate._as(owner, format('SELECT count(*) FROM %s', sample)) AS r;
    FOR bound IN SELECT r FROM migrate._as(owner,
            format('SELECT %1$s FROM (SELECT DISTINCT ON (piece) piece, %1$s FROM (SELECT %1$s, ntile($1::integer) OVER (ORDER BY %1$s) AS piece FROM %2$s) s'
                   ' ORDER BY piece, %3$s) b WHERE piece < $1::integer ORDER BY piece', columns, sample, descending), pieces::text) AS r
            WHERE pieces > 1 LOOP
        CONTINUE WHEN bound = low OR bound = highest;
        INSERT INTO migrate._range (flow, ordinal, low, high)
        VALUES (flow, 1 + (SELECT count(*) FROM migrate._range r WHERE r.flow = _make_flow_ranges.flow), low, bound);
        low := bound;
    END LOOP;
    INSERT INTO migrate._range (flow, ordinal, low, high)
    VALUES (flow, 1 + (SELECT count(*) FROM migrate._range r WHERE r.flow = _make_flow_ranges.flow), low, highest);
    RETURN rows * migrate._filter_share(flow, columns, sample);
END $$;

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

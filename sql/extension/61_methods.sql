-- How a comparison (61_comparison.sql) is made: range by range, whole, by sample; what it finds, and the verdict on it.

-- As _as, in the snapshot of the query that calls it: so that what two roles may read is compared in one snapshot.
CREATE FUNCTION migrate._as_of(role regrole, query text, VARIADIC params text[] DEFAULT '{}') RETURNS SETOF text[]
LANGUAGE C STABLE AS 'MODULE_PATHNAME', 'migrate_as';

-- The query that finds the rows that differ; `which` says where to look. Its first row is 'rows' with the numbers of rows on both
-- sides and the snapshot, each other one kind, flow, key, differing columns, and what `told` says of the actual side's row.
-- keys_only: the mapping fails for a row there; then a row that is on both sides counts as different.
CREATE FUNCTION migrate._find_sql(c migrate._comparison, which text[], keys_only boolean, told text) RETURNS text
LANGUAGE sql STABLE AS $$
    SELECT format(
        'WITH s AS MATERIALIZED (SELECT %6$s FROM (%1$s) x), t AS MATERIALIZED (SELECT %7$s FROM (%2$s) x) '
        'SELECT ''rows'', (SELECT count(*) FROM s)::text, (SELECT count(*) FROM t)::text, pg_catalog.pg_current_snapshot()::text, NULL::text '
        'UNION ALL SELECT CASE WHEN t.flow IS NULL THEN ''missing'' WHEN s.flow IS NULL THEN ''extra'' ELSE ''different'' END, '
        'coalesce(s.flow, t.flow)::text, (%3$s)::text, CASE WHEN s.flow IS NOT NULL AND t.flow IS NOT NULL THEN (%4$s)::text END, (%9$s)::text '
        'FROM s FULL JOIN t ON %5$s WHERE s.flow IS NULL OR t.flow IS NULL OR NOT (%8$s)',
        migrate._expected(c, which), migrate._actual(c, which), c.key,
        CASE WHEN keys_only THEN 'NULL' ELSE c.differing END, c."on",
        CASE WHEN keys_only THEN 'flow, ' || c.key_order || (SELECT string_agg(', o' || i, '' ORDER BY i) FROM generate_series(1, c.width) i) ELSE '*' END,
        CASE WHEN keys_only THEN 'flow, ' || c.key_order ELSE '*' END,
        CASE WHEN keys_only THEN 'false' ELSE c.same END,
        coalesce(told, 'NULL'))
$$;

-- The query that finds those of the keys in its parameters whose rows are the same on both sides.
CREATE FUNCTION migrate._same_sql(c migrate._comparison) RETURNS text
LANGUAGE sql STABLE AS $$
    SELECT format('WITH s AS MATERIALIZED (%s), t AS MATERIALIZED (%s) SELECT (%s)::text FROM s JOIN t ON %s WHERE %s',
        migrate._expected(c, '{among}'), migrate._actual(c, '{among}'), c.key, c."on", c.same)
$$;

-- Finds the rows that differ, in one snapshot, and records them.
-- After cutover, what cannot be mapped back exactly (a NULL that the target has a default for) was right before, and still is:
-- a source row differs only if the mapping forward does not make its target row of it either. (A row of which that cannot be told
-- differs: only what is found to be the same is let off.) The mapping forward is asked by its own key, which may have other columns than
-- that of the mapping in reverse, or another order.
CREATE FUNCTION migrate._compare_rows(m migrate._migration, c migrate._comparison, run bigint, which text[], params text[], keys_only boolean,
                                      OUT expected_rows bigint, OUT actual_rows bigint, OUT findings bigint, OUT snapshot text)
LANGUAGE plpgsql AS $$
DECLARE
    forward migrate._comparison;
    forward_key text;
BEGIN
    IF c.direction = 'reverse' AND NOT keys_only THEN
        forward := migrate._comparison(m, 'forward', c.flows);
        forward_key := (SELECT format('ARRAY[%s]', string_agg(format('t.f%s::text', i), ', ' ORDER BY i)) FROM generate_series(1, forward.width) i);
    END IF;
    WITH answer AS MATERIALIZED (SELECT r FROM migrate._as_of(c.role, migrate._find_sql(c, which, keys_only, forward_key), VARIADIC params) r),
    doubtful AS MATERIALIZED (
        SELECT ARRAY(SELECT coalesce((SELECT array_agg((r[5]::text[])[i]) FROM answer WHERE r[1] = 'different'), '{}')::text
                     FROM generate_series(1, forward.width) i ORDER BY i) AS keys
        WHERE forward_key IS NOT NULL AND EXISTS (SELECT FROM answer WHERE r[1] = 'different')),
    good AS MATERIALIZED (  -- forward
        SELECT f[1] AS key FROM doubtful, migrate._as_of(forward.role, migrate._same_sql(forward), VARIADIC doubtful.keys) f),
    finding AS MATERIALIZED (
        SELECT r[2]::int AS flow, r[3]::text[] AS key, r[1] AS kind, r[4]::text[] AS columns FROM answer
        WHERE r[1] <> 'rows' AND NOT (c.ignore_extra AND r[1] = 'extra')
          AND (r[1] <> 'different' OR NOT EXISTS (SELECT FROM good WHERE good.key = r[5]))),
    recorded AS (
        INSERT INTO migrate._mismatch (run, flow, key, kind, columns)
        SELECT _compare_rows.run, x.flow, x.key, x.kind, x.columns FROM finding x RETURNING 1),
    replaced AS (  -- what was known of the same keys
        DELETE FROM migrate._mismatch x USING finding y WHERE x.flow = y.flow AND x.key = y.key AND x.run <> _compare_rows.run)
    SELECT r[2]::bigint, r[3]::bigint, (SELECT count(*) FROM recorded), r[4] INTO expected_rows, actual_rows, findings, snapshot
    FROM answer WHERE r[1] = 'rows';
END $$;

-- The end of the range that begins after `low`: a key that leaves about `rows` rows in it on the fuller side; NULL: the range is the last.
-- Any key would do for exactness: a range is compared in a later statement.
CREATE FUNCTION migrate._next_bound(c migrate._comparison, low text[], rows integer) RETURNS text[]
LANGUAGE plpgsql AS $$
DECLARE
    high text[];
    nearer text[];
BEGIN
    SELECT r INTO high FROM migrate._as(c.role, format('SELECT %s FROM (%s) x ORDER BY %s OFFSET %s LIMIT 2', c.key_text,
        migrate._expected(c, migrate._which(low, NULL), true, format(' LIMIT %s', rows + 1)), c.key_order, rows - 1),
        VARIADIC migrate._bounds(c, low, NULL)) WITH ORDINALITY x(r, n) ORDER BY n DESC LIMIT 1 OFFSET 1;
    high := CASE WHEN array_position(high, NULL) IS NULL THEN high END;  -- (a key that the actual side's type cannot hold)
    IF c.walkable THEN
        SELECT r INTO nearer FROM migrate._as(c.role, format('SELECT %s FROM (%s OFFSET %s LIMIT 2) x ORDER BY %s', c.key_text,
            migrate._actual(c, migrate._which(low, high), true), rows - 1, c.key_order),
            VARIADIC migrate._bounds(c, low, high)) WITH ORDINALITY x(r, n) ORDER BY n DESC LIMIT 1 OFFSET 1;
    END IF;
    RETURN coalesce(nearer, high);
END $$;

-- Compares one range and writes it into the ledger. Where the mapping fails for a row, the range is halved down to that row.
CREATE FUNCTION migrate._validate_range(m migrate._migration, c migrate._comparison, run_id bigint, method text, low text[], high text[]) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    digests record;
    rows record;
    which text[] := migrate._which(low, high);
    params text[] := migrate._bounds(c, low, high);
    findings bigint := 0;
    held bigint;
    middle text[];
    snapshot text;
BEGIN
    SELECT NULL::bigint AS expected_rows, NULL::bigint AS actual_rows, NULL::text AS expected_md5, NULL::text AS actual_md5, NULL::text AS snapshot INTO digests;
    rows := digests;
    FOR attempt IN 1 .. 3 LOOP
        IF method = 'ranges' THEN
            SELECT * INTO digests FROM migrate._compare_digests(c, low, high);
            rows := digests;
            EXIT WHEN digests.expected_rows = digests.actual_rows AND digests.expected_md5 = digests.actual_md5;
        END IF;
        SELECT * INTO rows FROM migrate._compare_rows(m, c, run_id, which, params, false);
        findings := rows.findings;
        -- Without a row that differs, the digests must have differed for what a later snapshot has no more: then look again.
        EXIT WHEN findings > 0 OR method = 'rows' OR NOT c.digestible OR c.ignore_extra;
        IF attempt = 3 THEN
            PERFORM migrate._raise('XX001', format('range (%s, %s] of flow "%s" differs, but no row in it', low, high, c.label),
                format('%s rows with MD5 %s are expected, %s rows with MD5 %s are there.', digests.expected_rows, digests.expected_md5, digests.actual_rows, digests.actual_md5),
                'The key may not be unique on one side: check its index with amcheck.');
        END IF;
    END LOOP;
    PERFORM migrate._write_range(c, run_id, low, high, rows.expected_rows, rows.actual_rows, findings, digests.expected_md5, digests.actual_md5, rows.snapshot);
EXCEPTION WHEN data_exception OR integrity_constraint_violation OR raise_exception THEN
    SELECT r[1]::bigint INTO held FROM migrate._as(c.role, format('SELECT count(*) FROM (%s) x WHERE num_nulls(%s) = 0', migrate._expected(c, which), c.key_order), VARIADIC params) r;
    IF held > 1 THEN
        SELECT r INTO middle FROM migrate._as(c.role, format('SELECT %1$s FROM (%2$s) x WHERE num_nulls(%3$s) = 0 ORDER BY %3$s OFFSET %4$s LIMIT 1', c.key_text,
            migrate._expected(c, which, true), c.key_order, held / 2 - 1), VARIADIC params) r;
    END IF;
    IF middle IS NULL OR middle = high THEN
        SELECT * INTO rows FROM migrate._compare_rows(m, c, run_id, which, params, true);
        PERFORM migrate._write_range(c, run_id, low, high, rows.expected_rows, rows.actual_rows, rows.findings, NULL, NULL, rows.snapshot);
    ELSE
        PERFORM migrate._validate_range(m, c, run_id, method, low, middle);
        PERFORM migrate._validate_range(m, c, run_id, method, middle, high);
    END IF;
END $$;

CREATE FUNCTION migrate._write_range(c migrate._comparison, run_id bigint, low text[], high text[], expected_rows bigint, actual_rows bigint,
                                     found bigint, expected_md5 text, actual_md5 text, snapshot text) RETURNS void
LANGUAGE sql AS $$
    -- Before cutover the source is expected, after it the target.
    INSERT INTO migrate._validation_range
    SELECT run_id, c.flow, 1 + (SELECT count(*) FROM migrate._validation_range WHERE run = run_id AND flow = c.flow), low, high,
           CASE WHEN f THEN expected_rows ELSE actual_rows END, CASE WHEN f THEN actual_rows ELSE expected_rows END, found,
           CASE WHEN f THEN expected_md5 ELSE actual_md5 END, CASE WHEN f THEN actual_md5 ELSE expected_md5 END
    FROM (SELECT c.direction = 'forward') x(f);
    UPDATE migrate._validation SET first_snapshot = coalesce(first_snapshot, snapshot), last_snapshot = snapshot WHERE run = run_id AND flow = c.flow
$$;

-- A new run: a row for each comparison. Ledgers of earlier runs go, but for one that the worker is still writing.
CREATE FUNCTION migrate._validation_begin(m migrate._migration, method text, range_rows integer, for_worker boolean) RETURNS bigint
LANGUAGE plpgsql AS $$
DECLARE
    run_id bigint := nextval('migrate._validation_run');
BEGIN
    DELETE FROM migrate._validation_range r USING migrate._validation v WHERE v.migration = m.id AND r.run = v.run AND r.flow = v.flow
        AND NOT (v.phase_since IS NOT DISTINCT FROM m.phase_since AND NOT for_worker AND m.phase = 'validating'
                 AND EXISTS (SELECT FROM migrate._validation o WHERE o.run = v.run AND o.verdict IS NULL));
    INSERT INTO migrate._validation (run, migration, flow, flows, label, direction, method, range_rows, phase_since)
    SELECT run_id, m.id, c.flow, c.flows, c.label, c.direction, method, range_rows, CASE WHEN for_worker THEN m.phase_since END
    FROM migrate._comparisons(m) c;
    RETURN run_id;
END $$;

-- The next range of one comparison of a run by ranges; true when it was the last.
CREATE FUNCTION migrate._validate_next(m migrate._migration, c migrate._comparison, run_id bigint, method text, range_rows integer) RETURNS boolean
LANGUAGE plpgsql AS $$
DECLARE
    began timestamptz := clock_timestamp();
    last migrate._validation_range;
    high text[];
    done boolean := false;
BEGIN
    SELECT * INTO last FROM migrate._validation_range r WHERE r.run = run_id AND r.flow = c.flow ORDER BY ordinal DESC LIMIT 1;
    -- @point validate: range begun
    IF method = 'ranges' THEN
        SELECT a.done, a.high INTO done, high FROM migrate._validate_ahead(c, run_id, last.high, range_rows) a;
    END IF;
    IF NOT done THEN
        high := migrate._next_bound(c, last.high, range_rows);
        PERFORM migrate._validate_range(m, c, run_id, method, last.high, high);
    END IF;
    -- @point validate: range compared
    IF high IS NULL THEN
        -- A comparison with a bound is never true of NULL: rows without a key lie in no range that has one.
        IF c.nullable AND (SELECT count(*) > 1 FROM migrate._validation_range r WHERE r.run = run_id AND r.flow = c.flow) THEN
            UPDATE migrate._validation_range r SET mismatches = r.mismatches + n, source_rows = r.source_rows + CASE c.direction WHEN 'forward' THEN n ELSE 0 END,
                target_rows = r.target_rows + CASE c.direction WHEN 'forward' THEN 0 ELSE n END
            FROM migrate._note_unkeyed(c, run_id) n WHERE r.run = run_id AND r.flow = c.flow AND r.high IS NULL;
        END IF;
        -- @point validate: before the verdict
        PERFORM migrate._validation_end(c, run_id);
        -- @point validate: verdict given
    END IF;
    UPDATE migrate._validation SET seconds = seconds + extract(epoch FROM clock_timestamp() - began) WHERE run = run_id AND flow = c.flow;
    RETURN high IS NULL;
END $$;

-- Rows of the expected side whose key no row of the actual side can have are missing there. Gives how many are noted.
CREATE FUNCTION migrate._note_unkeyed(c migrate._comparison, run_id bigint, at_most bigint DEFAULT NULL) RETURNS bigint
LANGUAGE sql AS $$
    WITH unkeyed AS MATERIALIZED (
        SELECT r[1]::int AS flow, r[2]::text[] AS key FROM migrate._as(c.role, format('SELECT s.flow, %s FROM (%s) s LEFT JOIN (SELECT NULL::int AS flow, %s) t ON false LIMIT %s',
            c.key, migrate._expected(c, '{unkeyed}'), (SELECT string_agg('NULL::text AS k' || i, ', ') FROM generate_series(1, c.width) i), coalesce(at_most::text, 'ALL'))) r),
    recorded AS (INSERT INTO migrate._mismatch (run, flow, key, kind) SELECT run_id, u.flow, u.key, 'missing' FROM unkeyed u),
    replaced AS (DELETE FROM migrate._mismatch x USING unkeyed u WHERE x.flow = u.flow AND x.key = u.key AND x.run <> run_id)
    SELECT count(*) FROM unkeyed
$$;

-- The verdict on one comparison, from its ledger, which must cover the key space without a gap.
CREATE FUNCTION migrate._validation_end(c migrate._comparison, run_id bigint) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    total record;
    held record;
BEGIN
    SELECT count(*) AS ranges, bool_and(chained) AS chained, count(*) FILTER (WHERE high IS NULL) AS ends, sum(source_rows) AS source_rows, sum(target_rows) AS target_rows, sum(mismatches) AS mismatches,
           md5(string_agg(source_md5, ',' ORDER BY ordinal)) AS source_md5, md5(string_agg(target_md5, ',' ORDER BY ordinal)) AS target_md5
        INTO total
        FROM (SELECT *, low IS NOT DISTINCT FROM lag(high) OVER (ORDER BY ordinal) AS chained FROM migrate._validation_range WHERE run = run_id AND flow = c.flow) r;
    IF total.ranges = 0 OR NOT total.chained OR total.ends <> 1 THEN
        PERFORM migrate._raise('XX001', format('ranges of flow "%s" do not cover the key space', c.label), format('%s ranges, %s open ends.', total.ranges, total.ends));
    END IF;
    IF total.mismatches = 0 AND total.source_rows <> total.target_rows AND NOT c.ignore_extra THEN
        PERFORM migrate._raise('XX001', format('rows of flow "%s" do not add up', c.label), format('%s rows on the source, %s on the target, and no mismatch.', total.source_rows, total.target_rows));
    END IF;
    -- Where all statements share a snapshot, the rows checked must be all there are. (The worker's run is a transaction a range.)
    IF current_setting('transaction_isolation') IN ('repeatable read', 'serializable')
       AND EXISTS (SELECT FROM migrate._validation WHERE run = run_id AND flow = c.flow AND phase_since IS NULL) THEN
        SELECT * INTO held FROM migrate._compare_counts(c);
        IF held.expected_rows + held.actual_rows <> total.source_rows + total.target_rows THEN
            PERFORM migrate._raise('XX001', format('the ranges of flow "%s" hold %s rows', c.label, total.source_rows + total.target_rows),
                format('Both sides together have %s.', held.expected_rows + held.actual_rows));
        END IF;
    END IF;
    UPDATE migrate._validation SET source_rows = total.source_rows, target_rows = total.target_rows, ranges = total.ranges, mismatches = total.mismatches,
        source_checksum = total.source_md5, target_checksum = total.target_md5, verdict = CASE total.mismatches WHEN 0 THEN 'equal' ELSE 'mismatch' END
    WHERE run = run_id AND flow = c.flow;
    DELETE FROM migrate._mismatch x WHERE x.flow = ANY (c.flows) AND x.run < run_id;
END $$;

CREATE FUNCTION migrate._compare_counts(c migrate._comparison, OUT expected_rows bigint, OUT actual_rows bigint, OUT snapshot text)
LANGUAGE sql AS $$
    SELECT r[1]::bigint, r[2]::bigint, r[3] FROM migrate._as(c.role, format(
        'SELECT (SELECT count(*) FROM (%s) x), (SELECT count(*) FROM (%s) x), pg_catalog.pg_current_snapshot()', migrate._expected(c, '{}'), migrate._actual(c, '{}'))) r
$$;

-- The methods that take one statement. counts, sums and checksum say whether, not where: mismatches is NULL then.
-- Equal sums are as good as equal against chance, not against somebody who chooses the rows (src/row_sum.cpp): like a sample they
-- are a look at it, which no gate of cutover takes for a validation.
CREATE FUNCTION migrate._validate_whole(m migrate._migration, c migrate._comparison, run_id bigint, method text, sample_rows integer) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    began timestamptz := clock_timestamp();
    a record;
    picked text[];
    same boolean;
BEGIN
    IF method = 'counts' THEN
        SELECT expected_rows, actual_rows, snapshot, NULL::text AS expected_md5, NULL::text AS actual_md5, NULL::bigint AS findings INTO a FROM migrate._compare_counts(c);
        same := a.expected_rows = a.actual_rows OR c.ignore_extra AND a.expected_rows < a.actual_rows;
    ELSIF method IN ('checksum', 'sums') THEN
        IF method = 'checksum' THEN
            SELECT *, NULL::bigint AS findings INTO a FROM migrate._compare_digests(c, NULL, NULL);
        ELSE
            SELECT *, NULL::bigint AS findings INTO a FROM migrate._compare_sums(c);
        END IF;
        same := a.expected_rows = a.actual_rows AND a.expected_md5 = a.actual_md5;
        IF same THEN
            a.findings := 0;
        ELSIF NOT c.digestible OR c.ignore_extra THEN
            PERFORM migrate._raise('0A000', format('the digests of flow "%s" differ, which does not say that its rows do', c.label),
                'Digests compare images. With option equality = semantic, after cutover, and where flows map different columns of one target, rows must be compared one by one.',
                format('SELECT * FROM migrate.validate(%L, ''ranges'');', m.name));
        END IF;
    ELSE
        picked := migrate._sample(c, sample_rows);
        SELECT *, NULL::text AS expected_md5, NULL::text AS actual_md5 INTO a FROM migrate._compare_rows(m, c, run_id, '{among}', picked, false);
        a.findings := a.findings + migrate._note_unkeyed(c, run_id, sample_rows);
        same := a.findings = 0;
    END IF;
    UPDATE migrate._validation SET
        source_rows = CASE direction WHEN 'forward' THEN a.expected_rows ELSE a.actual_rows END, target_rows = CASE direction WHEN 'forward' THEN a.actual_rows ELSE a.expected_rows END,
        source_checksum = CASE direction WHEN 'forward' THEN a.expected_md5 ELSE a.actual_md5 END, target_checksum = CASE direction WHEN 'forward' THEN a.actual_md5 ELSE a.expected_md5 END,
        mismatches = a.findings, first_snapshot = a.snapshot, last_snapshot = a.snapshot, verdict = CASE WHEN same THEN 'equal' ELSE 'mismatch' END,
        seconds = extract(epoch FROM clock_timestamp() - began)
    WHERE run = run_id AND flow = c.flow;
END $$;

-- Up to `rows` random keys of each side: parameters for "among", an array for each key column.
CREATE FUNCTION migrate._sample(c migrate._comparison, rows integer) RETURNS text[]
LANGUAGE sql AS $$
    WITH picked AS MATERIALIZED (
        SELECT r FROM migrate._as(c.role, format(
            '(SELECT %1$s FROM (SELECT %2$s FROM (%3$s) x ORDER BY pg_catalog.random() LIMIT %5$s) e) UNION (SELECT %1$s FROM (SELECT %2$s FROM (%4$s) x ORDER BY pg_catalog.random() LIMIT %5$s) a)',
            c.key_text, c.key_order, migrate._expected(c, '{}'), migrate._actual(c, '{}'), rows)) r)
    SELECT array_agg(list ORDER BY i)
    FROM (SELECT i, coalesce((SELECT array_agg(r[i]) FROM picked), '{}')::text AS list FROM generate_series(1, c.width) i) x
$$;

-- Digests of both sides of a comparison (61_comparison.sql), each by one statement, so in one snapshot.

-- Ordered MD5 of both sides of a range.
CREATE FUNCTION migrate._compare_digests(c migrate._comparison, low text[], high text[], OUT expected_rows bigint, OUT expected_md5 text,
                                         OUT actual_rows bigint, OUT actual_md5 text, OUT snapshot text)
LANGUAGE sql AS $$
    SELECT r[1]::bigint, r[2], r[3]::bigint, r[4], r[5] FROM migrate._as(c.role, format(
        'SELECT e.n, e.md5, a.n, a.md5, pg_catalog.pg_current_snapshot() FROM (SELECT count(*) AS n, coalesce(%1$s, pg_catalog.md5('''')) AS md5 FROM (%2$s) x) e, '
        '(SELECT count(*) AS n, coalesce(%1$s, pg_catalog.md5('''')) AS md5 FROM (%3$s) x) a',
        c.digest, migrate._expected(c, migrate._which(low, high), true), migrate._actual(c, migrate._which(low, high), true)),
        VARIADIC migrate._bounds(c, low, high)) r
$$;

-- Sums of all rows of both sides, in whatever order they come: PostgreSQL reads large tables with parallel workers then.
CREATE FUNCTION migrate._compare_sums(c migrate._comparison, OUT expected_rows bigint, OUT expected_md5 text,
                                      OUT actual_rows bigint, OUT actual_md5 text, OUT snapshot text)
LANGUAGE sql AS $$
    SELECT r[1]::bigint, r[2], r[3]::bigint, r[4], r[5] FROM migrate._as(c.role, format(
        'SELECT e.n, e.sum, a.n, a.sum, pg_catalog.pg_current_snapshot() FROM (SELECT count(*) AS n, %1$s AS sum FROM (%2$s) x) e, (SELECT count(*) AS n, %1$s AS sum FROM (%3$s) x) a',
        c.row_sum, migrate._expected(c, '{}'), migrate._actual(c, '{}'))) r
$$;

-- The next range after `low` and the digests of both sides, by one scan of each: `rows` rows of the expected side (more, if those
-- after them have the same key), and those of the actual side up to the last of their keys; `high` is NULL where the expected side
-- has no more, and the actual side is read to its end. Of the actual side no more are read than `enough`: then the range is no good.
CREATE FUNCTION migrate._scan_range(c migrate._comparison, low text[], rows integer, enough bigint, OUT high text[], OUT expected_rows bigint,
                                    OUT expected_md5 text, OUT actual_rows bigint, OUT actual_md5 text, OUT snapshot text)
LANGUAGE sql AS $$
    SELECT CASE WHEN r[1]::bigint >= rows THEN r[6:] END, r[1]::bigint, r[2], r[3]::bigint, r[4], r[5] FROM migrate._as(c.role, format(
        'SELECT e.n, e.md5, a.n, a.md5, pg_catalog.pg_current_snapshot(), %5$s '
        'FROM (SELECT count(*) AS n, coalesce(%1$s, pg_catalog.md5('''')) AS md5, %6$s FROM (%2$s) x) e CROSS JOIN LATERAL (SELECT count(*) AS n, coalesce(%1$s, pg_catalog.md5('''')) AS md5 FROM ('
        '(SELECT * FROM (%3$s) u WHERE e.n >= %7$s LIMIT %8$s) UNION ALL (SELECT * FROM (%4$s) w WHERE e.n < %7$s LIMIT %8$s)) x) a',
        c.digest, migrate._expected(c, migrate._which(low, NULL), true, format(' FETCH FIRST %s ROWS WITH TIES', rows)),
        migrate._actual(c, migrate._which(low, NULL) || '{upto_last}'::text[], true), migrate._actual(c, migrate._which(low, NULL), true),
        (SELECT string_agg(format('e.k%s::text AS b%1$s', i), ', ' ORDER BY i) FROM generate_series(1, c.width) i),
        (SELECT string_agg(format('migrate._last(k%s) AS k%1$s', i), ', ' ORDER BY i) FROM generate_series(1, c.width) i),
        rows, enough + 1), VARIADIC migrate._bounds(c, low, NULL)) r
$$;

-- The next range, where one scan of each side finds its end and its digests, and they are equal: then it is in the
-- ledger, and `done`. Else nothing has happened, and the range is to be had by _next_bound and _validate_range.
-- Only where the last key of the expected side is, as text, a bound for both sides.
-- (Not to be planned as a sort of all that follows, which for a key in random order may look cheaper.)
CREATE FUNCTION migrate._validate_ahead(c migrate._comparison, run_id bigint, low text[], range_rows integer, OUT done boolean, OUT high text[])
LANGUAGE plpgsql SET enable_seqscan = off SET enable_sort = off SET enable_bitmapscan = off AS $$
DECLARE
    d record;
BEGIN
    done := false;
    IF NOT c.walkable OR c.nullable OR cardinality(c.expected) > 1 THEN
        RETURN;
    END IF;
    SELECT * INTO d FROM migrate._scan_range(c, low, range_rows, 2 * range_rows::bigint);
    IF d.expected_rows = d.actual_rows AND d.expected_md5 = d.actual_md5 AND d.actual_rows <= 2 * range_rows::bigint THEN
        high := d.high;
        done := true;
        IF d.expected_rows = 0 AND low IS NOT NULL THEN  -- nothing follows: the range before it was the last
            UPDATE migrate._validation_range r SET high = NULL WHERE r.run = run_id AND r.flow = c.flow AND r.high = _validate_ahead.low;
            UPDATE migrate._validation SET last_snapshot = d.snapshot WHERE run = run_id AND flow = c.flow;
            RETURN;
        END IF;
        PERFORM migrate._write_range(c, run_id, low, high, d.expected_rows, d.actual_rows, 0, d.expected_md5, d.actual_md5, d.snapshot);
    END IF;
EXCEPTION WHEN data_exception OR integrity_constraint_violation OR raise_exception THEN  -- the mapping fails for a row
    done := false;
    high := NULL;
END $$;

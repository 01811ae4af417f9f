-- The SQL that reads one side of a comparison: all of it, a range, or single keys.

-- In reverse only those source rows are fed that the flow had carried over: its filter, seen from the source.
CREATE FUNCTION migrate._reverse_share(flow integer, way text) RETURNS text
LANGUAGE sql STABLE AS $$
    SELECT coalesce((
        SELECT format(' AND EXISTS (SELECT FROM %s v WHERE %s)', f.view, string_agg(format('v.%I %s d.%I', v.attname, migrate._operator(d.atttypid, 3), d.attname), ' AND ' ORDER BY i))
        FROM migrate._mapping r
        JOIN migrate._mapping f ON f.flow = r.flow AND f.direction = 'forward' AND f.filtered
        CROSS JOIN LATERAL generate_subscripts(r.key_dest, 1) i
        JOIN pg_attribute d ON d.attrelid = r.dest AND d.attnum = r.key_dest[i]
        JOIN pg_attribute v ON v.attrelid = f.view AND v.attnum = array_position(f.columns, r.key_origin[i])
        WHERE way = 'reverse' AND r.flow = _reverse_share.flow AND r.direction = 'reverse' AND r.key_const[i] IS NULL
        GROUP BY f.view), '')
$$;

-- The condition that a key is one of those in the parameters' arrays. (A subquery, so that these are parsed once; k, not *, is
-- one value of a composite type.)
CREATE FUNCTION migrate._among(names text[], sets text[], types oid[]) RETURNS text
LANGUAGE sql STABLE AS $$
    SELECT format(CASE cardinality(names) WHEN 1 THEN '%s %s ANY (SELECT k FROM unnest(%s) k)' ELSE '(%s) %s ANY (SELECT * FROM unnest(%s))' END,
        array_to_string(names, ', '), CASE WHEN count(DISTINCT migrate._operator(t, 3)) = 1 THEN min(migrate._operator(t, 3)) ELSE '=' END, array_to_string(sets, ', '))
    FROM unnest(types) t
$$;

-- The rows of one side. `which` is a list of conditions: above, upto (or, of the actual side, upto_last), among, unkeyed. Ordered by key where `ordered`; `window` is a
-- LIMIT clause for each flow's share of it.
CREATE FUNCTION migrate._expected(c migrate._comparison, which text[], ordered boolean DEFAULT false, "window" text DEFAULT '') RETURNS text
LANGUAGE sql IMMUTABLE AS $$
    SELECT CASE WHEN count(*) = 1 THEN min(q) ELSE format('SELECT * FROM (%s) u%s', string_agg(format('(%s)', q), ' UNION ALL ' ORDER BY i),
                CASE WHEN ordered THEN ' ORDER BY ' || c.key_order ELSE '' END) END
    FROM (SELECT i, format('%s WHERE true%s%s%s%s%s%s', c.expected[i],
            CASE WHEN 'above' = ANY (which) THEN ' AND ' || c.expected_above[i] ELSE '' END,
            CASE WHEN 'upto' = ANY (which) THEN ' AND ' || c.expected_upto[i] ELSE '' END,
            CASE WHEN 'among' = ANY (which) THEN ' AND ' || c.expected_among[i] ELSE '' END,
            CASE WHEN 'unkeyed' = ANY (which) THEN ' AND (' || c.expected_null[i] || ')' ELSE '' END,
            CASE WHEN ordered THEN ' ORDER BY ' || c.expected_order[i] ELSE '' END, "window") AS q
          FROM generate_subscripts(c.expected, 1) i) branch
$$;

CREATE FUNCTION migrate._actual(c migrate._comparison, which text[], ordered boolean DEFAULT false) RETURNS text
LANGUAGE sql IMMUTABLE AS $$
    SELECT format('%s WHERE %s%s%s%s%s', c.actual, c.actual_share,
            CASE WHEN 'above' = ANY (which) THEN ' AND ' || c.actual_above ELSE '' END,
            CASE WHEN 'upto' = ANY (which) THEN ' AND ' || c.actual_upto WHEN 'upto_last' = ANY (which) THEN ' AND ' || c.actual_upto_last ELSE '' END,
            CASE WHEN 'among' = ANY (which) THEN ' AND ' || c.actual_among ELSE '' END,
            CASE WHEN ordered THEN ' ORDER BY ' || c.actual_order ELSE '' END)
$$;

-- Parameters for a range: NULLs where it is open, as the SQL then does not mention them.
CREATE FUNCTION migrate._bounds(c migrate._comparison, low text[], high text[]) RETURNS text[]
LANGUAGE sql IMMUTABLE AS $$
    SELECT coalesce(low, array_fill(NULL::text, ARRAY[c.width])) || coalesce(high, array_fill(NULL::text, ARRAY[c.width]))
$$;

CREATE FUNCTION migrate._which(low text[], high text[]) RETURNS text[]
LANGUAGE sql IMMUTABLE AS $$
    SELECT CASE WHEN low IS NULL THEN '{}' ELSE '{above}'::text[] END || CASE WHEN high IS NULL THEN '{}' ELSE '{upto}'::text[] END
$$;

-- Validation: is every row of the side that follows what the mapping makes of the side that serves? It shares no code with the
-- copying (src/flow.cpp): it has its own SQL, and its own image of a value (src/image.cpp).
-- "Expected" is the mapping view, "actual" the table it feeds. Both sides of a comparison are read by one statement, so in one
-- snapshot: dual writes commit with what they follow, and a difference is real under any load.

CREATE SEQUENCE migrate._validation_run;

CREATE TABLE migrate._validation (
    run        bigint NOT NULL,
    migration  integer NOT NULL,  -- (a foreign key would keep its row locked while validate() runs, and pause() waiting)
    flow       integer NOT NULL REFERENCES migrate._flow ON DELETE CASCADE,
    flows      integer[] NOT NULL,
    label      text NOT NULL,
    direction  text NOT NULL,
    method     text NOT NULL,
    range_rows integer NOT NULL,
    phase_since timestamptz,
    started_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    seconds    numeric NOT NULL DEFAULT 0,
    source_rows bigint,
    target_rows bigint,
    ranges     bigint,
    mismatches bigint,
    source_checksum text,
    target_checksum text,
    first_snapshot text,
    last_snapshot text,
    verdict    text CHECK (verdict IN ('equal', 'mismatch')),
    PRIMARY KEY (run, flow));
COMMENT ON TABLE migrate._validation IS 'one row for each run of a validation and each flow (flows that feed one share of a target are compared together)';
COMMENT ON COLUMN migrate._validation.phase_since IS 'a run of the worker''s belongs to one stay in phase validating; NULL: a run of validate()';
COMMENT ON COLUMN migrate._validation.verdict IS 'NULL: not at its end yet';

CREATE TABLE migrate._validation_range (
    run         bigint NOT NULL,
    flow        integer NOT NULL,
    ordinal     bigint NOT NULL,
    low         text[],
    high        text[],
    source_rows bigint NOT NULL,
    target_rows bigint NOT NULL,
    mismatches  bigint NOT NULL,
    source_md5  text,
    target_md5  text,
    PRIMARY KEY (run, flow, ordinal),
    FOREIGN KEY (run, flow) REFERENCES migrate._validation ON DELETE CASCADE
);
COMMENT ON TABLE migrate._validation_range IS 'the ledger of the latest run: key ranges (low, high] that together cover the key space; keys are in the form of the table that is fed';

CREATE TABLE migrate._mismatch (
    run      bigint NOT NULL,
    flow     integer NOT NULL REFERENCES migrate._flow ON DELETE CASCADE,
    key      text[] NOT NULL,
    kind     text NOT NULL CHECK (kind IN ('missing', 'extra', 'different')),
    columns  text[],
    found_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE INDEX ON migrate._mismatch (flow);
ALTER TABLE migrate._mismatch REPLICA IDENTITY FULL;  -- as of _requeue
COMMENT ON TABLE migrate._mismatch IS 'keys that the latest validation found to differ; never the values';
COMMENT ON COLUMN migrate._mismatch.columns IS 'the columns that differ; NULL where the mapping fails for the row';

-- How one comparison is written in SQL. Arrays have one element for each of `flows`.
CREATE TYPE migrate._comparison AS (
    flow integer, flows integer[], label text, direction text, role regrole,
    width integer,          -- key columns that vary
    walkable boolean,       -- a key of the actual side can be a bound for the expected side
    exact_keys boolean,     -- a key has one text on both sides
    digestible boolean,     -- equal sides have equal digests
    ignore_extra boolean,   -- rows that nothing yields may stay
    nullable boolean,       -- the key can be NULL on the expected side
    expected text[], expected_above text[], expected_upto text[], expected_among text[], expected_null text[], expected_order text[],
    actual text, actual_share text, actual_above text, actual_upto text, actual_among text, actual_order text,
    actual_upto_last text,  -- up to the last key of e, a scan of the expected side
    digest text,            -- the aggregate over all columns
    row_sum text,           -- the fast one
    same text,              -- s and t are the same
    differing text,         -- the columns in which they are not
    key text,               -- the key as text[], for _mismatch
    "on" text, key_order text, key_text text);

-- What is to be compared: in the direction of the dual writes, one comparison for each share of each table that is fed.
-- Flows with different constants in their keys have a share each; flows into the same share are compared together (UNION ALL),
-- so that a row which no flow yields is extra. In reverse each flow feeds columns of its own, and stands alone.
CREATE FUNCTION migrate._comparisons(m migrate._migration) RETURNS SETOF migrate._comparison
LANGUAGE plpgsql STABLE AS $$
DECLARE
    way text := CASE WHEN m.phase IN ('cut_over', 'finalized') THEN 'reverse' ELSE 'forward' END;
    f record;
BEGIN
    PERFORM migrate._require_whole(m), migrate._require_rights(m);
    SELECT w.name INTO f FROM migrate._flow w
    WHERE w.migration = m.id AND NOT EXISTS (SELECT FROM migrate._mapping x JOIN pg_class c ON c.oid = x.view WHERE x.flow = w.id AND x.direction = way);
    IF FOUND THEN
        PERFORM migrate._raise('55000', format('flow "%s" has no %s mapping to compare by', f.name, way),
            format('Migration "%s" is in phase %s.', m.name, m.phase));
    END IF;
    FOR f IN
        WITH one AS (
            SELECT x.*, array(SELECT c IS NULL FROM unnest(x.key_const) c) AS pattern
            FROM migrate._mapping x JOIN migrate._flow w ON w.id = x.flow WHERE w.migration = m.id AND x.direction = way),
        grouped AS (
            SELECT o.*, CASE WHEN way = 'reverse' THEN o.flow::text
                             WHEN (SELECT count(DISTINCT (n.pattern, n.key_dest)) FROM one n WHERE n.dest = o.dest) = 1 THEN o.key_const::text
                             ELSE '' END AS share FROM one o)
        SELECT array_agg(g.flow ORDER BY g.flow) AS flows, count(DISTINCT g.key_dest) AS keys, min(g.dest::text) AS dest
        FROM grouped g GROUP BY g.dest, g.share ORDER BY min(g.flow)
    LOOP
        IF f.keys > 1 THEN
            PERFORM migrate._raise('0A000', format('flows into %s have different keys', f.dest),
                'A row that no flow yields can be told only by one key.', 'Map the same key in all flows into one target.');
        END IF;
        RETURN NEXT migrate._comparison(m, way, f.flows);
    END LOOP;
    IF NOT FOUND THEN
        PERFORM migrate._raise('55000', format('migration "%s" has no flow', m.name));
    END IF;
END $$;

-- The SQL builder. Columns are called k1, k2 … (the key, in the actual side's type) and c1, c2 … (all mapped columns, too); in reverse,
-- the actual side's row has its key in the forward comparison as f1, f2 … as well.
-- Bounds are $1 … $width (low) and the next `width` parameters (high); "among" takes arrays in $1 … $width.
CREATE FUNCTION migrate._comparison(m migrate._migration, way text, flow_ids integer[]) RETURNS migrate._comparison
LANGUAGE plpgsql STABLE AS $$
DECLARE
    c migrate._comparison;
    x migrate._mapping;
    fed regclass;           -- the actual side
    fixed text[];           -- for each key column: the constant that all flows have in common
    mapped int2[];          -- the columns that any flow maps
    built record;
    list text[];            -- what is selected of the actual side
    key_case text := '';
    extra_flow text := '';  -- whose a row of the actual side is that no flow yields
BEGIN
    c.flow := flow_ids[1]; c.flows := flow_ids; c.direction := way;
    c.label := (SELECT string_agg(w.name, ', ' ORDER BY w.id) FROM migrate._flow w WHERE w.id = ANY (flow_ids));
    c.walkable := true; c.exact_keys := true; c.nullable := false;
    SELECT * INTO x FROM migrate._mapping p WHERE p.flow = c.flow AND p.direction = way;
    fed := x.dest;
    c.role := migrate._table_owner(fed);
    c.ignore_extra := way = 'reverse' AND (SELECT w.on_target_delete IS DISTINCT FROM 'delete' FROM migrate._flow w WHERE w.id = c.flow);
    fixed := ARRAY(SELECT CASE WHEN (SELECT count(DISTINCT p.key_const[i]) = 1 AND bool_and(p.key_const[i] IS NOT NULL)
                                     FROM migrate._mapping p WHERE p.flow = ANY (flow_ids) AND p.direction = way) THEN x.key_const[i] END
                   FROM generate_subscripts(x.key_dest, 1) i ORDER BY i);
    mapped := ARRAY(SELECT DISTINCT u FROM migrate._mapping p, unnest(p.columns) u WHERE p.flow = ANY (flow_ids) AND p.direction = way ORDER BY u);
    c.width := (SELECT count(*) FROM unnest(fixed) u WHERE u IS NULL);
    SELECT * INTO built FROM migrate._compare_actual_key(c, x, fixed);
    c := built.c; list := built.keys;
    FOR x IN SELECT p.* FROM migrate._mapping p WHERE p.flow = ANY (flow_ids) AND p.direction = way ORDER BY p.flow LOOP
        SELECT * INTO built FROM migrate._compare_expected(c, x, fixed, mapped);
        c := built.c;
        key_case := key_case || built.key;
        IF built.conditions <> '{}' THEN
            extra_flow := extra_flow || format(' WHEN %s THEN %s', array_to_string(built.conditions, ' AND '), x.flow);
        END IF;
    END LOOP;
    c.key := format('CASE coalesce(s.flow, t.flow)%s END', key_case);
    list := list || format('%s AS flow', CASE WHEN extra_flow = '' THEN c.flow::text ELSE format('CASE%s ELSE %s END', extra_flow, c.flow) END);
    SELECT * INTO built FROM migrate._compare_columns(c, fed, mapped, migrate._opt(m.id, 'equality') = 'semantic');
    c := built.c; list := list || built.columns;
    list := list || ARRAY(SELECT format('d.%I AS f%s', a.attname, row_number() OVER (ORDER BY i)) FROM migrate._mapping p CROSS JOIN generate_subscripts(p.key_dest, 1) i
                          JOIN pg_attribute a ON a.attrelid = p.origin AND a.attnum = p.key_origin[i]
                          WHERE way = 'reverse' AND p.flow = c.flow AND p.direction = 'forward' AND p.key_const[i] IS NULL ORDER BY i);
    c.actual := format('SELECT %s FROM %s d', array_to_string(list, ', '), fed);
    RETURN c;
END $$;

-- The key of the actual side, alone and as it is joined with the other's. keys: as they are selected.
CREATE FUNCTION migrate._compare_actual_key(INOUT c migrate._comparison, x migrate._mapping, fixed text[], OUT keys text[])
LANGUAGE plpgsql STABLE AS $$
DECLARE
    col record;
    n integer;
    part text;
    names text[] := '{}'; lows text[] := '{}'; highs text[] := '{}'; sets text[] := '{}'; types oid[] := '{}';
    list text[] := '{}'; texts text[] := '{}'; joins text[] := '{}';
BEGIN
    keys := '{}';
    FOR col IN
        SELECT i, a.attname, t.type, t.typmod, t.name AS type_name FROM generate_subscripts(x.key_dest, 1) i
        JOIN pg_attribute a ON a.attrelid = x.dest AND a.attnum = x.key_dest[i], migrate._plain_type(a.atttypid, a.atttypmod) t ORDER BY i
    LOOP
        part := format('d.%I', col.attname);
        IF fixed[col.i] IS NOT NULL THEN
            list := list || format('%s %s %L::%s', part, migrate._operator(col.type, 3), fixed[col.i], col.type_name);
            CONTINUE;
        END IF;
        n := cardinality(names) + 1;
        names := names || part;
        lows := lows || format('($%s)::%s', n, format_type(col.type, -1));
        highs := highs || format('($%s)::%s', c.width + n, format_type(col.type, -1));
        sets := sets || format('($%s)::%s[]', n, format_type(col.type, -1));
        types := types || col.type;
        keys := keys || format('%s AS k%s', CASE WHEN col.typmod IS NULL THEN part ELSE format('(%s)::%s', part, col.type_name) END, n);
        texts := texts || format('k%1$s::text AS b%1$s', n);  -- not called k: ORDER BY k1 must mean the key, not its text
        joins := joins || format('s.k%s %s t.k%s', n, migrate._operator(col.type, 3), n);
    END LOOP;
    c.actual_share := coalesce(nullif(array_to_string(list, ' AND '), ''), 'true') || migrate._reverse_share(c.flow, c.direction);
    c.actual_above := migrate._beyond(names, lows, types, '>');
    c.actual_upto := migrate._beyond(names, highs, types, '<=');
    c.actual_upto_last := migrate._beyond(names, ARRAY(SELECT 'e.k' || i FROM generate_series(1, c.width) i ORDER BY i), types, '<=');
    c.actual_among := migrate._among(names, sets, types);
    c.actual_order := array_to_string(names, ', ');
    c.key_order := (SELECT string_agg('k' || i, ', ' ORDER BY i) FROM generate_series(1, c.width) i);
    c.key_text := array_to_string(texts, ', ');
    c."on" := array_to_string(joins, ' AND ');
END $$;

-- What one flow yields. key: the branch of it that gives a row's key as text[]; conditions: by which a row of the actual side is this flow's.
CREATE FUNCTION migrate._compare_expected(INOUT c migrate._comparison, x migrate._mapping, fixed text[], mapped int2[], OUT key text, OUT conditions text[])
LANGUAGE plpgsql STABLE AS $$
DECLARE
    col record;
    rule record;
    n integer;
    value text;  -- of a key column, as the actual side's type has it
    names text[] := '{}'; lows text[] := '{}'; highs text[] := '{}'; sets text[] := '{}'; types oid[] := '{}';  -- the key as it is compared with bounds
    nulls text[] := '{}'; texts text[] := '{}';
    list text[] := ARRAY[format('%s AS flow', x.flow)];
BEGIN
    conditions := '{}';
    FOR col IN
        SELECT i, v.attname, d.attname AS dest_name, o.atttypid AS origin_type, o.atttypmod AS origin_typmod, t.type, t.typmod,
               t.name AS type_name, x.key_const[i] AS constant, coalesce(NOT s.attnotnull, false) AS nullable,
               (SELECT format(' COLLATE %I.%I', y.nspname, z.collname) FROM pg_collation z JOIN pg_namespace y ON y.oid = z.collnamespace WHERE z.oid = d.attcollation) AS collated
        FROM generate_subscripts(x.key_dest, 1) i
        JOIN pg_attribute d ON d.attrelid = x.dest AND d.attnum = x.key_dest[i]
        JOIN pg_attribute v ON v.attrelid = x.view AND v.attnum = x.key_view[i]
        LEFT JOIN pg_attribute s ON s.attrelid = x.origin AND s.attnum = nullif(x.key_origin[i], 0),
        migrate._plain_type(d.atttypid, d.atttypmod) t, migrate._plain_type(v.atttypid, v.atttypmod) AS o(atttypid, atttypmod, name)
        ORDER BY i
    LOOP
        IF col.constant IS NOT NULL THEN  -- whether a row of the actual side is this flow's
            conditions := conditions || format('d.%I %s %L::%s', col.dest_name, migrate._operator(col.type, 3), col.constant, col.type_name);
        END IF;
        CONTINUE WHEN fixed[col.i] IS NOT NULL;
        SELECT * INTO rule FROM migrate._key_rule(col.origin_type, col.origin_typmod, col.type, col.typmod, format('v.%I', col.attname));
        n := cardinality(names) + 1;
        c.walkable := c.walkable AND rule.walkable;
        c.exact_keys := c.exact_keys AND rule.exact;
        c.nullable := c.nullable OR col.nullable;
        names := names || rule.name;
        lows := lows || format(rule.bound, '$' || n);
        highs := highs || format(rule.bound, '$' || c.width + n);
        sets := sets || CASE WHEN rule.compared = col.type OR rule.walkable THEN format('($%s)::%s[]', n, format_type(rule.compared, -1))
                             ELSE format('($%s)::%s[]::%s[]', n, format_type(col.type, -1), format_type(rule.compared, -1)) END;
        types := types || rule.compared;
        value := migrate._narrowed(format('v.%I', col.attname), col.origin_type, col.type);
        nulls := nulls || format('%s IS NULL', value);
        list := list || format('%s%s AS k%s, (v.%I)::text AS o%s', migrate._assigned(value, col.type, col.typmod), coalesce(col.collated, ''), n, col.attname, n);
        IF col.constant IS NULL THEN
            texts := texts || format('CASE WHEN s.flow IS NULL THEN t.k%s::text ELSE s.o%s END', n, n);
        END IF;
    END LOOP;
    key := format(' WHEN %s THEN ARRAY[%s]::text[]', x.flow, array_to_string(texts, ', '));
    SELECT list || array_agg(format('%s%s AS c%s', migrate._assigned(CASE WHEN v.attnum = ANY (x.key_view) THEN migrate._narrowed(format('v.%I', v.attname), o.type, t.type)
               ELSE coalesce('v.' || quote_ident(v.attname), 'NULL') END, t.type, t.typmod), coalesce(
               (SELECT format(' COLLATE %I.%I', y.nspname, z.collname) FROM pg_collation z JOIN pg_namespace y ON y.oid = z.collnamespace WHERE z.oid = d.attcollation), ''), u.n) ORDER BY u.n)
        INTO list
        FROM unnest(mapped) WITH ORDINALITY u(attnum, n) JOIN pg_attribute d ON d.attrelid = x.dest AND d.attnum = u.attnum
        LEFT JOIN pg_attribute v ON v.attrelid = x.view AND v.attnum = array_position(x.columns, u.attnum)
        LEFT JOIN LATERAL migrate._plain_type(v.atttypid, v.atttypmod) o ON v.attnum IS NOT NULL,
        migrate._plain_type(d.atttypid, d.atttypmod) t;
    c.expected := c.expected || format('SELECT %s FROM %s v', array_to_string(list, ', '), x.view);
    c.expected_above := c.expected_above || migrate._beyond(names, lows, types, '>');
    c.expected_upto := c.expected_upto || migrate._beyond(names, highs, types, '<=');
    c.expected_among := c.expected_among || migrate._among(names, sets, types);
    c.expected_null := c.expected_null || array_to_string(nulls, ' OR ');
    c.expected_order := c.expected_order || (SELECT string_agg(format('v.%I', v.attname), ', ' ORDER BY i) FROM generate_subscripts(x.key_view, 1) i
                                             JOIN pg_attribute v ON v.attrelid = x.view AND v.attnum = x.key_view[i] WHERE fixed[i] IS NULL);
END $$;

-- Column by column. What a flow does not map is not compared for its rows; then digests would not be equal.
CREATE FUNCTION migrate._compare_columns(INOUT c migrate._comparison, fed regclass, mapped int2[], semantic boolean, OUT columns text[])
LANGUAGE plpgsql STABLE AS $$
DECLARE
    col record;
    part text;
    digests text[] := '{}'; sames text[] := '{}'; differs text[] := '{}';
BEGIN
    columns := '{}';
    c.digestible := NOT semantic AND c.direction = 'forward';
    FOR col IN
        SELECT u.n, d.attname, t.type, t.name AS type_name, d.atttypid <> t.type AS domain,
               ARRAY(SELECT p.flow FROM migrate._mapping p WHERE p.flow = ANY (c.flows) AND p.direction = c.direction AND u.attnum = ANY (p.columns)) AS mapped_by
        FROM unnest(mapped) WITH ORDINALITY u(attnum, n) JOIN pg_attribute d ON d.attrelid = fed AND d.attnum = u.attnum,
        migrate._plain_type(d.atttypid, d.atttypmod) t ORDER BY u.n
    LOOP
        columns := columns || format(CASE WHEN col.domain THEN '(d.%I)::%s AS c%s' ELSE 'd.%1$I AS c%3$s' END, col.attname, col.type_name, col.n);
        digests := digests || format('c%s', col.n);
        part := coalesce(CASE WHEN semantic AND migrate._operator(col.type, 3) IS NOT NULL THEN format('((s.c%1$s %2$s t.c%1$s) IS TRUE OR s.c%1$s IS NOT DISTINCT FROM NULL AND t.c%1$s IS NOT DISTINCT FROM NULL)',
                                                        col.n, migrate._operator(col.type, 3)) END,
                         format('migrate.same_image(s.c%1$s, t.c%1$s)', col.n));
        IF cardinality(col.mapped_by) < cardinality(c.flows) THEN
            c.digestible := false;
            part := format('(s.flow <> ALL (%L::int[]) OR %s)', col.mapped_by, part);
        END IF;
        sames := sames || part;
        differs := differs || format('CASE WHEN NOT %s THEN %L END', part, col.attname);
    END LOOP;
    c.digest := migrate._digest_call(digests);
    c.row_sum := migrate._digest_call(digests, 'row_sum');
    c.same := array_to_string(sames, ' AND ');
    c.differing := format('array_remove(ARRAY[%s]::text[], NULL)', array_to_string(differs, ', '));
END $$;

-- Repair: what validation found is shown as SQL that a DBA can read and run; told to execute, the primitive mends the keys and
-- validation looks at them again from scratch.

-- Key number r of a list of keys (2-D).
CREATE FUNCTION migrate._key_row(keys text[], r integer) RETURNS text[]
LANGUAGE sql IMMUTABLE AS $$ SELECT array_agg(keys[r][i] ORDER BY i) FROM generate_subscripts(keys, 2) i $$;

-- The statement that mends one mismatch.
CREATE FUNCTION migrate._repair_sql(x migrate._mismatch, way text) RETURNS text
LANGUAGE sql STABLE AS $$
    WITH p AS (SELECT * FROM migrate._mapping p WHERE p.flow = x.flow AND p.direction = way),
    k AS (  -- the whole key: its varying part from the mismatch, the constants from the mapping
        SELECT i, d.attname AS dest_name, v.attname AS view_name,
               coalesce(p.key_const[i], x.key[(SELECT count(*) FROM generate_series(1, i) j WHERE p.key_const[j] IS NULL)]) AS value, p.key_const[i] IS NULL AS varies,
               -- a literal finds its own type but where that is composite
               CASE (SELECT t.typtype FROM pg_type t WHERE t.oid = d.atttypid) WHEN 'c' THEN '::' || format_type(d.atttypid, -1) ELSE '' END AS cast_to,
               -- where another unique index holds more to be equal, it is not the one that is meant
               CASE WHEN d.attcollation <> 0 AND EXISTS (SELECT FROM pg_index x WHERE x.indrelid = d.attrelid AND x.indisunique AND NOT migrate._compares_as_columns(x.indexrelid))
                    THEN ' COLLATE ' || d.attcollation::regcollation ELSE '' END AS collated
        FROM p, generate_subscripts(p.key_dest, 1) i
        JOIN pg_attribute d ON d.attrelid = (SELECT dest FROM p) AND d.attnum = (SELECT key_dest FROM p)[i]
        JOIN pg_attribute v ON v.attrelid = (SELECT view FROM p) AND v.attnum = (SELECT key_view FROM p)[i]),
    c AS (
        SELECT n, d.attname AS dest_name, v.attname AS view_name, d.attidentity,
               -- (Of types whose equal values may be stored otherwise, such as 1.0 and 1.00, the key is written too.)
               u.attnum = ANY (p.key_dest) AND EXISTS (
                   SELECT FROM pg_index i JOIN pg_opclass o ON o.oid = i.indclass[array_position(p.key_dest, u.attnum) - 1]
                   JOIN pg_amproc e ON e.amprocfamily = o.opcfamily AND e.amproclefttype = o.opcintype AND e.amprocrighttype = o.opcintype AND e.amprocnum = 4
                   WHERE i.indexrelid = migrate._key_index(p.dest, p.key_dest) AND o.opcintype NOT IN ('interval'::regtype, 'bpchar'::regtype)) AS in_key
        FROM p, unnest(p.columns) WITH ORDINALITY u(attnum, n)
        JOIN pg_attribute d ON d.attrelid = (SELECT dest FROM p) AND d.attnum = u.attnum
        JOIN pg_attribute v ON v.attrelid = (SELECT view FROM p) AND v.attnum = n)
    SELECT CASE x.kind
        WHEN 'extra' THEN format('DELETE FROM %s WHERE %s;', p.dest,
            (SELECT string_agg(format('%I = %L%s', dest_name, value, cast_to), ' AND ' ORDER BY i) FROM k))
        ELSE format('INSERT INTO %s (%s)%s SELECT %s FROM %s WHERE %s ON CONFLICT (%s) DO %s;', p.dest,
            (SELECT string_agg(quote_ident(dest_name), ', ' ORDER BY n) FROM c),
            CASE WHEN EXISTS (SELECT FROM c WHERE attidentity = 'a') THEN ' OVERRIDING SYSTEM VALUE' ELSE '' END,
            (SELECT string_agg(quote_ident(view_name), ', ' ORDER BY n) FROM c), p.view,
            (SELECT string_agg(CASE WHEN value IS NULL THEN format('%I IS NULL', view_name) ELSE format('%I = %L%s', view_name, value, cast_to) END, ' AND ' ORDER BY i) FROM k WHERE varies),
            (SELECT string_agg(quote_ident(dest_name) || collated, ', ' ORDER BY i) FROM k),
            coalesce('UPDATE SET ' || (SELECT string_agg(format('%1$I = excluded.%1$I', dest_name), ', ' ORDER BY n) FROM c WHERE NOT in_key AND attidentity <> 'a'), 'NOTHING')) END
    FROM p
$$;

-- Raises: what was found before a switch is not mended the other way, where a row that is missing on one side is one too many on the other.
CREATE FUNCTION migrate._require_found_since_switch(m migrate._migration) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    switched timestamptz := greatest(m.cut_over_at, (SELECT max(e.at) FROM migrate._event e WHERE e.migration = m.id AND e.kind = 'phase' AND 'cut_over' IN (e.from_phase, e.to_phase) AND e.to_phase <> 'finalized'));
    old bigint := (SELECT count(*) FROM migrate._mismatch x JOIN migrate._flow f ON f.id = x.flow WHERE f.migration = m.id AND x.found_at < switched);
BEGIN
    IF old > 0 THEN
        PERFORM migrate._raise('55000', format('%s mismatches of migration "%s" were found before its latest switch', old, m.name),
            'Since then the other side is right where both differ.', format('SELECT * FROM migrate.validate(%L); looks for them anew.', m.name));
    END IF;
END $$;

-- migrate.repair(): the statements, one for each mismatch; with `execute`, instead of them what became of each.
CREATE FUNCTION migrate._repair(caller regrole, name text, execute boolean) RETURNS SETOF text
LANGUAGE plpgsql AS $$
DECLARE
    m migrate._migration;
    c migrate._comparison;
    way text;
    mends boolean := coalesce(execute, false);
BEGIN
    IF mends THEN
        m := migrate._lock(caller, name);
    ELSE
        m := migrate._find(caller, name);
        PERFORM migrate._require_members(caller, m);
    END IF;
    way := CASE WHEN m.phase IN ('cut_over', 'finalized') THEN 'reverse' ELSE 'forward' END;
    IF NOT EXISTS (SELECT FROM migrate._mismatch x JOIN migrate._flow f ON f.id = x.flow WHERE f.migration = m.id) THEN
        RAISE NOTICE 'migration "%" has no mismatch on record', m.name USING HINT = format('SELECT * FROM migrate.validate(%L); looks for them.', m.name);
        RETURN;
    END IF;
    PERFORM migrate._require_found_since_switch(m);
    IF NOT mends THEN
        RETURN QUERY SELECT migrate._repair_sql(x, way) FROM migrate._mismatch x JOIN migrate._flow f ON f.id = x.flow
            WHERE f.migration = m.id ORDER BY f.id, x.key COLLATE "C";
        RETURN;
    END IF;
    IF m.phase IN ('planned', 'finalized', 'cancelled') THEN
        PERFORM migrate._raise('55000', format('migration "%s" is %s', m.name, m.phase), 'Without dual writes a repaired row would not stay equal.');
    END IF;
    FOR c IN SELECT * FROM migrate._comparisons(m) LOOP
        RETURN QUERY SELECT * FROM migrate._repair_comparison(m, c);
    END LOOP;
    PERFORM migrate._shadow_anew(m);
    PERFORM migrate._event(m, caller, 'repaired', format('%s mismatches are left', (SELECT count(*) FROM migrate._mismatch x JOIN migrate._flow f ON f.id = x.flow WHERE f.migration = m.id)));
END $$;

-- Mends the mismatches of one comparison, in portions, and looks at every key again. Returns a line for each key that is not mended,
-- and one with the numbers.
CREATE FUNCTION migrate._repair_comparison(m migrate._migration, c migrate._comparison) RETURNS SETOF text
LANGUAGE plpgsql AS $$
DECLARE
    run_id bigint := nextval('migrate._validation_run');
    portion record;
    todo bigint;
    refused record;
BEGIN
    SELECT count(*) INTO todo FROM migrate._mismatch x WHERE x.flow = ANY (c.flows);
    FOR portion IN
        SELECT flow, array_agg(key) AS keys FROM (
            SELECT DISTINCT x.flow, x.key, (row_number() OVER (PARTITION BY x.flow ORDER BY x.key) - 1) / 1000 AS n
            FROM migrate._mismatch x WHERE x.flow = ANY (c.flows) AND array_position(x.key, NULL) IS NULL) p
        GROUP BY flow, n ORDER BY flow, n
    LOOP
        RETURN QUERY SELECT * FROM migrate._repair_keys(m, c, run_id, portion.flow, portion.keys);
    END LOOP;
    RETURN NEXT format('%s: %s of %s mismatches mended and verified', c.label,
        todo - (SELECT count(*) FROM migrate._mismatch x WHERE x.flow = ANY (c.flows)), todo);
END $$;

-- Applies the keys (2-D); a portion that fails is halved down to the key that does.
CREATE FUNCTION migrate._repair_keys(m migrate._migration, c migrate._comparison, run_id bigint, flow_id integer, keys text[]) RETURNS SETOF text
LANGUAGE plpgsql AS $$
DECLARE
    n integer := array_length(keys, 1);
    locked text[];
    one text[];
    state text;
    message text;
BEGIN
    BEGIN
        locked := migrate._apply_keys(flow_id, c.direction, keys);
    EXCEPTION WHEN data_exception OR integrity_constraint_violation OR raise_exception OR insufficient_privilege THEN
        GET STACKED DIAGNOSTICS state = RETURNED_SQLSTATE, message = MESSAGE_TEXT;
        IF n > 1 THEN
            RETURN QUERY SELECT * FROM migrate._repair_keys(m, c, run_id, flow_id, keys[1 : n / 2]);
            RETURN QUERY SELECT * FROM migrate._repair_keys(m, c, run_id, flow_id, keys[n / 2 + 1 : n]);
        ELSE
            RETURN NEXT format('%s: key %s is not mended: %s: %s; by hand: %s', c.label, migrate._key_text(migrate._key_row(keys, 1)), state, message,
                (SELECT migrate._repair_sql(x, c.direction) FROM migrate._mismatch x WHERE x.flow = flow_id AND x.key = migrate._key_row(keys, 1) LIMIT 1));
        END IF;
        RETURN;
    END;
    IF cardinality(locked) > 0 THEN
        FOREACH one SLICE 1 IN ARRAY locked LOOP
            RETURN NEXT format('%s: key %s is not mended: its row is locked by another transaction; call repair again', c.label, migrate._key_text(one));
        END LOOP;
    END IF;
    -- @point repair: keys applied
    PERFORM migrate._verify_keys(m, c, run_id, flow_id, keys);
    -- @point repair: keys verified
END $$;

-- Compares these keys (2-D) anew: what still differs stays on record as it is now, what is equal is struck off.
CREATE FUNCTION migrate._verify_keys(m migrate._migration, c migrate._comparison, run_id bigint, flow_id integer, keys text[]) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    params text[];
BEGIN
    IF NOT c.exact_keys THEN
        RAISE NOTICE 'the keys of flow "%" are rounded on their way: only a new validation can tell what is equal now', c.label;
        RETURN;
    END IF;
    -- The whole key varies with the flow where flows with and without constants share a target: then constants are put in.
    params := ARRAY(SELECT (SELECT array_agg(coalesce(p.key_const[i], keys[r][(SELECT count(*) FROM generate_series(1, i) j WHERE p.key_const[j] IS NULL)]) ORDER BY r)::text
                            FROM generate_subscripts(keys, 1) r)
                    FROM migrate._mapping p, generate_subscripts(p.key_dest, 1) i
                    WHERE p.flow = flow_id AND p.direction = c.direction AND migrate._varies(c, i) ORDER BY i);
    PERFORM migrate._compare_rows(m, c, run_id, '{among}', params, false);
    DELETE FROM migrate._mismatch x WHERE x.flow = ANY (c.flows) AND x.run <> run_id
        AND (x.flow = flow_id AND x.key = ANY (SELECT migrate._key_row(keys, r) FROM generate_subscripts(keys, 1) r));
END $$;

-- Whether key column i of the comparison is one that varies.
CREATE FUNCTION migrate._varies(c migrate._comparison, i integer) RETURNS boolean
LANGUAGE sql STABLE AS $$
    SELECT NOT (count(DISTINCT p.key_const[i]) = 1 AND bool_and(p.key_const[i] IS NOT NULL)) FROM migrate._mapping p WHERE p.flow = ANY (c.flows) AND p.direction = c.direction
$$;

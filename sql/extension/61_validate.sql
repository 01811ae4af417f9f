-- Validations: the verb, the phase, and what is known of a migration's equality. How each comparison is made: 61_methods.sql.

-- migrate.validate()
CREATE FUNCTION migrate._validate(caller regrole, name text, how text, range_rows integer DEFAULT 10000)
RETURNS TABLE (flow text, method text, source_rows bigint, target_rows bigint, ranges bigint, mismatches bigint, source_checksum text,
               target_checksum text, seconds numeric, snapshot text, verdict text)
LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    m migrate._migration := migrate._find(caller, $2);  -- no lock: a validation may take hours, pause() must not wait for it
    run_id bigint;
    c migrate._comparison;
BEGIN
    PERFORM migrate._require_members(caller, m);
    PERFORM migrate._lend_views(m);
    IF how IS NULL OR how NOT IN ('counts', 'sample', 'sums', 'checksum', 'ranges', 'rows') THEN
        PERFORM migrate._raise('22023', format('there is no method of validation "%s"', how), 'The methods are counts, sample, sums, checksum, ranges and rows.',
            format('SELECT * FROM migrate.validate(%L, ''ranges'');', m.name));
    END IF;
    IF m.phase IN ('finalized', 'cancelled') THEN
        PERFORM migrate._raise('55000', format('migration "%s" is %s', m.name, m.phase), 'Nothing keeps its two sides equal any more.');
    END IF;
    run_id := migrate._validation_begin(m, how, range_rows, false);
    FOR c IN SELECT * FROM migrate._comparisons(m) LOOP
        IF how IN ('ranges', 'rows') THEN
            LOOP
                EXIT WHEN migrate._validate_next(m, c, run_id, how, range_rows);
            END LOOP;
        ELSE
            PERFORM migrate._validate_whole(m, c, run_id, how, range_rows);
        END IF;
    END LOOP;
    PERFORM migrate._event(m, caller, 'validated', migrate._validation_text(run_id));
    RETURN QUERY SELECT v.label, v.method, v.source_rows, v.target_rows, v.ranges, v.mismatches, v.source_checksum, v.target_checksum, round(v.seconds, 3),
        CASE WHEN v.first_snapshot = v.last_snapshot THEN v.first_snapshot ELSE v.first_snapshot || ' .. ' || v.last_snapshot END, v.verdict
        FROM migrate._validation v WHERE v.run = run_id ORDER BY v.flow;
END $$;

-- Raises unless caller is (still) a member of the owners of all the migration's tables.
CREATE FUNCTION migrate._require_members(caller regrole, m migrate._migration) RETURNS void
LANGUAGE sql AS $$
    SELECT migrate._require_member(caller, r) FROM migrate._flow f, unnest(ARRAY[f.source, f.target]) r WHERE f.migration = m.id
$$;

-- "users_to_profiles: 3 of 1000 rows differ (1 missing, 2 different) by ranges"
CREATE FUNCTION migrate._validation_text(run_id bigint) RETURNS text
LANGUAGE sql STABLE AS $$
    SELECT string_agg(format('%s: %s by %s (%s rows on the source, %s on the target%s)', v.label, v.verdict, v.method, v.source_rows, v.target_rows,
        (SELECT string_agg(format(', %s %s', x.n, x.kind), '' ORDER BY x.kind)
         FROM (SELECT kind, count(*) AS n FROM migrate._mismatch x WHERE x.run = v.run AND x.flow = ANY (v.flows) GROUP BY kind) x)), '; ' ORDER BY v.flow)
    FROM migrate._validation v WHERE v.run = run_id
$$;

-- Whether writes of these flows wait for a worker that nothing in the row refused: somebody held a lock, or was in the way.
CREATE FUNCTION migrate._waits_for_retry(flows integer[]) RETURNS boolean
LANGUAGE sql STABLE AS $$
    SELECT EXISTS (SELECT FROM migrate._failure x WHERE x.flow = ANY (flows) AND migrate._blame(x.sqlstate) IN ('lock', 'cancel', 'server'))
$$;

-- One step of the validation that phase validating consists of: 'more', 'wait', 'equal' or 'mismatch: …'. Each call is one short
-- transaction of the worker's. A run belongs to one stay in the phase: whoever comes back to it begins anew, from the first range.
-- wait: rows differ while writes wait to be retried, as the same snapshot shows. The ranges are compared again after that.
CREATE FUNCTION migrate._validate_step(migration_id integer, range_rows integer DEFAULT 10000) RETURNS text
LANGUAGE plpgsql AS $$
DECLARE
    m migrate._migration;
    v migrate._validation;
    run_id bigint;
    known bigint;
BEGIN
    SELECT * INTO m FROM migrate._migration WHERE id = migration_id;
    -- Resuming after a run that has ended (with a mismatch) checks everything again.
    SELECT max(run) INTO run_id FROM migrate._validation WHERE migration = m.id AND phase_since = m.phase_since;
    IF run_id IS NULL OR NOT EXISTS (SELECT FROM migrate._validation WHERE run = run_id AND verdict IS NULL) THEN
        run_id := migrate._validation_begin(m, 'ranges', range_rows, true);
    END IF;
    SELECT * INTO v FROM migrate._validation WHERE run = run_id AND verdict IS NULL ORDER BY flow LIMIT 1;
    known := (SELECT count(*) FROM migrate._validation_range r WHERE r.run = run_id AND r.flow = v.flow);
    BEGIN
        PERFORM migrate._validate_next(m, migrate._comparison(m, v.direction, v.flows), run_id, v.method, v.range_rows);
        IF EXISTS (SELECT FROM migrate._validation_range r WHERE r.run = run_id AND r.flow = v.flow AND r.ordinal > known AND r.mismatches > 0)
           AND migrate._waits_for_retry(v.flows) THEN
            RAISE SQLSTATE 'MG001';
        END IF;
    EXCEPTION WHEN SQLSTATE 'MG001' THEN
        RETURN 'wait';
    END;
    IF EXISTS (SELECT FROM migrate._validation WHERE run = run_id AND verdict IS NULL) THEN
        RETURN 'more';
    END IF;
    PERFORM migrate._event(m, NULL, 'validated', migrate._validation_text(run_id));
    RETURN CASE WHEN EXISTS (SELECT FROM migrate._validation WHERE run = run_id AND verdict = 'mismatch')
        THEN format('mismatch: %s; SELECT * FROM migrate.mismatches(%L);', migrate._validation_text(run_id), m.name) ELSE 'equal' END;
END $$;

-- What is known of a migration's equality: the verdict of the latest whole validation (checksum, ranges or rows), and whether
-- every mismatch found since is mended. For cutover's gate and for reports.
CREATE FUNCTION migrate._last_validation(migration_id integer, OUT run bigint, OUT at timestamptz, OUT verdict text, OUT open_mismatches bigint)
LANGUAGE sql STABLE AS $$
    SELECT v.run, v.at, v.verdict, (SELECT count(*) FROM migrate._mismatch x JOIN migrate._flow f ON f.id = x.flow WHERE f.migration = migration_id)
    FROM (SELECT run, max(started_at) AS at, CASE WHEN bool_and(verdict = 'equal') THEN 'equal' ELSE 'mismatch' END AS verdict
          FROM migrate._validation WHERE migration = migration_id AND method IN ('checksum', 'ranges', 'rows')
          GROUP BY run HAVING bool_and(verdict IS NOT NULL) ORDER BY run DESC LIMIT 1) v
$$;

-- A key as people read it: one column as it is, more as an array.
CREATE FUNCTION migrate._key_text(key text[]) RETURNS text
LANGUAGE sql IMMUTABLE AS $$ SELECT CASE cardinality(key) WHEN 1 THEN key[1] ELSE key::text END $$;

-- migrate.mismatches()
CREATE FUNCTION migrate._mismatches(caller regrole, name text) RETURNS TABLE (flow text, key text, kind text, columns text[], found_at timestamptz)
LANGUAGE plpgsql AS $$
DECLARE
    m migrate._migration := migrate._find(caller, $2);
BEGIN
    PERFORM migrate._require_members(caller, m);
    RETURN QUERY SELECT f.name, migrate._key_text(x.key), x.kind, x.columns, x.found_at
        FROM migrate._mismatch x JOIN migrate._flow f ON f.id = x.flow WHERE f.migration = m.id ORDER BY f.id, x.key COLLATE "C";
END $$;

-- The dual-write triggers: armed by start, and again after a gap.

CREATE FUNCTION migrate._dual_write_row() RETURNS trigger LANGUAGE C AS 'MODULE_PATHNAME', 'migrate_dual_write_row';
CREATE FUNCTION migrate._dual_write_flush() RETURNS trigger LANGUAGE C AS 'MODULE_PATHNAME', 'migrate_dual_write_flush';
CREATE FUNCTION migrate._dual_write_truncate() RETURNS trigger LANGUAGE C AS 'MODULE_PATHNAME', 'migrate_dual_write_truncate';

-- Row triggers sort before RI_ConstraintTrigger_…, so that a foreign key from dest to origin finds dest's row gone already; and
-- before the user's, as far as can be: a statement in one of theirs is then known to stand inside another, whose keys come with it.
-- ENABLE ALWAYS: a logical replication apply worker writes as session_replication_role = replica.
CREATE FUNCTION migrate._create_triggers(m migrate._migration, direction text) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    x record;
    r regclass;
    t text;
    kind text;
BEGIN
    FOR x IN SELECT p.* FROM migrate._mapping p JOIN migrate._flow f ON f.id = p.flow WHERE f.migration = m.id AND p.direction = _create_triggers.direction ORDER BY p.flow LOOP
        FOR r IN SELECT * FROM migrate._partition_tree(x.origin) LOOP
            FOREACH kind IN ARRAY ARRAY['row', 'flush', 'truncate'] LOOP
                t := format('!migrate_%s_%s_%s', x.flow, direction, kind);
                IF NOT EXISTS (SELECT FROM pg_trigger WHERE tgrelid = r AND tgname = t) THEN
                    EXECUTE format('CREATE TRIGGER %I AFTER %s ON %s FOR EACH %s EXECUTE FUNCTION migrate._dual_write_%s(%L, %L)', t,
                        CASE kind WHEN 'truncate' THEN 'TRUNCATE' ELSE 'INSERT OR UPDATE OR DELETE' END, r,
                        CASE kind WHEN 'row' THEN 'ROW' ELSE 'STATEMENT' END, kind, x.flow, direction);
                END IF;
                EXECUTE format('ALTER TABLE %s ENABLE ALWAYS TRIGGER %I', r, t);
                -- @point triggers: one armed
            END LOOP;
        END LOOP;
    END LOOP;
END $$;

CREATE FUNCTION migrate._drop_triggers(m migrate._migration, direction text) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    t record;
BEGIN
    FOR t IN SELECT g.tgname, g.tgrelid::regclass AS relation FROM pg_trigger g
             JOIN migrate._mapping p ON g.tgname IN (format('!migrate_%s_%s_row', p.flow, p.direction), format('!migrate_%s_%s_flush', p.flow, p.direction), format('!migrate_%s_%s_truncate', p.flow, p.direction))
             JOIN migrate._flow f ON f.id = p.flow
             WHERE f.migration = m.id AND p.direction = _drop_triggers.direction AND g.tgparentid = 0 AND NOT g.tgisinternal LOOP
        EXECUTE format('DROP TRIGGER %I ON %s', t.tgname, t.relation);
        -- @point triggers: one dropped
    END LOOP;
END $$;

-- What must not change while the dual writes are to be without a gap: our triggers (a disabled and re-enabled one has another
-- xmin) and the partitions they stand on. NULL where a trigger is missing or does not fire always, or its mapping view was dropped, without
-- which it does nothing, or the dual writes themselves have told of a gap. Every batch asks for it; PL/pgSQL, so that it is planned once a worker.
CREATE FUNCTION migrate._fingerprint(flow integer) RETURNS text
LANGUAGE plpgsql STABLE AS $$
BEGIN
    RETURN (
        WITH wanted AS (
            SELECT r AS relation, format('!migrate_%s_%s_%s', p.flow, p.direction, kind) AS name, EXISTS (SELECT FROM pg_class c WHERE c.oid = p.view) AS has_view
            FROM migrate._flow f JOIN migrate._migration m ON m.id = f.migration
            JOIN migrate._mapping p ON p.flow = f.id AND (p.direction = 'forward' OR m.both_directions),
                LATERAL migrate._partition_tree(p.origin) r, unnest(ARRAY['row', 'flush', 'truncate']) kind
            WHERE f.id = _fingerprint.flow)
        SELECT CASE WHEN count(*) = count(t.oid) AND NOT EXISTS (SELECT FROM migrate._gap g WHERE g.flow = _fingerprint.flow) THEN md5(string_agg(format('%s %s %s %s', w.relation::oid, w.name, t.xmin, i.xmin), ',' ORDER BY w.relation::oid, w.name)) END
        FROM wanted w
        LEFT JOIN pg_trigger t ON t.tgrelid = w.relation AND t.tgname = w.name AND t.tgenabled = 'A' AND w.has_view
        LEFT JOIN pg_inherits i ON i.inhrelid = w.relation);
END $$;

CREATE FUNCTION migrate._has_gap(f migrate._flow) RETURNS boolean
LANGUAGE plpgsql STABLE AS $$
BEGIN
    RETURN coalesce(f.fingerprint <> migrate._fingerprint(f.id), true);
END $$;

-- The dual writes of this migration are without a gap from now on. The caller holds SHARE ROW EXCLUSIVE on every table that has triggers.
CREATE FUNCTION migrate._note_fingerprints(m migrate._migration) RETURNS void
LANGUAGE sql AS $$
    DELETE FROM migrate._gap g USING migrate._flow f WHERE f.id = g.flow AND f.migration = m.id;
    UPDATE migrate._flow f SET fingerprint = migrate._fingerprint(f.id) WHERE f.migration = m.id
$$;

-- Whether the backfill is to read the source in the order of place (src/place_scan.hpp), and why (not). A table that fits into memory is
-- read from there in any order; half of it, for the target needs the other half: the index of its key, which then grows everywhere at
-- once, must fit there. Before the sources are armed, or under the same locks.
CREATE FUNCTION migrate._copy_order(f migrate._flow, OUT by_place boolean, OUT why text)
LANGUAGE plpgsql STABLE AS $$
DECLARE
    wanted text := migrate._opt(f.migration, 'copy_order');
    first_column name := (SELECT k.origin_column FROM migrate._key(f.id, 'forward') k WHERE k.ordinal = 1);
    memory bigint := pg_size_bytes(current_setting('effective_cache_size')) / 2;
    known real;
BEGIN
    by_place := false;
    IF migrate._no_bulk_copy(f.id) IS NOT NULL THEN
        RETURN;
    ELSIF wanted <> 'auto' THEN
        by_place := wanted = 'place';
        why := 'copy_order = ' || wanted;
        RETURN;
    ELSIF pg_relation_size(f.source) < memory THEN
        why := 'the table is smaller than half of effective_cache_size';
        RETURN;
    ELSIF (SELECT pg_relation_size(migrate._key_index(f.source, p.key_origin)) FROM migrate._mapping p WHERE p.flow = f.id AND p.direction = 'forward') > memory THEN
        why := 'the index of the key, too, is larger than half of effective_cache_size';
        RETURN;
    END IF;
    SELECT s.correlation INTO known FROM pg_stats s JOIN pg_class c ON c.oid = f.source
    WHERE s.schemaname = c.relnamespace::regnamespace::name AND s.tablename = c.relname AND s.attname = first_column AND NOT s.inherited;
    by_place := coalesce(abs(known) < 0.5, false);
    why := CASE WHEN known IS NULL THEN format('the correlation of %I with place is not known; ANALYZE tells', first_column)
                ELSE format('the correlation of %I with place is %s', first_column, round(known::numeric, 2)) END;
END $$;

-- Turns the forward dual writes on. The caller holds SHARE ROW EXCLUSIVE on every source: no writer is under way. keys: the locks for
-- setting foreign keys aside are held too.
CREATE FUNCTION migrate._arm(m_id integer, caller regrole, keys boolean) RETURNS text
LANGUAGE plpgsql AS $$
DECLARE
    m migrate._migration;
BEGIN
    SELECT * INTO m FROM migrate._migration WHERE id = m_id;
    -- @point start: locks taken
    PERFORM migrate._create_triggers(m, 'forward');
    -- @point start: triggers created
    PERFORM migrate._note_fingerprints(m);
    -- @point start: fingerprints noted
    UPDATE migrate._flow f SET empty_at_start = migrate._is_empty(f.target) WHERE f.migration = m_id;
    PERFORM migrate._set_aside(m, caller, keys);
    -- @point start: objects set aside
    -- (What was set aside may have been in the way of a bulk copy. Nobody has seen the triggers yet, nor how they are to write.)
    UPDATE migrate._flow f SET by_place = o.by_place FROM migrate._flow x, LATERAL migrate._copy_order(x) o WHERE x.migration = m_id AND f.id = x.id;
    RETURN 'armed';
END $$;

CREATE FUNCTION migrate._start(caller regrole, name text) RETURNS text
LANGUAGE plpgsql AS $$
DECLARE
    m migrate._migration := migrate._lock(caller, name);
    deadline timestamptz;
    whole record;
    less record;
    in_the_way text;
BEGIN
    IF m.phase IN ('cancelled', 'finalized') THEN
        PERFORM migrate._raise('55000', format('migration "%s" is %s', m.name, m.phase), '', format('To run it again: SELECT migrate.drop(%L); and define it anew.', m.name));
    ELSIF m.phase <> 'planned' THEN
        RAISE NOTICE 'migration "%" is already started (%)', m.name, m.phase;
        PERFORM migrate._launch(m);
        RETURN format('%s -> %s', m.phase, m.phase);
    END IF;
    BEGIN  -- undone, so that no lock of what is read here stays
        PERFORM migrate._preflight_errors(m.id);
        SELECT * INTO whole FROM migrate._start_locks(m, true);
        PERFORM migrate._undo();
    EXCEPTION WHEN SQLSTATE 'MGUND' THEN NULL;
    END;
    deadline := clock_timestamp() + make_interval(secs => migrate._opt_ms(m.id, 'cutover_timeout') / 1000.0);
    -- To take a foreign key off, readers of the referenced table must be out of it for a moment. Where one stays, the key stays too.
    BEGIN
        PERFORM migrate._under_locks(m, caller, 'start', whole.relations, whole.modes, format('SELECT migrate._arm(%s, %L, true)', m.id, caller),
            CASE WHEN whole.has_keys THEN least(deadline, clock_timestamp() + interval '2 s') ELSE deadline END);
    EXCEPTION WHEN lock_not_available OR object_in_use THEN
        IF NOT whole.has_keys THEN
            RAISE;
        END IF;
        GET STACKED DIAGNOSTICS in_the_way = PG_EXCEPTION_DETAIL;
        PERFORM migrate._event(m, caller, 'not set aside', 'the foreign keys of the target: ' || coalesce(nullif(in_the_way, ''), SQLERRM));
        BEGIN
            SELECT * INTO less FROM migrate._start_locks(m, false);
            PERFORM migrate._undo();
        EXCEPTION WHEN SQLSTATE 'MGUND' THEN NULL;
        END;
        PERFORM migrate._under_locks(m, caller, 'start', less.relations, less.modes, format('SELECT migrate._arm(%s, %L, false)', m.id, caller), deadline);
    END;
    UPDATE migrate._migration x SET started_at = clock_timestamp() WHERE x.id = m.id;
    PERFORM migrate._belongs_here(m.id);
    m := migrate._move(m, caller, 'dual_writing', 'start');
    -- @point start: phase moved
    PERFORM migrate._launch(m);
    -- @point start: worker launched
    RETURN 'planned -> dual_writing';
END $$;

-- Flows whose triggers, or whose tables' partitions, are or were not as when the dual writes were armed.
CREATE FUNCTION migrate._gaps(m_id integer) RETURNS SETOF migrate._flow
LANGUAGE sql VOLATILE AS $$
    SELECT f.* FROM migrate._flow f WHERE f.migration = m_id AND migrate._has_gap(f)
$$;

-- Creates the triggers again. Writes may have passed them meanwhile, so what was validated before counts for nothing.
CREATE FUNCTION migrate._rearm(m migrate._migration, caller regrole) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    tables regclass[] := migrate._trigger_tables(m);
    routed regclass[] := ARRAY(SELECT v FROM migrate._routed_views(m.id) v WHERE m.phase <> 'cut_over');
BEGIN
    PERFORM migrate._under_locks(m, caller, 'arm its dual writes again', routed || tables,
        array_fill('ACCESS EXCLUSIVE'::text, ARRAY[cardinality(routed)]) || array_fill('SHARE ROW EXCLUSIVE'::text, ARRAY[cardinality(tables)]),
        format('SELECT migrate._rearm_now(%s, %L)', m.id, caller), clock_timestamp() + migrate._opt_ms(m.id, 'cutover_timeout') * interval '1 ms');
    UPDATE migrate._flow f SET copied_file = NULL WHERE f.migration = m.id;  -- rows may have moved
    PERFORM migrate._event(m, caller, 'rearmed', 'the dual writes had a gap: what was validated before counts for nothing');
    IF m.phase IN ('shadowing', 'ready') THEN
        PERFORM migrate._move(m, caller, 'validating', 'the dual writes had a gap and were armed again');
    ELSIF m.phase = 'validating' THEN
        UPDATE migrate._migration x SET phase_since = clock_timestamp() WHERE x.id = m.id;  -- a validation belongs to one stay in the phase
    ELSIF m.phase = 'cut_over' THEN
        RAISE WARNING 'writes made while the dual writes of migration "%" had a gap may be missing on the other side', m.name
            USING HINT = format('SELECT * FROM migrate.validate(%L); tells, and a rollback insists on it.', m.name);
    END IF;
END $$;

-- The tables that carry triggers of this migration, partitions included; their locks for reading are given back.
CREATE FUNCTION migrate._trigger_tables(m migrate._migration) RETURNS regclass[]
LANGUAGE plpgsql AS $$
DECLARE
    tables regclass[];
BEGIN
    SELECT coalesce(array_agg(DISTINCT r ORDER BY r), '{}') INTO tables
    FROM migrate._mapping p JOIN migrate._flow f ON f.id = p.flow JOIN pg_class c ON c.oid = p.origin, LATERAL migrate._partition_tree(p.origin) r
    WHERE f.migration = m.id AND (p.direction = 'forward' OR m.both_directions);
    PERFORM migrate._undo();
EXCEPTION WHEN SQLSTATE 'MGUND' THEN
    RETURN tables;
END $$;

-- Reads that were routed to the target come back to the source first: it may lack what was written meanwhile.
CREATE FUNCTION migrate._rearm_now(m_id integer, caller regrole) RETURNS text
LANGUAGE plpgsql AS $$
BEGIN
    PERFORM migrate._route_back(m_id, caller) FROM migrate._migration m WHERE m.id = m_id AND m.phase <> 'cut_over';
    RETURN migrate._create_all_triggers(m_id);
END $$;

CREATE FUNCTION migrate._create_all_triggers(m_id integer) RETURNS text
LANGUAGE plpgsql AS $$
DECLARE
    m migrate._migration;
BEGIN
    SELECT * INTO m FROM migrate._migration x WHERE x.id = m_id;
    PERFORM migrate._create_triggers(m, 'forward');
    IF m.both_directions THEN
        PERFORM migrate._create_triggers(m, 'reverse');
    END IF;
    PERFORM migrate._note_fingerprints(m);
    PERFORM migrate._invalidate(c.oid) FROM pg_class c JOIN migrate._mapping p ON p.origin = c.oid JOIN migrate._flow f ON f.id = p.flow WHERE f.migration = m_id;  -- who has told of a gap tells of the next
    RETURN 'armed';
END $$;

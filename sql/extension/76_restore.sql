-- What was set aside comes back: indexes by CREATE INDEX CONCURRENTLY, then foreign keys NOT VALID, then VALIDATE, so that no write of
-- the application waits for any of it. What cannot run within a function src/restore.cpp runs as a statement of its own. A worker that
-- dies leaves an INVALID index at most, which the next one drops and builds anew.

-- The next thing to be done for what is set aside: indexes first, for a foreign key's actions look for rows by them.
CREATE FUNCTION migrate._choose_restore(m migrate._migration, j migrate._job) RETURNS migrate._job
LANGUAGE plpgsql AS $$
DECLARE
    d migrate._deferred;
BEGIN
    IF m.phase = 'backfilling' AND m.throttled_reason IS NOT NULL THEN
        RETURN migrate._wait_job(m, j.worker, 500);
    END IF;
    SELECT * INTO d FROM migrate._still_deferred(m.id) x ORDER BY x.kind DESC, x.flow, x.ordinal LIMIT 1;
    j.flow := d.flow;
    j.ordinal := d.ordinal;
    j.action := CASE WHEN d.kind = 'index' THEN 'index' WHEN d.state = 'aside' THEN 'add_key' ELSE 'validate_key' END;
    j.activity := format('%s: %s', m.name, migrate._restore_note(m.id, d));
    RETURN j;
END $$;

-- building index i (2 of 3)
CREATE FUNCTION migrate._restore_note(m_id integer, d migrate._deferred) RETURNS text
LANGUAGE sql STABLE AS $$
    SELECT format('%s %s (%s of %s)', CASE WHEN d.kind = 'index' THEN 'building' WHEN d.state = 'aside' THEN 'adding' ELSE 'validating' END,
                  migrate._deferred_name(d), least(count(*), 1 + count(*) FILTER (WHERE x.state IN ('restored', 'given_up'))), count(*))
    FROM migrate._deferred x JOIN migrate._flow f ON f.id = x.flow WHERE f.migration = m_id
$$;

-- Says what is about to run as a statement of its own. pause and cancel, which may find it running, interrupt it by that.
CREATE FUNCTION migrate._begin_restore(j migrate._job) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    d migrate._deferred;
BEGIN
    SELECT * INTO d FROM migrate._deferred x WHERE x.flow = j.flow AND x.ordinal = j.ordinal;
    d.state := CASE d.kind WHEN 'index' THEN 'building' ELSE 'validating' END;
    -- (Another attempt leaves no dead row: who is in the way may keep them from being vacuumed.)
    UPDATE migrate._deferred x SET state = d.state WHERE x.flow = d.flow AND x.ordinal = d.ordinal AND x.state <> d.state;
    PERFORM migrate._note(j.migration, 0, migrate._restore_note(j.migration, d));
    -- @point restore: begun
END $$;

CREATE FUNCTION migrate._interrupt_restore(m migrate._migration) RETURNS void
LANGUAGE sql AS $$
    SELECT pg_cancel_backend(w.pid) FROM migrate._worker w WHERE w.migration = m.id AND w.worker = 0
        AND EXISTS (SELECT FROM migrate._still_deferred(m.id) d WHERE d.state IN ('building', 'validating'))
$$;

-- The index of that name on the flow's target, if there is one.
CREATE FUNCTION migrate._present_index(d migrate._deferred, OUT index regclass, OUT is_valid boolean)
LANGUAGE sql VOLATILE AS $$
    SELECT i.indexrelid, i.indisvalid FROM migrate._flow f JOIN pg_class t ON t.oid = f.target
    JOIN pg_class c ON c.relnamespace = t.relnamespace AND c.relname = d.name JOIN pg_index i ON i.indexrelid = c.oid AND i.indrelid = t.oid
    WHERE f.id = d.flow
$$;

CREATE FUNCTION migrate._create_index_text(d migrate._deferred, how text) RETURNS text
LANGUAGE sql STABLE AS $$
    SELECT format('CREATE INDEX %s%I ON %s %s', how, d.name, migrate._relation_name(f.target), d.tail) FROM migrate._flow f WHERE f.id = d.flow
$$;

CREATE FUNCTION migrate._add_key_text(d migrate._deferred, how text) RETURNS text
LANGUAGE sql STABLE AS $$
    SELECT format('ALTER TABLE %s ADD CONSTRAINT %I %s REFERENCES %s%s', migrate._relation_name(coalesce(d.relation, f.target)), d.name, d.head, migrate._relation_name(d.referenced),
                  regexp_replace(d.tail, ' NOT VALID$', '') || CASE WHEN d.tail ~ ' NOT VALID$' THEN ' NOT VALID' ELSE how END)
    FROM migrate._flow f WHERE f.id = d.flow
$$;

-- Whether there is nothing left to restore: the table is gone, or what a swap has added to it.
CREATE FUNCTION migrate._is_gone(d migrate._deferred, relation regclass) RETURNS boolean
LANGUAGE sql VOLATILE AS $$
    SELECT NOT EXISTS (SELECT FROM pg_class c WHERE c.oid = _is_gone.relation)
        OR d.relation IS NOT NULL AND NOT EXISTS (SELECT FROM pg_constraint k WHERE k.conrelid = d.relation AND k.conname = d.name)
$$;

-- What src/restore.cpp is to run for this job, as whom, on which table, and in which tablespace an index goes; no row: nothing.
CREATE FUNCTION migrate._restore_statement(j migrate._job) RETURNS TABLE (role oid, relation oid, referenced oid, statement text, tablespace text)
LANGUAGE plpgsql AS $$
DECLARE
    d migrate._deferred := (SELECT x FROM migrate._deferred x WHERE x.flow = j.flow AND x.ordinal = j.ordinal);
    present record;
BEGIN
    SELECT c.oid, c.relowner, d.tablespace INTO relation, role, tablespace FROM migrate._flow f JOIN pg_class c ON c.oid = coalesce(d.relation, f.target) WHERE f.id = d.flow;
    IF NOT FOUND OR d.state NOT IN ('building', 'validating') OR migrate._is_gone(d, relation) THEN
        RETURN;
    ELSIF d.kind = 'foreign_key' THEN
        statement := format('ALTER TABLE %s VALIDATE CONSTRAINT %I', migrate._relation_name(relation), d.name);
        referenced := (SELECT k.confrelid FROM pg_constraint k WHERE k.conrelid = relation AND k.conname = d.name);
    ELSE
        SELECT * INTO present FROM migrate._present_index(d);
        IF present.is_valid THEN
            RETURN;
        END IF;
        statement := CASE WHEN present.index IS NULL THEN migrate._create_index_text(d, 'CONCURRENTLY ')
                          ELSE format('DROP INDEX CONCURRENTLY %s', migrate._relation_name(present.index)) END;
    END IF;
    RETURN NEXT;
END $$;

-- Who keeps its locks from it, for people.
CREATE FUNCTION migrate._restore_blockers(m migrate._migration, j migrate._job) RETURNS text
LANGUAGE sql VOLATILE AS $$
    SELECT '; in the way: ' || string_agg(b.description, '; ') FROM migrate._deferred d JOIN migrate._flow f ON f.id = d.flow
    CROSS JOIN LATERAL migrate._blockers(m.owner, ARRAY[coalesce(d.relation, f.target), d.referenced], '{SHARE UPDATE EXCLUSIVE,ROW SHARE}', transaction_timestamp()) b
    WHERE d.flow = j.flow AND d.ordinal = j.ordinal AND j.action IN ('index', 'validate_key')
$$;

-- After the statement: notes what is back, with what CREATE INDEX does not tell. An index that was only dropped has another turn.
CREATE FUNCTION migrate._restored(j migrate._job) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    m migrate._migration;
    d migrate._deferred;
BEGIN
    SELECT * INTO m FROM migrate._migration x WHERE x.id = j.migration FOR KEY SHARE;
    SELECT * INTO d FROM migrate._deferred x WHERE x.flow = j.flow AND x.ordinal = j.ordinal FOR UPDATE;
    IF d.state IN ('building', 'validating') THEN
        PERFORM migrate._note_restored(m, NULL, d);
    END IF;
END $$;

CREATE FUNCTION migrate._note_restored(m migrate._migration, caller regrole, d migrate._deferred) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    relation regclass := (SELECT coalesce(d.relation, f.target) FROM migrate._flow f WHERE f.id = d.flow);
    owner regrole;
    present record;
    gone boolean := migrate._is_gone(d, relation);
BEGIN
    IF NOT gone AND d.kind = 'index' THEN
        owner := migrate._table_owner(relation);
        SELECT * INTO present FROM migrate._present_index(d);
        IF present.is_valid IS NOT TRUE THEN
            RETURN;
        ELSIF migrate._index_tail(present.index) <> d.tail THEN
            PERFORM migrate._raise('55000', format('index %s is not the one that was set aside', present.index), 'That one was: ' || migrate._create_index_text(d, ''),
                format('Drop or rename it, then SELECT migrate.retry(%L);', m.name));
        END IF;
        PERFORM migrate._as(owner, format('ALTER INDEX %s ALTER COLUMN %s SET STATISTICS %s', migrate._relation_name(present.index), s.i, d.statistics[s.i]))
        FROM generate_subscripts(d.statistics, 1) AS s(i) WHERE d.statistics[s.i] IS NOT NULL;
        PERFORM migrate._as(owner, format('COMMENT ON INDEX %s IS %L', migrate._relation_name(present.index), d.comment)) WHERE d.comment IS NOT NULL;
    END IF;
    UPDATE migrate._deferred x SET state = CASE WHEN gone THEN 'given_up' ELSE 'restored' END, why = CASE WHEN gone THEN 'it is gone, or its table' END
    WHERE x.flow = d.flow AND x.ordinal = d.ordinal;
    PERFORM migrate._note(m.id, 0, NULL);
    PERFORM migrate._event(m, caller, 'restored', CASE WHEN gone THEN migrate._deferred_name(d) || ' cannot be: it is gone, or its table' ELSE format('%s of %s', migrate._deferred_name(d), relation) END);
    -- @point restore: noted
END $$;

-- Adds a foreign key, NOT VALID, in one attempt at its locks. The sources are locked too: no dual write is then under way that has
-- looked at the target before and would not know that this key may refuse it. Returns 1 where somebody is in the way.
CREATE FUNCTION migrate._run_add_key(m migrate._migration, j migrate._job) RETURNS bigint
LANGUAGE plpgsql AS $$
DECLARE
    d migrate._deferred := (SELECT x FROM migrate._deferred x WHERE x.flow = j.flow AND x.ordinal = j.ordinal);
    relation regclass := (SELECT coalesce(d.relation, f.target) FROM migrate._flow f WHERE f.id = d.flow);
    tables regclass[];
    present pg_constraint;
    began timestamptz := clock_timestamp();
BEGIN
    IF EXISTS (SELECT FROM unnest(ARRAY[relation, d.referenced]) t WHERE NOT EXISTS (SELECT FROM pg_class c WHERE c.oid = t)) THEN
        PERFORM migrate._give_up(m, d, 'a table of it is gone');
        RETURN 0;
    END IF;
    SELECT array_agg(DISTINCT r ORDER BY r) INTO tables
    FROM (SELECT r FROM migrate._flow f, LATERAL migrate._partition_tree(f.source) r WHERE f.target = relation AND f.migration = m.id AND m.phase <> 'cancelled'
          UNION ALL SELECT relation UNION ALL SELECT d.referenced) x(r);
    BEGIN
        PERFORM migrate._lock_relations(tables, array_fill('SHARE ROW EXCLUSIVE'::text, ARRAY[cardinality(tables)]), migrate._opt_ms(m.id, 'lock_timeout')::integer);
        SELECT * INTO present FROM pg_constraint k WHERE k.conrelid = relation AND k.conname = d.name;
        IF NOT FOUND THEN
            PERFORM migrate._as(migrate._table_owner(relation), migrate._add_key_text(d, ' NOT VALID'));
            PERFORM migrate._comment_key(d);
        ELSIF present.contype <> 'f' OR present.confrelid <> d.referenced THEN
            PERFORM migrate._raise('55000', format('constraint "%s" of %s is not the one that was set aside', d.name, relation), 'That one was: ' || migrate._add_key_text(d, ''),
                format('Drop or rename it, then SELECT migrate.retry(%L);', m.name));
        END IF;
        -- @point restore: key added
    EXCEPTION WHEN lock_not_available OR deadlock_detected THEN
        PERFORM migrate._note(m.id, 0, migrate._restore_note(m.id, d) || ', in the way: ' || coalesce((SELECT string_agg(b.description, '; ')
            FROM migrate._blockers(m.owner, tables, array_fill('SHARE ROW EXCLUSIVE'::text, ARRAY[cardinality(tables)]), began) b), 'short transactions'));
        RETURN 1;
    END;
    PERFORM migrate._invalidate(t) FROM unnest(tables) t;
    IF d.tail ~ ' NOT VALID$' OR present.convalidated THEN
        PERFORM migrate._note_restored(m, NULL, d);
    ELSE
        UPDATE migrate._deferred x SET state = 'added' WHERE x.flow = d.flow AND x.ordinal = d.ordinal;
        PERFORM migrate._note(m.id, 0, NULL);
    END IF;
    RETURN 0;
END $$;

CREATE FUNCTION migrate._comment_key(d migrate._deferred) RETURNS void
LANGUAGE sql AS $$
    SELECT migrate._as(migrate._table_owner(r), format('COMMENT ON CONSTRAINT %I ON %s IS %L', d.name, migrate._relation_name(r), d.comment))
    FROM migrate._flow f, coalesce(d.relation, f.target) r WHERE f.id = d.flow AND d.comment IS NOT NULL
$$;

-- The query that finds the rows which a foreign key refuses.
CREATE FUNCTION migrate._orphans_query(d migrate._deferred) RETURNS text
LANGUAGE sql STABLE AS $$
    SELECT format('SELECT t.* FROM %s t WHERE (%s) AND NOT EXISTS (SELECT FROM %s r WHERE %s)', k.conrelid::regclass,
        string_agg(format('t.%I IS NOT NULL', a.attname), CASE k.confmatchtype WHEN 'f' THEN ' OR ' ELSE ' AND ' END ORDER BY u.i), k.confrelid::regclass,
        string_agg(format('r.%I = t.%I', b.attname, a.attname), ' AND ' ORDER BY u.i))
    FROM migrate._flow f JOIN pg_constraint k ON k.conrelid = coalesce(d.relation, f.target) AND k.conname = d.name
    CROSS JOIN LATERAL unnest(k.conkey, k.confkey) WITH ORDINALITY AS u(own, other, i)
    JOIN pg_attribute a ON a.attrelid = k.conrelid AND a.attnum = u.own JOIN pg_attribute b ON b.attrelid = k.confrelid AND b.attnum = u.other
    WHERE f.id = d.flow GROUP BY k.conrelid, k.confrelid, k.confmatchtype
$$;

-- What cannot be put back is said, with the statement that would.
CREATE FUNCTION migrate._give_up(m migrate._migration, d migrate._deferred, reason text, caller regrole DEFAULT NULL) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
    UPDATE migrate._deferred x SET state = 'given_up', why = reason WHERE x.flow = d.flow AND x.ordinal = d.ordinal;
    PERFORM migrate._note(m.id, 0, NULL);
    PERFORM migrate._event(m, caller, 'not restored', format('%s: %s. %s;', migrate._deferred_name(d), reason, migrate._restore_text(d)));
END $$;

-- The statement that a person would type.
CREATE FUNCTION migrate._restore_text(d migrate._deferred) RETURNS text
LANGUAGE sql STABLE AS $$
    SELECT CASE WHEN d.kind = 'index' THEN migrate._create_index_text(d, 'CONCURRENTLY ')
                WHEN d.state IN ('added', 'validating') THEN format('ALTER TABLE %s VALIDATE CONSTRAINT %I', migrate._relation_name(coalesce(d.relation, f.target)), d.name)
                ELSE migrate._add_key_text(d, '') END
    FROM migrate._flow f WHERE f.id = d.flow
$$;

-- After an error that time does not mend. After cancel there is no going on: what the rows that stay refuse is left as it is, and said.
CREATE FUNCTION migrate._restore_failed(m migrate._migration, j migrate._job, sqlstate text, message text) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    d migrate._deferred := (SELECT x FROM migrate._deferred x WHERE x.flow = j.flow AND x.ordinal = j.ordinal);
    reason text := format('%s (SQLSTATE %s)', message, sqlstate);
BEGIN
    IF m.phase = 'cancelled' THEN
        PERFORM migrate._give_up(m, d, reason);
    ELSE
        PERFORM migrate._fail(m, format('%s %s: %s%s', CASE j.action WHEN 'index' THEN 'building' WHEN 'add_key' THEN 'adding' ELSE 'validating' END, migrate._deferred_name(d), reason,
            CASE WHEN j.action = 'validate_key' AND sqlstate = '23503' THEN
                 format('. These rows: %s; mend them in the source, then SELECT migrate.retry(%L);', migrate._orphans_query(d), m.name) ELSE '' END));
    END IF;
END $$;

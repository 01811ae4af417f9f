-- How cancel leaves the targets: with their indexes and foreign keys, and without rows that would refuse the application's statements.
-- A target that was empty at start, has never served, and has a foreign key to a table of the application is emptied again: copies
-- that nothing keeps in step any more would make DELETE there fail. Into an empty table all comes back at once. Where rows stay, a
-- worker puts it back (76_restore.sql), for building an index under cancel's locks would keep the application waiting.

-- Foreign keys of a target, there or set aside, by which a row of it could refuse a change of another table of the application's.
CREATE FUNCTION migrate._blocking_keys(m migrate._migration, target regclass) RETURNS TABLE (name text, referenced regclass)
LANGUAGE sql STABLE AS $$
    SELECT k.conname::text, k.confrelid::regclass FROM pg_constraint k
    WHERE k.conrelid = target AND k.contype = 'f' AND k.conparentid = 0 AND NOT (k.confdeltype = 'c' AND k.confupdtype = 'c')
      AND k.confrelid NOT IN (SELECT f.target FROM migrate._flow f WHERE f.migration = m.id)
    UNION ALL
    SELECT d.name, d.referenced FROM migrate._still_deferred(m.id) d JOIN migrate._flow f ON f.id = d.flow AND f.target = _blocking_keys.target
    WHERE d.kind = 'foreign_key' AND d.state = 'aside' AND NOT (d.tail ~ ' ON UPDATE CASCADE' AND d.tail ~ ' ON DELETE CASCADE')
      AND d.referenced NOT IN (SELECT f.target FROM migrate._flow f WHERE f.migration = m.id)
$$;

-- Whether the rows of a target are this migration's copies and nothing else.
CREATE FUNCTION migrate._only_copies(m migrate._migration, target regclass) RETURNS boolean
LANGUAGE sql STABLE AS $$
    SELECT NOT m.both_directions AND bool_and(f.empty_at_start) AND NOT EXISTS (
        SELECT FROM migrate._flow o JOIN migrate._migration x ON x.id = o.migration
        WHERE target IN (o.target, o.source) AND o.migration <> m.id AND x.phase <> 'planned')
    FROM migrate._flow f WHERE f.migration = m.id AND f.target = _only_copies.target
$$;

-- The targets that cancel has something to do with, in its own transaction.
CREATE FUNCTION migrate._targets_to_leave(m migrate._migration) RETURNS regclass[]
LANGUAGE sql VOLATILE AS $$
    SELECT coalesce(array_agg(DISTINCT f.target ORDER BY f.target), '{}') FROM migrate._flow f JOIN pg_class c ON c.oid = f.target
    WHERE f.migration = m.id AND (EXISTS (SELECT FROM migrate._blocking_keys(m, f.target)) AND migrate._only_copies(m, f.target)
          OR EXISTS (SELECT FROM migrate._still_deferred(m.id) d JOIN migrate._flow o ON o.id = d.flow WHERE o.target = f.target AND d.relation IS NULL))
$$;

-- Drops the triggers and puts the targets in order; returns those that are empty again. Where a target is in somebody's use, or in
-- an autovacuum's, which is no reason not to cancel, only the triggers go.
CREATE FUNCTION migrate._leave(m migrate._migration, caller regrole) RETURNS regclass[]
LANGUAGE plpgsql AS $$
DECLARE
    tables regclass[];
    own regclass[] := '{}';
    trees regclass[];
    emptied regclass[] := '{}';
BEGIN
    IF m.phase <> 'planned' THEN
        tables := migrate._trigger_tables(m);
        BEGIN  -- undone, so that no lock of what is read here stays
            own := migrate._targets_to_leave(m);
            SELECT array_agg(DISTINCT r ORDER BY r) INTO trees FROM unnest(own) t, LATERAL migrate._partition_tree(t) r;
            PERFORM migrate._undo();
        EXCEPTION WHEN SQLSTATE 'MGUND' THEN NULL;
        END;
    END IF;
    IF own <> '{}' THEN
        BEGIN
            PERFORM migrate._dismantle(m, caller, 'be cancelled', tables || trees, own, interval '2 s');
            RETURN ARRAY(SELECT t FROM unnest(own) t WHERE migrate._only_copies(m, t) AND migrate._is_empty(t));
        EXCEPTION WHEN lock_not_available OR object_in_use THEN NULL;
        END;
    END IF;
    PERFORM migrate._dismantle(m, caller, 'be cancelled', tables);
    RETURN '{}';
END $$;

-- Under the locks: empties the target where that is due, and puts back into an empty one what was set aside. What cannot be put
-- back (a column was renamed, a right taken away) does not keep a migration from being cancelled.
CREATE FUNCTION migrate._leave_target(m migrate._migration, caller regrole, target regclass) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    d migrate._deferred;
    before text := current_setting('default_tablespace');
BEGIN
    IF migrate._only_copies(m, target) AND EXISTS (SELECT FROM migrate._blocking_keys(m, target)) THEN
        PERFORM migrate._empty_target(m, caller, target);
    END IF;
    IF NOT migrate._is_empty(target) THEN
        RETURN;
    END IF;
    FOR d IN SELECT x.* FROM migrate._still_deferred(m.id) x JOIN migrate._flow f ON f.id = x.flow WHERE f.target = _leave_target.target AND x.relation IS NULL ORDER BY x.kind DESC, x.ordinal LOOP
        BEGIN
            PERFORM set_config('default_tablespace', coalesce(d.tablespace, ''), true);
            PERFORM migrate._restore_at_once(m, d);
            PERFORM migrate._note_restored(m, caller, d);
        EXCEPTION
            WHEN lock_not_available OR deadlock_detected OR object_in_use OR query_canceled THEN RAISE;
            WHEN OTHERS THEN
                PERFORM migrate._give_up(m, d, format('%s (SQLSTATE %s)', SQLERRM, SQLSTATE), caller);
        END;
    END LOOP;
    PERFORM set_config('default_tablespace', before, true);
END $$;

-- In an empty table, which is locked.
CREATE FUNCTION migrate._restore_at_once(m migrate._migration, d migrate._deferred) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    target regclass := (SELECT f.target FROM migrate._flow f WHERE f.id = d.flow);
    owner regrole := migrate._table_owner(target);
    present record;
BEGIN
    IF d.kind = 'index' THEN
        SELECT * INTO present FROM migrate._present_index(d);
        IF present.index IS NOT NULL AND NOT present.is_valid THEN
            PERFORM migrate._as(owner, format('DROP INDEX %s', migrate._relation_name(present.index)));
        END IF;
        IF present.is_valid IS NOT TRUE THEN
            PERFORM migrate._as(owner, migrate._create_index_text(d, ''));
        END IF;
    ELSIF EXISTS (SELECT FROM pg_constraint k WHERE k.conrelid = target AND k.conname = d.name) THEN
        PERFORM migrate._as(owner, format('ALTER TABLE %s VALIDATE CONSTRAINT %I', migrate._relation_name(target), d.name)) WHERE d.tail !~ ' NOT VALID$';
    ELSE
        PERFORM migrate._as(owner, migrate._add_key_text(d, ''));
        PERFORM migrate._comment_key(d);
    END IF;
END $$;

-- TRUNCATE takes a moment however many rows there are, but not where another table references the target. There only a few rows
-- are deleted, as many as a batch may have, for the application waits meanwhile; and none whose deletion would change another table.
CREATE FUNCTION migrate._empty_target(m migrate._migration, caller regrole, target regclass) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    owner regrole := migrate._table_owner(target);
    few CONSTANT integer := 10000;
    is_referenced boolean := EXISTS (SELECT FROM pg_constraint k WHERE k.contype = 'f' AND k.confrelid = target AND k.conrelid <> target AND k.conparentid = 0);
BEGIN
    IF is_referenced AND (EXISTS (SELECT FROM pg_constraint k WHERE k.contype = 'f' AND k.confrelid = target AND k.conrelid <> target AND k.confdeltype NOT IN ('a', 'r'))
                          OR (SELECT r[1]::bigint FROM migrate._as(owner, format('SELECT count(*) FROM (SELECT FROM %s LIMIT %s) x', target, few + 1)) r) > few) THEN
        RETURN;
    END IF;
    PERFORM migrate._as(owner, format(CASE WHEN is_referenced THEN 'DELETE FROM %s' ELSE 'TRUNCATE %s' END, target));
    PERFORM migrate._event(m, caller, 'emptied', format('%s was empty before start, and a foreign key of it would have let its rows refuse deletes', target));
EXCEPTION
    WHEN lock_not_available OR deadlock_detected OR object_in_use OR query_canceled THEN RAISE;
    WHEN OTHERS THEN
        PERFORM migrate._event(m, caller, 'not emptied', format('%s: %s', target, SQLERRM));
END $$;

-- What cancel has not put in order itself: rows that stay in the application's way are named with the statement that takes them away,
-- and a worker builds what is still set aside.
CREATE FUNCTION migrate._leave_rest(m migrate._migration) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    t record;
BEGIN
    FOR t IN SELECT f.target, (SELECT string_agg(DISTINCT format('%s to %s', quote_ident(k.name), k.referenced), ', ') FROM migrate._blocking_keys(m, f.target) k) AS keys,
                    sum((SELECT sum(r.rows_done) FROM migrate._range r WHERE r.flow = f.id)) AS copied,
                    string_agg(migrate._share(f.id), ' OR ') FILTER (WHERE NOT f.empty_at_start) AS share
             FROM migrate._flow f JOIN pg_class c ON c.oid = f.target WHERE f.migration = m.id AND m.started_at IS NOT NULL GROUP BY f.target LOOP
        CONTINUE WHEN t.keys IS NULL OR migrate._is_empty(t.target);
        RAISE WARNING 'rows that were copied into % (% by the backfill) stay, and refuse changes of what they reference', t.target, coalesce(t.copied, 0)
            USING DETAIL = format('Foreign key %s.', t.keys),
                  HINT = format('Unless you want them: DELETE FROM %s%s;', t.target, coalesce(' WHERE ' || t.share, ''));
    END LOOP;
    PERFORM migrate._tell_given_up(m);
    IF migrate._is_restoring(m.id) THEN
        RAISE NOTICE 'indexes and foreign keys that were set aside are being built: %', (SELECT string_agg(migrate._deferred_name(d), ', ' ORDER BY d.flow, d.ordinal) FROM migrate._still_deferred(m.id) d)
            USING HINT = format('SELECT state, throttled_by FROM migrate.progress WHERE migration = %L; shows it.', m.name);
        PERFORM migrate._launch_worker(m.id, 0);
    END IF;
END $$;

-- What start had set aside and nobody could put back: a worker may have found that after cancel had answered, so drop says it, too. Not
-- what somebody has put back himself, nor what there is no table for any more.
CREATE FUNCTION migrate._tell_given_up(m migrate._migration) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    t record;
BEGIN
    FOR t IN SELECT migrate._deferred_name(d) AS name, d.why, migrate._restore_text(d) AS statement FROM migrate._deferred d JOIN migrate._flow f ON f.id = d.flow
             JOIN pg_class c ON c.oid = coalesce(d.relation, f.target)
             WHERE f.migration = m.id AND d.state = 'given_up' AND (d.referenced IS NULL OR EXISTS (SELECT FROM pg_class r WHERE r.oid = d.referenced))
               AND CASE d.kind WHEN 'index' THEN (migrate._present_index(d)).is_valid IS NOT TRUE
                               ELSE NOT EXISTS (SELECT FROM pg_constraint k WHERE k.conrelid = c.oid AND k.conname = d.name) END
             ORDER BY d.flow, d.ordinal LOOP
        RAISE WARNING '% could not be put back: %', t.name, t.why USING HINT = format('%s;', t.statement);
    END LOOP;
END $$;

-- The condition for a flow's own rows, where constants of the key tell them.
CREATE FUNCTION migrate._share(flow integer) RETURNS text
LANGUAGE sql STABLE AS $$
    SELECT string_agg(format('%I = %L', a.attname, p.key_const[s.i]), ' AND ') FROM migrate._mapping p CROSS JOIN LATERAL generate_subscripts(p.key_dest, 1) AS s(i)
    JOIN pg_attribute a ON a.attrelid = p.dest AND a.attnum = p.key_dest[s.i] WHERE p.flow = _share.flow AND p.direction = 'forward' AND p.key_const[s.i] IS NOT NULL
$$;

-- A migration is not forgotten, nor its way back given up, with something of it still to be built.
CREATE FUNCTION migrate._require_restored(m migrate._migration, verb text) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
    IF migrate._is_restoring(m.id) THEN
        PERFORM migrate._launch_worker(m.id, 0) WHERE migrate._has_work(m);
        PERFORM migrate._raise('55000', format('migration "%s" cannot be %s yet: %s', m.name, verb, CASE
                WHEN EXISTS (SELECT FROM migrate._still_deferred(m.id) d WHERE d.relation IS NULL) THEN 'what start set aside is still being built' ELSE 'its foreign keys are still being validated' END),
            (SELECT string_agg(migrate._deferred_name(d) || ' of ' || coalesce(d.relation, f.target), ', ' ORDER BY d.flow, d.ordinal) FROM migrate._still_deferred(m.id) d JOIN migrate._flow f ON f.id = d.flow),
            format('SELECT state, throttled_by, last_error FROM migrate.progress WHERE migration = %L; shows whether a worker is at it.', m.name));
    END IF;
END $$;

-- route: reads go to the target by and by, while the source serves and the dual writes keep both sides equal. A key is read from one side:
-- where its share of the keys grows, it changes sides once; and a session reads its own writes on either side, for they are one transaction.

-- What a view's reads are routed by, for people.
CREATE FUNCTION migrate._route_text(percent numeric, predicate text) RETURNS text
LANGUAGE sql IMMUTABLE AS $$ SELECT coalesce(trim_scale(percent) || ' %', predicate) $$;

CREATE FUNCTION migrate._routes_text(m_id integer) RETURNS text
LANGUAGE sql VOLATILE AS $$
    SELECT string_agg(DISTINCT migrate._route_text(v.percent, v.predicate), ', ') FROM migrate._view v WHERE v.migration = m_id AND v.use = 'read'
$$;

CREATE FUNCTION migrate._require_route(m migrate._migration, percent numeric, predicate text) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
    IF current_setting('transaction_isolation') NOT IN ('read committed', 'read uncommitted') THEN
        PERFORM migrate._raise('25001', format('route cannot run at isolation level %s', current_setting('transaction_isolation')),
            'Its snapshot would be older than the switch.', 'SET default_transaction_isolation = ''read committed''; outside of a transaction block, and call it again.');
    ELSIF (percent IS NULL) = (predicate IS NULL) THEN
        PERFORM migrate._raise('22023', 'reads are routed either by percent or by predicate',
            format('percent is %s, predicate is %s; exactly one must be given.', coalesce(percent::text, 'NULL'), coalesce(predicate, 'NULL')),
            format('SELECT migrate.route(%L, percent => 10);', m.name));
    ELSIF percent IS NOT NULL AND NOT (percent BETWEEN 0 AND 100 AND percent = round(percent, 2)) THEN
        PERFORM migrate._raise('22023', format('invalid percent: %s', percent), 'It must be from 0 (all reads from the source) to 100 (all from the target), in steps of 0.01.',
            format('SELECT migrate.route(%L, percent => 10);', m.name));
    ELSIF NOT EXISTS (SELECT FROM migrate._view v JOIN pg_class c ON c.oid = v.view WHERE v.migration = m.id AND v.use = 'read') THEN
        PERFORM migrate._raise('55000', format('migration "%s" has no view for reading', m.name), 'Only reads that go through one can be routed.',
            format('SELECT migrate.add_view(%L, view => ''…'', use => ''read'');', m.name));
    END IF;
END $$;

-- The predicate over each view's own columns, {"OID": "expression"}. Both sides must have these columns, unchanged.
CREATE FUNCTION migrate._predicates(m migrate._migration, caller regrole, predicate text, search_path text) RETURNS jsonb
LANGUAGE plpgsql AS $$
DECLARE
    v migrate._view;
    p record;
    computed text;
    found jsonb := '{}';
BEGIN
    FOR v IN SELECT x.* FROM migrate._view x JOIN pg_class c ON c.oid = x.view WHERE x.migration = m.id AND x.use = 'read' AND _predicates.predicate IS NOT NULL ORDER BY x.view LOOP
        SELECT * INTO p FROM migrate._parse_predicate(v.view, _predicates.predicate, search_path, caller);
        SELECT string_agg(n.name, ', ' ORDER BY n.place) INTO computed
        FROM migrate._view_columns(v.view, migrate._view_kin(v), migrate._view_attnums(v.flow, v.shape)) c, unnest(c.names, c.nums) WITH ORDINALITY AS n(name, num, place)
        WHERE n.place = ANY (p.columns) AND EXISTS (
            SELECT FROM migrate._flow f JOIN migrate._flow w ON w.migration = f.migration AND w.target = f.target JOIN migrate._mapping q ON q.flow = w.id AND q.direction = 'forward'
            WHERE f.id = v.flow AND q.key_const[array_position(q.key_dest, n.num)] IS NULL AND NOT EXISTS (
                SELECT FROM migrate._view_body(q.view) b, unnest(b.expressions) WITH ORDINALITY AS e(expression, i), migrate._columns_of(q.origin) o
                WHERE q.columns[e.i] = n.num AND e.expression = quote_ident(o.name)));
        IF computed IS NOT NULL THEN
            PERFORM migrate._raise('0A000', format('column %s of view %s is computed by the mapping', computed, v.view), format('The predicate is: %s', p.expression),
                'Route by columns that both sides have unchanged: those of the key, or others that are mapped bare.');
        END IF;
        found := found || jsonb_build_object(v.view::oid::text, p.expression);
    END LOOP;
    RETURN found;
END $$;

-- Raises where the phase does not allow it. Back is always possible while the source serves.
CREATE FUNCTION migrate._require_route_phase(m migrate._migration, forward boolean) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
    IF m.phase IN ('cut_over', 'finalized', 'cancelled') THEN
        PERFORM migrate._raise('55000', format('reads of migration "%s" cannot be routed in phase %s', m.name, m.phase),
            CASE m.phase WHEN 'cancelled' THEN 'No dual write keeps the target equal any more.' ELSE 'The target serves, reads and writes.' END,
            CASE m.phase WHEN 'cut_over' THEN format('SELECT migrate.rollback(%L); brings both back to the source.', m.name) ELSE '' END);
    ELSIF forward AND m.phase <> 'ready' THEN
        PERFORM migrate._raise('55000', format('reads of migration "%s" cannot go to the target in phase %s', m.name, m.phase), 'They can in phase ready.',
            CASE m.phase WHEN 'planned' THEN format('SELECT migrate.start(%L);', m.name) ELSE format('CALL migrate.wait(%L);', m.name) END);
    END IF;
END $$;

-- Under the locks of the views. Returns what it did, one line each.
CREATE FUNCTION migrate._route_now(m_id integer, caller regrole, percent numeric, predicates jsonb, forward boolean, skipped text[]) RETURNS text
LANGUAGE plpgsql AS $$
DECLARE
    m migrate._migration := (SELECT x FROM migrate._migration x WHERE x.id = m_id);
    v migrate._view;
    did text[] := '{}';
BEGIN
    -- @point route: locks taken
    PERFORM migrate._require_gates(m, caller, 'read', true, skipped) WHERE forward;
    FOR v IN SELECT x.* FROM migrate._view x JOIN pg_class c ON c.oid = x.view WHERE x.migration = m_id AND x.use = 'read' ORDER BY x.view LOOP
        PERFORM migrate._route_view(v, percent, predicates ->> v.view::oid::text, caller);
        -- @point route: one view replaced
        did := did || format('view %s reads from the target: %s', v.view, migrate._route_text(percent, predicates ->> v.view::oid::text));
    END LOOP;
    RETURN array_to_string(did, E'\n');
END $$;

CREATE FUNCTION migrate._route(caller regrole, name text, percent numeric DEFAULT NULL, predicate text DEFAULT NULL, dry_run boolean DEFAULT false, skip text[] DEFAULT '{}') RETURNS text
LANGUAGE plpgsql AS $$
DECLARE
    m migrate._migration := migrate._lock(caller, name);
    path text := migrate._caller_search_path();
    before text := migrate._routes_text(m.id);
    skipped text[] := migrate._skipped_gates(m, coalesce(skip, '{}'));
    deadline timestamptz := clock_timestamp() + migrate._opt_ms(m.id, 'cutover_timeout') * interval '1 ms';
    predicates jsonb;
    views regclass[];
    changes boolean;
    forward boolean;
    done record;
BEGIN
    PERFORM migrate._require_route(m, percent, predicate);
    BEGIN  -- undone, so that no lock of what is read here stays
        predicates := migrate._predicates(m, caller, predicate, path);
        PERFORM migrate._undo();
    EXCEPTION WHEN SQLSTATE 'MGUND' THEN NULL;
    END;
    SELECT array_agg(v.view ORDER BY v.view), bool_or((v.percent, v.predicate) IS DISTINCT FROM (_route.percent, predicates ->> v.view::oid::text)),
           NOT coalesce(bool_and(_route.percent = 0 OR _route.percent <= v.percent), false)
    INTO views, changes, forward FROM migrate._view v JOIN pg_class c ON c.oid = v.view WHERE v.migration = m.id AND v.use = 'read';
    IF NOT changes THEN
        RAISE NOTICE 'migration "%": reads are routed so already', m.name;
        RETURN format('%s -> %s, reads from the target: %s -> %s', m.phase, m.phase, before, before);
    END IF;
    PERFORM migrate._require_route_phase(m, forward);
    IF forward THEN
        BEGIN
            PERFORM migrate._require_gates(m, caller, 'read', false, skipped);
            PERFORM migrate._undo();
        EXCEPTION WHEN SQLSTATE 'MGUND' THEN NULL;
        END;
        -- Who has a snapshot from before the last batch, or a retried write, would not see its rows in the target.
        PERFORM migrate._wait_for_snapshots(m, caller, 'route reads', deadline, dry_run, format('migrate.route(%L, …, skip => ''{snapshots}'')', m.name)) WHERE 'snapshots' <> ALL (skipped);
    END IF;
    SELECT * INTO done FROM migrate._under_locks(m, caller, 'route reads', views, array_fill('ACCESS EXCLUSIVE'::text, ARRAY[cardinality(views)]),
        format('SELECT migrate._route_now(%s, %L, %L, %L, %L, %L)', m.id, caller, percent, predicates, forward, skipped), deadline, coalesce(dry_run, false));
    IF dry_run THEN
        RETURN format(E'%s -> %1$s, reads from the target: %s -> %2$s (dry run: undone)\n', m.phase, before)
            || migrate._switch_report(CASE WHEN forward THEN 'read' ELSE 'back' END, skipped,
                   (SELECT string_agg(format('locked: %s, ACCESS EXCLUSIVE', r), E'\n' ORDER BY r) FROM unnest(views) r), done.result,
                   format('locks: all got at attempt %s within %s ms, held for %s ms', done.attempts, done.lock_ms, done.held_ms));
    END IF;
    PERFORM migrate._event(m, caller, 'route', format('reads from the target: %s -> %s; attempts: %s; waited for locks: %s ms; gates skipped: %s; %s', before, migrate._routes_text(m.id),
        done.attempts, done.lock_ms, coalesce(array_to_string(nullif(skipped, '{}'), ', '), 'none'), replace(done.result, E'\n', '; ')));
    -- @point route: event written
    RETURN format('%s -> %s, reads from the target: %s -> %s', m.phase, m.phase, before, migrate._routes_text(m.id));
END $$;

CREATE VIEW migrate.routes WITH (security_barrier) AS
    SELECT m.name AS migration, v.view, v.percent, v.predicate, v.routed_since AS since, v.routed_by AS by
    FROM migrate._view v JOIN migrate._migration m ON m.id = v.migration WHERE v.use = 'read' AND pg_has_role(m.owner, 'MEMBER');
COMMENT ON VIEW migrate.routes IS 'which reads of your views for reading go to the target: so many in a hundred keys, or those that a predicate is true for';

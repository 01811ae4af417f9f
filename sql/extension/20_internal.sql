-- What every verb needs: find the migration, check who asks, move between phases, write events.
-- Internal functions begin with _ and are revoked from PUBLIC (90_grants.sql). They run as the extension's owner with
-- search_path = pg_catalog, pg_temp, set by the bracket in src/verb.cpp; `caller` is the role that called the public verb.

-- Raises; the one place that gives an error its SQLSTATE, DETAIL and HINT ('' for none). It leaves out the context: where in
-- our SQL a user's mistake was noticed does not help the user.
CREATE FUNCTION migrate._raise(sqlstate text, message text, detail text DEFAULT '', hint text DEFAULT '') RETURNS void
LANGUAGE C STRICT AS 'MODULE_PATHNAME', 'migrate_raise';

CREATE FUNCTION migrate._table_owner(relation regclass) RETURNS regrole
LANGUAGE C STABLE STRICT AS 'MODULE_PATHNAME', 'migrate_table_owner';

CREATE FUNCTION migrate._relation_name(relation regclass) RETURNS text
LANGUAGE C STABLE STRICT AS 'MODULE_PATHNAME', 'migrate_relation_name';

-- A table, then its partitions of every depth. Row triggers are cloned to partitions by PostgreSQL; statement triggers are not.
CREATE FUNCTION migrate._partition_tree(relation regclass) RETURNS SETOF regclass
LANGUAGE sql STABLE COST 1000 ROWS 5 AS $$
    SELECT relation UNION ALL SELECT relid FROM pg_partition_tree(relation) WHERE relid <> relation
$$;

-- The role that owned it was dropped, and its tables were given to another: so is the migration. (With its tables it is a superuser's.)
CREATE FUNCTION migrate._inherit(m migrate._migration) RETURNS migrate._migration
LANGUAGE sql AS $$
    UPDATE migrate._migration x SET owner = coalesce((SELECT c.relowner::regrole FROM migrate._flow f JOIN pg_class c ON c.oid = f.source WHERE f.migration = m.id ORDER BY f.id LIMIT 1), m.owner)
    WHERE x.id = m.id RETURNING x
$$;

-- Waits for who has the migration: another verb whose transaction is still open, most likely. He is named when that takes long, for else
-- nobody would know why nothing happens. (A lock_timeout that is as short says enough.)
CREATE FUNCTION migrate._await(name text) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    before text := current_setting('lock_timeout');
BEGIN
    IF (SELECT s.setting::integer BETWEEN 1 AND 2000 FROM pg_settings s WHERE s.name = 'lock_timeout') THEN
        RETURN;
    END IF;
    BEGIN
        PERFORM set_config('lock_timeout', '2s', true);
        PERFORM FROM migrate._migration x WHERE x.name = _await.name FOR UPDATE;
        PERFORM set_config('lock_timeout', before, true);
        RETURN;
    EXCEPTION WHEN lock_not_available THEN NULL;
    END;
    RAISE NOTICE 'migration "%" is in use, this call waits: %', name, coalesce((SELECT string_agg(DISTINCT h, ', ') FROM migrate._migration x, unnest(migrate._holders(x.xmax)) h WHERE x.name = _await.name), 'another session')
        USING HINT = 'SELECT pid, state, query FROM pg_stat_activity WHERE xact_start IS NOT NULL; shows what that does; let it COMMIT, or end it by pg_terminate_backend.';
END $$;

-- The migration called `name`, locked against every other verb and against the worker's current batch until the transaction
-- ends; raises unless `caller` is a member of its owner and still a member of the owners of all its tables.
CREATE FUNCTION migrate._lock(caller regrole, name text) RETURNS migrate._migration
LANGUAGE plpgsql AS $$
DECLARE
    m migrate._migration;
    f record;
BEGIN
    SELECT * INTO m FROM migrate._migration x WHERE x.name = _lock.name FOR UPDATE SKIP LOCKED;
    IF m.id IS NULL AND EXISTS (SELECT FROM migrate._migration x WHERE x.name = _lock.name AND pg_has_role(caller, x.owner, 'MEMBER')) THEN
        PERFORM migrate._await(name);
        SELECT * INTO m FROM migrate._migration x WHERE x.name = _lock.name FOR UPDATE;
    END IF;
    IF m.id IS NOT NULL AND NOT EXISTS (SELECT FROM pg_roles r WHERE r.oid = m.owner) THEN
        m := migrate._inherit(m);
    END IF;
    IF m.id IS NULL OR NOT pg_has_role(caller, m.owner, 'MEMBER') THEN
        PERFORM migrate._raise('42704', format('migration "%s" does not exist', name), '',
            'SELECT name, phase FROM migrate.migration; lists yours.');
    END IF;
    FOR f IN SELECT c.oid::regclass AS relation, c.relowner FROM migrate._flow w JOIN pg_class c ON c.oid IN (w.source, w.target)
             WHERE w.migration = m.id LOOP
        PERFORM migrate._require_member(caller, f.relation);
    END LOOP;
    PERFORM migrate._lend_views(m);
    RETURN m;
END $$;

-- The mapping views belong to the extension's owner; the owners of the tables they feed and read are lent them: dest's for the
-- dual writes and the copy, origin's for validation after cutover, which asks of the source's own rows whether the filter had
-- carried them over. An owner may change at any time: he who was one gives back what he was lent. True where somebody was lent one
-- anew.
CREATE FUNCTION migrate._lend_views(m migrate._migration) RETURNS boolean
LANGUAGE plpgsql AS $$
DECLARE
    l record;
    lent boolean := false;
BEGIN
    FOR l IN SELECT p.view, o.role, k.privilege FROM migrate._mapping p JOIN migrate._flow f ON f.id = p.flow JOIN pg_class c ON c.oid = p.view,
                    LATERAL (VALUES (migrate._table_owner(p.dest), '{SELECT,UPDATE}'::text[]), (migrate._table_owner(p.origin), '{SELECT}')) o(role, privileges),
                    LATERAL unnest(o.privileges) k(privilege)
             WHERE f.migration = m.id AND NOT has_table_privilege(o.role, p.view, k.privilege) LOOP
        EXECUTE format('GRANT %s ON %s TO %s', l.privilege, l.view, l.role);
        lent := true;
    END LOOP;
    FOR l IN SELECT DISTINCT p.view, a.grantee::regrole AS role FROM migrate._mapping p JOIN migrate._flow f ON f.id = p.flow JOIN pg_class c ON c.oid = p.view,
                    aclexplode(c.relacl) a
             WHERE f.migration = m.id AND a.grantee NOT IN (0, c.relowner, migrate._table_owner(p.dest), migrate._table_owner(p.origin)) LOOP
        EXECUTE format('REVOKE ALL ON %s FROM %s', l.view, l.role);
    END LOOP;
    RETURN lent;
END $$;

-- Takes from everybody but its owner whatever default privileges have given them on an object of ours, of this kind and name.
CREATE FUNCTION migrate._revoke_all(object oid, kind text, name text) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    grantee oid;
BEGIN
    FOR grantee IN
        SELECT DISTINCT a.grantee FROM (
            SELECT c.relacl AS acl, c.relowner AS owner FROM pg_class c WHERE c.oid = object AND kind IN ('TABLE', 'SEQUENCE') UNION ALL
            SELECT p.proacl, p.proowner FROM pg_proc p WHERE p.oid = object AND kind = 'ROUTINE' UNION ALL
            SELECT t.typacl, t.typowner FROM pg_type t WHERE t.oid = object AND kind = 'TYPE' UNION ALL
            SELECT n.nspacl, n.nspowner FROM pg_namespace n WHERE n.oid = object AND kind = 'SCHEMA') o, aclexplode(o.acl) a
        WHERE a.grantee <> o.owner LOOP
        EXECUTE format('REVOKE ALL ON %s %s FROM %s', kind, name, CASE grantee WHEN 0 THEN 'PUBLIC' ELSE grantee::regrole::text END);
    END LOOP;
END $$;

-- Raises 42501 unless caller is a member of the relation's owner.
CREATE FUNCTION migrate._require_member(caller regrole, relation regclass) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
    IF NOT pg_has_role(caller, migrate._table_owner(relation), 'MEMBER') THEN
        PERFORM migrate._raise('42501', format('role %s does not own table %s', caller, relation),
            format('Its owner is %s. The extension copies rows and adds triggers for the owner alone.', migrate._table_owner(relation)),
            format('Call this as that role, or as a member of it: SET ROLE %s;', migrate._table_owner(relation)));
    END IF;
END $$;

-- Appends an event and notifies channel "migrate" of it as JSON.
CREATE FUNCTION migrate._event(m migrate._migration, caller regrole, kind text, why text DEFAULT NULL,
                               from_phase text DEFAULT NULL, to_phase text DEFAULT NULL) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    e migrate._event;
BEGIN
    INSERT INTO migrate._event (migration, name, owner, by, kind, from_phase, to_phase, why)
    VALUES (m.id, m.name, m.owner, coalesce(caller::text, 'worker'), kind, from_phase, to_phase, why) RETURNING * INTO e;
    -- Anybody may LISTEN: who did it and why (an error's message may hold data) is for those who may read the view.
    PERFORM pg_notify('migrate', (to_jsonb(e) - '{why,by,owner}'::text[])::text);
END $$;

-- Moves from one phase to the next by compare-and-swap, with its event. Returns the new row; raises when the migration is
-- in another phase by now or the move is not one of _phase_move.
CREATE FUNCTION migrate._move(m migrate._migration, caller regrole, to_phase text, why text) RETURNS migrate._migration
LANGUAGE plpgsql AS $$
DECLARE
    moved migrate._migration;
BEGIN
    IF NOT EXISTS (SELECT FROM migrate._phase_move p WHERE p.from_phase = m.phase AND p.to_phase = _move.to_phase) THEN
        PERFORM migrate._raise('55000', format('migration "%s" cannot go from %s to %s', m.name, m.phase, to_phase));
    END IF;
    UPDATE migrate._migration x SET phase = _move.to_phase, phase_since = clock_timestamp()
    WHERE x.id = m.id AND x.phase = m.phase RETURNING * INTO moved;
    IF NOT FOUND THEN
        PERFORM migrate._raise('55000', format('migration "%s" has left phase %s meanwhile', m.name, m.phase));
    END IF;
    PERFORM migrate._event(moved, caller, 'phase', why, m.phase, to_phase);
    RETURN moved;
END $$;

-- The non-constant part of a mapping's key, aligned: names and types on both sides.
CREATE FUNCTION migrate._key(flow integer, direction text, OUT ordinal integer, OUT origin_column name, OUT origin_type text,
                             OUT view_column name, OUT dest_column name, OUT dest_type text) RETURNS SETOF record
LANGUAGE sql STABLE AS $$
    SELECT (row_number() OVER (ORDER BY k.i))::int, o.attname, format_type(o.atttypid, o.atttypmod), v.attname, d.attname,
           format_type(d.atttypid, d.atttypmod)
    FROM migrate._mapping m CROSS JOIN LATERAL generate_subscripts(m.key_dest, 1) AS k(i)
    JOIN pg_attribute o ON o.attrelid = m.origin AND o.attnum = m.key_origin[k.i]
    JOIN pg_attribute v ON v.attrelid = m.view AND v.attnum = m.key_view[k.i]
    JOIN pg_attribute d ON d.attrelid = m.dest AND d.attnum = m.key_dest[k.i]
    WHERE m.flow = _key.flow AND m.direction = _key.direction AND m.key_origin[k.i] > 0
$$;

-- Runs one query as `role` in a restricted context (see security rules in README) and gives each row as text[].
-- For everything that evaluates user code or reads user data; the query's values are passed as params, never pasted.
CREATE FUNCTION migrate._as(role regrole, query text, VARIADIC params text[] DEFAULT '{}') RETURNS SETOF text[]
LANGUAGE C AS 'MODULE_PATHNAME', 'migrate_as';

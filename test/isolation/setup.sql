-- What the specs call. Loaded into two databases: one where src is migrated to dst, and (dual_writes = off) the control, which
-- knows nothing of the extension: there dst and the view are simply other names of src. The same permutations run in both, and
-- an application must meet the same errors and leave the same rows (test/lib/compare_control).
\set ON_ERROR_STOP on

-- The one oracle: 'ok' where both sides have the same rows and nothing is left to be done; and the rows.
CREATE FUNCTION verdict(OUT verdict text, OUT rows text) LANGUAGE plpgsql AS $$
DECLARE
    here record := sides();
    difference text;
BEGIN
    EXECUTE format($q$ SELECT (SELECT 'DIFFERENT: ' || string_agg(d::text, ' ' ORDER BY d) FROM (
        (SELECT 'source' AS only_in, id, v FROM %1$s s(id, v) EXCEPT SELECT 'source', id, v FROM %2$s t(id, v))
        UNION ALL (SELECT 'target', id, v FROM %2$s t(id, v) EXCEPT SELECT 'target', id, v FROM %1$s s(id, v))) d),
        (SELECT string_agg(id || ' ' || v, ', ' ORDER BY id, v) FROM %1$s s(id, v)) $q$, here.source, here.target) INTO difference, rows;
    verdict := coalesce(nullif(concat_ws(' ', unfinished(), difference), ''), 'ok');
END $$;

-- (Into a view there is no MERGE before PostgreSQL 17, so where the target is one, a step cannot say it.)
CREATE FUNCTION merge_into(relation regclass, key text, value text) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    EXECUTE format($q$ MERGE INTO %1$s USING (VALUES (1, NULL), (2, 'merged'), (4, 'four')) AS new (id, v) ON %1$s.%2$I = new.id
        WHEN MATCHED AND new.v IS NULL THEN DELETE
        WHEN MATCHED THEN UPDATE SET %3$I = new.v
        WHEN NOT MATCHED THEN INSERT VALUES (new.id, new.v) $q$, relation, key, value);
END $$;

\if :dual_writes

CREATE FUNCTION unfinished() RETURNS text LANGUAGE sql AS $$
    SELECT string_agg(kind || ' ' || key::text, ', ') FROM (
        SELECT 'queued' AS kind, key FROM migrate._requeue UNION ALL SELECT 'failed with ' || sqlstate, key FROM migrate._failure) x
$$;

-- By their OIDs, for either may have another name by now.
CREATE FUNCTION sides(OUT source regclass, OUT target regclass) LANGUAGE sql AS 'SELECT source, target FROM migrate._flow';

CREATE FUNCTION merge_target() RETURNS void LANGUAGE plpgsql AS $$ BEGIN PERFORM merge_into('dst', 'key', 'value'); END $$;

CREATE FUNCTION no_change() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';

-- Dual writes are on, nothing is copied. A migration that was never switched is used again by the next permutation.
-- path: sql: a trigger of the target keeps everything to SQL; place: the batch reads the source in the order of place; place sql: by the
-- keys of the rows that are there, for such a trigger has come since; swap: the cutover gives the target the source's name; source view:
-- the source steps aside for a view.
CREATE FUNCTION prepare(key_definition text DEFAULT 'PRIMARY KEY', path text DEFAULT 'any') RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    IF obj_description(to_regclass('src')) = concat_ws(' ', key_definition, path) THEN
        TRUNCATE src;
        INSERT INTO src VALUES (1, 'one'), (2, 'two'), (3, 'three');
        TRUNCATE dst;
        RETURN;
    END IF;
    PERFORM remove();
    EXECUTE format('CREATE TABLE src (id int %s, v text)', key_definition);
    EXECUTE format('COMMENT ON TABLE src IS %L', concat_ws(' ', key_definition, path));
    IF path = 'swap' THEN
        CREATE TABLE dst (id bigint PRIMARY KEY, v text, note text);
    ELSE
        CREATE TABLE dst (key int PRIMARY KEY, value text, note text);
    END IF;
    IF path ~ 'sql' THEN
        CREATE TRIGGER no_change AFTER INSERT ON dst FOR EACH STATEMENT EXECUTE FUNCTION no_change();
    END IF;
    INSERT INTO src VALUES (1, 'one'), (2, 'two'), (3, 'three');
    PERFORM migrate.define('race', source => 'src', target => 'dst', on_target_delete => 'delete',
        mapping => CASE path WHEN 'swap' THEN 'id, v' ELSE 'id AS key, v AS value' END);
    CASE path WHEN 'swap' THEN PERFORM migrate.set('race', 'cutover', 'swap');
              WHEN 'source view' THEN PERFORM migrate.add_view('race', 'src', shape => 'source');
              ELSE PERFORM migrate.add_view('race', 'served'); END CASE;
    PERFORM migrate._create_triggers(m, 'forward'), migrate._note_fingerprints(m) FROM migrate._migration m;
    UPDATE migrate._flow SET by_place = path ~ 'place';
END $$;

CREATE FUNCTION clean() RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    DELETE FROM migrate._requeue;
    DELETE FROM migrate._failure;
    IF EXISTS (SELECT FROM migrate._migration WHERE phase <> 'planned') THEN
        PERFORM remove();
    END IF;
END $$;

CREATE FUNCTION remove() RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    here record := sides();
BEGIN
    IF EXISTS (SELECT FROM migrate._migration) THEN
        UPDATE migrate._migration SET phase = 'ready';
        PERFORM migrate.cancel('race');
        PERFORM migrate.drop('race');
        EXECUTE format('DROP TABLE %s, %s CASCADE', here.source, here.target);
    END IF;
END $$;

-- What a worker does in one batch: copy, and queue what was locked.
CREATE FUNCTION copy() RETURNS text LANGUAGE sql AS $$
    WITH batch AS MATERIALIZED (SELECT f.id, r.skipped FROM migrate._flow f, LATERAL (
        SELECT skipped FROM migrate._apply_range(f.id, NULL, NULL, 100) WHERE NOT f.by_place
        UNION ALL SELECT skipped FROM migrate._apply_places(f.id, pg_relation_filenode(f.source), NULL, NULL, 100) WHERE f.by_place) r),
    queued AS (INSERT INTO migrate._requeue (flow, key) SELECT id, ARRAY[skipped[i][1]] FROM batch, generate_subscripts(skipped, 1) i)
    SELECT 'skipped ' || coalesce((SELECT array_agg(ARRAY[skipped[i][1]] ORDER BY skipped[i][1]) FROM generate_subscripts(skipped, 1) i)::text, 'none') FROM batch
$$;

-- What it does until the queue is empty.
CREATE FUNCTION drain() RETURNS text LANGUAGE sql AS $$
    WITH queued AS (DELETE FROM migrate._requeue RETURNING flow, key),
    applied AS (SELECT flow, migrate._apply_keys(flow, 'forward', array_agg(key)) AS locked FROM queued GROUP BY flow),
    again AS (INSERT INTO migrate._requeue (flow, key) SELECT flow, ARRAY[locked[i][1]] FROM applied, generate_subscripts(locked, 1) i)
    SELECT 'still locked ' || coalesce((SELECT locked::text FROM applied), 'none')
$$;

-- Everything is copied and the DBA may switch. A switch that finds a lock taken waits in the queue here, which the tester can tell;
-- one that finds an old snapshot refuses after a moment.
CREATE FUNCTION ready() RETURNS text LANGUAGE plpgsql AS $$
BEGIN
    PERFORM copy();
    UPDATE migrate._migration SET phase = 'ready';
    PERFORM migrate.set('race', 'require', 'dual_writes,failures,requeue,reverse,snapshots');
    PERFORM migrate.set('race', 'lock_timeout', '60 s');
    PERFORM migrate.set('race', 'cutover_timeout', '20 ms');
    RETURN 'ready';
END $$;

-- The tester's own looks at who waits hold a snapshot for a moment, too: only a session that keeps one is a reason to refuse.
CREATE FUNCTION called(verb text) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    answer text;
BEGIN
    LOOP
        BEGIN
            EXECUTE 'SELECT migrate.' || verb INTO answer;
            RETURN answer;
        EXCEPTION WHEN lock_not_available THEN
            answer := SQLERRM;
        END;
        PERFORM pg_stat_clear_snapshot();
        IF EXISTS (SELECT FROM pg_stat_activity WHERE state LIKE 'idle in transaction%' AND backend_xmin IS NOT NULL) THEN
            RETURN answer;
        END IF;
    END LOOP;
END $$;

CREATE FUNCTION cutover() RETURNS text LANGUAGE sql AS $$ SELECT called($c$cutover('race')$c$) $$;
CREATE FUNCTION rollback() RETURNS text LANGUAGE sql AS $$ SELECT called($c$rollback('race')$c$) $$;

-- Another view of the same rows, for reading alone; and by which keys it reads the target.
CREATE FUNCTION routed_view() RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    IF to_regclass('routed') IS NULL THEN
        PERFORM migrate.add_view('race', 'routed', use => 'read');
    END IF;
END $$;
CREATE FUNCTION route(predicate text) RETURNS text LANGUAGE sql AS $$ SELECT called(format('route(%L, predicate => %L)', 'race', predicate)) $$;

-- The target's owner fills a column that is not mapped.
CREATE FUNCTION note(key int) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    UPDATE dst SET note = 'noted' WHERE dst.key = note.key;
END $$;

-- A target row without its source row, as a delete leaves that the target has refused; and what a worker does about it.
CREATE FUNCTION leave_orphan(key int) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO dst VALUES (key, 'orphan');
    INSERT INTO migrate._failure (flow, direction, key, sqlstate, origin, retry_at)
    SELECT id, 'forward', ARRAY[leave_orphan.key::text], '23503', 'dual_write', 'infinity' FROM migrate._flow;
END $$;
CREATE FUNCTION retry(key int) RETURNS text LANGUAGE plpgsql AS $$
BEGIN
    DELETE FROM migrate._failure x WHERE x.key = ARRAY[retry.key::text] AND migrate._apply_keys(x.flow, 'forward', ARRAY[x.key]) IS NULL;
    RETURN CASE WHEN FOUND THEN 'done' ELSE 'locked, or done before' END;
END $$;
CREATE FUNCTION retry_all() RETURNS void LANGUAGE sql AS 'SELECT retry(x.key[1]::int) FROM migrate._failure x';

\else

CREATE FUNCTION unfinished() RETURNS text LANGUAGE sql AS 'SELECT NULL';
CREATE FUNCTION sides(OUT source regclass, OUT target regclass) LANGUAGE sql AS $$ SELECT to_regclass('src'), to_regclass('dst') $$;
CREATE FUNCTION merge_target() RETURNS void LANGUAGE plpgsql AS $$ BEGIN PERFORM merge_into('src', 'id', 'v'); END $$;
CREATE FUNCTION retry_all() RETURNS void LANGUAGE sql AS '';
CREATE FUNCTION prepare(key_definition text DEFAULT 'PRIMARY KEY', path text DEFAULT 'any') RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    EXECUTE format('CREATE TABLE src (id int %s, v text, note text)', key_definition);
    CREATE VIEW dst AS SELECT id AS key, v AS value, note FROM src;
    CREATE VIEW served AS SELECT id AS key, v AS value FROM src;
    CREATE VIEW src_old AS SELECT id, v FROM src;
    INSERT INTO src VALUES (1, 'one'), (2, 'two'), (3, 'three');
END $$;
CREATE FUNCTION clean() RETURNS void LANGUAGE sql AS 'DROP TABLE src CASCADE';
CREATE FUNCTION copy() RETURNS text LANGUAGE sql AS 'SELECT NULL';
CREATE FUNCTION drain() RETURNS text LANGUAGE sql AS 'SELECT NULL';
CREATE FUNCTION ready() RETURNS text LANGUAGE sql AS 'SELECT NULL';
CREATE FUNCTION cutover() RETURNS text LANGUAGE sql AS 'SELECT NULL';
CREATE FUNCTION rollback() RETURNS text LANGUAGE sql AS 'SELECT NULL';
CREATE FUNCTION routed_view() RETURNS void LANGUAGE sql AS 'CREATE VIEW routed AS TABLE served';
CREATE FUNCTION route(predicate text) RETURNS text LANGUAGE sql AS 'SELECT NULL';
CREATE FUNCTION note(key int) RETURNS void LANGUAGE sql AS 'SELECT';
CREATE FUNCTION leave_orphan(key int) RETURNS void LANGUAGE sql AS 'SELECT';
CREATE FUNCTION retry(key int) RETURNS text LANGUAGE sql AS 'SELECT NULL';

\endif

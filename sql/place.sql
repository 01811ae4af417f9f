-- The backfill in the order of place: when it is chosen, what it copies, and that rows which move meanwhile are not missed.
\set VERBOSITY terse
SET client_min_messages = warning;
SET jit = off;
CREATE SCHEMA place_test;
SET search_path = place_test;

CREATE FUNCTION the_flow() RETURNS migrate._flow LANGUAGE sql AS $$ SELECT f FROM migrate._flow f $$;
CREATE FUNCTION same() RETURNS text LANGUAGE plpgsql AS $$
BEGIN
    RETURN (SELECT CASE count(*) WHEN 0 THEN 'ok' ELSE count(*) || ' rows differ' END
            FROM ((SELECT id, v FROM s EXCEPT ALL TABLE t) UNION ALL (TABLE t EXCEPT ALL SELECT id, v FROM s)) x);
END $$;
-- Dual writes are on, and the ranges are made.
CREATE FUNCTION arm(pieces integer DEFAULT 1) RETURNS text LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    PERFORM migrate._arm(m.id, current_user::regrole, true) FROM migrate._migration m;
    PERFORM migrate._make_flow_ranges(f.id, pieces) FROM migrate._flow f;
    RETURN (SELECT CASE WHEN f.by_place THEN 'by place, ' ELSE 'by key, ' END || count(*) || ' ranges' FROM migrate._flow f, migrate._range r GROUP BY f.id);
END $$;
-- What the worker does.
CREATE FUNCTION batch(size integer, the_range integer DEFAULT 1) RETURNS text LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    d record;
BEGIN
    SELECT c.* INTO d FROM migrate._migration m, migrate._flow f,
        LATERAL migrate._run_copy(m, ROW(m.id, 0, 'copy', m.phase, f.id, the_range, NULL, size, 0, false, NULL, NULL)::migrate._job) c;
    RETURN (SELECT format('%s rows, %s', d.rows, CASE WHEN r.done THEN 'done' ELSE coalesce(r.checkpoint[1], 'nothing done') END) FROM migrate._range r WHERE r.ordinal = the_range);
END $$;
-- All batches that are left; what is refused is halved, or recorded.
CREATE FUNCTION copy_rest(size integer) RETURNS text LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    r migrate._range;
    refused_by text;
    n integer := 0;
BEGIN
    LOOP
        SELECT * INTO r FROM migrate._range x WHERE NOT x.done ORDER BY x.ordinal DESC LIMIT 1;
        EXIT WHEN NOT FOUND OR n > 10000;
        n := n + 1;
        BEGIN
            PERFORM place_test.batch(coalesce(r.row_limit, size), r.ordinal);
        EXCEPTION WHEN check_violation THEN
            GET STACKED DIAGNOSTICS refused_by = CONSTRAINT_NAME;
            PERFORM migrate._isolate(m, ROW(m.id, 0, 'copy', m.phase, r.flow, r.ordinal, NULL, coalesce(r.row_limit, size), 0, false, NULL, NULL)::migrate._job, SQLSTATE, refused_by)
            FROM migrate._migration m;
        END;
    END LOOP;
    RETURN format('%s rows, queued: %s, failures: %s', (SELECT sum(rows_done) FROM migrate._range), (SELECT string_agg(key::text, ' ') FROM migrate._requeue),
                  (SELECT string_agg(concat_ws(' ', key::text, sqlstate, object), ', ') FROM migrate._failure));
END $$;
CREATE FUNCTION defined(mapped text DEFAULT 'id, v') RETURNS text LANGUAGE plpgsql AS $$
BEGIN
    RETURN migrate.define('m', 'place_test.s', 'place_test.t', mapped) || ', ' || migrate.set('m', 'copy_order', 'place');
END $$;
CREATE FUNCTION again(pieces integer) RETURNS text LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    TRUNCATE place_test.t;
    PERFORM migrate._make_flow_ranges(f.id, pieces) FROM migrate._flow f;
    RETURN (SELECT string_agg(concat_ws(' to ', coalesce(low[1], 'the beginning'), high[1]) || CASE WHEN done THEN ' done' ELSE '' END, ', ' ORDER BY ordinal) FROM migrate._range);
END $$;
CREATE PROCEDURE reach(wanted text) LANGUAGE plpgsql AS $$
BEGIN
    FOR i IN 1 .. 6000 LOOP
        EXIT WHEN (SELECT m.phase = wanted OR m.failed_since IS NOT NULL FROM migrate._migration m);
        COMMIT;
        PERFORM pg_sleep(0.01);
    END LOOP;
END $$;
CREATE PROCEDURE forget() LANGUAGE plpgsql AS $$ BEGIN
    UPDATE migrate._migration SET phase = 'ready' WHERE phase <> 'planned';
    PERFORM migrate._drop_triggers(m, 'forward') FROM migrate._migration m;
    UPDATE migrate._migration SET phase = 'planned';
    PERFORM migrate.drop(name) FROM migrate._migration;
    DROP TABLE s, t;
END $$;

-- what is chosen, and why
CREATE TABLE s (id uuid PRIMARY KEY, n serial, v text, junk text) WITH (autovacuum_enabled = off); CREATE TABLE t (id uuid PRIMARY KEY, v text);
INSERT INTO s SELECT md5(g::text)::uuid, g, repeat(g::text, g % 20) FROM generate_series(1, 3000) g;
SELECT migrate.define('m', 's', 't', 'id, v');
SELECT o.* FROM migrate._copy_order(the_flow()) o;
SET effective_cache_size = '160kB';
SELECT o.* FROM migrate._copy_order(the_flow()) o;
SET effective_cache_size = '480kB';
SELECT o.* FROM migrate._copy_order(the_flow()) o;
ANALYZE s;
SELECT o.* FROM migrate._copy_order(the_flow()) o;
SELECT line FROM regexp_split_to_table(migrate.plan('m'), '\n') line WHERE line LIKE '**Backfill%';
SELECT migrate.set('m', 'copy_order', 'key');
SELECT o.* FROM migrate._copy_order(the_flow()) o;
CREATE FUNCTION nothing() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';
CREATE TRIGGER x AFTER INSERT ON t FOR EACH STATEMENT EXECUTE FUNCTION nothing();
SELECT migrate.set('m', 'copy_order', 'place');
SELECT o.* FROM migrate._copy_order(the_flow()) o;
DROP TRIGGER x ON t;
SELECT o.* FROM migrate._copy_order(the_flow()) o;
CLUSTER s USING s_pkey;
ANALYZE s;
SELECT migrate.set('m', 'copy_order', 'default');
SELECT o.* FROM migrate._copy_order(the_flow()) o;
RESET effective_cache_size;

-- batches of all sizes, which end within a block and at its end; several ranges; rows that are there already, and others
SELECT migrate.set('m', 'copy_order', 'place');
SELECT arm();
SELECT batch(10), batch(1), batch(5000), same();
SELECT again(3), copy_rest(57), same(), (SELECT count(*) FROM s WHERE xmax <> 0) AS locked;
SELECT again(5), copy_rest(100), same();
SELECT again(1), copy_rest(500), same();
UPDATE migrate._range SET checkpoint = NULL, done = false;
SELECT batch(100);
SELECT copy_rest(1000), same();
DELETE FROM t WHERE id::text < '2'; UPDATE t SET v = 'stale' WHERE id::text > 'd';
UPDATE migrate._range SET checkpoint = NULL, done = false;
SELECT copy_rest(1000), same();
-- blocks that came after the ranges, or have gone
SELECT again(2);
INSERT INTO s SELECT md5(g::text)::uuid, g, 'late' FROM generate_series(3001, 4000) g;
DELETE FROM s WHERE n < 100 OR n > 3900;
SELECT copy_rest(190), same();
SELECT again(4);
DELETE FROM s WHERE n > 50;
VACUUM (FREEZE, TRUNCATE) s;
SELECT copy_rest(190), same();
CALL forget();

-- a row moves from a block that is not read yet to one that has been; by an update of a column that is not mapped, committed and not
CREATE TABLE s (id int PRIMARY KEY, v text, wide text) WITH (autovacuum_enabled = off); CREATE TABLE t (id int PRIMARY KEY, v text);
ALTER TABLE s ALTER wide SET STORAGE PLAIN;
INSERT INTO s VALUES (1, 'one', ''); INSERT INTO s VALUES (2, 'two', repeat('x', 8100)); INSERT INTO s VALUES (3, 'three', repeat('x', 8100)); INSERT INTO s VALUES (4, 'four', repeat('x', 8100));
SELECT defined();
SELECT arm(), batch(2);
UPDATE s SET wide = '' WHERE id = 3;
BEGIN; UPDATE s SET wide = '' WHERE id = 4; ROLLBACK;
SELECT id, ctid FROM s ORDER BY id;
SELECT copy_rest(1), same();
SELECT xmax <> 0 AS carried FROM t WHERE id = 2;
UPDATE s SET wide = 'y' WHERE id = 2;
SELECT xmax <> 0 AS carried FROM t WHERE id = 2;
UPDATE migrate._migration SET phase = 'backfilling';
SELECT migrate._end_backfill(m) FROM migrate._migration m;
UPDATE s SET wide = 'y' WHERE id = 1;
SELECT xmax <> 0 AS carried FROM t WHERE id = 1;
UPDATE s SET v = 'changed' WHERE id = 1;
SELECT same();
CALL forget();

-- the table is written anew between two batches
CREATE TABLE s (id int PRIMARY KEY, v text) WITH (autovacuum_enabled = off); CREATE TABLE t (id int PRIMARY KEY, v text);
INSERT INTO s SELECT 1000 - g, 'v' || g FROM generate_series(1, 900) g;
SELECT defined();
SELECT arm(), batch(300);
CLUSTER s USING s_pkey;
SELECT batch(300);
SELECT batch(300), copy_rest(300), same();
SELECT kind, why FROM migrate.events WHERE kind = 'copied anew';
SELECT again(2), batch(10, 1), batch(10, 2);
VACUUM FULL s;
SELECT batch(10, 2), copy_rest(300), same();
SELECT again(1), batch(10);
TRUNCATE s;
INSERT INTO s SELECT g, 'again' FROM generate_series(1, 20) g;
SELECT copy_rest(7), same();
TRUNCATE s;
SELECT again(3), copy_rest(7), same();
INSERT INTO s SELECT g, 'once more' FROM generate_series(1, 20) g;
SELECT again(1), batch(7);
UPDATE migrate._flow SET copied_file = NULL;
SELECT batch(7), copy_rest(7), same();
SELECT why FROM migrate.events WHERE kind = 'copied anew' AND why LIKE '%unseen';
CALL forget();

-- a row that the target refuses
CREATE TABLE s (id int PRIMARY KEY, v text) WITH (autovacuum_enabled = off); CREATE TABLE t (id int PRIMARY KEY, v text CONSTRAINT good CHECK (v <> 'bad'));
INSERT INTO s SELECT 1000 - g, CASE WHEN g IN (50, 51, 777, 900) THEN 'bad' ELSE 'v' || g END FROM generate_series(1, 900) g;
SELECT defined();
SELECT arm(), copy_rest(256), same();
CALL forget();

-- where the target gets a trigger: by key, under row locks; of large rows fewer at once
CREATE TABLE s (a text, id int, v text, PRIMARY KEY (id, a)) WITH (autovacuum_enabled = off); CREATE TABLE t (id int, a text, v text, PRIMARY KEY (id, a));
ALTER TABLE s ALTER v SET STORAGE EXTERNAL;
INSERT INTO s SELECT 'a"'',{' || g % 3, 1000 - g, CASE WHEN g < 5 THEN repeat('x', 100000) ELSE 'v' || g END FROM generate_series(1, 500) g;
SELECT defined('a, id, v');
SELECT arm(), batch(3);
CREATE TRIGGER x AFTER INSERT ON t FOR EACH STATEMENT EXECUTE FUNCTION nothing();
SELECT batch(90), batch(90);
DELETE FROM s WHERE id = 600; UPDATE s SET id = 2000 WHERE id = 601; UPDATE s SET v = 'new' WHERE id = 602;
SELECT copy_rest(90), (SELECT count(*) FROM s WHERE xmax <> 0) AS locked;
SELECT count(*), count(*) FILTER (WHERE s.v IS NOT DISTINCT FROM t.v) AS equal FROM s FULL JOIN t USING (id, a);
SELECT r.rows_done, r.reached, array_length(r.skipped, 1) FROM migrate._flow f, migrate._apply_places(f.id, f.copied_file, NULL, NULL, 1000, 150000) r;
DROP TRIGGER x ON t;
TRUNCATE t;
SELECT r.rows_done, r.reached FROM migrate._flow f, migrate._apply_places(f.id, f.copied_file, NULL, NULL, 1000, 150000) r;
SELECT n.* FROM migrate._flow f, migrate._next_places(f.id, f.copied_file, '{"(0,2)"}', '{"(1,0)"}', 2) n;
SELECT r.* FROM migrate._flow f, migrate._apply_places(f.id, 1, NULL, NULL, 1000) r;
SELECT r.* FROM migrate._flow f, migrate._apply_places(f.id, f.copied_file, '{1,2}', NULL, 1000) r;
CALL forget();

-- a filter, a whole migration with several workers
CREATE TABLE s (id uuid PRIMARY KEY, v text, junk text); CREATE TABLE t (id uuid PRIMARY KEY, v text);
CREATE INDEX ON t (v);
INSERT INTO s SELECT md5(g::text)::uuid, g FROM generate_series(1, 5000) g;
SELECT migrate.define('m', 's', 't', 'id, v', filter => 'v <> ''7''');
SELECT migrate.set('m', 'copy_order', 'place'), migrate.set('m', 'workers', '3'), migrate.set('m', 'batch_size', '100');
SELECT migrate.start('m');
UPDATE s SET junk = v WHERE v LIKE '%3';
CALL reach('ready');
SELECT phase, by_place FROM migrate._migration m JOIN migrate._flow f ON f.migration = m.id;
SELECT count(*), sum(rows_done) >= 4000 AS copied, bool_and(high[1] ~ '^\(\d+,0\)$') AS places FROM migrate._range;
SELECT count(*) FROM t;
SELECT v FROM (SELECT id, v FROM s EXCEPT SELECT id, v FROM t) x;
SELECT line FROM regexp_split_to_table(migrate.plan('m'), '\n') line WHERE line LIKE '**Backfill%';
SELECT migrate.cancel('m'), migrate.drop('m');
DROP SCHEMA place_test CASCADE;

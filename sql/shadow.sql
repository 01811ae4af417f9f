-- Shadow reads: every type of key, tiny and partitioned tables, what differs is found and blocks cutover. The steps are called by hand here,
-- as the worker calls them, in one snapshot each.
\set SHOW_CONTEXT never
SET client_min_messages = warning;
SET jit = off;
CREATE SCHEMA shadow;
SET search_path = shadow;
\pset tuples_only on
\pset format unaligned
CREATE TABLE s_int (id int PRIMARY KEY, v text, n numeric);
CREATE TABLE t_int (id bigint PRIMARY KEY, v text, n numeric);
CREATE TABLE s_many (a text, b uuid, c timestamptz, d numeric, v text, PRIMARY KEY (a, b, c, d));
CREATE TABLE t_many (kind text, b uuid, a text, d numeric, c timestamptz, v varchar(9), PRIMARY KEY (kind, b, a, d, c));
CREATE TABLE s_part (id int, region text, v text, PRIMARY KEY (region, id)) PARTITION BY LIST (region);
CREATE TABLE s_part_eu PARTITION OF s_part FOR VALUES IN ('eu');
CREATE TABLE s_part_us PARTITION OF s_part DEFAULT;
CREATE TABLE t_part (id int, region text, v text, PRIMARY KEY (region, id)) PARTITION BY HASH (id);
CREATE TABLE t_part_0 PARTITION OF t_part FOR VALUES WITH (MODULUS 2, REMAINDER 0);
CREATE TABLE t_part_1 PARTITION OF t_part FOR VALUES WITH (MODULUS 2, REMAINDER 1);
CREATE TABLE s_tiny (id int PRIMARY KEY, v text);
CREATE TABLE t_tiny (id int PRIMARY KEY, v text);
CREATE TABLE s_none (id int PRIMARY KEY, v text);
CREATE TABLE t_none (id int PRIMARY KEY, v text);
CREATE TABLE s_err (id int PRIMARY KEY, v text, d int NOT NULL);
CREATE TABLE t_err (id int PRIMARY KEY, q int);
SELECT migrate.define('shadow', 's_int', 't_int', 'id, v, n');
SELECT migrate.add_flow('shadow', 's_many', 't_many', $$ 'x' AS kind, a, b, c, d, v $$);
SELECT migrate.add_flow('shadow', 's_part', 't_part', 'id, region, upper(v) AS v', filter => 'id > 0');
SELECT migrate.add_flow('shadow', 's_tiny', 't_tiny');
SELECT migrate.add_flow('shadow', 's_none', 't_none');
SELECT migrate.add_flow('shadow', 's_err', 't_err', 'id, 10 / d AS q');
INSERT INTO s_int SELECT g, 'v' || g, g / 10.0 FROM generate_series(1, 1000) g;
INSERT INTO t_int SELECT id, v, n FROM s_int;
INSERT INTO s_many SELECT E'a,{"\\''\n' || g, md5(g::text)::uuid, '2020-01-01 00:00:00.000001+00'::timestamptz + g * interval '1 day', g / 3.0, 'v' FROM generate_series(1, 300) g;
INSERT INTO t_many SELECT 'x', b, a, d, c, v FROM s_many;
INSERT INTO t_many SELECT 'other', b, a, d, c, 'other' FROM s_many;
INSERT INTO s_part SELECT g - 10, CASE g % 3 WHEN 0 THEN 'eu' ELSE 'us' END, 'v' || g FROM generate_series(1, 500) g;
INSERT INTO t_part SELECT id, region, upper(v) FROM s_part WHERE id > 0;
INSERT INTO s_tiny VALUES (1, NULL);
INSERT INTO t_tiny VALUES (1, NULL);
INSERT INTO s_err SELECT g, NULL, 2 FROM generate_series(1, 100) g;
INSERT INTO t_err SELECT id, 5 FROM s_err;
ANALYZE s_int, s_many, s_part, s_tiny, s_err;
SELECT migrate.set('shadow', 'shadow_time', '10 s');

-- A step is due as much as the time since the last one; here time goes by as it is told to.
CREATE FUNCTION step(seconds int, m text DEFAULT 'shadow') RETURNS text LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    UPDATE migrate._shadow SET stepped_at = clock_timestamp() - make_interval(secs => seconds);
    RETURN migrate._shadow_step((SELECT id FROM migrate._migration WHERE name = m));
END $$;
CREATE PROCEDURE to_shadowing(m text DEFAULT 'shadow') LANGUAGE sql AS $$
    UPDATE migrate._migration x SET phase = 'shadowing' WHERE x.name = m;
    SELECT migrate._event(x, NULL::regrole, 'phase', 'test', 'validating', 'shadowing') FROM migrate._migration x WHERE x.name = m;
$$;
CREATE FUNCTION steps(n int, m text DEFAULT 'shadow') RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    verdict text;
BEGIN
    FOR i IN 1 .. n LOOP
        verdict := step(1, m);
        EXIT WHEN verdict <> 'more';
    END LOOP;
    RETURN verdict;
END $$;

-- Off, and on. Without a worker's read yet, the gate of cutover is shut.
SELECT migrate._shadow_gate(id) FROM migrate._migration WHERE name = 'shadow';
SELECT migrate.shadow('shadow', 1);
SELECT migrate.shadow('shadow', 1);
SELECT migrate.shadow('shadow', 1.5);
SELECT migrate.shadow('shadow', NULL);
SELECT migrate._shadow_gate(id) FROM migrate._migration WHERE name = 'shadow';

CALL to_shadowing();
BEGIN ISOLATION LEVEL REPEATABLE READ;
SELECT step(0);
COMMIT;
SELECT steps(100);
SELECT flow, direction, reads >= least(planned, 1000) AS enough, mismatches, source_avg_ms > 0 AS timed FROM migrate.shadow_reads ORDER BY flow;
SELECT coalesce(migrate._shadow_gate(id), 'open') FROM migrate._migration WHERE name = 'shadow';

-- Each kind of difference.
UPDATE t_int SET v = 'changed', n = -n;
DELETE FROM t_many WHERE kind = 'x';
INSERT INTO t_part SELECT g, 'eu', 'extra' FROM generate_series(10001, 10500) g;
UPDATE t_tiny SET v = '';
UPDATE s_err SET d = 0;
SELECT migrate.set('shadow', 'max_shadow_mismatch_rate', '100 %');
CALL to_shadowing();
SELECT step(0);
SELECT steps(100);
SELECT DISTINCT flow, kind, columns, sqlstate FROM migrate.shadow_mismatches ORDER BY 1, 2, 3;
SELECT DISTINCT key FROM migrate.shadow_mismatches WHERE flow = 'shadow.t_tiny';
SELECT migrate.set('shadow', 'max_shadow_mismatch_rate', '0.1 %');
SELECT regexp_split_to_table(regexp_replace(migrate._shadow_gate(id), '\d+ of \d+|rate [0-9.]+ >', '…', 'g'), '; ') FROM migrate._migration WHERE name = 'shadow';
SELECT regexp_split_to_table(regexp_replace(step(1), '\d+ of \d+|rate [0-9.]+ >', '…', 'g'), '; ');

-- After a refusal, going on begins a new run: what was mended is forgotten.
UPDATE t_int t SET v = s.v, n = s.n FROM s_int s WHERE s.id = t.id;
INSERT INTO t_many SELECT 'x', b, a, d, c, v FROM s_many;
DELETE FROM t_part WHERE id > 10000;
UPDATE t_tiny SET v = NULL;
UPDATE s_err SET d = 2;
SELECT steps(100);
SELECT sum(mismatches) FROM migrate.shadow_reads;
SELECT count(*) FROM migrate.shadow_mismatches;

-- Image and semantic equality.
CREATE TABLE s_eq (id int PRIMARY KEY, n numeric, j jsonb, x json);
CREATE TABLE t_eq (id int PRIMARY KEY, n numeric, j jsonb, x json);
INSERT INTO s_eq SELECT g, g, '{"a": 1}', '{}' FROM generate_series(1, 50) g;
INSERT INTO t_eq SELECT g, g::numeric(9, 2), '{"a": 1.0}', '{}' FROM generate_series(1, 50) g;
SELECT migrate.define('eq', 's_eq', 't_eq');
SELECT migrate.set('eq', 'shadow_time', '1 s'), migrate.shadow('eq', 1);
CALL to_shadowing('eq');
SELECT regexp_replace(steps(100, 'eq'), '\d+ of \d+|rate [0-9.]+', '…', 'g');
SELECT DISTINCT kind, columns FROM migrate.shadow_mismatches WHERE migration = 'eq';
SELECT migrate.set('eq', 'equality', 'semantic');
SELECT steps(100, 'eq');
SELECT reads > 0, mismatches FROM migrate.shadow_reads WHERE migration = 'eq';

-- A key that is known to differ is no news; a failing migration's rate is a matter of the limit.
UPDATE t_eq SET n = -1 WHERE id = 1;
DELETE FROM migrate._shadow WHERE flow = (SELECT id FROM migrate._flow WHERE source = 's_eq'::regclass);
INSERT INTO migrate._failure (flow, direction, key, sqlstate, origin) SELECT id, 'forward', '{1}', '23505', 'dual_write' FROM migrate._flow WHERE source = 's_eq'::regclass;
SELECT step(0, 'eq');
SELECT steps(100, 'eq');
SELECT mismatches FROM migrate.shadow_reads WHERE migration = 'eq';
DELETE FROM migrate._failure;
SELECT migrate.set('eq', 'max_shadow_mismatch_rate', '90 %');
CALL to_shadowing('eq');
SELECT step(0, 'eq');
SELECT steps(100, 'eq');
SELECT coalesce(migrate._shadow_gate(id), 'open') FROM migrate._migration WHERE name = 'eq';

-- What repair has mended does not bar the cutover until shadow_time is over.
SELECT migrate.set('eq', 'max_shadow_mismatch_rate', 'default');
UPDATE t_eq SET n = -1;
CALL to_shadowing('eq');
SELECT step(0, 'eq') IS NOT NULL AS stepped;
SELECT regexp_replace(steps(100, 'eq'), '\d+ of \d+|rate [0-9.]+', '…', 'g');
SELECT migrate._shadow_gate(id) IS NULL AS open FROM migrate._migration WHERE name = 'eq';
SELECT verdict FROM migrate.validate('eq');
SELECT migrate.repair('eq', execute => true);
SELECT migrate._shadow_gate(id) FROM migrate._migration WHERE name = 'eq';
SELECT steps(100, 'eq');
SELECT coalesce(migrate._shadow_gate(id), 'open') FROM migrate._migration WHERE name = 'eq';

-- After cutover the sides are the other way round: rows that are deleted from the target and kept in the source do not count.
UPDATE t_eq SET n = id;
DELETE FROM t_eq WHERE id > 40;
SELECT migrate.set('eq', 'on_target_delete', 'keep');
UPDATE migrate._migration SET phase = 'cut_over' WHERE name = 'eq';
SELECT step(0, 'eq');
SELECT steps(20, 'eq');
SELECT direction, reads + earlier_reads > 0, mismatches FROM migrate.shadow_reads WHERE migration = 'eq' AND direction = 'reverse';
DELETE FROM s_eq WHERE id < 20;
SELECT steps(20, 'eq');
SELECT DISTINCT kind FROM migrate.shadow_mismatches WHERE migration = 'eq' AND direction = 'reverse';
SELECT count(*) FROM migrate.events WHERE migration = 'eq' AND kind = 'shadow';

-- In reverse, what cannot be mapped back exactly is no difference where the mapping forward makes the target's row of the source's;
-- nor is a source row that the flow's filter leaves out. Keys of the two sides in one order, in another, and of other columns.
CREATE TABLE s_user (id bigint PRIMARY KEY, name text NOT NULL, bio text);
CREATE TABLE t_user (user_id bigint PRIMARY KEY, display_name text NOT NULL, bio text NOT NULL DEFAULT '');
CREATE TABLE s_order (a int, b text, bio text, PRIMARY KEY (a, b));
CREATE TABLE t_order (kind text, b text, a int, bio text NOT NULL, PRIMARY KEY (kind, b, a));
CREATE TABLE s_mail (id int PRIMARY KEY, mail text NOT NULL UNIQUE, bio text);
CREATE TABLE t_mail (mail text PRIMARY KEY, id int NOT NULL UNIQUE, bio text NOT NULL);
CREATE TABLE s_on (id int PRIMARY KEY, active boolean NOT NULL, v text, n int NOT NULL DEFAULT 1);
CREATE TABLE t_on (kind text, id int, active boolean NOT NULL, v text, PRIMARY KEY (kind, id));
SELECT migrate.define('back', 's_user', 't_user', $$ id AS user_id, name AS display_name, coalesce(bio, '') AS bio $$);
SELECT migrate.add_flow('back', 's_order', 't_order', $$ 'x' AS kind, a, b, coalesce(bio, '') AS bio $$);
SELECT migrate.add_flow('back', 's_mail', 't_mail', $$ mail, id, coalesce(bio, '') AS bio $$);
SELECT migrate.add_flow('back', 's_on', 't_on', $$ 'x' AS kind, id, active, v $$, filter => 'active AND 1 / n > 0', on_target_delete => 'delete');
SELECT migrate.set('back', 'shadow_time', '10 s'), migrate.shadow('back', 1);
INSERT INTO s_user SELECT g, 'user ' || g, CASE WHEN g % 2 = 0 THEN 'bio' END FROM generate_series(1, 100) g;
INSERT INTO t_user SELECT id, name, coalesce(bio, '') FROM s_user;
INSERT INTO s_order SELECT g, 'b' || g, CASE WHEN g % 2 = 0 THEN 'bio' END FROM generate_series(1, 100) g;
INSERT INTO t_order SELECT kind, b, a, coalesce(bio, '') || CASE kind WHEN 'x' THEN '' ELSE kind END FROM s_order, unnest('{other,x,z}'::text[]) kind;
INSERT INTO s_mail SELECT g, 'mail ' || g, CASE WHEN g % 2 = 0 THEN 'bio' END FROM generate_series(1, 100) g;
INSERT INTO t_mail SELECT mail, id, coalesce(bio, '') FROM s_mail;
INSERT INTO s_on SELECT g, g % 2 = 0, 'v' FROM generate_series(1, 100) g;
INSERT INTO t_on SELECT kind, id, active, v FROM s_on, unnest('{other,x}'::text[]) kind WHERE active OR kind = 'other';
ANALYZE t_user, t_order, t_mail, t_on;
UPDATE migrate._migration SET phase = 'cut_over' WHERE name = 'back';
SELECT step(0, 'back');
SELECT steps(20, 'back');
SELECT flow, reads + earlier_reads > 0, mismatches FROM migrate.shadow_reads WHERE migration = 'back' ORDER BY flow;
SELECT DISTINCT flow, kind, columns, sqlstate FROM migrate.shadow_mismatches WHERE migration = 'back' ORDER BY 1, 2, 3;
SELECT count(*) FROM migrate.events WHERE migration = 'back' AND kind = 'shadow';
-- What does differ is found nevertheless.
UPDATE s_user SET name = 'damaged' WHERE bio IS NULL;
UPDATE s_order SET bio = 'damaged';
UPDATE s_mail SET bio = NULL;
INSERT INTO s_on SELECT g, g % 2 = 0, 'extra' FROM generate_series(101, 200) g;
UPDATE s_on SET v = 'damaged' WHERE id <= 50;
DELETE FROM s_on WHERE id BETWEEN 51 AND 100;
-- (Keys are taken at random: until each kind has come, of each parity.)
CREATE FUNCTION steps_until(condition text) RETURNS boolean LANGUAGE plpgsql AS $$
DECLARE
    reached boolean;
BEGIN
    FOR i IN 1 .. 2000 LOOP
        EXECUTE 'SELECT ' || condition INTO reached;
        EXIT WHEN reached;
        PERFORM step(1, 'back');
    END LOOP;
    RETURN reached;
END $$;
SELECT steps_until($$ (SELECT count(DISTINCT (flow, kind, split_part(key, ',', 1)::int % 2)) = 7 FROM migrate.shadow_mismatches WHERE migration = 'back') $$);
SELECT DISTINCT flow, kind, columns, sqlstate FROM migrate.shadow_mismatches WHERE migration = 'back' ORDER BY 1, 2, 3;
SELECT flow, kind, array_agg(DISTINCT split_part(key, ',', 1)::int % 2) FROM migrate.shadow_mismatches WHERE migration = 'back' GROUP BY 1, 2 ORDER BY 1, 2;
-- Nor does the worker stop at rows that the filter refuses.
UPDATE s_on SET n = 0 WHERE id > 100;
SELECT steps_until($$ EXISTS (SELECT FROM migrate.shadow_mismatches WHERE flow = 'shadow.t_on' AND sqlstate IS NOT NULL) $$);
SELECT DISTINCT kind, sqlstate FROM migrate.shadow_mismatches WHERE flow = 'shadow.t_on' AND sqlstate IS NOT NULL;

-- Nobody else sees keys.
CREATE ROLE regress_migrate_shadow;
SELECT migrate.allow('regress_migrate_shadow', 'observe');
SET ROLE regress_migrate_shadow;
SELECT count(*) FROM migrate.shadow_reads;
SELECT count(*) FROM migrate.shadow_mismatches;
RESET ROLE;
SELECT migrate.allow('regress_migrate_shadow', 'nothing');
DROP ROLE regress_migrate_shadow;

UPDATE migrate._migration SET phase = 'planned';
SELECT count(migrate.drop(name)) FROM migrate.migration;
SELECT count(*) FROM migrate._shadow;
DROP SCHEMA shadow CASCADE;

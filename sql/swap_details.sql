-- A swap, detail by detail: policies that both tables have by the same name, the bounds of an identity, and a way back that
-- what has gone meanwhile does not bar.
\set SHOW_CONTEXT never
SET client_min_messages = warning;
SET jit = off;
CREATE SCHEMA swap_test;
SET search_path = swap_test;
CREATE ROLE regress_swap_app;
CREATE ROLE regress_swap_other;
GRANT USAGE ON SCHEMA swap_test TO regress_swap_app, regress_swap_other;
\i sql/include/swap_worked.sql

-- Policies of the same name: only one that says the same is taken for the source's, whatever the columns' order.
CREATE TABLE s (id int PRIMARY KEY, tenant name, v int);
CREATE TABLE t (v int, id bigint PRIMARY KEY, tenant name);
CREATE TABLE allowed (id int, who name);
INSERT INTO s VALUES (1, 'regress_swap_app', 1), (2, 'regress_swap_other', 2);
GRANT SELECT ON s, t, allowed TO regress_swap_app;
ALTER TABLE s ENABLE ROW LEVEL SECURITY;
ALTER TABLE t ENABLE ROW LEVEL SECURITY;
CREATE POLICY own ON s TO regress_swap_app USING (tenant = current_user);
CREATE POLICY own ON t FOR SELECT USING (true);
SELECT migrate.define('m', 's', 't', on_target_delete => 'delete');
SELECT migrate.set('m', 'cutover', 'swap');
SELECT message, hint FROM migrate.preflight('m') WHERE "check" IN ('swap', 'row_security') AND message ~ 'polic';
SELECT migrate.start('m');
\echo :LAST_ERROR_SQLSTATE
-- each part of it
CREATE PROCEDURE told(VARIADIC policies text[]) LANGUAGE plpgsql AS $$
DECLARE
    p text;
BEGIN
    FOREACH p IN ARRAY policies LOOP
        DROP POLICY own ON t;
        EXECUTE 'CREATE POLICY own ON t ' || p;
        RAISE WARNING '%: %', p, coalesce((SELECT concat_ws(' ', x.severity, x.message, x.hint) FROM migrate.preflight('m') x WHERE x."check" = 'swap' AND x.message ~ 'policy own'), 'the same');
    END LOOP;
END $$;
CALL told('USING (tenant = current_user)', 'TO regress_swap_app, regress_swap_other USING (tenant = current_user)', 'FOR SELECT TO regress_swap_app USING (tenant = current_user)',
    'AS RESTRICTIVE TO regress_swap_app USING (tenant = current_user)', 'TO regress_swap_app USING (tenant = current_user) WITH CHECK (true)',
    'TO regress_swap_app', 'TO regress_swap_app USING (tenant = session_user)', 'TO regress_swap_app USING (tenant = current_user)');
DROP POLICY own ON s;
CREATE POLICY own ON s TO regress_swap_other, regress_swap_app USING (tenant = current_user OR tenant IN (SELECT a.who FROM allowed a WHERE a.id = s.v)) WITH CHECK (id > 0);
CALL told('TO regress_swap_app, regress_swap_other USING (tenant = current_user OR tenant IN (SELECT a.who FROM allowed a WHERE a.id = t.v)) WITH CHECK (id > 0)');
-- One that cannot be made on the target has to be made there by hand; its roles and commands can be compared all the same.
ALTER TABLE t RENAME COLUMN tenant TO owned_by;
SELECT migrate.drop('m');
SELECT migrate.define('m', 's', 't', 'id, tenant AS owned_by, v', on_target_delete => 'delete');
SELECT migrate.set('m', 'cutover', 'swap');
CALL told('TO regress_swap_app, regress_swap_other USING (owned_by = current_user) WITH CHECK (true)', 'TO PUBLIC USING (owned_by = current_user) WITH CHECK (true)');
-- What a subquery calls the table is understood where the columns have the same numbers.
SELECT migrate.drop('m');
DROP TABLE t;
CREATE TABLE t (id bigint PRIMARY KEY, tenant name, v int);
GRANT SELECT ON t TO regress_swap_app;
ALTER TABLE t ENABLE ROW LEVEL SECURITY;
CREATE POLICY own ON t FOR SELECT USING (true);
SELECT migrate.define('m', 's', 't', on_target_delete => 'delete');
SELECT migrate.set('m', 'cutover', 'swap');
CALL told('TO regress_swap_app, regress_swap_other USING (tenant = current_user OR tenant IN (SELECT a.who FROM allowed a WHERE a.id = t.id)) WITH CHECK (id > 0)',
    'TO regress_swap_app, regress_swap_other USING (tenant = current_user OR tenant IN (SELECT a.who FROM allowed a WHERE a.id = t.v)) WITH CHECK (id > 0)');
SELECT migrate.start('m');
CALL worked('ready');
-- What comes after the start, the gate says; the hint helps.
DROP POLICY own ON t;
CREATE POLICY own ON t FOR SELECT USING (true);
SELECT migrate.cutover('m');
\echo :LAST_ERROR_SQLSTATE
DROP POLICY own ON swap_test.t;
SELECT migrate.cutover('m');
SET ROLE regress_swap_app;
SELECT id, tenant FROM s;
RESET ROLE;
SELECT migrate.rollback('m');
SELECT migrate.cancel('m');
CALL worked('cancelled');
SELECT migrate.drop('m');
DROP TABLE s, t, allowed;
DROP PROCEDURE told(text[]);

-- An identity keeps its bounds; where it goes as far as its type does, it then goes as far as the new type does.
CREATE FUNCTION counts(relation text) RETURNS TABLE (type regtype, starts bigint, step bigint, lowest bigint, highest bigint, cache bigint, cycles boolean) LANGUAGE sql AS $$
    SELECT s.seqtypid::regtype, s.seqstart, s.seqincrement, s.seqmin, s.seqmax, s.seqcache, s.seqcycle FROM pg_sequence s WHERE s.seqrelid = pg_get_serial_sequence('swap_test.' || relation, 'id')::regclass
$$;
CREATE PROCEDURE swapped(identity text, before text, after text) LANGUAGE plpgsql AS $$
BEGIN
    EXECUTE format('CREATE TABLE s (id %s GENERATED BY DEFAULT AS IDENTITY %s PRIMARY KEY, v int)', before, identity);
    EXECUTE format('CREATE TABLE t (id %s PRIMARY KEY, v int)', after);
    INSERT INTO s (v) VALUES (1), (2);
    PERFORM migrate.define('m', 's', 't', on_target_delete => 'delete');
    PERFORM migrate.set('m', 'cutover', 'swap');
    PERFORM migrate.start('m');
    COMMIT;
    CALL worked('ready');
    CREATE TABLE there_and_back AS SELECT 1 AS nr, 'before' AS at, c.* FROM counts('s') c;
    PERFORM migrate.cutover('m');
    INSERT INTO there_and_back SELECT 2, 'after cutover', * FROM counts('s');
    INSERT INTO s (v) VALUES (3);
    PERFORM migrate.rollback('m');
    INSERT INTO there_and_back SELECT 3, 'after rollback', * FROM counts('s');
    INSERT INTO s (v) VALUES (4);
    PERFORM migrate.cancel('m');
    COMMIT;
    CALL worked('cancelled');
    PERFORM migrate.drop('m');
END $$;
CALL swapped('(MAXVALUE 1000 INCREMENT BY 5 START WITH 20 CACHE 3 CYCLE)', 'int', 'bigint');
SELECT * FROM there_and_back ORDER BY nr;
SELECT * FROM s ORDER BY v;
DROP TABLE there_and_back, s, t;
CALL swapped('(MINVALUE -2147483648 START WITH -2147483648)', 'int', 'bigint');
SELECT * FROM there_and_back ORDER BY nr;
SELECT * FROM s ORDER BY v;
DROP TABLE there_and_back, s, t;
CALL swapped('(INCREMENT BY -1 MAXVALUE 50 START WITH 50)', 'smallint', 'int');
SELECT * FROM there_and_back ORDER BY nr;
SELECT * FROM s ORDER BY v;
DROP TABLE there_and_back, s, t;
-- A narrower type: no bound is beyond it.
CALL swapped('(MINVALUE -5000000000 MAXVALUE 5000000000 START WITH -2)', 'bigint', 'int');
SELECT * FROM there_and_back ORDER BY nr;
SELECT * FROM s ORDER BY v;
DROP TABLE there_and_back, s, t;
DROP PROCEDURE swapped(text, text, text);
DROP FUNCTION counts(text);

-- Several, one of which references the other: what was done last is undone first, whatever their order.
CREATE TABLE customers (id int PRIMARY KEY);
CREATE TABLE customers_new (id bigint PRIMARY KEY);
CREATE TABLE orders (id int PRIMARY KEY, client int CONSTRAINT of_client REFERENCES customers);
CREATE TABLE orders_new (id bigint PRIMARY KEY, client bigint);
INSERT INTO customers VALUES (1), (2);
INSERT INTO orders VALUES (1, 1), (2, 2);
SELECT migrate.define('orders', 'orders', 'orders_new', on_target_delete => 'delete');
SELECT migrate.define('customers', 'customers', 'customers_new', on_target_delete => 'delete');
SELECT migrate.set(m, 'cutover', 'swap') FROM unnest('{orders,customers}'::text[]) m;
SELECT migrate.start(m) FROM unnest('{orders,customers}'::text[]) m;
CALL worked('ready', 'orders');
CALL worked('ready', 'customers');
CREATE FUNCTION keys() RETURNS SETOF text LANGUAGE sql AS $$ SELECT conrelid::regclass || ' ' || conname || ' ' || pg_get_constraintdef(oid) FROM pg_constraint WHERE contype = 'f' AND connamespace = 'swap_test'::regnamespace ORDER BY 1 $$;
SELECT keys();
SELECT migrate.cutover('{orders,customers}'::text[]);
CALL worked('cut_over', 'orders');
CALL worked('cut_over', 'customers');
SELECT keys();
SELECT migrate.rollback('{orders,customers}'::text[]);
CALL worked('ready', 'orders');
CALL worked('ready', 'customers');
SELECT keys();
-- There one by one, in the other order; and back one by one, in each order.
SELECT migrate.cutover('customers');
SELECT migrate.cutover('orders');
SELECT migrate.rollback('{customers,orders}'::text[]);
CALL worked('ready', 'orders');
CALL worked('ready', 'customers');
SELECT keys();
SELECT migrate.cutover('{orders,customers}'::text[]);
SELECT migrate.rollback('orders');
SELECT migrate.rollback('customers');
CALL worked('ready', 'orders');
CALL worked('ready', 'customers');
SELECT keys();
SELECT migrate.cutover('{orders,customers}'::text[]);
SELECT migrate.rollback('customers');
SELECT migrate.rollback('orders');
CALL worked('ready', 'orders');
CALL worked('ready', 'customers');
SELECT keys();
-- A worker that validates a key when another migration's swap renames its table looks again; only what stays so is a failure.
BEGIN;
SELECT t.tries, f.wait_ms FROM (VALUES (1), (3)) t(tries), migrate._migration m, LATERAL migrate._job_failed(m.id, 0,
    jsonb_populate_record(NULL::migrate._job, jsonb_build_object('migration', m.id, 'worker', 0, 'action', 'validate_key')), '42P01', 'relation "gone" does not exist', NULL, t.tries, 1) f WHERE m.name = 'customers';
SELECT failed_reason FROM migrate._migration WHERE name = 'customers';
SELECT t.tries, f.wait_ms FROM (VALUES (4)) t(tries), migrate._migration m, LATERAL migrate._job_failed(m.id, 0,
    jsonb_populate_record(NULL::migrate._job, jsonb_build_object('migration', m.id, 'worker', 0, 'action', 'validate_key')), '42P01', 'relation "gone" does not exist', NULL, t.tries, 1) f WHERE m.name = 'customers';
SELECT failed_reason FROM migrate._migration WHERE name = 'customers';
ROLLBACK;
SELECT migrate.cancel(m) FROM unnest('{orders,customers}'::text[]) m;
CALL worked('cancelled', 'orders');
CALL worked('cancelled', 'customers');
SELECT migrate.drop(m) FROM unnest('{orders,customers}'::text[]) m;
DROP TABLE orders, orders_new, customers, customers_new;

-- What the swap has carried, and somebody drops after the cutover.
CREATE TABLE clients (id int PRIMARY KEY);
CREATE TABLE s (id int PRIMARY KEY, client int CONSTRAINT s_client REFERENCES clients, v int CONSTRAINT s_v CHECK (v > 0), w int, x int);
CREATE TABLE t (id bigint PRIMARY KEY, client int, v int CONSTRAINT t_v CHECK (v > 0), w int, x int, extra int);
CREATE TABLE lines (s int CONSTRAINT of_s REFERENCES s, kept int CONSTRAINT of_kept REFERENCES s);
COMMENT ON CONSTRAINT of_s ON lines IS 'gone with its key';
CREATE INDEX s_w ON s (w);
CREATE INDEX t_w ON t (w);
CREATE INDEX s_x ON s (x);
CREATE INDEX t_x ON t (x);
CREATE STATISTICS s_stat (ndistinct) ON v, w FROM s;
CREATE STATISTICS t_stat (ndistinct) ON v, w FROM t;
CREATE POLICY mine ON s USING (v > 1);
CREATE FUNCTION nothing() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';
CREATE TRIGGER noted AFTER INSERT ON s FOR EACH ROW EXECUTE FUNCTION nothing();
CREATE TRIGGER noted_too AFTER INSERT ON s FOR EACH ROW EXECUTE FUNCTION nothing();
CREATE VIEW shown AS SELECT s.w FROM s;
SET client_min_messages = error;  -- wal_level may be replica
CREATE PUBLICATION swap_gone FOR TABLE s;
SET client_min_messages = warning;
INSERT INTO clients VALUES (1);
INSERT INTO s SELECT g, 1, g, g, g FROM generate_series(1, 10) g;
SELECT migrate.define('m', 's', 't', on_target_delete => 'delete');
SELECT migrate.set('m', 'cutover', 'swap');
SELECT migrate.start('m');
CALL worked('ready');
SELECT migrate.cutover('m');
CALL worked('cut_over');
DROP INDEX s_w;
DROP STATISTICS s_stat;
DROP POLICY mine ON s;
DROP TRIGGER noted ON s;
DROP TRIGGER noted_too ON s_old;
ALTER TABLE s DROP CONSTRAINT s_v, DROP CONSTRAINT s_client;
ALTER TABLE lines DROP CONSTRAINT of_s;
DROP PUBLICATION swap_gone;
-- (A view that cannot read the old table is not gone: that still is an error, and nothing has changed.)
CREATE OR REPLACE VIEW shown AS SELECT s.w, s.extra FROM s;
\set VERBOSITY sqlstate
SELECT migrate.rollback('m');
\set VERBOSITY terse
SELECT to_regclass('s_old'), migrate.serves('m');
DROP VIEW shown;
SET client_min_messages = notice;
SELECT migrate.rollback('m');
SET client_min_messages = warning;
CALL worked('ready');
SELECT c.relname, i.relname AS index FROM pg_class c JOIN pg_index x ON x.indrelid = c.oid JOIN pg_class i ON i.oid = x.indexrelid WHERE c.oid IN ('s'::regclass, 't'::regclass) ORDER BY 1, 2;
SELECT tgrelid::regclass, tgname, tgenabled FROM pg_trigger WHERE tgrelid IN ('s'::regclass, 't'::regclass) AND tgname LIKE 'noted%' ORDER BY 1, 2;
SELECT stxrelid::regclass, stxname FROM pg_statistic_ext WHERE stxnamespace = 'swap_test'::regnamespace;
SELECT keys();
SELECT verdict FROM migrate.validate('m');
-- and there once more, with all of it
SELECT migrate.cutover('m');
SELECT migrate.rollback('m');
SELECT migrate.cancel('m');
CALL worked('cancelled');
SELECT migrate.drop('m');
DROP TABLE s, t, clients, lines CASCADE;

-- Kinds of tables: there, back, there again, and the old one goes. What is carried is seen in the catalog, and by an application that goes on.
CREATE TABLE seen (nr int GENERATED ALWAYS AS IDENTITY, at text, what text);
CREATE PROCEDURE look(moment text) LANGUAGE sql AS $$
    INSERT INTO seen (at, what)
    SELECT moment, concat_ws('; ', c.relname || CASE c.relkind WHEN 'p' THEN ' is partitioned: ' || (SELECT string_agg(p.relid::regclass::text, ', ' ORDER BY p.relid::regclass::text) FROM pg_partition_tree(c.oid) p WHERE p.isleaf) ELSE '' END,
        'indexes ' || (SELECT string_agg(i.relname || CASE WHEN x.indisreplident THEN ' (replica identity)' ELSE '' END, ', ' ORDER BY i.relname) FROM pg_index x JOIN pg_class i ON i.oid = x.indexrelid WHERE x.indrelid = c.oid),
        'replica identity ' || nullif(c.relreplident::text, 'd'),
        (SELECT string_agg(a.attname || CASE a.attidentity WHEN 'a' THEN ' always' ELSE ' by default' END || ' from ' || pg_get_serial_sequence(c.oid::regclass::text, a.attname), ', ' ORDER BY a.attnum)
         FROM pg_attribute a WHERE a.attrelid = c.oid AND a.attidentity <> ''))
    FROM pg_class c WHERE c.oid IN (to_regclass('s'), to_regclass('t'), to_regclass('s_old')) ORDER BY c.relname
$$;
CREATE SEQUENCE ids;
CREATE PROCEDURE lives(VARIADIC made text[]) LANGUAGE plpgsql AS $$
DECLARE
    way text;
    n integer := 10;
BEGIN
    ALTER SEQUENCE ids RESTART;
    FOREACH way IN ARRAY made LOOP
        EXECUTE way;
    END LOOP;
    INSERT INTO s (v) SELECT g FROM generate_series(1, 6) g;
    PERFORM migrate.define('m', 's', 't', on_target_delete => 'delete');
    PERFORM migrate.set('m', 'cutover', 'swap'), migrate.set('m', 'dual_write', 'strict');
    PERFORM migrate.start('m');
    COMMIT;
    CALL worked('ready');
    CALL look('before');
    FOREACH way IN ARRAY '{there,back,there again}'::text[] LOOP
        COMMIT;
        PERFORM CASE way WHEN 'back' THEN migrate.rollback('m') ELSE migrate.cutover('m') END;
        COMMIT;
        CALL worked(CASE way WHEN 'back' THEN 'ready' ELSE 'cut_over' END);
        CALL look(way);
        INSERT INTO s (v) VALUES (n), (n + 1);
        UPDATE s SET v = v + 100 WHERE v IN (2, n);
        DELETE FROM s WHERE v = n + 1;
        IF EXISTS (SELECT FROM pg_class c WHERE c.oid IN (to_regclass('s'), to_regclass('s_old')) AND c.relkind = 'p') THEN
            UPDATE s SET id = id + 100 WHERE v = 3;  -- into another partition, at first
        END IF;
        IF way <> 'back' THEN  -- whoever still writes the old table
            UPDATE s_old SET v = v + 1000 WHERE v = n + 100;
            INSERT INTO s_old (id, v) OVERRIDING SYSTEM VALUE VALUES (500 + n, 500 + n);
        END IF;
        n := n + 10;
        INSERT INTO seen (at, what) SELECT way, 'rows ' || v.verdict || ': ' || (SELECT string_agg(concat_ws(' ', s.id, s.v), ', ' ORDER BY s.id) FROM s) FROM migrate.validate('m', 'rows') v;
    END LOOP;
    COMMIT;
    PERFORM migrate.finalize('m', drop_source => true, force => 'm'), migrate.drop('m');
    COMMIT;
    INSERT INTO s (v) VALUES (99);
    CALL look('at last');
    INSERT INTO seen (at, what) SELECT 'at last', 'rows: ' || string_agg(concat_ws(' ', s.id, s.v), ', ' ORDER BY s.id) FROM s;
END $$;
\pset format unaligned
\pset tuples_only on
-- A partitioned source, to a plain table; a row that moves to another partition.
CALL lives($$CREATE TABLE s (id int DEFAULT nextval('swap_test.ids') PRIMARY KEY, v int) PARTITION BY RANGE (id)$$,
    $$CREATE TABLE s_1 PARTITION OF s FOR VALUES FROM (MINVALUE) TO (4)$$,
    $$CREATE TABLE s_2 PARTITION OF s FOR VALUES FROM (4) TO (MAXVALUE)$$,
    $$CREATE INDEX s_v ON s (v)$$,
    $$CREATE TABLE t (id bigint PRIMARY KEY, v int)$$,
    $$CREATE INDEX t_v ON t (v)$$);
SELECT at || ': ' || what FROM seen ORDER BY nr;
TRUNCATE seen;
DROP TABLE s;
-- … to a partitioned one, by something else.
CALL lives($$CREATE TABLE s (id int DEFAULT nextval('swap_test.ids') PRIMARY KEY, v int) PARTITION BY RANGE (id)$$,
    $$CREATE TABLE s_1 PARTITION OF s FOR VALUES FROM (MINVALUE) TO (4)$$,
    $$CREATE TABLE s_2 PARTITION OF s FOR VALUES FROM (4) TO (MAXVALUE)$$,
    $$CREATE INDEX s_v ON s (v)$$,
    $$CREATE TABLE t (id bigint PRIMARY KEY, v int) PARTITION BY HASH (id)$$,
    $$CREATE TABLE t_1 PARTITION OF t FOR VALUES WITH (MODULUS 2, REMAINDER 0)$$,
    $$CREATE TABLE t_2 PARTITION OF t FOR VALUES WITH (MODULUS 2, REMAINDER 1)$$,
    $$CREATE INDEX t_v ON t (v)$$);
SELECT at || ': ' || what FROM seen ORDER BY nr;
TRUNCATE seen;
DROP TABLE s;
-- GENERATED ALWAYS: the target's column becomes that, …
CALL lives($$CREATE TABLE s (id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, v int)$$,
    $$CREATE TABLE t (id bigint PRIMARY KEY, v int)$$);
SELECT at || ': ' || what FROM seen ORDER BY nr;
TRUNCATE seen;
DROP TABLE s;
-- … or is that by itself; where dual writes take SQL, too; and an identity beside the key, after a default without a sequence of its own.
CALL lives($$CREATE TABLE s (id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, v int)$$,
    $$CREATE TABLE t (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, v int)$$);
SELECT at || ': ' || what FROM seen ORDER BY nr;
TRUNCATE seen;
DROP TABLE s;
CALL lives($$CREATE TABLE s (id int GENERATED BY DEFAULT AS IDENTITY PRIMARY KEY, v int)$$,
    $$CREATE TABLE t (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, v int)$$,
    $$CREATE TRIGGER noted AFTER INSERT ON t FOR EACH ROW EXECUTE FUNCTION nothing()$$);
SELECT at || ': ' || what FROM seen ORDER BY nr;
TRUNCATE seen;
DROP TABLE s;
CALL lives($$CREATE TABLE s (id int DEFAULT nextval('swap_test.ids') PRIMARY KEY, v int, w int GENERATED BY DEFAULT AS IDENTITY)$$,
    $$CREATE TABLE t (id bigint PRIMARY KEY, v int, w bigint NOT NULL)$$,
    $$CREATE TRIGGER noted AFTER INSERT ON t FOR EACH ROW EXECUTE FUNCTION nothing()$$);
SELECT at || ': ' || what FROM seen ORDER BY nr;
TRUNCATE seen;
DROP TABLE s;
-- The replica identity is an index: the target's that is like it, or one that the target has chosen for itself.
CALL lives($$CREATE TABLE s (id int DEFAULT nextval('swap_test.ids') PRIMARY KEY, v int NOT NULL CONSTRAINT s_v UNIQUE)$$,
    $$ALTER TABLE s REPLICA IDENTITY USING INDEX s_v$$,
    $$CREATE TABLE t (id bigint PRIMARY KEY, v int NOT NULL CONSTRAINT t_v UNIQUE)$$);
SELECT at || ': ' || what FROM seen ORDER BY nr;
TRUNCATE seen;
DROP TABLE s;
CALL lives($$CREATE TABLE s (id int DEFAULT nextval('swap_test.ids') PRIMARY KEY, v int NOT NULL CONSTRAINT s_v UNIQUE)$$,
    $$ALTER TABLE s REPLICA IDENTITY USING INDEX s_v$$,
    $$CREATE TABLE t (id bigint PRIMARY KEY, v int NOT NULL CONSTRAINT t_v UNIQUE)$$,
    $$CREATE UNIQUE INDEX t_vid ON t (v, id)$$,
    $$ALTER TABLE t REPLICA IDENTITY USING INDEX t_vid$$);
SELECT at || ': ' || what FROM seen ORDER BY nr;
TRUNCATE seen;
DROP TABLE s;
\pset tuples_only off
\pset format aligned

DROP SCHEMA swap_test CASCADE;
DROP ROLE regress_swap_app, regress_swap_other;

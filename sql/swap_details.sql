-- A swap, detail by detail: policies that both tables have by the same name, the bounds of an identity.
\set SHOW_CONTEXT never
SET client_min_messages = warning;
SET jit = off;
CREATE SCHEMA swap_test;
SET search_path = swap_test;
CREATE ROLE regress_swap_app;
CREATE ROLE regress_swap_other;
GRANT USAGE ON SCHEMA swap_test TO regress_swap_app, regress_swap_other;
-- Waits for the phase, and until a worker has validated what a switch has added.
CREATE PROCEDURE worked(migration text, goal text) LANGUAGE plpgsql AS $$
BEGIN
    FOR i IN 1 .. 3000 LOOP
        IF EXISTS (SELECT FROM migrate._migration m WHERE m.name = migration AND m.phase = goal AND NOT migrate._is_restoring(m.id)) THEN
            RETURN;
        END IF;
        COMMIT;
        PERFORM pg_sleep(0.02);
        COMMIT;
    END LOOP;
    RAISE EXCEPTION 'not in phase % with foreign keys validated', goal;
END $$;

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
CALL worked('m', 'ready');
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
CALL worked('m', 'cancelled');
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
    CALL worked('m', 'ready');
    CREATE TABLE there_and_back AS SELECT 1 AS nr, 'before' AS at, c.* FROM counts('s') c;
    PERFORM migrate.cutover('m');
    INSERT INTO there_and_back SELECT 2, 'after cutover', * FROM counts('s');
    INSERT INTO s (v) VALUES (3);
    PERFORM migrate.rollback('m');
    INSERT INTO there_and_back SELECT 3, 'after rollback', * FROM counts('s');
    INSERT INTO s (v) VALUES (4);
    PERFORM migrate.cancel('m');
    COMMIT;
    CALL worked('m', 'cancelled');
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

DROP SCHEMA swap_test CASCADE;
DROP ROLE regress_swap_app, regress_swap_other;

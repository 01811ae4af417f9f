-- A swap, detail by detail: policies that both tables have by the same name.
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

DROP SCHEMA swap_test CASCADE;
DROP ROLE regress_swap_app, regress_swap_other;

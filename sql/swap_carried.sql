-- What a swap carries, and what it says of what it does not: found by tables as they are in the world.
\set SHOW_CONTEXT never
SET client_min_messages = warning;
CREATE ROLE regress_dba SUPERUSER;
SET SESSION AUTHORIZATION regress_dba;  -- who is named below, whatever the superuser is called
SET jit = off;
CREATE SCHEMA swap_test;
SET search_path = swap_test;
CREATE ROLE regress_swap_app;
CREATE ROLE regress_swap_other;
CREATE ROLE regress_swap_owner;
GRANT USAGE ON SCHEMA swap_test TO regress_swap_app, regress_swap_other;
GRANT USAGE, CREATE ON SCHEMA swap_test TO regress_swap_owner;
CREATE PROCEDURE worked(goal text) LANGUAGE plpgsql AS $$
BEGIN
    FOR i IN 1 .. 3000 LOOP
        IF EXISTS (SELECT FROM migrate._migration m WHERE m.name = 'm' AND m.phase = goal AND NOT migrate._is_restoring(m.id)) THEN
            RETURN;
        END IF;
        COMMIT;
        PERFORM pg_sleep(0.02);
        COMMIT;
    END LOOP;
    RAISE EXCEPTION 'not in phase % with foreign keys validated', goal;
END $$;
CREATE PROCEDURE ready(source text DEFAULT 's') LANGUAGE plpgsql AS $$
BEGIN
    PERFORM migrate.define('m', source, 't', on_target_delete => 'delete'), migrate.set('m', 'cutover', 'swap'), migrate.set('m', 'accept_reverse_gaps', 'on'), migrate.start('m');
    COMMIT;
    CALL worked('ready');
END $$;
CREATE PROCEDURE over(source text DEFAULT 's') LANGUAGE plpgsql AS $$
BEGIN
    PERFORM migrate.cancel('m');
    COMMIT;
    CALL worked('cancelled');
    PERFORM migrate.drop('m');
    EXECUTE format('DROP TABLE %I, t CASCADE', source);
END $$;
CREATE FUNCTION rights(relation regclass) RETURNS TABLE (role regrole, right_to text, further boolean) LANGUAGE sql AS $$
    SELECT a.grantee, a.privilege_type, a.is_grantable FROM pg_class c, aclexplode(c.relacl) a WHERE c.oid = relation AND a.grantee <> c.relowner
    UNION ALL SELECT a.grantee, a.privilege_type || ' ' || t.attname, a.is_grantable FROM pg_attribute t JOIN pg_class c ON c.oid = t.attrelid, aclexplode(t.attacl) a WHERE t.attrelid = relation AND a.grantee <> c.relowner
    ORDER BY 1, 2
$$;

-- What somebody grants on, after the cutover, by a grant option that the swap gave him, does not bar the way back.
CREATE TABLE s (id int PRIMARY KEY, code serial, v text);
CREATE TABLE t (id bigint PRIMARY KEY, code serial, v text);
GRANT SELECT, UPDATE (v) ON s TO regress_swap_app WITH GRANT OPTION;
GRANT USAGE ON SEQUENCE s_code_seq TO regress_swap_app WITH GRANT OPTION;
CALL ready();
SELECT migrate.cutover('m');
SET ROLE regress_swap_app;
GRANT SELECT, UPDATE (v) ON s TO regress_swap_other;
GRANT USAGE ON SEQUENCE s_code_seq TO regress_swap_other;
RESET ROLE;
SELECT migrate.rollback('m');
SELECT * FROM rights('s');
SELECT * FROM rights('t') UNION ALL SELECT * FROM rights('t_code_seq');
CALL over();

-- A table and its key, whose names are as long as names can be and begin alike, step aside under different ones.
SELECT repeat('n', 63) AS long \gset
CREATE TABLE :long (id serial PRIMARY KEY, v text UNIQUE);
CREATE TABLE t (id bigint PRIMARY KEY, v text UNIQUE);
CALL ready(:'long');
SELECT migrate.cutover('m');
SELECT c.relname, i.relname FROM pg_class c JOIN pg_index x ON x.indrelid = c.oid JOIN pg_class i ON i.oid = x.indexrelid WHERE c.relnamespace = 'swap_test'::regnamespace ORDER BY 1, 2;
SELECT migrate.rollback('m');
CALL over(:'long');

DROP SCHEMA swap_test CASCADE;
DROP ROLE regress_swap_app, regress_swap_other, regress_swap_owner;
RESET SESSION AUTHORIZATION;
DROP ROLE regress_dba;

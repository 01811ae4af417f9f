-- What somebody does to the tables of a migration that is under way must not fail the application's statements (dual_write = best_effort):
-- what the target then refuses is a recorded failure; and where nothing is left to be kept equal, no switch is made any more.
\set SHOW_CONTEXT never
\set VERBOSITY terse
SET client_min_messages = warning;
CREATE SCHEMA ddl;
CREATE SCHEMA ddl_target;
CREATE ROLE ddl_owner;
GRANT USAGE, CREATE ON SCHEMA ddl, ddl_target TO ddl_owner;
SET search_path = ddl, ddl_target;
CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'refused'; END $$;
-- Two tables with rows of the keys 1 to 9, and the dual writes between them, which this session has used once.
CREATE FUNCTION arm(key text DEFAULT 'PRIMARY KEY', tail text DEFAULT '') RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    EXECUTE format('CREATE TABLE src (id int PRIMARY KEY, v text, w text); CREATE TABLE ddl_target.dst (id int %s, v text, w text) %s', key, tail);
    IF tail <> '' THEN
        CREATE TABLE ddl_target.part PARTITION OF ddl_target.dst FOR VALUES FROM (0) TO (1000);
    END IF;
    INSERT INTO src SELECT g, 'v', 'w' FROM generate_series(1, 9) g;
    INSERT INTO dst TABLE src;
    ALTER TABLE dst OWNER TO ddl_owner;
    ALTER TABLE src REPLICA IDENTITY FULL;
    PERFORM migrate.define('ddl', 'src', 'dst', on_target_delete => 'delete');
    PERFORM migrate._create_triggers(m, 'forward'), migrate._create_triggers(m, 'reverse'), migrate._note_fingerprints(m) FROM migrate._migration m;
    UPDATE src SET v = 'armed' WHERE id = 9;
END $$;
-- One statement of each kind; says what became of it.
CREATE FUNCTION writes(relation text) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    statement text;
    said text := '';
BEGIN
    FOREACH statement IN ARRAY ARRAY['UPDATE %s SET v = ''new'' WHERE id = 1', 'INSERT INTO %s (id, v) VALUES (5000, ''new'')', 'DELETE FROM %s WHERE id = 2', 'UPDATE %s SET id = 300 WHERE id = 3', 'TRUNCATE %s'] LOOP
        BEGIN
            EXECUTE format(statement, relation);
        EXCEPTION WHEN OTHERS THEN
            said := said || format(' %s: %s.', split_part(statement, ' ', 1), SQLERRM);
        END;
    END LOOP;
    RETURN coalesce(nullif(said, ''), 'all done') || coalesce('; recorded: ' || (SELECT string_agg(DISTINCT direction || ' ' || sqlstate || ' ' || key::text, ', ') FROM migrate._failure), '');
END $$;
CREATE FUNCTION clean() RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    DELETE FROM migrate._failure;
    PERFORM migrate.drop('ddl');
    DROP TABLE IF EXISTS src, dst, whole CASCADE;
END $$;

-- rules
SELECT arm();
CREATE RULE a_rule AS ON INSERT TO dst DO ALSO SELECT 1;
SELECT writes('src');
SELECT clean();
-- bounds, when the target has become a partition
SELECT arm();
CREATE TABLE whole (id int PRIMARY KEY, v text, w text) PARTITION BY RANGE (id);
ALTER TABLE whole ATTACH PARTITION dst FOR VALUES FROM (0) TO (1000);
SELECT writes('src');
SELECT clean();
-- a trigger of a partition's own
SELECT arm(tail => 'PARTITION BY RANGE (id)');
CREATE TRIGGER refuse BEFORE DELETE ON part FOR EACH ROW EXECUTE FUNCTION refuse();
SELECT writes('src');
SELECT clean();
-- a publication that cannot tell which row was changed
SELECT arm(key => 'NOT NULL UNIQUE');
SET client_min_messages = error;
CREATE PUBLICATION regress_migrate_ddl FOR TABLE dst;
RESET client_min_messages;
SELECT writes('src');
DROP PUBLICATION regress_migrate_ddl;
SET client_min_messages = warning;
SELECT clean();
-- the right of the target's owner to look into its schema
SELECT arm();
REVOKE USAGE ON SCHEMA ddl_target FROM ddl_owner;
SELECT writes('src');
SELECT gate, problem FROM migrate._migration m, migrate._gates(m, m.owner, 'target', true, '{failures}') WHERE problem IS NOT NULL;
GRANT USAGE ON SCHEMA ddl_target TO ddl_owner;
SELECT clean();

-- what the dual writes rest on is dropped, on either side
CREATE FUNCTION without(what text, relation text, strictly boolean DEFAULT false) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    said text;
BEGIN
    PERFORM arm();
    PERFORM migrate.set('ddl', 'dual_write', 'strict') WHERE strictly;
    SET LOCAL client_min_messages = error;
    EXECUTE format('ALTER TABLE %s CASCADE', what);
    said := writes(relation);
    PERFORM clean();
    RETURN said;
END $$;
SELECT without('src DROP COLUMN w', 'src') AS mapped_column, without('dst DROP COLUMN id', 'src') AS key;
SELECT without('dst DROP COLUMN w', 'dst') AS mapped_column, without('src DROP COLUMN id', 'dst') AS key;
SELECT without('src DROP COLUMN w', 'src', true) AS strict;
SELECT arm();
SET client_min_messages = error;
DROP TABLE dst CASCADE;
SET client_min_messages = warning;
SELECT writes('src');
SELECT severity, regexp_replace(message, '\d+', 'N') AS message FROM migrate.preflight('ddl') WHERE "check" = 'flows';
SELECT clean();
-- after the cutover nothing goes back to what is not there
SELECT arm();
UPDATE migrate._migration SET phase = 'cut_over', both_directions = true, cut_over_at = now();
SET client_min_messages = error;
ALTER TABLE dst DROP COLUMN w CASCADE;
SET client_min_messages = warning;
SELECT gate, problem FROM migrate._migration m, migrate._gates(m, m.owner, 'source', false, '{dual_writes,validation}') WHERE problem IS NOT NULL;
SET client_min_messages = error;
DROP TABLE src CASCADE;
SET client_min_messages = warning;
SELECT writes('dst');
SELECT migrate.rollback('ddl');
\echo :LAST_ERROR_SQLSTATE
SELECT migrate.finalize('ddl', force => 'ddl');
SELECT clean();

RESET search_path;
DROP SCHEMA ddl, ddl_target CASCADE;
DROP ROLE ddl_owner;

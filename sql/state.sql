-- State, not events: whatever the application's own triggers, savepoints and transactions make of the order and number of events,
-- both sides are equal after every statement: forward, and in the rollback window with the target written. No workers here.
-- The oracle is plain SQL: a set difference both ways.
\set SHOW_CONTEXT never
\set VERBOSITY terse
SET client_min_messages = warning;
CREATE SCHEMA state_test;

-- Turns on the dual writes of one direction; forward, it copies everything there is.
CREATE FUNCTION state_test.arm(migration text, direction text) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    m migrate._migration;
BEGIN
    SELECT * INTO m FROM migrate._migration x WHERE x.name = migration;
    PERFORM migrate._create_triggers(m, direction);
    IF direction = 'forward' THEN
        PERFORM migrate._apply_range(f.id, NULL, NULL, 1000000) FROM migrate._flow f WHERE f.migration = m.id;
    END IF;
END $$;
CREATE FUNCTION state_test.same(a text, b text) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    n bigint;
BEGIN
    EXECUTE format('WITH a AS (%s), b AS (%s) SELECT count(*) FROM ((TABLE a EXCEPT ALL TABLE b) UNION ALL (TABLE b EXCEPT ALL TABLE a)) x', a, b) INTO n;
    RETURN CASE n WHEN 0 THEN 'ok' ELSE n || ' rows differ' END || (SELECT CASE count(*) WHEN 0 THEN '' ELSE format(', %s failures', count(*)) END FROM migrate._failure);
END $$;
-- Incompressible, so that it is toasted.
CREATE FUNCTION state_test.long_text(seed int) RETURNS text LANGUAGE sql AS $$ SELECT string_agg(md5((seed * 1000 + g)::text), '') FROM generate_series(1, 400) g $$;

CREATE TABLE state_test.s (id int PRIMARY KEY, v text, n int DEFAULT 0, long text);
CREATE TABLE state_test.t (long text, id bigint PRIMARY KEY, n int DEFAULT 0, v text);
CREATE FUNCTION state_test.equal() RETURNS text LANGUAGE sql AS
    $$ SELECT state_test.same('SELECT id, v, n, md5(long) FROM state_test.s', 'SELECT id, v, n, md5(long) FROM state_test.t') $$;

-- A trigger that does what the new value says.
CREATE FUNCTION state_test.meddle() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    w regclass := TG_RELID;
BEGIN
    IF TG_OP = 'DELETE' THEN
        IF OLD.v = 'resurrect' AND TG_NAME = 'z_after' THEN
            EXECUTE format('INSERT INTO %s (id, v) VALUES (%s, ''by resurrection'')', w, OLD.id);
        END IF;
        RETURN OLD;
    END IF;
    IF TG_WHEN = 'BEFORE' AND NEW.v = 'BEFORE new' THEN
        NEW.v := 'by before';
    ELSIF TG_WHEN = 'BEFORE' AND NEW.v = 'BEFORE sibling' THEN
        EXECUTE format('UPDATE %s SET v = ''by sibling'', n = n + 1 WHERE id = %s', w, NEW.id + 1);
    ELSIF TG_WHEN = 'BEFORE' OR NEW.v NOT LIKE 'AFTER %' THEN
        RETURN NEW;
    ELSIF NEW.v = 'AFTER same' THEN
        EXECUTE format('UPDATE %s SET v = ''by '' || %L, n = n + 100 WHERE id = %s', w, TG_NAME, NEW.id);
    ELSIF NEW.v = 'AFTER sibling' THEN
        EXECUTE format('UPDATE %s SET n = n + 1000, v = ''by '' || %L WHERE id IN (%s, %s)', w, TG_NAME, NEW.id - 1, NEW.id + 1);
    ELSIF NEW.v = 'AFTER others' THEN
        EXECUTE format('INSERT INTO %s (id, v) VALUES (%s, ''resurrect'') ON CONFLICT DO NOTHING', w, NEW.id + 5000);
        EXECUTE format('DELETE FROM %s WHERE id = %s', w, NEW.id + 100);
        EXECUTE format('UPDATE %s SET id = %s WHERE id = %s', w, NEW.id + 6000, NEW.id + 200);
    ELSIF NEW.v = 'AFTER gone' THEN
        EXECUTE format('DELETE FROM %s WHERE id = %s', w, NEW.id);
    ELSIF NEW.v = 'AFTER moved' THEN
        EXECUTE format('UPDATE %s SET id = -id, v = ''by move'' WHERE id = %s', w, NEW.id);
    ELSIF NEW.v LIKE 'AFTER caught%' THEN
        BEGIN
            EXECUTE format('UPDATE %s SET v = ''never'' WHERE id IN (%s, %s)', w, NEW.id + 1, NEW.id);
            IF NEW.v LIKE '%deep' THEN
                BEGIN
                    EXECUTE format('DELETE FROM %s WHERE id IN (%s, %s)', w, NEW.id, NEW.id + 1);
                    RAISE 'inner';
                EXCEPTION WHEN raise_exception THEN
                    EXECUTE format('INSERT INTO %s (id, v) VALUES (%s, ''never'')', w, NEW.id + 7000);
                END;
            END IF;
            RAISE 'outer';
        EXCEPTION WHEN raise_exception THEN NULL;
        END;
    ELSIF NEW.v = 'AFTER raise' THEN
        RAISE 'not caught';
    END IF;
    RETURN NEW;
END $$;
CREATE FUNCTION state_test.meddle_all() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF EXISTS (SELECT FROM news WHERE v = 'STATEMENT all') THEN
        EXECUTE format('UPDATE %s SET v = ''by statement'', id = CASE WHEN id %% 2 = 0 THEN id + 60000 ELSE id END WHERE id IN (SELECT id FROM news WHERE v = ''STATEMENT all'')', TG_RELID::regclass);
    END IF;
    RETURN NULL;
END $$;

INSERT INTO state_test.s SELECT g, 'v' || g, g, CASE WHEN g % 50 = 0 THEN state_test.long_text(g) END FROM generate_series(1, 300) g;
SELECT migrate.define('state', 'state_test.s', 'state_test.t');
SELECT state_test.arm('state', 'forward'), state_test.equal();
\set w state_test.s
SET state_test.w = 'state_test.s';
\i sql/include/state_writes.sql

-- The same in the rollback window: the target is written, what is done to it comes back. Legacy clients write the source meanwhile.
SELECT state_test.arm('state', 'reverse');
TRUNCATE state_test.s;
INSERT INTO state_test.s SELECT g, 'v' || g, g, CASE WHEN g % 50 = 0 THEN state_test.long_text(g) END FROM generate_series(1, 300) g;
SELECT state_test.equal();
\set w state_test.t
SET state_test.w = 'state_test.t';
\set ECHO none
\i sql/include/state_writes.sql
\set ECHO all
BEGIN; UPDATE state_test.t SET v = 'target' WHERE id IN (130, 131); UPDATE state_test.s SET v = 'source', n = 5 WHERE id IN (131, 132); UPDATE state_test.t SET id = 13000 WHERE id = 131; DELETE FROM state_test.s WHERE id = 13000; COMMIT;
SELECT state_test.equal();
TRUNCATE state_test.t;
SELECT state_test.equal(), count(*) FROM state_test.s;
SELECT migrate.drop('state');
DROP TABLE state_test.s, state_test.t;

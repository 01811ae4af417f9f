-- State, not events: deferrable keys, foreign keys and their actions, triggers on the side that follows. No workers here.
\set SHOW_CONTEXT never
\set VERBOSITY terse
SET client_min_messages = warning;
CREATE SCHEMA links_test;
SET search_path = links_test;
CREATE FUNCTION arm(migration text, direction text) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    m migrate._migration;
BEGIN
    SELECT * INTO m FROM migrate._migration x WHERE x.name = migration;
    PERFORM migrate._create_triggers(m, direction);
    IF direction = 'forward' THEN
        PERFORM migrate._apply_range(f.id, NULL, NULL, 1000000) FROM migrate._flow f WHERE f.migration = m.id;
    END IF;
END $$;
-- Both differences; and whether anything had to be recorded as a failure.
CREATE FUNCTION same(a text, b text) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    n bigint;
BEGIN
    EXECUTE format('WITH a AS (%s), b AS (%s) SELECT count(*) FROM ((TABLE a EXCEPT ALL TABLE b) UNION ALL (TABLE b EXCEPT ALL TABLE a)) x', a, b) INTO n;
    RETURN CASE n WHEN 0 THEN 'ok' ELSE n || ' rows differ' END || (SELECT CASE count(*) WHEN 0 THEN '' ELSE format(', %s failures', count(*)) END FROM migrate._failure);
END $$;
CREATE FUNCTION equal() RETURNS text LANGUAGE sql AS $$ SELECT links_test.same('TABLE links_test.s', 'TABLE links_test.t') $$;

-- deferrable keys: shifts, swaps, rotations, duplicates that last until the commit and end in every way
CREATE TABLE s (id int PRIMARY KEY DEFERRABLE INITIALLY IMMEDIATE, v text);
CREATE TABLE t (id int PRIMARY KEY, v text);
INSERT INTO s SELECT g, 'v' || g FROM generate_series(1, 100) g;
SELECT migrate.define('keys', 's', 't');
SELECT arm('keys', 'forward');
UPDATE s SET id = id + 1;
UPDATE s SET id = id - 1;
UPDATE s SET id = 101 - id;
UPDATE s SET id = 101 - id;
UPDATE s SET id = -id;
UPDATE s SET id = -id;
SELECT equal();
UPDATE s SET id = CASE id WHEN 10 THEN 11 WHEN 11 THEN 12 WHEN 12 THEN 10 ELSE id END, v = v || CASE id WHEN 11 THEN ' new' ELSE '' END WHERE id < 20;
SELECT equal();
BEGIN; SET CONSTRAINTS ALL DEFERRED; INSERT INTO s VALUES (20, 'twice'), (20, 'thrice'); UPDATE s SET id = 2000 WHERE v = 'v20'; UPDATE s SET v = v || '!' WHERE id = 20; DELETE FROM s WHERE v = 'twice!'; COMMIT;
SELECT equal();
-- the one that was there stays, the one that came goes; and the other way round
BEGIN; SET CONSTRAINTS ALL DEFERRED; INSERT INTO s VALUES (21, 'guest'); SELECT count(*) FROM t WHERE id = 21; DELETE FROM s WHERE v = 'guest'; COMMIT;
BEGIN; SET CONSTRAINTS ALL DEFERRED; UPDATE s SET id = 22 WHERE id = 23; UPDATE s SET id = 23 WHERE v = 'v22'; COMMIT;
BEGIN; SET CONSTRAINTS ALL DEFERRED; UPDATE s SET id = 24 WHERE id IN (25, 26); SAVEPOINT a; DELETE FROM s WHERE id = 24; ROLLBACK TO a; UPDATE s SET id = 25 WHERE v = 'v23'; SET CONSTRAINTS ALL IMMEDIATE; ROLLBACK;
BEGIN; SET CONSTRAINTS ALL DEFERRED; UPDATE s SET id = 24 WHERE id IN (25, 26); UPDATE s SET id = 25 WHERE v = 'v24'; UPDATE s SET id = 26 WHERE v = 'v25'; SET CONSTRAINTS ALL IMMEDIATE; UPDATE s SET v = 'checked' WHERE id = 26; COMMIT;
SELECT equal();
BEGIN; SET CONSTRAINTS ALL DEFERRED; INSERT INTO s SELECT * FROM s WHERE id < 10; COMMIT;
SELECT equal(), count(*) FROM t;
BEGIN; SET CONSTRAINTS ALL DEFERRED; TRUNCATE s; INSERT INTO s VALUES (1, 'a'), (1, 'b'); DELETE FROM s WHERE v = 'a'; COMMIT;
SELECT equal(), (SELECT v FROM t) AS left_over;
SELECT migrate.drop('keys');
DROP TABLE s, t;

-- a tree: cascades, SET NULL and SET DEFAULT over several levels in one statement. The target has the same foreign keys with the same actions
-- (where a key moves, its old row goes and takes along whatever still refers to it), then one that references the source, then none of the actions.
CREATE TABLE root (id int PRIMARY KEY);
CREATE TABLE s (id int PRIMARY KEY, parent int DEFAULT 1 REFERENCES s ON DELETE CASCADE ON UPDATE CASCADE, root int DEFAULT 1 REFERENCES root ON DELETE SET DEFAULT ON UPDATE CASCADE, maybe int REFERENCES s ON DELETE SET NULL ON UPDATE SET NULL);
CREATE FUNCTION grow() RETURNS void LANGUAGE sql AS $$
    DELETE FROM links_test.s;
    DELETE FROM links_test.root;
    INSERT INTO links_test.root SELECT generate_series(1, 9);
    INSERT INTO links_test.s SELECT g, nullif(g / 2, 0), 1 + g % 9, nullif(g * 7 % 100, 0) FROM generate_series(1, 99) g $$;
CREATE PROCEDURE cut(INOUT deleted text, INOUT defaulted text, INOUT moved text, INOUT ctes text, INOUT again text) LANGUAGE plpgsql AS $$
BEGIN
    DELETE FROM links_test.s WHERE id IN (20, 40, 3);
    deleted := links_test.equal();
    COMMIT;
    DELETE FROM links_test.root WHERE id IN (2, 3);
    COMMIT;
    UPDATE links_test.root SET id = id + 100 WHERE id BETWEEN 5 AND 7;
    defaulted := links_test.equal();
    COMMIT;
    UPDATE links_test.s SET id = id + 1000 WHERE id IN (2, 4, 8, 17);
    moved := links_test.equal();
    COMMIT;
    INSERT INTO links_test.s VALUES (500, 501, 1, 500), (501, 1, 1, 501);
    WITH gone AS (DELETE FROM links_test.s WHERE id = 500) UPDATE links_test.s SET maybe = 501 WHERE id = 1;
    ctes := links_test.equal();
    COMMIT;
    DELETE FROM links_test.s WHERE id = 1;
    INSERT INTO links_test.s VALUES (1, NULL, 1, 1);
    again := links_test.equal();
END $$;
CREATE TABLE t (id int PRIMARY KEY, parent int DEFAULT 1 REFERENCES t ON DELETE CASCADE ON UPDATE CASCADE, root int DEFAULT 1 REFERENCES root ON DELETE SET DEFAULT ON UPDATE CASCADE, maybe int REFERENCES t ON DELETE SET NULL ON UPDATE SET NULL);
SELECT grow();
SELECT migrate.define('tree', 's', 't');
SELECT migrate.set('tree', 'dual_write', 'strict');
SELECT arm('tree', 'forward'), equal();
CALL cut('', '', '', '', '');
SELECT migrate.drop('tree');
DROP TABLE t;
CREATE TABLE t (id int PRIMARY KEY REFERENCES s ON DELETE CASCADE ON UPDATE CASCADE, parent int, root int, maybe int);
SELECT grow();
SELECT migrate.define('tree', 's', 't');
SELECT migrate.set('tree', 'dual_write', 'strict');
SELECT arm('tree', 'forward'), equal();
CALL cut('', '', '', '', '');
SELECT migrate.drop('tree');
DROP TABLE t;
-- cascades made by a trigger of the application's; the target only refuses. Its keys are checked on what the outermost statement leaves.
ALTER TABLE s DROP CONSTRAINT s_parent_fkey, DROP CONSTRAINT s_maybe_fkey;
CREATE TABLE t (id int PRIMARY KEY, parent int REFERENCES t, root int, maybe int REFERENCES t);
CREATE FUNCTION prune() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'DELETE' THEN
        UPDATE links_test.s SET maybe = NULL WHERE maybe = OLD.id;
        DELETE FROM links_test.s WHERE parent = OLD.id;
    ELSIF NEW.id <> OLD.id THEN
        UPDATE links_test.s SET maybe = NULL WHERE maybe = OLD.id;
        UPDATE links_test.s SET parent = NEW.id WHERE parent = OLD.id;
    END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER prune AFTER UPDATE OR DELETE ON s FOR EACH ROW EXECUTE FUNCTION prune();
SELECT grow();
SELECT migrate.define('tree', 's', 't');
SELECT migrate.set('tree', 'dual_write', 'strict');
SELECT arm('tree', 'forward'), equal();
CALL cut('', '', '', '', '');
SELECT migrate.drop('tree');
DROP TABLE t, s, root;

-- foreign keys to the target: CASCADE goes on from there; RESTRICT refuses: recorded in best_effort, an error in strict
CREATE TABLE s (id int PRIMARY KEY, v text);
CREATE TABLE t (id int PRIMARY KEY, v text);
CREATE TABLE child (id int REFERENCES t ON DELETE CASCADE);
CREATE TABLE clerk (id int REFERENCES t);
INSERT INTO s SELECT g, 'v' FROM generate_series(1, 10) g;
SELECT migrate.define('fk', 's', 't');
SELECT severity, message FROM migrate.preflight('fk') WHERE "check" = 'foreign_key_actions';
SELECT arm('fk', 'forward');
INSERT INTO child VALUES (1), (2); INSERT INTO clerk VALUES (3), (4);
DELETE FROM s WHERE id < 4;
SELECT (SELECT array_agg(id ORDER BY id) FROM t) AS t, (SELECT count(*) FROM child) AS children, (SELECT array_agg((key, sqlstate, object)) FROM migrate._failure) AS failures;
DELETE FROM clerk; SELECT migrate._apply_keys(flow, direction, ARRAY[key]) FROM migrate._failure; DELETE FROM migrate._failure;
SELECT equal();
INSERT INTO clerk VALUES (4);
-- what fails leaves nothing behind in a worker that retries for days
CREATE FUNCTION fail(times int) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    contexts bigint;
    more bigint := 0;
    refused int := 0;
BEGIN
    IF current_setting('server_version_num')::int < 140000 THEN
        RETURN 'nothing';
    END IF;
    EXECUTE $q$ SELECT count(*) FROM pg_backend_memory_contexts WHERE name LIKE 'migrate_ext%' OR name LIKE 'CachedPlan%' $q$ INTO contexts;
    FOR i IN 1 .. times LOOP
        BEGIN
            PERFORM migrate._apply_keys(f.id, 'forward', '{{4}}') FROM migrate._flow f WHERE f.target = 'links_test.t'::regclass;
        EXCEPTION WHEN foreign_key_violation THEN refused := refused + 1;
        END;
    END LOOP;
    EXECUTE $q$ SELECT count(*) FROM pg_backend_memory_contexts WHERE name LIKE 'migrate_ext%' OR name LIKE 'CachedPlan%' $q$ INTO more;
    RETURN CASE WHEN refused < times THEN 'not refused' WHEN more - contexts < times THEN 'nothing' ELSE more - contexts || ' memory contexts' END;
END $$;
BEGIN; ALTER TABLE s DISABLE TRIGGER ALL; DELETE FROM s WHERE id = 4; SELECT fail(100) AS left_behind; ROLLBACK;
SELECT migrate.set('fk', 'dual_write', 'strict');
DELETE FROM s WHERE id = 4;
SELECT equal();
SELECT migrate.drop('fk');
DROP TABLE child, clerk, t, s;
DROP FUNCTION fail;

-- many statements in one transaction, each with a dual write that could be refused: none is left to a worker, and a foreign key never sees
-- a row that should be gone
CREATE TABLE s (id int PRIMARY KEY, v text);
CREATE TABLE t (id int PRIMARY KEY REFERENCES s, v text CHECK (v <> 'refused'));
CREATE TABLE child (id int REFERENCES t);
INSERT INTO s SELECT g, 'v' || g FROM generate_series(1, 400) g;
SELECT migrate.define('many', 's', 't');
SELECT arm('many', 'forward');
CREATE FUNCTION many(first int, last int, statement text) RETURNS void LANGUAGE plpgsql AS $$ BEGIN FOR i IN first .. last LOOP EXECUTE format(statement, i); END LOOP; END $$;
BEGIN; SELECT many(1, 100, 'DELETE FROM links_test.s WHERE id = %s'), many(101, 200, $$ UPDATE links_test.s SET v = 'w' WHERE id = %s $$); COMMIT;
SELECT equal();
BEGIN; SELECT many(201, 300, $$ UPDATE links_test.s SET v = CASE id WHEN 210 THEN 'refused' WHEN 290 THEN 'refused' ELSE 'w' END WHERE id = %s $$); SAVEPOINT a; SELECT many(301, 400, 'UPDATE links_test.s SET id = id + 1000 WHERE id = %s'); ROLLBACK TO a; SELECT many(301, 310, 'UPDATE links_test.s SET id = id + 2000 WHERE id = %s'); COMMIT;
SELECT key, sqlstate FROM migrate._failure ORDER BY key;
UPDATE s SET v = 'fine' WHERE v = 'refused'; DELETE FROM migrate._failure;
SELECT equal(), count(*) FROM s;
SELECT migrate.drop('many');
DROP TABLE child, t, s;

-- triggers on the side that follows: they write it, and the side that serves; what they do to the latter is carried as well
CREATE TABLE s (id int PRIMARY KEY, v text);
CREATE TABLE t (id int PRIMARY KEY, v text);
INSERT INTO s SELECT g, 'v' || g FROM generate_series(1, 60) g;
CREATE FUNCTION poke() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    serving regclass := 'links_test.' || TG_ARGV[0];
BEGIN
    IF TG_OP <> 'DELETE' AND NEW.v = 'poke' THEN
        EXECUTE format('UPDATE %s SET v = ''poked'' WHERE id = %s', serving, NEW.id + 1);
        EXECUTE format('DELETE FROM %s WHERE id = %s', serving, NEW.id + 2);
        EXECUTE format('INSERT INTO %s VALUES (%s, ''poke of poke'')', serving, NEW.id + 1000);
    ELSIF TG_OP <> 'DELETE' AND NEW.v = 'poke of poke' THEN
        EXECUTE format('UPDATE %s SET id = id + 1000, v = ''done'' WHERE id = %s', serving, NEW.id);
    ELSIF TG_OP <> 'DELETE' AND NEW.v = 'poke many' THEN
        EXECUTE format('UPDATE %s SET v = ''poked '' || id WHERE id BETWEEN %s AND %s', serving, NEW.id, NEW.id + 9);
    ELSIF TG_OP <> 'DELETE' AND NEW.v = 'poke and raise' THEN
        EXECUTE format('UPDATE %s SET v = ''never'' WHERE id = %s', serving, NEW.id + 1);
        RAISE 'raised by the target';
    END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER poke AFTER INSERT OR UPDATE OR DELETE ON t FOR EACH ROW EXECUTE FUNCTION poke('s');
SELECT migrate.define('poke', 's', 't');
SELECT arm('poke', 'forward');
UPDATE s SET v = 'poke' WHERE id IN (1, 11);
INSERT INTO s VALUES (101, 'poke many'), (21, 'never') ON CONFLICT (id) DO UPDATE SET v = 'poke many';
-- in an EXCEPTION block of the application's, with keys of the statement around it still to be applied
CREATE FUNCTION caught() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NEW.v = 'caught' THEN
        BEGIN
            UPDATE links_test.s SET v = 'poke many' WHERE id = NEW.id + 10;
            RAISE 'undo';
        EXCEPTION WHEN raise_exception THEN NULL;
        END;
    END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER "Z_caught" AFTER UPDATE ON s FOR EACH ROW EXECUTE FUNCTION caught();
UPDATE s SET v = 'caught' WHERE id BETWEEN 30 AND 34;
SELECT equal(), count(*) FILTER (WHERE v LIKE 'poked%') AS poked, count(*) FILTER (WHERE v = 'done') AS done, count(*) FILTER (WHERE v = 'caught') AS caught FROM s;
UPDATE s SET v = 'poke and raise' WHERE id = 50;
SELECT (SELECT v FROM s WHERE id = 50), (SELECT v FROM s WHERE id = 51) AS neighbour, (SELECT array_agg((key, sqlstate)) FROM migrate._failure) AS failures;
UPDATE s SET v = 'calm' WHERE id = 50; DELETE FROM migrate._failure;
SELECT equal();
-- the rollback window: the target serves, the source's trigger pokes the target
DROP TRIGGER poke ON t; DROP TRIGGER "Z_caught" ON s;
SELECT arm('poke', 'reverse');
CREATE TRIGGER poke AFTER INSERT OR UPDATE OR DELETE ON s FOR EACH ROW EXECUTE FUNCTION poke('t');
UPDATE t SET v = 'poke' WHERE id = 41;
UPDATE t SET v = 'poke many' WHERE id = 51;
SELECT equal(), count(*) FILTER (WHERE v LIKE 'poked%') AS poked FROM t;
SELECT migrate.drop('poke');
DROP TABLE s, t;

-- constraints of the target that the application defers, also in what is applied only at the commit: a partition since attached has no statement trigger
CREATE TABLE ref (id int PRIMARY KEY);
CREATE TABLE s (id int PRIMARY KEY, r int) PARTITION BY RANGE (id);
CREATE TABLE s_1 PARTITION OF s FOR VALUES FROM (0) TO (100);
CREATE TABLE t (id int PRIMARY KEY, r int REFERENCES ref DEFERRABLE INITIALLY IMMEDIATE);
SELECT migrate.define('deferred', 's', 't');
SELECT "check", severity, message FROM migrate.preflight('deferred') WHERE "check" = 'deferred_constraints';
SELECT migrate.set('deferred', 'dual_write', 'strict');
SELECT arm('deferred', 'forward');
CREATE TABLE s_2 PARTITION OF s FOR VALUES FROM (100) TO (200);
BEGIN; SET CONSTRAINTS ALL DEFERRED; INSERT INTO s_2 VALUES (101, 1); INSERT INTO s_1 VALUES (1, 1); INSERT INTO ref VALUES (1); COMMIT;
SELECT equal(), count(*) FROM t;
BEGIN; SET CONSTRAINTS ALL DEFERRED; INSERT INTO s_1 VALUES (2, 2); COMMIT;
BEGIN; SET CONSTRAINTS ALL DEFERRED; INSERT INTO s_2 VALUES (102, 2); COMMIT;
BEGIN; SET CONSTRAINTS ALL DEFERRED; INSERT INTO s_2 VALUES (103, 2); PREPARE TRANSACTION 'refused';
SELECT equal(), count(*) FROM t;
SELECT migrate.drop('deferred');
DROP TABLE s, t, ref;

-- in the rollback window a row whose key changes is moved on the other side, too: with the columns that are there only, and what references it
CREATE TABLE s (id int PRIMARY KEY, v text NOT NULL, only_s text);
CREATE TABLE t (only_t text, id bigint PRIMARY KEY, v text NOT NULL);
CREATE TABLE child (s int NOT NULL REFERENCES s ON UPDATE CASCADE ON DELETE CASCADE, v text);
CREATE TABLE strict_child (s int NOT NULL REFERENCES s ON DELETE CASCADE);
INSERT INTO s SELECT g, 'v' || g, 's of v' || g FROM generate_series(1, 30) g;
INSERT INTO child SELECT id, v FROM s;
SELECT migrate.define('moves', 's', 't', on_target_delete => 'delete');
SELECT arm('moves', 'forward'), arm('moves', 'reverse');
UPDATE t SET only_t = 't of ' || v;
UPDATE migrate._migration SET both_directions = true;
SELECT migrate._invalidate('s'), migrate._invalidate('t');
CREATE PROCEDURE move(relation text, INOUT moved text) LANGUAGE plpgsql AS $$
DECLARE
    statement text;
BEGIN
    FOREACH statement IN ARRAY ARRAY[
        'UPDATE %s SET id = 100 WHERE id = 1',
        'UPDATE %s SET id = id + 1000, v = v || ''!'' WHERE id BETWEEN 2 AND 6',
        'UPDATE %s SET id = 200 WHERE id = 10', 'UPDATE %s SET id = 10 WHERE id = 11', 'UPDATE %s SET id = 11 WHERE id = 200',
        'DELETE FROM %s WHERE id = 12', 'UPDATE %s SET id = id - 1 WHERE id IN (13, 14)',
        'UPDATE %s SET id = 300 WHERE id = 15; UPDATE %1$s SET id = 301 WHERE id = 300',
        'WITH gone AS (DELETE FROM %s WHERE id = 16) INSERT INTO %1$s (id, v) VALUES (400, ''new'')'] LOOP
        EXECUTE format(statement, relation);
    END LOOP;
    BEGIN
        EXECUTE format('UPDATE %s SET id = 500 WHERE id = 17', relation);
        RAISE EXCEPTION 'undone';
    EXCEPTION WHEN raise_exception THEN
    END;
    EXECUTE format('UPDATE %s SET id = 501 WHERE id = 17', relation);
    moved := (SELECT format('%s, strangers: %s of s, %s of t, %s children of %s', links_test.same('SELECT id, v FROM links_test.s', 'SELECT id, v FROM links_test.t'),
        count(*) FILTER (WHERE only_s IS DISTINCT FROM 's of ' || rtrim(s.v, '!') AND s.v <> 'new'),
        count(*) FILTER (WHERE only_t IS DISTINCT FROM 't of ' || rtrim(t.v, '!') AND t.v <> 'new'),
        (SELECT count(*) FROM child c JOIN s ON s.id = c.s AND c.v = rtrim(s.v, '!')), (SELECT count(*) FROM child)) FROM s JOIN t USING (id));
    ROLLBACK;
END $$;
CALL move('t', NULL);
CALL move('s', NULL);
-- a foreign key that lets no key go is obeyed where it would act on a deletion: nobody has deleted what references the row; also
-- among others, when no subtransactions are left, and from the source's own reference to itself
INSERT INTO strict_child VALUES (20);
UPDATE t SET id = 600 WHERE id = 20;
UPDATE t SET id = id + 1000 WHERE id BETWEEN 18 AND 22;
BEGIN; SELECT many(1, 40, 'UPDATE links_test.t SET id = id + 1000 WHERE id = %s'); COMMIT;
SELECT same('SELECT id, v FROM s', 'SELECT id, v FROM t'), (SELECT count(*) FROM strict_child) AS children, (SELECT count(*) FROM migrate._failure) AS failures;
ALTER TABLE s ADD parent int REFERENCES s ON DELETE CASCADE;
UPDATE s SET parent = 25 WHERE id BETWEEN 26 AND 29;
UPDATE t SET id = 600 WHERE id = 25;
SELECT same('SELECT id, v FROM s', 'SELECT id, v FROM t'), count(*) FROM s;
-- so is whatever else refuses the move of a row that others reference
ALTER TABLE s ADD CHECK (id < 5000);
UPDATE t SET id = 5000 WHERE id = 7;
UPDATE t SET id = 5000000000 WHERE id = 7;
SELECT same('SELECT id, v FROM s', 'SELECT id, v FROM t'), (SELECT count(*) FROM child WHERE s = 7) AS children;
-- one that acts on neither waits until it lets the row go
ALTER TABLE strict_child DROP CONSTRAINT strict_child_s_fkey, ADD FOREIGN KEY (s) REFERENCES s;
UPDATE t SET id = 600 WHERE id = 20;
SELECT (SELECT array_agg((key, sqlstate, object)) FROM migrate._failure) AS failures, (SELECT count(*) FROM s WHERE id IN (20, 600)) AS rows, (SELECT count(*) FROM strict_child) AS children;
SELECT migrate.drop('moves');
DROP TABLE s, t, child, strict_child;

-- also where each must have moved before a foreign key's check, and they are more than a transaction may isolate one by one
CREATE TABLE s (id int PRIMARY KEY, v text NOT NULL);
CREATE TABLE t (id int PRIMARY KEY REFERENCES s, v text NOT NULL CHECK (v <> 'x'), only_t int);
CREATE TABLE child (t int NOT NULL REFERENCES t ON UPDATE CASCADE ON DELETE CASCADE);
INSERT INTO s SELECT g, 'v' || g FROM generate_series(1, 100) g;
SELECT migrate.define('many_moves', 's', 't', 'id, v', on_target_delete => 'delete');
UPDATE migrate._migration SET both_directions = true;
SELECT arm('many_moves', 'forward'), arm('many_moves', 'reverse');
UPDATE t SET only_t = id;
INSERT INTO child SELECT id FROM t;
UPDATE s SET id = id + 1000, v = v || '!';
BEGIN; SELECT many(1001, 1060, 'UPDATE links_test.s SET id = id + 1000 WHERE id = %s'); SAVEPOINT a; SELECT many(1061, 1064, 'UPDATE links_test.s SET id = id + 1000 WHERE id = %s'); ROLLBACK TO a; SELECT many(1065, 1070, 'UPDATE links_test.s SET id = id + 1000 WHERE id = %s'); COMMIT;
SELECT same('SELECT id, v FROM s', 'SELECT id, v FROM t'), count(only_t), (SELECT count(*) FROM child) AS children FROM t;
SELECT migrate.drop('many_moves');
DROP TABLE child, t, s;

-- several sources in one target: a row whose key changes within its source's share is moved there, too, and one that changes its share
-- leaves alone what the other source has under the same rest of the key; also on its way over a key that it does not keep
CREATE TABLE eu (id int PRIMARY KEY, v text NOT NULL, only_s text);
CREATE TABLE us (LIKE eu INCLUDING ALL);
CREATE TABLE t (v text NOT NULL, region varchar(9) NOT NULL, id bigint NOT NULL, PRIMARY KEY (region, id)) PARTITION BY LIST (region);
CREATE TABLE t_eu PARTITION OF t FOR VALUES IN ('eu');
CREATE TABLE t_other (gone int, id bigint NOT NULL, region varchar(9) NOT NULL, v text NOT NULL);
ALTER TABLE t_other DROP gone;
ALTER TABLE t ATTACH PARTITION t_other DEFAULT;
CREATE TABLE child_eu (s int NOT NULL REFERENCES eu ON UPDATE CASCADE ON DELETE CASCADE);
CREATE TABLE child_us (s int NOT NULL REFERENCES us ON UPDATE CASCADE ON DELETE CASCADE);
INSERT INTO eu SELECT g, 'e' || g, 's' FROM generate_series(1, 20) g;
INSERT INTO us SELECT g, 'u' || g, 's' FROM generate_series(1, 20) g;
INSERT INTO child_eu SELECT id FROM eu;
INSERT INTO child_us SELECT id FROM us;
SELECT migrate.define('shares', 'eu', 't', $$ 'eu' AS region, id, v $$, on_target_delete => 'delete');
SELECT migrate.add_flow('shares', 'us', 't', $$ 'us' AS region, id, v $$, flow => 'us', on_target_delete => 'delete');
UPDATE migrate._migration SET both_directions = true;
SELECT arm('shares', 'forward'), arm('shares', 'reverse');
CREATE VIEW shares AS
SELECT same('SELECT ''eu'' AS region, id, v FROM eu UNION ALL SELECT ''us'', id, v FROM us', 'SELECT region::text, id, v FROM t WHERE region IN (''eu'', ''us'')'),
       (SELECT count(*) FROM child_eu) AS child_eu, (SELECT count(*) FROM child_us) AS child_us, (SELECT count(only_s) FROM eu) AS of_eu, (SELECT count(only_s) FROM us) AS of_us;
UPDATE t SET id = id + 100 WHERE id < 5;
UPDATE t SET id = id - 1 WHERE region = 'us' AND id > 100;
UPDATE t SET id = 200 WHERE id = 5 AND region = 'us'; UPDATE t SET id = 5 WHERE id = 6 AND region = 'us'; UPDATE t SET id = 6 WHERE id = 200 AND region = 'us';
TABLE shares;
WITH one AS (UPDATE t SET id = 300 WHERE region = 'us' AND id = 7) INSERT INTO t (region, id, v) VALUES ('eu', 300, 'new');
UPDATE t SET region = 'us', id = 301 WHERE region = 'eu' AND id = 300;
UPDATE t SET region = 'nowhere' WHERE region = 'us' AND id = 301;
TABLE shares;
CREATE FUNCTION onwards() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN UPDATE t SET id = id + 1 WHERE id = NEW.id AND region = NEW.region; RETURN NULL; END $$;
CREATE TRIGGER zz AFTER UPDATE ON t FOR EACH ROW WHEN (NEW.id % 2 = 0) EXECUTE FUNCTION onwards();
UPDATE t SET id = 400 WHERE id = 8;
TABLE shares;
DROP TRIGGER zz ON t;
CREATE TRIGGER " before ours" AFTER UPDATE ON t FOR EACH ROW WHEN (NEW.id % 2 = 0) EXECUTE FUNCTION onwards();
UPDATE t SET id = 500 WHERE id = 9;
SELECT same FROM shares;
SELECT migrate.drop('shares');
DROP VIEW shares;
DROP TABLE child_eu, child_us, eu, us, t;
DROP FUNCTION onwards;

-- so is a row whose new key is another partition's: an update, though it comes as a deletion and an insertion
CREATE TABLE s (id int PRIMARY KEY, v text NOT NULL, only_s text);
CREATE TABLE t (v text NOT NULL, id bigint NOT NULL PRIMARY KEY) PARTITION BY RANGE (id);
CREATE TABLE t_1 PARTITION OF t FOR VALUES FROM (0) TO (100);
CREATE TABLE t_2 (id bigint NOT NULL, v text NOT NULL);
ALTER TABLE t ATTACH PARTITION t_2 DEFAULT;
CREATE TABLE child (s int NOT NULL REFERENCES s ON UPDATE CASCADE ON DELETE CASCADE, v text);
INSERT INTO s SELECT g, 'v' || g, 's of v' || g FROM generate_series(1, 30) g;
INSERT INTO child SELECT id, v FROM s;
SELECT migrate.define('partitions', 's', 't', on_target_delete => 'delete');
UPDATE migrate._migration SET both_directions = true;
SELECT arm('partitions', 'forward'), arm('partitions', 'reverse');
CREATE VIEW moved AS SELECT same('SELECT id, v FROM s', 'SELECT id, v FROM t'), count(*) AS rows, count(only_s) AS with_more, (SELECT count(*) FROM child JOIN s ON s.id = child.s AND s.v = child.v) AS children FROM s;
UPDATE t SET id = id + 98 WHERE id < 5;
TABLE moved;
CREATE TABLE of_one (t bigint NOT NULL REFERENCES t_1 ON UPDATE CASCADE ON DELETE CASCADE);
INSERT INTO of_one VALUES (30);
UPDATE s SET id = 60 WHERE id = 30;
SELECT same, (TABLE of_one) AS child_of_partition FROM moved;
DROP TABLE of_one;
UPDATE t SET id = 103 - id WHERE id IN (101, 102);
UPDATE t SET id = id + 1000;
TABLE moved;
BEGIN; UPDATE t SET id = 7 WHERE id = 1007; SAVEPOINT a; UPDATE t SET id = 500 WHERE id = 7; ROLLBACK TO a; UPDATE t SET id = 501 WHERE id = 7; COMMIT;
TABLE moved;
-- not what only looks like one: where a trigger lets no row arrive, the next that is inserted is another
CREATE FUNCTION nothing() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NULL; END $$;
CREATE TRIGGER swallow BEFORE INSERT ON t_1 FOR EACH ROW EXECUTE FUNCTION nothing();
UPDATE t SET id = 8 WHERE id = 1008;
INSERT INTO t VALUES ('v8', 2000);
TABLE moved;
SELECT migrate.drop('partitions');
DROP VIEW moved;
DROP TABLE child, s, t;
DROP FUNCTION nothing;

-- what the filter of the way forth leaves out is not the target's: that it is not there deletes no row of the source. Not by TRUNCATE, nor
-- by a key that is tried again after its row has left the filter, nor to make room in a unique index, nor by the end of a row that another
-- target has taken over.
CREATE TABLE s (id int PRIMARY KEY, v text UNIQUE CHECK (v <> 'refused'), active boolean NOT NULL DEFAULT true);
CREATE TABLE t (id int PRIMARY KEY, v text);
CREATE TABLE u (id bigint PRIMARY KEY, v text);
INSERT INTO s SELECT g, 'v' || g, g % 2 = 0 FROM generate_series(1, 10) g;
SELECT migrate.define('part', 's', 't', filter => 'active', on_target_delete => 'delete');
SELECT migrate.add_flow('part', 's', 'u', filter => 'NOT active', reverse => 'id, v, false AS active', on_target_delete => 'delete');
UPDATE migrate._migration SET both_directions = true;
SELECT arm('part', 'forward'), arm('part', 'reverse');
UPDATE t SET v = 'refused' WHERE id = 4;
UPDATE s SET active = false WHERE id = 4;
SELECT migrate._apply_keys(flow, direction, ARRAY[key]) FROM migrate._failure;
DELETE FROM migrate._failure;
INSERT INTO t VALUES (11, 'v7');
SELECT key, sqlstate FROM migrate._failure;
DELETE FROM t WHERE id IN (6, 11);
BEGIN; INSERT INTO u SELECT * FROM t WHERE id = 8; DELETE FROM t WHERE id = 8; COMMIT;
TRUNCATE t;
SELECT * FROM s ORDER BY id;
SELECT same('SELECT id, v FROM s', 'TABLE u');
-- nor where the filter itself is lost
INSERT INTO t VALUES (20, 'v20');
ALTER TABLE s RENAME active TO was_active;
ALTER TABLE s DROP was_active CASCADE;
TRUNCATE t;
DELETE FROM u WHERE id = 1;
SELECT count(*) FROM s;
DELETE FROM migrate._failure;
SELECT migrate.drop('part');
DROP TABLE s, t, u;
-- a row that leaves the filter as its key changes is no move, which a foreign key to the target could refuse
CREATE TABLE s (id int PRIMARY KEY, active boolean NOT NULL);
CREATE TABLE t (id int PRIMARY KEY, only_t text);
CREATE TABLE child (t int REFERENCES t ON DELETE CASCADE);
INSERT INTO s SELECT g, true FROM generate_series(1, 3) g;
SELECT migrate.define('leaves', 's', 't', 'id', filter => 'active', on_target_delete => 'delete');
UPDATE migrate._migration SET both_directions = true;
SELECT arm('leaves', 'forward'), arm('leaves', 'reverse');
INSERT INTO child VALUES (1), (2);
UPDATE s SET id = 10, active = false WHERE id = 1;
UPDATE s SET id = 20 WHERE id = 2;
SELECT same('SELECT id FROM s WHERE active', 'SELECT id FROM t'), (SELECT array_agg(t) FROM child) AS children;
SELECT migrate.drop('leaves');
DROP TABLE child, s, t;

-- a filter that raises an error is none of the application's on the way back, either
CREATE TABLE s (id int PRIMARY KEY, n int NOT NULL);
CREATE TABLE t (id int PRIMARY KEY, n int NOT NULL);
INSERT INTO s SELECT g, g FROM generate_series(1, 3) g;
SELECT migrate.define('raises', 's', 't', filter => '10 / n > 0', on_target_delete => 'delete');
UPDATE migrate._migration SET both_directions = true;
SELECT arm('raises', 'forward'), arm('raises', 'reverse');
UPDATE s SET n = 0 WHERE id = 1;
DELETE FROM t WHERE id IN (1, 2);
TRUNCATE t;
SELECT direction, key, sqlstate, (SELECT count(*) FROM migrate._gap) AS gaps FROM migrate._failure ORDER BY direction, key;
DELETE FROM migrate._failure;
SELECT migrate.drop('raises');
DROP TABLE s, t;
DROP FUNCTION many;
DROP SCHEMA links_test CASCADE;

-- The backfill's batch that locks no row (protocol P2): what it copies, what it gives back, and when it is not used.
\set VERBOSITY terse
SET client_min_messages = warning;
CREATE SCHEMA bulk_test;
SET search_path = bulk_test;

-- Copies the whole source in batches of so many rows; says what was given back, and whether the source was written (locked).
CREATE FUNCTION copy_all(size integer, max_bytes bigint DEFAULT NULL) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    f migrate._flow;
    b record;
    checkpoint text[];
    given_back text[];
    n bigint := 0;
    locked bigint;
BEGIN
    SELECT * INTO STRICT f FROM migrate._flow;
    LOOP
        SELECT * INTO b FROM migrate._apply_range(f.id, checkpoint, NULL, size, max_bytes);
        n := n + b.rows_done;
        given_back := given_back || b.skipped;
        ASSERT b.reached IS NULL OR b.rows_done + coalesce(array_length(b.skipped, 1), 0) > 0, 'a batch of nothing';
        EXIT WHEN b.reached IS NULL;
        checkpoint := b.reached;
    END LOOP;
    EXECUTE format('SELECT count(*) FROM %s WHERE xmax <> 0', f.source) INTO locked;
    RETURN format('%s rows, %s locked, given back: %s', n, locked, coalesce(given_back::text, 'none'));
END $$;
CREATE FUNCTION same(a text, b text) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    n bigint;
BEGIN
    EXECUTE format('WITH a AS (%s), b AS (%s) SELECT count(*) FROM ((TABLE a EXCEPT ALL TABLE b) UNION ALL (TABLE b EXCEPT ALL TABLE a)) x', a, b) INTO n;
    RETURN CASE n WHEN 0 THEN 'ok' ELSE n || ' rows differ' END;
END $$;
CREATE FUNCTION why_not() RETURNS text LANGUAGE sql AS $$ SELECT coalesce(migrate._no_bulk_copy(id), 'in bulk') FROM migrate._flow $$;
CREATE PROCEDURE forget() LANGUAGE plpgsql AS $$ BEGIN
    PERFORM migrate.drop(name) FROM migrate._migration;
    DROP TABLE s, t;
END $$;

-- rows of all sizes, expressions, defaults and a filter; batches end at a number of rows, or of bytes
CREATE TABLE s (id int PRIMARY KEY, v text, n numeric(10,3), at timestamptz NOT NULL DEFAULT '2026-01-01 00:00+00');
CREATE TABLE t (at timestamptz, gone int, id int PRIMARY KEY, v varchar(100000) NOT NULL, n numeric(12,2), made serial, kind text DEFAULT 'new' NOT NULL);
ALTER TABLE t DROP gone;
INSERT INTO s SELECT g * 3, CASE WHEN g % 5 > 0 THEN repeat(md5(g::text), g % 70) END, g / 7.0 FROM generate_series(1, 2500) g;
UPDATE s SET v = (SELECT string_agg(md5(g::text), '') FROM generate_series(1, 2000) g) WHERE id % 300 = 0;
SELECT migrate.define('m', 's', 't', $$ id, coalesce(v, '') AS v, n, at $$, filter => 'id % 2 = 0');
SELECT why_not();
SELECT copy_all(7), same('SELECT id, coalesce(v, ''''), n::numeric(12,2), at FROM s WHERE id % 2 = 0', 'SELECT id, v, n, at FROM t');
SELECT count(DISTINCT made) FROM t WHERE kind = 'new';
TRUNCATE t;
SELECT copy_all(100000), same('SELECT id, coalesce(v, ''''), n::numeric(12,2), at FROM s WHERE id % 2 = 0', 'SELECT id, v, n, at FROM t');
TRUNCATE t;
SELECT copy_all(100000, 50000), same('SELECT id, coalesce(v, ''''), n::numeric(12,2), at FROM s WHERE id % 2 = 0', 'SELECT id, v, n, at FROM t');
CALL forget();

-- not a byte of the source is written, once the hint bits of its rows are set
CREATE TABLE s (id int PRIMARY KEY, v text) WITH (autovacuum_enabled = off);
CREATE TABLE t (LIKE s INCLUDING ALL);
INSERT INTO s SELECT g, md5(g::text) FROM generate_series(1, 2000) g;
VACUUM s;
CHECKPOINT;
SELECT md5(pg_read_binary_file(pg_relation_filepath('s'))) AS before \gset
SELECT migrate.define('m', 's', 't', 'id, v');
SELECT why_not(), copy_all(100), same('TABLE s', 'TABLE t');
CHECKPOINT;
SELECT md5(pg_read_binary_file(pg_relation_filepath('s'))) = :'before' AS untouched;
CALL forget();

-- keys of several columns, and of types whose order is their own; the order of the index is that of the ranges
CREATE TABLE s (b text, c numeric, a bool, v int, PRIMARY KEY (a, b, c));
CREATE TABLE t (a bool, b text, c numeric, v int, PRIMARY KEY (a, b, c));
INSERT INTO s SELECT 'x' || g % 13 || '''"{},\ ', (g / 13)::numeric(10, 2) / 4, g % 2 = 0, g FROM generate_series(1, 1300) g;
SELECT migrate.define('m', 's', 't');
SELECT why_not(), copy_all(1), same('SELECT a, b, c, v FROM s', 'TABLE t');
SELECT r.rows_done, r.reached FROM migrate._flow f, migrate._apply_range(f.id, '{f,"x1''\"{},\\ ",3.0}', '{t,"x10''\"{},\\ ",0}', 1000) r;
SELECT count(*) FROM s WHERE (a, b, c) > (false, 'x1''"{},\ ', 3.0) AND (a, b, c) <= (true, 'x10''"{},\ ', 0);
CALL forget();
CREATE TABLE s (k text PRIMARY KEY, d date); CREATE TABLE t (k text PRIMARY KEY, d date);
INSERT INTO s SELECT chr(65 + g % 26) || repeat('ä', g % 3) || g, '2026-01-01'::date + g FROM generate_series(1, 1000) g;
SELECT migrate.define('m', 's', 't');
SET DateStyle = 'SQL, DMY';
SELECT why_not(), copy_all(17), same('TABLE s', 'TABLE t');
RESET DateStyle;

-- rows that are there already: the same, another, most of them
TRUNCATE t;
INSERT INTO t SELECT k, CASE WHEN k ~ '[16]$' THEN '2000-01-01' ELSE d END FROM s WHERE k ~ '^[BC]';
SELECT regexp_replace(copy_all(1000), '\{\{.*', (SELECT count(*) || ' keys' FROM s WHERE k ~ '^[BC].*[16]$'));
SELECT count(*) AS stale FROM s JOIN t USING (k) WHERE s.d <> t.d;
SELECT copy_all(1000), same('TABLE s', 'TABLE t');
CALL forget();

-- what the target refuses fails the batch, with the constraint's name; but a duplicate is given back
CREATE TABLE s (id int PRIMARY KEY, v text, u int); CREATE TABLE t (id int PRIMARY KEY, v varchar(5) CONSTRAINT not_bad CHECK (v <> 'bad') NOT NULL, u int CONSTRAINT one_u UNIQUE);
INSERT INTO s SELECT g, g::text, g FROM generate_series(1, 200) g;
SELECT migrate.define('m', 's', 't', 'id, v, u');
CREATE FUNCTION refused(v text, u int) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    name text;
BEGIN
    UPDATE s SET v = refused.v, u = refused.u WHERE id = 150;
    PERFORM copy_all(1000);
    RETURN 'nothing refused';
EXCEPTION WHEN OTHERS THEN
    GET STACKED DIAGNOSTICS name = CONSTRAINT_NAME;
    RETURN concat_ws(' ', SQLSTATE, nullif(name, ''), (SELECT count(*) || ' rows' FROM t));
END $$;
SELECT why_not(), refused('bad', 150), refused(NULL, 150), refused('too long', 150), refused('dup', 3), refused('fine', 150);
CALL forget();

-- What another unique index of the target refuses is given back, to be recorded by its key: it may be the very row, which a dual
-- write has put there (500), an older state of it (600), or somebody else's (700). Nor does a batch wait for who writes it.
CREATE TABLE s (id int PRIMARY KEY, email text); CREATE TABLE t (id int PRIMARY KEY, email text UNIQUE);
INSERT INTO s SELECT g, 'mail ' || g FROM generate_series(1, 1000) g;
SELECT migrate.define('m', 's', 't');
INSERT INTO t VALUES (500, 'mail 500'), (600, 'mail'), (7000, 'mail 700');
SELECT why_not(), copy_all(1000), same('SELECT * FROM s WHERE id NOT IN (600, 700)', 'SELECT * FROM t WHERE id NOT IN (600, 7000)');
CALL forget();

-- when a batch is not made so
CREATE TABLE s (id int PRIMARY KEY, v text); CREATE TABLE t (id int PRIMARY KEY, v text);
SELECT migrate.define('m', 's', 't');
SELECT why_not();
ALTER TABLE t ADD FOREIGN KEY (id) REFERENCES s; SELECT why_not(); ALTER TABLE t DROP CONSTRAINT t_id_fkey;
ALTER TABLE s DROP CONSTRAINT s_pkey; SELECT why_not();
CREATE UNIQUE INDEX i ON s (id DESC); SELECT why_not(); DROP INDEX i;
CREATE UNIQUE INDEX i ON s (id) WHERE id > 0; SELECT why_not(); DROP INDEX i;
ALTER TABLE s ADD UNIQUE (id) INCLUDE (v); SELECT why_not();
CREATE FUNCTION nothing() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';
CREATE TRIGGER x AFTER DELETE ON t FOR EACH STATEMENT EXECUTE FUNCTION nothing(); SELECT why_not(); DROP TRIGGER x ON t;
ALTER TABLE t ADD EXCLUDE (v WITH =); SELECT why_not(); ALTER TABLE t DROP CONSTRAINT t_v_excl;
SELECT why_not();
CALL forget();
DROP SCHEMA bulk_test CASCADE;

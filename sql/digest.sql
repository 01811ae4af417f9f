-- Digests: equal to md5(string_agg()), blind to no byte of any type, blind to every setting.
\set VERBOSITY terse
SET client_min_messages = warning;
CREATE SCHEMA digest;
SET search_path = digest, public;

-- md5_agg is md5(string_agg(…)), bit for bit
SELECT v, migrate.md5_agg(x, s ORDER BY n) IS NOT DISTINCT FROM md5(string_agg(x, s ORDER BY n)) AS equal
FROM (VALUES ('plain', 1, 'a', ','), ('plain', 2, 'b', ','), ('plain', 3, 'c', ','),
             ('leading NULL', 1, NULL, ','), ('leading NULL', 2, 'b', '-'), ('leading NULL', 3, 'c', '+'),
             ('all NULL', 1, NULL, ','), ('all NULL', 2, NULL, ','),
             ('no separator', 1, 'a', NULL), ('no separator', 2, 'b', NULL), ('one separator', 1, 'a', 'x'), ('one separator', 2, 'b', NULL),
             ('empty', 1, '', ''), ('multibyte', 1, 'Ärger', '→'), ('multibyte', 2, '日本', '→'), ('one', 1, 'a', ',')) d(v, n, x, s)
GROUP BY v ORDER BY v COLLATE "C";
SELECT migrate.md5_agg(x::text, ',') IS NULL AS empty_is_null FROM generate_series(1, 0) x;
SELECT migrate.md5_agg(repeat(md5(x::text), x % 200), E'\n' ORDER BY x) = md5(string_agg(repeat(md5(x::text), x % 200), E'\n' ORDER BY x)) AS equal
FROM generate_series(1, 5000) x;
-- in groups, hashed and sorted, each read in its own order, called again by a rescan
SELECT count(*), bool_and(a = b) AS equal
FROM (SELECT g, migrate.md5_agg(x::text, ',' ORDER BY x DESC) a, md5(string_agg(x::text, ',' ORDER BY x DESC)) b
      FROM (SELECT x, x % 3000 g FROM generate_series(1, 20000) x) s GROUP BY g) t;
SELECT i, (SELECT count(DISTINCT m) FROM (SELECT migrate.md5_agg(x::text, ',') m FROM generate_series(1, 50) x GROUP BY x OFFSET 0) q WHERE i > 0)
FROM generate_series(1, 3) i;

-- the canonical encoding by hand: tag, length, bytes
SELECT migrate.ordered_md5(i, t, b, n ORDER BY i) = md5(string_agg(
           '\x01'::bytea || int4send(4) || int4send(i) || '\x01'::bytea || int4send(octet_length(t)) || convert_to(t, 'UTF8')
           || CASE WHEN b IS NULL THEN '\x00'::bytea ELSE '\x01'::bytea || int4send(length(b)) || b END
           || '\x01'::bytea || int4send(length(numeric_send(n))) || numeric_send(n), '' ORDER BY i)) AS equal
FROM (SELECT i, repeat('ü', i % 7) t, CASE WHEN i % 3 > 0 THEN decode(repeat('00ff', i % 5), 'hex') END b, i / 8.0 n FROM generate_series(1, 1000) i) s;
SELECT migrate.ordered_md5(a, b ORDER BY a) = migrate.ordered_md5(ROW(a, b) ORDER BY a) AS row_is_its_columns FROM (VALUES (1, 'x'), (2, NULL)) v(a, b);
-- borders of columns and rows count, so does NULL
SELECT migrate.ordered_md5('a'::text, 'bc'::text) <> migrate.ordered_md5('ab'::text, 'c'::text) AS borders,
       migrate.ordered_md5(NULL::text) <> migrate.ordered_md5(''::text) AS "null";
SELECT migrate.ordered_md5(a ORDER BY a) <> migrate.ordered_md5(a ORDER BY a DESC) AS "order" FROM generate_series(1, 2) a;

-- every type: one changed byte, NULL, and values that = calls equal
CREATE TYPE mood AS ENUM ('sad', 'happy');
CREATE TYPE pair AS (a int, b text);
CREATE DOMAIN short AS text CHECK (length(VALUE) < 10);
CREATE TYPE span AS RANGE (subtype = text);
CREATE TABLE pairs_of_values (type text, a text, b text);
INSERT INTO pairs_of_values VALUES
    ('boolean', 't', 'f'), ('"char"', 'a', 'b'), ('smallint', '1', '257'), ('integer', '1', '16777217'), ('bigint', '1', '72057594037927937'),
    ('oid', '1', '2'), ('real', '0', '-0'), ('double precision', '0', '-0'), ('double precision', '1', '1.0000000000000002'), ('numeric', '1.0', '1.00'),
    ('numeric', 'NaN', '0'), ('numeric(10,2)', '1', '1.01'), ('money', '1', '1.01'), ('text', 'a', 'a '), ('text', 'é', E'e\u0301'), ('varchar(5)', 'a', 'a '),
    ('char(5)', 'a', 'b'), ('name', 'a', 'b'), ('bytea', '\x00', '\x0000'), ('date', '2020-01-01', '2020-01-02'), ('time', '24:00', '00:00'),
    ('timetz', '12:00+00', '13:00+01'), ('timestamp', '2020-01-01', '2020-01-01 00:00:00.000001'), ('timestamptz', '2020-01-01 00:00+00', 'infinity'),
    ('interval', '24 hours', '1 day'), ('uuid', '00000000-0000-0000-0000-000000000000', '00000000-0000-0000-0000-000000000001'),
    ('json', '{"a":1}', '{"a": 1}'), ('jsonb', '{"a":1.0}', '{"a":1.00}'), ('xml', '<a/>', '<a></a>'), ('inet', '10.0.0.1', '10.0.0.1/31'), ('cidr', '10.0.0.0/8', '10.0.0.0/9'),
    ('macaddr', '00:00:00:00:00:00', '00:00:00:00:00:01'), ('macaddr8', '00:00:00:00:00:00:00:00', '00:00:00:00:00:00:00:01'),
    ('bit(3)', '101', '100'), ('bit varying', '1', '10'), ('point', '(0,0)', '(-0,0)'), ('box', '(1,1),(0,0)', '(1,2),(0,0)'), ('path', '((0,0),(1,1))', '[(0,0),(1,1)]'),
    ('polygon', '((0,0),(1,1))', '((0,0),(1,2))'), ('circle', '<(0,0),1>', '<(0,0),2>'), ('line', '{1,2,3}', '{1,2,4}'), ('lseg', '[(0,0),(1,1)]', '[(1,1),(0,0)]'),
    ('tsvector', 'a:1', 'a:2'), ('tsquery', 'a & b', 'a | b'), ('pg_lsn', '0/0', '0/1'), ('tid', '(0,1)', '(0,2)'), ('xid', '1', '2'),
    ('int4range', '[1,5)', '[1,6)'), ('numrange', '[1.0,2)', '[1.00,2)'), ('span', '[a,b]', '[a,b)'), ('tstzrange', '[2020-01-01 00:00+00,)', '(2020-01-01 00:00+00,)'),
    ('int[]', '{1,NULL}', '{1,0}'), ('int[]', '{}', '{NULL}'), ('int[]', '[0:1]={1,2}', '{1,2}'), ('text[]', '{a,bc}', '{ab,c}'), ('numeric[]', '{1.0}', '{1.00}'),
    ('mood', 'sad', 'happy'), ('mood[]', '{sad}', '{happy}'), ('pair', '(1,)', '(1,"")'), ('pair[]', '{"(1,a)"}', '{"(1,b)"}'), ('short', 'a', 'b'),
    ('regclass', 'pg_class', 'pg_type'), ('aclitem', 'postgres=r/postgres', 'postgres=w/postgres'), ('aclitem[]', '{postgres=r/postgres}', '{postgres=w/postgres}'),
    ('double precision[]', '{0}', '{-0}'), ('jsonpath', '$.a', '$.b'), ('pg_snapshot', '1:2:', '1:3:');
UPDATE pairs_of_values SET a = replace(a, 'postgres', current_user), b = replace(b, 'postgres', current_user) WHERE type LIKE 'aclitem%';
CREATE FUNCTION look(sql text) RETURNS text LANGUAGE plpgsql AS $$
DECLARE r text; BEGIN EXECUTE sql INTO r; RETURN r; END $$;
CREATE VIEW verdicts AS
    SELECT type, a, b,
        look(format('SELECT migrate.ordered_md5(%L::%s) <> migrate.ordered_md5(%L::%s)', a, type, b, type)) = 'true' AS changed,
        look(format('SELECT migrate.ordered_md5(%L::%s) <> migrate.ordered_md5(NULL::%s)', a, type, type)) = 'true' AS nulled,
        look(format('SELECT migrate.ordered_md5(%L::%s) = migrate.ordered_md5(%L::%s)', a, type, a, type)) = 'true' AS same,
        look(format('SELECT migrate.same_image(%L::%s, %L::%s)', a, type, b, type)) = 'false'
        AND look(format('SELECT migrate.same_image(%L::%s, %L::%s)', a, type, a, type)) = 'true'
        AND look(format('SELECT migrate.same_image(%L::%s, NULL::%s)', a, type, type)) = 'false' AS imaged
    FROM pairs_of_values;
SELECT count(*) AS types, bool_and(changed) AS changed, bool_and(nulled) AS nulled, bool_and(same) AS same, bool_and(imaged) AS imaged FROM verdicts;
SELECT * FROM verdicts WHERE NOT (changed AND nulled AND same AND imaged);

-- the sum of rows: no order, but each byte and each row counts, once or twice
CREATE VIEW sums AS
    SELECT type, look(format('SELECT migrate.row_sum(%L::%s) <> migrate.row_sum(%L::%s)', a, type, b, type)) = 'true' AS changed,
        look(format('SELECT migrate.row_sum(%L::%s) <> migrate.row_sum(NULL::%s)', a, type, type)) = 'true' AS nulled,
        look(format('SELECT migrate.row_sum(%L::%s) = migrate.row_sum(%L::%s)', a, type, a, type)) = 'true' AS same
    FROM pairs_of_values;
SELECT count(*) AS types, bool_and(changed) AS changed, bool_and(nulled) AS nulled, bool_and(same) AS same FROM sums;
SELECT * FROM sums WHERE NOT (changed AND nulled AND same);
SELECT migrate.row_sum(x) AS empty FROM generate_series(1, 0) x;
SELECT migrate.row_sum(a, b ORDER BY a) = migrate.row_sum(a, b ORDER BY a DESC) AS no_order, migrate.row_sum(a, b) <> migrate.row_sum(b, a) AS columns,
       migrate.row_sum(a, b) = migrate.row_sum(ROW(a, b)) AS row_is_its_columns, split_part(migrate.row_sum(a, b), ':', 1) AS counted FROM (VALUES (1, 2), (3, NULL), (3, NULL)) v(a, b);
SELECT migrate.row_sum('a'::text, 'bc'::text) <> migrate.row_sum('ab'::text, 'c'::text) AS borders, migrate.row_sum(NULL::text) <> migrate.row_sum(''::text) AS "null";
SELECT split_part(migrate.row_sum(x), ':', 2) <> split_part(migrate.row_sum(x) FILTER (WHERE n = 1), ':', 2) AS rows_do_not_cancel FROM (VALUES (1, 1), (1, 2), (1, 3)) v(x, n);
-- it is a sum, modulo 2^128, of what single rows give
CREATE FUNCTION digits(sum text) RETURNS numeric LANGUAGE sql AS $$
    SELECT sum((strpos('0123456789abcdef', substr(split_part(sum, ':', 2), i, 1)) - 1) * 16::numeric ^ (32 - i)) FROM generate_series(1, 32) i $$;
SELECT mod((SELECT sum(digits(s)) FROM (SELECT migrate.row_sum(x, x::text) AS s FROM generate_series(1, 100) x GROUP BY x) one), 2::numeric ^ 128)
       = (SELECT digits(migrate.row_sum(x, x::text)) FROM generate_series(1, 100) x) AS added;
-- however long a row is, and wherever its parts end: a byte at each place of a long value
SELECT count(DISTINCT s) AS places FROM (SELECT migrate.row_sum(overlay(repeat('x', 9000) PLACING 'y' FROM i + 1), 1) AS s FROM generate_series(0, 8999) i GROUP BY i) x;
SELECT count(DISTINCT s) AS lengths FROM (SELECT migrate.row_sum(repeat('x', n)) AS s FROM generate_series(4000, 4200) n GROUP BY n) x;
SELECT migrate.row_sum(v) = migrate.row_sum(substr(v || v, 1, length(v))) AS same FROM (SELECT repeat('0123456789', 1000) AS v) x;
-- parallel workers find the same
CREATE TABLE big AS SELECT i, md5(i::text) AS v, CASE WHEN i % 7 > 0 THEN i / 10.0 END AS n FROM generate_series(1, 20000) i;
SET parallel_setup_cost = 0; SET parallel_tuple_cost = 0; SET min_parallel_table_scan_size = 0; SET max_parallel_workers_per_gather = 0;
CREATE TABLE serial AS SELECT migrate.row_sum(b) AS whole, migrate.row_sum(i, v, n) AS named FROM big b;
SET max_parallel_workers_per_gather = 2;
EXPLAIN (COSTS OFF) SELECT migrate.row_sum(i, v, n) FROM big;
SELECT migrate.row_sum(b) = whole AS whole, migrate.row_sum(i, v, n) = named AS named FROM big b, serial GROUP BY whole, named;
SELECT g, migrate.row_sum(i, v, n) = (SELECT migrate.row_sum(i, v, n ORDER BY i) FROM big c WHERE c.i % 3 = g) AS in_groups FROM (SELECT i % 3 AS g, * FROM big) b GROUP BY g ORDER BY g;
-- whose settings are those of the session, and count as little there
CREATE TABLE many_types AS SELECT i, ARRAY['é', md5(i::text)] AS a, jsonb_build_object('é', i) AS j, (current_user || '=r/' || current_user)::aclitem AS acl, now() AS at FROM generate_series(1, 2000) i;
SET parallel_leader_participation = off; SET client_encoding = latin1; SET DateStyle = 'SQL, DMY';
CREATE TABLE by_workers AS SELECT migrate.row_sum(m) AS sum FROM many_types m;
SET max_parallel_workers_per_gather = 0; SET client_encoding = utf8; RESET DateStyle; RESET parallel_leader_participation;
SELECT sum = (SELECT migrate.row_sum(m) FROM many_types m) AS same FROM by_workers;
RESET parallel_setup_cost; RESET parallel_tuple_cost; RESET min_parallel_table_scan_size; RESET max_parallel_workers_per_gather;

-- settings never count
CREATE FUNCTION digests() RETURNS SETOF text LANGUAGE sql AS $$
    SELECT look(format('SELECT migrate.ordered_md5(%L::%s)', CASE WHEN type IN ('money') THEN '1' ELSE a END, type)) FROM pairs_of_values ORDER BY type COLLATE "C", a COLLATE "C" $$;
INSERT INTO pairs_of_values VALUES ('text[]', '{é}', ''), ('jsonb', '"é"', ''), ('pair', '(1,é)', ''), ('tsvector', 'é', ''), ('span', '[é,é]', '');
CREATE TABLE before AS SELECT array_agg(d) AS all FROM digests() d;
SET client_encoding = latin1; SET DateStyle = 'SQL, DMY'; SET TimeZone = 'Asia/Tokyo'; SET IntervalStyle = iso_8601; SET extra_float_digits = -10; SET bytea_output = escape;
UPDATE pairs_of_values SET a = '01/01/2020' WHERE type = 'date';  -- the same day, as it is written now
UPDATE pairs_of_values SET a = '2020-01-01 09:00' WHERE type = 'timestamptz';
SELECT (SELECT array_agg(d) FROM digests() d) = "all" AS equal FROM before;
SHOW client_encoding; SHOW DateStyle;
SET client_encoding = utf8; RESET DateStyle; RESET TimeZone; RESET IntervalStyle; RESET extra_float_digits; RESET bytea_output;

-- storage never counts: inline, compressed, out of line, short header
CREATE TABLE stored (id int PRIMARY KEY, how text, v text, j jsonb, a int[]);
ALTER TABLE stored ALTER v SET STORAGE EXTERNAL;
INSERT INTO stored SELECT 1, 'external', repeat('0123456789', 5000), jsonb_build_object('a', repeat('x', 9000)), array(SELECT generate_series(1, 5000));
ALTER TABLE stored ALTER v SET STORAGE EXTENDED;
INSERT INTO stored SELECT 2, 'compressed', v || '', j || '{}', a || '{}' FROM stored;
SELECT count(DISTINCT d), count(DISTINCT s) FROM (SELECT migrate.ordered_md5(v, j, a) d, pg_column_size(v) s FROM stored GROUP BY id, v) x;
SELECT migrate.ordered_md5(v, j, a) = (SELECT migrate.ordered_md5(v, j, a) FROM stored WHERE id = 1) AS in_memory
FROM (SELECT repeat('0123456789', 5000) v, jsonb_build_object('a', repeat('x', 9000)) j, array(SELECT generate_series(1, 5000)) a) x;
SELECT bool_and(migrate.same_image(x.v, y.v) AND migrate.same_image(x.j, y.j)) FROM stored x, stored y;

-- tables
CREATE TABLE t (id int PRIMARY KEY, "odd ""name" text, n numeric(10, 2), gone int);
ALTER TABLE t DROP gone;
SELECT migrate.checksum('t') = md5('') AS empty, r.* FROM migrate.range_checksums('t') r;
INSERT INTO t SELECT i, 'v' || i, i FROM generate_series(1, 2500) i;
SELECT migrate.checksum('t') = migrate.ordered_md5(id, "odd ""name", n ORDER BY id) AS whole,
       (SELECT migrate.checksum('t', '{n,id}') = migrate.ordered_md5(n, id ORDER BY id) FROM t) AS part FROM t;
SELECT low, high, rows, md5 = (SELECT migrate.ordered_md5(id, "odd ""name", n ORDER BY id) FROM t
                               WHERE (low IS NULL OR id > low[1]::int) AND (high IS NULL OR id <= high[1]::int)) AS right
FROM migrate.range_checksums('t', range_rows => 1000);
SELECT count(*), sum(rows) FROM migrate.range_checksums('t', range_rows => 500);
SELECT count(*), sum(rows) FROM migrate.range_checksums('t', range_rows => 1);
SELECT low, high, rows FROM migrate.range_checksums('t', range_rows => 2500);
SELECT low, high, rows FROM migrate.range_checksums('t', range_rows => 2499);
CREATE TABLE c (a text COLLATE "C", b timestamptz, v int, PRIMARY KEY (a, b));
INSERT INTO c SELECT 'k' || i % 3, '2020-01-01 00:00+00'::timestamptz + i * interval '1 microsecond', i FROM generate_series(1, 300) i;
SELECT low, high, rows FROM migrate.range_checksums('c', range_rows => 150);
CREATE VIEW v AS SELECT * FROM t;
SELECT migrate.checksum('v', key => '{id}') = migrate.checksum('t') AS view, (SELECT sum(rows) FROM migrate.range_checksums('v', key => '{id}', range_rows => 7)) AS rows;
CREATE TABLE part (id int PRIMARY KEY, v text) PARTITION BY HASH (id);
CREATE TABLE part_0 PARTITION OF part FOR VALUES WITH (MODULUS 2, REMAINDER 0);
CREATE TABLE part_1 PARTITION OF part FOR VALUES WITH (MODULUS 2, REMAINDER 1);
INSERT INTO part SELECT id, "odd ""name" FROM t;
SELECT migrate.checksum('part') = migrate.checksum('t', '{id,"odd \"name"}') AS partitioned;
-- more columns than a function takes arguments
DO $$ BEGIN EXECUTE 'CREATE TABLE wide AS SELECT 1 AS c0, ' || (SELECT string_agg(i || ' AS c' || i, ', ') FROM generate_series(1, 299) i); END $$;
ALTER TABLE wide ADD PRIMARY KEY (c0);
CREATE TABLE before_change AS SELECT migrate.checksum('wide') AS was;
UPDATE wide SET c299 = 0;
SELECT migrate.checksum('wide') <> was AS changed FROM before_change;

-- errors
\set VERBOSITY default
\set SHOW_CONTEXT never
CREATE TABLE keyless (a int, b int UNIQUE);
SELECT migrate.checksum('keyless');
SELECT migrate.checksum('keyless', key => '{a}');
SELECT migrate.checksum('keyless', key => '{b}');
SELECT migrate.checksum('t', columns => '{id,nope}');
SELECT migrate.checksum('t', columns => '{}');
SELECT migrate.checksum('t_pkey');
SELECT * FROM migrate.range_checksums('t', range_rows => 0);
SELECT * FROM migrate.range_checksums('t', range_rows => 10000001);
SELECT * FROM migrate.range_checksums('t', range_rows => NULL);
CREATE VIEW ties AS SELECT 1 AS id FROM t;
SELECT count(*) FROM migrate.range_checksums('ties', key => '{id}', range_rows => 100);
SELECT migrate.ordered_md5(VARIADIC ARRAY[1, 2]);
SELECT migrate.row_sum(VARIADIC ARRAY[1, 2]);
SELECT migrate.md5_agg('a', ',') OVER ();
SELECT migrate.same_image('{"a":1}'::json, '{}'::jsonb);

-- anybody who may read the table, nobody else
CREATE ROLE digest_reader;
GRANT USAGE ON SCHEMA digest TO digest_reader;
GRANT SELECT ON t TO digest_reader;
SET ROLE digest_reader;
SELECT migrate.row_sum(t) IS NOT NULL AS summed FROM digest.t;
SELECT migrate.checksum('digest.t') IS NOT NULL AS read, (SELECT count(*) FROM migrate.range_checksums('digest.t', range_rows => 1000)) AS ranges;
SELECT migrate.checksum('digest.c');
RESET ROLE;

-- no hash is left behind: not by LIMIT, an error, a cursor, a subtransaction (a WARNING would show here)
SET client_min_messages = warning;
SELECT count(*) FROM (SELECT migrate.md5_agg(x::text, ','), migrate.ordered_md5(x) FROM generate_series(1, 5000) x GROUP BY x LIMIT 3) q;
SELECT migrate.ordered_md5(x), 1 / (x - 500) FROM generate_series(1, 1000) x GROUP BY x;
BEGIN;
DECLARE cur CURSOR FOR SELECT migrate.ordered_md5(x) IS NOT NULL FROM generate_series(1, 5000) x GROUP BY x;
FETCH 2 FROM cur;
SAVEPOINT s;
FETCH 1 FROM cur;
SELECT migrate.md5_agg(x::text, ','), 1 / (x - 2) FROM generate_series(1, 5) x GROUP BY x;
ROLLBACK TO s;
FETCH 1 FROM cur;
COMMIT;
DO $$
BEGIN
    FOR i IN 1 .. 200 LOOP
        BEGIN
            PERFORM migrate.ordered_md5(x / (x - 10)) FROM generate_series(1, 20) x;
        EXCEPTION WHEN division_by_zero THEN NULL;
        END;
    END LOOP;
END $$;

SET client_min_messages = error;
DROP SCHEMA digest CASCADE;
DROP ROLE digest_reader;

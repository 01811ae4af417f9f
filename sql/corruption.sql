-- Planted corruption in a column of every type there is: found by every method at the first run and at each later one, in its row
-- and column and nowhere else; under option equality = semantic just where the type's own = says unequal. Repair stays off.
\set VERBOSITY terse
SET client_min_messages = warning;
CREATE SCHEMA corrupt;
SET search_path = corrupt, public;

-- Each pair of values is one case: the source has them in two rows, the target the other way round.
CREATE TYPE mood AS ENUM ('sad', 'happy');
CREATE TYPE pair AS (a int, b text);
CREATE TYPE nest AS (p pair, j json, n numeric[]);
CREATE DOMAIN short AS varchar(8) CHECK (VALUE <> 'never');
CREATE DOMAIN shorts AS text[];
CREATE TYPE span AS RANGE (subtype = text);
CREATE TABLE cases (n int GENERATED ALWAYS AS IDENTITY, type text, a text, b text);
INSERT INTO cases (type, a, b) VALUES
    ('boolean', 't', 'f'), ('"char"', 'a', 'b'), ('"char"', '', 'a'), ('smallint', '1', '257'), ('integer', '1', '16777217'), ('bigint', '1', '72057594037927937'), ('oid', '1', '2'),
    ('real', '0', '-0'), ('real', '1', '1.0000001'), ('real', 'NaN', '0'), ('real', '1e-45', '0'), ('double precision', '0', '-0'), ('double precision', '1', '1.0000000000000002'), ('double precision', 'NaN', 'Infinity'),
    ('double precision', '5e-324', '0'), ('numeric', '1.0', '1.00'), ('numeric', '0', '0.0'), ('numeric', 'NaN', '0'), ('numeric', '1e130', '1e130.1'), ('numeric', '12345678901234567890123456789012345678.1', '12345678901234567890123456789012345678.2'),
    ('numeric(10,2)', '1', '1.01'), ('money', '1', '1.01'), ('text', '', ' '), ('text', 'a', 'a '), ('text', 'é', E'e\u0301'), ('text', 'a', 'A'), ('text', E'a\tb', 'a b'), ('text', repeat('x', 9000), repeat('x', 8999) || 'y'),
    ('text', repeat('x', 9000), repeat('x', 9001)), ('varchar', 'a', 'a '), ('varchar(5)', 'a', 'a '), ('varchar(5)', '', ' '), ('char(5)', 'a', 'b'), ('bpchar', 'a', 'a '), ('bpchar', '', '  '), ('name', 'a', 'b'),
    ('bytea', '\x', '\x00'), ('bytea', '\x00', '\x0000'), ('bytea', '\x610062', '\x610063'), ('bytea', '\xff', '\xfe'), ('date', '2020-01-01', '2020-01-02'), ('date', 'infinity', '-infinity'), ('time', '24:00', '00:00'), ('time', '00:00', '00:00:00.000001'),
    ('timetz', '12:00+00', '13:00+01'), ('timetz', '12:00+00', '12:00+01'), ('timestamp', '2020-01-01', '2020-01-01 00:00:00.000001'), ('timestamptz', '2020-01-01 00:00+00', '2020-01-01 00:00+01'), ('timestamptz', '2020-01-01 00:00+00', 'infinity'),
    ('interval', '24 hours', '1 day'), ('interval', '30 days', '1 mon'), ('interval', '1 s', '1.000001 s'), ('uuid', '00000000-0000-0000-0000-000000000000', '00000000-0000-0000-0000-000000000001'),
    ('json', '{"a":1}', '{"a": 1}'), ('json', '{"a":1,"a":2}', '{"a":2}'), ('jsonb', '{"a":1.0}', '{"a":1.00}'), ('jsonb', '1', '1.0'), ('jsonb', 'null', '"null"'), ('jsonb', '{}', '[]'), ('jsonb', '{"a":null}', '{}'), ('jsonb', '[1,2]', '[2,1]'), ('xml', '<a/>', '<a></a>'),
    ('inet', '10.0.0.1', '10.0.0.1/31'), ('inet', '::1', '0.0.0.1'), ('cidr', '10.0.0.0/8', '10.0.0.0/9'), ('macaddr', '00:00:00:00:00:00', '00:00:00:00:00:01'), ('macaddr8', '00:00:00:00:00:00:00:00', '00:00:00:00:00:00:00:01'),
    ('bit(3)', '101', '100'), ('bit varying', '1', '10'), ('bit varying', '', '0'), ('bit varying', '0', '00'), ('point', '(0,0)', '(-0,0)'), ('point', '(1,2)', '(2,1)'), ('line', '{1,2,3}', '{1,2,4}'), ('lseg', '[(0,0),(1,1)]', '[(1,1),(0,0)]'),
    ('box', '(1,1),(0,0)', '(2,1),(1,0)'), ('path', '((0,0),(1,1))', '[(0,0),(1,1)]'), ('polygon', '((0,0),(1,1))', '((0,0),(1,2))'), ('circle', '<(0,0),1>', '<(1,0),1>'),
    ('tsvector', 'a:1', 'a:2'), ('tsvector', 'a:1A', 'a:1B'), ('tsquery', 'a & b', 'a | b'), ('tsquery', 'a', 'a:*'), ('pg_lsn', '0/0', '0/1'), ('xid', '1', '2'), ('cid', '1', '2'), ('tid', '(0,1)', '(0,2)'), ('xid8', '1', '4294967297'),
    ('pg_snapshot', '1:2:', '1:3:'), ('txid_snapshot', '1:2:', '1:3:'), ('refcursor', 'a', 'b'), ('jsonpath', '$.a', '$.b'), ('jsonpath', '$.a', 'strict $.a'), ('aclitem', 'postgres=r/postgres', 'postgres=w/postgres'), ('int2vector', '1 2', '1 3'), ('oidvector', '1 2', '2 1'),
    ('regclass', 'pg_class', 'pg_type'), ('regcollation', '"C"', '"POSIX"'), ('regconfig', 'simple', 'english'), ('regdictionary', 'simple', 'english_stem'), ('regnamespace', 'pg_catalog', 'pg_toast'), ('regoper', '|/', '||/'), ('regoperator', '+(int4,int4)', '-(int4,int4)'),
    ('regproc', 'now', 'version'), ('regprocedure', 'abs(int4)', 'abs(int8)'), ('regrole', 'pg_monitor', 'pg_signal_backend'), ('regtype', 'int4', 'int8'),
    ('int4range', '[1,5)', '[1,6)'), ('int4range', 'empty', '(,)'), ('int8range', '[1,5)', '[1,)'), ('numrange', '[1.0,2)', '[1.00,2)'), ('numrange', '[1,2)', '[1,2]'), ('daterange', '[2020-01-01,2020-01-02)', '[2020-01-01,2020-01-03)'),
    ('tsrange', '[2020-01-01,)', '(2020-01-01,)'), ('tstzrange', '[2020-01-01 00:00+00,)', '(2020-01-01 00:00+00,)'), ('span', '[a,b]', '[a,b)'), ('mood', 'sad', 'happy'), ('pair', '(1,)', '(1,"")'), ('pair', '(,)', '(0,)'), ('pair[]', '{"(1,a)"}', '{"(1,b)"}'),
    ('nest', '("(1,a)","{""a"":1}",{1.0})', '("(1,a)","{""a"":1}",{1.00})'), ('nest', '("(1,a)","{}",{1})', '("(1,a)","{ }",{1})'), ('nest', '("(,)",,)', '(,,)'), ('short', 'a', 'a '), ('shorts', '{a,bc}', '{ab,c}'),
    ('int[]', '{1,NULL}', '{1,0}'), ('int[]', '{}', '{NULL}'), ('int[]', '[0:1]={1,2}', '{1,2}'), ('int[]', '{{1,2},{3,4}}', '{{1,2,3,4}}'), ('int[]', '{{1,2},{3,4}}', '{1,2,3,4}'), ('int[]', '[2:3][-1:0]={{1,2},{3,4}}', '{{1,2},{3,4}}'), ('text[]', '{a,bc}', '{ab,c}'),
    ('text[]', '{NULL}', '{"NULL"}'), ('text[]', '{""}', '{NULL}'), ('numeric[]', '{1.0}', '{1.00}'), ('double precision[]', '{0}', '{-0}'), ('char(3)[]', '{a}', '{b}'), ('bytea[]', '{"\\x00"}', '{"\\x0000"}'), ('json[]', '{1}', '{" 1"}'), ('mood[]', '{sad}', '{happy}'), ('int4range[]', '{"[1,2)"}', '{"[1,3)"}');
-- what this server has beyond that: multiranges, contrib, a collation that takes A for a
CREATE FUNCTION run(text text) RETURNS text LANGUAGE plpgsql AS $$ BEGIN EXECUTE text; RETURN NULL; EXCEPTION WHEN undefined_file OR undefined_object OR invalid_parameter_value OR feature_not_supported OR undefined_function THEN RETURN NULL; END $$;
SELECT count(run('CREATE EXTENSION IF NOT EXISTS ' || e)) AS none FROM unnest('{citext,hstore,ltree,cube,seg,isn}'::text[]) e;
SELECT run($$CREATE COLLATION loose (provider = icu, locale = 'und-u-ks-level2', deterministic = false)$$) AS none;
INSERT INTO cases (type, a, b) SELECT x.* FROM (VALUES
    ('int4multirange', '{[1,2),[5,6)}', '{[1,2),[5,7)}'), ('int4multirange', '{}', '{(,)}'), ('int8multirange', '{[1,2)}', '{[1,3)}'), ('nummultirange', '{[1.0,2)}', '{[1.00,2)}'), ('datemultirange', '{}', '{[2020-01-01,2020-01-02)}'),
    ('tsmultirange', '{}', '{[2020-01-01,)}'), ('tstzmultirange', '{}', '{[2020-01-01 00:00+00,)}'), ('citext', 'a', 'A'), ('citext', 'a', 'b'), ('hstore', 'a=>1', 'a=>NULL'), ('hstore', 'a=>""', ''), ('ltree', 'a.b', 'a.c'), ('lquery', 'a.*', 'b.*'), ('ltxtquery', 'a & b', 'a | b'),
    ('cube', '(1),(2)', '(2),(1)'), ('seg', '1 .. 2', '1 .. 3'), ('seg', '1.0', '1.00'), ('isbn13', '9780393040029', '9780110005331'), ('text COLLATE loose', 'a', 'A'), ('text COLLATE loose', 'a', 'b')) AS x(type, a, b)
WHERE to_regtype(split_part(x.type, ' ', 1)) IS NOT NULL AND (x.type NOT LIKE '% loose' OR EXISTS (SELECT FROM pg_collation WHERE collname = 'loose'));
UPDATE cases SET a = replace(a, 'postgres', current_user), b = replace(b, 'postgres', current_user) WHERE type = 'aclitem';
-- '1e130.1' is no number: a wide one that differs in its last digit
UPDATE cases SET a = '1' || repeat('0', 129) || '1', b = '1' || repeat('0', 129) || '2' WHERE b = '1e130.1';
-- and for each type: NULL for the first value
INSERT INTO cases (type, a, b) SELECT DISTINCT ON (type) type, a, NULL FROM cases ORDER BY type, n;

-- No type that a table's column may have is left out (but the statistics objects', which nobody writes).
SELECT t.oid::regtype AS forgotten FROM pg_type t
WHERE t.typtype IN ('b', 'r', 'm') AND NOT (t.typelem <> 0 AND t.typlen = -1) AND t.typnamespace = 'pg_catalog'::regnamespace
  AND t.typname NOT IN ('pg_node_tree', 'pg_ndistinct', 'pg_dependencies', 'pg_mcv_list', 'pg_brin_bloom_summary', 'pg_brin_minmax_multi_summary', 'gtsvector')
  AND t.oid NOT IN (SELECT to_regtype(regexp_replace(split_part(type, ' COLLATE', 1), '\(.*\)', ''))::oid FROM cases) AND t.oid NOT IN (SELECT 'bit'::regtype UNION SELECT 'varbit'::regtype);

-- One column for each type, one pair of rows for each case: 2n has a, 2n + 1 has b in the column of its type, NULL elsewhere.
CREATE TABLE columns AS SELECT type, 'c' || row_number() OVER (ORDER BY min(n)) AS name FROM cases GROUP BY type;
SELECT run('CREATE TABLE s (id int PRIMARY KEY, x text, y text, ' || string_agg(format('%s %s', name, type), ', ' ORDER BY name) || ')') FROM columns;
INSERT INTO s (id, x, y) VALUES (0, 'a', 'bc'), (1, 'ab', 'c'), (100000, NULL, 'x'), (100001, 'x', NULL), (100002, '', NULL), (100003, NULL, '');  -- borders of columns
SELECT count(run(format('INSERT INTO s (id, %s) VALUES (%s, %L), (%s, %L)', name, 2 * n, a, 2 * n + 1, b))) AS none FROM cases JOIN columns USING (type);
CREATE TABLE t (LIKE s INCLUDING ALL);
INSERT INTO t SELECT * FROM s;
SELECT migrate.define('corrupt', 's', 't', on_target_delete => 'delete');

CREATE FUNCTION validate(method text, rows int) RETURNS TABLE (verdict text, mismatches bigint, source_rows bigint)
LANGUAGE sql SET search_path = pg_catalog, pg_temp AS $$ SELECT v.verdict, v.mismatches, v.source_rows FROM migrate._validate(current_user::regrole, 'corrupt', $1, $2) v $$;
-- The worker's own validation: a new stay in the phase, and its steps to the end.
CREATE FUNCTION steps(rows int) RETURNS text LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    m int := (SELECT id FROM migrate._migration WHERE name = 'corrupt');
    r text := 'more';
BEGIN
    UPDATE migrate._migration SET phase_since = clock_timestamp() WHERE id = m;
    WHILE r = 'more' LOOP
        r := migrate._validate_step(m, rows);
    END LOOP;
    RETURN split_part(r, ':', 1);
END $$;
SELECT method, v.verdict, v.mismatches, v.source_rows = (SELECT count(*) FROM s) AS covered FROM unnest('{counts,sample,sums,checksum,ranges,rows}'::text[]) WITH ORDINALITY u(method, n), validate(method, 1000) v ORDER BY n;

-- The corruption: every pair swapped, and values moved over a column's border.
SELECT count(run(format('UPDATE t SET %1$s = o.%1$s FROM s o WHERE t.id IN (%2$s, %2$s + 1) AND o.id = %2$s + %2$s + 1 - t.id', name, 2 * n))) AS none FROM cases JOIN columns USING (type);
UPDATE t SET x = o.x, y = o.y FROM s o WHERE t.id IN (0, 1, 100000, 100001, 100002, 100003) AND o.id = CASE t.id WHEN 0 THEN 1 WHEN 1 THEN 0 WHEN 100000 THEN 100001 WHEN 100001 THEN 100000 WHEN 100002 THEN 100003 ELSE 100002 END;
-- What must be found. The type's own = is that of its arrays; what has none is compared by image. (aclitem's and cid's are by hash alone.)
CREATE FUNCTION equal(c cases) RETURNS boolean LANGUAGE plpgsql AS $$
DECLARE
    r boolean;
BEGIN
    EXECUTE format(CASE WHEN c.type LIKE '% COLLATE %' THEN 'SELECT ARRAY[%1$L::text COLLATE loose] = ARRAY[%2$L COLLATE loose]'
        WHEN c.type = 'oidvector' THEN 'SELECT %1$L::%3$s = %2$L::%3$s'  -- in an array they are equal before PostgreSQL 14
        ELSE 'SELECT ARRAY[%1$L::%3$s] = ARRAY[%2$L::%3$s]' END, c.a, c.b, c.type) INTO r;
    RETURN r AND c.b IS NOT NULL;
EXCEPTION WHEN undefined_function THEN
    RETURN false;
END $$;
CREATE TABLE expected AS
    SELECT equality, i AS key, name AS column FROM cases c JOIN columns USING (type), unnest('{image,semantic}'::text[]) equality, unnest(ARRAY[2 * n, 2 * n + 1]) i WHERE equality = 'image' OR NOT equal(c)
    UNION ALL SELECT equality, i, c FROM unnest('{image,semantic}'::text[]) equality, unnest('{0,1,100000,100001,100002,100003}'::int[]) i, unnest('{x,y}'::text[]) c;
SELECT count(*) > 250 AS many, count(*) FILTER (WHERE equality = 'semantic') BETWEEN 200 AND count(*) FILTER (WHERE equality = 'image') - 20 AS "some equal by their =" FROM expected;
-- Those of each type that their own = takes for equal
SELECT c.type, left(c.a, 20) AS a, left(c.b, 20) AS b FROM cases c WHERE equal(c) AND c.type NOT IN ('citext', 'seg', 'cube') AND c.type NOT LIKE '%multirange' AND c.type NOT LIKE '%loose' ORDER BY n;
CREATE FUNCTION wrong(equality text, what text) RETURNS TABLE (under text, run text, type text, key text, wrong text) LANGUAGE sql AS $$
    WITH found AS (SELECT m.key::int, c AS column FROM migrate.mismatches('corrupt') m, unnest(m.columns) c)
    SELECT $1, $2, k.type, key::text, CASE WHEN f.key IS NULL THEN 'not found' ELSE 'not expected' END
    FROM (SELECT * FROM expected e WHERE e.equality = $1) e FULL JOIN found f USING (key, "column") LEFT JOIN columns k ON k.name = "column" WHERE e.key IS NULL OR f.key IS NULL $$;
CREATE FUNCTION hunt(equality text) RETURNS TABLE (under text, run text, type text, key text, wrong text) LANGUAGE plpgsql AS $$
DECLARE
    rows bigint := (SELECT count(*) FROM s);
    most bigint := (SELECT count(DISTINCT e.key) FROM expected e WHERE e.equality = $1);
    how record;
BEGIN
    PERFORM migrate.set('corrupt', 'equality', $1);
    FOR again IN 1 .. 3 LOOP
        FOR how IN SELECT * FROM (VALUES ('ranges', 50), ('ranges', 10000), ('rows', 100), ('sample', 10000)) v(method, size) LOOP
            CONTINUE WHEN again > 1 AND how.size < 10000;
            RETURN QUERY SELECT hunt.equality, format('%s %s', how.method, again), NULL::text, NULL::text, format('%s, %s mismatches of %s in %s rows', v.verdict, v.mismatches, most, v.source_rows)
                FROM validate(how.method, how.size) v WHERE (v.verdict, v.mismatches, v.source_rows) IS DISTINCT FROM ('mismatch', most, rows);
            RETURN QUERY SELECT * FROM wrong(equality, format('%s by %s, run %s', how.method, how.size, again));
        END LOOP;
        RETURN QUERY SELECT hunt.equality, 'steps', NULL::text, NULL::text, r FROM steps(150) r WHERE r <> 'mismatch';
        RETURN QUERY SELECT * FROM wrong(equality, format('steps, run %s', again));
        IF equality = 'image' THEN
            RETURN QUERY SELECT hunt.equality, 'checksum', NULL::text, NULL::text, v.verdict FROM validate('checksum', 1) v WHERE v.verdict <> 'mismatch';
            RETURN QUERY SELECT hunt.equality, 'sums', NULL::text, NULL::text, v.verdict FROM validate('sums', 1) v WHERE v.verdict <> 'mismatch';
        END IF;
        RETURN QUERY SELECT hunt.equality, 'counts', NULL::text, NULL::text, v.verdict FROM validate('counts', 1) v WHERE v.verdict <> 'equal';  -- as many rows there as here: all that it looks at
    END LOOP;
END $$;
-- The digests alone, row by row
CREATE FUNCTION same_digest() RETURNS TABLE (digest text, key text) LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    c migrate._comparison;
    call text;
BEGIN
    SELECT x.* INTO c FROM migrate._migration m, migrate._comparisons(m) x WHERE m.name = 'corrupt';
    FOREACH call IN ARRAY ARRAY[c.digest, c.row_sum] LOOP
        RETURN QUERY EXECUTE format('SELECT %4$L, e.k1::text FROM (SELECT k1, %1$s AS md5 FROM (%2$s) x GROUP BY k1) e JOIN (SELECT k1, %1$s AS md5 FROM (%3$s) x GROUP BY k1) a USING (k1) WHERE e.md5 = a.md5',
            call, migrate._expected(c, '{}'), migrate._actual(c, '{}'), split_part(call, '(', 1));
    END LOOP;
END $$;
SELECT * FROM same_digest();
SELECT * FROM hunt('image');
SELECT * FROM hunt('semantic');
-- The control: one row of another kind
DELETE FROM t WHERE id = 3;
SELECT run, key, wrong FROM hunt('image') WHERE run = 'ranges by 10000, run 3' AND key IS NOT NULL;
SELECT migrate.drop('corrupt');

-- An expected value that its column cannot hold is not cut to fit: the row is a mismatch, for it cannot be copied either.
CREATE TABLE wide (id int PRIMARY KEY, v text, c text, b bit varying, a text[]);
CREATE TABLE narrow (id int PRIMARY KEY, v varchar(5), c char(5), b bit varying(3), a varchar(3)[]);
SELECT migrate.define('corrupt', 'wide', 'narrow', on_target_delete => 'delete');
INSERT INTO wide VALUES (1, 'abcde   ', 'abc', '101', '{"abc   ",NULL}'), (2, NULL, '', '1', '{}'), (3, 'x', 'x', '1', NULL);
INSERT INTO narrow SELECT * FROM wide;
SELECT method, v.verdict, v.mismatches FROM unnest('{sample,checksum,ranges,rows}'::text[]) WITH ORDINALITY u(method, n), validate(method, 1000) v ORDER BY n;
UPDATE wide SET v = 'abcdef' WHERE id = 1;
UPDATE narrow SET v = 'abcde' WHERE id = 1;
UPDATE wide SET c = 'xyzuvw', a = '{abcd}' WHERE id = 2;
UPDATE narrow SET c = 'xyzuv', a = '{abc}' WHERE id = 2;
UPDATE wide SET b = '1010' WHERE id = 3;
UPDATE narrow SET b = '101' WHERE id = 3;
SELECT method, v.verdict, v.mismatches FROM unnest('{sample,checksum,ranges,rows}'::text[]) WITH ORDINALITY u(method, n), validate(method, 1000) v ORDER BY n;
SELECT key, kind, columns FROM migrate.mismatches('corrupt') ORDER BY key;
SELECT migrate.drop('corrupt');
DROP SCHEMA corrupt CASCADE;

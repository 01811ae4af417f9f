-- Keys of every type that may be one: they round-trip through the backfill's checkpoint, the re-queue, ranges, mismatches and
-- repair, which all keep them as text; and damage is found whatever the key.
\set VERBOSITY terse
SET client_min_messages = warning;
CREATE SCHEMA keys;
SET search_path = keys, public;

-- Internals want names that hide nothing.
CREATE FUNCTION validate(name text, method text, rows int) RETURNS text
LANGUAGE sql SET search_path = pg_catalog, pg_temp AS $$
    SELECT format('%s %s of %s', v.verdict, v.mismatches, v.source_rows) FROM migrate._validate(current_user::regrole, $1, $2, $3) v $$;
CREATE FUNCTION repair(name text, execute boolean) RETURNS SETOF text
LANGUAGE sql SET search_path = pg_catalog, pg_temp AS $$ SELECT migrate._repair(current_user::regrole, $1, $2) $$;
-- The backfill in batches of one row: its checkpoint is every key in turn.
CREATE FUNCTION copy(flow int) RETURNS int LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    checkpoint text[];
    n int := 0;
BEGIN
    LOOP
        SELECT x.reached INTO checkpoint FROM migrate._apply_range($1, checkpoint, NULL, 1) x;
        EXIT WHEN checkpoint IS NULL OR n > 1000;
        n := n + 1;
    END LOOP;
    RETURN n;
END $$;
CREATE FUNCTION run(sql text) RETURNS void LANGUAGE plpgsql AS $$ BEGIN EXECUTE sql; END $$;

CREATE TYPE mood AS ENUM ('sad', 'a, "b"', 'happy');
CREATE TYPE pair AS (a int, b text);
CREATE DOMAIN positive AS int CHECK (VALUE > 0);
CREATE DOMAIN named AS pair;
CREATE TYPE span AS RANGE (subtype = float8);
CREATE TYPE fickle AS ENUM ('a', 'b');
CREATE FUNCTION as_text(fickle) RETURNS text LANGUAGE sql IMMUTABLE AS $$ SELECT 'a' $$;
CREATE CAST (fickle AS text) WITH FUNCTION as_text (fickle);
CREATE TABLE types (n int GENERATED ALWAYS AS IDENTITY, type text, vals text[], kept boolean DEFAULT true);
INSERT INTO types (type, vals) VALUES
    ('bool', '{f,t}'), ('"char"', '{a,b,"\""}'), ('int2', '{-1,0,300}'), ('int8', '{-9223372036854775808,0,9223372036854775807}'), ('oid', '{0,4294967295}'),
    ('float4', '{-0,1e-40,NaN,Infinity,-Infinity,1.1}'), ('float8', '{-0,1e-310,NaN,Infinity,0.1,1.0000000000000002}'), ('numeric', '{1.0,NaN,-7.00,1e100,0.1}'),
    ('numeric(10,2)', '{1,2.5}'), ('money', '{1,1000.5,-3}'), ('text', X), ('varchar(8)', '{"",a,"a b"}'),
    ('char(5)', '{a,"b","",é}'), ('name', '{a,b}'), ('bytea', '{"\\x","\\x00","\\x0000","\\xff00"}'), ('date', '{2020-01-01,infinity,-infinity,0001-01-01 BC}'),
    ('time', '{00:00,24:00,12:00:00.000001}'), ('timetz', '{12:00+00,13:00+01,12:00+05:30,12:00:00-15:59:59}'), ('timestamp', '{2020-01-01,infinity,0001-01-01 BC}'),
    ('timestamptz', '{2020-01-01 00:00+00,infinity,2020-10-25 01:30:00+00,2020-10-25 00:30:00+00}'), ('interval', '{24 hours,1 mon,-1 day,00:00:00.000001,-1 mon +2 days}'),
    ('uuid', '{00000000-0000-0000-0000-000000000000,00000000-0000-0000-0000-000000000001}'), ('jsonb', '{"{\"a\": 1.0}",1,"\"x\"","null","[]"}'),
    ('inet', '{10.0.0.1,10.0.0.1/8,::1}'), ('cidr', '{10.0.0.0/8,::/0}'), ('macaddr', '{00:00:00:00:00:00,00:00:00:00:00:ff}'), ('macaddr8', '{00:00:00:00:00:00:00:01,ff:00:00:00:00:00:00:00}'),
    ('bit(3)', '{101,000}'), ('varbit', '{"",1,10}'), ('tsvector', '{a:1,"''b c'':2"}'), ('tsquery', '{a & b,a | b}'), ('pg_lsn', '{0/0,1/FF}'), ('xid8', '{1,18446744073709551615}'),
    ('tid', '{"(0,1)","(1,2)"}'), ('int4range', '{"[1,5)",empty,"(,)"}'), ('numrange', '{"[1.0,2)","[1.0,3)"}'), ('span', '{"[-0,1.1)","(0.1,)"}'),
    ('mood', '{sad,"a, \"b\"",happy}'), ('pair', '{"(1,)","(1,\"a,b\")","(,x)","(2,\"\")"}'), ('positive', '{1,2}');
INSERT INTO types (type, vals) SELECT 'text COLLATE "' || collname || '"', '{a,B,b,ä,z,"a b",ab,"",_}'
    FROM pg_collation WHERE collname IN ('C', 'en-x-icu', 'und-x-icu') AND collencoding IN (-1, 6);
INSERT INTO types (type, vals, kept) VALUES ('int[]', '{"{1}"}', false), ('text[]', '{"{a}"}', false), ('oidvector', '{1 2}', false), ('named', '{"(1,a)"}', false), ('fickle', '{a,b}', false);

-- NULL where all is well, else the first step that was not.
CREATE FUNCTION try(x types) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    name text := 'keys ' || x.n;
    rows int := cardinality(x.vals);
    flow int;
    got text;
BEGIN
    EXECUTE format('CREATE TABLE s%1$s (k %2$s PRIMARY KEY, v text); CREATE TABLE t%1$s (k %2$s PRIMARY KEY, v text)', x.n, x.type);
    BEGIN
        PERFORM migrate.define(name, ('s' || x.n)::regclass, ('t' || x.n)::regclass, on_target_delete => 'delete');
    EXCEPTION WHEN invalid_column_reference THEN
        RETURN CASE WHEN x.kept THEN SQLERRM END;
    END;
    IF NOT x.kept THEN
        RETURN 'not refused';
    END IF;
    EXECUTE format('INSERT INTO s%s SELECT v::%s, v FROM unnest($1) v', x.n, split_part(x.type, ' COLLATE', 1)) USING x.vals;
    flow := (SELECT f.id FROM migrate._flow f WHERE f.source = ('s' || x.n)::regclass);
    got := copy(flow);
    IF got::int <> rows - 1 AND got::int <> rows THEN RETURN 'copied ' || got; END IF;
    FOR step IN 1 .. 2 LOOP
        IF step = 2 THEN EXECUTE format('UPDATE t%s SET v = v || ''x''', x.n); END IF;
        FOREACH got IN ARRAY '{sample,ranges,rows}'::text[] LOOP
            got := got || ': ' || validate(name, got, CASE got WHEN 'sample' THEN 1000 WHEN 'ranges' THEN step ELSE 1000 END);
            IF split_part(got, ': ', 2) <> format(CASE step WHEN 1 THEN 'equal 0 of %1$s' ELSE 'mismatch %1$s of %1$s' END, rows) THEN RETURN got; END IF;
        END LOOP;
    END LOOP;
    UPDATE migrate._migration m SET phase = 'ready' WHERE m.id = (SELECT f.migration FROM migrate._flow f WHERE f.id = flow);
    got := (SELECT string_agg(r, '; ') FROM repair(name, true) r);
    IF got !~ format('%1$s of %1$s mismatches mended and verified$', rows) THEN RETURN 'repair: ' || got; END IF;
    -- every second row gone, and what repair prints
    EXECUTE format('DELETE FROM t%1$s WHERE k IN (SELECT k FROM t%1$s ORDER BY k OFFSET 1)', x.n);
    got := validate(name, 'ranges', 2);
    IF got <> format('mismatch %s of %s', rows - 1, rows) THEN RETURN 'missing: ' || got; END IF;
    PERFORM run(r) FROM repair(name, false) r;
    got := validate(name, 'ranges', 2);
    IF got <> 'equal 0 of ' || rows THEN RETURN 'repaired by hand: ' || got; END IF;
    -- and gone at the source: extra; the last key alone
    EXECUTE format('DELETE FROM s%1$s WHERE k IN (SELECT k FROM s%1$s ORDER BY k DESC LIMIT 1)', x.n);
    got := validate(name, 'ranges', 3);
    IF got <> format('mismatch 1 of %s', rows - 1) THEN RETURN 'extra: ' || got; END IF;
    PERFORM run(r) FROM repair(name, false) r;
    got := validate(name, 'rows', 1000);
    IF got <> format('equal 0 of %s', rows - 1) THEN RETURN 'deleted by hand: ' || got; END IF;
    -- through the re-queue, where a key stands as text too
    EXECUTE format('UPDATE t%s SET v = v || ''x''', x.n);
    EXECUTE format('SELECT count(apply(%s, ARRAY[k::text])) FROM s%s', flow, x.n) INTO got;
    got := validate(name, 'rows', 1000);
    IF got <> format('equal 0 of %s', rows - 1) THEN RETURN 'applied by key: ' || got; END IF;
    PERFORM migrate.cancel(name), migrate.drop(name);
    RETURN NULL;
EXCEPTION WHEN OTHERS THEN
    RETURN format('%s (%s) after %s', SQLERRM, SQLSTATE, got);
END $$;
CREATE FUNCTION apply(flow int, key text[]) RETURNS text[] LANGUAGE sql SET search_path = pg_catalog, pg_temp SET DateStyle = ISO SET TimeZone = UTC SET extra_float_digits = 1 AS $$
    SELECT migrate._apply_keys($1, 'forward', ARRAY[$2]) $$;
CREATE TABLE tried AS SELECT type, try(types) AS wrong FROM types ORDER BY n;
SELECT count(*) > 40 AS many FROM tried;
SELECT * FROM tried WHERE wrong IS NOT NULL;

-- Keys that are refused, each with its reason
CREATE FUNCTION refused(source text, target text) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    reason text;
BEGIN
    EXECUTE format('CREATE TABLE rs (%s); CREATE TABLE rt (%s)', source, target);
    PERFORM migrate.define('refused', 'rs', 'rt', on_target_delete => 'delete');
    RAISE EXCEPTION USING DETAIL = 'not refused';
EXCEPTION WHEN OTHERS THEN
    GET STACKED DIAGNOSTICS reason = PG_EXCEPTION_DETAIL;
    RETURN coalesce(nullif(reason, ''), SQLERRM);
END $$;
SELECT run($$CREATE COLLATION loose (provider = icu, locale = 'und-u-ks-level2', deterministic = false)$$);
SELECT refused('k text COLLATE "C" PRIMARY KEY', 'k text PRIMARY KEY') AS other_collation, refused('k text COLLATE loose PRIMARY KEY', 'k text COLLATE loose PRIMARY KEY') AS nondeterministic;
SELECT refused('k char(3) PRIMARY KEY', 'k text PRIMARY KEY') AS bpchar_text, refused('k text PRIMARY KEY', 'k char(3) PRIMARY KEY') AS text_bpchar;
SELECT refused('k pair, n int, PRIMARY KEY (k, n)', 'k pair, n int, PRIMARY KEY (k, n)') AS composite_beside;

-- A composite key of many kinds, with its own operators and collations in each column
CREATE TABLE many_s (a text COLLATE "C", b numeric, c timestamptz, d bytea, e mood, v text, PRIMARY KEY (a, b, c, d, e));
CREATE TABLE many_t (LIKE many_s INCLUDING ALL);
INSERT INTO many_s SELECT a, b, c, d, e, 'v' FROM unnest('{"",a,"a,b","{\"}",é}'::text[]) a, unnest('{-1,0.0,NaN}'::numeric[]) b, unnest('{-infinity,2020-01-01 00:00+00}'::timestamptz[]) c, unnest('{"\\x","\\x00"}'::bytea[]) d, unnest('{sad,happy}'::mood[]) e;
SELECT migrate.define('many', 'many_s', 'many_t', on_target_delete => 'delete');
SELECT copy(id) >= 119 FROM migrate._flow WHERE source = 'many_s'::regclass;
SELECT method, validate('many', method, 7) FROM unnest('{ranges,rows}'::text[]) method;
-- Damage at the edges: before the first key, after the last, between ranges, at a border; and beyond an empty source
CREATE TABLE edge_s (id int PRIMARY KEY, v text);
CREATE TABLE edge_t (id bigint PRIMARY KEY, v text);
SELECT migrate.define('edge', 'edge_s', 'edge_t', on_target_delete => 'delete');
CREATE TABLE edges (n int, what text, sql text);
INSERT INTO edges VALUES (1, 'first key', $$UPDATE edge_t SET v = '' WHERE id = -2147483648$$), (2, 'last key', $$DELETE FROM edge_t WHERE id = 2147483647$$), (3, 'below the first', $$INSERT INTO edge_t VALUES (-9223372036854775808, '')$$),
    (4, 'above the last', $$INSERT INTO edge_t VALUES (9223372036854775807, '')$$), (5, 'between two ranges', $$INSERT INTO edge_t VALUES (11, '')$$), (6, 'a border', $$UPDATE edge_t SET v = NULL WHERE id = 10$$),
    (7, 'an empty target', $$DELETE FROM edge_t$$), (8, 'an empty source', $$DELETE FROM edge_s$$);
CREATE FUNCTION edge(x edges) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    r text;
BEGIN
    DELETE FROM edge_s; DELETE FROM edge_t;
    INSERT INTO edge_s SELECT i, 'v' FROM generate_series(2, 40, 2) i UNION SELECT i, 'v' FROM unnest('{-2147483648,2147483647}'::int[]) i;
    INSERT INTO edge_t SELECT * FROM edge_s;
    r := (SELECT string_agg(DISTINCT validate('edge', method, rows), ', ') FROM unnest('{ranges,rows}'::text[]) method, unnest('{5,1000}'::int[]) rows);
    EXECUTE x.sql;
    RETURN r || '; ' || (SELECT string_agg(DISTINCT validate('edge', method, rows), ', ') FROM unnest('{ranges,rows}'::text[]) method, unnest('{5,1000}'::int[]) rows, generate_series(1, 3));
END $$;
SELECT what, edge(edges) FROM edges ORDER BY n;

-- No silent cap: 25,000 rows that differ are 25,000 mismatches
TRUNCATE edge_s, edge_t;
INSERT INTO edge_s SELECT i, 'v' FROM generate_series(1, 25000) i;
INSERT INTO edge_t SELECT i, 'w' FROM generate_series(1, 25000) i;
SELECT validate('edge', 'ranges', 10000);
SELECT count(*), count(DISTINCT key) FROM migrate.mismatches('edge');

-- A verdict takes a ledger that covers the key space: none over no range at all, with a range missing, or with a gap
CREATE FUNCTION cut(damage text) RETURNS text LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    m migrate._migration := (SELECT x FROM migrate._migration x WHERE x.name = 'edge');
    run_id bigint := migrate._validation_begin(m, 'ranges', 10000, false);
    c migrate._comparison;
    detail text;
BEGIN
    SELECT * INTO c FROM migrate._comparisons(m);
    LOOP
        EXIT WHEN migrate._validate_next(m, c, run_id, 'ranges', 10000);
    END LOOP;
    EXECUTE replace(damage, '$run', run_id::text);
    PERFORM migrate._validation_end(c, run_id);
    RETURN (SELECT v.verdict FROM migrate._validation v WHERE v.run = run_id);
EXCEPTION WHEN OTHERS THEN
    GET STACKED DIAGNOSTICS detail = PG_EXCEPTION_DETAIL;
    RETURN concat_ws(' ', SQLSTATE, SQLERRM || '.', detail);
END $$;
UPDATE edge_t SET v = 'v';
SELECT damage, cut(damage) FROM (VALUES
    (1, 'SELECT'),
    (2, 'DELETE FROM migrate._validation_range WHERE run = $run'),
    (3, 'DELETE FROM migrate._validation_range WHERE run = $run AND ordinal = 1'),
    (4, 'DELETE FROM migrate._validation_range WHERE run = $run AND ordinal = 2'),
    (5, 'DELETE FROM migrate._validation_range WHERE run = $run AND ordinal = 3'),
    (6, $$UPDATE migrate._validation_range SET low = '{10001}' WHERE run = $run AND ordinal = 2$$),
    (7, 'UPDATE migrate._validation_range SET high = NULL WHERE run = $run AND ordinal = 2')) d(n, damage) ORDER BY n;

SELECT count(migrate.drop(name)) FROM unnest('{many,edge}'::text[]) name;
DROP SCHEMA keys CASCADE;

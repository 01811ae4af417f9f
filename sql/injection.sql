-- No text that a user gives is ever run, but for the expressions that are meant to be: every argument of every public function is
-- fuzzed, and whole migrations run over names that were made to break out of their quotes.
\set SHOW_CONTEXT never
SET client_min_messages = error;
CREATE SCHEMA inj;
SET search_path = inj, public;
CREATE SEQUENCE executed;  -- no rollback takes a nextval back
CREATE FUNCTION pwn() RETURNS bigint LANGUAGE sql AS $$ SELECT nextval('inj.executed') $$;
CREATE TABLE canary (id int);
CREATE TABLE s (id int PRIMARY KEY, v text);
CREATE TABLE t (id int PRIMARY KEY, v text);
CREATE TABLE u (id int PRIMARY KEY, v text);
INSERT INTO s VALUES (1, 'a');
CREATE ROLE regress_inj;
SELECT migrate.define('fuzz', 's', 't', on_target_delete => 'delete');

CREATE TABLE payload (n int GENERATED ALWAYS AS IDENTITY, text text);
INSERT INTO payload (text) VALUES (NULL), (''), (' '), ('''; SELECT inj.pwn(); --'), ('"; SELECT inj.pwn(); --'), ('\''; SELECT inj.pwn(); --'), ('''''); SELECT inj.pwn(); --'), ('$$; SELECT inj.pwn(); $$'),
    ('$_$; SELECT inj.pwn(); $_$'), ('%s %I %L %1$s %'), ('$1'), (E'a\nb\rc\td'), (repeat('x', 10000)), (repeat('é', 5000)), ('{'), ('{"a": 1}'), ('''||inj.pwn()||'''), ('); SELECT inj.pwn(); --'), ('*/ SELECT inj.pwn(); /*'),
    ('/*'), ('--'), (';'), ('E''\\'''), ('\'), ('-'), ('0'), ('-1'), ('1e400'), ('NaN'), ('infinity'), ('99999999999999999999'), ('U&"\0041"'), ('a.b.c.d'), ('pg_temp.x'), ('pg_catalog.pg_class'), ('migrate._migration'),
    ('"inj"."s"; DROP TABLE inj.canary'), ('inj.s'), ('id, v FROM inj.s; SELECT inj.pwn()'), ('id, v FROM inj.canary'), ('id, inj.pwn() AS v'), ('id, (SELECT inj.pwn())::text AS v'), ('id, v /*'), ('id, v --'), ('id) AS (SELECT inj.pwn()'),
    ('SELECT inj.pwn() > 0; SELECT true'), ('SELECT true) AS q(ok), (SELECT inj.pwn()'), ('SELECT inj.pwn() > 0'), ('true UNION SELECT inj.pwn() > 0'), ('WITH x AS (DELETE FROM inj.s RETURNING 1) SELECT true FROM x'), ('22:00-06:00 UTC''; SELECT inj.pwn(); --'),
    ('all, '';'), ('fuzz'), ('public'), ('none'), (chr(1)), (E'\uFEFF'), ('𝄞'), ('lock_timeout');

DELETE FROM payload WHERE n % 3 > 0 AND text NOT LIKE '%pwn%' AND text <> '';

-- A call with all arguments valid; `odd` of them is then another.
CREATE FUNCTION valid(function text, argument text) RETURNS text LANGUAGE sql AS $$
    SELECT CASE argument WHEN 'name' THEN CASE function WHEN 'define' THEN 'another' ELSE 'fuzz' END WHEN 'source' THEN 'inj.s' WHEN 'target' THEN 'inj.u' WHEN 'on_target_delete' THEN 'delete' WHEN 'view' THEN 'inj.seen'
        WHEN 'shape' THEN 'target' WHEN 'option' THEN 'batch_size' WHEN 'value' THEN '100' WHEN 'method' THEN 'ranges' WHEN 'rate' THEN '0.1' WHEN 'role' THEN 'regress_inj' WHEN 'may' THEN 'observe' WHEN 'phase' THEN 'planned'
        WHEN 'timeout' THEN '0 s' WHEN 'ratio' THEN '0.5' WHEN 'for_time' THEN '1 minute' WHEN 'relation' THEN 'inj.s' WHEN 'columns' THEN '{v}' WHEN 'key' THEN '{id}' WHEN 'range_rows' THEN '10' WHEN 'skip' THEN '{}'
        WHEN 'drop_columns' THEN '{}' WHEN 'dry_run' THEN 'false' WHEN 'drop_source' THEN 'false' WHEN 'execute' THEN 'false' WHEN 'a' THEN 'x' WHEN 'b' THEN 'y' END
$$;
CREATE FUNCTION attempt(f regproc, odd int, what text, options text DEFAULT NULL) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    p pg_proc;
    args text[];
    text text;
BEGIN
    SELECT * INTO p FROM pg_proc WHERE oid = f;
    FOR i IN 1 .. p.pronargs LOOP
        args[i] := CASE WHEN i = odd THEN what WHEN options IS NOT NULL AND p.proargnames[i] = 'option' THEN options ELSE valid(p.proname, p.proargnames[i]) END;
        text := concat_ws(', ', text, format(CASE WHEN p.proargtypes[i - 1] = 'text[]'::regtype AND i = odd THEN 'ARRAY[($1)[%s]]::%s' ELSE '($1)[%s]::%s' END, i, replace(format_type(p.proargtypes[i - 1], NULL), 'anyelement', 'text')));
    END LOOP;
    BEGIN
        UPDATE migrate._migration SET phase = CASE p.proname WHEN 'cutover' THEN 'ready' ELSE 'cut_over' END WHERE name = 'fuzz' AND p.proname IN ('cutover', 'rollback', 'finalize');
        EXECUTE format(CASE WHEN p.prokind = 'p' THEN 'CALL %s(%s)' ELSE 'SELECT x FROM %s(%s) x' END, f, text) USING args;
        RAISE EXCEPTION USING ERRCODE = 'OK000';
    EXCEPTION WHEN OTHERS THEN
        RETURN SQLSTATE;
    END;
END $$;
CREATE VIEW fuzzed AS
    SELECT p.oid::regproc AS function, i AS argument, p.proargnames[i] AS name, o.option, y.n, y.text
    FROM pg_proc p, generate_series(1, p.pronargs) i, payload y,
         unnest(CASE WHEN p.proname = 'set' AND p.proargnames[i] = 'value' THEN ARRAY(SELECT min(d.name) FROM migrate._option_definition d GROUP BY d.kind) ELSE ARRAY[NULL] END) AS o(option)
    WHERE p.pronamespace = 'migrate'::regnamespace AND p.proname NOT LIKE '\_%' AND p.prokind <> 'a' AND (o.option IS NULL OR o.option = 'throttle_query' OR y.n % 3 = 0)
        AND NOT (y.text = 'infinity' AND p.proargtypes[i - 1] = 'interval'::regtype);  -- which it may be since PostgreSQL 17

-- Nothing ran, nothing is gone, no error is one of ours (XX000), and none is a syntax error but where the text is an expression.
CREATE VIEW verdict AS
    SELECT (SELECT is_called FROM executed) AS executed, to_regclass('inj.canary') IS NOT NULL AS canary, (SELECT count(*) FROM s) AS rows, (SELECT count(*) FROM migrate._migration WHERE name <> 'fuzz') AS migrations,
           (SELECT r.rolsuper FROM pg_roles r WHERE r.rolname = 'regress_inj') AS raised;
SET statement_timeout = '100 s';
CREATE TABLE outcome AS SELECT *, attempt(function, argument, text, option) AS state FROM fuzzed;
SELECT count(*) > 2000 AS many, count(DISTINCT function) AS functions, count(*) FILTER (WHERE state = 'OK000') > 100 AS "some of them valid" FROM outcome;
SELECT function, name, option, left(text, 60) AS text, state FROM outcome
WHERE state LIKE 'XX%' OR state IN ('57014', '42883', '0A000') AND name NOT IN ('mapping', 'filter', 'reverse')
   OR state = '42601' AND name NOT IN ('mapping', 'filter', 'reverse', 'source', 'target', 'relation', 'role', 'view', 'value', 'timeout', 'for_time');
SELECT * FROM verdict;
-- … nor where a backslash escapes
SET standard_conforming_strings = off;
SET escape_string_warning = off;
SET backslash_quote = on;
SET quote_all_identifiers = on;
CREATE TABLE outcome_off AS SELECT *, attempt(function, argument, text, option) AS state FROM fuzzed WHERE text ~ E'[''"\\$]';
SELECT o.function, o.name, o.option, left(o.text, 60) AS text, o.state, x.state AS off FROM outcome o JOIN outcome_off x USING (function, argument, n) WHERE o.option IS NOT DISTINCT FROM x.option AND o.state <> x.state;
SELECT * FROM verdict;
RESET standard_conforming_strings;
RESET quote_all_identifiers;
SELECT migrate.drop('fuzz');

-- Names: of schemas, tables, columns, types, labels, domains, collations, constraints, indexes, partitions, triggers, roles, migrations, flows and views
CREATE TABLE names (n int GENERATED ALWAYS AS IDENTITY, name name, next name);
INSERT INTO names (name) VALUES ('a"b''c %s$1%I $$'), ((repeat('é', 31) || 'x')::name), (E'"; DROP TABLE\ninj.canary\\; --');
UPDATE names x SET next = y.name FROM names y WHERE y.n = x.n % (SELECT count(*) FROM names) + 1;
CREATE FUNCTION run(text text, VARIADIC args text[] DEFAULT '{}') RETURNS void LANGUAGE plpgsql AS $$ BEGIN EXECUTE format(text, VARIADIC args); END $$;
CREATE FUNCTION make(x names) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    PERFORM run(c, x.name, x.next, left('inj ' || x.name, 30), left('d' || x.next, 30)) FROM unnest(ARRAY['CREATE ROLE %3$I', 'CREATE SCHEMA %1$I', 'SET LOCAL search_path = %1$I',
        'CREATE TYPE %1$I AS ENUM (%1$L, ''other'')', 'CREATE COLLATION %1$I FROM "C"', 'CREATE DOMAIN %4$I AS text CONSTRAINT %1$I CHECK (VALUE <> ''never'')',
        'CREATE TABLE %2$I (%1$I text COLLATE %1$I, %2$I %1$I NOT NULL DEFAULT %1$L, "left" %4$I, CONSTRAINT %1$I PRIMARY KEY (%1$I))',
        'CREATE TABLE "to" (%2$I text COLLATE %1$I, %1$I %1$I NOT NULL, "right" %4$I CONSTRAINT %1$I CHECK ("right" <> ''never''), PRIMARY KEY (%2$I)) PARTITION BY HASH (%2$I)',
        'CREATE TABLE "to 0" PARTITION OF "to" FOR VALUES WITH (MODULUS 1, REMAINDER 0)', 'CREATE INDEX ON "to" (%1$I)',
        'INSERT INTO %2$I SELECT n.name || i, %1$L, %1$L FROM inj.names n, generate_series(1, 5) i', 'GRANT USAGE, CREATE ON SCHEMA %1$I TO %3$I', 'GRANT ALL ON %2$I, "to" TO %3$I',
        'ALTER TABLE %2$I OWNER TO %3$I', 'ALTER TABLE "to" OWNER TO %3$I', 'ALTER TABLE "to 0" OWNER TO %3$I', 'ANALYZE %2$I', 'SET LOCAL search_path = inj, public']) WITH ORDINALITY u(c, n);
    PERFORM migrate.define(x.name, format('%I.%I', x.name, x.next)::regclass, format('%I.%I', x.name, 'to')::regclass, format('%1$I AS %2$I, %2$I AS %1$I, "left" AS "right"', x.name, x.next),
        filter => CASE WHEN x.n < 3 THEN format('"left" IS DISTINCT FROM %L', x.next) END, on_target_delete => 'delete');
    PERFORM migrate.add_view(x.name, format('%I.%I', x.name, '"' || left(x.name, 20)));
    PERFORM migrate.set(x.name, 'accept_reverse_gaps', 'on'), migrate.set(x.name, 'throttle_query', format('SELECT false AS %I', replace(x.name, ';', ''))), migrate.set(x.name, 'shadow_rate', '0.01'), migrate.set(x.name, 'shadow_time', '0');
    PERFORM migrate.preflight(x.name), migrate.plan(x.name), migrate.get(x.name);
    PERFORM migrate.start(x.name);
    PERFORM FROM migrate.mismatches(x.name);
END $$;
-- A line for whatever is not as it should be
CREATE FUNCTION reach(x names, goal text) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    m record;
BEGIN
    FOR i IN 1 .. 400 LOOP
        SELECT * INTO m FROM migrate._migration y WHERE y.name = x.name;
        EXIT WHEN m.phase IS NULL OR m.phase = goal OR m.failed_reason IS NOT NULL;
        PERFORM pg_sleep(0.05);
    END LOOP;
    RETURN CASE WHEN m.phase = goal THEN NULL ELSE format('%s: %s %s', x.name, m.phase, m.failed_reason) END;
END $$;
CREATE FUNCTION use(x names) RETURNS TABLE (wrong text) LANGUAGE plpgsql AS $$
DECLARE
    own text := format('%I.%I', x.name, x.next);
BEGIN
    PERFORM run(c, own, x.name, x.next) FROM unnest(ARRAY['UPDATE %1$s SET "left" = ''changed'' WHERE %2$I LIKE ''%%1''', 'DELETE FROM %1$s WHERE %2$I LIKE ''%%2''', 'INSERT INTO %1$s VALUES (%2$L || 9, %2$L, %3$L), (%3$L || 10, ''other'', %2$L)',
        'UPDATE %1$s SET %2$I = %2$I || ''moved'' WHERE %2$I LIKE ''%%3''']) c;
    RETURN QUERY SELECT concat_ws(' ', x.name, k.how, v.verdict, v.mismatches) FROM unnest('{counts,sample,checksum,ranges,rows}'::text[]) k(how), migrate.validate(x.name, k.how) v WHERE v.verdict <> 'equal' OR v.source_rows < 9;
    PERFORM run('UPDATE %I."to" SET "right" = ''wrong'' WHERE %I LIKE ''%%4''', x.name, x.next);
    RETURN QUERY SELECT x.name || ' blind' FROM migrate.validate(x.name) v WHERE v.verdict = 'equal';
    PERFORM run(replace(r, '%', '%%')) FROM migrate.repair(x.name) r;
    RETURN QUERY SELECT x.name || ' not repaired' FROM migrate.validate(x.name) v WHERE v.verdict <> 'equal';
    PERFORM migrate.cutover(x.name, dry_run => true), migrate.cutover(x.name);
    PERFORM run(c, own, x.name, x.next, '"' || left(x.name, 20)) FROM unnest(ARRAY['UPDATE %2$I.%4$I SET "right" = ''after'' WHERE %3$I LIKE ''%%1''', 'DELETE FROM %2$I."to" WHERE %3$I LIKE ''%%4''',
        'INSERT INTO %2$I.%4$I VALUES (''new'', ''other'', ''x'')']) c;
    RETURN QUERY SELECT concat_ws(' ', x.name, k.how, v.verdict, v.mismatches, 'after') FROM unnest('{counts,ranges,rows}'::text[]) k(how), migrate.validate(x.name, k.how) v WHERE v.verdict <> 'equal' OR v.source_rows < 6;
    PERFORM migrate.rollback(x.name), migrate.cutover(x.name);
    PERFORM migrate.finalize(x.name, drop_source => x.n < 3, drop_columns => CASE WHEN x.n < 3 THEN '{}' ELSE ARRAY['left'] END, force => x.name), migrate.drop(x.name);
EXCEPTION WHEN OTHERS THEN
    RETURN QUERY SELECT format('%s: %s %s', x.name, SQLSTATE, SQLERRM);
END $$;
SELECT count(make(x)) FROM names x;
SELECT reach(x, 'ready') FROM names x WHERE reach(x, 'ready') IS NOT NULL;
-- (A transaction each: best effort has but so many subtransactions in one.)
CREATE TABLE found (wrong text);
CREATE PROCEDURE use_all() LANGUAGE plpgsql AS $$
DECLARE
    x names;
BEGIN
    FOR x IN SELECT * FROM names LOOP
        INSERT INTO found SELECT * FROM use(x);
        COMMIT;
    END LOOP;
END $$;
CALL use_all();
SELECT * FROM found;
SELECT * FROM verdict;
DROP SCHEMA inj CASCADE;
SELECT format('DROP SCHEMA %I CASCADE', n.nspname) FROM pg_namespace n JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = 'to' AND c.relkind = 'p' ORDER BY n.nspname COLLATE "C" \gexec
SELECT format('DROP ROLE %I', rolname) FROM pg_roles WHERE rolname LIKE 'inj %' ORDER BY rolname COLLATE "C" \gexec
DROP ROLE regress_inj;

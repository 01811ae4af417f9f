-- States that somebody else has brought a migration into: each says what is the matter, and the call that it gives works when it is pasted.
\set SHOW_CONTEXT never
SET client_min_messages = notice;
SET jit = off;
CREATE SCHEMA odd;
CREATE ROLE odd_owner;
CREATE ROLE odd_heir;
CREATE ROLE odd_dba SUPERUSER;
SET SESSION AUTHORIZATION odd_dba;
GRANT USAGE, CREATE ON SCHEMA odd TO odd_owner, odd_heir;
SET search_path = odd;
CREATE TABLE src (id int PRIMARY KEY, v text);
INSERT INTO src SELECT g, 'value' FROM generate_series(1, 300) g;
CREATE TABLE dst (id int PRIMARY KEY, v text);
-- (wait prints lines that depend on the machine's speed.)
CREATE PROCEDURE until(condition text) LANGUAGE plpgsql AS $$
DECLARE
    holds boolean;
BEGIN
    FOR i IN 1 .. 1200 LOOP
        EXECUTE 'SELECT ' || condition || ' FROM migrate.progress p' INTO holds;
        COMMIT;
        EXIT WHEN holds;
        PERFORM pg_sleep(0.05);
        COMMIT;
    END LOOP;
    IF holds IS NOT TRUE THEN
        RAISE WARNING '%', (SELECT string_agg(format('%s, %s, %s, %s', p.phase, p.state, p.throttled_by, p.last_error), '; ') FROM migrate.progress p);
    END IF;
END $$;
GRANT EXECUTE ON PROCEDURE until TO PUBLIC;
CREATE VIEW errors AS SELECT p."check", p.message, p.hint FROM migrate.migration m, LATERAL migrate.preflight(m.name) p WHERE p.severity = 'error';

-- A session that may not write: the verbs that do say so, those that only look go on
SELECT migrate.define('odd', 'src', 'dst', on_target_delete => 'delete');
SET default_transaction_read_only = on;
SELECT migrate.start('odd');
SELECT count(*) > 0 AS looked FROM migrate.preflight('odd');
SELECT migrate.plan('odd') LIKE '# Migration%' AS planned;
BEGIN;
SELECT migrate.pause('odd');
ROLLBACK;
BEGIN READ WRITE;
SELECT migrate.set('odd', 'shadow_time', '0');
COMMIT;
SET default_transaction_read_only = off;
SET default_transaction_isolation = 'serializable';
SELECT migrate.cutover('odd');
SET default_transaction_isolation = 'read committed';
SELECT migrate.cutover('odd');

-- Where its worker is gone progress says so, and not what that one had noted
BEGIN;
INSERT INTO migrate._pace (migration, worker) SELECT id, 0 FROM migrate._migration;
UPDATE migrate._migration SET phase = 'backfilling', throttled_since = now(), throttled_reason = 'replica lag 2300 ms > 1500 ms';
SELECT state, throttled_by FROM migrate.progress;
UPDATE migrate._migration SET throttled_since = NULL, throttled_reason = NULL;
UPDATE migrate._pace SET note = 'no background worker slot is free for worker 2 of 2';
SELECT state, throttled_by FROM migrate.progress;
UPDATE migrate._pace SET note = 'no background worker slot is free: all 8 of max_worker_processes are in use';
SELECT state, throttled_by FROM migrate.progress;
ROLLBACK;

-- The unique index of the target's key is gone, before the start and when it is ready
ALTER TABLE dst DROP CONSTRAINT dst_pkey;
SELECT * FROM errors;
ALTER TABLE odd.dst ADD PRIMARY KEY (id);
SET client_min_messages = warning;
SELECT migrate.start('odd');
CALL until($$ phase = 'ready' OR state = 'failed' $$);
SELECT phase, state, failures FROM migrate.progress;
ALTER TABLE dst DROP CONSTRAINT dst_pkey;
UPDATE src SET v = 'late' WHERE id = 5;
CALL until($$ state = 'failed' $$);
CALL migrate.wait('odd', 'cut_over', timeout => '3 minutes');
SELECT * FROM errors;
ALTER TABLE odd.dst ADD PRIMARY KEY (id); SELECT migrate.retry('odd');
CALL until($$ failures = 0 $$);
SELECT last_error FROM migrate.progress;

-- A wait that times out on what is paused says how it goes on
SELECT migrate.pause('odd');
CALL migrate.wait('odd', 'cut_over', timeout => '10 ms');
SELECT migrate.cancel('odd');
SELECT migrate.drop('odd');
TRUNCATE dst;

-- Outside of its window nothing is copied, not even one batch
SELECT migrate.define('odd', 'src', 'dst', on_target_delete => 'delete');
SELECT count(migrate.set('odd', 'window', format('%s-%s UTC', to_char(t.later, 'HH24:MI'), to_char(t.later + interval '1 hour', 'HH24:MI'))))
FROM (SELECT now() AT TIME ZONE 'UTC' + interval '6 hours' AS later) t;
SELECT migrate.start('odd');
CALL until($$ throttled_by ~ '^window ' $$);
SELECT phase, state, rows_copied FROM migrate.progress;
SELECT migrate.cancel('odd');
SELECT migrate.drop('odd');

-- More keys are refused than one retry takes. When the cause is gone, one call of retry is enough: validation waits for them
SELECT migrate.define('odd', 'src', 'dst', on_target_delete => 'delete');
SELECT migrate.set('odd', 'shadow_time', '0');
ALTER TABLE dst ADD CONSTRAINT short CHECK (id > 100);
SELECT migrate.start('odd');
CALL until($$ state = 'failed' $$);
SELECT count(*) FROM migrate.failures;
SELECT migrate._progress_line(p, true) LIKE '%100 in migrate.failures%' AS told FROM migrate._progress p;
ALTER TABLE dst DROP CONSTRAINT short;
SELECT migrate.retry('odd');
CALL until($$ phase = 'ready' OR state = 'failed' $$);
SELECT phase, state, failures FROM migrate.progress;
SELECT count(*) FROM migrate.failures;

-- A view of the switch is dropped: another takes its place
SELECT migrate.add_view('odd', view => 'odd.shown');
SELECT migrate.add_view('odd', view => 'odd.source_shown', use => 'read');
DROP VIEW shown;
SELECT regexp_replace(g.problem, 'OID \d+', 'OID') AS problem, g.hint FROM migrate._migration m, LATERAL migrate._gates(m, m.owner, 'target', false, '{}') g WHERE g.gate = 'views';
SELECT migrate.add_view('odd', view => 'odd.shown_again');
SELECT migrate.cutover('odd');
DROP VIEW shown_again;
SELECT regexp_replace(g.problem, 'OID \d+', 'OID') AS problem, g.hint FROM migrate._migration m, LATERAL migrate._gates(m, m.owner, 'source', false, '{}') g WHERE g.gate = 'views';
SELECT migrate.rollback('odd', skip => '{views}');
SELECT migrate.add_view('odd', view => 'odd.shown');
SELECT migrate.cutover('odd');
SELECT pg_get_viewdef('shown') ~ 'FROM dst' AS of_target;
SELECT migrate.rollback('odd');
-- … and one that had taken the source's name
SELECT migrate.add_view('odd', view => 'odd.src', shape => 'source');
DROP VIEW src;
SELECT g.hint FROM migrate._migration m, LATERAL migrate._gates(m, m.owner, 'target', false, '{}') g WHERE g.gate = 'views';
ALTER TABLE odd.src_migrate RENAME TO src;
SELECT migrate.add_view('odd', view => 'odd.src', shape => 'source');
SELECT migrate.cutover('odd', dry_run => true) LIKE '%passed: gate views%' AS passes;
DROP VIEW src, shown, source_shown;
ALTER TABLE odd.src_migrate RENAME TO src;

-- What stands in the way of finalize is named with statements that take it away, in an order in which they work, and nothing else
SELECT migrate.cutover('odd', skip => '{views}');
CREATE VIEW reads_v AS SELECT v FROM src;
CREATE VIEW reads_view AS SELECT upper(v) AS u FROM reads_v;
CREATE TABLE refers (id int REFERENCES src);
SELECT migrate.finalize('odd', drop_columns => '{v}', force => 'odd');
SELECT migrate.finalize('odd', drop_source => true, force => 'odd');
DROP VIEW odd.reads_view; DROP VIEW odd.reads_v;
SELECT migrate.finalize('odd', drop_columns => '{v}', force => 'odd', dry_run => true) ~ 'column "v" of odd.src is dropped' AS is_free;
DROP TABLE refers;
SELECT migrate.rollback('odd', skip => '{views}');

-- The target is dropped: progress says so, in phase ready as well
DROP TABLE dst CASCADE;
SELECT phase, state, regexp_replace(last_error, 'OID \d+', 'OID') AS last_error FROM migrate.progress;
\set VERBOSITY terse
SELECT migrate.add_view('odd', view => 'odd.shown');
\set VERBOSITY default
SET client_min_messages = notice;
SELECT migrate.cancel('odd'); SELECT migrate.drop('odd');
CREATE TABLE dst (id int PRIMARY KEY, v text);
SELECT migrate.define('odd', 'src', 'dst', on_target_delete => 'delete');
SELECT migrate.cancel('odd');  -- nothing was copied
SELECT migrate.drop('odd');
SET client_min_messages = warning;

-- The tables' owner has lost rights: on the schema before the start, on his tables after the cutover
ALTER TABLE src OWNER TO odd_owner;
ALTER TABLE dst OWNER TO odd_owner;
SELECT migrate.define('odd', 'src', 'dst', on_target_delete => 'delete');
SELECT migrate.set('odd', 'shadow_time', '0');
REVOKE USAGE ON SCHEMA odd FROM odd_owner;
SELECT * FROM errors;
GRANT USAGE ON SCHEMA odd TO odd_owner;
SELECT migrate.start('odd');
CALL until($$ phase = 'ready' OR state = 'failed' $$);
SELECT phase, state, failures FROM migrate.progress;
SELECT migrate.cutover('odd');
REVOKE ALL ON dst FROM odd_owner;
SELECT * FROM errors;
SELECT migrate.rollback('odd');
SELECT migrate.validate('odd');
GRANT DELETE, INSERT, SELECT, UPDATE ON dst TO odd_owner;
SELECT migrate.rollback('odd');
SELECT migrate.cancel('odd');
SELECT migrate.drop('odd');
TRUNCATE dst;

-- The tables are given to another role: start goes by the migration's owner, and preflight says so to whoever looks
SELECT migrate.allow('odd_owner'), migrate.allow('odd_heir');
SET ROLE odd_owner;
SELECT migrate.define('odd', 'src', 'dst', on_target_delete => 'delete');
RESET ROLE;
ALTER TABLE src OWNER TO odd_heir;
ALTER TABLE dst OWNER TO odd_heir;
SELECT * FROM errors;
-- … and the migration's owner is dropped: then it is the tables' owner's
DROP OWNED BY odd_owner;
DROP ROLE odd_owner;
SET ROLE odd_heir;
SELECT migrate.set('odd', 'shadow_time', '0');
SELECT name, owner FROM migrate.migration;
SELECT migrate.start('odd');
CALL until($$ phase = 'ready' OR state = 'failed' $$);
SELECT phase, state, failures FROM migrate.progress;
SELECT migrate.cancel('odd');
SELECT migrate.drop('odd');
RESET ROLE;
SELECT migrate.allow('odd_heir', 'nothing');

-- An index that is set aside, whose column gets another name: who cancels hears of it, and who drops the migration later, too
TRUNCATE dst;
CREATE INDEX dst_v ON dst (v);
CREATE INDEX dst_w ON dst (id, v);
SELECT migrate.define('odd', 'src', 'dst', on_target_delete => 'delete');
SELECT migrate.set('odd', 'shadow_time', '0'), migrate.set('odd', 'batch_size', '10'), migrate.set('odd', 'sleep', '1 s');
SELECT migrate.start('odd');
ALTER TABLE dst RENAME COLUMN v TO value;
CALL until($$ rows_copied > 0 $$);
SELECT migrate.set('odd', 'sleep', '0');
CALL until($$ state = 'failed' $$);
SELECT phase, last_error FROM migrate.progress;
SELECT migrate.cancel('odd');
CALL until($$ state = 'idle' $$);
CREATE INDEX dst_w ON dst (id, value);
SELECT migrate.drop('odd');
CREATE INDEX dst_v ON odd.dst (value);

SET client_min_messages = error;
DROP SCHEMA odd CASCADE;
RESET SESSION AUTHORIZATION;
DROP ROLE odd_heir;
DROP OWNED BY odd_dba;
DROP ROLE odd_dba;

-- The watch after cutover: its options, what begins and ends it, what a passed limit does. (Under load: test/t/watch_goes_back.pl.)
\set SHOW_CONTEXT never
SET client_min_messages = warning;
CREATE ROLE regress_dba SUPERUSER;
SET SESSION AUTHORIZATION regress_dba;  -- who is named below, whatever the superuser is called
SET jit = off;
CREATE SCHEMA watch_test;
SET search_path = watch_test;
-- Each look is a transaction of its own: a rollback waits for older snapshots.
CREATE PROCEDURE until(condition text) LANGUAGE plpgsql AS $$
DECLARE
    reached boolean;
BEGIN
    FOR i IN 1 .. 1200 LOOP
        EXECUTE 'SELECT ' || condition INTO reached;
        EXIT WHEN reached;
        COMMIT;
        PERFORM pg_sleep(0.05);
        COMMIT;
    END LOOP;
    ASSERT reached, 'not within a minute: ' || condition;
END $$;
CREATE FUNCTION told(migration text) RETURNS SETOF text LANGUAGE sql AS $$
    SELECT concat_ws(' ', e.by, e.kind || ':', regexp_replace(e.why, '\d+ of \d+|0\.\d+ of \d+', 'some of some', 'g')) FROM migrate.events e
    WHERE e.migration = told.migration AND e.kind IN ('watch', 'limit', 'rollback refused') ORDER BY e.id
$$;
CREATE TABLE users (id bigint PRIMARY KEY, name text NOT NULL);
CREATE TABLE profiles (user_id bigint PRIMARY KEY, display_name text NOT NULL);
INSERT INTO users SELECT g, 'user ' || g FROM generate_series(1, 50) g;
SELECT migrate.define('m', 'users', 'profiles', $$ id AS user_id, name AS display_name $$, on_target_delete => 'delete');
SELECT migrate.add_view('m', 'profile');
SET client_min_messages = notice;

-- options
SELECT option, value, unit FROM migrate.get('m') WHERE option ~ '^watch_|^on_limit';
SELECT migrate.set('m', 'watch_time', '-1');
\echo :LAST_ERROR_SQLSTATE
SELECT migrate.set('m', 'watch_failures', 'many');
\echo :LAST_ERROR_SQLSTATE
SELECT migrate.set('m', 'watch_abort_rate', '2');
\echo :LAST_ERROR_SQLSTATE
SELECT migrate.set('m', 'watch_latency', '0.5');
\echo :LAST_ERROR_SQLSTATE
SELECT migrate.set('m', 'watch_latency', '3');
\echo :LAST_ERROR_SQLSTATE
SELECT migrate.set('m', 'on_limit', 'panic');
\echo :LAST_ERROR_SQLSTATE
SELECT migrate.set('m', 'watch_abort_rate', '20 %');
SELECT migrate.set('m', 'watch_time', '1 hour');
SELECT line FROM unnest(string_to_array(migrate.plan('m'), E'\n')) line WHERE line ~ 'watch_failures';
SELECT migrate.start('m');
CALL until($$ (SELECT phase = 'ready' FROM migrate.migration WHERE name = 'm') $$);

-- a rehearsal begins nothing; a cutover does, and rollback ends it
SELECT split_part(migrate.cutover('m', dry_run => true), E'\n', 1);
SELECT told('m');
SELECT migrate.cutover('m');
CALL until($$ (SELECT throttled_by ~ 'watch_failures: 0 keys \(limit 0\)' FROM migrate.progress WHERE migration = 'm') $$);
SELECT state, regexp_replace(throttled_by, 'until [^;]*', 'until then') AS says FROM migrate.progress WHERE migration = 'm';
SELECT migrate.rollback('m');
CALL until($$ NOT EXISTS (SELECT FROM migrate._worker) $$);
SELECT state, throttled_by FROM migrate.progress WHERE migration = 'm';
SELECT told('m');

-- a limit that is passed is told once, and no more than told
SELECT migrate.cutover('m');
ALTER TABLE users ADD CONSTRAINT refuses CHECK (name <> 'refused');
UPDATE profile SET display_name = 'refused' WHERE user_id IN (1, 2);
CALL until($$ EXISTS (SELECT FROM told('m') t WHERE t ~ 'limit:') $$);
CALL until($$ (SELECT looked_at > clock_timestamp() - interval '1 s' FROM migrate._watch) $$);
SELECT migrate.serves('m');
SELECT told('m') OFFSET 1;

-- on_limit rollback holds for what was passed before; it is refused by its gate, and made when that lets it pass
SELECT migrate.set('m', 'on_limit', 'rollback');
CALL until($$ EXISTS (SELECT FROM told('m') t WHERE t ~ 'rollback refused:') $$);
CALL until($$ (SELECT throttled_by ~ 'rollback is refused' FROM migrate.progress WHERE migration = 'm') $$);
SELECT migrate.serves('m');
-- what cannot be carried back is an event too: one for its two rows
CALL until($$ EXISTS (SELECT FROM migrate.events WHERE migration = 'm' AND kind = 'refused') $$);
SELECT by, why FROM migrate.events WHERE migration = 'm' AND kind = 'refused';
ALTER TABLE users DROP CONSTRAINT refuses;
CALL until($$ migrate.serves('m') = 'source' $$);
SELECT name FROM users WHERE id IN (1, 2);
SELECT told('m') OFFSET 2;
SELECT by, kind, from_phase, to_phase, why FROM migrate.events WHERE migration = 'm' AND kind = 'phase' ORDER BY id DESC LIMIT 1;
SELECT count(*) FROM migrate._watch;

-- aborted transactions, from a hundred on
SELECT migrate.set('m', 'watch_failures', 'none');
SELECT migrate.cutover('m');
CALL until($$ (SELECT transactions IS NOT NULL FROM migrate._watch) $$);
DO $$ BEGIN FOR i IN 1 .. 1000 LOOP PERFORM 1; ROLLBACK; END LOOP; END $$;
SELECT FROM pg_sleep(1.5);  -- a session reports its transactions when it is idle, and not more often than once a second
CALL until($$ migrate.serves('m') = 'source' $$);
SELECT t FROM told('m') t OFFSET 6;

-- begun and ended while the target serves, by its option; ended by its time
SELECT migrate.set('m', 'watch_abort_rate', 'default');
SELECT migrate.set('m', 'watch_time', '0');
SELECT migrate.cutover('m');
SELECT count(*) FROM migrate._watch;
SELECT migrate.set('m', 'watch_time', '10 minutes');
SELECT count(*) FROM migrate._watch;
SELECT migrate.set('m', 'watch_time', '0');
SELECT count(*) FROM migrate._watch;
SELECT migrate.set('m', 'watch_time', '1 second');
CALL until($$ NOT EXISTS (SELECT FROM migrate._watch) $$);
SELECT t FROM told('m') t OFFSET 10;
SELECT migrate.set('m', 'watch_time', '1 hour');
SELECT migrate.finalize('m', force => 'm');
SELECT count(*) FROM migrate._watch;
SET client_min_messages = warning;
SELECT migrate.drop('m');
DROP SCHEMA watch_test CASCADE;
RESET SESSION AUTHORIZATION;
DROP ROLE regress_dba;

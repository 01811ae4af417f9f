-- The background worker: pace, run control, failures, throttles, gaps, views. Kills and restarts are tested in test/t.
\set VERBOSITY default
SET client_min_messages = notice;
CREATE ROLE worker_test_dba SUPERUSER;
CREATE ROLE worker_test_other;
SET ROLE worker_test_dba;
CREATE SCHEMA worker_test;
SET search_path = worker_test, public;

-- Batch sizes: at most doubled, at most halved, at rest within a tenth, from 10 to 100000.
SELECT migrate._next_batch(1000, 50, 100) AS fast, migrate._next_batch(1000, 1000, 100) AS slow, migrate._next_batch(1000, 80, 100) AS a_little,
       migrate._next_batch(1000, 95, 100) AS rest, migrate._next_batch(90000, 1, 100) AS most, migrate._next_batch(12, 1000, 100) AS least,
       migrate._next_batch(100, 0, 100) AS no_time, migrate._halved_batch(1000) AS halved, migrate._halved_batch(15) AS not_below;
-- Sleeps: ratio / (1 - ratio) of the time worked; by rate; fixed; the longest counts.
SELECT migrate._sleep_ms(100, 0, 1000, 0, 0) AS none, migrate._sleep_ms(100, 0.5, 1000, 0, 0) AS half, migrate._sleep_ms(100, 0.75, 1000, 0, 0) AS three_quarters,
       migrate._sleep_ms(100, 0, 1000, 5000, 0) AS by_rate, migrate._sleep_ms(100, 0.5, 1000, 5000, 500) AS fixed, migrate._sleep_ms(0, 0, 1000000000, 1, 0) AS most;
SELECT array_agg(migrate._backoff_ms(n, 50, 1000) ORDER BY n) FROM generate_series(1, 7) n;

-- Whose fault an error is
SELECT migrate._blame(s) AS blame, string_agg(s, ' ' ORDER BY s) FROM unnest(ARRAY['22012', '23505', 'P0001', '44000', '42804', '54000', 'MY001', '40001',
    '40P01', '55P03', '57014', '53100', '58030', '57P03', '42P01', 'XX000', '0A000', '55000']) s GROUP BY 1 ORDER BY 1;

-- Windows, over midnight too
SELECT w, t, migrate._throttle_window(w, t::timestamptz) FROM
    (VALUES ('22:00-06:00 UTC', '2024-01-01 23:00+00'), ('22:00-06:00 UTC', '2024-01-01 05:59+00'), ('22:00-06:00 UTC', '2024-01-01 06:00+00'),
            ('08:00-12:00 Europe/Berlin', '2024-07-01 06:30+00'), ('08:00-12:00 Europe/Berlin', '2024-07-01 10:30+00'), ('always', '2024-01-01 00:00+00'),
            ('nonsense', '2024-01-01 00:00+00')) v(w, t);

-- The bar and times of wait()
SELECT migrate._bar(0, 10, false), migrate._bar(46, 10, false), migrate._bar(100, 10, false), migrate._bar(250, 10, false);
SELECT migrate._short_time('41 s'), migrate._short_time('183 s'), migrate._short_time('2 h 5 min');

-- A small migration: two rows that the target refuses go to failures, and everything else is copied.
CREATE TABLE users (id integer PRIMARY KEY, name text NOT NULL);
CREATE TABLE profiles (user_id integer PRIMARY KEY, display_name text NOT NULL CONSTRAINT not_bad CHECK (display_name <> 'bad'));
INSERT INTO users SELECT i, CASE WHEN i IN (7, 400) THEN 'bad' ELSE 'user ' || i END FROM generate_series(1, 500) i;
SELECT migrate.define('worker_test', 'users', 'profiles', 'id AS user_id, name AS display_name');

-- Polls until a condition holds; wait() itself prints lines that depend on the machine's speed.
CREATE FUNCTION reaches(condition text) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    holds boolean;
BEGIN
    FOR i IN 1 .. 600 LOOP
        EXECUTE 'SELECT ' || condition INTO holds;
        IF holds THEN
            RETURN 'yes';
        END IF;
        PERFORM pg_sleep(0.05);
    END LOOP;
    RETURN (SELECT format('no: %s, %s, %s', p.phase, p.state, p.last_error) FROM migrate.progress p WHERE p.migration = 'worker_test');
END $$;

-- Before the start
CALL migrate.wait('worker_test');
CALL migrate.wait('worker_test', 'nowhere');
CALL migrate.wait('worker_test', timeout => '-1 s');
CALL migrate.wait('nobody');
SELECT migrate.pause('worker_test');
SELECT migrate.retry('worker_test');

SELECT migrate.set('worker_test', 'batch_size', '100');
BEGIN;
SELECT migrate.start('worker_test');
CALL migrate.wait('worker_test');
ROLLBACK;
SELECT phase FROM migrate.progress WHERE migration = 'worker_test';

SELECT migrate.start('worker_test');
SELECT reaches($$ EXISTS (SELECT FROM migrate.migration WHERE name = 'worker_test' AND failed_since IS NOT NULL) $$);
SELECT phase, state, percent, rows_copied, failures, requeued FROM migrate.progress WHERE migration = 'worker_test';
SELECT flow, key, sqlstate, object, origin FROM migrate.failures WHERE migration = 'worker_test' ORDER BY key;
SELECT count(*) FROM profiles;
SELECT id FROM users LEFT JOIN profiles ON user_id = id WHERE user_id IS NULL ORDER BY id;
CALL migrate.wait('worker_test');

-- Put right, and tried again
UPDATE users SET name = 'good' WHERE name = 'bad';
SELECT migrate.retry('worker_test');
SELECT reaches($$ EXISTS (SELECT FROM migrate.migration WHERE name = 'worker_test' AND phase = 'ready') $$);
CALL migrate.wait('worker_test');
CALL migrate.wait('worker_test', 'backfilling');
SELECT count(*) FROM migrate.failures WHERE migration = 'worker_test';
SELECT id, name FROM users EXCEPT SELECT user_id, display_name FROM profiles;
SELECT migrate.retry('worker_test');
SELECT reaches($$ EXISTS (SELECT FROM migrate.progress WHERE migration = 'worker_test' AND state = 'idle' AND workers IS NULL) $$);

-- The worker has ended. A dual write that the target refuses brings one back, which tries again until there is nothing left.
UPDATE users SET name = 'bad' WHERE id = 1;
SELECT key, sqlstate, object, origin FROM migrate.failures WHERE migration = 'worker_test';
SELECT reaches($$ EXISTS (SELECT FROM migrate.failures WHERE migration = 'worker_test' AND attempts > 1) $$);
SELECT DISTINCT why FROM migrate.events WHERE migration = 'worker_test' AND kind = 'refused';
UPDATE users SET name = 'good' WHERE id = 1;
SELECT reaches($$ NOT EXISTS (SELECT FROM migrate.failures WHERE migration = 'worker_test') $$);
SELECT reaches($$ EXISTS (SELECT FROM migrate.progress WHERE migration = 'worker_test' AND state = 'idle' AND workers IS NULL) $$);
-- … and the next one, though the same session has brought it back a moment ago, does so again
UPDATE users SET name = 'bad' WHERE id = 2;
SELECT reaches($$ EXISTS (SELECT FROM migrate.failures WHERE migration = 'worker_test' AND attempts > 1) $$);
UPDATE users SET name = 'good' WHERE id = 2;
SELECT reaches($$ NOT EXISTS (SELECT FROM migrate.failures WHERE migration = 'worker_test') $$);
SELECT reaches($$ EXISTS (SELECT FROM migrate.progress WHERE migration = 'worker_test' AND state = 'idle' AND workers IS NULL) $$);

-- Pause and resume
SELECT migrate.pause('worker_test');
SELECT migrate.pause('worker_test');
SELECT name, phase, paused_reason = 'paused by ' || current_user AS reason FROM migrate.migration WHERE name = 'worker_test';
CALL migrate.wait('worker_test', 'cut_over', '300 ms');
SELECT migrate.resume('worker_test');
SELECT migrate.resume('worker_test');

-- Throttles: one of the two, within limits
SELECT migrate.throttle('worker_test');
SELECT migrate.throttle('worker_test', ratio => 0.5, rows_per_second => 5);
SELECT migrate.throttle('worker_test', ratio => 1.5);
SELECT migrate.throttle('worker_test', ratio => 'NaN');
SELECT migrate.throttle('worker_test', rows_per_second => 0);
SELECT migrate.throttle('worker_test', ratio => 0.5, for_time => '-1 hour');
SELECT migrate.unthrottle('worker_test');
SELECT migrate.throttle('worker_test', ratio => 0.5) ~ '^throttle none -> ratio 0.5 until ';
SELECT throttled_by ~ '^ratio 0.5 by throttle\(\) until ' AS shown FROM migrate.progress WHERE migration = 'worker_test';
SELECT migrate.throttle('worker_test', rows_per_second => 250) ~ '^throttle ratio 0.5 until .* -> 250 rows/s until ';
SELECT migrate.unthrottle('worker_test') ~ ' -> none$';

-- The signals by themselves
SELECT migrate.set('worker_test', 'throttle_query', 'SELECT name = ''busy'' FROM worker_test.users WHERE id = 1');
SELECT migrate._throttle_reason(id) FROM migrate._migration WHERE name = 'worker_test';
UPDATE users SET name = 'busy' WHERE id = 1;
SELECT migrate._throttle_reason(id) FROM migrate._migration WHERE name = 'worker_test';
DELETE FROM users WHERE id = 1;
SELECT migrate._throttle_reason(id) FROM migrate._migration WHERE name = 'worker_test';
SELECT migrate._throttle_by_query('worker_test_other', 'SELECT true FROM worker_test.users');
SELECT migrate.set('worker_test', 'throttle_query', 'none');
SELECT migrate._throttle_backends(1000) IS NULL AS few, migrate._throttle_backends(0) ~ '^active backends \d+ > 0$' AS many;

-- A gap in the dual writes is found, and closed by retry
ALTER TABLE users DISABLE TRIGGER ALL;
UPDATE users SET name = 'missed' WHERE id = 2;
ALTER TABLE users ENABLE TRIGGER ALL;
SELECT migrate.retry('worker_test');
SELECT reaches($$ EXISTS (SELECT FROM migrate.migration WHERE name = 'worker_test' AND failed_since IS NOT NULL) $$);
SELECT phase, failed_reason FROM migrate.migration WHERE name = 'worker_test';
UPDATE users SET name = 'carried' WHERE id = 2;
SELECT migrate.retry('worker_test');
SELECT reaches($$ EXISTS (SELECT FROM migrate.migration WHERE name = 'worker_test' AND phase = 'ready') $$);

-- A clone does nothing by itself
UPDATE migrate._migration SET database_oid = 1 WHERE name = 'worker_test';
SELECT migrate.shadow('worker_test', 0.5);
SELECT migrate._launch_unfinished();
SELECT reaches($$ EXISTS (SELECT FROM migrate.migration WHERE name = 'worker_test' AND paused_since IS NOT NULL) $$);
SELECT regexp_replace(paused_reason, 'system \d+', 'system N') FROM migrate.migration WHERE name = 'worker_test';
SELECT migrate.resume('worker_test');
SELECT migrate.shadow('worker_test', 0);

-- Others see nothing, and an observer may not act
SELECT migrate.allow('worker_test_other', 'observe');
SET ROLE worker_test_other;
SELECT (SELECT count(*) FROM migrate.migration) + (SELECT count(*) FROM migrate.progress) + (SELECT count(*) FROM migrate.events)
     + (SELECT count(*) FROM migrate.failures) AS seen;
CALL migrate.wait('worker_test');
SELECT migrate.pause('worker_test');
SELECT migrate._launch_worker(1, 0);
SELECT * FROM migrate._progress;
SET ROLE worker_test_dba;

-- Cancel leaves the rows and takes the triggers
SELECT migrate.cancel('worker_test');
SELECT migrate.cancel('worker_test');
CALL migrate.wait('worker_test');
SELECT count(*) FROM pg_trigger WHERE tgrelid = 'users'::regclass AND NOT tgisinternal;
SELECT migrate.resume('worker_test');
SELECT migrate.throttle('worker_test', ratio => 0.5);
SELECT kind, from_phase, to_phase FROM migrate.events WHERE migration = 'worker_test' AND kind NOT IN ('option', 'throttled', 'unthrottled', 'validated', 'throttle', 'refused') ORDER BY id;

SELECT migrate.drop('worker_test');
SET client_min_messages = warning;
DROP OWNED BY worker_test_other;
DROP SCHEMA worker_test CASCADE;
RESET ROLE;
DROP OWNED BY worker_test_dba;
DROP ROLE worker_test_dba, worker_test_other;

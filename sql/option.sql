-- set and get: every option, every kind of bad value.
\set SHOW_CONTEXT never
SET TimeZone = 'Europe/Berlin';
CREATE SCHEMA opt;
SET search_path = opt;
CREATE TABLE a (id int PRIMARY KEY, v text);
CREATE TABLE b (id int PRIMARY KEY, v text);
SELECT migrate.define('opt', 'a', 'b');

-- Defaults.
SELECT option, value, "default", unit FROM migrate.get('opt');
SELECT count(*) AS without_description FROM migrate.get('opt') WHERE description = '';
-- Reading one changes nothing.
SELECT * FROM migrate.get('opt', 'batch_time');
SELECT count(*) FROM migrate.events WHERE migration = 'opt' AND kind = 'option';

-- Units.
SELECT migrate.set('opt', 'batch_size', '5000'), migrate.set('opt', 'batch_size', '2000 rows'), migrate.set('opt', 'batch_size', 'default');
SELECT migrate.set('opt', 'batch_time', '2s'), migrate.set('opt', 'batch_time', '250 ms'), migrate.set('opt', 'batch_time', '80');
SELECT migrate.set('opt', 'sleep', '0.05 s'), migrate.set('opt', 'max_replica_lag', '1 minute'), migrate.set('opt', 'max_replica_lag', 'none');
SELECT migrate.set('opt', 'rollback_window', '3 days'), migrate.set('opt', 'rollback_window', '90 min'), migrate.set('opt', 'rollback_window', '24');
SELECT migrate.set('opt', 'shadow_time', '1:30:00'), migrate.set('opt', 'shadow_time', '5');
SELECT migrate.set('opt', 'max_wal_rate', '32MB'), migrate.set('opt', 'max_wal_rate', '1 GB/s'), migrate.set('opt', 'max_wal_rate', '65536');
SELECT migrate.set('opt', 'shadow_rate', '0.01'), migrate.set('opt', 'shadow_rate', '5 %');
SELECT migrate.set('opt', 'accept_reverse_gaps', 'true'), migrate.set('opt', 'dual_write', 'STRICT'), migrate.set('opt', 'equality', 'semantic');
SELECT migrate.set('opt', 'window', '22:00-6:00 europe/paris'), migrate.set('opt', 'window', '8:30-17:00'), migrate.set('opt', 'window', 'always');
SELECT migrate.set('opt', 'require', 'shadow, failures'), migrate.set('opt', 'require', 'all');
SELECT migrate.set('opt', 'throttle_query', 'SELECT count(*) > 10 FROM opt.a; ');
SELECT migrate.set('opt', 'throttle_query', 'none');

-- The same again is no change, and says so.
SELECT migrate.set('opt', 'dual_write', 'strict');
SELECT why FROM migrate.events WHERE migration = 'opt' AND kind = 'option' ORDER BY id LIMIT 4;

-- on_target_delete belongs to the flows.
SELECT migrate.set('opt', 'on_target_delete', 'keep'), value FROM migrate.get('opt', 'on_target_delete');
SELECT value FROM migrate.get('opt', 'on_target_delete');

-- Bad values: each is named with its limits.
SELECT migrate.set('opt', 'batch_size', '9');
SELECT migrate.set('opt', 'batch_size', '100001');
SELECT migrate.set('opt', 'batch_size', '1000.5');
SELECT migrate.set('opt', 'batch_size', 'many');
SELECT migrate.set('opt', 'batch_size', NULL);
SELECT migrate.set('opt', 'batch_time', '0');
SELECT migrate.set('opt', 'batch_time', '5 parsecs');
SELECT migrate.set('opt', 'batch_time', '12:30');
SELECT migrate.set('opt', 'workers', '0');
SELECT migrate.set('opt', 'max_rows_per_second', '0');
SELECT migrate.set('opt', 'sleep', '-1');
SELECT migrate.set('opt', 'max_replica_lag', 'infinity');
SELECT migrate.set('opt', 'max_active_backends', 'none of your business');
SELECT migrate.set('opt', 'max_wal_rate', '5 hours');
SELECT migrate.set('opt', 'max_wal_rate', '10 bytes');
SELECT migrate.set('opt', 'lock_timeout', '2 minutes');
SELECT migrate.set('opt', 'cutover_timeout', '2 days');
SELECT migrate.set('opt', 'rollback_window', 'a while');
SELECT migrate.set('opt', 'shadow_rate', '1.5');
SELECT migrate.set('opt', 'shadow_rate', 'NaN');
SELECT migrate.set('opt', 'shadow_time', '-5 min');
SELECT migrate.set('opt', 'max_shadow_mismatch_rate', '200%');
SELECT migrate.set('opt', 'require', 'luck');
SELECT migrate.set('opt', 'require', '');
SELECT migrate.set('opt', 'dual_write', 'sometimes');
SELECT migrate.set('opt', 'accept_reverse_gaps', 'maybe');
SELECT migrate.set('opt', 'equality', 'fuzzy');
SELECT migrate.set('opt', 'max_failures', '-1');
SELECT migrate.set('opt', 'on_target_delete', 'archive');
SELECT migrate.set('opt', 'cutover', 'swap');
SELECT migrate.set('opt', 'cutover', 'magic');
SELECT migrate.set('opt', 'window', 'at night');
SELECT migrate.set('opt', 'window', '25:00-06:00');
SELECT migrate.set('opt', 'window', '06:00-06:00 UTC');
SELECT migrate.set('opt', 'window', '22:00-06:00 Mars/Olympus');
SELECT migrate.set('opt', 'throttle_query', 'SELECT true; DROP TABLE opt.a');
SELECT migrate.set('opt', 'throttle_query', 'DELETE FROM opt.a RETURNING true');
SELECT migrate.set('opt', 'throttle_query', 'WITH x AS (DELETE FROM opt.a RETURNING true) SELECT true FROM x');
SELECT migrate.set('opt', 'throttle_query', 'SELECT 1, 2');
SELECT migrate.set('opt', 'throttle_query', 'SELECT x FROM nowhere');
SELECT migrate.set('opt', 'no_such_option', '1');
SELECT migrate.get('opt', 'no_such_option');
SELECT migrate.set('no such migration', 'workers', '1');
SELECT migrate.get('no such migration');

-- Nobody else's business.
CREATE ROLE regress_migrate_opt;
SELECT migrate.allow('regress_migrate_opt', 'operate');
GRANT USAGE ON SCHEMA opt TO regress_migrate_opt;
SET ROLE regress_migrate_opt;
SELECT migrate.set('opt', 'workers', '2');
SELECT migrate.get('opt', 'workers');
RESET ROLE;

SELECT migrate.drop('opt');
SELECT migrate.allow('regress_migrate_opt', 'nothing');
DROP SCHEMA opt CASCADE;
DROP ROLE regress_migrate_opt;

-- What the extension shows and to whom: the interface is there, everything else is denied by default.
BEGIN;
SET search_path = public, pg_catalog;
SELECT no_plan();

SELECT has_schema('migrate');
SELECT has_function('migrate', name, 'verb ' || name)
FROM unnest('{define,add_flow,add_view,drop,set,get,preflight,plan,start,pause,resume,cancel,retry,wait,throttle,unthrottle,validate,
mismatches,repair,shadow,route,cutover,rollback,finalize,serves,allow,checksum,range_checksums,md5_agg,ordered_md5,row_sum}'::text[]) AS name;
SELECT has_view('migrate', name, 'view ' || name) FROM unnest('{migration,progress,events,failures,routes}'::text[]) AS name;

-- Everything in the schema belongs to the extension, and what is internal is revoked from PUBLIC.
SELECT is_empty($$
    SELECT p.oid::regprocedure FROM pg_proc p WHERE p.pronamespace = 'migrate'::regnamespace AND has_function_privilege('public', p.oid, 'EXECUTE')
    AND p.proname NOT IN ('md5_agg', 'ordered_md5', 'same_image', 'checksum', 'row_sum', 'range_checksums', '_digest_parts', '_digest_call', '_last', '_beyond', '_operator')
$$, 'PUBLIC may execute the digests and what they are made of, nothing else');
SELECT is_empty($$
    SELECT p.oid::regprocedure FROM pg_proc p WHERE p.pronamespace = 'migrate'::regnamespace AND has_function_privilege('public', p.oid, 'EXECUTE')
    AND p.prosecdef
$$, 'and what PUBLIC may execute runs with the rights of the caller');
SELECT is_empty($$
    SELECT c.oid::regclass FROM pg_class c WHERE c.relnamespace = 'migrate'::regnamespace AND c.relkind IN ('r', 'p', 'v', 'm', 'f')
    AND (has_table_privilege('public', c.oid, 'SELECT, INSERT, UPDATE, DELETE, TRUNCATE, REFERENCES, TRIGGER')
         OR has_any_column_privilege('public', c.oid, 'SELECT, INSERT, UPDATE, REFERENCES'))
$$, 'PUBLIC may neither read nor write a relation');
SELECT is_empty($$
    SELECT c.oid FROM (SELECT oid FROM pg_class WHERE relnamespace = 'migrate'::regnamespace AND relkind = 'S' OFFSET 0) c
    WHERE has_sequence_privilege('public', c.oid, 'USAGE, SELECT, UPDATE')
$$, 'PUBLIC may use no sequence');
SELECT is_empty($$
    SELECT p.oid::regprocedure FROM pg_proc p WHERE p.pronamespace = 'migrate'::regnamespace AND p.prosecdef
    AND NOT coalesce(array_to_string(p.proconfig, ',') LIKE '%search\_path=%', false)
$$, 'every SECURITY DEFINER function pins its search_path');
SELECT is_empty($$
    SELECT c.oid::regclass FROM pg_class c WHERE c.relnamespace = 'migrate'::regnamespace AND c.relkind = 'r' AND c.relpersistence <> 'p'
$$, 'state lives in logged tables');

-- Each name that a user meets has a comment.
SELECT is_empty($$
    SELECT p.oid::regprocedure FROM pg_proc p WHERE p.pronamespace = 'migrate'::regnamespace AND p.proname NOT LIKE '\_%'
    AND obj_description(p.oid, 'pg_proc') IS NULL
$$, 'every public function has a comment');
SELECT is_empty($$
    SELECT c.oid::regclass FROM pg_class c WHERE c.relnamespace = 'migrate'::regnamespace AND c.relname NOT LIKE '\_%' AND c.relkind = 'v'
    AND obj_description(c.oid, 'pg_class') IS NULL
$$, 'every view has a comment');

-- The phases are what the documentation says.
SELECT set_eq('SELECT from_phase FROM migrate._phase_move UNION SELECT to_phase FROM migrate._phase_move',
    '{planned,dual_writing,backfilling,validating,shadowing,ready,cut_over,finalized,cancelled}'::text[], 'the phases');
SELECT is_empty($$ SELECT 1 FROM migrate._phase_move WHERE from_phase IN ('finalized', 'cancelled') $$, 'the last phases are final');
SELECT is_empty($$ SELECT 1 FROM migrate._phase_move WHERE to_phase = 'cancelled' AND from_phase = 'cut_over' $$, 'cancel is not possible once switched');

-- A role that was allowed nothing gets an error with its SQLSTATE; one that may look sees what is its own: here, nothing.
CREATE ROLE pgtap_stranger;
SET LOCAL ROLE pgtap_stranger;
SELECT throws_ok('SELECT * FROM migrate._migration', '42501', NULL, 'a stranger reads no state table');
SELECT throws_ok('SELECT * FROM migrate.progress', '42501', NULL, 'nor a view');
SELECT throws_ok($$SELECT migrate._raise('22023', 'x')$$, '42501', NULL, 'a stranger calls no internal function');
SELECT throws_ok($$SELECT migrate.start('nothing')$$, '42501', NULL, 'nor a verb');
SELECT throws_ok($$SELECT migrate.allow('pgtap_stranger')$$, '42501', NULL, 'nor allows itself to');
RESET ROLE;
SELECT lives_ok($$SELECT migrate.allow('pgtap_stranger', 'observe')$$, 'a superuser allows a role to look');
SET LOCAL ROLE pgtap_stranger;
SELECT is_empty('SELECT * FROM migrate.progress', 'it sees no migration of others');
SELECT throws_ok($$SELECT migrate.start('nothing')$$, '42501', NULL, 'it may not operate');
RESET ROLE;
SELECT lives_ok($$SELECT migrate.allow('pgtap_stranger', 'operate')$$, 'a superuser allows a role to operate');
SET LOCAL ROLE pgtap_stranger;
SELECT throws_ok($$SELECT migrate.start('nothing')$$, '42704', NULL, 'an unknown migration is an error');
SELECT throws_ok('SELECT * FROM migrate._migration', '42501', NULL, 'state tables stay closed');
RESET ROLE;
SELECT lives_ok($$SELECT migrate.allow('pgtap_stranger', 'nothing')$$, 'and takes it back');
SET LOCAL ROLE pgtap_stranger;
SELECT throws_ok($$SELECT migrate.start('nothing')$$, '42501', NULL, 'then it may not operate');
RESET ROLE;

SELECT * FROM finish();
ROLLBACK;

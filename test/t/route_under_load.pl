# Reads that go to the target by and by, under load: nobody gets an error, and a session always reads what it has written itself, on
# whichever side its key is read. Writers use the view for writing and the table, as an application that is being changed does.
use strict;
use warnings;
use FindBin;
use lib $FindBin::RealBin;

use MigrateTest;
use Test::More;

my $node = new_server('route', conf => "autovacuum = off\n");
make_users($node, 2000);
define_users($node);
$node->safe_psql('postgres', <<'SQL');
SELECT migrate.add_view('users_to_profiles', view => 'profile');
SELECT migrate.add_view('users_to_profiles', view => 'profile_read', use => 'read');
SELECT migrate.start('users_to_profiles');
-- Raises unless the view for reading shows this row, and this row alone.
CREATE FUNCTION must_read(key bigint, expected text) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    found text := (SELECT string_agg(display_name, ', ') FROM profile_read WHERE user_id = key);
BEGIN
    IF found IS DISTINCT FROM expected THEN
        RAISE 'key % reads %, but % was written', key, coalesce(found, 'nothing'), coalesce(expected, 'nothing');
    END IF;
END $$;
SQL
wait_phase($node, 'ready');

# Each client writes keys of its own, so that nobody else has changed what it reads then.
my $writer = start_app($node, 'writer', <<'SQL', clients => 4, rate => 300);
\set id random(0, 199) * 8 + :client_id * 2 + 1
\set n random(1, 1000000)
\set kind random(1, 10)
\if :kind <= 5
UPDATE profile SET display_name = 'view ' || :n WHERE user_id = :id;
SELECT must_read(:id, (SELECT 'view ' || :n WHERE EXISTS (SELECT FROM users WHERE id = :id)));
\elif :kind <= 7
BEGIN;
UPDATE users SET name = 'table ' || :n WHERE id = :id;
SELECT must_read(:id, (SELECT 'table ' || :n WHERE EXISTS (SELECT FROM users WHERE id = :id)));
COMMIT;
SELECT must_read(:id, (SELECT 'table ' || :n WHERE EXISTS (SELECT FROM users WHERE id = :id)));
\elif :kind <= 8
DELETE FROM profile WHERE user_id = :id;
SELECT must_read(:id, NULL);
\else
INSERT INTO profile (user_id, display_name, created_at) VALUES (:id, 'new ' || :n, now()) ON CONFLICT (user_id) DO UPDATE SET display_name = excluded.display_name;
SELECT must_read(:id, 'new ' || :n);
\endif
SQL
# Rows that nobody writes are there once and whole whatever is routed; long transactions at every level see one state.
my $reader = start_app($node, 'reader', <<'SQL', clients => 2, rate => 200);
\set id random(0, 999) * 2 + 2
SELECT must_read(:id, 'user ' || :id);
BEGIN ISOLATION LEVEL REPEATABLE READ;
SELECT 1 / (count(*) = 1000)::int FROM profile_read WHERE user_id % 2 = 0 AND user_id <= 2000;
SELECT 1 / (count(*) = count(DISTINCT user_id))::int FROM profile_read;
COMMIT;
SQL
poll('the application works', sub { app_transactions($writer) > 300 && app_transactions($reader) > 100 });

for my $round (1 .. 2)
{
	for my $step ('percent => 1', 'percent => 10', 'percent => 50', 'percent => 100', 'percent => 30', "predicate => 'user_id % 3 = 0'", 'percent => 0')
	{
		my $before = app_transactions($writer);
		is(error_of($node, "SELECT migrate.route('users_to_profiles', $step)"), '', "route: $step");
		poll('the application goes on', sub { app_transactions($writer) > $before + 100 });
	}
	is(error_of($node, "SELECT migrate.route('users_to_profiles', percent => 60)"), '', 'before the cutover');
	is(error_of($node, "SELECT migrate.$_('users_to_profiles')"), '', $_) for qw(cutover rollback);
}
my (undef, $failed) = stop_app($writer);
is($failed, 0, 'no transaction of the writers failed, and each read what it had written');
(undef, $failed) = stop_app($reader);
is($failed, 0, 'no transaction of the readers failed');
is(differing($node), 0, 'no row differs');
is($node->safe_psql('postgres', 'SELECT count(*) FROM migrate.failures'), 0, 'no dual write is left');
is($node->safe_psql('postgres', 'SELECT percent FROM migrate.routes'), 0, 'the reads are where the writes are');

# Somebody who reads in a long transaction is waited for, and nobody queues behind us; meanwhile nothing has changed.
subtest 'a long transaction is in the way' => sub {
	$node->safe_psql('postgres', "SELECT migrate.set('users_to_profiles', 'cutover_timeout', '500 ms')");
	my $old = background($node);
	$old->query_safe($_) for 'BEGIN ISOLATION LEVEL REPEATABLE READ', 'SELECT count(*) FROM users';
	my $pid = $old->query_safe('SELECT pg_backend_pid()');
	like(error_of($node, "SELECT migrate.route('users_to_profiles', percent => 10)"), qr/55P03.*PID $pid .*holds an old snapshot/s, 'an old snapshot is named');
	is(error_of($node, "SELECT migrate.route('users_to_profiles', percent => 10, skip => '{snapshots}')"), '', 'and passed over by name');
	is(error_of($node, "SELECT migrate.route('users_to_profiles', percent => 0)"), '', 'the way back waits for no snapshot');
	$old->query_safe($_) for 'ROLLBACK', 'BEGIN', 'SELECT count(*) FROM profile_read';
	like(error_of($node, "SELECT migrate.route('users_to_profiles', percent => 10)"), qr/55P03.*PID $pid .*holds ACCESS SHARE on public.profile_read/s, 'who holds the view is named');
	is($node->safe_psql('postgres', 'SELECT percent FROM migrate.routes'), 0, 'nothing has changed');
	$old->quit;
};

subtest 'row-level security' => sub {
	$node->safe_psql('postgres', <<'SQL');
CREATE ROLE anna LOGIN;
CREATE TABLE note (id int PRIMARY KEY, whose text NOT NULL);
CREATE TABLE memo (id int PRIMARY KEY, whose text NOT NULL);
INSERT INTO note SELECT i, CASE WHEN i % 4 = 0 THEN 'anna' ELSE 'bert' END FROM generate_series(1, 1000) i;
ALTER TABLE note ENABLE ROW LEVEL SECURITY;
ALTER TABLE memo ENABLE ROW LEVEL SECURITY;
CREATE POLICY own ON note USING (whose = current_user);
CREATE POLICY own ON memo USING (whose = current_user);
GRANT SELECT ON note, memo TO anna;
SELECT migrate.define('notes', 'note', 'memo', on_target_delete => 'delete');
SQL
	my $added = error_of($node, "SELECT migrate.add_view('notes', 'memo_read', use => 'read')");
	return like($added, qr/0A000.*has row-level security, which a view of PostgreSQL before 15 would pass by/, 'refused before PostgreSQL 15') if server_major() < 15;
	is($added, '', 'the view is made');
	$node->safe_psql('postgres', "SELECT migrate.start('notes')");
	wait_phase($node, 'ready', 'notes');
	for my $step ('percent => 0', 'percent => 50', "predicate => 'id < 300'", 'percent => 100')
	{
		$node->safe_psql('postgres', "SELECT migrate.route('notes', $step)");
		is($node->safe_psql('postgres', 'SELECT count(*), count(DISTINCT id), min(whose), max(whose) FROM memo_read', extra_params => [ '-U', 'anna' ]),
			'250|250|anna|anna', "she reads her own rows, $step");
	}
	$node->safe_psql('postgres', "SELECT migrate.route('notes', percent => 0); REVOKE SELECT ON memo FROM anna");
	like(error_of($node, "SELECT migrate.route('notes', percent => 1)"), qr/55000.*gate views.*role anna lacks SELECT on (public\.)?memo/s, 'who could not read the target is not sent there');
};

$node->stop;
done_testing();

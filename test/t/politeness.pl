# A switch never stands in the application's way: it backs off from who holds a lock, names them by PID, and waits out old
# snapshots with the old state intact.
use strict;
use warnings;
use FindBin;
use lib $FindBin::RealBin;

use IPC::Run ();
use MigrateTest;
use Test::More;

my $rows = 20_000;
# (Without UTF-8, for a change: a progress bar has to do without its characters.)
my $node = new_server('politeness', encoding => 'SQL_ASCII');
make_users($node, $rows);
define_users($node);
$node->safe_psql('postgres', "SELECT migrate.add_view('users_to_profiles', view => 'profile')");
$node->safe_psql('postgres', "SELECT migrate.start('users_to_profiles')");
is(error_of($node, "CALL migrate.wait('users_to_profiles', timeout => '120 s')"), '', 'ready');
$node->safe_psql('postgres', "SELECT migrate.set('users_to_profiles', 'cutover_timeout', '8 s')");

my $app = start_app($node, 'app', <<"SQL", clients => 4, rate => 200);
\\set id random(1, $rows)
SELECT count(*) FROM profile WHERE user_id = :id;
UPDATE users SET name = 'name ' || :id WHERE id = :id;
SQL
poll('the application works', sub { app_transactions($app) > 100 });

# An idle transaction that has read the tables: cutover cannot get its locks.
my $idle = background($node);
my $idle_pid = $idle->query_safe('SELECT pg_backend_pid()');
$idle->query_safe('BEGIN');
$idle->query_safe('SELECT count(*) FROM profile');
my $error = error_of($node, "SELECT migrate.cutover('users_to_profiles')");
like($error, qr/55P03|55006/, 'cutover gives up beside an idle transaction');
like($error, qr/\b$idle_pid\b/, 'and names its PID');
unlike($error, qr/PID +waits|in turn/, 'and nobody who waits for us, for there is nobody');
is(phase($node), 'ready', 'nothing has changed');
$error = error_of($node, "SELECT migrate.set('users_to_profiles', 'cutover_timeout', '3 s'); SELECT migrate.cutover('users_to_profiles', dry_run => true)");
like($error, qr/55P03.*\b$idle_pid\b/s, 'a rehearsal keeps the same bounds, and names it too');
$node->safe_psql('postgres', "SELECT migrate.set('users_to_profiles', 'cutover_timeout', '8 s')");
is($node->safe_psql('postgres', "SELECT migrate.serves('users_to_profiles')"), 'source', 'the source serves');
is(differing($node), 0, 'no row differs');
$idle->query_safe('COMMIT');
is(error_of($node, "SELECT migrate.cutover('users_to_profiles')"), '', 'cutover when it has gone');
is(differing($node), 0, 'no row differs after cutover');

# The same for rollback, by a transaction that has written.
$idle->query_safe('BEGIN');
$idle->query_safe("UPDATE user_profiles SET display_name = 'held' WHERE user_id = $rows + 1");
$error = error_of($node, "SELECT migrate.rollback('users_to_profiles')");
like($error, qr/55P03|55006/, 'rollback gives up beside an open writer');
like($error, qr/\b$idle_pid\b/, 'and names its PID');
is($node->safe_psql('postgres', "SELECT migrate.serves('users_to_profiles')"), 'target', 'the target still serves');
$idle->query_safe('ROLLBACK');
is(error_of($node, "SELECT migrate.rollback('users_to_profiles')"), '', 'rollback when it has gone');

# No statement of the application waited for the switch, failed attempts included: far less than the 8 s of each.
my ($done, $failed, $longest) = stop_app($app);
is($failed, 0, 'failed transactions');
cmp_ok($longest, '<', 2000, "the longest wait of the application was $longest ms");

# A REPEATABLE READ transaction whose snapshot is older than the last batch would see an empty target: it is waited out.
$node->safe_psql('postgres', <<'SQL');
CREATE TABLE plain (id int PRIMARY KEY, v text);
CREATE TABLE plain_target (id int PRIMARY KEY, v text);
INSERT INTO plain SELECT i, 'v' || i FROM generate_series(1, 1000) i;
SELECT migrate.define('plain', source => 'plain', target => 'plain_target', on_target_delete => 'delete');
SELECT migrate.add_view('plain', view => 'plain_view');
SELECT migrate.set('plain', 'cutover_timeout', '8 s');
SQL
my $old = background($node);
my $old_pid = $old->query_safe('SELECT pg_backend_pid()');
$old->query_safe('BEGIN ISOLATION LEVEL REPEATABLE READ');
is($old->query_safe('SELECT count(*) FROM users WHERE id = -1'), 0, 'the old snapshot is taken');
$node->safe_psql('postgres', "SELECT migrate.start('plain')");
is(error_of($node, "CALL migrate.wait('plain', timeout => '60 s')"), '', 'the backfill does not wait for it');
$error = error_of($node, "SELECT migrate.cutover('plain')");
like($error, qr/\b$old_pid\b/, 'cutover waits for the old snapshot and names its PID');
is($node->safe_psql('postgres', "SELECT migrate.serves('plain')"), 'source', 'the source serves');
$old->query_safe('COMMIT');
is(error_of($node, "SELECT migrate.cutover('plain')"), '', 'cutover when it has gone');
is($old->query_safe('SELECT count(*) FROM plain_view'), 1000, 'every row is seen after it');

$idle->quit;
$old->quit;

# The longest transaction of eight clients that read and write by that name while $switch runs (0: as long as one takes), in ms.
sub longest_beside
{
	my ($name, $relation, $key, $column, $switch) = @_;
	my $clients = start_app($node, $name, <<"SQL", clients => 8, rate => 300);
\\set id random(1, $rows)
SELECT $column FROM $relation WHERE $key = :id;
UPDATE $relation SET $column = 'name ' || :id WHERE $key = :id;
SQL
	poll("$name works", sub { app_transactions($clients) > 200 });
	if ($switch)
	{
		# Somebody who has read it, and stays for five seconds.
		my $holder = IPC::Run::start([ 'psql', '-X', '-q', '-d', $node->connstr('postgres') . " application_name=holder", '-c', "BEGIN; SELECT count(*) FROM $relation; SELECT pg_sleep(5); COMMIT" ],
			'>', \my $out, '2>', \my $problem);
		wait_for($node, 'somebody holds it', "SELECT count(*) = 1 FROM pg_stat_activity WHERE application_name = 'holder' AND wait_event = 'PgSleep'");
		is(error_of($node, "SELECT migrate.$switch"), '', "$switch beside a transaction that lasts");
		$holder->finish;
		is($problem, '', 'which comes to its end');
	}
	my $more = app_transactions($clients) + 300;
	poll("$name works on", sub { app_transactions($clients) >= $more });
	my (undef, $errors, $worst) = stop_app($clients);
	is($errors, 0, "$name: no transaction failed");
	return $worst;
}

# A queue behind the switch would last for seconds. (Where the machine stands still for a moment, there is another look.)
sub is_not_noticed
{
	my ($m, $relation, $key, $column) = @_;
	my $without = longest_beside("without_$m", $relation, $key, $column);
	my $with;
	for my $round (1 .. 3)
	{
		$with = longest_beside("with_${m}_$round", $relation, $key, $column, ($round % 2 ? 'cutover' : 'rollback') . "('$m')");
		last if $with < $without + 500;
	}
	cmp_ok($with, '<', $without + 500, "$m: the switch is not noticed: $with ms at most, $without ms without it");
	return;
}

subtest 'readers and writers beside a transaction that is in the way' => sub {
	$node->safe_psql('postgres', "SELECT migrate.set('users_to_profiles', 'cutover_timeout', '60 s')");
	is_not_noticed('users_to_profiles', 'profile', 'user_id', 'display_name');
	$node->safe_psql('postgres', <<"SQL");
CREATE TABLE account (id int PRIMARY KEY, name text);
CREATE TABLE account_big (id bigint PRIMARY KEY, name text);
INSERT INTO account SELECT i, 'name' FROM generate_series(1, $rows) i;
SELECT migrate.define('swapped', 'account', 'account_big', on_target_delete => 'delete'), migrate.set('swapped', 'cutover', 'swap'), migrate.start('swapped');
SQL
	wait_phase($node, 'ready', 'swapped');
	is_not_noticed('swapped', 'account', 'id', 'name');
};

# The old columns and the old table go while the application reads and writes the new one.
subtest 'finalize under load' => sub {
	$node->safe_psql('postgres', "SELECT migrate.cutover('users_to_profiles')") if phase($node) eq 'ready';
	$app = start_app($node, 'finalized', <<"SQL", clients => 8, rate => 300);
\\set id random(1, $rows)
SELECT display_name FROM profile WHERE user_id = :id;
UPDATE profile SET display_name = 'name ' || :id, bio = 'bio' WHERE user_id = :id;
SQL
	my $finalize = "migrate.finalize('users_to_profiles', force => 'users_to_profiles'";
	for my $what ("drop_columns => '{bio,created_at}'", 'drop_source => true')
	{
		my $goal = app_transactions($app) + 300;
		poll('the application works', sub { app_transactions($app) >= $goal });
		is(error_of($node, "SELECT $finalize, $what)"), '', "finalize, $what");
	}
	my $goal = app_transactions($app) + 300;
	poll('the application works', sub { app_transactions($app) >= $goal });
	is((stop_app($app))[1], 0, 'no transaction failed');
	is($node->safe_psql('postgres', "SELECT to_regclass('users') IS NULL AND (SELECT count(*) FROM profile) = $rows"), 't', 'the old table is gone, no row is');
};

$node->stop;
done_testing();

# Copies of a database in which a migration runs: a restored dump, a database made from a template, another system, an upgraded
# cluster. Each comes up paused and says so, with the call that goes on from there; the application's writes succeed at once;
# that call brings it to ready (or makes the rollback possible) with both sides equal.
use strict;
use warnings;
use FindBin;
use lib $FindBin::RealBin;

use MigrateTest;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = new_server('original', streaming => 1);
my $m = 'users_to_profiles';
my $rows = 12_000;
my $clone = qr/this is a clone: .*SELECT migrate\.resume\('users_to_profiles'\); makes it run here/;
my $writes = "INSERT INTO users (name) VALUES ('later'); UPDATE users SET name = 'changed', bio = NULL WHERE id % 500 = 1; DELETE FROM users WHERE id % 500 = 2;";
my $writes_back = "UPDATE user_profiles SET display_name = 'changed there' WHERE user_id % 500 = 3; DELETE FROM user_profiles WHERE user_id % 500 = 4;"
  . " INSERT INTO user_profiles (user_id, display_name) VALUES (1000000, 'later there');";

# A database with a migration in the phase: planned, backfilling (throttled), ready, cut_over.
sub database
{
	my ($db, $phase) = @_;
	$node->safe_psql('postgres', "CREATE DATABASE $db");
	$node->safe_psql($db, 'CREATE EXTENSION migrate_ext');
	make_users($node, $rows, db => $db, references => 1);
	define_users($node, db => $db, batch_size => 100);
	$node->safe_psql($db, "SELECT migrate.add_view('$m', view => 'profile')");
	return if $phase eq 'planned';
	$node->safe_psql($db, "SELECT migrate.set('$m', 'max_rows_per_second', '300')") if $phase eq 'backfilling';
	$node->safe_psql($db, "SELECT migrate.start('$m')");
	wait_for($node, 'a worker is at work', 'SELECT sum(rows_done) > 100 FROM migrate._range', 't', $db) if $phase eq 'backfilling';
	return if $phase eq 'backfilling';
	is(error_of($node, "CALL migrate.wait('$m', timeout => '120 s')", db => $db), '', "$db is ready");
	$node->safe_psql($db, "SELECT migrate.cutover('$m')") if $phase eq 'cut_over';
	return;
}

sub restore
{
	my ($from, $to, $how, $server) = @_;
	$server //= $node;
	my $file = $node->basedir . "/$to.dump";
	my @dump = $how eq 'custom' ? ('-Fc') : $how eq 'schema' ? ('--schema-only') : ();
	$node->command_ok([ 'pg_dump', @dump, '-f', $file, '-d', $from ], "pg_dump of $from ($how)");
	$server->safe_psql('postgres', "CREATE DATABASE $to");
	# In parallel: the tables of the extension are loaded in any order.
	my @load = $how eq 'custom' ? ('pg_restore', '--exit-on-error', '-j', '3', '-d', $to, $file) : ('psql', '-X', '-q', '-v', 'ON_ERROR_STOP=1', '-d', $to, '-f', $file);
	$server->command_ok(\@load, "restored as $to");
	return;
}

# It says that it is paused, why, and what to call.
sub is_paused
{
	my ($db, $server) = @_;
	$server //= $node;
	my ($state, $why) = split /\|/, $server->safe_psql($db, 'SELECT state, throttled_by FROM migrate.progress');
	is($state, 'paused', "$db comes up paused");
	like($why, $clone, 'progress says why, and what to call');
	like($server->safe_psql($db, 'SELECT paused_reason FROM migrate.migration'), $clone, 'and so does migration');
	is(scalar(worker_pids($server)), 0, 'no worker is at it');
	return;
}

sub goes_on_to_ready
{
	my ($db, $server) = @_;
	$server //= $node;
	$server->safe_psql($db, "SELECT migrate.set('$m', 'max_rows_per_second', 'none')");
	like(error_of($server, "CALL migrate.wait('$m', phase => 'finalized', timeout => '300 ms')", db => $db), qr/is a clone/, 'wait does not make it run');
	like($server->safe_psql($db, "SELECT migrate.resume('$m')"), qr/paused -> /, 'resume');
	is(error_of($server, "CALL migrate.wait('$m', timeout => '120 s')", db => $db), '', "$db gets ready");
	is(differing($server, $db), 0, 'no row differs');
	is($server->safe_psql($db, "SELECT verdict FROM migrate.validate('$m')"), 'equal', 'and validate says so');
	is(error_of($server, "SELECT migrate.cutover('$m')", db => $db), '', 'cutover');
	is(error_of($server, $writes_back, db => $db), '', 'the application writes the target');
	is(error_of($server, "SELECT migrate.rollback('$m')", db => $db), '', 'rollback');
	is(differing($server, $db), 0, 'no row differs after it');
	return;
}

subtest 'a dump from the middle of the backfill, under load' => sub {
	database('filling', 'backfilling');
	my $app = start_app($node, 'app', "\\set id random(1, $rows)\nUPDATE users SET name = 'name ' || :id WHERE id = :id;\nINSERT INTO users (name) VALUES ('new');\n",
		clients => 2, rate => 100, db => 'filling');
	poll('the application works', sub { app_transactions($app) > 20 });
	for my $how ('plain', 'custom')
	{
		my $db = "filling_$how";
		restore('filling', $db, $how);
		like(phase($node, $m, $db), qr/^backfilling/, 'it was in the middle');
		cmp_ok($node->safe_psql($db, "SELECT count(*) FROM user_profiles"), '<', $rows, 'not all rows are copied');
		is($node->safe_psql($db, "SELECT state FROM migrate.progress"), 'paused', "$db comes up paused");
		is(error_of($node, $writes, db => $db), '', 'the application writes the copy');
	}
	is((stop_app($app))[1], 0, 'the application of the original did not fail');
	$node->safe_psql('postgres', 'DROP DATABASE filling WITH (FORCE)');
	is_paused('filling_plain');
	goes_on_to_ready("filling_$_") for 'plain', 'custom';
	$node->safe_psql('postgres', "DROP DATABASE filling_$_ WITH (FORCE)") for 'plain', 'custom';
};

subtest 'a dump of a migration that is ready; one from the rollback window' => sub {
	database('done', 'ready');
	restore('done', 'done_plain', 'plain');
	is_paused('done_plain');
	is(error_of($node, $writes, db => 'done_plain'), '', 'the application writes the copy');
	is(differing($node, 'done_plain'), 0, 'and its writes are carried over');
	like(error_of($node, "SELECT migrate.cutover('$m')", db => 'done_plain'), qr/55000.*is refused by gate paused, dual_writes, validation.*migrate\.resume/s,
		'cutover is refused, and says what to call');
	goes_on_to_ready('done_plain');

	# Failures are not dumped, as they hold keys. What they stood for is found again.
	$node->safe_psql('done', "ALTER TABLE user_profiles ADD CONSTRAINT short CHECK (length(display_name) < 50) NOT VALID; UPDATE users SET name = repeat('x', 60) WHERE id = 10");
	is($node->safe_psql('done', 'SELECT count(*) FROM migrate.failures'), 1, 'a dual write failed in the original');
	restore('done', 'done_failed', 'custom');
	is($node->safe_psql('done_failed', 'SELECT count(*) FROM migrate.failures'), 0, 'the copy does not know');
	$node->safe_psql('done_failed', "SELECT migrate.resume('$m')");
	like(error_of($node, "CALL migrate.wait('$m', timeout => '120 s')", db => 'done_failed'), qr/55000.*mismatch/s, 'but finds the row');
	like(error_of($node, "SELECT migrate.cutover('$m')", db => 'done_failed'), qr/55000.*cannot cut over in phase validating/, 'and is not cut over');

	$node->safe_psql('done', "UPDATE users SET name = 'x' WHERE id = 10; SELECT migrate.retry('$m')");
	wait_for($node, 'no failure is left', 'SELECT count(*) = 0 FROM migrate.failures', 't', 'done');
	$node->safe_psql('done', "SELECT migrate.cutover('$m'); $writes_back");
	restore('done', 'in_window', 'custom');
	is_paused('in_window');
	is($node->safe_psql('in_window', "SELECT migrate.serves('$m')"), 'target', 'the target serves');
	is($node->safe_psql('in_window', 'SELECT count(*) FROM profile'), $node->safe_psql('in_window', 'SELECT count(*) FROM user_profiles'), 'the view reads it');
	is(error_of($node, "UPDATE profile SET display_name = 'by the view' WHERE user_id = 5; DELETE FROM profile WHERE user_id = 6", db => 'in_window'), '', 'the application writes the copy');
	is(differing($node, 'in_window'), 0, 'and its writes are carried back');
	like(error_of($node, "SELECT migrate.rollback('$m')", db => 'in_window'), qr/is refused by gate dual_writes, validation.*migrate\.retry.*migrate\.validate/s, 'rollback wants the triggers looked at');
	is(error_of($node, "SELECT migrate.resume('$m')", db => 'in_window') =~ s/^psql.*WARNING:.*\n//r =~ /ERROR/ ? 'error' : '', '', 'resume');
	is($node->safe_psql('in_window', "SELECT verdict FROM migrate.validate('$m')"), 'equal', 'validate');
	is(error_of($node, "SELECT migrate.rollback('$m')", db => 'in_window'), '', 'rollback');
	is($node->safe_psql('in_window', 'SELECT name FROM users WHERE id = 5'), 'by the view', 'nothing written after the cutover is lost');
	is(error_of($node, $writes, db => 'in_window'), '', 'the application writes the source');
	is(differing($node, 'in_window'), 0, 'no row differs');
	$node->safe_psql('postgres', "DROP DATABASE $_ WITH (FORCE)") for 'done_plain', 'done_failed', 'in_window';
};

subtest 'the schema alone' => sub {
	restore('done', 'empty', 'schema');
	is($node->safe_psql('empty', 'SELECT count(*) FROM migrate.migration'), 0, 'no migration');
	is(error_of($node, "INSERT INTO users (id, name) VALUES (501, 'a'), (502, 'b'), (1001, 'c'); $writes TRUNCATE users CASCADE", db => 'empty'), '', 'the application writes');
	is(error_of($node, 'DROP EXTENSION migrate_ext CASCADE', db => 'empty'), '', 'the extension goes');
	is(error_of($node, $writes, db => 'empty'), '', 'and leaves no trigger behind');
	$node->safe_psql('postgres', "DROP DATABASE $_ WITH (FORCE)") for 'empty', 'done';
};

subtest 'a database made from a template' => sub {
	database('model', 'backfilling');
	$node->safe_psql('postgres', 'ALTER DATABASE model ALLOW_CONNECTIONS false');
	$node->safe_psql('postgres', "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = 'model'");
	wait_for($node, 'nobody is connected', "SELECT count(*) = 0 FROM pg_stat_activity WHERE datname = 'model'");
	$node->safe_psql('postgres', 'CREATE DATABASE copied TEMPLATE model');
	$node->safe_psql('postgres', 'ALTER DATABASE model ALLOW_CONNECTIONS true; ALTER DATABASE copied ALLOW_CONNECTIONS true');
	is_paused('copied');
	is(error_of($node, $writes, db => 'copied'), '', 'the application writes the copy');
	goes_on_to_ready('copied');
	unlike($node->safe_psql('model', "SELECT state FROM migrate.progress"), qr/paused/, 'the original is not paused');
	is(error_of($node, "SELECT migrate.set('$m', 'max_rows_per_second', 'none'); CALL migrate.wait('$m', timeout => '120 s')", db => 'model'), '', 'and goes on');
	is(differing($node, 'model'), 0, 'no row differs there');
	$node->safe_psql('postgres', 'DROP DATABASE copied WITH (FORCE); ');
	# Ready: nothing is left to do for a worker, and yet it is a copy.
	wait_for($node, 'nobody is connected', "SELECT count(*) = 0 FROM pg_stat_activity WHERE datname = 'model'");
	$node->safe_psql('postgres', 'CREATE DATABASE copied TEMPLATE model');
	is_paused('copied');
	like(error_of($node, "SELECT migrate.cutover('$m')", db => 'copied'), qr/is refused by gate paused/, 'cutover of the copy is refused');
	goes_on_to_ready('copied');
	$node->safe_psql('postgres', "DROP DATABASE $_ WITH (FORCE)") for 'copied', 'model';
};

subtest 'another system, with its roles; the launcher there' => sub {
	$node->safe_psql('postgres', 'CREATE ROLE data_owner LOGIN; CREATE ROLE data_reader');
	$node->safe_psql('postgres', 'CREATE DATABASE owned');
	$node->safe_psql('owned', "CREATE EXTENSION migrate_ext; SELECT migrate.allow('data_owner'); SELECT migrate.allow('data_reader', 'observe'); GRANT ALL ON SCHEMA public TO data_owner");
	make_users($node, $rows, db => 'owned');
	$node->safe_psql('owned', 'ALTER TABLE users OWNER TO data_owner; ALTER TABLE user_profiles OWNER TO data_owner');
	$node->safe_psql('owned', "SET ROLE data_owner; SELECT migrate.define('$m', 'users', 'user_profiles', 'id AS user_id, name AS display_name, coalesce(bio, '''') AS bio, created_at', "
		  . "reverse => 'user_id AS id, display_name AS name, bio, created_at', on_target_delete => 'delete'); SELECT migrate.start('$m')");
	is(error_of($node, "CALL migrate.wait('$m', timeout => '120 s')", db => 'owned'), '', 'ready');
	database('planned', 'planned');

	my $other = new_server('other', preload => 1);
	my $roles = $node->basedir . '/roles.sql';
	$node->command_ok([ 'pg_dumpall', '--roles-only', '-f', $roles ], 'pg_dumpall of the roles');
	$other->command_ok([ 'psql', '-X', '-q', '-d', 'postgres', '-f', $roles ], 'restored');
	restore($_, $_, 'custom', $other) for 'owned', 'planned';
	$other->restart;    # the launcher looks at once
	wait_for($other, 'the launcher has been there', "SELECT count(*) = 1 FROM migrate.events WHERE kind = 'paused' AND why LIKE 'this is a clone: the migration was started on system %'", 't', 'owned');
	is_paused('owned', $other);
	is($other->safe_psql('owned', "SELECT owner FROM migrate.migration"), 'data_owner', 'its owner is who it was');
	is(error_of($other, $writes, db => 'owned', user => 'data_owner'), '', 'the application writes there');
	like(error_of($other, "SET ROLE data_reader; SELECT migrate.resume('$m')", db => 'owned'), qr/42501/, 'who may only look may not resume');
	is(error_of($other, "SELECT migrate.resume('$m'); CALL migrate.wait('$m', timeout => '120 s')", db => 'owned', user => 'data_owner'), '', 'its owner resumes it');
	is(differing($other, 'owned'), 0, 'no row differs');
	is(error_of($other, "SELECT migrate.start('$m'); CALL migrate.wait('$m', timeout => '120 s')", db => 'planned'), '', 'one that was not started is started there');
	is(differing($other, 'planned'), 0, 'no row differs');
	$other->stop;
};

$node->stop;
done_testing();

# DROP DATABASE and DROP EXTENSION where a worker is busy or waits, with the launcher about: no hang, nothing is left, and
# sessions of the application that have written before write on, before and after the extension comes again.
use strict;
use warnings;
use FindBin;
use lib $FindBin::RealBin;

use MigrateTest;
use Test::More;

my $m = 'users_to_profiles';
my $node = new_server('drop', preload => 1);
my $workers = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'migrate_ext worker'";

# How a migration is held in a phase, with a worker.
my %held = (
	dual_writing => '',
	backfilling => "SELECT migrate.set('$m', 'max_rows_per_second', '100')",
	# (The signals are looked at every 250 ms: after the sleep behind the only batch they are, and then the phase is entered throttled.)
	validating => "SELECT migrate.set('$m', 'throttle_query', 'SELECT bool_and(done) FROM migrate._range'), migrate.set('$m', 'batch_size', '5000'), migrate.set('$m', 'sleep', '300 ms'), migrate.set('$m', 'defer_indexes', 'off')",
	shadowing => "SELECT migrate.set('$m', 'shadow_rate', '0.01'); SELECT migrate.set('$m', 'shadow_time', '1 h')",
	cut_over => "SELECT migrate.set('$m', 'shadow_rate', '0.01'); SELECT migrate.set('$m', 'shadow_time', '0')");

# A database with a migration in the phase and a worker; gives the session that must stay open for it.
sub database
{
	my ($db, $phase) = @_;
	$node->safe_psql('postgres', "CREATE DATABASE $db");
	$node->safe_psql($db, 'CREATE EXTENSION migrate_ext');
	make_users($node, 2000, db => $db, references => 1);
	define_users($node, db => $db, batch_size => 50);
	$node->safe_psql($db, $held{$phase}) if $held{$phase};
	if ($phase eq 'dual_writing')
	{
		my $session = background($node, db => $db);
		$session->query_safe("BEGIN; SELECT migrate.start('$m')");
		wait_for($node, 'a worker waits for the commit', $workers, 1);
		return $session;
	}
	$node->safe_psql($db, "SELECT migrate.start('$m')");
	wait_phase($node, $phase eq 'cut_over' ? 'ready' : $phase, $m, $db);
	$node->safe_psql($db, "SELECT migrate.cutover('$m', skip => '{shadow}')") if $phase eq 'cut_over';
	wait_for($node, 'a worker is there', $workers, 1);
	return;
}

subtest 'DROP DATABASE WITH (FORCE)' => sub {
	# (004 has the other phases.)
	for my $phase ($ENV{MIGRATE_LONG} ? sort keys %held : qw(dual_writing validating cut_over))
	{
		my $session = database('forced', $phase);
		is(error_of($node, "SET statement_timeout = '30 s'; DROP DATABASE forced WITH (FORCE)"), '', "in phase $phase");
		wait_for($node, 'no worker is left', $workers, 0);
		$session->{run}->kill_kill if $session;
	}
};

subtest 'DROP EXTENSION under load' => sub {
	for my $phase ($ENV{MIGRATE_LONG} ? grep { $_ ne 'dual_writing' } sort keys %held : qw(backfilling cut_over))
	{
		database('dropped', $phase);
		my $app = start_app($node, "app_$phase", "\\set id random(101, 2000)\nUPDATE users SET name = 'by the application' WHERE id = :id;\n", clients => 2, rate => 100, db => 'dropped');
		poll('the application works', sub { app_transactions($app) > 20 });
		my $session = background($node, db => 'dropped');
		$session->query_safe("UPDATE users SET name = 'before' WHERE id = 1; UPDATE user_profiles SET bio = 'before' WHERE user_id = 2");
		# (Without the lock, DROP locks what it finds in its own order, and may deadlock with a writer, as DROP TABLE may.)
		unlike(error_of($node, "SET statement_timeout = '30 s'; BEGIN; LOCK TABLE users, user_profiles; DROP EXTENSION migrate_ext CASCADE; COMMIT", db => 'dropped'), qr/ERROR/, "in phase $phase");
		wait_for($node, 'no worker is left', $workers, 0);
		is($node->safe_psql('dropped', <<'SQL'), '0|0|0', 'no trigger, no function and no relation is left');
SELECT (SELECT count(*) FROM pg_trigger WHERE NOT tgisinternal), (SELECT count(*) FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace WHERE n.nspname = 'migrate'),
       (SELECT count(*) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = 'migrate')
SQL
		is($session->query_safe("UPDATE users SET name = 'after' WHERE id = 1 RETURNING name"), 'after', 'a session that wrote before writes on');
		$session->query_safe("UPDATE user_profiles SET bio = 'after' WHERE user_id = 2; DELETE FROM user_profiles WHERE user_id = 3; DELETE FROM users WHERE id = 3");
		# Again, under the same numbers, though not the same columns.
		unlike(error_of($node, "TRUNCATE user_profiles; CREATE EXTENSION migrate_ext; SELECT migrate.define('$m', 'users', 'user_profiles', 'id AS user_id, upper(name) AS display_name, coalesce(bio, '''') AS bio, created_at', on_target_delete => 'delete');"
				. " SELECT migrate.start('$m')", db => 'dropped'), qr/ERROR/, 'it can be created and started again');
		$session->query_safe("UPDATE users SET name = 'again' WHERE id = 1");
		wait_phase($node, 'ready', $m, 'dropped');
		$session->query_safe("UPDATE users SET name = 'and again' WHERE id = 4");
		is((stop_app($app))[1], 0, 'failed transactions of the application');
		is($node->safe_psql('dropped', "SELECT string_agg(display_name, ',' ORDER BY user_id) FROM user_profiles WHERE user_id IN (1, 4)"), 'AGAIN,AND AGAIN', 'its writes go by the new mapping');
		is($node->safe_psql('dropped', "SELECT verdict FROM migrate.validate('$m')"), 'equal', 'both sides are equal');
		$session->quit;
		$node->safe_psql('postgres', 'DROP DATABASE dropped WITH (FORCE)');
	}
};

$node->stop;
done_testing();

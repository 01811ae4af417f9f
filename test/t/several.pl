# Several migrations that are switched at once, under load: both or none, whether in one call or in one transaction; the application
# gets no error, no deadlock and never sees half of it. Two of the three share their source.
use strict;
use warnings;
use FindBin;
use lib $FindBin::RealBin;

use MigrateTest;
use Test::More;

# (A short deadlock_timeout, so that detectors look soon.)
my $node = new_server('several', conf => "autovacuum = off\ndeadlock_timeout = '150 ms'\n");
make_users($node, 2000);
define_users($node);
$node->safe_psql('postgres', <<'SQL');
CREATE TABLE user_names (id bigint PRIMARY KEY, name text NOT NULL);
CREATE TABLE orders (id int PRIMARY KEY, item text);
CREATE TABLE purchases (id int PRIMARY KEY, item text);
INSERT INTO orders SELECT i, 'item ' || i FROM generate_series(1, 1000) i;
SELECT migrate.define('names', source => 'users', target => 'user_names', mapping => 'id, name', on_target_delete => 'keep');
SELECT migrate.define('orders', source => 'orders', target => 'purchases', on_target_delete => 'delete');
SELECT migrate.add_view('users_to_profiles', view => 'profile');
SELECT migrate.add_view('names', view => 'name_of');
SELECT migrate.add_view('orders', view => 'purchase');
SELECT migrate.start('users_to_profiles'), migrate.start('names'), migrate.start('orders');
SQL
wait_phase($node, 'ready', $_) for qw(users_to_profiles names orders);

sub serving { return $node->safe_psql('postgres', "SELECT string_agg(migrate.serves(name), ' ' ORDER BY name) FROM migrate.migration") }

sub all_equal
{
	my ($when) = @_;
	wait_for($node, 'what was recorded is applied', 'SELECT count(*) = 0 FROM migrate.failures');
	is(differing($node), 0, "no profile differs $when");
	is( $node->safe_psql('postgres', <<'SQL'), '0', "no name and no order differs $when");
SELECT (SELECT count(*) FROM users u FULL JOIN user_names n USING (id) WHERE u.name IS DISTINCT FROM n.name)
     + (SELECT count(*) FROM orders o FULL JOIN purchases p USING (id) WHERE o.item IS DISTINCT FROM p.item)
SQL
	return;
}

subtest 'under load' => sub {
	my $app = start_app($node, 'app', <<'SQL', clients => 4, rate => 200);
\set id random(1, 1000)
BEGIN;
UPDATE profile SET display_name = 'name ' || :id WHERE user_id = :id;
UPDATE purchase SET item = 'item ' || :id WHERE id = :id;
SELECT count(*) FROM name_of WHERE id = :id;
COMMIT;
UPDATE users SET bio = 'by the old name' WHERE id = 1000 + :id;
SQL
	# (A division by zero where it sees some that are switched and some that are not.)
	my $witness = start_app($node, 'witness', "SELECT 1 / (count(DISTINCT phase) = 1)::int FROM migrate.migration;\n", clients => 1, rate => 200);
	poll('the application works', sub { app_transactions($app) > 100 && app_transactions($witness) > 100 });
	# Rehearsals, before the first cutover: under the same locks, and nothing stays of them.
	for my $verb (qw(cutover rollback))
	{
		my $report = $node->safe_psql('postgres', "SELECT migrate.$verb('{users_to_profiles,orders}'::text[], dry_run => true)");
		like($report, qr/^orders: ready -> ready \(dry run: undone\)$/m, "$verb is rehearsed");
		like($report, qr/^done: the @{[$verb eq 'cutover' ? 'target' : 'source']} serves$/m, 'to its end');
		like($report, qr/^locks: all got at attempt \d+ within [\d.]+ ms, held for [\d.]+ ms$/m, 'and says how long it held its locks');
	}
	is(serving(), 'source source source', 'the source serves');
	is($node->safe_psql('postgres', "SELECT count(*) FROM pg_trigger WHERE tgname LIKE '!migrate%reverse%'"), 0, 'no trigger is left of it');
	my %done = (call => 0, transaction => 0, refused => 0);
	my $transaction = sub {
		my ($verb, @names) = @_;
		my $error = error_of($node, join ' ', 'BEGIN;', (map { "SELECT migrate.$verb('$_');" } @names), 'COMMIT');
		like($error, qr/55P03/, "$verb in one transaction gives up as a whole") if $error;
		$error ? $done{refused}++ : $done{transaction}++;
		return !$error;
	};
	for my $round (1 .. 5)
	{
		for my $verb (qw(cutover rollback))
		{
			is(error_of($node, "SELECT migrate.$verb(ARRAY['users_to_profiles', 'orders', 'names'])"), '', "$verb in one call");
			$done{call}++;
		}
		# In the order in which the application uses them. One that does not get its locks gives up, with all; then it is begun again.
		for my $verb (qw(cutover rollback))
		{
			poll("$verb in one transaction", sub { $transaction->($verb, qw(users_to_profiles orders names)) });
		}
	}
	is($done{transaction}, 10, 'switches in one transaction');
	is(error_of($node, "SELECT migrate.cutover('{users_to_profiles,orders,names}'::text[])"), '', 'there');
	like($node->safe_psql('postgres', "SELECT migrate.rollback('users_to_profiles', dry_run => true)"), qr/^cut_over -> cut_over \(dry run: undone\)/, 'a rehearsal in the window');
	is(serving(), 'target target target', 'changes nothing');
	is(error_of($node, "SELECT migrate.rollback('{users_to_profiles,orders,names}'::text[])"), '', 'and back');
	# Against its order: whoever waits for us in turn is not waited for. It may happen or not, but all of it.
	$transaction->('cutover', qw(names orders users_to_profiles)) for 1 .. 5;
	is(error_of($node, "SELECT migrate.rollback(ARRAY['users_to_profiles', 'orders', 'names'])"), '', 'back');
	note(join ', ', map { "$_: $done{$_}" } sort keys %done);
	my (undef, $failed) = stop_app($app);
	is($failed, 0, 'the application has no failed transaction');
	(undef, $failed) = stop_app($witness);
	is($failed, 0, 'nobody saw some switched and others not');
	all_equal('after it');
};

# The application has read one view, for which the second switch of the transaction waits; then it asks for the view that the first
# holds. When its deadlock detector looks, it must not find that we wait.
subtest 'a second switch in the transaction does not make deadlocks' => sub {
	$node->safe_psql('postgres', "SELECT migrate.set(name, 'lock_timeout', '3 s') FROM migrate.migration");
	my $app = background($node);
	my $app_pid = $app->query_safe('SELECT pg_backend_pid()');
	$app->query_safe($_) for 'BEGIN', 'SELECT count(*) FROM purchase WHERE id = 1';
	my $switch = $node->background_psql('postgres', on_error_stop => 0, extra_params => ['--set=VERBOSITY=verbose']);
	$switch->query("SET application_name = 'switch'; BEGIN; SELECT migrate.cutover('users_to_profiles');");
	$switch->query_until(qr/calling/, "\\echo calling\nSELECT migrate.cutover('orders');\nCOMMIT;\n\\echo given up\n");
	# (It waits for a lock only if it should not; else it sleeps between attempts.)
	wait_for($node, 'the second tries for its locks',
		"SELECT count(*) = 1 FROM pg_stat_activity WHERE application_name = 'switch' AND (wait_event = 'PgSleep' OR wait_event_type = 'Lock' OR state <> 'active')");
	is($app->query_safe('SELECT count(*) FROM profile WHERE user_id = 1'), 1, 'the application reads the view');
	$app->query_safe('COMMIT');
	$switch->query_until(qr/given up/, '');
	my $error = $switch->{stderr};
	like($error, qr/55P03/, 'the second gives up');
	like($error, qr/PID $app_pid\b/, 'names who is in the way');
	like($error, qr/holds locks of an earlier step/, 'and says why so soon');
	is(serving(), 'source source source', 'the first is undone with it');
	unlike(PostgreSQL::Test::Utils::slurp_file($node->logfile), qr/deadlock detected/, 'and no deadlock was found');
	$_->quit for $app, $switch;
};

# A writer keeps the plain tables of one migration; the other has no view, so only writers would wait for us: not for long either.
subtest 'neither do locks that hold up writers alone last long' => sub {
	$node->safe_psql('postgres', <<'SQL');
SELECT migrate.set(name, 'lock_timeout', 'default') FROM migrate.migration;
CREATE TABLE plain (id int PRIMARY KEY);
CREATE TABLE plain_target (id int PRIMARY KEY);
SELECT migrate.define('plain', source => 'plain', target => 'plain_target', on_target_delete => 'delete');
SELECT migrate.start('plain');
SQL
	wait_phase($node, 'ready', 'plain');
	my $app = background($node);
	$app->query_safe($_) for 'BEGIN', "UPDATE orders SET item = 'held' WHERE id = 1";
	my $error = error_of($node, "BEGIN; SELECT migrate.cutover('plain'); SELECT migrate.cutover('orders'); COMMIT");
	like($error, qr/55P03.*holds locks of an earlier step/s, 'the second gives up soon');
	is($node->safe_psql('postgres', "SELECT migrate.serves('plain')"), 'source', 'and both are as they were');
	my $both = $node->background_psql('postgres', on_error_stop => 0);
	$both->query_until(qr/calling/, "\\echo calling\nSELECT migrate.cutover(ARRAY['plain', 'orders']);\n\\echo done\n");
	wait_for($node, 'it tries again and again', "SELECT count(*) = 1 FROM pg_stat_activity WHERE wait_event = 'PgSleep'");
	is(error_of($node, 'INSERT INTO plain VALUES (1)'), '', 'in one call, nobody waits for the other meanwhile');
	$app->query_safe('COMMIT');
	$both->query_until(qr/done/, '');
	is($node->safe_psql('postgres', "SELECT migrate.serves('plain') || ' ' || migrate.serves('orders')"), 'target target', 'and both are switched when he has gone');
	$_->quit for $app, $both;
};

# Two DBAs, in opposite order.
subtest 'two that cross' => sub {
	$node->safe_psql('postgres', "SELECT migrate.rollback('{plain,orders}'::text[])");
	my @dba = map { $node->background_psql('postgres', on_error_stop => 0) } 1, 2;
	$dba[0]->query("BEGIN; SELECT migrate.cutover('plain');");
	$dba[1]->query("BEGIN; SELECT migrate.cutover('orders');");
	$dba[1]->query_until(qr/calling/, "\\echo calling\nSELECT migrate.cutover('plain');\nCOMMIT;\n\\echo over\n");
	$dba[0]->query("SELECT migrate.cutover('orders');\nCOMMIT;");
	$dba[1]->query_until(qr/over/, '');
	like($node->safe_psql('postgres', "SELECT migrate.serves('plain') || ' ' || migrate.serves('orders')"), qr/^(source source|target target)$/, 'both or none');
	$_->quit for @dba;
};

$node->stop;
done_testing();

# Failover without the library preloaded: a replica that was promoted in the middle of the backfill goes on at the next call;
# one that was promoted inside the rollback window rolls back, and no write that was acknowledged is lost on either side.
use strict;
use warnings;
use FindBin;
use lib $FindBin::RealBin;

use MigrateTest;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

my $rows = 20_000;
my $m = 'users_to_profiles';

# A synchronous replica of the server: what is acknowledged is applied there too.
sub replica_of
{
	my ($primary, $name) = @_;
	$primary->backup($name);
	my $replica = PostgreSQL::Test::Cluster->new($name);
	$replica->init_from_backup($primary, $name, has_streaming => 1);
	$replica->start;
	$primary->safe_psql('postgres', "ALTER SYSTEM SET synchronous_standby_names = '$name'; ");
	$primary->safe_psql('postgres', 'ALTER SYSTEM SET synchronous_commit = remote_apply');
	$primary->safe_psql('postgres', 'SELECT pg_reload_conf()');
	wait_for($primary, "$name is synchronous", "SELECT count(*) = 1 FROM pg_stat_replication WHERE sync_state = 'sync'");
	return $replica;
}

# The primary is lost (and fenced: it is never started again) while a session writes row after row by this statement, in which
# ID is a number; gives the ids that were acknowledged.
sub lose
{
	my ($primary, $replica, $sql) = @_;
	my $script = PostgreSQL::Test::Utils::tempdir() . '/writes.sql';
	append_to_file($script, join '', map { $sql =~ s/ID/$_/gr . " RETURNING 'done ' || $_;\n" } 1 .. $rows);
	my ($out, $error) = ('', '');
	my $writer = IPC::Run::start([ 'psql', '-XAtq', '-d', $primary->connstr('postgres'), '-f', $script ], '<', \undef, '>', \$out, '2>', \$error);
	poll('writes are acknowledged', sub { $writer->pump_nb; my $n = () = $out =~ /^done/mg; $n > 100 });
	$primary->stop('immediate');
	eval { $writer->finish };
	my @acknowledged = $out =~ /^done (\d+)$/mg;
	cmp_ok(scalar(@acknowledged), '<', $rows, @acknowledged . ' writes were acknowledged before the primary was lost');
	$replica->promote;
	$replica->safe_psql('postgres', "ALTER SYSTEM SET synchronous_standby_names = ''");
	$replica->safe_psql('postgres', 'SELECT pg_reload_conf()');
	return @acknowledged;
}

sub is_kept
{
	my ($node, $name, @ids) = @_;
	my $list = join ',', @ids;
	is($node->safe_psql('postgres', "SELECT count(*) FROM user_profiles p JOIN users u ON u.id = p.user_id WHERE p.user_id IN ($list) AND p.display_name = '$name' AND u.name = '$name'"),
		scalar(@ids), 'every acknowledged write is on both sides');
	is(differing($node), 0, 'no row differs');
	return;
}

my $first = new_server('first', streaming => 1);
make_users($first, $rows, references => 1);
my $second = replica_of($first, 'second');

subtest 'in the middle of the backfill' => sub {
	define_users($first, max_rows_per_second => 1000, batch_size => 100);
	$first->safe_psql('postgres', "SELECT migrate.add_view('$m', view => 'profile'); SELECT migrate.start('$m')");
	poll('some rows are copied', sub { rows_copied($first) > 500 });
	my @acknowledged = lose($first, $second, "UPDATE users SET name = 'before' WHERE id = ID");
	is(phase($second), 'backfilling', 'the backfill is in its middle');
	is($second->safe_psql('postgres', 'SELECT state FROM migrate.progress'), 'waiting', 'no clone: it only waits for a worker');
	is(error_of($second, "UPDATE users SET name = 'before' WHERE id = 1"), '', 'the application writes');
	$second->safe_psql('postgres', "SELECT migrate.set('$m', 'max_rows_per_second', 'none')");
	is(error_of($second, "CALL migrate.wait('$m', timeout => '120 s')"), '', 'wait makes it go on');
	is_kept($second, 'before', @acknowledged);
	is($second->safe_psql('postgres', "SELECT verdict FROM migrate.validate('$m')"), 'equal', 'and validate says so');
};

subtest 'inside the rollback window' => sub {
	my $third = replica_of($second, 'third');
	is(error_of($second, "SELECT migrate.cutover('$m')"), '', 'cutover');
	my @acknowledged = lose($second, $third, "UPDATE profile SET display_name = 'after' WHERE user_id = ID");
	is($third->safe_psql('postgres', "SELECT phase, serves FROM migrate.migration"), 'cut_over|target', 'the target serves');
	is_kept($third, 'after', @acknowledged);
	is(error_of($third, "INSERT INTO profile (user_id, display_name) VALUES (1000000, 'new there')"), '', 'the application writes the target');
	is(error_of($third, "SELECT migrate.rollback('$m')"), '', 'rollback on the promoted server');
	is_kept($third, 'after', @acknowledged);
	is($third->safe_psql('postgres', "INSERT INTO users (name) VALUES ('after') RETURNING id > 1000000"), 't', 'the next key is new');
	is(error_of($third, "UPDATE users SET name = 'again' WHERE id % 7 = 0; DELETE FROM users WHERE id % 100 = 3"), '', 'the application writes the source');
	is(differing($third), 0, 'no row differs');
	is(error_of($third, "SELECT migrate.cutover('$m')"), '', 'cutover there');
	is(differing($third), 0, 'no row differs');
	$third->stop;
};

done_testing();

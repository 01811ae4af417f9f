# A killed worker, a crashed server: the backfill goes on from its checkpoint, by itself with the library preloaded, else at the
# next call. Nothing is copied twice, nothing is left out.
use strict;
use warnings;
use FindBin;
use lib $FindBin::RealBin;

use MigrateTest;
use Test::More;

my $rows = 100_000;
my $writes = writing_users("random(1, $rows)");

# Brings a throttled backfill into its middle. So slow that it is not over, whatever time three crashes and the looks between them take.
sub reach_middle
{
	my ($node) = @_;
	make_users($node, $rows, references => 1);
	define_users($node, max_rows_per_second => 3000, batch_size => 500);
	$node->safe_psql('postgres', "SELECT migrate.start('users_to_profiles')");
	poll('some rows are copied', sub { rows_copied($node) > 2000 });
	return;
}

# The ledger and the target agree: every key up to a checkpoint is there.
sub check_no_gap
{
	my ($node, $when) = @_;
	is( $node->safe_psql('postgres', <<'SQL'), 0, "no key at or before a checkpoint is missing $when");
SELECT count(*) FROM migrate._range r JOIN users u ON (r.low IS NULL OR u.id > (r.low)[1]::bigint) AND (r.done OR u.id <= (r.checkpoint)[1]::bigint)
    AND (r.high IS NULL OR u.id <= (r.high)[1]::bigint)
WHERE NOT EXISTS (SELECT FROM user_profiles p WHERE p.user_id = u.id)
  AND NOT EXISTS (SELECT FROM migrate._requeue q WHERE (q.key)[1]::bigint = u.id)
SQL
	return;
}

sub finish
{
	my ($node) = @_;
	$node->safe_psql('postgres', "SELECT migrate.set('users_to_profiles', 'max_rows_per_second', 'none')");
	wait_phase($node, 'ready');
	is(differing($node), 0, 'no row differs at the end');
	$node->safe_psql('postgres', "SELECT migrate.cutover('users_to_profiles')");
	is(differing($node), 0, 'no row differs after cutover');
	return;
}

subtest 'kill -9 of the worker, preloaded' => sub {
	my $node = new_server('killed', preload => 1);
	reach_middle($node);
	my $app = start_app($node, 'app', $writes, rate => 300);
	poll('the application works', sub { app_transactions($app) > 100 });
	my ($pid) = worker_pids($node);
	ok($pid, 'a worker is at work');
	my $before = rows_copied($node);
	kill 'KILL', $pid;
	poll('the server is back', sub { my $up = value($node, 'SELECT 1'); $up && !grep { $_ == $pid } worker_pids($node) });
	$app->{run}->kill_kill;
	$app->{ended} = 1;
	my $after = poll('the rows copied are known', sub { rows_copied($node) });
	cmp_ok($after, '>=', $before, 'no checkpoint is lost');
	check_no_gap($node, 'after the crash');
	$app = start_app($node, 'app_again', $writes, rate => 300);
	finish($node);
	my (undef, $failed) = stop_app($app);
	is($failed, 0, 'failed transactions after the crash');
	is(differing($node), 0, 'no row differs');
	$node->stop;
};

for my $preload (1, 0)
{
	subtest 'stop -m immediate in the middle, ' . ($preload ? 'preloaded' : 'not preloaded') => sub {
		my $node = new_server($preload ? 'crashed_preloaded' : 'crashed', preload => $preload);
		reach_middle($node);
		my $before = 0;
		for my $round (1 .. 3)
		{
			my $at_least = $before + 1500;
			poll("rows go on in round $round", sub { rows_copied($node) > $at_least });
			$before = rows_copied($node);
			$node->stop('immediate');
			$node->start;
			cmp_ok(rows_copied($node), '>=', $before, 'no checkpoint is lost');
			check_no_gap($node, "after crash $round");
			next if $preload;
			# At the next call: wait starts a worker.
			like(error_of($node, "CALL migrate.wait('users_to_profiles', timeout => '100 ms')"), qr/ERROR/, 'wait gives up at its timeout');
		}
		finish($node);
		$node->stop;
	};
}

subtest 'a clean restart' => sub {
	my $node = new_server('restarted', preload => 1);
	reach_middle($node);
	$node->restart;
	finish($node);
	$node->stop;
};

done_testing();

# A streaming replica: the backfill waits while it lags, says why, and goes on; a promoted replica carries the migration on.
use strict;
use warnings;
use FindBin;
use lib $FindBin::RealBin;

use MigrateTest;
use PostgreSQL::Test::Cluster;
use Test::More;

my $primary = new_server('primary', streaming => 1, preload => 1);
make_users($primary, 150_000, references => 1);
$primary->backup('base');
my $replica = PostgreSQL::Test::Cluster->new('replica');
$replica->init_from_backup($primary, 'base', has_streaming => 1);
$replica->start;
wait_for($primary, 'the replica streams', "SELECT count(*) = 1 FROM pg_stat_replication WHERE state = 'streaming'");

define_users($primary, max_rows_per_second => 15000, batch_size => 500, max_replica_lag => '500 ms');
$primary->safe_psql('postgres', "SELECT migrate.start('users_to_profiles')");
poll('some rows are copied', sub { rows_copied($primary) > 3000 });

$replica->safe_psql('postgres', 'SELECT pg_wal_replay_pause()');
my $reason = '';
poll('throttled', sub { $reason = value($primary, 'SELECT throttled_reason FROM migrate._migration') // ''; $reason =~ /replica lag/ });
like($reason, qr/replica lag \d+ ms > 500 ms/, 'the reason has the value and the limit');
like(value($primary, 'SELECT progress::text FROM migrate.progress'), qr/replica lag \d+ ms > 500 ms/, 'and is in migrate.progress');
my $held = rows_copied($primary);
poll('time passes', sub { value($primary, 'SELECT clock_timestamp() - throttled_since > interval \'2 s\' FROM migrate._migration') eq 't' });
cmp_ok(rows_copied($primary) - $held, '<=', 2000, 'the backfill waits');

$replica->safe_psql('postgres', 'SELECT pg_wal_replay_resume()');
poll('rows go on', sub { rows_copied($primary) > $held + 5000 });
pass('the backfill goes on when the replica has caught up');

# Promotion in the middle of the backfill.
$primary->stop('immediate');
my $before = rows_copied($replica);
cmp_ok($before, '<', 150_000, 'the backfill is in its middle');
is(scalar(worker_pids($replica)), 0, 'no worker runs on a replica');
$replica->promote;
$replica->safe_psql('postgres', "SELECT migrate.set('users_to_profiles', 'max_rows_per_second', 'none')");
wait_phase($replica, 'ready');
cmp_ok(rows_copied($replica), '>=', $before, 'no checkpoint is lost');
is(differing($replica), 0, 'no row differs on the promoted server');
$replica->safe_psql('postgres', "SELECT migrate.cutover('users_to_profiles')");
is(differing($replica), 0, 'no row differs after cutover there');
$replica->stop;

done_testing();

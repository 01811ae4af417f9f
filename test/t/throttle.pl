# Every signal that makes the backfill wait is shown with its value and limit, and the backfill goes on when it clears.
use strict;
use warnings;
use FindBin;
use lib $FindBin::RealBin;

use MigrateTest;
use Test::More;

my $node = new_server('throttle');
make_users($node, 150_000);
# Slow enough to last for all of the test.
define_users($node, max_rows_per_second => 3000, batch_size => 100);
$node->safe_psql('postgres', <<'SQL');
CREATE SCHEMA ops;
CREATE TABLE ops.queue (n int);
INSERT INTO ops.queue VALUES (0);
SELECT migrate.start('users_to_profiles');
SQL
poll('some rows are copied', sub { rows_copied($node) > 500 });

sub set { return $node->safe_psql('postgres', "SELECT migrate.set('users_to_profiles', '$_[0]', \$\$$_[1]\$\$)") }

# The signal is set: progress says why, with value and limit. It clears: rows go on.
sub signal
{
	my ($what, $on, $reason, $off) = @_;
	$on->();
	my $shown = '';
	poll("$what throttles", sub {
			$shown = value($node, 'SELECT progress::text FROM migrate.progress') // '';
			return $shown =~ $reason;
		});
	like($shown, $reason, "$what: value and limit are shown");
	my $held = rows_copied($node);
	$off->();
	poll("$what clears", sub { (value($node, 'SELECT throttled_reason IS NULL FROM migrate._migration') // '') eq 't' && rows_copied($node) > $held + 300 });
	cmp_ok(rows_copied($node), '>', $held, "$what: rows go on");
	return;
}

my ($busy, $busy2);
signal('max_active_backends',
	sub {
		$busy = background($node);
		$busy->query_until(qr/begun/, "\\echo begun\nSELECT pg_sleep(600);\n");
		set('max_active_backends', '1');
		$busy2 = background($node);
		$busy2->query_until(qr/begun/, "\\echo begun\nSELECT pg_sleep(600);\n");
	},
	qr/active backends? \d+ > 1|\d+ active backends? > 1/,
	sub { set('max_active_backends', 'none') });
$node->safe_psql('postgres', "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE '%pg_sleep(600)%' AND pid <> pg_backend_pid()");

my $wal = start_app($node, 'wal', "UPDATE ops.queue SET n = n; SELECT pg_logical_emit_message(true, 'test', repeat('x', 100000));", clients => 1, rate => 50);
signal('max_wal_rate', sub { set('max_wal_rate', '100kB') }, qr/WAL.*\d.*> *100 kB/, sub { set('max_wal_rate', 'none') });
is((stop_app($wal))[1], 0, 'the writer of WAL did not fail');

set('throttle_query', 'SELECT n > 100 FROM ops.queue');
signal('throttle_query', sub { $node->safe_psql('postgres', 'UPDATE ops.queue SET n = 101') }, qr/throttle_query/,
	sub { $node->safe_psql('postgres', 'UPDATE ops.queue SET n = 0') });
signal('throttle_query that cannot be read',
	sub { $node->safe_psql('postgres', 'ALTER TABLE ops.queue RENAME TO queue_gone') },
	qr/throttle_query.*(does not exist|42P01)/s,
	sub { $node->safe_psql('postgres', 'ALTER TABLE ops.queue_gone RENAME TO queue') });
signal('throttle_query that gives NULL',
	sub { $node->safe_psql('postgres', 'UPDATE ops.queue SET n = NULL') },
	qr/throttle_query.*(NULL|null)/s,
	sub { $node->safe_psql('postgres', 'UPDATE ops.queue SET n = 0') });
set('throttle_query', 'none');

# A window that is closed now, whatever the time.
my $closed = $node->safe_psql('postgres', q{SELECT to_char(now() AT TIME ZONE 'UTC' + interval '3 h', 'HH24:MI') || '-' || to_char(now() AT TIME ZONE 'UTC' + interval '4 h', 'HH24:MI') || ' UTC'});
my ($hours) = split / /, $closed;
signal('window', sub { set('window', $closed) }, qr/window \Q$hours\E, it is \d\d:\d\d \(UTC\)/, sub { set('window', 'always') });

# Throttles of a fixed rate hold it; those with an expiry end by themselves.
my ($rows, $at) = split /\|/, $node->safe_psql('postgres', 'SELECT sum(rows_done), extract(epoch FROM clock_timestamp()) FROM migrate._range');
poll('time passes', sub { (value($node, "SELECT extract(epoch FROM clock_timestamp()) - $at > 3") // '') eq 't' });
my ($rows2, $at2) = split /\|/, $node->safe_psql('postgres', 'SELECT sum(rows_done), extract(epoch FROM clock_timestamp()) FROM migrate._range');
my $batch = $node->safe_psql('postgres', 'SELECT batch_rows FROM migrate._migration');    # one may end just now
cmp_ok($rows2 - $rows, '<=', 3000 * ($at2 - $at) * 1.1 + 2 * $batch, 'max_rows_per_second is kept');
like($node->safe_psql('postgres', "SELECT migrate.throttle('users_to_profiles', rows_per_second => 50, for_time => '2 s')"), qr/./, 'throttle');
poll('the throttle has its expiry', sub { (value($node, 'SELECT count(*) FROM migrate._option WHERE expires_at > clock_timestamp()') // 1) == 0 });
my $held = rows_copied($node);
poll('rows go on after the expiry', sub { rows_copied($node) > $held + 1000 });
pass('a throttle ends by itself');

# Paused by hand: no row is copied, the reason is shown.
$node->safe_psql('postgres', "SELECT migrate.pause('users_to_profiles')");
wait_for($node, 'no worker is left', "SELECT count(*) = 0 FROM pg_stat_activity WHERE backend_type = 'migrate_ext worker'");
$held = rows_copied($node);
is(error_of($node, "INSERT INTO users (name) VALUES ('while paused')"), '', 'dual writes go on while paused');
is(rows_copied($node), $held, 'paused');
$node->safe_psql('postgres', "SELECT migrate.resume('users_to_profiles')");
set('max_rows_per_second', 'none');
set('batch_size', '5000');
wait_phase($node, 'ready');
is(differing($node), 0, 'no row differs at the end');

$node->stop;
done_testing();

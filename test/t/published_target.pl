# A target that is replicated onwards while it is filled: a subscriber gets every row once. A copy that is made in bulk and taken back
# would be decoded as a row that the subscriber may have already; so beside a logical slot rows are copied under locks.
use strict;
use warnings;
use FindBin;
use lib $FindBin::RealBin;

use MigrateTest;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = new_server('published', streaming => 'logical');
my $subscriber = new_server('subscriber');
make_users($node, 5000);
define_users($node, batch_size => 50, max_rows_per_second => 2000);
my $why = 'SELECT migrate._no_bulk_copy(id) FROM migrate._flow';
is(value($node, $why), '', 'without a slot rows are copied in bulk');

$subscriber->safe_psql('postgres', 'CREATE TABLE user_profiles (user_id bigint PRIMARY KEY, display_name text, bio text, created_at timestamptz)');
$node->safe_psql('postgres', 'CREATE PUBLICATION onwards FOR TABLE user_profiles');
my $connection = $node->connstr('postgres');
$subscriber->safe_psql('postgres', "CREATE SUBSCRIPTION onwards CONNECTION \$c\$$connection\$c\$ PUBLICATION onwards");
wait_for($subscriber, 'the subscription', "SELECT count(*) = 1 FROM pg_subscription_rel WHERE srsubstate = 'r'");
is(value($node, $why), 'there are logical replication slots in this database', 'beside a slot they are not');
like($node->safe_psql('postgres', "SELECT migrate.plan('users_to_profiles')"), qr/by SQL, under row locks: there are logical replication slots/, 'plan says so');

# Writers on few rows, so that batches meet them.
my $app = start_app($node, 'app', writing_users('random_zipfian(1, 5000, 1.1)'), clients => 4);
$node->safe_psql('postgres', "SELECT migrate.start('users_to_profiles')");
wait_phase($node, 'ready');
my ($transactions, $failed) = stop_app($app);
cmp_ok($transactions, '>', 100, "$transactions transactions");
is($failed, 0, 'none of them failed');
is(differing($node), 0, 'no row differs');
$node->wait_for_catchup('onwards');
my $rows = 'SELECT count(*), md5(string_agg(u::text, chr(10) ORDER BY user_id)) FROM (SELECT user_id, display_name, bio, extract(epoch FROM created_at) FROM user_profiles) u';
is($subscriber->safe_psql('postgres', $rows), $node->safe_psql('postgres', $rows), 'the subscriber has the same rows');
is(scalar(() = slurp_file($subscriber->logfile) =~ /duplicate key/g), 0, 'and met none that it had already');
$subscriber->safe_psql('postgres', 'DROP SUBSCRIPTION onwards');

done_testing();

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

# All tables, those of the extension among them: none of them lacks what an update or a delete of it takes. A subscriber that has followed
# from before, and has the extension too, goes on; preflight says what it needs.
$_->safe_psql('postgres', 'CREATE DATABASE whole') for $node, $subscriber;
$node->safe_psql('whole', 'CREATE PUBLICATION everything FOR ALL TABLES');
make_users($_, 0, db => 'whole') for $node, $subscriber;
$subscriber->safe_psql('whole', 'CREATE SUBSCRIPTION everything CONNECTION $c$' . $node->connstr('whole') . '$c$ PUBLICATION everything');
wait_for($subscriber, 'the subscription', "SELECT count(*) = 2 FROM pg_subscription_rel WHERE srsubstate = 'r'", 't', 'whole');
$_->safe_psql('whole', 'CREATE EXTENSION migrate_ext') for $subscriber, $node;
$node->safe_psql('whole', "INSERT INTO users (name) SELECT 'user ' || g FROM generate_series(1, 100) g");
define_users($node, db => 'whole');
like($node->safe_psql('whole', q{SELECT severity, message FROM migrate.preflight('users_to_profiles') WHERE "check" = 'publication'}), qr/^warning\|publication everything is of all tables, those of schema migrate as well/, 'preflight says that the extension\'s tables are published, too');
my $locker = background($node, db => 'whole');
$locker->query_safe('BEGIN; SELECT FROM users WHERE id = 5 FOR UPDATE');
$node->safe_psql('whole', "SELECT migrate.start('users_to_profiles')");
wait_for($node, 'a locked key is queued', 'SELECT count(*) > 0 FROM migrate._requeue', 't', 'whole');
$locker->query_safe('COMMIT');
$locker->quit;
wait_phase($node, 'ready', undef, 'whole');
$node->safe_psql('whole', "UPDATE user_profiles SET bio = 'damage' WHERE user_id = 1; SELECT * FROM migrate.validate('users_to_profiles'); SELECT * FROM migrate.repair('users_to_profiles', true); SELECT * FROM migrate.validate('users_to_profiles')");
$node->safe_psql('whole', 'SELECT migrate.' . $_) for q{shadow('users_to_profiles', 1)}, q{shadow('users_to_profiles', 0)}, q{cutover('users_to_profiles')}, q{rollback('users_to_profiles')}, q{cutover('users_to_profiles')}, q{finalize('users_to_profiles', force => 'users_to_profiles')}, q{drop('users_to_profiles')};
$node->wait_for_catchup('everything');
is($subscriber->safe_psql('whole', 'SELECT count(*) FROM user_profiles'), 100, 'the subscriber of all tables has the rows');
is(value($node, <<'SQL', 'whole'), '', 'every table of the extension has a replica identity');
SELECT string_agg(c.relname, ' ' ORDER BY c.relname) FROM pg_class c
WHERE c.relnamespace = 'migrate'::regnamespace AND c.relkind = 'r' AND c.relpersistence = 'p' AND c.relreplident <> 'f' AND NOT EXISTS (SELECT FROM pg_index i WHERE i.indrelid = c.oid AND i.indisprimary)
SQL
$subscriber->safe_psql('whole', 'DROP SUBSCRIPTION everything');

done_testing();

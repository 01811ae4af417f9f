# A switch never stands in the application's way: it backs off from who holds a lock, names them by PID, and waits out old
# snapshots with the old state intact.
use strict;
use warnings;
use FindBin;
use lib $FindBin::RealBin;

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
$error = error_of($node, "SELECT migrate.set('users_to_profiles', 'cutover_timeout', '1 s'); SELECT migrate.cutover('users_to_profiles', dry_run => true)");
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
$node->stop;
done_testing();

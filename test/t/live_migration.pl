# The whole job under load: 200,000 rows, 4 clients of inserts, updates and deletes all the way from define to finalize, and 2
# that write to the target from the first cutover on. No transaction fails, no row differs, nothing written is lost.
use strict;
use warnings;
use FindBin;
use lib $FindBin::RealBin;

use MigrateTest;
use Test::More;
use Time::HiRes qw(time);

my $rows = 200_000;
my $node = new_server('live');
make_users($node, $rows, references => 1);

my $begun = time();
my $old = start_app($node, 'old', writing_users("2 * random(1, $rows / 2)"), clients => 4);

# Waits until the application has done some more work.
sub let_work
{
	my ($app, $transactions) = @_;
	my $goal = app_transactions($app) + $transactions;
	poll("$app->{name} works", sub { app_transactions($app) >= $goal });
	return;
}

let_work($old, 500);
define_users($node);
let_work($old, 500);
$node->safe_psql('postgres', "SELECT migrate.start('users_to_profiles')");
is(error_of($node, "CALL migrate.wait('users_to_profiles', timeout => '170 s')"), '', 'wait comes back');
is(phase($node), 'ready', 'ready');
is(differing($node), 0, 'no row differs when ready');
let_work($old, 500);

is($node->safe_psql('postgres', "SELECT verdict FROM migrate.validate('users_to_profiles')"), 'equal', 'validation under load finds both sides equal');

for my $round (1, 2)
{
	my $answer = $node->safe_psql('postgres', "SELECT migrate.cutover('users_to_profiles')");
	like($answer, qr/ready -> cut_over/, "cutover $round says what it did");
	is($node->safe_psql('postgres', "SELECT migrate.serves('users_to_profiles')"), 'target', "the target serves after cutover $round");
	is(differing($node), 0, "no row differs after cutover $round");

	# Another application writes to the target, to keys of its own.
	my $new = start_app($node, "new$round", <<"SQL", clients => 2);
\\set id 2 * random(1, $rows / 2 - 10) - 1
\\set kind random(1, 10)
\\if :kind <= 6
UPDATE user_profiles SET display_name = 'display name ' || :kind, bio = md5(random()::text) WHERE user_id = :id;
\\elif :kind <= 8
INSERT INTO user_profiles (user_id, display_name) VALUES (nextval('users_id_seq'), 'new profile');
\\else
DELETE FROM user_profiles WHERE user_id = :id;
\\endif
SQL
	let_work($new, 500);
	$node->safe_psql('postgres', "UPDATE user_profiles SET display_name = 'after cutover $round' WHERE user_id = $rows - 1");
	is(differing($node), 0, 'no row differs while both sides are written');

	if ($round == 1)
	{
		like($node->safe_psql('postgres', "SELECT migrate.rollback('users_to_profiles')"), qr/cut_over -> ready/, 'rollback says what it did');
		is($node->safe_psql('postgres', "SELECT migrate.serves('users_to_profiles')"), 'source', 'the source serves after rollback');
		is($node->safe_psql('postgres', "SELECT name FROM users WHERE id = $rows - 1"), 'after cutover 1',
			'a write made to the target after cutover is in the source after rollback');
		let_work($old, 500);
		is(differing($node), 0, 'no row differs after rollback');
	}
	my ($done, $failed, $longest) = stop_app($new);
	cmp_ok($done, '>', 0, "transactions on the target in round $round");
	is($failed, 0, "failed transactions on the target in round $round");
}

poll('20 seconds of load', sub { app_transactions($old); time() - $begun > 20 });
my ($done, $failed, $longest) = stop_app($old);
cmp_ok($done, '>', 1000, 'transactions on the source');
is($failed, 0, 'failed transactions on the source');
is(differing($node), 0, 'no row differs at the end of the load');
is($node->safe_psql('postgres', 'SELECT count(*) FROM migrate._failure'), 0, 'no dual write failed');

# Contract.
like(error_of($node, "SELECT migrate.finalize('users_to_profiles')"), qr/55000/, 'finalize is refused while the rollback window is open');
$node->safe_psql('postgres', "SELECT migrate.finalize('users_to_profiles', force => 'users_to_profiles')");
is(phase($node), 'finalized', 'finalized');
is($node->safe_psql('postgres', "SELECT migrate.serves('users_to_profiles')"), 'target', 'the target serves when finalized');
is( $node->safe_psql('postgres', "SELECT count(*) FROM pg_trigger WHERE NOT tgisinternal AND tgrelid IN ('users'::regclass, 'user_profiles'::regclass)"),
	0, 'no trigger is left');
$node->safe_psql('postgres', "UPDATE user_profiles SET display_name = 'alone' WHERE user_id = $rows - 1");
is($node->safe_psql('postgres', "SELECT name FROM users WHERE id = $rows - 1"), 'after cutover 2', 'the target is on its own');
$node->safe_psql('postgres', "SELECT migrate.drop('users_to_profiles')");
is($node->safe_psql('postgres', 'SELECT count(*) FROM migrate._migration'), 0, 'dropped');
is(scalar(worker_pids($node)), 0, 'no worker is left') or note(value($node, 'SELECT * FROM pg_stat_activity'));

$node->stop;
done_testing();

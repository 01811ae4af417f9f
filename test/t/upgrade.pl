# pg_upgrade with migrations under way (to the same version, which takes the same path): it is not refused, no worker runs
# meanwhile, the upgraded cluster comes up paused, and resume brings it to ready.
use strict;
use warnings;
use FindBin;
use lib $FindBin::RealBin;

use MigrateTest;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

my $m = 'users_to_profiles';
my $rows = 6000;
my $old = new_server('old', preload => 1);
my %databases = (filling => 'backfilling', switched => 'cut_over', $ENV{MIGRATE_LONG} ? (done => 'ready') : ());
for my $db (reverse sort keys %databases)    # filling is the last, for it must not be done before the upgrade
{
	$old->safe_psql('postgres', "CREATE DATABASE $db");
	$old->safe_psql($db, 'CREATE EXTENSION migrate_ext');
	make_users($old, $rows, db => $db, references => 1);
	# Other OIDs than those a new cluster would hand out by itself.
	$old->safe_psql($db, 'CREATE TABLE gone (id int); DROP TABLE gone');
	define_users($old, db => $db, max_rows_per_second => $db eq 'filling' ? '100' : 'none', batch_size => 50);
	$old->safe_psql($db, "SELECT migrate.add_view('$m', view => 'profile'); SELECT migrate.start('$m')");
	next if $db eq 'filling';
	is(error_of($old, "CALL migrate.wait('$m', timeout => '120 s')", db => $db), '', 'ready');
	$old->safe_psql($db, "SELECT migrate.cutover('$m')") if $db eq 'switched';
}
wait_for($old, 'some rows are copied', 'SELECT sum(rows_done) > 100 FROM migrate._range', 't', 'filling');

my $new = PostgreSQL::Test::Cluster->new('new');
$new->init(extra => [ '-E', 'UTF8', '--locale=C' ]);
$new->append_conf('postgresql.conf', "shared_preload_libraries = 'migrate_ext'\nmax_worker_processes = 16\nmax_prepared_transactions = 10\n");
my $version = $old->safe_psql('postgres', 'SHOW server_version_num');
$old->stop;
chomp(my $bin = `pg_config --bindir`);
chdir PostgreSQL::Test::Utils::tempdir_short() or die $!;    # where it puts its sockets
$old->command_ok([ "$bin/pg_upgrade", ($version >= 150000 ? '--no-sync' : ()), '-d', $old->data_dir, '-D', $new->data_dir, '-b', $bin, '-B', $bin, '-p', $old->port, '-P', $new->port ], 'pg_upgrade');
chdir '/';
my @logs = glob($new->data_dir . '/pg_upgrade_output.d/*/log/*');
unlike(join('', map { slurp_file($_) } @logs), qr/migrate_ext worker|PANIC/, 'no worker ran meanwhile');

$new->start;
for my $db (sort keys %databases)
{
	is($new->safe_psql($db, 'SELECT phase, state FROM migrate.progress'), "$databases{$db}|paused", "$db comes up paused");
	like($new->safe_psql($db, 'SELECT throttled_by FROM migrate.progress'), qr/^this is a clone: .*SELECT migrate\.resume\('$m'\)/, 'and says why');
	my $side = $db eq 'switched' ? 'UPDATE profile SET display_name = $$x$$ WHERE user_id < 9; DELETE FROM profile WHERE user_id = 9' : 'UPDATE users SET name = $$x$$ WHERE id < 9; DELETE FROM users WHERE id = 9';
	is(error_of($new, $side, db => $db), '', 'the application writes');
	$new->safe_psql($db, "SELECT migrate.set('$m', 'max_rows_per_second', 'none')");
	like(error_of($new, "SELECT migrate.resume('$m')", db => $db), $db eq 'switched' ? qr/^$|WARNING/ : qr/^$/, 'resume');
	is(error_of($new, "CALL migrate.wait('$m', timeout => '120 s')", db => $db), '', "$db gets ready, or is");
	is(differing($new, $db), 0, 'no row differs');
	is($new->safe_psql($db, "SELECT verdict FROM migrate.validate('$m')"), 'equal', 'and validate says so');
	is(error_of($new, $db eq 'switched' ? "SELECT migrate.rollback('$m')" : "SELECT migrate.cutover('$m')", db => $db), '', 'the switch');
	is(error_of($new, "UPDATE users SET name = 'y' WHERE id < 8; UPDATE user_profiles SET display_name = 'z' WHERE user_id = 4", db => $db), '', 'the application writes') if $db ne 'switched';
	is(differing($new, $db), 0, 'no row differs');
}
$new->stop;
done_testing();

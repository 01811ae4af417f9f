# What a DBA does meanwhile: dropping databases and the extension, running out of worker slots, statement timeouts, roles with
# few rights, renames and drops. Each does what one would expect.
use strict;
use warnings;
use FindBin;
use lib $FindBin::RealBin;

use MigrateTest;
use Test::More;

my $node = new_server('operations', conf => "max_worker_processes = 6\nmax_parallel_workers = 0\n");

# A database of its own, with a migration in the phase that is asked for: planned, backfilling (throttled), ready, cut_over.
sub database
{
	my ($db, $phase) = @_;
	$node->safe_psql('postgres', "CREATE DATABASE $db");
	$node->safe_psql($db, 'CREATE EXTENSION migrate_ext');
	make_users($node, 20_000, db => $db, references => 1);
	define_users($node, db => $db);
	return if $phase eq 'planned';
	$node->safe_psql($db, "SELECT migrate.set('users_to_profiles', 'max_rows_per_second', '2000')") if $phase eq 'backfilling';
	$node->safe_psql($db, "SELECT migrate.start('users_to_profiles')");
	wait_for($node, 'a worker is at work', 'SELECT sum(rows_done) > 0 FROM migrate._range', 't', $db) if $phase eq 'backfilling';
	return if $phase eq 'backfilling';
	is(error_of($node, "CALL migrate.wait('users_to_profiles', timeout => '120 s')", db => $db), '', "$db is ready");
	$node->safe_psql($db, "SELECT migrate.cutover('users_to_profiles')") if $phase eq 'cut_over';
	return;
}

subtest 'DROP DATABASE' => sub {
	for my $phase (qw(planned backfilling ready cut_over))
	{
		database("gone_$phase", $phase);
		# A worker that is connected ends when asked to: DROP DATABASE signals nobody, so WITH (FORCE) or a pause is the way.
		$node->safe_psql("gone_$phase", "SELECT migrate.pause('users_to_profiles')") if $phase eq 'backfilling';
		wait_for($node, 'no worker is connected', "SELECT count(*) = 0 FROM pg_stat_activity WHERE datname = 'gone_$phase'");
		is(error_of($node, "DROP DATABASE gone_$phase"), '', "DROP DATABASE in phase $phase");
	}
	database('forced', 'backfilling');
	is(error_of($node, 'DROP DATABASE forced WITH (FORCE)'), '', 'DROP DATABASE WITH (FORCE) beside a worker at work');
	wait_for($node, 'workers are gone', "SELECT count(*) = 0 FROM pg_stat_activity WHERE backend_type = 'migrate_ext worker'");
};

subtest 'DROP EXTENSION' => sub {
	for my $phase (qw(planned backfilling ready cut_over))
	{
		my $db = "without_$phase";
		database($db, $phase);
		my $error = error_of($node, 'DROP EXTENSION migrate_ext', db => $db);
		$error = error_of($node, 'DROP EXTENSION migrate_ext CASCADE', db => $db) if $error;
		is($error, '', "DROP EXTENSION [CASCADE] in phase $phase");
		is(error_of($node, <<'SQL', db => $db), '', 'the application goes on writing');
INSERT INTO users (name) VALUES ('later'); UPDATE users SET name = 'changed' WHERE id = 1;
DELETE FROM user_profiles WHERE user_id = 2; DELETE FROM users WHERE id = 2;
SQL
		is($node->safe_psql($db, "SELECT count(*) FROM pg_trigger WHERE NOT tgisinternal AND tgrelid IN ('users'::regclass, 'user_profiles'::regclass)"),
			0, 'no trigger is left');
		is($node->safe_psql($db, "SELECT count(*) FROM pg_class WHERE relnamespace IN (SELECT oid FROM pg_namespace WHERE nspname = 'migrate')"), 0,
			'nothing is left in schema migrate');
		wait_for($node, 'workers end', "SELECT count(*) = 0 FROM pg_stat_activity WHERE backend_type = 'migrate_ext worker' AND datname = '$db'");
		is(error_of($node, 'CREATE EXTENSION migrate_ext', db => $db), '', 'it can be created again');
		$node->safe_psql('postgres', "DROP DATABASE $db WITH (FORCE)");
	}
};

subtest 'worker slots exhausted' => sub {
	database('slots', 'planned');
	# Other migrations hold every slot there is.
	my @others = map { "slot_$_" } 1 .. 6;
	database($_, 'planned') for @others;
	for my $db (@others)
	{
		$node->safe_psql($db, "SELECT migrate.set('users_to_profiles', 'max_rows_per_second', '200')");
		$node->psql($db, "SELECT migrate.start('users_to_profiles')");
	}
	wait_for($node, 'slots are taken', "SELECT count(*) >= 4 FROM pg_stat_activity WHERE backend_type = 'migrate_ext worker'");
	my ($status, $out, $error) = $node->psql('slots', "SELECT migrate.start('users_to_profiles')", timeout => 60);
	note("start said: $out $error");
	like($error, qr/max_worker_processes is 6/, 'start says what is missing, with its value');
	is(phase($node, undef, 'slots'), 'planned', 'and has changed nothing');
	is($node->safe_psql('slots', "SELECT count(*) FROM pg_trigger WHERE NOT tgisinternal AND tgrelid = 'users'::regclass"), 0, 'no trigger was made');
	is(error_of($node, "INSERT INTO users (name) VALUES ('meanwhile')", db => 'slots'), '', 'the application writes');
	$node->safe_psql('postgres', "DROP DATABASE $_ WITH (FORCE)") for @others;
	poll('start when there is a slot', sub { error_of($node, "SELECT migrate.start('users_to_profiles')", db => 'slots') eq '' });
	is(error_of($node, "CALL migrate.wait('users_to_profiles', timeout => '120 s')", db => 'slots'), '', 'wait comes back');
	is(phase($node, undef, 'slots'), 'ready', 'ready');
	is(differing($node, 'slots'), 0, 'no row differs');
	$node->safe_psql('postgres', 'DROP DATABASE slots WITH (FORCE)');
};

subtest 'statement_timeout' => sub {
	database('timeouts', 'planned');
	# For everybody in the database, as DBAs set it: workers are not the application.
	$node->safe_psql('postgres', "ALTER DATABASE timeouts SET statement_timeout = '300 ms'");
	$node->safe_psql('postgres', "ALTER DATABASE timeouts SET lock_timeout = '50 ms'");
	$node->safe_psql('postgres', "ALTER DATABASE timeouts SET idle_in_transaction_session_timeout = '200 ms'");
	$node->safe_psql('timeouts', "SELECT migrate.set('users_to_profiles', 'max_rows_per_second', '20000')");
	# (A statement of the DBA's own may take as long as the machine needs.)
	$node->safe_psql('timeouts', "SET statement_timeout = '60 s'; SELECT migrate.start('users_to_profiles')");
	wait_phase($node, 'ready', undef, 'timeouts');
	is(differing($node, 'timeouts'), 0, 'no row differs');
	is(error_of($node, "SET statement_timeout = '60 s'; SELECT migrate.cutover('users_to_profiles')", db => 'timeouts'), '', 'cutover under a statement_timeout');
	$node->safe_psql('postgres', 'DROP DATABASE timeouts WITH (FORCE)');
};

subtest 'roles with few rights' => sub {
	$node->safe_psql('postgres', <<'SQL');
CREATE ROLE writer LOGIN;
CREATE ROLE stranger LOGIN;
CREATE ROLE owner LOGIN;
CREATE ROLE nobody LOGIN;
SQL
	database('rights', 'planned');
	$node->safe_psql('rights', <<'SQL');
SELECT migrate.drop('users_to_profiles');
SELECT migrate.allow('owner'), migrate.allow('stranger');
ALTER TABLE users OWNER TO owner;
ALTER TABLE user_profiles OWNER TO owner;
GRANT USAGE, CREATE ON SCHEMA public TO owner;
GRANT SELECT (id), INSERT, UPDATE, DELETE ON users TO writer;
SQL
	my $define = <<'SQL';
SELECT migrate.define('users_to_profiles', source => 'users', target => 'user_profiles',
    mapping => $$ id AS user_id, name AS display_name, coalesce(bio, '') AS bio, created_at $$,
    reverse => $$ user_id AS id, display_name AS name, bio, created_at $$, on_target_delete => 'delete');
SQL
	like(error_of($node, $define, db => 'rights', user => 'nobody'), qr/42501/, 'define by a role that is allowed nothing is refused');
	like(error_of($node, $define, db => 'rights', user => 'stranger'), qr/42501/, 'define by a role that does not own the tables is refused');
	is(error_of($node, $define, db => 'rights', user => 'owner'), '', 'define by the owner, who is no superuser');
	for my $verb ("start('users_to_profiles')", "pause('users_to_profiles')", "cutover('users_to_profiles')", "drop('users_to_profiles')",
		"set('users_to_profiles', 'sleep', '10 ms')")
	{
		like(error_of($node, "SELECT migrate.$verb", db => 'rights', user => 'stranger'), qr/42501|42704/, "$verb by a stranger is refused");
	}
	like(error_of($node, 'SELECT * FROM migrate._migration', db => 'rights', user => 'owner'), qr/42501/, 'state tables are not readable');
	is($node->safe_psql('rights', 'SELECT count(*) FROM migrate.progress', extra_params => [ '-U', 'stranger' ]), 0, 'a stranger sees no migration');
	is($node->safe_psql('rights', 'SELECT count(*) FROM migrate.progress', extra_params => [ '-U', 'owner' ]), 1, 'the owner sees it');

	is(error_of($node, "SELECT migrate.start('users_to_profiles')", db => 'rights', user => 'owner'), '', 'start by the owner');
	my $writes = <<'SQL';
INSERT INTO users (name) VALUES ('by the writer');
UPDATE users SET name = 'changed by the writer' WHERE id = 10;
DELETE FROM users WHERE id = 11;
SQL
	is(error_of($node, $writes, db => 'rights', user => 'writer'), '', 'a writer without any right on the target');
	wait_phase($node, 'ready', undef, 'rights');
	is(error_of($node, $writes, db => 'rights', user => 'writer'), '', 'and when ready');
	is(differing($node, 'rights'), 0, 'no row differs');
	is(error_of($node, "SELECT migrate.cutover('users_to_profiles')", db => 'rights', user => 'owner'), '', 'cutover by the owner');
	is(error_of($node, $writes, db => 'rights', user => 'writer'), '', 'the writer after cutover');
	is(differing($node, 'rights'), 0, 'no row differs after cutover');
	is($node->safe_psql('rights', 'SELECT count(*) FROM migrate._failure'), 0, 'no dual write failed');
	$node->safe_psql('postgres', 'DROP DATABASE rights WITH (FORCE)');
};

subtest 'renames and drops' => sub {
	database('renames', 'backfilling');
	is(error_of($node, 'ALTER TABLE users RENAME COLUMN name TO full_name', db => 'renames'), '', 'RENAME of a mapped source column');
	is(error_of($node, 'ALTER TABLE user_profiles RENAME COLUMN display_name TO shown_name', db => 'renames'), '', 'RENAME of a mapped target column');
	is(error_of($node, 'ALTER TABLE users RENAME TO people', db => 'renames'), '', 'RENAME of the source');
	is(error_of($node, 'ALTER TABLE user_profiles RENAME TO people_profiles', db => 'renames'), '', 'RENAME of the target');
	my $writes = "INSERT INTO people (full_name) VALUES ('after the renames'); UPDATE people SET full_name = 'x' WHERE id < 10; DELETE FROM people WHERE id = 12;";
	is(error_of($node, $writes, db => 'renames'), '', 'the application writes under the new names');
	like(error_of($node, 'ALTER TABLE people DROP COLUMN full_name', db => 'renames'), qr/2BP01/, 'DROP of a mapped column is refused');
	like(error_of($node, 'ALTER TABLE people ALTER COLUMN full_name TYPE varchar(100)', db => 'renames'), qr/0A000/, 'and so is ALTER TYPE');
	$node->safe_psql('renames', "SELECT migrate.set('users_to_profiles', 'max_rows_per_second', 'none')");
	wait_phase($node, 'ready', undef, 'renames');
	is(error_of($node, $writes, db => 'renames'), '', 'the application writes when ready');
	my $differing = <<'SQL';
SELECT count(*) FROM people u FULL JOIN people_profiles p ON p.user_id = u.id
WHERE (u.id, u.full_name, coalesce(u.bio, ''), u.created_at) IS DISTINCT FROM (p.user_id, p.shown_name, p.bio, p.created_at)
SQL
	is($node->safe_psql('renames', $differing), 0, 'no row differs');
	is(error_of($node, "SELECT migrate.cutover('users_to_profiles')", db => 'renames'), '', 'cutover');
	$node->safe_psql('renames', "UPDATE people_profiles SET shown_name = 'from the target' WHERE user_id = 20");
	is($node->safe_psql('renames', 'SELECT full_name FROM people WHERE id = 20'), 'from the target', 'writes are carried back under the new names');
	is($node->safe_psql('renames', $differing), 0, 'no row differs after cutover');
	$node->safe_psql('postgres', 'DROP DATABASE renames WITH (FORCE)');
};

subtest 'cancel leaves the source as it was' => sub {
	database('cancelled', 'backfilling');
	is(error_of($node, "SELECT migrate.cancel('users_to_profiles')", db => 'cancelled'), '', 'cancel in the backfill');
	is(phase($node, undef, 'cancelled'), 'cancelled', 'cancelled');
	is($node->safe_psql('cancelled', "SELECT count(*) FROM pg_trigger WHERE NOT tgisinternal AND tgrelid = 'users'::regclass"), 0, 'no trigger is left');
	is($node->safe_psql('cancelled', 'SELECT count(*) FROM users'), 20_000, 'every source row is there');
	$node->safe_psql('cancelled', "SELECT migrate.drop('users_to_profiles')");
	$node->safe_psql('cancelled', 'ALTER TABLE users DROP COLUMN bio');
	pass('the source can be altered again');
	$node->safe_psql('postgres', 'DROP DATABASE cancelled WITH (FORCE)');
};

$node->stop;
done_testing();

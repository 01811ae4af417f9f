# The watch after cutover, under load: a limit that is passed brings the migration back by itself, with nothing lost and the reason told;
# with on_limit = event it is told alone. It goes on where a restart of the server, or a crash, has interrupted it.
use strict;
use warnings;
use FindBin;
use lib $FindBin::RealBin;

use MigrateTest;
use Test::More;

my $node = new_server('watch', preload => 1, conf => "autovacuum = off\nshared_preload_libraries = 'migrate_ext,pg_stat_statements'\n");
make_users($node, 2000);
define_users($node);
$node->safe_psql('postgres', <<'SQL');
CREATE EXTENSION pg_stat_statements;
SELECT migrate.add_view('users_to_profiles', view => 'profile');
SELECT migrate.set('users_to_profiles', 'watch_time', '1 hour');
SELECT migrate.start('users_to_profiles');
SQL
wait_phase($node, 'ready');

sub set_option { return $node->safe_psql('postgres', "SELECT migrate.set('users_to_profiles', '$_[0]', '$_[1]')") }
sub serves { return value($node, "SELECT migrate.serves('users_to_profiles')") // '' }

# What the worker has told since the last cutover.
sub told
{
	return value($node, <<'SQL') // '';
SELECT string_agg(concat_ws(': ', e.kind, e.why), E'\n' ORDER BY e.id) FROM migrate.events e
WHERE e.by = 'worker' AND e.id > (SELECT max(x.id) FROM migrate.events x WHERE x.to_phase = 'cut_over')
SQL
}

sub cut_over
{
	is(error_of($node, "SELECT migrate.cutover('users_to_profiles')"), '', 'cutover');
	wait_for($node, 'the first look', 'SELECT count(*) = 1 FROM migrate._watch WHERE looked_at IS NOT NULL');
	return;
}

my $script = <<'SQL';
\set id random(1, 1000)
\set n random(1, 1000000)
UPDATE profile SET display_name = 'name ' || :n WHERE user_id = :id;
SELECT count(*) FROM profile WHERE user_id = :id;
SQL
my $app = start_app($node, 'app', $script, clients => 4, rate => 200);
poll('the application works', sub { app_transactions($app) > 200 });

subtest 'failures' => sub {
	set_option('on_limit', 'rollback');
	cut_over();
	# What the source refuses is written all the same (the target serves), so the way back is barred until it is mended.
	$node->safe_psql('postgres', "ALTER TABLE users ADD CONSTRAINT refuses CHECK (name <> 'refused') NOT VALID");
	$node->safe_psql('postgres', "UPDATE profile SET display_name = 'refused' WHERE user_id BETWEEN 1501 AND 1505");
	poll('it is told', sub { told() =~ /^rollback refused: .*gate failures/m });
	like(told(), qr/^limit: [1-5] keys > 0 \(watch_failures\); rolling back$/m, 'with value and limit');
	is(serves(), 'target', 'the target serves, for the source lacks five rows');
	$node->safe_psql('postgres', 'ALTER TABLE users DROP CONSTRAINT refuses');
	poll('it goes back by itself', sub { serves() eq 'source' });
	like(told(), qr/^watch: rolled back by itself: [1-5] keys > 0 \(watch_failures\)$/m, 'and says why');
	is(differing($node), 0, 'no row differs');
	is($node->safe_psql('postgres', "SELECT count(*) FROM users WHERE name = 'refused'"), 5, 'nothing is lost');
};

subtest 'aborted transactions, told alone' => sub {
	set_option('on_limit', 'event');
	set_option('watch_abort_rate', '0.3');
	cut_over();
	my $broken = start_app($node, 'broken', "BEGIN;\nSELECT count(*) FROM profile WHERE user_id = 1;\nROLLBACK;\n", clients => 2, rate => 400);
	poll('it is told', sub { told() =~ /\(watch_abort_rate\)/ });
	stop_app($broken);
	like(told(), qr/^limit: 0\.\d+ of \d+ transactions of the database > 0\.3 \(watch_abort_rate\)$/m, 'with value and limit');
	my $looked = $node->safe_psql('postgres', 'SELECT looked_at FROM migrate._watch');
	wait_for($node, 'it goes on looking', "SELECT looked_at > '$looked' FROM migrate._watch");
	is(serves(), 'target', 'nothing else is done');
	is($node->safe_psql('postgres', 'SELECT array_length(passed, 1) FROM migrate._watch'), 1, 'and it is told once');
	is(error_of($node, "SELECT migrate.rollback('users_to_profiles')"), '', 'back by hand');
	set_option('watch_abort_rate', 'none');
};

subtest 'slower statements' => sub {
	set_option('on_limit', 'rollback');
	set_option('watch_latency', '5');
	cut_over();
	# Every read and write of the new table takes 20 ms more.
	$node->safe_psql('postgres', <<'SQL');
CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_sleep(0.02); RETURN NULL; END $$;
CREATE TRIGGER slow AFTER UPDATE ON user_profiles FOR EACH STATEMENT EXECUTE FUNCTION slow();
SQL
	poll('it goes back by itself', sub { serves() eq 'source' });
	like(told(), qr/^watch: rolled back by itself: statements take [\d.]+ times as long as before > 5 \(watch_latency\)$/m, 'and says why');
	$node->safe_psql('postgres', "DROP TRIGGER slow ON user_profiles; SELECT pg_stat_statements_reset()");
	set_option('watch_latency', 'none');
	is(differing($node), 0, 'no row differs');
};

my (undef, $failed) = stop_app($app);
is($failed, 0, 'the application has no failed transaction');

subtest 'nothing to compare with' => sub {
	set_option('watch_latency', '1');
	$node->safe_psql('postgres', 'SELECT pg_stat_statements_reset()');
	cut_over();
	$node->safe_psql('postgres', 'SELECT count(*) FROM profile WHERE user_id = 1;' x 300);
	my $looked = $node->safe_psql('postgres', 'SELECT latency_at FROM migrate._watch');
	wait_for($node, 'the statements are looked at', "SELECT latency_at > '$looked' FROM migrate._watch");
	is($node->safe_psql('postgres', 'SELECT mean_before IS NULL AND latency IS NULL FROM migrate._watch'), 't', 'says nothing');
	is(serves(), 'target', 'and nothing is done');
	set_option('watch_latency', 'none');
	like(error_of($node, "SELECT migrate.set('users_to_profiles', 'watch_latency', '2')"), qr/55000.*comes too late/, 'nor can it be asked for then');
	is(error_of($node, "SELECT migrate.rollback('users_to_profiles')"), '', 'back by hand');
};

# Who holds the view is waited for; the watch outlasts a crash and a restart of the server, though its counters do not.
subtest 'a restart in between' => sub {
	set_option('cutover_timeout', '300 ms');
	cut_over();
	my $reader = background($node);
	$reader->query_safe($_) for 'BEGIN', 'SELECT count(*) FROM profile';
	$node->safe_psql('postgres', "ALTER TABLE users ADD CONSTRAINT refuses CHECK (name <> 'refused') NOT VALID");
	$node->safe_psql('postgres', "UPDATE profile SET display_name = 'refused' WHERE user_id = 1600");
	$node->safe_psql('postgres', 'ALTER TABLE users DROP CONSTRAINT refuses');
	poll('it is refused', sub { told() =~ /^rollback refused: .*could not roll back within cutover_timeout/m });
	is(serves(), 'target', 'the target serves still');
	$node->stop('immediate');
	$node->start;
	poll('it goes back by itself after the crash', sub { serves() eq 'source' });
	like(told(), qr/^watch: rolled back by itself: 1 keys > 0 \(watch_failures\)$/m, 'and says why');
	eval { $reader->quit };
	cut_over();
	$node->restart;
	wait_for($node, 'the watch goes on after a restart', "SELECT looked_at > pg_postmaster_start_time() FROM migrate._watch");
	is(serves(), 'target', 'and nothing was passed');
	is(differing($node), 0, 'no row differs');
};

# Rows that somebody has changed in the target before the first cutover, when nothing is carried back: only shadow reads will tell.
subtest 'shadow reads that differ' => sub {
	$node->safe_psql('postgres', <<'SQL');
CREATE TABLE note (id int PRIMARY KEY, v text NOT NULL);
CREATE TABLE memo (id int PRIMARY KEY, v text NOT NULL);
INSERT INTO note SELECT g, 'note' FROM generate_series(1, 500) g;
SELECT migrate.define('notes', 'note', 'memo', on_target_delete => 'delete');
SELECT migrate.add_view('notes', 'notes');
SELECT migrate.set('notes', 'watch_time', '1 hour'), migrate.set('notes', 'on_limit', 'rollback'), migrate.set('notes', 'shadow_time', '1 s'), migrate.start('notes');
SQL
	wait_phase($node, 'ready', 'notes');
	$node->safe_psql('postgres', "UPDATE memo SET v = 'wrong' WHERE id % 5 = 0");
	is(error_of($node, "SELECT migrate.cutover('notes')"), '', 'cutover');
	my $looked = 'SELECT looked_at FROM migrate._watch w JOIN migrate._migration m ON m.id = w.migration WHERE m.name = $$notes$$';
	wait_for($node, 'the watch has looked', "SELECT ($looked) IS NOT NULL");
	is($node->safe_psql('postgres', "SELECT migrate.serves('notes')"), 'target', 'without shadow reads nobody knows');
	$node->safe_psql('postgres', "SELECT migrate.shadow('notes', 1)");
	wait_for($node, 'it goes back by itself', "SELECT migrate.serves('notes') = 'source'");
	like($node->safe_psql('postgres', "SELECT string_agg(why, E'\n' ORDER BY id) FROM migrate.events WHERE migration = 'notes' AND kind IN ('limit', 'watch')"),
		qr/^0\.\d+ of shadow reads > 0\.001 \(max_shadow_mismatch_rate\); rolling back\nrolled back by itself: 0\.\d+ of shadow reads > 0\.001/m, 'with value and limit');
};

$node->stop;
done_testing();

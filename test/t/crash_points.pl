# A process is killed, or fails, at every debug point there is (src/debug_point.hpp): the list is read from the source, so that
# a point without a situation that reaches it fails here. After each: the application writes at once, the catalog shows a state
# wholly before or wholly after the verb, the migration goes on by itself or by the one call that its status names, both sides
# are equal and every acknowledged write is found; after drop nothing is left.
# MIGRATE_POINTS, a pattern, takes only the points that match it.
# needs: test build
use strict;
use warnings;
use FindBin;
use lib $FindBin::RealBin;

use CrashTest;
use MigrateTest;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(time);

my $long = $ENV{MIGRATE_LONG};
$ENV{MIGRATE_POINTS} //= '';
my $seed = $ENV{MIGRATE_SEED} || time() % 1_000_000;
srand($seed);
note("MIGRATE_SEED=$seed");

# Every kill; of the errors, which undo less, half in a short run.
my $all = $long || $ENV{MIGRATE_POINTS} ne '';
# The process dies at its first arrival at the point; --long: also at the second and the fifth, where there is one.
my @arrivals = $long ? (1, 2, 5) : (1);

my $top = "$FindBin::RealBin/../..";
my $node = crash_server('points');

# What reaches a point. from: the phase it begins in; once: only in a migration that was never cut over; prepare: as superuser,
# before the point is set; run: with the point set for this session, or (by => 'worker') for background workers; to: the phase
# after, where it is another; empties: it takes all rows away; undo: so that it goes on; no_key: not with a foreign key between the two tables.
my $locked = 'BEGIN; SELECT FROM users WHERE id IN (5, 290) FOR UPDATE; PREPARE TRANSACTION $$locker$$;';
my $unlock = q{DO $$ BEGIN
    FOR i IN 1 .. 3000 LOOP EXIT WHEN EXISTS (SELECT FROM migrate._requeue WHERE key = '{290}'); PERFORM pg_sleep(0.01); END LOOP; END $$;
    COMMIT PREPARED 'locker';};
my $start = "SELECT migrate.start('m');";
# A foreign key that is not set aside keeps the batches to SQL.
my $by_sql = "SELECT migrate.set('m', 'defer_indexes', 'off');";
# A limit that is passed, whatever the counters say: a row of the watch says so already.
my $limits = "SELECT migrate.set('m', 'on_limit', 'rollback');";
my $passed = "BEGIN; SELECT migrate.set('m', 'watch_time', '1 hour'); UPDATE migrate._watch SET why = 'the test'; COMMIT;";
my $unwatch = "SELECT migrate.set('m', 'watch_time', '0'); SELECT migrate.set('m', 'on_limit', 'default');";
my %situation = (
	start        => { from => 'planned', to => 'dual_writing', run => $start },
	run          => { from => 'planned', to => 'dual_writing', run => $start, by => 'worker' },
	shadowed     => { from => 'planned', to => 'dual_writing', run => $start, by => 'worker',
		prepare => "SELECT migrate.set('m', 'shadow_rate', '0.5'); SELECT migrate.set('m', 'shadow_time', '200 ms');" },
	run_in_bulk  => { from => 'planned', to => 'dual_writing', run => $start, by => 'worker' },
	run_by_sql   => { from => 'planned', to => 'dual_writing', run => $start, by => 'worker', prepare => $by_sql },
	locked       => { from => 'planned', to => 'dual_writing', run => "$start $unlock", by => 'worker', prepare => $by_sql . $locked },
	refused      => { from => 'planned', to => 'dual_writing', run => $start, by => 'worker', prepare => "UPDATE users SET name = 'refused' WHERE id = 101;" },
	locked_refused => { from => 'planned', to => 'dual_writing', run => "$start $unlock", by => 'worker',
		prepare => "$by_sql UPDATE users SET name = 'refused' WHERE id = 290; $locked" },
	failure      => { from => 'ready', run => "UPDATE users SET name = 'refused' WHERE id = 7;", by => 'worker' },
	mended       => { from => 'ready', by => 'worker',
		run => "BEGIN; UPDATE users SET name = 'refused' WHERE id = 7; UPDATE users SET name = 'mended' WHERE id = 7; COMMIT" },
	retry        => { from => 'ready', prepare => "UPDATE users SET name = 'refused' WHERE id = 7;", run => "SELECT migrate.retry('m')" },
	rearm        => { from => 'ready', to => 'validating', run => "SELECT migrate.retry('m')",
		prepare => q{DO $$ BEGIN EXECUTE (SELECT format('ALTER TABLE users DISABLE TRIGGER %1$I; ALTER TABLE users ENABLE ALWAYS TRIGGER %1$I', tgname) FROM pg_trigger WHERE tgname ~ '^!migrate.*forward_row'); END $$;} },
	repair       => { from => 'ready', once => 1, run => "SELECT migrate.repair('m', execute => true)", undo => "SELECT verdict FROM migrate.validate('m')",
		prepare => "UPDATE user_profiles SET bio = 'wrong' WHERE user_id = 9; DELETE FROM user_profiles WHERE user_id = 10; SELECT verdict FROM migrate.validate('m');" },
	pause        => { from => 'ready', run => "SELECT migrate.pause('m')", undo => "SELECT migrate.resume('m')" },
	resume       => { from => 'ready', prepare => "SELECT migrate.pause('m');", run => "SELECT migrate.resume('m')" },
	cancel       => { from => 'ready', to => 'cancelled', run => "SELECT migrate.cancel('m')" },
	route        => { from => 'ready', prepare => "SELECT migrate.route('m', percent => 0);", run => "SELECT migrate.route('m', percent => 50)" },
	watch        => { from => 'cut_over', by => 'worker', run => "SELECT migrate.set('m', 'watch_time', '1 hour')", undo => "SELECT migrate.set('m', 'watch_time', '0')" },
	watch_back   => { from => 'cut_over', to => 'watched', by => 'worker', prepare => $limits, run => $passed, undo => "CALL settle('ready', 15000); $unwatch" },
	watch_refused => { from => 'cut_over', by => 'worker', run => $passed, undo => "$unwatch DELETE FROM migrate._requeue",
		prepare => "$limits INSERT INTO migrate._requeue SELECT id, '{1}' FROM migrate._flow;" },
	cutover      => { from => 'ready', to => 'cut_over', run => "SELECT migrate.cutover('m')" },
	cutover_once => { from => 'ready', to => 'cut_over', run => "SELECT migrate.cutover('m')", once => 1 },
	rollback     => { from => 'cut_over', to => 'ready', run => "SELECT migrate.rollback('m')" },
	finalize     => { from => 'cut_over', to => 'finalized', run => "SELECT migrate.finalize('m', force => 'm')" },
	columns      => { from => 'cut_over', to => 'finalized', run => "SELECT migrate.finalize('m', force => 'm', drop_columns => '{bio}')" },
	source       => { from => 'cut_over', to => 'finalized', run => "SELECT migrate.finalize('m', force => 'm', drop_source => true)", no_key => 1 },
	drop_ended   => { from => 'finalized', to => 'none', run => "SELECT migrate.drop('m')" },
	drop         => { from => 'cancelled', to => 'none', run => "SELECT migrate.drop('m')" },
	write        => { from => 'ready', run => "UPDATE users SET name = name || 'W' WHERE id BETWEEN 200 AND 210;" },
	move         => { from => 'ready', run => 'UPDATE users SET id = id + 5000 WHERE id = (SELECT min(id) FROM users WHERE id > 220);' },
	erase        => { from => 'ready', run => 'DELETE FROM users WHERE id = (SELECT min(id) FROM users WHERE id > 220);' },
	write_back   => { from => 'cut_over', run => "UPDATE profile SET display_name = display_name || 'B' WHERE user_id BETWEEN 200 AND 210;" },
	write_refused => { from => 'ready', run => "UPDATE users SET name = 'refused' WHERE id = 220;" },
	truncate     => { from => 'ready', run => 'TRUNCATE users', empties => 1, no_key => 1 },
	truncate_back => { from => 'cut_over', run => 'TRUNCATE user_profiles', empties => 1 },
);

# The situations that reach a point; the first pattern that matches counts.
my @reached_in = (
	[ qr/^(start: |triggers: one armed)/ => qw(start) ],
	[ qr/^triggers: one dropped/ => qw(cancel finalize) ],
	[ qr/^worker: failure handled/ => qw(refused) ],
	[ qr/^batch: (snapshot|slice)/ => qw(run_in_bulk) ],
	[ qr/^batch: bound/ => qw(run_by_sql) ],
	[ qr/^(worker|ranges|batch|backfill|restore|validate): / => qw(run) ],
	[ qr/^shadow: / => qw(shadowed) ],
	[ qr/^isolate: / => qw(refused) ],
	[ qr/^requeue: refused/ => qw(locked_refused) ],
	[ qr/^(requeue|keys): / => qw(locked) ],
	[ qr/^retry: refusal/ => qw(failure) ],
	[ qr/^retry: records/ => qw(mended) ],
	[ qr/^retry verb: / => qw(retry) ],
	[ qr/^rearm: / => qw(rearm) ],
	[ qr/^repair: / => qw(repair) ],
	[ qr/^pause: / => qw(pause) ],
	[ qr/^resume: / => qw(resume) ],
	[ qr/^cancel: / => qw(cancel) ],
	[ qr/^route: / => qw(route) ],
	[ qr/^watch: looked/ => qw(watch) ],
	[ qr/^watch: rolled back/ => qw(watch_back) ],
	[ qr/^watch: refused/ => qw(watch_refused) ],
	[ qr/^switch: reverse/ => qw(cutover_once) ],
	[ qr/^switch: / => qw(cutover rollback) ],
	[ qr/^finalize: column/ => qw(columns) ],
	[ qr/^finalize: source/ => qw(source) ],
	[ qr/^finalize: / => qw(finalize) ],
	[ qr/^drop: views/ => qw(drop) ],
	[ qr/^drop: / => qw(drop_ended) ],
	[ qr/^dual write: truncate/ => qw(truncate truncate_back) ],
	[ qr/^dual write: .*failure/ => qw(write_refused) ],
	[ qr/^dual write: keys applied below/ => qw(write) ],
	[ qr/^dual write: keys replaced/ => qw(move) ],
	[ qr/^dual write: / => qw(erase write_back) ],
	[ qr/^transaction: / => qw(write start cutover rollback cancel finalize drop) ]);

sub trials
{
	my @trials;
	for my $point (grep { /$ENV{MIGRATE_POINTS}/ } points_in_source($top))
	{
		my ($match) = grep { $point =~ $_->[0] } @reached_in;
		ok($match, "there is a situation for point \"$point\"") or next;
		my (undef, @names) = @$match;
		for my $name (@names)
		{
			for my $action (qw(kill error))
			{
				next if $action eq 'error' && $point eq 'transaction: committed';    # it would be a PANIC, which is a kill
				next if $action eq 'error' && !$all && rand() < 0.5;
				push @trials, { %{ $situation{$name} }, point => $point, action => $action, in => $name, arrival => $_ } for @arrivals;
			}
		}
	}
	return @trials;
}

# What an error is: the product's own fault, or what it takes for a lock's, a full disk's, a cancel's, a row's.
my @states = $long ? qw(XX000 55P03 40001 53100 57014 22023) : qw(XX000 55P03);

my $life = new_life($node);

# Brings the migration to the trial's state, sets the point, runs into it, and sees what has become of everything.
sub run_trial
{
	my ($t) = @_;
	my $setting = "$t->{point} $t->{action}";
	$setting .= '=' . $states[ rand @states ] if $t->{action} eq 'error';
	$setting .= " $t->{arrival}" if $t->{arrival} > 1;
	$t->{name} = "$t->{in}, $setting";
	my $by_worker = ($t->{by} // '') eq 'worker';
	my $references = !$t->{no_key} && rand() < 0.5;
	my $sql = ($t->{anew} ? bring($life, 'planned', $references) : '') . bring($life, $t->{from}, $references) . ($t->{prepare} // '') . "\n";
	$sql .= $by_worker ? arm_workers($node, $setting) : arm_session($setting);
	my $log = log_position($node);
	my ($failed, $error, $out) = run_sql($node, "$sql\\echo armed\n$t->{run}");
	my $hit = $out =~ /armed/ && wait_for_log($node, $log, qr/debug point "\Q$t->{point}\E": $t->{action}/, !$by_worker ? 0.1 : $t->{arrival} == 1 ? 20 : 2);
	ok($hit || $t->{arrival} > 1, "$t->{name}: reached") or diag("$out\n$error");
	return if !$hit && $t->{arrival} == 1;
	wait_for_log($node, $log, qr/is ready to accept connections/) if $t->{action} eq 'kill' && $hit;
	run_sql($node, "COMMIT PREPARED 'locker'") if $t->{in} =~ /^locked/ && $t->{action} eq 'kill';
	# A verb is undone unless its commit was done; what a worker does comes after the verb that started it.
	recover($life, $t, $by_worker || !$failed || $t->{point} eq 'transaction: committed');
	return;
}

# The next trial is one that the migration's state allows, or else that is the least way off; those that end it come last.
sub distance
{
	my ($t) = @_;
	my $here = $life->{phase};
	my $fits = !($t->{once} && $life->{cutovers}) && !($t->{no_key} && $life->{references}) && !$life->{emptied};
	return 9 if !$fits || $here =~ /^(none|finalized|cancelled)$/ && $here ne $t->{from};
	return $t->{ends} ? 3 : $t->{once} ? 0 : 1 if $here eq $t->{from};
	return 2 if $here eq 'planned' && $t->{from} eq 'ready' || "$here $t->{from}" =~ /^(ready cut_over|cut_over ready)$/ && !$t->{ends} && !$t->{once};
	return 9;
}

sub failures { return scalar grep { !$_ } Test::More->builder->summary }

my @left = trials();
my ($began, $count) = (time(), scalar @left);
for my $t (@left) { $t->{ends} = 1 if ($t->{to} // '') =~ /^(cancelled|finalized|none)$/ || $t->{empties} }
while (@left)
{
	my ($best) = sort { $a->[0] <=> $b->[0] || $a->[1] <=> $b->[1] } map { [ distance($left[$_]), rand(), $_ ] } 0 .. $#left;
	my ($t) = splice @left, $best->[2], 1;
	$t->{anew} = $best->[0] == 9;
	my $from = time();
	my $failures = failures();
	run_trial($t);
	start_over($life) if failures() > $failures;
	note(sprintf '%.2f s: %s', time() - $from, $t->{name});
}
my ($failed, $error) = run_sql($node, end_life($life));
is($failed, 0, 'nothing is left of the last one') or diag($error);
note(sprintf '%d kills and errors at %d points in %d migrations, %.1f s', $count, scalar(points_in_source($top)), $life->{number}, time() - $began);
$node->stop;
done_testing();

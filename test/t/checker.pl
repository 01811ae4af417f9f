# Randomized concurrent checker: eight sessions write with every kind of statement at every isolation level, while a driver
# starts, pauses, kills, switches and cancels migrations under them, and readers compare both sides in every snapshot.
#
# Each round has tables of its own, by its seed, which is said first:
#   MIGRATE_SEED=<seed> replays its decisions (of each session; how they interleave is the machine's business), in one round.
#   MIGRATE_LONG=1 goes on for an hour, of which one round stays cut over for ten minutes; MIGRATE_SECONDS=<n>, MIGRATE_ROUNDS=<n>
#   and MIGRATE_STAY=<n> (seconds; of one round more) say otherwise.
use strict;
use warnings;
use FindBin;
use lib $FindBin::RealBin;

use CheckerDriver;
use CheckerOracle;
use CheckerReader;
use CheckerSchema;
use CheckerSession;
use MigrateTest;
use POSIX ();
use Test::More;
use Time::HiRes qw(sleep time);

my $sessions = 8;
my $whole = $ENV{MIGRATE_LONG} && !grep { defined } @ENV{qw(MIGRATE_ROUNDS MIGRATE_SECONDS MIGRATE_SEED)};
my $rounds = $ENV{MIGRATE_ROUNDS} // ($ENV{MIGRATE_SEED} ? !$ENV{MIGRATE_STAY} : $ENV{MIGRATE_LONG} ? 50 : 4);
my $seconds = $ENV{MIGRATE_SECONDS} || ($ENV{MIGRATE_LONG} ? 60 : 45);
my $stay = $ENV{MIGRATE_STAY} // ($whole ? 600 : 0);
my $first_seed = int($ENV{MIGRATE_SEED} || time() % 1_000_000_000);
$first_seed -= $first_seed % 4 unless $ENV{MIGRATE_SEED};    # then each four of them have a switch by swap
my %total;
diag("MIGRATE_SEED=$first_seed");

sub start_child
{
	my ($body) = @_;
	my $pid = fork // die "fork: $!";
	return $pid if $pid;
	eval { $body->(); 1 } or print STDERR "child: $@";
	POSIX::_exit(0);    # not by exit: the server is the parent's to stop
}

# What is known of each transaction, by its tag: committed and aborted are certain.
sub acknowledged
{
	my ($dir, $sum) = @_;
	my %state;
	for my $path (glob "$dir/session.*")
	{
		open my $file, '<', $path or die "$path: $!";
		while (my $line = <$file>)
		{
			chomp $line;
			my ($tag, @rest) = split /\t/, $line;
			if ($tag eq 'sum') { $sum->{ $rest[0] } += $rest[1] }
			elsif (($state{$tag} // '') !~ /committed|aborted/) { $state{$tag} = $rest[0] }
		}
		close $file;
	}
	return %state;
}

# Every transaction that was acknowledged is there, none that was rolled back is.
sub check_acknowledged
{
	my ($node, $dir, $sum) = @_;
	my %state = acknowledged($dir, $sum);
	my %there = map { $_ => 1 } split /\n/, $node->safe_psql('postgres', 'SELECT tag FROM app_tx');
	$sum->{acknowledged} = grep { $_ eq 'committed' } values %state;
	my @lost = grep { $state{$_} eq 'committed' && !$there{$_} } sort keys %state;
	my @back = grep { $state{$_} eq 'aborted' && $there{$_} } sort keys %state;
	is("@lost[0 .. ($#lost > 9 ? 9 : $#lost)]", '', 'every acknowledged transaction is there');
	is("@back[0 .. ($#back > 9 ? 9 : $#back)]", '', 'no transaction that was rolled back is there');
	return;
}

sub slurp { my ($path) = @_; open my $file, '<', $path or return ''; local $/; return <$file> // ''; }

# $stay: how long this round is to stay cut over, in seconds.
sub round
{
	my ($seed, $stay) = @_;
	my $schema = CheckerSchema->new($seed, $sessions);
	note("seed $seed: " . $schema->describe);
	my $node = new_server("checker_$seed", preload => $schema->{preload}, conf => <<'CONF');
deadlock_timeout = 100ms
max_prepared_transactions = 60
autovacuum_naptime = 1s
log_error_verbosity = default
CONF
	my $dir = $node->basedir;
	$node->safe_psql('postgres', $schema->create_sql . CheckerOracle->triggers_sql($schema));
	my $common = {
		dir => $dir, dsn => 'dbi:Pg:dbname=postgres;host=' . $node->host . ';port=' . $node->port, schema => $schema, seed => $seed,
		version => int($node->safe_psql('postgres', "SELECT current_setting('server_version_num')::int / 10000")) };
	my @children;
	for my $number (0 .. $sessions - 1) { push @children, start_child(sub { CheckerSession->run($common, $number) }) }
	push @children, start_child(sub { CheckerReader->run($common, $sessions, 0) }), start_child(sub { CheckerReader->run($common, $sessions + 1, 1) });
	my $driver = CheckerDriver->new({ %$common, node => $node, children => [ 0 .. $sessions + 1 ], until => time() + $seconds, stay => $stay });
	eval { $driver->run; 1 } or $driver->fault("driver died: $@");
	open my $stop, '>', "$dir/stop";
	close $stop;
	for my $child (@children)
	{
		while (!waitpid $child, POSIX::WNOHANG) { $driver->end_all_prepared; sleep 0.1 }
	}
	$driver->end_all_prepared;
	my %sum = %{ $driver->{count} };
	is(slurp("$dir/fault"), '', "seed $seed: nothing is wrong") or diag("to replay: MIGRATE_SEED=$seed (" . $schema->describe . ')');
	check_acknowledged($node, $dir, \%sum);
	note(sprintf 'seed %d: %d transactions, %d statements, %d rolled back, %d in two phases, %d copied by place, %d switches (by swap: %d), %d crashes, %d snapshots compared',
		$seed, map { $sum{$_} // 0 } 'committed', 'statements', 'rolled back', 'prepared', 'copied by place', 'switches', 'swaps', 'crashes', 'snapshots compared');
	note(join ', ', map { "$_: $sum{$_}" } sort keys %sum);
	is($sum{'long stays'} // 0, 1, "seed $seed: the target has served for $stay s, and the migration has come to its end") if $stay;
	$total{$_} += $sum{$_} for keys %sum;
	$total{rounds}++;
	$node->stop;
	return !-s "$dir/fault";
}

my @rounds = map { [ $first_seed + $_, 0 ] } 0 .. $rounds - 1;
if ($stay)
{
	# One in which both sides can be written, by all kinds of statements.
	my ($seed) = grep { my $schema = CheckerSchema->new($_, $sessions); !$schema->{deferrable} && !$schema->{swap} } $ENV{MIGRATE_SEED} ? () : $first_seed + $rounds .. $first_seed + $rounds + 3;
	push @rounds, [ $seed // $first_seed, $stay ];
}
for my $round (@rounds)
{
	my ($ok, $name) = (0, "seed $round->[0]" . ($round->[1] ? ", cut over for $round->[1] s" : ''));
	subtest $name => sub { $ok = round(@$round) };
	last unless $ok;
}
note(sprintf 'in all: %d rounds from MIGRATE_SEED=%d, %d statements, %d transactions acknowledged, %d migrations to their end, %d switches there and back (by swap: %d), %d crashes, %d snapshots and %d sides at rest compared',
	$total{rounds} // 0, $first_seed, map { $total{$_} // 0 } 'statements', 'acknowledged', 'migrations', 'switches', 'swaps', 'crashes', 'snapshots compared', 'strict comparisons');
cmp_ok($total{switches} // 0, '>=', 100, 'a hundred switches there and back') if $whole;
done_testing();

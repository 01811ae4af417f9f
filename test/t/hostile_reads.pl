# The hostile owner (HostileOwner.pm), reads that are routed, and the watch after cutover: a view for reading that the extension makes, and
# two of his own with expressions of his that it takes over; predicates that would run his code; and a worker that goes back by itself,
# as whoever cut over. By a superuser, and by himself.
use strict;
use warnings;
use FindBin;
use lib $FindBin::RealBin;

use HostileOwner;
use MigrateTest;
use Test::More;

my $rows = 20;
my $node = new_server('hostile_reads', conf => "log_error_verbosity = terse\nlog_min_messages = log\nshared_preload_libraries = 'pg_stat_statements'\n");
plant($node, $rows);
$node->safe_psql('postgres', <<'SQL');
CREATE EXTENSION pg_stat_statements SCHEMA lair;
SQL

# Who reads a view, or writes the table, runs what is planted there.
my $reads = qr/^mapping$|^cast$|^operator$|^constant$|^filter$|^own |^[st] (?:index constant|predicate|policy|domain|domain constant)$|^key domain$/;
my %allowed = ('read source' => $reads, 'read both' => $reads, 'read target' => $reads, 'write target' => qr/^t |^key domain$/);

# His own views, with the target's columns.
sub make_views
{
	my $columns = q{id, lair.spy(v, 'own expression') AS v, "select" <+> 'x' AS "user", lair.spy('constant', 'own constant') AS c, 'k'::text AS k, d::text::t_text AS d, p};
	as_role($node, 'mallory', 'SET search_path = lair, public; ' . join '', map { <<"SQL" } qw(own own_read));
CREATE VIEW $_ WITH (security_barrier) AS SELECT $columns FROM s WHERE lair.fair(v, 'own condition') AND ('(x)'::pair).v IS NOT NULL;
ALTER VIEW $_ ALTER v SET DEFAULT lair.spy('v', 'own default'), ALTER p SET DEFAULT '(x)'::pair;
CREATE TRIGGER i INSTEAD OF INSERT ON $_ FOR EACH ROW EXECUTE FUNCTION tell('own instead of');
GRANT SELECT ON $_ TO clerk;
SQL
	return;
}

sub define
{
	my ($role, $name) = @_;
	enter($node, "$role: define");
	as_role($node, $role, "SET search_path = lair, public;\nSELECT migrate.define('$name', 'lair.s', 'lair.t', \$\$ $map \$\$, filter => \$\$ lair.spy('a', 'filter') IS NOT NULL \$\$,"
		  . " reverse => \$\$ id, lair.spy(v, 'reverse') AS v, left(\"user\", -2) AS \"select\", d::text AS d, p \$\$, on_target_delete => 'delete');");
	make_views();
	verb($node, $role, 'add view', "SELECT migrate.set('$name', 'accept_reverse_gaps', 'on'), migrate.set('$name', 'shadow_time', '1 s'); SELECT migrate.add_view('$name', 'lair.own'), migrate.add_view('$name', 'lair.own_read', use => 'read'),"
		  . " migrate.add_view('$name', 'lair.routed', use => 'read'); SELECT * FROM migrate.preflight('$name'); SELECT migrate.plan('$name'); SELECT * FROM migrate.routes;", escape => 1);
	as_role($node, 'mallory', 'GRANT SELECT ON lair.routed TO clerk');
	return;
}

sub read_views
{
	my ($phase) = @_;
	enter($node, $phase);
	for my $role (qw(clerk postgres))
	{
		as_role($node, $role, "SELECT count(*), max(v), max(d) FROM lair.$_; SELECT * FROM lair.$_ WHERE id = 3") for qw(own own_read routed);
	}
	return;
}

sub route_there_and_back
{
	my ($role, $name) = @_;
	enter($node, "$role: predicates", 1);
	# (What somebody writes himself he has himself read: the literal is for the owner to try.)
	for my $predicate (q{lair.fair(v, 'predicate')}, q{v <+> 'x' = 'y'}, q{v::lair.t_text IS NOT NULL}, q{lair.spy('constant', 'predicate') = k}, $role eq 'mallory' ? (q{p = '(x)'::lair.pair}, q{'{constant}'::lair.t_text[] = '{}'}) : ())
	{
		my $path = $predicate =~ /'::lair/ ? '' : planted_path($role);  # (by which his own domain's check would not end)
		like(error_of($node, $path . "SELECT migrate.route('$name', predicate => \$\$ $predicate \$\$)", user => $role), qr/predicate (?:calls a function|contains a literal)/, "$role: no predicate: $predicate");
	}
	verb($node, $role, "route by $_", "SELECT migrate.route('$name', $_, dry_run => true); SELECT migrate.route('$name', $_); SELECT * FROM migrate.routes;", escape => 1), read_views('read both')
	  for ('percent => 30', q{predicate => $$ id <= 10 OR id IS NULL $$}, 'percent => 60');
	verb($node, $role, 'route back', "SELECT migrate.route('$name', percent => 0);", escape => 1);
	read_views('read source');
	verb($node, $role, 'route again', "SELECT migrate.route('$name', percent => 50);", escape => 1);
	return;
}

# A write that cannot be carried back passes a limit; the worker rolls back, when it can.
sub watched
{
	my ($role, $name) = @_;
	verb($node, $role, 'cutover', "SELECT migrate.set('$name', 'watch_time', '10 minutes'), migrate.set('$name', 'watch_latency', '1000'), migrate.set('$name', 'on_limit', 'rollback');"
		  . " SELECT migrate.cutover('$name', dry_run => true); SELECT migrate.cutover('$name'); SELECT migrate.shadow('$name', 1);", escape => 1);
	read_views('read target');
	as_role($node, 'mallory', qq{ALTER TABLE lair.s ADD CONSTRAINT refuses CHECK ("select" <> 'refused by $role')});
	enter($node, 'write target');
	as_role($node, 'clerk', qq{UPDATE lair.t SET "user" = 'refused by $role x' WHERE id = 9});
	enter($node, "$role: watch", 1);
	wait_for($node, 'the rollback is refused', "SELECT count(*) > 0 FROM migrate._event WHERE name = '$name' AND kind = 'rollback refused'");
	as_role($node, 'mallory', 'ALTER TABLE lair.s DROP CONSTRAINT refuses');
	wait_phase($node, 'ready', $name);
	is(value($node, "SELECT e.by FROM migrate._event e WHERE e.name = '$name' AND e.kind = 'phase' ORDER BY e.id DESC LIMIT 1"), $role, '… by itself, in the name of who cut over');
	return;
}

sub whole_life
{
	my ($role, $name) = @_;
	define($role, $name);
	start_and_wait($node, $role, $name);
	read_views('read source');
	route_there_and_back($role, $name);
	watched($role, $name);
	read_views('read source');
	is(verb($node, $role, 'validate', "SELECT verdict FROM migrate.validate('$name');", escape => 1), 'equal', "$role: both sides are equal");
	verb($node, $role, 'route at last', "SELECT migrate.route('$name', percent => 100); SELECT migrate.shadow('$name', 0);", escape => 1);
	verb($node, $role, 'cancel', "SELECT migrate.cancel('$name'); SELECT migrate.drop('$name');", escape => 1);
	as_role($node, 'mallory', 'DROP VIEW lair.own, lair.own_read, lair.routed; TRUNCATE lair.t');
	return;
}

whole_life('postgres', 'by a superuser');
whole_life('mallory', 'by its owner');

is(join("\n", strangers($node, \%allowed)), '', 'nobody but the owner ran the owner\'s code');
for my $role (qw(postgres mallory))
{
	my $own = places($node, qr/^$role: watch$/, 'mallory');
	ok($own->{$_}, "the worker of $role has him run: $_") for ('reverse', 's check', 's before row trigger');
}

$node->stop;
done_testing();

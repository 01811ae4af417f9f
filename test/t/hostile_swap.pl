# The hostile owner (HostileOwner.pm) and cutover by swap, which makes anew what hangs on his table: views, a function, a policy,
# defaults, a trigger, foreign keys in both directions, of which a worker validates those that were valid. Called by a superuser, by a
# member of him and of somebody else whose table references his, and by himself: nobody but he runs his code for that.
use strict;
use warnings;
use FindBin;
use lib $FindBin::RealBin;

use HostileOwner;
use MigrateTest;
use Test::More;

my $rows = 20;
my $node = new_server('hostile_swap', conf => "log_error_verbosity = terse\nlog_min_messages = log\n");
plant($node, $rows);
# What a swap takes along. (A key of type digit is compared with a number by way of his cast; the literals run a domain's check when
# they are read.)
as_role($node, 'mallory', <<'SQL' . (server_major() < 14 ? '' : <<'ATOMIC'));
SET search_path = lair, public;
DROP POLICY p ON t;
CREATE TYPE digit AS ENUM ('1', '2', '3');
CREATE FUNCTION digit_int(d digit) RETURNS int IMMUTABLE LANGUAGE plpgsql AS $$ BEGIN PERFORM lair.note('key cast'); RETURN d::text::int; END $$;
CREATE CAST (digit AS int) WITH FUNCTION digit_int(digit) AS IMPLICIT;
CREATE TABLE digits (n int PRIMARY KEY);
INSERT INTO digits VALUES (1), (2), (3);
CREATE INDEX ON digits ((n + length(lair.spy('constant', 'digits index constant'))));
ALTER TABLE s ADD q digit DEFAULT '1' CONSTRAINT s_q REFERENCES digits, ALTER v SET DEFAULT lair.spy('v', 's default of v'), ADD CONSTRAINT s_both CHECK (lair.fair(v, 'check of both'));
ALTER TABLE t ADD q digit, ADD CONSTRAINT t_both CHECK (lair.fair(v, 'check of both'));
CREATE TABLE line (n int PRIMARY KEY, s_id digit CONSTRAINT line_s REFERENCES s);
INSERT INTO line VALUES (1, '1'), (2, '2');
CREATE INDEX ON line ((n + length(lair.spy('constant', 'line index constant'))));
CREATE TRIGGER made AFTER INSERT OR UPDATE ON s FOR EACH ROW WHEN (lair.fair(NEW.v, 's when')) EXECUTE FUNCTION tell('s made');
CREATE VIEW watching WITH (security_barrier) AS
    SELECT id, lair.spy(v, 'view') AS v, v <+> 'x' AS w, '(x)'::pair AS literal FROM s WHERE lair.spy('constant', 'view constant') IS NOT NULL AND lair.fair(v, 'view condition');
ALTER VIEW watching ALTER v SET DEFAULT lair.spy('v', 'view default');
CREATE TRIGGER i INSTEAD OF INSERT ON watching FOR EACH ROW EXECUTE FUNCTION tell('view instead of');
GRANT SELECT ON watching TO clerk;
SQL
CREATE FUNCTION bound() RETURNS bigint LANGUAGE sql BEGIN ATOMIC SELECT count(*) FROM s WHERE lair.spy(v, 'bound') IS NOT NULL AND p IS DISTINCT FROM '(x)'::pair; END;
ATOMIC
# What others have made of his table: a tenant, who may not read it, and a superuser.
enter($node, 'made by others');
$node->safe_psql('postgres', <<'SQL' . (server_major() < 14 ? '' : <<'ATOMIC'));
CREATE ROLE tenant LOGIN;
CREATE ROLE chief LOGIN;
GRANT mallory, tenant TO chief;
GRANT USAGE ON SCHEMA lair TO tenant;
GRANT REFERENCES ON lair.s TO tenant;
SELECT migrate.allow('chief');
CREATE TABLE bill (id int PRIMARY KEY, s_id int);
CREATE TABLE invoice (id int PRIMARY KEY, s_id int CONSTRAINT invoice_s REFERENCES lair.s);
INSERT INTO bill VALUES (1, 1);
INSERT INTO invoice VALUES (1, 1);
ALTER TABLE bill OWNER TO tenant;
CREATE VIEW of_postgres AS SELECT id, v FROM lair.s WHERE v > 'a';
CREATE VIEW of_literal AS SELECT id FROM lair.s WHERE p IS DISTINCT FROM '(x)'::lair.pair;
SQL
CREATE FUNCTION of_function() RETURNS bigint LANGUAGE sql BEGIN ATOMIC SELECT count(*) FROM lair.s WHERE p IS DISTINCT FROM '(x)'::lair.pair; END;
ATOMIC

# Who writes or reads a table or a view runs what is planted on it; after the cutover, on what has the name then.
my $on_source = qr/^s |^key domain$|^key cast$|^check of both$/;
my %allowed = ('made by others' => qr/^s domain$/, 'dual writes' => $on_source, 'late writes' => $on_source, 'swapped' => qr/^t |^s (?:policy|made trigger|when|default of v)$|^key domain$|^key cast$|^check of both$/,
	'reads' => qr/^view|^operator$|^[st] (?:index constant|predicate|policy)$/);
my $key = 1000;

sub write_name
{
	my ($phase, $name, $column) = @_;
	my $value = $column eq 'user' ? 'new x' : 'new';
	enter($node, $phase);
	as_role($node, $_, sprintf(qq{INSERT INTO lair.$name (id, v, "$column") VALUES (%1\$d, 'new', '$value'), (%1\$d + 1, 'new', '$value'); UPDATE lair.$name SET v = v || '!' WHERE id IN (2, %1\$d); DELETE FROM lair.$name WHERE id = %1\$d + 1;}, $key += 10))
	  for qw(clerk postgres);
	return;
}

sub read_view
{
	enter($node, 'reads');
	as_role($node, $_, 'SELECT count(*), max(v), max(w) FROM lair.watching') for qw(clerk postgres);
	return;
}

# In the phase, and a worker has validated the keys that the switch has added.
sub worked
{
	my ($name, $phase) = @_;
	wait_for($node, "$phase, with its keys", "SELECT m.phase = '$phase' AND NOT migrate._is_restoring(m.id) FROM migrate._migration m WHERE m.name = '$name'");
	is(phase($node, $name), $phase, "$name is $phase");
	return;
}

sub keys_of
{
	my ($relation) = @_;
	return $node->safe_psql('postgres', "SET search_path = pg_catalog; SELECT string_agg(k.conname || CASE WHEN k.convalidated THEN '' ELSE ', not valid' END, '; ' ORDER BY k.conname) FROM pg_constraint k WHERE k.contype = 'f' AND k.confrelid = '$relation'::regclass");
}

sub define
{
	my ($role, $name) = @_;
	enter($node, "$role: define");
	as_role($node, $role, "SET search_path = lair, public;\nSELECT migrate.define('$name', 'lair.s', 'lair.t', \$\$ id, v, \"select\" <+> 'x' AS \"user\", c::text AS c, lair.spy('constant', 'constant') AS k, d::text AS d, p, q \$\$,"
		  . " reverse => \$\$ id, v, left(\"user\", -2) AS \"select\", d::text AS d, p, q \$\$, on_target_delete => 'delete');");
	verb($node, $role, 'preflight', "SELECT migrate.set('$name', 'accept_reverse_gaps', 'on'), migrate.set('$name', 'shadow_time', '1 s'), migrate.set('$name', 'cutover', 'swap'); SELECT * FROM migrate.preflight('$name'); SELECT migrate.plan('$name');");
	return;
}

sub whole_life
{
	my ($role, $name) = @_;
	define($role, $name);
	start_and_wait($node, $role, $name);
	write_name('dual writes', 's', 'select');
	verb($node, $role, 'cutover', "SELECT migrate.cutover('$name', dry_run => true); SELECT migrate.rollback('$name', dry_run => true); SELECT migrate.cutover('$name');", escape => 1);
	worked($name, 'cut_over');
	write_name('swapped', 's', 'user');
	write_name('late writes', 's_old', 'select');
	read_view();
	is(verb($node, $role, 'validate after', "SELECT verdict FROM migrate.validate('$name');", escape => 1), 'equal', "$role: both sides are equal after the swap");
	verb($node, $role, 'rollback', "SELECT migrate.rollback('$name');", escape => 1);
	worked($name, 'ready');
	write_name('dual writes', 's', 'select');
	read_view();
	verb($node, $role, 'cutover again', "SELECT migrate.cutover('$name'); SELECT * FROM migrate.validate('$name'); SELECT migrate.plan('$name');", escape => 1);
	worked($name, 'cut_over');
	return;
}

sub give_up
{
	my ($role, $name) = @_;
	verb($node, $role, 'give up', "SELECT migrate.rollback('$name'); SELECT migrate.cancel('$name');", escape => 1);
	worked($name, 'cancelled');
	verb($node, $role, 'drop', "SELECT migrate.drop('$name');");
	as_role($node, 'mallory', 'TRUNCATE lair.t');
	return;
}

# What a superuser has made is not made anew where that would read a value whose type the owner has a say in.
define('postgres', 'literal');
is($node->safe_psql('postgres', q{SET search_path = pg_catalog; SELECT string_agg(message, E'\n' ORDER BY message) FROM migrate.preflight('literal') WHERE "check" = 'swap' AND severity = 'error'}),
	join("\n", server_major() < 14 ? () : 'function public.of_function() cannot use the new table: postgres would read a value of type lair.pair anew, which may run the check of a domain',
		'view public.of_literal cannot read the new table: postgres would read a value of type lair.pair anew, which may run the check of a domain'), 'a value that a superuser would read anew is refused');
$node->safe_psql('postgres', "SELECT migrate.drop('literal'); DROP VIEW of_literal; " . (server_major() < 14 ? '' : 'DROP FUNCTION of_function()'));

# A superuser's key alone, so that a worker would begin with it: only to plan its validation runs what the owner's indexes have.
as_role($node, 'mallory', 'ALTER TABLE lair.s DROP CONSTRAINT s_q; ALTER TABLE lair.line DROP CONSTRAINT line_s');
define('postgres', 'alone');
start_and_wait($node, 'postgres', 'alone');
verb($node, 'postgres', 'cutover', "SELECT migrate.cutover('alone');", escape => 1);
worked('alone', 'cut_over');
is(keys_of('lair.s'), 'invoice_s, not valid', 'a superuser\'s key is not validated');
give_up('postgres', 'alone');
enter($node, 'made by others');
as_role($node, 'mallory', 'ALTER TABLE lair.s ADD CONSTRAINT s_q FOREIGN KEY (q) REFERENCES lair.digits; ALTER TABLE lair.line ADD CONSTRAINT line_s FOREIGN KEY (s_id) REFERENCES lair.s');
as_role($node, 'tenant', 'ALTER TABLE bill ADD CONSTRAINT bill_s FOREIGN KEY (s_id) REFERENCES lair.s');

whole_life('postgres', 'by a superuser');
is(keys_of('lair.s'), 'bill_s; invoice_s, not valid; line_s', 'the others are');
give_up('postgres', 'by a superuser');
# A member of the others, but of no superuser
$node->safe_psql('postgres', 'DROP TABLE invoice; DROP VIEW of_postgres');
whole_life('chief', 'by a member');
give_up('chief', 'by a member');
$node->safe_psql('postgres', 'DROP TABLE bill');
whole_life('mallory', 'by its owner');
verb($node, 'mallory', 'finalize', "SELECT migrate.finalize('by its owner', drop_source => true, force => 'by its owner'); SELECT migrate.drop('by its owner');", escape => 1);

is(join("\n", strangers($node, \%allowed)), '', 'nobody but the owner ran the owner\'s code');
for my $role (qw(postgres chief mallory))
{
	my $own = places($node, qr/^$role: /, 'mallory');
	ok($own->{$_}, "$role has him run: $_") for ('key cast', 's domain', 't index constant', 's index constant', 'line index constant', 'digits index constant', 'constant', 'operator');
}

$node->stop;
done_testing();

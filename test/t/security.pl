# A hostile owner: every place where PostgreSQL runs a user's code for us (mapping function, operator, domain check, index
# expression, default, trigger) writes down who it was run as. It must be the owner, always, and
# never the superuser who defined, started and switched the migration, nor the extension's worker.
use strict;
use warnings;
use FindBin;
use lib $FindBin::RealBin;

use MigrateTest;
use Test::More;

my $node = new_server('security');
$node->safe_psql('postgres', <<'SQL');
CREATE ROLE mallory LOGIN;
CREATE ROLE clerk LOGIN;
CREATE SCHEMA lair AUTHORIZATION mallory;
GRANT USAGE ON SCHEMA lair TO clerk;
SET ROLE mallory;
SET search_path = lair;
CREATE TABLE seen (who text, place text);
-- An IMMUTABLE function may not write, but may call one that does.
CREATE FUNCTION note(place text) RETURNS void LANGUAGE plpgsql SECURITY INVOKER AS
    $$ BEGIN INSERT INTO lair.seen VALUES (current_user, place); EXCEPTION WHEN insufficient_privilege THEN RAISE LOG 'lair: % in %', current_user, place; END $$;
CREATE FUNCTION spy(v text, place text) RETURNS text IMMUTABLE LANGUAGE plpgsql AS $$ BEGIN PERFORM lair.note(place); RETURN v; END $$;
CREATE FUNCTION fair(v text) RETURNS boolean IMMUTABLE LANGUAGE plpgsql AS $$ BEGIN PERFORM lair.note('domain'); RETURN true; END $$;
CREATE FUNCTION plus(a text, b text) RETURNS text IMMUTABLE LANGUAGE plpgsql AS $$ BEGIN PERFORM lair.note('operator'); RETURN a || b; END $$;
CREATE OPERATOR <+> (LEFTARG = text, RIGHTARG = text, FUNCTION = plus);
CREATE DOMAIN guarded AS text CHECK (lair.fair(VALUE));
CREATE FUNCTION tell() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM lair.note(TG_NAME); RETURN NEW; END $$;
CREATE TABLE s (id int PRIMARY KEY, v text, w text, k text);
CREATE TABLE t (id int PRIMARY KEY, v guarded, w text, k text, d text DEFAULT lair.spy('', 'default'));
CREATE INDEX ON t (lair.spy(v, 'index'));
INSERT INTO s SELECT g, 'v' || g, 'w', 'k' FROM generate_series(1, 3000) g;
CREATE TRIGGER on_target BEFORE INSERT OR UPDATE ON t FOR EACH ROW EXECUTE FUNCTION tell();
GRANT SELECT, INSERT, UPDATE, DELETE ON s TO clerk;
ANALYZE s;
DELETE FROM seen;
SQL

# As the superuser, who is everybody's member.
$node->safe_psql('postgres', <<'SQL');
SET search_path = lair, public;
SELECT migrate.define('hostile', 'lair.s', 'lair.t', $$ id, lair.spy(v, 'mapping') AS v, w <+> 'x' AS w, lair.spy('constant', 'constant') AS k $$,
    filter => $$ lair.spy('a', 'filter') = 'a' $$, reverse => $$ id, v::text AS v, lair.spy(w, 'reverse') AS w, k $$, on_target_delete => 'delete');
SELECT * FROM migrate.preflight('hostile');
SELECT migrate.plan('hostile');
SELECT migrate.add_view('hostile', 'lair.through');
SELECT migrate.set('hostile', 'accept_reverse_gaps', 'on');
SELECT migrate.start('hostile');
SQL
$node->safe_psql('postgres', "CALL migrate.wait('hostile', timeout => '120 s')");
$node->safe_psql('postgres', "SET search_path = lair; UPDATE s SET w = 'clerk' WHERE id < 10; DELETE FROM s WHERE id = 20; INSERT INTO s VALUES (9000, 'new')",
	extra_params => [ '-U', 'clerk' ]);
for my $method (qw(counts sample ranges checksum rows))
{
	my $verdict = $node->safe_psql('postgres', "SELECT verdict FROM migrate.validate('hostile', '$method')");
	is($verdict, 'equal', "validate by $method as a superuser");
}
$node->safe_psql('postgres', <<'SQL');
SELECT migrate.shadow('hostile', 0.5);
SELECT * FROM migrate.repair('hostile');
SQL
poll('shadow reads', sub { (value($node, "SELECT sum(reads) > 0 FROM migrate.shadow_reads") // '') eq 't' });
$node->safe_psql('postgres', <<'SQL');
SELECT migrate.shadow('hostile', 0);
SELECT migrate.cutover('hostile', dry_run => true);
SELECT migrate.cutover('hostile');
UPDATE lair.t SET w = 'after' WHERE id = 1;
SELECT migrate.rollback('hostile');
SELECT migrate.cutover('hostile');
SELECT migrate.finalize('hostile', force => 'hostile');
SELECT migrate.drop('hostile');
SQL

# The owner's own definition, which the extension's owner, a superuser, turns into a view: PostgreSQL reads the literals in it
# while it does so, and reading one of a composite type, or of a range over a domain, runs a domain's check.
$node->safe_psql('postgres', <<'SQL');
SELECT migrate.allow('mallory');
SET ROLE mallory;
CREATE TYPE lair.pair AS (v lair.guarded);
CREATE TYPE lair.span AS RANGE (subtype = lair.guarded);
CREATE TABLE lair.t2 (id int PRIMARY KEY, v text);
SQL
for my $literal (q{('(x)'::lair.pair).v}, q{lower('[a,b)'::lair.span)}, q{('{(x)}'::lair.pair[])[1].v})
{
	my ($status, $out, $err) = $node->psql('postgres', "SET ROLE mallory; SELECT migrate.define('literal', 'lair.s', 'lair.t2', \$\$ id, $literal AS v \$\$)");
	like($err, qr/mapping contains a literal of type/, "refused: $literal");
}

# The superuser's own UPDATE of lair.t above ran the owner's triggers as the superuser: PostgreSQL's rule, not ours.
my $seen = $node->safe_psql('postgres', "SELECT string_agg(DISTINCT who || ' in ' || place, ', ') FROM lair.seen WHERE who <> 'mallory' AND NOT (who = current_user AND place IN ('on_target', 'domain', 'index'))");
is($seen, '', 'nobody but the owner ran the owner\'s code');
for my $place (qw(mapping operator filter reverse domain index default on_target))
{
	is($node->safe_psql('postgres', "SELECT count(*) > 0 FROM lair.seen WHERE who = 'mallory' AND place = '$place'"), 't', "… and the owner did, in $place");
}
unlike(PostgreSQL::Test::Utils::slurp_file($node->logfile), qr/lair: /, 'no role without rights ran it either');

$node->stop;
done_testing();

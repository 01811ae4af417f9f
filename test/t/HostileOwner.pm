# A hostile owner's tables: in every place where PostgreSQL runs code of a user it has some, and all of it writes to the
# server's log who it was run as. Places on the source begin with 's', on the target with 't'.
package HostileOwner;

use strict;
use warnings;

use Exporter 'import';
use MigrateTest;
use PostgreSQL::Test::Utils ();
use Test::More;

our @EXPORT = qw(plant planted_path enter look strangers places as_role verb start_and_wait $map);

# Names that must stay names.
our ($odd, $long) = (qq{"; SELECT lair.spy('', 'name'); --\nx}, 'é' x 31 . 'x');
our $map = <<'SQL';
id, lair.spy(v, 'mapping') AS v, "select" <+> 'x' AS "user", c::text AS c, lair.spy('constant', 'constant') AS k, d::text AS d, p
SQL

my $functions = <<'SQL';
CREATE TABLE now (phase text, escape boolean DEFAULT false);
INSERT INTO now VALUES ('plant');
GRANT SELECT ON now TO PUBLIC;
CREATE FUNCTION note(place text) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    RAISE LOG 'lair: %|%|%|%|%|', (SELECT n.phase FROM lair.now n), place, current_user, (SELECT r.rolsuper FROM pg_catalog.pg_roles r WHERE r.rolname = current_user), session_user;
END $$;
-- An IMMUTABLE function may not write, but may call one that does.
CREATE FUNCTION spy(v text, place text) RETURNS text IMMUTABLE LANGUAGE plpgsql AS $$ BEGIN PERFORM lair.note(place); RETURN v; END $$;
CREATE FUNCTION fair(v text, place text) RETURNS boolean IMMUTABLE LANGUAGE plpgsql AS $$
BEGIN
    PERFORM lair.note(place);
    IF v = 'constant' AND (SELECT n.escape FROM lair.now n) THEN  -- where a predicate is parsed
        PERFORM lair.note(place || ' constant');
        PERFORM lair.escape();
    END IF;
    RETURN v IS DISTINCT FROM 'bad x';
END $$;
CREATE FUNCTION plus(a text, b text) RETURNS text IMMUTABLE LANGUAGE plpgsql AS $$ BEGIN PERFORM lair.note('operator'); RETURN a || ' ' || b; END $$;
CREATE OPERATOR public.<+> (LEFTARG = text, RIGHTARG = text, FUNCTION = plus);
CREATE TYPE color AS ENUM ('red', 'green');
CREATE FUNCTION color_text(c color) RETURNS text IMMUTABLE LANGUAGE plpgsql AS $$ BEGIN PERFORM lair.note('cast'); RETURN CASE WHEN c OPERATOR(pg_catalog.=) 'red'::lair.color THEN 'r' ELSE 'g' END; END $$;
CREATE CAST (color AS text) WITH FUNCTION color_text(color) AS ASSIGNMENT;
CREATE DOMAIN number AS int CHECK (lair.fair(VALUE::text, 'key domain'));
CREATE DOMAIN s_text AS text CHECK (lair.fair(VALUE, 's domain'));
CREATE DOMAIN t_text AS text CHECK (lair.fair(VALUE, 't domain'));
CREATE TYPE pair AS (v s_text);
-- What a trigger might do to become more than it is, or to leave something behind that runs as somebody else later.
CREATE FUNCTION escape() RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    way text;
BEGIN
    FOREACH way IN ARRAY ARRAY['SET ROLE postgres', 'RESET ROLE', 'SET SESSION AUTHORIZATION DEFAULT', 'RESET SESSION AUTHORIZATION',
        'DECLARE left_behind CURSOR WITH HOLD FOR SELECT lair.note(''held cursor'')', 'CREATE TEMP TABLE s (id int)', 'PREPARE p AS SELECT lair.note(''prepared'')',
        'CREATE TEMP TABLE d (id int UNIQUE DEFERRABLE INITIALLY DEFERRED)', 'SET LOCAL search_path = lair', 'DISCARD PLANS'] LOOP
        BEGIN
            EXECUTE way;
            PERFORM lair.note('after ' || split_part(way, ' ', 1));
        EXCEPTION WHEN OTHERS THEN NULL;
        END;
    END LOOP;
END $$;
CREATE FUNCTION tell() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM lair.note(TG_ARGV[0] || ' trigger');
    IF (SELECT n.escape FROM lair.now n) THEN
        PERFORM lair.escape();
    END IF;
    RETURN NEW;
END $$;
SQL

my $tables = <<'SQL';
CREATE SEQUENCE s_id;
CREATE COLLATION NAME FROM "C";
CREATE TABLE s (id number PRIMARY KEY DEFAULT nextval('lair.s_id'), v text COLLATE NAME, "select" text CHECK (lair.fair("select", 's check')), c color DEFAULT 'red',
    d s_text DEFAULT lair.spy('d', 's default'), p pair DEFAULT '(x)'::pair, g text GENERATED ALWAYS AS (lair.spy("select", 's generated')) STORED, LONG int);
CREATE TABLE t (id number PRIMARY KEY, v text COLLATE NAME, "user" text, c text, k text, d t_text, p pair, x text DEFAULT lair.spy('x', 't default'),
    g text GENERATED ALWAYS AS (lair.spy("user", 't generated')) STORED, NAME int, CONSTRAINT NAME CHECK (lair.fair("user", 't check')));
SQL

# For s and t: what they have in common.
my $each = <<'SQL';
CREATE INDEX NAME_T ON T ((lair.spy(v, 'T index') || lair.spy('constant', 'T index constant')));
CREATE INDEX ON T (v) WHERE lair.spy('constant', 'T predicate') = 'constant' AND lair.spy(v, 'T predicate') IS NOT NULL;
CREATE INDEX ON T (d) WHERE array_length('{constant}'::T_text[], 1) IS NOT NULL;
CREATE STATISTICS T_statistics ON (lair.spy(v, 'T statistics')), id FROM T;
CREATE TRIGGER a BEFORE INSERT OR UPDATE ON T FOR EACH ROW EXECUTE FUNCTION tell('T before row');
CREATE TRIGGER b AFTER INSERT OR UPDATE OR DELETE ON T FOR EACH ROW EXECUTE FUNCTION tell('T after row');
CREATE TRIGGER c BEFORE INSERT OR UPDATE OR DELETE ON T FOR EACH STATEMENT EXECUTE FUNCTION tell('T before statement');
CREATE TRIGGER d AFTER INSERT OR UPDATE OR DELETE ON T FOR EACH STATEMENT EXECUTE FUNCTION tell('T after statement');
ALTER TABLE T ENABLE ROW LEVEL SECURITY;
CREATE POLICY p ON T TO clerk USING (lair.fair(v, 'T policy'));
GRANT SELECT, INSERT, UPDATE, DELETE ON T TO clerk;
SQL
# (Statistics of an expression are new in PostgreSQL 14.)
$each =~ s/\(lair\.spy\(v, 'T statistics'\)\)/v/ if server_major() < 14;
# (And views that keep to policies in 15.)
$each =~ s/^ALTER TABLE T ENABLE ROW LEVEL SECURITY;$//m if server_major() < 15;

# Functions and operators that fit the calls of the extension better than PostgreSQL's own, or come first in planted_path().
my $traps = <<'SQL';
DO $do$
DECLARE
    body text := $$ LANGUAGE plpgsql AS 'BEGIN PERFORM lair.note(''trap''); RETURN NULL; END'$$;
    types text[] := '{text,name,oid,regclass,regrole,int2,int4,int8,bool,"\"char\"",text[],int2[]}';
    call text;
    a text;
    b text;
BEGIN
    FOREACH call IN ARRAY ARRAY['md5(text) RETURNS text', 'quote_ident(text) RETURNS text', 'quote_ident(name) RETURNS text', 'format(text) RETURNS text', 'format(text, text) RETURNS text',
        'format(text, name) RETURNS text', 'format(text, regclass) RETURNS text', 'format(text, text, text) RETURNS text', 'format(text, VARIADIC text[]) RETURNS text', 'pg_has_role(regrole, oid, text) RETURNS boolean',
        'pg_has_role(oid, text) RETURNS boolean', 'concat_ws(text, VARIADIC text[]) RETURNS text', 'array_to_string(text[], text) RETURNS text', 'to_char(timestamptz, text) RETURNS text', 'clock_timestamp() RETURNS timestamptz',
        'now() RETURNS timestamptz', 'format_type(oid, int) RETURNS text', 'unnest(text[]) RETURNS text', 'cardinality(text[]) RETURNS int', 'current_setting(text) RETURNS text', 'set_config(text, text, boolean) RETURNS text'] LOOP
        EXECUTE 'CREATE FUNCTION lair.' || call || body;
    END LOOP;
    FOREACH a IN ARRAY types LOOP
        FOREACH b IN ARRAY types LOOP
            EXECUTE format('CREATE FUNCTION lair.trap(%s, %s) RETURNS boolean %s', a, b, body);
            PERFORM lair.run(format('CREATE OPERATOR %s.%s (LEFTARG = %s, RIGHTARG = %s, FUNCTION = lair.trap)', s, o, a, b)) FROM unnest('{public,lair}'::text[]) s, unnest('{=,<>,||}'::text[]) o;
        END LOOP;
    END LOOP;
END $do$;
SQL

# The tables of mallory, with $rows rows. Afterwards nothing has been logged yet.
sub plant
{
	my ($node, $rows) = @_;
	my %name = (NAME => quote($odd), LONG => quote($long));
	my $sql = $functions . $tables . join '', map { my $text = $each; $text =~ s/\bT\b/$_/g; $text =~ s/\bT_(statistics|text)/${_}_$1/g; $text =~ s/NAME_T/quote("$odd $_")/e; $text } qw(s t);
	$sql =~ s/\b(NAME|LONG)\b/$name{$1}/g;
	$node->safe_psql('postgres', <<"SQL");
CREATE ROLE mallory LOGIN;
CREATE ROLE clerk LOGIN;
GRANT CREATE ON SCHEMA public TO mallory;
CREATE SCHEMA lair AUTHORIZATION mallory;
GRANT USAGE ON SCHEMA lair TO clerk;
SELECT migrate.allow('mallory');
SET ROLE mallory;
SET search_path = lair, public;
$sql
INSERT INTO s SELECT g, 'v' || g, 's' FROM generate_series(1, $rows) g;
SELECT setval('s_id', $rows);
GRANT USAGE ON s_id TO clerk;
ANALYZE s;
CREATE FUNCTION lair.run(text) RETURNS void LANGUAGE plpgsql AS 'BEGIN EXECUTE \$1; END';
SET search_path = pg_catalog;
$traps
SQL
	return;
}

# In front of each call of the extension by a role: the worst search_path, and (as the owner) temporary objects.
sub planted_path
{
	my ($role) = @_;
	return "SET search_path = lair, public, pg_catalog;\n" if $role ne 'mallory';
	return <<'SQL';
DO $$
DECLARE
    name text;
BEGIN
    FOREACH name IN ARRAY '{_migration,_flow,_mapping,migration,progress,flow_1_forward,flow_2_forward,pg_class,pg_trigger,pg_constraint,s,t,through}'::text[] LOOP
        EXECUTE pg_catalog.format('CREATE TEMP VIEW %I AS SELECT lair.spy(NULL, %L) AS v, 1 AS id', name, 'trap');
    END LOOP;
    CREATE DOMAIN pg_temp.text AS pg_catalog.text CHECK (lair.fair(VALUE, 'trap'));
    CREATE FUNCTION pg_temp.format(pg_catalog.text, regclass) RETURNS pg_catalog.text LANGUAGE sql AS 'SELECT lair.spy(NULL, ''trap'')';
    CREATE OPERATOR pg_temp.= (LEFTARG = oid, RIGHTARG = regclass, FUNCTION = lair.trap);
END $$;
SET search_path = pg_temp, lair, public, pg_catalog;
SQL
}

sub quote { my ($name) = @_; $name =~ s/"/""/g; return qq{"$name"}; }

# The phase that what is logged from now on belongs to. escape: triggers try to break out.
sub enter
{
	my ($node, $phase, $escape) = @_;
	$node->safe_psql('postgres', "UPDATE lair.now SET phase = '$phase', escape = " . ($escape ? 'true' : 'false'));
	return;
}

# Everything logged so far: [phase, place, role, whether it is a superuser, session's role].
sub look
{
	my ($node) = @_;
	my $log = PostgreSQL::Test::Utils::slurp_file($node->logfile);
	my %seen;
	$seen{$1}++ while $log =~ /lair: ([^|\n]*\|[^|\n]*\|[^|\n]*\|[^|\n]*\|[^|\n]*)\|/g;
	return map { [ split /\|/, $_ ] } sort keys %seen;
}

# Who but the owner has run the owner's code, where PostgreSQL itself would not have had him do so. $allowed{phase} matches
# places in which whoever writes or reads a table runs its owner's code, with or without a migration.
sub strangers
{
	my ($node, $allowed) = @_;
	return map { join '|', @$_ } grep { $_->[2] ne 'mallory' && !($allowed->{ $_->[0] } && $_->[1] =~ $allowed->{ $_->[0] }) } look($node);
}

sub places
{
	my ($node, $phase, $role) = @_;
	my %places = map { $_->[1] => 1 } grep { $_->[0] =~ $phase && $_->[2] eq $role } look($node);
	return \%places;
}

# SQL as a role, in a session of its own. Dies on errors.
sub as_role
{
	my ($node, $role, $sql, $db) = @_;
	return $node->safe_psql($db // 'postgres', $sql, extra_params => [ '-U', $role ]);
}

# One verb as the role, with the traps set.
sub verb
{
	my ($node, $role, $phase, $sql, %option) = @_;
	enter($node, "$role: $phase", $option{escape});
	return as_role($node, $role, planted_path($role) . "\\set QUIET off\n$sql", $option{db});
}

# In between, a key is locked, so that the copy queues it.
sub start_and_wait
{
	my ($node, $role, $name, %option) = @_;
	my $locker = background($node, db => $option{db}, user => 'mallory');
	$locker->query_safe('BEGIN; SELECT FROM lair.s WHERE id = 5 FOR UPDATE');
	verb($node, $role, 'backfill', "SELECT migrate.start('$name');", escape => 1, %option);
	wait_for($node, 'a locked key is queued', 'SELECT count(*) > 0 FROM migrate._requeue', 't', $option{db});
	$locker->query_safe('COMMIT');
	$locker->quit;
	wait_phase($node, 'ready', $name, $option{db});
	return;
}

1;

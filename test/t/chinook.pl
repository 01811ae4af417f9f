# A real schema: Chinook. Customer is split into two tables by one migration of two flows, invoice and invoice_line keep their
# foreign keys, track moves to a table with another type and a computed column. Each goes to finalize.
use strict;
use warnings;
use FindBin;
use lib $FindBin::RealBin;

use MigrateTest;
use PostgreSQL::Test::Utils;
use Test::More;

my $file = $ENV{MIGRATE_CHINOOK} // "$FindBin::RealBin/../../../shared/data/chinook.sql";
if (!-r $file)
{
	note("chinook absent: $file cannot be read; give its place in MIGRATE_CHINOOK");
	pass('chinook absent');
	done_testing();
	exit;
}

my $node = new_server('chinook');
# Tables and data only: the file's own DROP and CREATE DATABASE are done here.
my $script = slurp_file($file);
$script =~ s/^(DROP|CREATE) DATABASE.*$//mg;
$script =~ s/^\\c.*$//mg;
my $copy = $node->basedir . '/chinook.sql';
append_to_file($copy, $script);
$node->safe_psql('postgres', 'CREATE DATABASE chinook');
my ($status, undef, $error) = $node->psql('chinook', "\\set ON_ERROR_STOP 1\n\\i $copy");
is($status, 0, 'chinook is loaded') or diag($error);
$node->safe_psql('chinook', 'CREATE EXTENSION migrate_ext');
my $customers = $node->safe_psql('chinook', 'SELECT count(*) FROM customer');
my $tracks = $node->safe_psql('chinook', 'SELECT count(*) FROM track');
my $lines = $node->safe_psql('chinook', 'SELECT count(*) FROM invoice_line JOIN invoice USING (invoice_id) JOIN customer USING (customer_id)');
cmp_ok($lines, '>', 0, "$customers customers, $tracks tracks, $lines invoice lines");

# start, ready, validated, over, back, over again; $differing is a query that counts rows that differ.
sub migrate
{
	my ($name, $differing, $write_source, $write_target) = @_;
	my $ask = sub { $node->safe_psql('chinook', $_[0]) };
	is($ask->("SELECT count(*) FROM migrate.preflight('$name') WHERE severity = 'error'"), 0, "$name: preflight has no error")
	  or note($ask->("SELECT * FROM migrate.preflight('$name') WHERE severity = 'error'"));
	like($ask->("SELECT migrate.plan('$name')"), qr/^#/m, "$name: the plan is Markdown");
	$ask->("SELECT migrate.start('$name')");
	is(error_of($node, "CALL migrate.wait('$name', timeout => '120 s')", db => 'chinook'), '', "$name: wait comes back");
	is(phase($node, $name, 'chinook'), 'ready', "$name: ready");
	is($ask->($differing), 0, "$name: no row differs when ready");
	$ask->($write_source);
	is($ask->($differing), 0, "$name: a write to the source is carried");
	for my $method (qw(counts sample checksum ranges rows))
	{
		is($ask->("SELECT bool_and(verdict = 'equal') FROM migrate.validate('$name', '$method')"), 't', "$name: validate by $method")
		  or note($ask->("SELECT * FROM migrate.validate('$name', '$method')"));
	}
	$ask->("SELECT migrate.cutover('$name')");
	is($ask->($differing), 0, "$name: no row differs after cutover");
	$ask->($write_target);
	is($ask->($differing), 0, "$name: a write to the target is carried back");
	$ask->("SELECT migrate.rollback('$name')");
	is($ask->($differing), 0, "$name: no row differs after rollback");
	$ask->($write_source);
	is($ask->($differing), 0, "$name: a write to the source is carried again");
	if ($name =~ /split/)    # what one target was written, the other has not got
	{
		like(error_of($node, "SELECT migrate.cutover('$name')", db => 'chinook'), qr/55000.*refused by gate validation.*migrate\.validate/s, "$name: to be validated anew");
		is($ask->("SELECT bool_and(verdict = 'equal') FROM migrate.validate('$name')"), 't', "$name: validate after rollback");
	}
	$ask->("SELECT migrate.cutover('$name')");
	is($ask->($differing), 0, "$name: no row differs after the second cutover");
	$ask->("SELECT migrate.finalize('$name', force => '$name')");
	is(phase($node, $name, 'chinook'), 'finalized', "$name: finalized");
	return;
}

# 1. customer -> customer_contact and customer_address.
$node->safe_psql('chinook', <<'SQL');
CREATE TABLE customer_contact (
    customer_id int PRIMARY KEY REFERENCES customer (customer_id),
    full_name   varchar(80) NOT NULL,
    email       varchar(60) NOT NULL,
    phone       varchar(24),
    company     varchar(80));
CREATE TABLE customer_address (
    customer_id int PRIMARY KEY REFERENCES customer (customer_id),
    address     varchar(70),
    city        varchar(40),
    state       varchar(40),
    country     varchar(40),
    postal_code varchar(10));
SELECT migrate.define('customer_split', source => 'customer', target => 'customer_contact',
    mapping => $$ customer_id, first_name || ' ' || last_name AS full_name, email, phone, company $$,
    reverse => $$ customer_id, split_part(full_name, ' ', 1)::varchar(40) AS first_name,
        substr(full_name, strpos(full_name, ' ') + 1)::varchar(20) AS last_name, email, phone, company $$,
    on_target_delete => 'keep');
SELECT migrate.add_flow('customer_split', source => 'customer', target => 'customer_address',
    mapping => $$ customer_id, address, city, state, country, postal_code $$, on_target_delete => 'keep');
SELECT migrate.set('customer_split', 'accept_reverse_gaps', 'on');
SQL
my $contacts = <<'SQL';
SELECT count(*) FROM customer c FULL JOIN customer_contact t USING (customer_id) FULL JOIN customer_address a USING (customer_id)
WHERE (c.first_name || ' ' || c.last_name, c.email, c.phone, c.company, c.address, c.city, c.state, c.country, c.postal_code)
    IS DISTINCT FROM (t.full_name::text, t.email, t.phone, t.company, a.address, a.city, a.state, a.country, a.postal_code)
SQL
migrate('customer_split', $contacts,
	"UPDATE customer SET phone = '+1 555', city = 'Elsewhere' WHERE customer_id % 7 = 0;
INSERT INTO customer (customer_id, first_name, last_name, email) SELECT max(customer_id) + 1, 'New', 'Customer', 'new\@example.com' FROM customer;
DELETE FROM customer WHERE customer_id = (SELECT max(customer_id) FROM customer) AND first_name = 'Old';",
	"UPDATE customer_contact SET full_name = 'Ada Lovelace', email = 'ada\@example.com' WHERE customer_id = 3;
UPDATE customer_address SET city = 'London', country = NULL WHERE customer_id % 5 = 0;");
is($node->safe_psql('chinook', "SELECT first_name || '/' || last_name FROM customer WHERE customer_id = 3"), 'Ada/Lovelace', 'the given reverse mapping was used');
is($node->safe_psql('chinook', 'SELECT count(*) FROM invoice_line JOIN invoice USING (invoice_id) JOIN customer USING (customer_id)'), $lines,
	'invoice and invoice_line are untouched');
like(error_of($node, 'DELETE FROM customer WHERE customer_id = 1', db => 'chinook'), qr/23503/, 'their foreign keys hold');

# 2. track -> track_v2: milliseconds become an interval, a price with tax is computed.
$node->safe_psql('chinook', <<'SQL');
CREATE TABLE track_v2 (
    track_id      bigint PRIMARY KEY,
    name          text NOT NULL,
    album_id      int REFERENCES album (album_id),
    media_type_id int NOT NULL REFERENCES media_type (media_type_id),
    genre_id      int REFERENCES genre (genre_id),
    composer      text,
    length        interval NOT NULL,
    bytes         bigint,
    unit_price    numeric(12, 4) NOT NULL,
    gross_price   numeric(12, 4) NOT NULL);
SELECT migrate.define('track_to_v2', source => 'track', target => 'track_v2',
    mapping => $$ track_id, name, album_id, media_type_id, genre_id, composer, milliseconds * interval '1 millisecond' AS length, bytes,
        unit_price, round(unit_price * 1.19, 4) AS gross_price $$,
    reverse => $$ track_id, name, album_id, media_type_id, genre_id, composer, (extract(epoch FROM length) * 1000)::int AS milliseconds,
        bytes, unit_price $$,
    on_target_delete => 'delete');
SQL
migrate('track_to_v2', <<'SQL',
SELECT count(*) FROM track s FULL JOIN track_v2 t USING (track_id)
WHERE (s.name::text, s.album_id, s.media_type_id, s.genre_id, s.composer::text, s.milliseconds * interval '1 millisecond', s.bytes::bigint, s.unit_price,
       round(s.unit_price * 1.19, 4))
    IS DISTINCT FROM (t.name, t.album_id, t.media_type_id, t.genre_id, t.composer, t.length, t.bytes, t.unit_price, t.gross_price)
SQL
	"UPDATE track SET milliseconds = milliseconds + 1, composer = NULL WHERE track_id % 11 = 0;
INSERT INTO track (track_id, name, media_type_id, milliseconds, unit_price) SELECT max(track_id) + 1, 'New', 1, 1000, 0.99 FROM track;
DELETE FROM track t WHERE NOT EXISTS (SELECT FROM invoice_line l WHERE l.track_id = t.track_id) AND NOT EXISTS (SELECT FROM playlist_track p WHERE p.track_id = t.track_id) AND name <> 'New';",
	"UPDATE track_v2 SET length = '00:03:20', unit_price = 1.49, gross_price = 1.7731 WHERE track_id % 13 = 0;
INSERT INTO track_v2 (track_id, name, media_type_id, length, unit_price, gross_price) SELECT max(track_id) + 1, 'Of v2', 1, '4 min', 1, 1.19 FROM track_v2;
DELETE FROM track_v2 WHERE name = 'Of v2';");
is($node->safe_psql('chinook', 'SELECT count(*) FROM invoice_line JOIN track USING (track_id)'), $node->safe_psql('chinook', 'SELECT count(*) FROM invoice_line'),
	'invoice lines still have their tracks');

$node->stop;
done_testing();

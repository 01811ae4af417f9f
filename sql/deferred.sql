-- Indexes and foreign keys that start sets aside for the copy: what is, what stays and why, that all comes back exactly as it was,
-- also by cancel, and how cancel leaves the rows.
\set VERBOSITY terse
SET client_min_messages = warning;
CREATE SCHEMA "Dé ""ferred";
SET search_path = "Dé ""ferred", public;

-- Polls until a condition holds. Each look is a transaction of its own: CREATE INDEX CONCURRENTLY waits for older ones.
CREATE PROCEDURE reaches(condition text, INOUT answer text DEFAULT 'no') LANGUAGE plpgsql AS $$
DECLARE
    holds boolean;
BEGIN
    FOR i IN 1 .. 600 LOOP
        EXECUTE 'SELECT ' || condition INTO holds;
        COMMIT;
        IF holds THEN
            answer := 'yes';
            RETURN;
        END IF;
        PERFORM pg_sleep(0.05);
        COMMIT;
    END LOOP;
    answer := (SELECT string_agg(format('no: %s, %s, %s, %s', p.phase, p.state, p.throttled_by, p.last_error), '; ') FROM migrate.progress p);
END $$;

CREATE TABLE genre (id int PRIMARY KEY, "na,me" text, UNIQUE (id, "na,me"));
CREATE TABLE song (id int PRIMARY KEY, title text, genre_id int REFERENCES genre, parent int);
INSERT INTO genre SELECT g, g::text FROM generate_series(1, 5) g;
INSERT INTO song SELECT g, 'song ' || g, 1 + g % 5, nullif(g - 1, 0) FROM generate_series(1, 300) g;
CREATE FUNCTION short(text) RETURNS text LANGUAGE sql IMMUTABLE AS 'SELECT left($1, 5)';
CREATE TABLE track (id int PRIMARY KEY REFERENCES song, title text, "gen""re" int, name text, parent int, u int UNIQUE);
CREATE INDEX track_title ON track (title text_pattern_ops DESC NULLS LAST) INCLUDE (parent) WITH (fillfactor = 70);
CREATE INDEX "tràck ""e" ON track (short(title), (parent + 1)) WHERE title <> 'x;''y' AND "gen""re" > 0;
ALTER INDEX "tràck ""e" ALTER COLUMN 2 SET STATISTICS 77;
COMMENT ON INDEX "tràck ""e" IS 'it''s the "second"';
CREATE INDEX track_hash ON track USING hash (title);
CREATE INDEX track_brin ON track USING brin (id) WITH (pages_per_range = 4);
CREATE INDEX track_tablespace ON track (parent) TABLESPACE pg_default;
CREATE UNIQUE INDEX track_unique ON track (u, id);
CREATE INDEX track_clustered ON track (u);
ALTER TABLE track CLUSTER ON track_clustered;
ALTER TABLE track ADD CONSTRAINT "to ""genre" FOREIGN KEY ("gen""re", name) REFERENCES genre (id, "na,me") MATCH FULL ON UPDATE CASCADE ON DELETE SET NULL DEFERRABLE;
ALTER TABLE track ADD CONSTRAINT itself FOREIGN KEY (parent) REFERENCES track ON DELETE RESTRICT;
ALTER TABLE track ADD CONSTRAINT unproven FOREIGN KEY (u) REFERENCES genre NOT VALID;
ALTER TABLE track ADD CONSTRAINT disabled FOREIGN KEY (u) REFERENCES song;
DO $$ BEGIN EXECUTE (SELECT string_agg(format('ALTER TABLE %s DISABLE TRIGGER %I', tgrelid::regclass, tgname), ';') FROM pg_trigger g JOIN pg_constraint k ON k.oid = g.tgconstraint
    WHERE k.conname = 'disabled' AND g.tgrelid = 'track'::regclass); END $$;
COMMENT ON CONSTRAINT itself ON track IS 'a tree';
-- Everything that can be said of the target's indexes and foreign keys, but their OIDs.
CREATE VIEW looks AS
    SELECT c.relname::text AS name, pg_get_indexdef(c.oid) AS definition, obj_description(c.oid, 'pg_class') AS comment,
           concat_ws(' ', (SELECT spcname FROM pg_tablespace t WHERE t.oid = c.reltablespace), CASE WHEN i.indisvalid THEN 'valid' END, CASE WHEN i.indisclustered THEN 'clustered' END,
               CASE WHEN i.indisready THEN 'ready' END, c.relowner::regrole = t.relowner::regrole,
               (SELECT string_agg(a.attname || ' ' || nullif(a.attstattarget, -1), ',' ORDER BY a.attnum) FROM pg_attribute a WHERE a.attrelid = c.oid)) AS details
    FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid JOIN pg_class t ON t.oid = i.indrelid WHERE i.indrelid = 'track'::regclass
    UNION ALL
    SELECT k.conname, pg_get_constraintdef(k.oid), obj_description(k.oid, 'pg_constraint'),
           concat_ws(' ', CASE WHEN k.convalidated THEN 'valid' END, k.conislocal, k.coninhcount, (SELECT count(*) FROM pg_trigger g WHERE g.tgconstraint = k.oid AND g.tgenabled = 'O'))
    FROM pg_constraint k WHERE k.conrelid = 'track'::regclass AND k.contype = 'f';

CREATE TABLE before AS SELECT * FROM looks;
CREATE VIEW differs AS SELECT * FROM ((TABLE before EXCEPT TABLE looks) UNION ALL (TABLE looks EXCEPT TABLE before)) x;

SELECT migrate.define('d', 'song', 'track', 'id, title, genre_id AS "gen""re", genre_id::text AS name, parent');
SELECT severity, message, hint FROM migrate.preflight('d') WHERE "check" = 'deferred' ORDER BY message COLLATE "C";
SELECT line FROM regexp_split_to_table(migrate.plan('d'), E'\n') line WHERE line ~ 'aside' ORDER BY line COLLATE "C";
SELECT migrate.set('d', 'defer_indexes', 'sometimes');
SELECT migrate.set('d', 'defer_indexes', 'off');
SELECT message, hint FROM migrate.preflight('d') WHERE "check" = 'deferred' AND message ~ 'title';
SELECT migrate.set('d', 'defer_indexes', 'default');
SELECT value FROM migrate.get('d', 'defer_indexes');

-- Start, undone: nothing has happened
BEGIN;
SELECT migrate.start('d');
SELECT name FROM looks ORDER BY name COLLATE "C";
ROLLBACK;
TABLE differs;
SELECT count(*) FROM migrate._deferred;

-- The whole way, the tables renamed meanwhile
SELECT migrate.set('d', 'max_rows_per_second', '1');
SELECT migrate.start('d');
SELECT name FROM looks ORDER BY name COLLATE "C";
SELECT why FROM migrate.events WHERE kind = 'set aside' AND migration = 'd' ORDER BY id;
SELECT message FROM migrate.preflight('d') WHERE "check" = 'deferred' ORDER BY message COLLATE "C" LIMIT 2;
SELECT severity, "check", message FROM migrate.preflight('d') WHERE severity = 'error';
CALL reaches($$ EXISTS (SELECT FROM migrate.migration WHERE name = 'd' AND phase = 'backfilling') $$);
ALTER TABLE song RENAME TO melody;
DELETE FROM melody WHERE id = 300;
SELECT migrate.finalize('d');
SELECT migrate.drop('d');
SELECT migrate.set('d', 'max_rows_per_second', 'none');
CALL reaches($$ EXISTS (SELECT FROM migrate.migration WHERE name = 'd' AND phase = 'ready') $$);
ALTER TABLE melody RENAME TO song;
TABLE differs;
SELECT state, count(*) FROM migrate._deferred GROUP BY state;
SELECT why FROM migrate.events WHERE kind = 'restored' AND migration = 'd' ORDER BY id;
SELECT count(*) FROM track;
DELETE FROM song WHERE id = 299;
SELECT count(*) FROM track;
BEGIN;
UPDATE migrate._deferred SET state = 'added' WHERE name = 'itself';
\set VERBOSITY default
SELECT migrate.cutover('d', skip => '{reverse,snapshots}');
\set VERBOSITY terse
ROLLBACK;

-- cancel: the target was empty, and its rows would have refused deletes of the source
SELECT migrate.cancel('d');
SELECT count(*) FROM track;
TABLE differs;
DELETE FROM song WHERE id = 298;
SELECT kind, why FROM migrate.events WHERE migration = 'd' AND kind ~ 'emptied';
SELECT migrate.drop('d');

-- … while all of it is aside
SELECT migrate.define('d', 'song', 'track', 'id, title, genre_id AS "gen""re", genre_id::text AS name, parent');
SELECT migrate.set('d', 'max_rows_per_second', '1');
SELECT migrate.start('d');
CALL reaches('EXISTS (SELECT FROM track)');
SELECT count(*) FROM migrate._deferred WHERE state = 'aside';
SELECT migrate.cancel('d');
SELECT count(*) FROM track;
TABLE differs;
SELECT migrate.drop('d');

-- A foreign key that the copied rows violate: failed, with the rows' query; retry goes on when they are mended
ALTER TABLE song DROP CONSTRAINT song_genre_id_fkey;
UPDATE song SET genre_id = 7 WHERE id IN (3, 4);
SELECT migrate.define('d', 'song', 'track', 'id, title, genre_id AS "gen""re", genre_id::text AS name, parent');
SELECT migrate.start('d');
CALL reaches($$ EXISTS (SELECT FROM migrate.migration WHERE name = 'd' AND failed_since IS NOT NULL) $$);
SELECT failed_reason FROM migrate.migration WHERE name = 'd';
SELECT substring(failed_reason, 'These rows: (.*); mend') AS query FROM migrate.migration WHERE name = 'd' \gset
SELECT id FROM (:query) x ORDER BY id;
SELECT migrate.cutover('d');
UPDATE song SET genre_id = 5 WHERE genre_id = 7;
SELECT migrate.retry('d');
CALL reaches($$ EXISTS (SELECT FROM migrate.migration WHERE name = 'd' AND phase = 'ready') $$);
TABLE differs;

-- From the cutover on the target has rows of its own: they stay
SELECT migrate.set('d', 'accept_reverse_gaps', 'on'), migrate.set('d', 'on_target_delete', 'delete');
SELECT migrate.cutover('d') ~ 'cut_over';
SELECT migrate.rollback('d') ~ 'ready';
\set VERBOSITY default
SELECT migrate.cancel('d');
\set VERBOSITY terse
SELECT count(*) FROM track;
SELECT migrate.drop('d');
TRUNCATE track CASCADE;

-- No foreign key to others: the rows stay, and what is aside is built without keeping anybody waiting
CREATE TABLE alone (id int PRIMARY KEY, title text, parent int CONSTRAINT up REFERENCES alone DEFERRABLE);
CREATE INDEX alone_title ON alone (title);
SELECT migrate.define('a', 'song', 'alone', 'id, title, parent');
SELECT migrate.set('a', 'max_rows_per_second', '1');
SELECT migrate.start('a');
CALL reaches('EXISTS (SELECT FROM alone)');
SELECT migrate.cancel('a');
CALL reaches($$ NOT EXISTS (SELECT FROM migrate._deferred WHERE state NOT IN ('restored', 'given_up')) $$);
SELECT pg_get_indexdef('alone_title'::regclass), (SELECT pg_get_constraintdef(oid) FROM pg_constraint WHERE conname = 'up'), (SELECT count(*) > 0 FROM alone);
SELECT migrate.drop('a');
TRUNCATE alone;

-- Referenced by another table: a few rows are deleted, none that others would lose
CREATE TABLE remark (track_id int REFERENCES alone);
ALTER TABLE alone ADD CONSTRAINT source FOREIGN KEY (id) REFERENCES song;
SELECT migrate.define('r', 'song', 'alone', 'id, title, parent');
SELECT migrate.start('r');
CALL reaches($$ EXISTS (SELECT FROM migrate.migration WHERE name = 'r' AND phase = 'ready') $$);
SELECT migrate.cancel('r'), migrate.drop('r');
SELECT count(*) FROM alone;
SELECT migrate.define('r', 'song', 'alone', 'id, title, parent');
SELECT migrate.start('r');
CALL reaches($$ EXISTS (SELECT FROM migrate.migration WHERE name = 'r' AND phase = 'ready') $$);
INSERT INTO remark VALUES (5);
\set VERBOSITY default
SELECT migrate.cancel('r');
\set VERBOSITY terse
SELECT count(*) FROM alone;
SELECT migrate.drop('r');
DROP TABLE remark;
TRUNCATE alone;

-- What cannot be made again stops nothing: said, with the statement; in the backfill it can be mended
SELECT migrate.define('g', 'song', 'alone', 'id, title, parent');
SELECT migrate.set('g', 'max_rows_per_second', '1');
SELECT migrate.start('g');
CALL reaches($$ EXISTS (SELECT FROM migrate.migration WHERE name = 'g' AND phase = 'backfilling') $$);
ALTER TABLE alone RENAME title TO called;
\set VERBOSITY default
SELECT migrate.cancel('g');
\set VERBOSITY terse
SELECT migrate.drop('g');
CREATE INDEX alone_title ON alone (called);
ALTER TABLE alone RENAME called TO title;
SELECT migrate.define('g', 'song', 'alone', 'id, title, parent');
SELECT migrate.start('g');
CREATE INDEX alone_title ON alone (title, parent);
CALL reaches($$ EXISTS (SELECT FROM migrate.migration WHERE name = 'g' AND failed_since IS NOT NULL) $$);
SELECT failed_reason FROM migrate.migration WHERE name = 'g';
DROP INDEX alone_title;
CREATE INDEX alone_title ON alone (title);
SELECT migrate.retry('g');
CALL reaches($$ EXISTS (SELECT FROM migrate.migration WHERE name = 'g' AND phase = 'ready') $$);
SELECT migrate.cancel('g'), migrate.drop('g');

-- Rows of an earlier migration are there: nothing is set aside, unless it is told to; cancel says what stays
CREATE TABLE shelf (place text, id int REFERENCES song, title text, PRIMARY KEY (place, id));
CREATE INDEX shelf_title ON shelf (title);
INSERT INTO shelf VALUES ('other', 1, 'a');
SELECT migrate.define('s', 'song', 'shelf', $$'here' AS place, id, title$$);
SELECT migrate.start('s');
SELECT to_regclass('shelf_title');
CALL reaches($$ EXISTS (SELECT FROM migrate.migration WHERE name = 's' AND phase = 'ready') $$);
\set VERBOSITY default
SELECT migrate.cancel('s');
\set VERBOSITY terse
SELECT migrate.drop('s');
DELETE FROM shelf WHERE place = 'here';
SELECT migrate.define('s', 'song', 'shelf', $$'here' AS place, id, title$$);
SELECT migrate.set('s', 'defer_indexes', 'on');
SELECT migrate.start('s');
SELECT count(*) FROM migrate._deferred;
CALL reaches($$ EXISTS (SELECT FROM migrate.migration WHERE name = 's' AND phase = 'ready') $$);
SELECT to_regclass('shelf_title'), count(*) FROM shelf;
SELECT migrate.cancel('s'), migrate.drop('s');

-- Owners without the rights to make it again: it stays
CREATE ROLE deferred_owner;
CREATE TABLE owned (id int PRIMARY KEY, title text, parent int REFERENCES song);
CREATE INDEX owned_title ON owned (title);
ALTER TABLE owned OWNER TO deferred_owner;
SELECT migrate.define('o', 'song', 'owned', 'id, title, parent');
SELECT message FROM migrate.preflight('o') WHERE "check" = 'deferred' ORDER BY message COLLATE "C";
GRANT USAGE, CREATE ON SCHEMA "Dé ""ferred" TO deferred_owner;
GRANT REFERENCES (id) ON song TO deferred_owner;
SELECT message FROM migrate.preflight('o') WHERE "check" = 'deferred' ORDER BY message COLLATE "C";
SELECT migrate.drop('o');
DROP TABLE owned;

-- Partitioned: it stays
CREATE TABLE parted (id int PRIMARY KEY, title text) PARTITION BY RANGE (id);
CREATE TABLE parted_all PARTITION OF parted DEFAULT;
CREATE INDEX parted_title ON parted (title);
SELECT migrate.define('p', 'song', 'parted', 'id, title');
SELECT message FROM migrate.preflight('p') WHERE "check" = 'deferred';
SELECT migrate.drop('p');
SELECT count(*) FROM migrate._deferred;

DROP SCHEMA "Dé ""ferred" CASCADE;
DROP ROLE deferred_owner;

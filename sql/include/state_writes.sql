-- Included by state.sql, once for each direction: writes to the side that serves (:w), in every way that makes events come in
-- another order, another number or another (sub)transaction than the states they lead to. After each, both sides are equal.

-- nested triggers: BEFORE and AFTER, on the same row, on siblings of the statement, on other rows, caught and not
CREATE TRIGGER a_before BEFORE INSERT OR UPDATE OR DELETE ON :w FOR EACH ROW EXECUTE FUNCTION state_test.meddle();
CREATE TRIGGER "A_after" AFTER INSERT OR UPDATE OR DELETE ON :w FOR EACH ROW EXECUTE FUNCTION state_test.meddle();
CREATE TRIGGER z_after AFTER INSERT OR UPDATE OR DELETE ON :w FOR EACH ROW EXECUTE FUNCTION state_test.meddle();
CREATE TRIGGER z_statement AFTER UPDATE ON :w REFERENCING NEW TABLE AS news FOR EACH STATEMENT EXECUTE FUNCTION state_test.meddle_all();
UPDATE :w SET n = 1, v = 'BEFORE new' WHERE id IN (1, 2);
UPDATE :w SET n = 2, v = 'BEFORE sibling' WHERE id IN (5, 3);
SELECT state_test.equal();
UPDATE :w SET n = 3, v = 'AFTER same' WHERE id BETWEEN 10 AND 12;
UPDATE :w SET n = 4, v = 'AFTER sibling' WHERE id BETWEEN 20 AND 23;
UPDATE :w SET n = 5, v = 'AFTER others' WHERE id BETWEEN 30 AND 33;
SELECT state_test.equal();
UPDATE :w SET n = 6, v = 'AFTER caught' WHERE id BETWEEN 40 AND 43;
UPDATE :w SET n = 7, v = 'AFTER caught deep' WHERE id BETWEEN 50 AND 53;
UPDATE :w SET n = 8, v = 'AFTER raise' WHERE id = 54;
UPDATE :w SET n = 9, v = 'STATEMENT all' WHERE id BETWEEN 60 AND 63;
INSERT INTO :w (id, v) VALUES (1001, 'AFTER same'), (1002, 'AFTER sibling'), (1003, 'AFTER gone'), (1004, 'AFTER moved');
DELETE FROM :w WHERE v = 'resurrect';
SELECT state_test.equal();
BEGIN;
SAVEPOINT a; UPDATE :w SET v = 'AFTER others' WHERE id = 34; SAVEPOINT b; UPDATE :w SET v = 'AFTER raise' WHERE id = 35; ROLLBACK TO b;
UPDATE :w SET v = 'AFTER caught' WHERE id IN (44, 45); RELEASE b; ROLLBACK TO a; UPDATE :w SET v = 'AFTER caught deep' WHERE id = 55; COMMIT;
SELECT state_test.equal(), count(*) FILTER (WHERE v LIKE 'by %') > 10 AS meddled, count(*) FILTER (WHERE v = 'never') AS never FROM :w;
DROP TRIGGER a_before ON :w; DROP TRIGGER "A_after" ON :w; DROP TRIGGER z_after ON :w; DROP TRIGGER z_statement ON :w;

-- savepoints: rolled back, nested, released and then rolled back with the one around; a row that comes, goes and comes again
BEGIN; SAVEPOINT a; DELETE FROM :w WHERE id = 70; SAVEPOINT b; INSERT INTO :w (id, v) VALUES (70, 'again'); ROLLBACK TO b; RELEASE b; SAVEPOINT c; UPDATE :w SET id = 7000 WHERE id = 71; RELEASE c; ROLLBACK TO a; UPDATE :w SET v = 'after all' WHERE id IN (70, 71); COMMIT;
BEGIN; UPDATE :w SET id = 7200 WHERE id = 72; SAVEPOINT a; UPDATE :w SET id = 72 WHERE id = 7200; UPDATE :w SET id = 7201 WHERE id = 72; ROLLBACK TO a; INSERT INTO :w (id, v) VALUES (72, 'another'); COMMIT;
BEGIN; SAVEPOINT a; SAVEPOINT b; SAVEPOINT c; UPDATE :w SET v = 'deep' WHERE id = 73; RELEASE a; SAVEPOINT a; DELETE FROM :w; ROLLBACK TO a; COMMIT;
DO $$
BEGIN
    FOR i IN 74 .. 79 LOOP
        BEGIN
            EXECUTE format('UPDATE %s SET v = ''loop'', id = CASE WHEN id %% 2 = 0 THEN id + 7400 ELSE id END WHERE id = %s', current_setting('state_test.w'), i);
            IF i > 76 THEN RAISE 'undo'; END IF;
        EXCEPTION WHEN raise_exception THEN NULL;
        END;
    END LOOP;
END $$;
SELECT state_test.equal();

-- cursors, several writes in one statement, conflicts, a view, what MERGE does
BEGIN; DECLARE c CURSOR FOR SELECT * FROM :w WHERE id BETWEEN 80 AND 83 ORDER BY id FOR UPDATE; FETCH 1 FROM c; UPDATE :w SET v = 'current of' WHERE CURRENT OF c; MOVE 1 FROM c; DELETE FROM :w WHERE CURRENT OF c; MOVE 1 FROM c; UPDATE :w SET id = 8000 WHERE CURRENT OF c; COMMIT;
WITH gone AS (DELETE FROM :w WHERE id IN (84, 85) RETURNING *), moved AS (INSERT INTO :w (id, v) SELECT id + 8000, v FROM gone RETURNING id), other AS (UPDATE :w SET v = 'cte' WHERE id = 86 RETURNING id)
    UPDATE :w SET n = (SELECT count(*) FROM moved) WHERE id = 87;
INSERT INTO :w AS x (id, v) VALUES (88, 'upsert'), (8800, 'upsert') ON CONFLICT (id) DO UPDATE SET v = excluded.v || ' over ' || x.v, id = x.id + 880000;
INSERT INTO :w (id, v) VALUES (89, 'no'), (8900, 'yes') ON CONFLICT DO NOTHING;
INSERT INTO :w AS x (id, v) VALUES (90, 'no') ON CONFLICT (id) DO UPDATE SET v = 'never' WHERE x.v = 'is not';
CREATE TEMP VIEW through AS SELECT id AS key, v AS value FROM :w WHERE id BETWEEN 91 AND 99 WITH CHECK OPTION;
UPDATE through SET value = 'by view' WHERE key = 91; DELETE FROM through WHERE key = 92; INSERT INTO through VALUES (92, 'by view'); DELETE FROM through WHERE key = 95; UPDATE through SET key = 95 WHERE key = 92;
UPDATE through SET key = 9999 WHERE key = 93;
DROP VIEW through;
DO $$
BEGIN
    IF current_setting('server_version_num')::int >= 150000 THEN
        EXECUTE format('MERGE INTO %s x USING (VALUES (94, 1), (96, 2), (9600, 3)) y (id, n) ON x.id = y.id WHEN MATCHED AND y.n = 1 THEN DELETE WHEN MATCHED THEN UPDATE SET id = x.id + 960000, n = y.n WHEN NOT MATCHED THEN INSERT (id, n) VALUES (y.id, y.n)', current_setting('state_test.w'));
    END IF;
END $$;
SELECT state_test.equal();

-- values: NULL and back (the mapping reads NULL as ''), long values that stay, change, shrink and move with the key
UPDATE :w SET v = NULL WHERE id IN (100, 101); UPDATE :w SET v = '' WHERE id = 101; UPDATE :w SET v = 'x', n = NULL WHERE id = 100; UPDATE :w SET n = 1 WHERE n IS NULL AND id < 110;
INSERT INTO :w (id, v, long) SELECT g, 'long', state_test.long_text(g) FROM generate_series(2001, 2006) g;
UPDATE :w SET v = 'other column' WHERE id = 2001; UPDATE :w SET long = long || 'x' WHERE id = 2002; UPDATE :w SET long = 'short' WHERE id = 2003; UPDATE :w SET long = NULL WHERE id = 2004;
UPDATE :w SET id = 20050 WHERE id = 2005; UPDATE :w SET long = (SELECT long FROM :w WHERE id = 2002) WHERE id = 2006; UPDATE :w SET long = state_test.long_text(1) WHERE id = 101;
SELECT state_test.equal();

-- two-phase commit (where the server has it turned on)
SELECT current_setting('max_prepared_transactions')::int > 0 AS two_phase \gset
\if :two_phase
BEGIN; UPDATE :w SET v = 'prepared' WHERE id = 110; DELETE FROM :w WHERE id = 111; UPDATE :w SET id = 11200 WHERE id = 112; SAVEPOINT a; DELETE FROM :w WHERE id = 113; ROLLBACK TO a; PREPARE TRANSACTION 'kept';
BEGIN; UPDATE :w SET v = 'prepared' WHERE id = 114; DELETE FROM :w WHERE id = 115; PREPARE TRANSACTION 'lost';
\endif
UPDATE :w SET v = 'between' WHERE id = 116;
SELECT state_test.equal();
\if :two_phase
COMMIT PREPARED 'kept'; ROLLBACK PREPARED 'lost';
\endif
SELECT state_test.equal();

-- whole tables: COPY, and COPY FREEZE into a table that was truncated in the same transaction
COPY :w (id, v, n) FROM stdin;
3001	copied	\N
3002	\N	2
\.
BEGIN; TRUNCATE :w; INSERT INTO :w (id, v) VALUES (1, 'undone'); ROLLBACK;
SELECT state_test.equal();
CREATE TEMP TABLE saved AS TABLE :w;
BEGIN; SAVEPOINT a; TRUNCATE :w; INSERT INTO :w (id, v) VALUES (1, 'undone'); ROLLBACK TO a; DELETE FROM :w WHERE id = 120; COMMIT;
SELECT state_test.equal();
BEGIN;
TRUNCATE :w;
COPY :w (id, v, n) FROM stdin WITH (FREEZE);
4001	frozen	1
4002	frozen	2
\.
COMMIT;
SELECT state_test.equal(), count(*) FROM :w;
UPDATE :w SET v = 'thawed' WHERE id = 4001; DELETE FROM :w WHERE id = 4002;
BEGIN; TRUNCATE :w; INSERT INTO :w TABLE saved; COMMIT;
DROP TABLE saved;
SELECT state_test.equal(), count(*) > 100 AS rows FROM :w;

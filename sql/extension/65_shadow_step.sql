-- Shadow reads, step by step: how many are due, what they have found, and the gate of cutover. The reads themselves: 65_shadow_read.sql.

-- The run that a step of this flow belongs to, begun where there is none or where it is of an earlier stay in the phase.
CREATE FUNCTION migrate._shadow_run(m migrate._migration, f migrate._flow, in_direction text) RETURNS migrate._shadow
LANGUAGE plpgsql AS $$
DECLARE
    s migrate._shadow;
BEGIN
    DELETE FROM migrate._shadow x WHERE x.flow = f.id AND x.direction = in_direction
        AND (x.refused OR x.since < migrate._shadow_begin(m));
    IF FOUND THEN
        DELETE FROM migrate._shadow_mismatch x WHERE x.flow = f.id AND x.direction = in_direction;
    END IF;
    INSERT INTO migrate._shadow (flow, direction, last_xid) VALUES (f.id, in_direction, pg_snapshot_xmin(pg_current_snapshot())::text::bigint) ON CONFLICT DO NOTHING;
    SELECT * INTO s FROM migrate._shadow x WHERE x.flow = f.id AND x.direction = in_direction;
    RETURN s;
END $$;

-- Forgets what shadow reads have found: rows were mended since, and what is still wrong will be found again. (The worker's step that is
-- under way meanwhile is refused by its snapshot, and tried again.)
CREATE FUNCTION migrate._shadow_anew(m migrate._migration) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
    DELETE FROM migrate._shadow s USING migrate._flow f WHERE f.id = s.flow AND f.migration = m.id;
    DELETE FROM migrate._shadow_mismatch s USING migrate._flow f WHERE f.id = s.flow AND f.migration = m.id;
END $$;

-- Since when shadow reads count: the last time the migration came into phase shadowing or was cut over.
CREATE FUNCTION migrate._shadow_begin(m migrate._migration) RETURNS timestamptz
LANGUAGE sql STABLE AS $$
    SELECT coalesce(max(e.at), '-infinity') FROM migrate._event e
    WHERE e.migration = m.id AND e.to_phase = CASE m.phase WHEN 'cut_over' THEN 'cut_over' ELSE 'shadowing' END
$$;

-- One flow's share of a step: so many keys as are due by now, in at most 200 ms.
CREATE FUNCTION migrate._shadow_flow(m migrate._migration, f migrate._flow, in_direction text) RETURNS migrate._shadow
LANGUAGE plpgsql AS $$
DECLARE
    s migrate._shadow := migrate._shadow_run(m, f, in_direction);
    q migrate._shadow_query := migrate._shadow_query(f, in_direction);
    again migrate._shadow_query := migrate._shadow_again(f, in_direction);
    began timestamptz := clock_timestamp();
    shadow_ms numeric := greatest(migrate._opt_ms(m.id, 'shadow_time'), 1);
    xids bigint := pg_snapshot_xmax(pg_current_snapshot())::text::bigint - s.last_xid;
    due integer;
    most numeric := migrate._opt(m.id, 'max_shadow_mismatch_rate')::numeric;
    was_good boolean := s.mismatches <= most * s.reads;
    picked record;
    result record;
BEGIN
    IF m.phase <> 'shadowing' AND s.active_ms >= shadow_ms AND was_good THEN
        UPDATE migrate._shadow x SET since = DEFAULT, active_ms = 0, earlier_reads = x.earlier_reads + x.reads, picked = 0, reads = 0, recent_reads = 0,
            mismatches = 0, source_ms = 0, source_max_ms = 0, target_ms = 0, target_max_ms = 0
        WHERE x.flow = s.flow AND x.direction = s.direction RETURNING * INTO s;
    END IF;
    s.active_ms := s.active_ms + least(extract(epoch FROM began - s.stepped_at)::numeric * 1000, 5000);
    s.stepped_at := began;
    s.last_xid := pg_snapshot_xmin(pg_current_snapshot())::text::bigint;
    s.planned := ceil(migrate._opt(m.id, 'shadow_rate')::numeric * migrate._shadow_rows(f, in_direction));
    -- After shadow_time it goes on at the same pace for as long as shadow_rate is set.
    due := least(200, ceil(s.planned * s.active_ms / shadow_ms) - s.picked);
    IF due > 0 AND q.actual IS NOT NULL THEN
        FOR picked IN
            SELECT p.key[:cardinality(p.key) - 1] AS key, p.key[cardinality(p.key)] = 'recent' AS recent
            FROM (SELECT k FROM migrate._shadow_pick(q.origin, q.origin_key, 'true', (due + 1) / 2, (due + 7) / 8, xids) AS k
                  UNION ALL
                  SELECT k FROM migrate._shadow_pick(q.dest, q.dest_key, q.dest_share, CASE WHEN q.same_text THEN (due + 3) / 4 ELSE 0 END,
                                                     CASE WHEN q.same_text THEN (due + 7) / 8 ELSE 0 END, xids) AS k) AS p(key)
        LOOP
            EXIT WHEN clock_timestamp() > began + interval '200 ms';
            s.picked := s.picked + 1;
            CONTINUE WHEN migrate._shadow_is_known(f, in_direction, picked.key);
            result := migrate._shadow_read(q, again, picked.key);
            -- @point shadow: key read
            s.reads := s.reads + 1;
            s.recent_reads := s.recent_reads + picked.recent::integer;
            s.source_ms := s.source_ms + coalesce(result.source_ms, 0);
            s.target_ms := s.target_ms + coalesce(result.target_ms, 0);
            s.source_max_ms := greatest(s.source_max_ms, result.source_ms);
            s.target_max_ms := greatest(s.target_max_ms, result.target_ms);
            IF result.kind IS NOT NULL THEN
                s.mismatches := s.mismatches + 1;
                INSERT INTO migrate._shadow_mismatch (flow, direction, key, kind, columns, sqlstate)
                SELECT f.id, in_direction, picked.key, result.kind, result.differing, result.refusal
                WHERE s.mismatches <= 1000 AND NOT EXISTS
                    (SELECT FROM migrate._shadow_mismatch x WHERE x.flow = f.id AND x.direction = in_direction AND x.key = picked.key);
            END IF;
        END LOOP;
    END IF;
    UPDATE migrate._shadow x SET stepped_at = s.stepped_at, active_ms = s.active_ms, last_xid = s.last_xid, planned = s.planned, picked = s.picked,
        reads = s.reads, recent_reads = s.recent_reads, mismatches = s.mismatches, source_ms = s.source_ms, source_max_ms = s.source_max_ms,
        target_ms = s.target_ms, target_max_ms = s.target_max_ms
    WHERE x.flow = s.flow AND x.direction = s.direction;
    -- @point shadow: figures written
    IF m.phase <> 'shadowing' AND was_good AND s.mismatches > most * s.reads THEN
        PERFORM migrate._event(m, NULL, 'shadow', format('%s of %s keys differ in flow %s', s.mismatches, s.reads, f.name));
    END IF;
    RETURN s;
END $$;

-- Rows of a flow, for shadow_rate to be a share of: what the backfill has copied, or the planner's estimate where it is more.
CREATE FUNCTION migrate._shadow_rows(f migrate._flow, in_direction text) RETURNS bigint
LANGUAGE sql STABLE AS $$
    SELECT greatest((SELECT coalesce(sum(r.rows_done), 0) FROM migrate._range r WHERE r.flow = f.id),
                    (SELECT coalesce(sum(c.reltuples) FILTER (WHERE c.reltuples > 0), 0)
                     FROM migrate._partition_tree(CASE in_direction WHEN 'forward' THEN f.source ELSE f.target END) t(relid) JOIN pg_class c ON c.oid = t.relid AND c.relkind = 'r'), 1)::bigint
$$;

-- Keys in _failure or _requeue differ by what is known already.
CREATE FUNCTION migrate._shadow_is_known(f migrate._flow, in_direction text, key text[]) RETURNS boolean
LANGUAGE sql STABLE AS $$
    WITH own AS (SELECT array_agg(key[i] ORDER BY i) AS key FROM migrate._mapping p, generate_subscripts(p.key_dest, 1) i
                 WHERE p.flow = f.id AND p.direction = in_direction AND p.key_origin[i] > 0)
    SELECT EXISTS (SELECT FROM migrate._failure x, own WHERE x.flow = f.id AND x.direction = in_direction AND x.key = own.key)
        OR EXISTS (SELECT FROM migrate._requeue x, own WHERE in_direction = 'forward' AND x.flow = f.id AND x.key = own.key)
$$;

-- One step, in a REPEATABLE READ transaction of its own: both sides of every comparison are read in one snapshot.
-- 'more'; in phase shadowing also 'done' after shadow_time, or 'mismatch: …' as soon as too many keys differ.
CREATE FUNCTION migrate._shadow_step(migration_id integer) RETURNS text
LANGUAGE plpgsql AS $$
DECLARE
    m migrate._migration;
    f migrate._flow;
    s migrate._shadow;
    in_direction text;
    most numeric := migrate._opt(migration_id, 'max_shadow_mismatch_rate')::numeric;
    all_done boolean := true;
    verdict text;
BEGIN
    SELECT * INTO m FROM migrate._migration x WHERE x.id = migration_id;
    in_direction := CASE m.phase WHEN 'cut_over' THEN 'reverse' ELSE 'forward' END;
    FOR f IN SELECT * FROM migrate._flow x WHERE x.migration = migration_id ORDER BY x.id LOOP
        s := migrate._shadow_flow(m, f, in_direction);
        -- Time is not enough where a worker had no time to read; but where there is nothing to read, it is. A pause does not count.
        all_done := all_done AND s.active_ms >= migrate._opt_ms(m.id, 'shadow_time')
            AND (s.picked >= least(s.planned, 1000) OR s.active_ms >= 2 * migrate._opt_ms(m.id, 'shadow_time') + 1000
                 OR NOT EXISTS (SELECT FROM migrate._partition_tree(f.source) t(relid) WHERE pg_relation_size(t.relid) > 0));
        IF m.phase = 'shadowing' AND s.mismatches > most * greatest(s.planned, s.reads) THEN
            UPDATE migrate._shadow x SET refused = true WHERE x.flow = s.flow AND x.direction = s.direction;
            verdict := coalesce(verdict || '; ', 'mismatch: ') || format('%s of %s keys differ in flow %s, rate %s > %s (max_shadow_mismatch_rate)',
                s.mismatches, s.reads, f.name, migrate._shadow_rate(s), most);
        END IF;
    END LOOP;
    RETURN CASE WHEN verdict IS NOT NULL THEN verdict WHEN m.phase = 'shadowing' AND all_done THEN 'done' ELSE 'more' END;
END $$;

CREATE FUNCTION migrate._shadow_rate(s migrate._shadow) RETURNS numeric
LANGUAGE sql IMMUTABLE AS $$ SELECT trim_scale(round(s.mismatches::numeric / greatest(s.reads, 1), 6)) $$;

-- NULL when shadow reads are no reason against a cutover, else the reason with value and limit.
CREATE FUNCTION migrate._shadow_gate(m_id integer) RETURNS text
LANGUAGE plpgsql STABLE AS $$
DECLARE
    m migrate._migration;
    rate numeric := migrate._opt(m_id, 'shadow_rate')::numeric;
    most numeric := migrate._opt(m_id, 'max_shadow_mismatch_rate')::numeric;
BEGIN
    SELECT * INTO m FROM migrate._migration x WHERE x.id = m_id;
    RETURN (
        SELECT string_agg(CASE WHEN coalesce(s.earlier_reads + s.reads, 0) = 0 THEN format('no shadow read of flow %s yet (shadow_rate %s)', f.name, rate)
                               ELSE format('shadow reads: %s of %s keys differ in flow %s, rate %s > %s (max_shadow_mismatch_rate)',
                                           s.mismatches, s.reads, f.name, migrate._shadow_rate(s), most) END, '; ' ORDER BY f.id)
        FROM migrate._flow f LEFT JOIN migrate._shadow s ON s.flow = f.id AND s.direction = 'forward' AND s.since >= migrate._shadow_begin(m)
        WHERE f.migration = m_id
          AND ((s.reads > 0 AND s.mismatches > most * s.reads)
               OR (rate > 0 AND coalesce(s.earlier_reads + s.reads, 0) = 0 AND EXISTS (SELECT FROM migrate._partition_tree(f.source) t(relid) WHERE pg_relation_size(t.relid) > 0))));
END $$;

CREATE FUNCTION migrate._shadow(caller regrole, name text, rate double precision) RETURNS text
LANGUAGE plpgsql AS $$
DECLARE
    change text := 'shadow_rate ' || migrate._set(caller, name, 'shadow_rate', rate::text);
    m migrate._migration := migrate._find(caller, name);
BEGIN
    IF rate > 0 THEN
        PERFORM migrate._launch(m);
    END IF;
    RETURN change;
END $$;

CREATE VIEW migrate.shadow_reads WITH (security_barrier) AS
    SELECT m.name AS migration, f.name AS flow, s.direction, s.since, s.planned, s.earlier_reads, s.reads, s.recent_reads, s.mismatches,
           round(s.mismatches::numeric / nullif(s.reads, 0), 6) AS mismatch_rate,
           round((s.source_ms / nullif(s.reads, 0))::numeric, 3) AS source_avg_ms, round(s.source_max_ms::numeric, 3) AS source_max_ms,
           round((s.target_ms / nullif(s.reads, 0))::numeric, 3) AS target_avg_ms, round(s.target_max_ms::numeric, 3) AS target_max_ms
    FROM migrate._shadow s JOIN migrate._flow f ON f.id = s.flow JOIN migrate._migration m ON m.id = f.migration
    WHERE pg_has_role(m.owner, 'MEMBER');
COMMENT ON VIEW migrate.shadow_reads IS
    'shadow reads of your migrations: keys read, how many differ, and the time a read by key takes on either side (planning included)';

CREATE VIEW migrate.shadow_mismatches WITH (security_barrier) AS
    SELECT m.name AS migration, f.name AS flow, x.direction, array_to_string(x.key, ', ', 'NULL') AS key, x.kind, x.columns, x.sqlstate, x.found_at
    FROM migrate._shadow_mismatch x JOIN migrate._flow f ON f.id = x.flow JOIN migrate._migration m ON m.id = f.migration
    WHERE pg_has_role(m.owner, 'MEMBER');
COMMENT ON VIEW migrate.shadow_mismatches IS 'keys that shadow reads found to differ, at most 1000 for each flow; repair() looks again at what validate() finds';

-- What src/catalog.cpp loads: the mapping's row with everything that the primitive and the triggers must know, read from the
-- catalogs at that time.
CREATE FUNCTION migrate._load_mapping(flow integer, direction text)
RETURNS TABLE (migration integer, view regclass, origin regclass, dest regclass, dest_owner oid, columns int2[], reads int2[],
    key_dest int2[], key_origin int2[], key_view int2[], key_const text[], shared regclass[], shared_key int2[], filtered boolean,
    ambiguous boolean, partial boolean, carry_delete boolean, delete_at_once boolean, insert_at_once boolean,
    upsert_may_fail boolean, delete_may_fail boolean, strict boolean,
    both_directions boolean)
LANGUAGE sql STABLE AS $$
    SELECT f.migration, m.view, m.origin, m.dest, migrate._table_owner(m.dest)::oid, m.columns, m.reads,
        m.key_dest, m.key_origin, m.key_view, m.key_const,
        coalesce(siblings.views, '{}'), coalesce(siblings.keys, '{}'), m.filtered,
        NOT EXISTS (SELECT FROM pg_index i WHERE i.indrelid = m.origin AND i.indisunique AND i.indimmediate
                    AND i.indnkeyatts = (SELECT count(*) FROM unnest(m.key_origin) k WHERE k > 0)
                    AND (SELECT bool_and(a = ANY (m.key_origin)) FROM unnest(i.indkey[0:i.indnkeyatts - 1]) a)),
        EXISTS (SELECT FROM pg_attribute d WHERE d.attrelid = m.dest AND d.attnum > 0 AND NOT d.attisdropped AND d.attnotnull
                AND NOT d.atthasdef AND d.attidentity = '' AND NOT d.attnum = ANY (m.columns)),
        m.direction = 'forward' OR f.on_target_delete IS NOT DISTINCT FROM 'delete',
        EXISTS (SELECT FROM pg_constraint c WHERE c.contype = 'f' AND c.conrelid = m.dest AND c.confrelid = m.origin),
        EXISTS (SELECT FROM pg_constraint c WHERE c.contype = 'f' AND c.conrelid = m.origin AND c.confrelid = m.dest),
        may.upsert_may_fail, may.delete_may_fail, migrate._opt(f.migration, 'dual_write') = 'strict',
        (SELECT g.both_directions FROM migrate._migration g WHERE g.id = f.migration)
    FROM migrate._mapping m
    JOIN migrate._flow f ON f.id = m.flow
    CROSS JOIN LATERAL migrate._may_fail(m) may
    CROSS JOIN LATERAL (
        SELECT array_agg(s.view ORDER BY s.flow) FILTER (WHERE k.i = 1) AS views, array_agg(k.position ORDER BY s.flow, k.i) AS keys
        FROM (SELECT s.flow, s.view, s.columns FROM migrate._mapping s JOIN migrate._flow g ON g.id = s.flow
              WHERE m.direction = 'forward' AND s.direction = 'forward' AND s.dest = m.dest AND s.flow <> m.flow AND g.migration = f.migration) s
        CROSS JOIN LATERAL (SELECT i, array_position(s.columns, m.key_dest[i])::int2 AS position FROM generate_subscripts(m.key_dest, 1) i) k) siblings
    WHERE m.flow = _load_mapping.flow AND m.direction = _load_mapping.direction
$$;

-- Preflight checks of each flow: key, columns, constraints, triggers, what cutover leaves behind, what cannot be carried back.

-- A cast that somebody has made between a key's type and text; NULL: there is none. Keys are kept as text, for checkpoints, ranges, the
-- re-queue: such a cast would be taken instead of the type's own output and input, may lose what it likes, and runs anybody's function.
CREATE FUNCTION migrate._text_cast(type oid) RETURNS text
LANGUAGE plpgsql STABLE AS $$
DECLARE
    base pg_type;
BEGIN
    SELECT t.* INTO base FROM migrate._plain_type(_text_cast.type, -1) p JOIN pg_type t ON t.oid = p.type;
    RETURN (SELECT min(format('CAST (%s AS %s)', format_type(c.castsource, -1), format_type(c.casttarget, -1))) FROM pg_cast c
            WHERE c.oid >= 16384  -- not PostgreSQL's own
              AND (c.castsource IN (base.oid, base.typarray) AND c.casttarget = 'text'::regtype OR c.castsource = 'text'::regtype AND c.casttarget IN (base.oid, base.typarray)));
END $$;

CREATE FUNCTION migrate._check_key(m migrate._migration) RETURNS SETOF migrate._check
LANGUAGE sql STABLE AS $$
    WITH k AS (
        SELECT f.name AS flow, p.*, i.indexrelid, i.indrelid, i.indisvalid, i.indisready, i.indisunique, i.indimmediate, i.indpred, i.indexprs,
               ARRAY(SELECT o FROM unnest(p.key_origin) AS o WHERE o > 0) AS bare
        FROM migrate._flow f JOIN migrate._mapping p ON p.flow = f.id AND p.direction = 'forward'
        JOIN pg_class d ON d.oid = p.dest JOIN pg_class o ON o.oid = p.origin
        LEFT JOIN pg_index i ON i.indexrelid = migrate._key_index(p.dest, p.key_dest) AND i.indrelid = p.dest
        WHERE f.migration = m.id)
    SELECT 'key_index', 'error', format('target %s has no usable key: %s', k.dest, CASE
               WHEN k.indexrelid IS NULL THEN format('the unique index over (%s) is gone', migrate._column_list(k.dest, k.key_dest))
               WHEN NOT k.indisvalid OR NOT k.indisready THEN format('index %s is invalid', k.indexrelid::regclass)
               WHEN NOT k.indisunique THEN format('index %s is not unique', k.indexrelid::regclass)
               WHEN NOT k.indimmediate THEN format('%s is deferrable', k.indexrelid::regclass)
               WHEN k.indpred IS NOT NULL THEN format('index %s is partial', k.indexrelid::regclass)
               WHEN k.indexprs IS NOT NULL THEN format('index %s is over expressions', k.indexrelid::regclass)
               ELSE format('key column %s is nullable', n.nullable) END),
           CASE WHEN k.indexrelid IS NOT NULL AND k.indisunique AND k.indisvalid AND k.indimmediate AND k.indpred IS NULL AND k.indexprs IS NULL
                THEN format('ALTER TABLE %s ALTER %s SET NOT NULL;', k.dest, n.nullable)
                WHEN k.indexrelid IS NOT NULL AND NOT k.indisvalid THEN format('REINDEX INDEX CONCURRENTLY %s;', k.indexrelid::regclass)
                ELSE format('ALTER TABLE %s ADD PRIMARY KEY (%s);%s', k.dest, migrate._column_list(k.dest, k.key_dest), CASE WHEN m.failed_since IS NOT NULL THEN format(' SELECT migrate.retry(%L);', m.name) END) END
    FROM k CROSS JOIN LATERAL (SELECT min(quote_ident(a.attname)) FROM pg_attribute a
                               WHERE a.attrelid = k.dest AND a.attnum = ANY (k.key_dest) AND NOT a.attnotnull) AS n(nullable)
    WHERE k.indexrelid IS NULL OR NOT (k.indisvalid AND k.indisready AND k.indisunique AND k.indimmediate)
       OR k.indpred IS NOT NULL OR k.indexprs IS NOT NULL OR n.nullable IS NOT NULL
    UNION ALL
    SELECT 'source_key', CASE WHEN coalesce(x.only_deferrable, false) THEN 'warning' ELSE 'error' END,
           CASE WHEN coalesce(x.only_deferrable, false)
                THEN format('the unique index of source %s over (%s) is deferrable: writes cannot be carried back by it', k.origin, migrate._column_list(k.origin, k.bare))
                ELSE format('source %s has no unique index over the columns of the key (%s), all of them NOT NULL', k.origin, coalesce(migrate._column_list(k.origin, k.bare), '')) END,
           format('CREATE UNIQUE INDEX CONCURRENTLY ON %s (%s);', k.origin, migrate._column_list(k.origin, k.bare))
    FROM k CROSS JOIN LATERAL (
        SELECT bool_and(NOT i.indimmediate) FROM pg_index i
        WHERE i.indrelid = k.origin AND i.indisunique AND i.indisvalid AND i.indpred IS NULL AND i.indexprs IS NULL AND migrate._compares_as_columns(i.indexrelid)
          AND (i.indkey::int2[])[0:i.indnkeyatts - 1] <@ k.bare
          AND NOT EXISTS (SELECT FROM pg_attribute a WHERE a.attrelid = k.origin AND a.attnum = ANY ((i.indkey::int2[])[0:i.indnkeyatts - 1]) AND NOT a.attnotnull)
        ) AS x(only_deferrable)
    WHERE x.only_deferrable IS DISTINCT FROM false
    UNION ALL
    SELECT 'key_collation', 'error', CASE WHEN co.oid IS DISTINCT FROM cd.oid
               THEN format('key column %s of %s has collation %s, %s of %s has %s: the two sides sort differently', quote_ident(o.attname), k.origin,
                           coalesce(co.oid::regcollation::text, 'none'), quote_ident(d.attname), k.dest, coalesce(cd.oid::regcollation::text, 'none'))
               ELSE format('key column %s of %s has the nondeterministic collation %s: keys that differ may be equal', quote_ident(d.attname), k.dest, cd.oid::regcollation) END,
           format('ALTER TABLE %s ALTER %I TYPE %s COLLATE %s;', k.dest, d.attname, format_type(d.atttypid, d.atttypmod),
                  CASE WHEN co.collisdeterministic IS NOT FALSE THEN co.oid::regcollation::text ELSE '"C"' END)
    FROM k CROSS JOIN LATERAL generate_subscripts(k.key_dest, 1) AS s(i)
    JOIN pg_attribute o ON o.attrelid = k.origin AND o.attnum = k.key_origin[s.i]
    JOIN pg_attribute d ON d.attrelid = k.dest AND d.attnum = k.key_dest[s.i]
    LEFT JOIN pg_collation co ON co.oid = o.attcollation LEFT JOIN pg_collation cd ON cd.oid = d.attcollation
    WHERE k.key_origin[s.i] > 0 AND (co.oid IS DISTINCT FROM cd.oid OR NOT cd.collisdeterministic)
    UNION ALL
    SELECT 'key_type', 'error', r.message, r.hint FROM k CROSS JOIN LATERAL migrate._rounded_keys(k.origin, k.dest, k.key_origin, k.key_dest) AS r
    UNION ALL
    SELECT DISTINCT 'key_cast', 'error', format('key column %s of %s has a type with a cast of its own, %s: keys are kept as text by the type''s output and input only', quote_ident(a.attname), a.attrelid::regclass, c.cast),
           format('DROP %s;', c.cast)
    FROM k JOIN pg_attribute a ON a.attrelid = k.dest AND a.attnum = ANY (k.key_dest) OR a.attrelid = k.origin AND a.attnum = ANY (k.bare)
    CROSS JOIN LATERAL migrate._text_cast(a.atttypid) AS c("cast") WHERE c.cast IS NOT NULL
$$;

-- Rows that somebody else put into a target would be taken for rows to delete or to overwrite. Only the owner looks.
CREATE FUNCTION migrate._check_empty(m migrate._migration) RETURNS SETOF migrate._check
LANGUAGE plpgsql STABLE AS $$
DECLARE
    f record;
    problem text;
    is_full boolean;
BEGIN
    IF m.phase <> 'planned' THEN
        RETURN;
    END IF;
    FOR f IN SELECT w.target, w.name, c.relowner::regrole AS owner, migrate._share(w.id) AS share
             FROM migrate._flow w JOIN pg_class c ON c.oid = w.target AND c.relkind IN ('r', 'p') WHERE w.migration = m.id ORDER BY w.id LOOP
        problem := NULL;
        BEGIN
            is_full := EXISTS (SELECT FROM migrate._as(f.owner, format('SELECT 1 FROM %s WHERE %s LIMIT 1', f.target, coalesce(f.share, 'true'))));
        EXCEPTION WHEN OTHERS THEN
            GET STACKED DIAGNOSTICS problem = MESSAGE_TEXT;
        END;
        IF problem IS NOT NULL THEN
            RETURN NEXT ('target_empty', 'error', format('target %s cannot be read as role %s: %s', f.target, f.owner, problem), '')::migrate._check;
        ELSIF is_full THEN
            RETURN NEXT ('target_empty', 'error', format('target %s has rows already%s', f.target, coalesce(' where ' || f.share, '')),
                CASE WHEN f.share IS NULL THEN format('TRUNCATE %s; if they are of an earlier try.', f.target)
                     ELSE format('DELETE FROM %s WHERE %s; if they are of an earlier try.', f.target, f.share) END)::migrate._check;
        END IF;
    END LOOP;
END $$;

CREATE FUNCTION migrate._check_columns(m migrate._migration) RETURNS SETOF migrate._check
LANGUAGE sql STABLE AS $$
    WITH f AS MATERIALIZED (SELECT w.*, p.columns FROM migrate._flow w JOIN migrate._mapping p ON p.flow = w.id AND p.direction = 'forward'
               JOIN pg_class s ON s.oid = w.source JOIN pg_class t ON t.oid = w.target JOIN pg_class v ON v.oid = p.view WHERE w.migration = m.id),
    e AS MATERIALIZED (SELECT f.id AS flow, e.* FROM f CROSS JOIN LATERAL migrate._expressions(f.id) e),
    x AS MATERIALIZED (SELECT f.id, f.source, f.target, e.*, d.attnotnull, d.atttypid, d.atttypmod, d.attgenerated, d.attidentity, d.atthasdef, d.attcollation,
                 o.attnotnull AS origin_not_null, o.atthasdef AS origin_hasdef, o.attidentity AS origin_identity, o.attgenerated AS origin_generated,
                 v.atttypid AS view_typid, v.atttypmod AS view_typmod, dt.typcategory AS category, e.dest_attnum = ANY (p.key_dest) AS in_key,
                 EXISTS (SELECT FROM migrate._mapping r WHERE r.flow = f.id AND r.direction = 'reverse' AND e.origin_attnum = ANY (r.columns) AND e.origin_attnum <> ALL (r.key_dest)) AS back_beside_key
          FROM f JOIN migrate._mapping p ON p.flow = f.id AND p.direction = 'forward'
          JOIN e ON e.flow = f.id
          JOIN pg_attribute d ON d.attrelid = f.target AND d.attnum = e.dest_attnum
          JOIN pg_attribute v ON v.attrelid = p.view AND v.attnum = e.ordinal
          JOIN pg_type dt ON dt.oid = d.atttypid
          LEFT JOIN pg_attribute o ON o.attrelid = f.source AND o.attnum = e.origin_attnum AND e.origin_attnum > 0)
    SELECT 'not_null', 'error', format('column %s of target %s is NOT NULL, has no default and is not mapped by flow "%s"', quote_ident(a.attname), f.target, f.name),
           format('Map it, or: ALTER TABLE %s ALTER %I SET DEFAULT …;', f.target, a.attname)
    FROM f JOIN pg_attribute a ON a.attrelid = f.target AND a.attnum > 0 AND NOT a.attisdropped JOIN pg_type t ON t.oid = a.atttypid
    WHERE (a.attnotnull OR t.typnotnull) AND NOT a.atthasdef AND t.typdefault IS NULL AND a.attidentity = '' AND a.attgenerated = '' AND a.attnum <> ALL (f.columns)
    UNION ALL
    SELECT 'nullable_source', 'warning', format('column %s of target %s is NOT NULL, but %s of source %s may be NULL', quote_ident(x.dest_column), x.target, x.expression, x.source),
           format('SELECT count(*) FROM %s WHERE %s IS NULL; and map coalesce(%s, …) where there are any.', x.source, x.expression, x.expression)
    FROM x WHERE x.attnotnull AND x.origin_attnum > 0 AND NOT x.origin_not_null
    UNION ALL
    SELECT 'narrowing', 'warning', format('column %s of target %s is %s, the mapping gives %s: a value that does not fit is refused%s', quote_ident(x.dest_column), x.target,
               x.dest_type, x.view_type, CASE WHEN x.category = 'N' OR x.category = 'D' THEN ' or rounded' ELSE '' END),
           CASE WHEN x.category = 'S' THEN format('SELECT max(length(%s)) FROM %s;', x.expression, x.source)
                ELSE format('SELECT min(%s), max(%s) FROM %s;', x.expression, x.expression, x.source) END
    FROM x WHERE (x.view_typid <> x.atttypid AND x.category <> 'S'
                  AND EXISTS (SELECT FROM pg_cast c WHERE c.castsource = x.view_typid AND c.casttarget = x.atttypid AND c.castcontext <> 'i'))
       OR (x.atttypmod >= 0 AND (x.view_typmod < 0 OR x.view_typmod > x.atttypmod) AND x.category IN ('S', 'N', 'D', 'T', 'V'))
    UNION ALL
    SELECT 'generated', 'error', format('column %s of target %s is a generated column', quote_ident(x.dest_column), x.target),
           'Leave it out of the mapping: PostgreSQL computes it.'
    FROM x WHERE x.attgenerated <> ''
    UNION ALL
    SELECT 'generated', CASE g.refuses WHEN true THEN 'warning' ELSE 'info' END, format('column %s of target %s is GENERATED ALWAYS AS IDENTITY: the copy overrides it, and cutover advances its sequence%s', quote_ident(x.dest_column), x.target,
               CASE g.refuses WHEN true THEN '; then an INSERT that gives the value is refused, which the source allows' ELSE '' END),
           CASE g.refuses WHEN true THEN format('ALTER TABLE %s ALTER %I SET GENERATED BY DEFAULT;', x.target, x.dest_column) ELSE '' END
    FROM x, LATERAL (SELECT x.origin_attnum > 0 AND x.origin_identity <> 'a' AS refuses) g WHERE x.attidentity = 'a' AND x.in_key
    UNION ALL
    SELECT 'generated', 'error', format('column %s of target %s is GENERATED ALWAYS AS IDENTITY, beside the key: no row that is there could be updated', quote_ident(x.dest_column), x.target),
           format('ALTER TABLE %s ALTER %I SET GENERATED BY DEFAULT;', x.target, x.dest_column)
    FROM x WHERE x.attidentity = 'a' AND NOT x.in_key
    UNION ALL
    SELECT 'generated', 'error', format('column %s of source %s is GENERATED ALWAYS AS IDENTITY, beside the key: after cutover no row that is there could be updated', x.expression, x.source),
           format('ALTER TABLE %s ALTER %s SET GENERATED BY DEFAULT;', x.source, x.expression)
    FROM x WHERE x.origin_identity = 'a' AND x.back_beside_key
    UNION ALL
    SELECT 'generated', 'warning', format('column %s of target %s is computed from the generated column %s of the source, which cannot be written back', quote_ident(x.dest_column), x.target, x.expression), ''
    FROM x WHERE x.origin_generated <> ''
    UNION ALL
    SELECT 'defaults', 'warning', format('column %s of target %s has no default, %s of source %s has one: inserts that rely on it fail or give NULL after cutover',
               quote_ident(x.dest_column), x.target, x.expression, x.source),
           CASE WHEN x.origin_identity <> '' THEN format('ALTER TABLE %s ALTER %I ADD GENERATED BY DEFAULT AS IDENTITY;', x.target, x.dest_column)
                ELSE format('ALTER TABLE %s ALTER %I SET DEFAULT %s;', x.target, x.dest_column,
                            (SELECT pg_get_expr(ad.adbin, ad.adrelid) FROM pg_attrdef ad WHERE ad.adrelid = x.source AND ad.adnum = x.origin_attnum)) END
    FROM x WHERE (x.origin_hasdef OR x.origin_identity <> '') AND x.origin_generated = '' AND NOT x.atthasdef AND x.attidentity = ''
      -- A target that references its source takes its key from there.
      AND NOT EXISTS (SELECT FROM pg_constraint c WHERE c.conrelid = x.target AND c.confrelid = x.source AND c.contype = 'f' AND x.dest_attnum = ANY (c.conkey))
$$;

-- What a foreign key does on a deletion or an update, as it is written; NULL where it only refuses.
CREATE FUNCTION migrate._key_action(code "char") RETURNS text
LANGUAGE sql IMMUTABLE AS $$ SELECT CASE code WHEN 'c' THEN 'CASCADE' WHEN 'n' THEN 'SET NULL' WHEN 'd' THEN 'SET DEFAULT' END $$;

CREATE FUNCTION migrate._check_constraints(m migrate._migration) RETURNS SETOF migrate._check
LANGUAGE sql STABLE AS $$
    WITH t AS (SELECT DISTINCT f.target FROM migrate._flow f JOIN pg_class c ON c.oid = f.target WHERE f.migration = m.id),
    strict AS (SELECT migrate._opt(m.id, 'dual_write') = 'strict' AS is_on),
    own_key AS (SELECT migrate._key_index(p.dest, p.key_dest) AS key_index FROM migrate._mapping p JOIN migrate._flow f ON f.id = p.flow WHERE f.migration = m.id AND p.direction = 'forward')
    SELECT 'constraints', CASE WHEN strict.is_on THEN 'warning' ELSE 'info' END,
           format('target %s has %s (%s): a row that it refuses %s', t.target, c.conname_quoted, c.what,
                  CASE WHEN strict.is_on THEN 'fails the application''s statement (dual_write = strict)' ELSE 'is recorded in migrate.failures and blocks cutover (dual_write = best_effort)' END), ''
    FROM strict, t CROSS JOIN LATERAL (
        SELECT quote_ident(c.conname) AS conname_quoted, pg_get_constraintdef(c.oid) AS what FROM pg_constraint c
        WHERE c.conrelid = t.target AND c.contype IN ('c', 'x', 'f', 'u', 'p') AND c.conindid NOT IN (SELECT key_index FROM own_key WHERE c.contype IN ('u', 'p'))
          AND NOT (c.contype = 'f' AND EXISTS (SELECT FROM migrate._flow f WHERE f.migration = m.id AND f.target = t.target AND f.source = c.confrelid))
        UNION ALL
        SELECT quote_ident(i.relname), 'unique index' FROM pg_index x JOIN pg_class i ON i.oid = x.indexrelid
        WHERE x.indrelid = t.target AND x.indisunique AND x.indexrelid NOT IN (SELECT key_index FROM own_key)
          AND NOT EXISTS (SELECT FROM pg_constraint c WHERE c.conindid = x.indexrelid AND c.contype IN ('p', 'u', 'x'))
        UNION ALL
        SELECT quote_ident(a.attname), 'domain ' || a.atttypid::regtype FROM pg_attribute a JOIN pg_type d ON d.oid = a.atttypid AND d.typtype = 'd'
        WHERE a.attrelid = t.target AND a.attnum > 0 AND NOT a.attisdropped
          AND (d.typnotnull OR EXISTS (SELECT FROM pg_constraint c WHERE c.contypid = d.oid))) AS c
    UNION ALL
    -- Workers run in security-restricted operations, in which PostgreSQL queues nothing for the commit.
    SELECT DISTINCT 'deferred_constraints', CASE WHEN g.tginitdeferred THEN 'error' ELSE 'warning' END,
           format(CASE WHEN g.tginitdeferred THEN '%s on %s is INITIALLY DEFERRED: writes to target %s by a worker would fail'
                       ELSE '%s on %s is DEFERRABLE: where an application defers it, what it refuses of target %s fails the COMMIT, with dual_write = best_effort too' END,
               coalesce('constraint ' || quote_ident(c.conname), 'trigger ' || quote_ident(g.tgname)), coalesce(c.conrelid, g.tgrelid)::regclass, t.target),
           CASE c.contype WHEN 'f' THEN format('ALTER TABLE %s ALTER CONSTRAINT %I NOT DEFERRABLE;', c.conrelid::regclass, c.conname)
                          ELSE format('Create it again as NOT DEFERRABLE, or: ALTER TABLE %s DROP CONSTRAINT %I;', c.conrelid::regclass, c.conname) END
    FROM t CROSS JOIN LATERAL migrate._partition_tree(t.target) AS l(relid) JOIN pg_trigger g ON g.tgrelid = l.relid AND g.tgdeferrable AND g.tgenabled <> 'D'
    LEFT JOIN pg_constraint c ON c.oid = g.tgconstraint
    UNION ALL
    SELECT 'foreign_key_actions', CASE WHEN own.is_source AND a.action = 'CASCADE' THEN 'info' WHEN NOT own.is_source AND twin.found THEN 'info' ELSE 'warning' END,
           format('foreign key %s of target %s to %s has ON %s %s: %s', quote_ident(c.conname), t.target, c.confrelid::regclass, a.event, a.action, CASE
               WHEN own.is_source AND a.action = 'CASCADE' THEN 'the dual write has changed the row before, so the action finds nothing to do'
               WHEN own.is_source THEN 'it changes target rows that the mapping keeps'
               WHEN twin.found THEN 'the source has the same action, so the work is done twice and comes out the same'
               ELSE 'the source has no such action, so target rows change that their source rows do not' END),
           CASE WHEN (own.is_source AND a.action = 'CASCADE') OR (NOT own.is_source AND twin.found) THEN ''
                ELSE format('ALTER TABLE %s DROP CONSTRAINT %I; and add it again without the action, until finalize.', t.target, c.conname) END
    FROM t JOIN pg_constraint c ON c.conrelid = t.target AND c.contype = 'f'
    CROSS JOIN LATERAL (VALUES ('DELETE', c.confdeltype), ('UPDATE', c.confupdtype)) AS e(event, code)
    CROSS JOIN LATERAL (SELECT e.event, migrate._key_action(e.code)) AS a(event, action)
    CROSS JOIN LATERAL (SELECT EXISTS (SELECT FROM migrate._flow f WHERE f.migration = m.id AND f.target = t.target AND f.source = c.confrelid)) AS own(is_source)
    CROSS JOIN LATERAL (SELECT EXISTS (SELECT FROM migrate._flow f JOIN pg_constraint s ON s.conrelid = f.source AND s.contype = 'f' AND s.confrelid = c.confrelid
                                       WHERE f.migration = m.id AND f.target = t.target
                                         AND CASE e.event WHEN 'DELETE' THEN s.confdeltype ELSE s.confupdtype END = e.code)) AS twin(found)
    WHERE a.action IS NOT NULL
    UNION ALL
    SELECT 'foreign_key_actions', 'warning', format('foreign key %s of %s to target %s has ON DELETE %s: where a key of the source changes, its row is deleted from the target and inserted anew, and the action runs',
               quote_ident(c.conname), c.conrelid::regclass, t.target, migrate._key_action(c.confdeltype)),
           format('If keys of the source ever change: ALTER TABLE %s DROP CONSTRAINT %I; and add it again without the action, until finalize.', c.conrelid::regclass, c.conname)
    FROM t JOIN pg_constraint c ON c.confrelid = t.target AND c.contype = 'f' AND c.conrelid <> t.target AND c.conparentid = 0
    WHERE c.confdeltype IN ('c', 'n', 'd')
    UNION ALL
    -- (A swap takes the keys over to the target.)
    SELECT 'foreign_key_actions', 'warning', format('foreign key %s of %s to source %s has ON DELETE %s and ', quote_ident(c.conname), c.conrelid::regclass, s.source,
               migrate._key_action(c.confdeltype))
           || CASE WHEN s.fixed THEN 'the source''s key is GENERATED ALWAYS: where a key of the target changes after cutover, its row of the source is deleted and inserted anew, and the action runs'
                   ELSE 'no ON UPDATE: where a key of the target changes after cutover, its row of the source cannot, and the statement fails as it would on the source' END,
           'If keys of the target ever change: ' || CASE WHEN s.fixed THEN format('ALTER TABLE %s ALTER %I SET GENERATED BY DEFAULT;', s.source, s.fixed_column)
                ELSE format('ALTER TABLE %s DROP CONSTRAINT %I; and add it again with ON UPDATE CASCADE, before cutover.', c.conrelid::regclass, c.conname) END
    FROM (SELECT DISTINCT ON (f.source) f.source, k.attname AS fixed_column, k.attname IS NOT NULL AS fixed
          FROM migrate._flow f JOIN migrate._mapping p ON p.flow = f.id AND p.direction = 'reverse' JOIN pg_class o ON o.oid = f.source
          LEFT JOIN pg_attribute k ON k.attrelid = f.source AND k.attnum = ANY (p.key_dest) AND k.attidentity = 'a'
          WHERE f.migration = m.id AND f.on_target_delete IS DISTINCT FROM 'keep' ORDER BY f.source, k.attname) s
    JOIN pg_constraint c ON c.confrelid = s.source AND c.contype = 'f' AND c.conrelid <> s.source AND c.conparentid = 0
    WHERE c.confdeltype IN ('c', 'n', 'd') AND (c.confupdtype IN ('a', 'r') OR s.fixed) AND migrate._opt(m.id, 'cutover') IS DISTINCT FROM 'swap' AND c.conrelid NOT IN (SELECT t.target FROM t)
$$;

-- Where the source checks a unique key after the statement and the target row by row, one statement that exchanges values between rows
-- (1 <-> 2) can be carried in no order. Rows of a target are never deleted to make room, for foreign keys would act on that.
CREATE FUNCTION migrate._check_exchanges(m migrate._migration) RETURNS SETOF migrate._check
LANGUAGE sql STABLE AS $$
    WITH pair AS MATERIALIZED (
        SELECT f.source, f.target, p.key_dest, e.origin_attnum, e.dest_attnum
        FROM migrate._flow f JOIN migrate._mapping p ON p.flow = f.id AND p.direction = 'forward', LATERAL migrate._expressions(f.id) e
        WHERE f.migration = m.id AND e.origin_attnum > 0
    ), exchanging AS (
        SELECT c.conname, p.source, p.target, p.key_dest, array_agg(p.dest_attnum ORDER BY p.dest_attnum) AS columns
        FROM pg_constraint c JOIN pair p ON p.source = c.conrelid AND p.origin_attnum = ANY (c.conkey)
        WHERE c.contype IN ('p', 'u') AND c.condeferrable
        GROUP BY c.oid, c.conname, c.conkey, p.source, p.target, p.key_dest HAVING count(DISTINCT p.origin_attnum) = cardinality(c.conkey)
    )
    SELECT 'constraints', 'warning',
           format('%s of source %s is deferrable, %s of target %s is not: one statement that exchanges values between rows leaves failures that no retry mends',
                  quote_ident(x.conname), x.source, quote_ident(i.relname), x.target),
           CASE WHEN t.conname IS NULL THEN format('DROP INDEX %1$s; ALTER TABLE %2$s ADD UNIQUE (%3$s) DEFERRABLE;', i.oid::regclass, x.target, migrate._column_list(x.target, k.indkey::int2[]))
                ELSE format('ALTER TABLE %1$s DROP CONSTRAINT %2$I, ADD CONSTRAINT %2$I UNIQUE (%3$s) DEFERRABLE;', x.target, t.conname, migrate._column_list(x.target, k.indkey::int2[])) END
    FROM exchanging x JOIN pg_index k ON k.indrelid = x.target AND k.indisunique AND k.indimmediate AND k.indpred IS NULL
    JOIN pg_class i ON i.oid = k.indexrelid LEFT JOIN pg_constraint t ON t.conindid = k.indexrelid AND t.contype = 'u'
    WHERE x.columns = ARRAY(SELECT c FROM unnest(k.indkey::int2[]) c ORDER BY c) AND NOT x.key_dest @> x.columns
$$;

CREATE FUNCTION migrate._check_triggers(m migrate._migration) RETURNS SETOF migrate._check
LANGUAGE sql STABLE AS $$
    SELECT CASE t.part WHEN 'target' THEN 'target_triggers' ELSE 'source_triggers' END, 'warning',
           format('trigger %s of %s %s fires for every %s, as the table''s owner and with search_path = pg_catalog, pg_temp%s', quote_ident(g.tgname), t.part, t.relation,
                  CASE WHEN t.part = 'target' THEN 'dual write' WHEN g.tgenabled = 'R' THEN 'replicated write that is carried back after cutover' ELSE 'write that is carried back after cutover' END,
                  CASE WHEN g.tgtype & 2 <> 0 THEN '; where it changes the row, validation finds a mismatch' ELSE '' END),
           CASE t.part WHEN 'target' THEN format('ALTER TABLE %s DISABLE TRIGGER %I; until cutover, if the source''s trigger does the same work.', t.relation, g.tgname)
                       ELSE format('ALTER TABLE %s DISABLE TRIGGER %I; from cutover on, if the target''s trigger does the same work.', t.relation, g.tgname) END
    FROM migrate._tables(m.id) t JOIN pg_trigger g ON g.tgrelid = t.relation AND NOT g.tgisinternal AND g.tgenabled <> 'D'
    JOIN pg_proc p ON p.oid = g.tgfoid AND p.pronamespace <> 'migrate'::regnamespace
    -- (A swap disables those of the old table meanwhile.)
    WHERE t.part = 'target' OR migrate._opt(m.id, 'cutover') <> 'swap' AND EXISTS (SELECT FROM migrate._mapping r WHERE r.dest = t.relation AND r.direction = 'reverse')
$$;

CREATE FUNCTION migrate._check_left_behind(m migrate._migration) RETURNS SETOF migrate._check
LANGUAGE sql STABLE AS $$
    WITH s AS (SELECT DISTINCT f.source FROM migrate._flow f JOIN pg_class c ON c.oid = f.source WHERE f.migration = m.id),
    used AS (
        SELECT DISTINCT s.source, d.classid, CASE WHEN d.classid = 'pg_rewrite'::regclass THEN r.ev_class ELSE d.objid END AS object
        FROM s JOIN pg_depend d ON d.refclassid = 'pg_class'::regclass AND d.refobjid = s.source
        LEFT JOIN pg_rewrite r ON d.classid = 'pg_rewrite'::regclass AND r.oid = d.objid
        WHERE d.classid IN ('pg_rewrite'::regclass, 'pg_proc'::regclass))
    SELECT 'referencing_keys', 'info', format('foreign key %s of %s references source %s; cutover does not move it: it goes on checking the source, which stays in step until finalize',
               quote_ident(c.conname), c.conrelid::regclass, s.source),
           format('ALTER TABLE %s ADD CONSTRAINT … FOREIGN KEY … NOT VALID; to the target, before finalize drops the source.', c.conrelid::regclass)
    FROM s JOIN pg_constraint c ON c.confrelid = s.source AND c.contype = 'f' AND c.conparentid = 0
    WHERE NOT EXISTS (SELECT FROM migrate._flow f WHERE f.migration = m.id AND f.target = c.conrelid)
    UNION ALL
    SELECT 'dependents', 'info', format('%s %s reads source %s; cutover does not change it',
               CASE WHEN c.oid IS NULL THEN 'function' WHEN c.relkind = 'm' THEN 'materialized view' ELSE 'view' END,
               CASE WHEN c.oid IS NULL THEN u.object::regprocedure::text ELSE c.oid::regclass::text END, u.source), ''
    FROM used u LEFT JOIN pg_class c ON u.classid = 'pg_rewrite'::regclass AND c.oid = u.object
    WHERE NOT (u.classid = 'pg_rewrite'::regclass AND (c.relnamespace = 'migrate'::regnamespace OR c.oid = u.source))
      AND NOT EXISTS (SELECT FROM migrate._view v WHERE v.migration = m.id AND v.view = c.oid)
    UNION ALL
    SELECT 'sequences', 'info', format('sequence %s feeds column %s of source %s; cutover and rollback advance the sequences of both sides past the highest key',
               d.objid::regclass, quote_ident(a.attname), s.source), ''
    FROM s JOIN pg_depend d ON d.refclassid = 'pg_class'::regclass AND d.refobjid = s.source AND d.classid = 'pg_class'::regclass AND d.deptype IN ('a', 'i')
    JOIN pg_class q ON q.oid = d.objid AND q.relkind = 'S' JOIN pg_attribute a ON a.attrelid = s.source AND a.attnum = d.refobjsubid
    UNION ALL
    SELECT 'grants', 'warning', format('role %s has %s on source %s and not on target %s', g.role, g.rights, f.source, f.target),
           format('GRANT %s ON %s TO %s;', g.rights, f.target, g.role)
    FROM migrate._flow f JOIN pg_class a ON a.oid = f.source JOIN pg_class b ON b.oid = f.target
    CROSS JOIN LATERAL (
        SELECT CASE x.grantee WHEN 0 THEN 'PUBLIC' ELSE x.grantee::regrole::text END AS role, string_agg(x.privilege_type, ', ' ORDER BY x.privilege_type) AS rights
        FROM aclexplode(a.relacl) x
        WHERE x.grantee NOT IN (a.relowner, b.relowner) AND x.privilege_type IN ('SELECT', 'INSERT', 'UPDATE', 'DELETE') AND NOT EXISTS
            (SELECT FROM aclexplode(b.relacl) y WHERE y.grantee IN (x.grantee, 0) AND y.privilege_type = x.privilege_type)
        GROUP BY x.grantee) AS g
    WHERE f.migration = m.id
$$;

-- Columns of the sources that are in no target although define has not said so: they were added since.
CREATE FUNCTION migrate._columns_added(m_id integer) RETURNS SETOF text
LANGUAGE plpgsql STABLE AS $$
BEGIN
    RETURN QUERY
    WITH carried AS MATERIALIZED (
        SELECT f.source, f.not_carried, b.yields FROM migrate._flow f JOIN migrate._mapping p ON p.flow = f.id AND p.direction = 'forward'
        JOIN pg_class c ON c.oid = p.view, LATERAL migrate._view_body(p.view) b WHERE f.migration = m_id)
    SELECT format('values of column %I of %s, which was added since the migration was defined, are in no target', a.attname, a.attrelid::regclass)
    FROM pg_attribute a
    WHERE a.attrelid IN (SELECT c.source FROM carried c) AND a.attnum > 0 AND NOT a.attisdropped AND a.attgenerated = ''
      AND NOT EXISTS (SELECT FROM carried c WHERE c.source = a.attrelid AND (a.attname::text = ANY (c.not_carried) OR c.yields && ARRAY[a.attnum, 0::int2]))
    ORDER BY a.attrelid, a.attnum;
END $$;

CREATE FUNCTION migrate._check_reverse(m migrate._migration) RETURNS SETOF migrate._check
LANGUAGE sql STABLE AS $$
    SELECT 'not_carried', 'info', format('column %s of source %s goes into no column of target %s', quote_ident(c.name), f.source, f.target), 'Map it, if it is needed after finalize.'
    FROM migrate._flow f CROSS JOIN unnest(f.not_carried) AS c(name) WHERE f.migration = m.id
    UNION ALL
    SELECT 'not_carried', 'warning', c.line, 'Define a migration anew for it to be carried, or copy its values by hand before the source is dropped.'
    FROM migrate._columns_added(m.id) AS c(line)
    UNION ALL
    SELECT 'carried_twice', 'warning', format('column %s of source %s is carried into %s: after cutover, a write to one of them does not reach the other',
               quote_ident(a.attname), t.origin, t.targets), ''
    FROM (SELECT p.origin, e.origin_attnum, string_agg(p.dest::text, ' and ' ORDER BY p.flow) AS targets
          FROM migrate._flow f JOIN migrate._mapping p ON p.flow = f.id AND p.direction = 'forward' CROSS JOIN LATERAL migrate._expressions(f.id) e
          WHERE f.migration = m.id AND e.origin_attnum > 0 AND e.origin_attnum <> ALL (p.key_origin)
          GROUP BY p.origin, e.origin_attnum HAVING count(DISTINCT p.dest) > 1) AS t
    JOIN pg_attribute a ON a.attrelid = t.origin AND a.attnum = t.origin_attnum
    UNION ALL
    SELECT 'reverse', CASE migrate._opt(m.id, 'accept_reverse_gaps') WHEN 'on' THEN 'info' ELSE 'warning' END,
           format('flow "%s" cannot carry every write back: %s%s', f.name, g.gap,
                  CASE migrate._opt(m.id, 'accept_reverse_gaps') WHEN 'on' THEN '' ELSE '; cutover is refused (accept_reverse_gaps = off)' END),
           CASE migrate._opt(m.id, 'accept_reverse_gaps') WHEN 'on' THEN '' ELSE format('Give reverse => ''…'' when defining it, or: SELECT migrate.set(%L, ''accept_reverse_gaps'', ''on'');', m.name) END
    FROM migrate._flow f CROSS JOIN unnest(f.reverse_gaps) AS g(gap) WHERE f.migration = m.id
    UNION ALL
    SELECT 'on_target_delete', 'warning', format('flow "%s" does not say what deleting a row of %s does to its row of %s after cutover; cutover is refused until it does', f.name, f.target, f.source),
           format('SELECT migrate.set(%L, ''on_target_delete'', ''delete''); where both rows are the same thing, ''keep'' where the target is a part of the source.', m.name)
    FROM migrate._flow f WHERE f.migration = m.id AND f.on_target_delete IS NULL
$$;

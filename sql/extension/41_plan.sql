-- plan(): the runbook of a migration in Markdown, from what is known about it now. Sections are functions of their own; none
-- reads user data.

-- What the backfill's time is estimated by: the rate it has shown, or a cautious guess for each worker.
CREATE FUNCTION migrate._plan_rate(m migrate._migration, OUT rows_per_second numeric, OUT basis text)
LANGUAGE plpgsql STABLE AS $$
DECLARE
    assumed CONSTANT numeric := 10000;
    done numeric := (SELECT sum(r.rows_done) FROM migrate._range r JOIN migrate._flow f ON f.id = r.flow WHERE f.migration = m.id);
    seconds numeric := extract(epoch FROM coalesce(m.backfilled_at, clock_timestamp()) -
                               (SELECT max(e.at) FROM migrate._event e WHERE e.migration = m.id AND e.to_phase = 'backfilling'))::numeric;
    most numeric := migrate._opt(m.id, 'max_rows_per_second')::numeric;
BEGIN
    IF done > 0 AND seconds > 1 THEN
        rows_per_second := round(done / seconds);
        basis := format('measured: %s rows in %s', done, migrate._plan_time(seconds));
        RETURN;
    END IF;
    rows_per_second := assumed * migrate._opt(m.id, 'workers')::numeric * (1 - migrate._opt(m.id, 'throttle_ratio')::numeric);
    basis := format('assumed, for nothing has run yet: %s rows/s a worker, throttle_ratio %s', assumed, migrate._opt(m.id, 'throttle_ratio'));
    IF migrate._opt_ms(m.id, 'sleep') > 0 THEN
        rows_per_second := round(rows_per_second * migrate._opt_ms(m.id, 'batch_time') / (migrate._opt_ms(m.id, 'batch_time') + migrate._opt_ms(m.id, 'sleep')));
        basis := basis || format(', sleep %s ms after each %s ms', migrate._opt_ms(m.id, 'sleep'), migrate._opt_ms(m.id, 'batch_time'));
    END IF;
    IF most < rows_per_second THEN
        rows_per_second := most;
        basis := basis || format(', max_rows_per_second %s', most);
    END IF;
END $$;

-- 90 -> '1 min 30 s'
CREATE FUNCTION migrate._plan_time(seconds numeric) RETURNS text
LANGUAGE sql IMMUTABLE AS $$
    SELECT CASE WHEN seconds < 1 THEN 'under 1 s'
                WHEN seconds < 60 THEN round(seconds) || ' s'
                WHEN seconds < 3600 THEN div(round(seconds), 60) || ' min ' || round(seconds) % 60 || ' s'
                ELSE div(round(seconds), 3600) || ' h ' || div(round(seconds) % 3600, 60) || ' min' END
$$;

-- A cell of a Markdown table.
CREATE FUNCTION migrate._plan_cell(value text) RETURNS text
LANGUAGE sql IMMUTABLE AS $$ SELECT replace(regexp_replace(value, '\s+', ' ', 'g'), '|', '\|') $$;

-- The values of names as code, whatever is in them.
CREATE FUNCTION migrate._plan_code(value text) RETURNS text
LANGUAGE sql IMMUTABLE AS $$
    SELECT CASE WHEN value ~ '`' THEN '`` ' || migrate._plan_cell(value) || ' ``' ELSE '`' || migrate._plan_cell(value) || '`' END
$$;

CREATE FUNCTION migrate._plan_path(flow integer, direction text) RETURNS text
LANGUAGE sql STABLE AS $$
    SELECT coalesce('through SQL: ' || migrate._plan_cell(migrate._path(flow, direction)),
                    'directly, row by row without SQL' || CASE WHEN direction = 'reverse' AND f.filter IS NOT NULL AND f.on_target_delete IS DISTINCT FROM 'keep' THEN ', deletions through SQL: the filter is asked' ELSE '' END) || '.'
    FROM migrate._flow f WHERE f.id = flow
$$;

-- What start would choose, and why; after it, what it chose.
CREATE FUNCTION migrate._plan_order(f migrate._flow) RETURNS text
LANGUAGE plpgsql STABLE AS $$
DECLARE
    o record;
BEGIN
    IF (SELECT m.phase FROM migrate._migration m WHERE m.id = f.migration) <> 'planned' THEN
        RETURN ', in the order of ' || CASE WHEN f.by_place THEN 'place' ELSE 'the key' END;
    END IF;
    SELECT * INTO o FROM migrate._copy_order(f);
    RETURN ', in the order of ' || CASE WHEN o.by_place THEN 'place' ELSE 'the key' END || coalesce(' (' || migrate._plan_cell(o.why) || ')', '');
END $$;

CREATE FUNCTION migrate._plan_flow(f migrate._flow) RETURNS text
LANGUAGE plpgsql STABLE AS $$
DECLARE
    forward migrate._mapping;
    reverse migrate._mapping;
    lines text[];
BEGIN
    SELECT * INTO forward FROM migrate._mapping p WHERE p.flow = f.id AND p.direction = 'forward';
    SELECT * INTO reverse FROM migrate._mapping p WHERE p.flow = f.id AND p.direction = 'reverse';
    lines := ARRAY[format('### %s to %s', migrate._plan_code(f.source::text), migrate._plan_code(f.target::text)), '',
        format('Key of the target: %s (index %s)%s', migrate._plan_code(migrate._column_list(f.target, forward.key_dest)), migrate._plan_code(migrate._key_index(forward.dest, forward.key_dest)::text),
               CASE WHEN forward.filtered THEN '. Rows of the source that fulfil ' || migrate._plan_code(btrim(coalesce(f.filter, 'the filter'), E' \n\t')) || ' only.' ELSE '.' END), '',
        '| target column | type | from |', '|---|---|---|'];
    lines := lines || ARRAY(
        SELECT format('| %s | %s | %s |', migrate._plan_code(quote_ident(e.dest_column)), e.dest_type, migrate._plan_code(e.expression)) FROM migrate._expressions(f.id) e ORDER BY e.ordinal);
    lines := lines || ARRAY(
        SELECT format('| %s | %s | %s |', migrate._plan_code(quote_ident(a.attname)), format_type(a.atttypid, a.atttypmod),
                      CASE WHEN a.attgenerated <> '' THEN 'generated by PostgreSQL' WHEN a.attidentity <> '' THEN 'its identity sequence'
                           WHEN a.atthasdef THEN 'its default' ELSE 'NULL' END)
        FROM pg_attribute a WHERE a.attrelid = f.target AND a.attnum > 0 AND NOT a.attisdropped AND a.attnum <> ALL (forward.columns) ORDER BY a.attnum);
    lines := lines || ARRAY['', CASE WHEN f.not_carried = '{}' THEN 'Every column of the source is carried.'
        ELSE 'Not carried: ' || (SELECT string_agg(migrate._plan_code(quote_ident(c)), ', ' ORDER BY c) FROM unnest(f.not_carried) c) || '.' END, '',
        '**Dual writes**: ' || migrate._plan_path(f.id, 'forward'), '',
        '**Backfill**: ' || coalesce('by SQL, under row locks: ' || migrate._plan_cell(migrate._no_bulk_copy(f.id)), 'in bulk, without a lock on a row of the source' || migrate._plan_order(f)) || '.', ''];
    lines := lines || CASE WHEN reverse.flow IS NULL THEN ARRAY['**Back**: nothing. Writes to the target after cutover are lost by a rollback.']
        ELSE ARRAY['**Back**, after cutover and until finalize: ' ||
            (SELECT string_agg(format('%s ← %s', migrate._plan_code(quote_ident(e.dest_column)), migrate._plan_code(e.expression)), ', ' ORDER BY e.ordinal)
             FROM migrate._expressions(f.id, 'reverse') e) || '.', '- dual writes back: ' || migrate._plan_path(f.id, 'reverse')] END;
    lines := lines || ARRAY(SELECT '- **not carried back**: ' || migrate._plan_cell(g) FROM unnest(f.reverse_gaps) g);
    lines := lines || ARRAY['- deleting a row of the target ' || CASE f.on_target_delete WHEN 'delete' THEN 'deletes its row of the source (on_target_delete = delete).'
        WHEN 'keep' THEN 'keeps its row of the source (on_target_delete = keep).' ELSE '**is not decided**: set on_target_delete before cutover.' END];
    RETURN array_to_string(lines, E'\n');
END $$;

CREATE FUNCTION migrate._plan_estimates(m migrate._migration) RETURNS text
LANGUAGE sql STABLE AS $$
    SELECT array_to_string(ARRAY['## Estimates', '', '| flow | rows | source | copy needs | WAL | time |', '|---|---|---|---|---|---|']
        || array_agg(format('| %s | %s%s | %s | %s | %s | %s |', migrate._plan_code(f.name), e.row_count, CASE WHEN e.rows_known THEN '' ELSE ' (guessed, run ANALYZE)' END,
                            pg_size_pretty(e.source_bytes), pg_size_pretty(e.target_bytes), pg_size_pretty(e.wal_bytes),
                            migrate._plan_time(e.row_count / greatest(r.rows_per_second, 1))) ORDER BY f.id)
        || ARRAY['', format('Rate of the backfill: %s rows/s (%s). Waiting for replicas, a window or other signals comes on top, and so does one more read of both sides by the validation.',
                            r.rows_per_second, r.basis),
                 'How full the disk is cannot be told from SQL. See to it that there is room for the copy and, where replicas or slots hold WAL back, for the WAL.'], E'\n')
    FROM migrate._flow f CROSS JOIN LATERAL migrate._estimate(f) e CROSS JOIN migrate._plan_rate(m) r
    WHERE f.migration = m.id GROUP BY r.rows_per_second, r.basis
$$;

-- defers: something is set aside for the copy.
CREATE FUNCTION migrate._plan_phases(m migrate._migration, defers boolean) RETURNS text
LANGUAGE sql STABLE AS $$
    SELECT array_to_string(ARRAY['## Phases, and the locks they take', '', '| phase | what happens | locks, and for how long |', '|---|---|---|',
        format('| `start` → dual_writing | triggers are made on %s; every write to it is applied to its targets in the same transaction | SHARE ROW EXCLUSIVE on each source for the moment it takes to make triggers. Writers wait at most %s ms an attempt (lock_timeout), readers not at all; tried again for up to %s (cutover_timeout) |',
               (SELECT string_agg(DISTINCT migrate._plan_code(f.source::text), ', ') FROM migrate._flow f WHERE f.migration = m.id),
               migrate._opt_ms(m.id, 'lock_timeout'), migrate._plan_time(migrate._opt_ms(m.id, 'cutover_timeout') / 1000.0)),
        CASE WHEN defers THEN '| `start`, too | secondary indexes and foreign keys of the target are set aside (see Preflight, deferred) | ACCESS EXCLUSIVE on the target and on what a foreign key references, the source too, for that moment; where a reader is in the way for 2 s, foreign keys stay |' END,
        format('| backfilling | existing rows are copied in batches, %s worker(s), first batch %s rows; a batch, the keys it skipped and its checkpoint are one transaction, so a kill loses a batch of work and no row | ROW SHARE on the source, ROW EXCLUSIVE on the target, rows of a batch FOR SHARE SKIP LOCKED for about %s ms (batch_time): an UPDATE of such a row waits that long; the backfill waits for no row |',
               migrate._opt(m.id, 'workers'), migrate._opt(m.id, 'batch_size'), migrate._opt_ms(m.id, 'batch_time')),
        CASE WHEN defers THEN '| backfilling, at its end | what was set aside comes back: indexes by CREATE INDEX CONCURRENTLY, foreign keys NOT VALID, then VALIDATE; a violated one stops as failed | SHARE UPDATE EXCLUSIVE on the target while it builds and validates; SHARE ROW EXCLUSIVE on source, target and referenced table for the moment of adding a key, tried as by start. Waits for transactions that are older than the build |' END,
        '| validating | both sides are compared range by range, exactly and under load; stops as failed at a mismatch, and repairs nothing unasked | ACCESS SHARE on both for a range |',
        CASE WHEN migrate._opt(m.id, 'shadow_rate')::numeric > 0
             THEN format('| shadowing | %s of the keys are read from both sides for %s (shadow_rate, shadow_time) | ACCESS SHARE, 200 ms at a time |', migrate._opt(m.id, 'shadow_rate'), migrate._opt(m.id, 'shadow_time'))
             ELSE '| shadowing | passed over: shadow_rate is 0 | none |' END,
        '| ready | dual writes go on for as long as you like; nothing has changed for applications | none beyond those of the writes themselves |',
        '| `route`, before cutover | reads of ' || (SELECT string_agg(format('view %s', migrate._plan_code(v.view::text)), ', ' ORDER BY v.view) FROM migrate._view v WHERE v.migration = m.id AND v.use = 'read')
            || ' go to the target by and by, and back at once, as you say; writes stay where they are | ACCESS EXCLUSIVE on these views alone, tried as by cutover |',
        format('| `cutover` → cut_over | waits until no transaction is older than the last batch, checks the gates again under locks, turns the dual writes round, %s, advances sequences; one transaction | %s, for the milliseconds of the switch; at most %s ms of waiting an attempt, never queueing before readers for longer, tried again for up to %s |',
               concat_ws(', ', CASE WHEN migrate._opt(m.id, 'cutover') = 'swap' THEN 'gives each target its source''s name and all that hangs on it (below)' END,
                   'replaces ' || coalesce((SELECT string_agg(format('view %s', migrate._plan_code(v.view::text)), ', ' ORDER BY v.view) FROM migrate._view v WHERE v.migration = m.id),
                                           CASE WHEN migrate._opt(m.id, 'cutover') = 'swap' THEN NULL ELSE 'nothing by itself (the application switches, by migrate.serves)' END)),
               CASE WHEN migrate._opt(m.id, 'cutover') = 'swap' THEN 'ACCESS EXCLUSIVE on views, tables, tables that reference them, and sequences'
                    ELSE 'ACCESS EXCLUSIVE on views, then SHARE ROW EXCLUSIVE on the tables' END,
               migrate._opt_ms(m.id, 'lock_timeout'), migrate._plan_time(migrate._opt_ms(m.id, 'cutover_timeout') / 1000.0)),
        CASE WHEN migrate._opt_ms(m.id, 'watch_time') > 0 THEN format('| cut_over, the first %s | a worker looks once a second whether a limit is passed (watch_failures, watch_abort_rate, watch_latency, max_shadow_mismatch_rate); then: %s (on_limit) | none; a rollback as below |',
            migrate._opt(m.id, 'watch_time'), migrate._opt(m.id, 'on_limit')) END,
        '| `rollback` → ready | the same transaction the other way, at any time before finalize | as cutover |',
        format('| `finalize` | triggers are dropped; refused until %s after cutover (rollback_window) | ACCESS EXCLUSIVE on the tables, for a moment |', migrate._opt(m.id, 'rollback_window'))], E'\n')
$$;

CREATE FUNCTION migrate._plan_failures(m migrate._migration) RETURNS text
LANGUAGE sql STABLE AS $$
    SELECT array_to_string(ARRAY['## When something fails', '',
        CASE migrate._opt(m.id, 'dual_write')
          WHEN 'strict' THEN '- A write whose dual write cannot be applied **fails the application''s statement** (dual_write = strict). To let it pass and record the key: ' || migrate._plan_code(format('SELECT migrate.set(%L, ''dual_write'', ''best_effort'');', m.name))
          ELSE '- A write whose dual write cannot be applied **passes** (dual_write = best_effort): its key goes to `migrate.failures`, a worker tries it again, and cutover is refused until none is left.' END,
        format('- A row that cannot be copied goes to `migrate.failures` too; at more than %s (max_failures) the backfill stops as failed.', migrate._opt(m.id, 'max_failures')),
        '- A crash, a kill or a failover loses at most one batch of work: the migration goes on from its checkpoint.',
        format('- Pause: %s. Give up: %s; it leaves the source as it was, and what was copied in the target unless that would refuse the application''s deletes.', migrate._plan_code(format('SELECT migrate.pause(%L);', m.name)), migrate._plan_code(format('SELECT migrate.cancel(%L);', m.name))),
        '- Rollback carries nothing more over: the reverse dual writes have kept the source in step since cutover, except for what is marked **not carried back** above.'], E'\n')
$$;

CREATE FUNCTION migrate._plan_preflight(m migrate._migration, caller regrole) RETURNS text
LANGUAGE sql STABLE AS $$
    WITH p AS (SELECT * FROM migrate._preflight(caller, m.name) WITH ORDINALITY)
    SELECT array_to_string(ARRAY['## Preflight', '', format('%s errors, %s warnings, %s notes, %s checks passed.',
            count(*) FILTER (WHERE severity = 'error'), count(*) FILTER (WHERE severity = 'warning'),
            count(*) FILTER (WHERE severity = 'info'), count(*) FILTER (WHERE severity = 'ok')), '']
        || coalesce(array_agg(format('- **%s** %s: %s%s', severity, "check", migrate._plan_cell(message), CASE hint WHEN '' THEN '' ELSE E'  \n  ' || migrate._plan_code(hint) END) ORDER BY ordinality)
                    FILTER (WHERE severity IN ('error', 'warning') OR "check" = 'deferred' AND severity = 'info'), '{}')
        || ARRAY['', '### What cutover does not move', '']
        || coalesce(array_agg('- ' || migrate._plan_cell(message) ORDER BY ordinality)
                    FILTER (WHERE "check" IN ('referencing_keys', 'dependents', 'sequences', 'grants', 'publication', 'defaults') AND severity IN ('info', 'warning')), '{- nothing was found}'), E'\n')
    FROM p
$$;

CREATE FUNCTION migrate._plan_checklist(m migrate._migration) RETURNS text
LANGUAGE sql STABLE AS $$
    SELECT array_to_string(ARRAY['## Before cutover', '', 'Each with SQL to paste; all of it can be run under load.', '', '```sql',
        format('SELECT * FROM migrate.validate(%L);                    -- verdict equal for every flow', m.name),
        format('SELECT * FROM migrate.mismatches(%L);                  -- no row', m.name),
        format('SELECT * FROM migrate.failures WHERE migration = %L;   -- no row', m.name),
        format('SELECT * FROM migrate.shadow_reads WHERE migration = %L; -- mismatch_rate at most %s', m.name, migrate._opt(m.id, 'max_shadow_mismatch_rate')),
        format('SELECT migrate.cutover(%L, dry_run => true);           -- every gate passes', m.name),
        '```', '', 'Independent of the extension, a whole comparison in plain SQL (it takes as long as two scans):', '', '```sql']
        || array_agg(migrate._plan_full_join(f) ORDER BY f.id)
        || ARRAY['```'], E'\n')
    FROM migrate._flow f WHERE f.migration = m.id
$$;

-- SELECT count(*) FROM (SELECT … FROM source) s FULL JOIN target t ON key WHERE (s.*) IS DISTINCT FROM (t.*): 0 where both sides are equal.
CREATE FUNCTION migrate._plan_full_join(f migrate._flow) RETURNS text
LANGUAGE sql STABLE AS $$
    SELECT CASE WHEN EXISTS (SELECT FROM migrate._flow o WHERE o.migration = f.migration AND o.target = f.target AND o.id <> f.id)
                THEN format(E'-- rows that other flows feed into %s count here too, unless a constant of the key tells them apart\n', f.target) ELSE '' END || format(E'SELECT count(*) AS differing\nFROM (SELECT %s FROM %s%s) s\nFULL JOIN (SELECT %s FROM %s%s) t ON %s\nWHERE (%s) IS DISTINCT FROM (%s);',
        string_agg(format('(%s)::%s AS %I', e.expression, e.dest_type, e.dest_column), ', ' ORDER BY e.ordinal), f.source,
        CASE WHEN p.filtered THEN ' WHERE (' || btrim(coalesce(f.filter, 'true'), E' \n\t') || ')' ELSE '' END,
        string_agg(quote_ident(e.dest_column), ', ' ORDER BY e.ordinal), f.target,
        coalesce(' WHERE ' || (SELECT string_agg(format('%I = %L', a.attname, p.key_const[i]), ' AND ') FROM generate_subscripts(p.key_dest, 1) i
                               JOIN pg_attribute a ON a.attrelid = p.dest AND a.attnum = p.key_dest[i] WHERE p.key_const[i] IS NOT NULL), ''),
        (SELECT string_agg(format('t.%1$I = s.%1$I', a.attname), ' AND ' ORDER BY i) FROM generate_subscripts(p.key_dest, 1) i
         JOIN pg_attribute a ON a.attrelid = p.dest AND a.attnum = p.key_dest[i]),
        string_agg(format('s.%I::text', e.dest_column), ', ' ORDER BY e.ordinal), string_agg(format('t.%I::text', e.dest_column), ', ' ORDER BY e.ordinal))
    FROM migrate._mapping p CROSS JOIN LATERAL migrate._expressions(f.id) e WHERE p.flow = f.id AND p.direction = 'forward'
    GROUP BY p.filtered, p.key_dest, p.key_const, p.dest
$$;

CREATE FUNCTION migrate._plan_commands(m migrate._migration) RETURNS text
LANGUAGE sql STABLE AS $$
    SELECT array_to_string(ARRAY['## Commands, in order', '', '```sql',
        format('SELECT * FROM migrate.preflight(%L) WHERE severity <> ''ok'';', m.name),
        format('SELECT migrate.start(%L);', m.name),
        format('CALL migrate.wait(%L);', m.name),
        format('SELECT * FROM migrate.validate(%L);', m.name),
        format('SELECT migrate.cutover(%L, dry_run => true);', m.name),
        format('SELECT migrate.cutover(%L);', m.name),
        format('-- SELECT migrate.rollback(%L);   -- the way back, until finalize', m.name),
        format('SELECT migrate.finalize(%L, dry_run => true);   -- lists all that it would drop', m.name),
        format('SELECT migrate.finalize(%L);      -- %s after cutover', m.name, migrate._opt(m.id, 'rollback_window')),
        format('SELECT migrate.drop(%L);', m.name), '```'], E'\n')
$$;

CREATE FUNCTION migrate._plan(caller regrole, name text) RETURNS text
LANGUAGE plpgsql STABLE AS $$
DECLARE
    m migrate._migration := migrate._find(caller, name);
    options text;
BEGIN
    PERFORM migrate._require_whole(m) WHERE m.phase NOT IN ('finalized', 'cancelled');
    SELECT string_agg(format('- %s = %s', d.name, migrate._option_show(d, coalesce(migrate._opt(m.id, d.name), 'none'))), E'\n' ORDER BY d.ordinal) INTO options
    FROM migrate._option_definition d WHERE coalesce(migrate._opt(m.id, d.name), 'none') <> d.standard;
    RETURN concat_ws(E'\n\n',
        format('# Migration %s', migrate._plan_code(m.name)),
        format('Phase: %s%s%s. Owner: %s.', m.phase, CASE WHEN m.paused_since IS NOT NULL THEN ', paused' END, CASE WHEN m.failed_since IS NOT NULL THEN ', failed' END, m.owner),
        CASE WHEN options IS NULL THEN 'All options are at their defaults.' ELSE E'Options that differ from their defaults:\n\n' || options END,
        '## What is mapped',
        (SELECT string_agg(migrate._plan_flow(f), E'\n\n' ORDER BY f.id) FROM migrate._flow f WHERE f.migration = m.id),
        migrate._plan_estimates(m), migrate._plan_phases(m, EXISTS (SELECT FROM migrate._check_deferred(m) c WHERE c.message ~ ' set aside ')), migrate._plan_swap(m, caller), migrate._plan_failures(m), migrate._plan_preflight(m, caller),
        migrate._plan_checklist(m), migrate._plan_commands(m)) || E'\n';
END $$;

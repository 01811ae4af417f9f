-- Options of a migration: their definitions as rows, set() and get(), and what the rest of the extension reads them by.
-- A value is kept in one canonical form whatever form it was given in: integers plain, times of kind ms as whole
-- milliseconds, intervals as PostgreSQL reads them back, ratios as decimals, none and default never as NULL.

CREATE TABLE migrate._option_definition (
    name        text PRIMARY KEY,
    ordinal     integer GENERATED ALWAYS AS IDENTITY,
    kind        text NOT NULL CHECK (kind IN ('integer', 'ms', 'interval', 'size', 'ratio', 'boolean', 'enum', 'list', 'query', 'window')),
    unit        text NOT NULL DEFAULT '',
    standard    text NOT NULL,
    nullable    boolean NOT NULL DEFAULT false,
    minimum     numeric,
    maximum     numeric,
    choices     text[],
    example     text NOT NULL,
    description text NOT NULL
);
COMMENT ON TABLE migrate._option_definition IS 'every option there is; set() accepts nothing else';
COMMENT ON COLUMN migrate._option_definition.standard IS 'the value in force while none is set; none where nothing is limited';
COMMENT ON COLUMN migrate._option_definition.nullable IS 'whether the value may be none';
COMMENT ON COLUMN migrate._option_definition.minimum IS 'in the unit of the kind: ms for times, bytes for sizes';
COMMENT ON COLUMN migrate._option_definition.example IS 'a value that the hint of an error shows';
INSERT INTO migrate._option_definition (name, kind, unit, standard, nullable, minimum, maximum, choices, example, description) VALUES
    ('dual_write', 'enum', '', 'best_effort', false, NULL, NULL, '{best_effort,strict}', 'strict',
     'what happens to a statement whose dual write cannot be applied: best_effort records the key and lets it pass, strict fails it'),
    ('batch_size', 'integer', 'rows', '1000', false, 10, 100000, NULL, '5000',
     'rows of the first backfill batch; later batches grow and shrink toward batch_time'),
    ('batch_time', 'ms', 'ms', '100', false, 1, 60000, NULL, '100 ms',
     'time a batch aims for: its row locks live as long, and an UPDATE of the application may wait that long'),
    ('workers', 'integer', 'workers', '1', false, 1, 64, NULL, '2', 'backfill workers that run side by side'),
    ('defer_indexes', 'enum', '', 'auto', false, NULL, NULL, '{auto,on,off}', 'auto',
     'whether start sets the target''s secondary indexes and foreign keys aside, to be built after the copy: auto does where the target is empty'),
    ('copy_order', 'enum', '', 'auto', false, NULL, NULL, '{auto,key,place}', 'place',
     'the order in which the backfill reads a source that it copies in bulk, chosen by start: place reads it block by block, and until the backfill has ended carries over updates of unmapped columns too; auto does where the key is in another order than the table and the table is larger than memory, the index of its key is not'),
    ('max_rows_per_second', 'integer', 'rows/s', 'none', true, 1, 1000000000, NULL, '20000', 'upper limit of the backfill''s rate'),
    ('sleep', 'ms', 'ms', '0', false, 0, 3600000, NULL, '50 ms', 'pause after every batch'),
    ('throttle_ratio', 'ratio', '', '0', false, 0, 0.99, NULL, '0.5', 'share of the time the workers sleep; throttle() sets it for a while'),
    ('max_replica_lag', 'ms', 'ms', '1500', true, 0, 86400000, NULL, '2s', 'the workers wait while any streaming replica lags more'),
    ('max_active_backends', 'integer', 'backends', 'none', true, 1, 100000, NULL, '40', 'the workers wait while more client backends are active'),
    ('max_wal_rate', 'size', 'bytes/s', 'none', true, 1024, 1099511627776, NULL, '32MB', 'the workers wait while the server writes more WAL a second'),
    ('throttle_query', 'query', '', 'none', true, NULL, NULL, NULL, 'SELECT count(*) > 100 FROM ops.queue',
     'a SELECT of one value: the workers wait while it gives true, NULL or an error; names in it need their schema'),
    ('window', 'window', '', 'always', false, NULL, NULL, NULL, '22:00-06:00 Europe/Berlin', 'hours in which the backfill runs'),
    ('lock_timeout', 'ms', 'ms', '10', false, 1, 60000, NULL, '10 ms', 'how long one attempt at a table lock may make the application wait'),
    ('cutover_timeout', 'ms', 'ms', '60000', false, 1, 86400000, NULL, '60 s', 'how long start, cutover and rollback go on trying'),
    ('cancel_blockers', 'ms', 'ms', 'none', true, 0, 86400000, NULL, '5 s',
     'how long start, cutover, rollback and finalize wait for who is in the way before they cancel his statement, or end his session where it is idle in a transaction; none: never'),
    ('rollback_window', 'interval', 'hours', '48 hours', false, 0, 31622400000, NULL, '48 hours', 'how long after cutover finalize is refused'),
    ('shadow_rate', 'ratio', '', '0', false, 0, 1, NULL, '0.01', 'share of the keys that shadow reads compare; 0 turns them off'),
    ('shadow_time', 'interval', 'minutes', '10 minutes', false, 0, 2678400000, NULL, '10 minutes', 'how long shadow reads go on before ready'),
    ('max_shadow_mismatch_rate', 'ratio', '', '0.001', false, 0, 1, NULL, '0.001', 'share of shadow reads that may differ before cutover is refused'),
    ('require', 'list', '', 'all', false, NULL, NULL,
     '{paused,failed,dual_writes,failures,requeue,deferred,validation,shadow,reverse,preflight,views,swap,sequences,snapshots}', 'failures,validation',
     'the gates that cutover insists on'),
    ('watch_time', 'interval', 'minutes', '0 seconds', false, 0, 2678400000, NULL, '30 minutes', 'how long after cutover the limits of the watch are looked at; 0: not at all'),
    ('watch_failures', 'integer', 'keys', '0', true, 0, 1000000000, NULL, '0', 'a limit of the watch: keys whose dual write has failed since the switch, also those that are mended by now'),
    ('watch_abort_rate', 'ratio', '', 'none', true, 0, 1, NULL, '0.05',
     'a limit of the watch: share of all transactions of the database that were aborted since the switch, whatever they did'),
    ('watch_latency', 'ratio', '', 'none', true, 1, 1000, NULL, '2',
     'a limit of the watch: how many times as long as before the switch statements on the tables and views take on average, by pg_stat_statements'),
    ('on_limit', 'enum', '', 'event', false, NULL, NULL, '{event,rollback}', 'rollback',
     'what happens when the watch finds a limit passed: an event alone, or a rollback too, tried for as long as the watch lasts'),
    ('cutover', 'enum', '', 'auto', false, NULL, NULL, '{auto,view,swap}', 'view',
     'how applications are switched: auto takes the views of add_view where there are any, and is the plain switch otherwise; swap gives the target the source''s name'),
    ('max_failures', 'integer', 'keys', '1000', false, 0, 10000000, NULL, '1000', 'the backfill stops as failed when more keys than this could not be copied'),
    ('equality', 'enum', '', 'image', false, NULL, NULL, '{image,semantic}', 'semantic',
     'when validation calls two values equal: the same text form (image), or the type''s own = (semantic)'),
    ('on_target_delete', 'enum', '', 'none', true, NULL, NULL, '{delete,keep}', 'keep',
     'what deleting a target row does to its source row after cutover; sets it for every flow of the migration'),
    ('accept_reverse_gaps', 'boolean', '', 'off', false, NULL, NULL, '{off,on}', 'on',
     'acknowledges that writes to the target after cutover are carried back only in part');

-- The migration called `name`, for reading: takes no lock and changes nothing.
CREATE FUNCTION migrate._find(caller regrole, name text) RETURNS migrate._migration
LANGUAGE plpgsql STABLE AS $$
DECLARE
    m migrate._migration;
BEGIN
    SELECT * INTO m FROM migrate._migration x WHERE x.name = _find.name;
    IF NOT FOUND OR NOT pg_has_role(caller, m.owner, 'MEMBER') THEN
        PERFORM migrate._raise('42704', format('migration "%s" does not exist', name), '',
            'SELECT name, phase FROM migrate.migration; lists yours.');
    END IF;
    RETURN m;
END $$;

-- The value in force in canonical form: what is set and not expired, else the default; NULL for none.
CREATE FUNCTION migrate._opt(m_id integer, option text) RETURNS text
LANGUAGE plpgsql STABLE AS $$
DECLARE
    found_value text;
BEGIN
    SELECT coalesce(o.value, d.standard) INTO found_value
    FROM migrate._option_definition d
    LEFT JOIN migrate._option o ON o.migration = m_id AND o.name = d.name AND (o.expires_at IS NULL OR o.expires_at > clock_timestamp())
    WHERE d.name = option;
    IF NOT FOUND THEN
        PERFORM migrate._raise('42704', format('option "%s" does not exist', option));
    END IF;
    RETURN nullif(found_value, 'none');
END $$;

-- The same for times, in milliseconds.
CREATE FUNCTION migrate._opt_ms(m_id integer, option text) RETURNS bigint
LANGUAGE plpgsql STABLE AS $$
DECLARE
    found_value text := migrate._opt(m_id, option);
BEGIN
    IF found_value ~ '^\d+$' THEN
        RETURN found_value::bigint;
    END IF;
    RETURN round(extract(epoch FROM found_value::interval)::numeric * 1000)::bigint;
END $$;

-- A canonical value as people read it.
CREATE FUNCTION migrate._option_show(d migrate._option_definition, value text) RETURNS text
LANGUAGE sql STABLE AS $$
    SELECT CASE WHEN value IS NULL OR value = 'none' THEN 'none'
                WHEN d.kind = 'size' THEN pg_size_pretty(value::bigint) || '/s'
                WHEN d.kind = 'ms' THEN value || ' ms'
                ELSE value END
$$;

-- '48 hours', '90 minutes', '1.5 seconds': a length of time that PostgreSQL reads back under any IntervalStyle.
CREATE FUNCTION migrate._interval_text(ms numeric) RETURNS text
LANGUAGE sql IMMUTABLE AS $$
    SELECT CASE WHEN ms = 0 THEN '0 seconds'
                WHEN ms % 3600000 = 0 THEN div(ms, 3600000) || ' hour' || CASE WHEN ms = 3600000 THEN '' ELSE 's' END
                WHEN ms % 60000 = 0 THEN div(ms, 60000) || ' minute' || CASE WHEN ms = 60000 THEN '' ELSE 's' END
                ELSE trim_scale(ms / 1000) || ' second' || CASE WHEN ms = 1000 THEN '' ELSE 's' END END
$$;

CREATE FUNCTION migrate._option_limits(d migrate._option_definition) RETURNS text
LANGUAGE sql STABLE AS $$
    SELECT CASE d.kind
             WHEN 'integer' THEN format('a whole number from %s to %s %s', d.minimum, d.maximum, d.unit)
             WHEN 'ms' THEN format('a time from %s ms to %s ms (a bare number is in ms)', d.minimum, d.maximum)
             WHEN 'interval' THEN format('a time from %s to %s (a bare number is in %s)', migrate._interval_text(d.minimum),
                                         migrate._interval_text(d.maximum), d.unit)
             WHEN 'size' THEN format('a size from %s/s to %s/s (a bare number is in bytes)', pg_size_pretty(d.minimum), pg_size_pretty(d.maximum))
             WHEN 'ratio' THEN format('a share from %s to %s, or in percent', d.minimum, d.maximum)
             WHEN 'boolean' THEN 'on or off'
             WHEN 'enum' THEN 'one of ' || array_to_string(d.choices, ', ')
             WHEN 'list' THEN 'all, or a list of ' || array_to_string(d.choices, ', ')
             WHEN 'query' THEN 'one SELECT of one boolean value, without a semicolon'
             WHEN 'window' THEN 'always, or HH:MM-HH:MM with the name of a time zone'
           END || CASE WHEN d.nullable THEN ', or none' ELSE '' END
$$;

-- Raises what set() says to a value it cannot take.
CREATE FUNCTION migrate._option_refuse(m migrate._migration, d migrate._option_definition, value text, why text DEFAULT '') RETURNS void
LANGUAGE sql AS $$
    SELECT migrate._raise('22023', format('invalid value for option "%s": "%s"', d.name, value),
        format('%sIt must be %s; the value in force is %s.', CASE WHEN why = '' THEN '' ELSE why || ' ' END, migrate._option_limits(d),
               migrate._option_show(d, migrate._opt(m.id, d.name))),
        format('SELECT migrate.set(%L, %L, %L);', m.name, d.name, d.example))
$$;

-- The numbers of kinds integer, ms, interval, size and ratio, in the unit of the limits; NULL when the text is not one.
CREATE FUNCTION migrate._option_number(d migrate._option_definition, value text) RETURNS numeric
LANGUAGE plpgsql STABLE AS $$
DECLARE
    bare boolean := value ~ '^-?(\d+(\.\d*)?|\.\d+)$';
    unit text := CASE d.kind WHEN 'ms' THEN 'ms' ELSE d.unit END;
BEGIN
    IF d.kind = 'integer' THEN
        value := regexp_replace(value, '\s*' || d.unit || '$', '');
        RETURN CASE WHEN value ~ '^-?\d{1,30}$' THEN value::numeric END;
    ELSIF d.kind = 'ratio' THEN
        IF value ~ '^-?(\d+(\.\d*)?|\.\d+)\s*%$' THEN
            RETURN trim_scale(rtrim(value, '% ')::numeric / 100);
        END IF;
        RETURN CASE WHEN bare THEN trim_scale(value::numeric) END;
    ELSIF d.kind = 'size' THEN
        RETURN round(pg_size_bytes(regexp_replace(value, '\s*/\s*s(ec|econd)?$', '')));
    END IF;
    -- A bare '1:30' or a date-like text would be read as something the user may not mean.
    IF NOT bare AND value !~ '^-?(\d+(\.\d*)?|\.\d+)\s*[a-z]+(\s+\d+(\.\d*)?\s*[a-z]+)*$' AND value !~ '^\d+:\d\d:\d\d$' THEN
        RETURN NULL;
    END IF;
    RETURN round(extract(epoch FROM (value || CASE WHEN bare THEN ' ' || unit ELSE '' END)::interval)::numeric * 1000);
EXCEPTION WHEN data_exception THEN
    RETURN NULL;
END $$;

-- 'HH:MM-HH:MM zone'. Without a zone it means the session's, which is written into the value.
CREATE FUNCTION migrate._option_window(m migrate._migration, d migrate._option_definition, value text) RETURNS text
LANGUAGE plpgsql STABLE AS $$
DECLARE
    part text[] := regexp_match(value, '^(\d{1,2}):(\d{2})\s*-\s*(\d{1,2}):(\d{2})(?:\s+(\S.*))?$');
    zone text;
BEGIN
    IF part IS NULL OR part[1]::int > 24 OR part[3]::int > 24 OR part[2]::int > 59 OR part[4]::int > 59
       OR (part[1]::int = 24 AND part[2]::int > 0) OR (part[3]::int = 24 AND part[4]::int > 0) THEN
        PERFORM migrate._option_refuse(m, d, value);
    ELSIF lpad(part[1], 2, '0') || part[2] = lpad(part[3], 2, '0') || part[4] THEN
        PERFORM migrate._option_refuse(m, d, value, 'The window is empty.');
    END IF;
    SELECT z.name INTO zone FROM pg_timezone_names z WHERE lower(z.name) = lower(coalesce(part[5], current_setting('TimeZone'))) LIMIT 1;
    IF zone IS NULL THEN
        PERFORM migrate._option_refuse(m, d, value, format('Time zone "%s" is not in pg_timezone_names.', coalesce(part[5], current_setting('TimeZone'))));
    END IF;
    RETURN format('%s:%s-%s:%s %s', lpad(part[1], 2, '0'), part[2], lpad(part[3], 2, '0'), part[4], zone);
END $$;

-- The query is planned as the migration's owner and never run here: the constant WHERE clause keeps it from execution.
CREATE FUNCTION migrate._option_query(m migrate._migration, d migrate._option_definition, value text) RETURNS text
LANGUAGE plpgsql AS $$
DECLARE
    problem text;
BEGIN
    value := rtrim(value, E'; \t\r\n');
    IF value ~ ';' OR value !~* '^\s*(select|with|values|table)\M' THEN
        PERFORM migrate._option_refuse(m, d, value);
    END IF;
    BEGIN
        PERFORM migrate._as(m.owner, format(E'SELECT q.ok::boolean FROM (\n%s\n) AS q(ok) WHERE false', value));
        PERFORM migrate._as(m.owner, format(E'SELECT (\n%s\n)::boolean WHERE false', value));
    EXCEPTION WHEN OTHERS THEN
        GET STACKED DIAGNOSTICS problem = MESSAGE_TEXT;
    END;
    IF problem IS NOT NULL THEN
        PERFORM migrate._option_refuse(m, d, value, format('It gives the error: %s.', problem));
    END IF;
    RETURN value;
END $$;

-- The canonical form of a value, or an error that names the value and its limits.
CREATE FUNCTION migrate._option_canonical(m migrate._migration, d migrate._option_definition, value text) RETURNS text
LANGUAGE plpgsql AS $$
DECLARE
    given text := btrim(value, E' \t\r\n');
    low text := lower(given);
    number numeric;
    gates text[];
BEGIN
    IF low IN ('none', 'off', '') AND d.nullable THEN
        RETURN 'none';
    ELSIF d.kind IN ('integer', 'ms', 'interval', 'size', 'ratio') THEN
        number := migrate._option_number(d, CASE WHEN d.kind = 'size' THEN given ELSE low END);
        IF number IS NULL THEN
            PERFORM migrate._option_refuse(m, d, value);
        ELSIF number < d.minimum OR number > d.maximum THEN
            PERFORM migrate._option_refuse(m, d, value, CASE WHEN number < d.minimum THEN 'It is too small.' ELSE 'It is too large.' END);
        END IF;
        RETURN CASE d.kind WHEN 'interval' THEN migrate._interval_text(number) ELSE number::text END;
    ELSIF d.kind = 'boolean' THEN
        IF low IN ('on', 'true', 'yes', '1') THEN RETURN 'on';
        ELSIF low IN ('off', 'false', 'no', '0') THEN RETURN 'off';
        END IF;
        PERFORM migrate._option_refuse(m, d, value);
    ELSIF d.kind = 'enum' THEN
        IF low <> ALL (d.choices) THEN
            PERFORM migrate._option_refuse(m, d, value);
        END IF;
        RETURN low;
    ELSIF d.kind = 'list' THEN
        gates := regexp_split_to_array(low, '\s*,\s*');
        IF low = 'all' OR low = 'none' THEN
            RETURN CASE low WHEN 'none' THEN '' ELSE low END;
        ELSIF low = '' OR NOT gates <@ d.choices THEN
            PERFORM migrate._option_refuse(m, d, value);
        END IF;
        RETURN (SELECT string_agg(c, ',' ORDER BY i) FROM unnest(d.choices) WITH ORDINALITY AS u(c, i) WHERE c = ANY (gates));
    ELSIF d.kind = 'window' THEN
        RETURN CASE low WHEN 'always' THEN 'always' ELSE migrate._option_window(m, d, given) END;
    END IF;
    RETURN migrate._option_query(m, d, given);
END $$;

-- What a changed value must do at once, beyond being read the next time.
CREATE FUNCTION migrate._option_effect(m migrate._migration, caller regrole, option text, value text) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
    PERFORM migrate._change_watch(m, caller) WHERE option = 'watch_time' AND m.phase = 'cut_over';
    IF option = 'batch_size' THEN
        UPDATE migrate._migration x SET batch_rows = NULL WHERE x.id = m.id;  -- the worker begins with it again
    END IF;
    IF option = 'on_target_delete' THEN
        UPDATE migrate._flow f SET on_target_delete = value WHERE f.migration = m.id;
    END IF;
    -- The triggers keep what they have read of a flow until its tables are invalidated.
    IF option IN ('dual_write', 'on_target_delete') THEN
        PERFORM migrate._invalidate(x.relation) FROM
            (SELECT f.source AS relation FROM migrate._flow f WHERE f.migration = m.id UNION
             SELECT f.target FROM migrate._flow f WHERE f.migration = m.id) x
        WHERE EXISTS (SELECT FROM pg_class c WHERE c.oid = x.relation);
    END IF;
END $$;

CREATE FUNCTION migrate._set(caller regrole, name text, option text, value text) RETURNS text
LANGUAGE plpgsql AS $$
DECLARE
    m migrate._migration := migrate._lock(caller, name);
    d migrate._option_definition;
    before text;
    after text;
    change text;
BEGIN
    SELECT * INTO d FROM migrate._option_definition x WHERE x.name = lower(btrim(option));
    IF NOT FOUND THEN
        PERFORM migrate._raise('42704', format('option "%s" does not exist', option),
            format('The options are %s.', (SELECT string_agg(x.name, ', ' ORDER BY x.ordinal) FROM migrate._option_definition x)),
            format('SELECT option, value, unit, description FROM migrate.get(%L); shows them.', m.name));
    ELSIF m.phase IN ('finalized', 'cancelled') THEN
        PERFORM migrate._raise('55000', format('migration "%s" is %s', m.name, m.phase), 'Its options have no effect any more.');
    ELSIF value IS NULL THEN
        PERFORM migrate._option_refuse(m, d, 'NULL', 'Write ''default'' to go back to the default.');
    END IF;

    SELECT o.value INTO before FROM migrate._option o
    WHERE o.migration = m.id AND o.name = d.name AND (o.expires_at IS NULL OR o.expires_at > clock_timestamp());
    IF d.name = 'on_target_delete' THEN
        before := (SELECT CASE WHEN count(DISTINCT coalesce(f.on_target_delete, 'none')) > 1 THEN 'differs by flow' ELSE min(f.on_target_delete) END
                   FROM migrate._flow f WHERE f.migration = m.id);
    END IF;
    IF lower(btrim(value)) = 'default' THEN
        after := d.standard;
    ELSE
        after := migrate._option_canonical(m, d, value);
    END IF;
    IF d.name = 'cutover' AND 'swap' IN (coalesce(before, d.standard), after) AND after <> coalesce(before, d.standard) THEN
        PERFORM migrate._require_swap_change(m, after);
    ELSIF d.name = 'on_target_delete' AND m.both_directions AND after IS DISTINCT FROM before THEN
        PERFORM migrate._raise('55000', format('option "%s" cannot change after cutover', d.name),
            format('Migration "%s" is in phase %s and deletes have been carried back by the rule %s.', m.name, m.phase, coalesce(before, 'of its flows')));
    ELSIF d.name = 'watch_latency' AND after <> 'none' THEN
        PERFORM migrate._require_statements();
        IF m.phase = 'cut_over' AND coalesce(before, 'none') = 'none' THEN
            PERFORM migrate._raise('55000', format('option "watch_latency" of migration "%s" comes too late: it is cut over', m.name), 'There is nothing from before the switch to compare with.');
        END IF;
    END IF;

    change := format('%s -> %s', migrate._option_show(d, coalesce(before, d.standard)), migrate._option_show(d, after));
    IF after = coalesce(before, d.standard) THEN
        RAISE NOTICE 'option "%" of migration "%" is % already', d.name, m.name, migrate._option_show(d, after);
        RETURN change;
    END IF;
    DELETE FROM migrate._option o WHERE o.migration = m.id AND o.name = d.name;
    IF after <> d.standard THEN
        INSERT INTO migrate._option (migration, name, value) VALUES (m.id, d.name, after);
    END IF;
    PERFORM migrate._option_effect(m, caller, d.name, nullif(after, 'none'));
    PERFORM migrate._event(m, caller, 'option', format('%s: %s', d.name, change));
    RETURN change;
END $$;

CREATE FUNCTION migrate._get(caller regrole, name text, option text)
RETURNS TABLE (option_name text, value text, "default" text, unit text, description text)
LANGUAGE plpgsql STABLE AS $$
DECLARE
    m migrate._migration := migrate._find(caller, name);
BEGIN
    IF option IS NOT NULL AND NOT EXISTS (SELECT FROM migrate._option_definition d WHERE d.name = lower(btrim(option))) THEN
        PERFORM migrate._raise('42704', format('option "%s" does not exist', option), '',
            format('SELECT option, value, unit, description FROM migrate.get(%L); shows all.', m.name));
    END IF;
    RETURN QUERY
    SELECT d.name,
           CASE WHEN d.name = 'on_target_delete'
                THEN (SELECT coalesce(CASE WHEN count(DISTINCT coalesce(f.on_target_delete, 'none')) > 1
                                           THEN string_agg(f.name || ': ' || coalesce(f.on_target_delete, 'none'), ', ' ORDER BY f.id)
                                           ELSE min(f.on_target_delete) END, 'none')
                      FROM migrate._flow f WHERE f.migration = m.id)
                ELSE coalesce(migrate._opt(m.id, d.name), 'none') END,
           d.standard, d.unit, d.description
    FROM migrate._option_definition d
    WHERE _get.option IS NULL OR d.name = lower(btrim(_get.option))
    ORDER BY d.ordinal;
END $$;

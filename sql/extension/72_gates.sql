-- The gates of a switch: what must hold before it, each with its name, its problem and what to do about it.

CREATE FUNCTION migrate._gate_names() RETURNS text[]
LANGUAGE sql IMMUTABLE AS $$
    SELECT '{paused,failed,dual_writes,failures,requeue,deferred,validation,shadow,reverse,preflight,views,swap,sequences,snapshots}'::text[]
$$;
COMMENT ON FUNCTION migrate._gate_names IS 'what a switch checks; snapshots is the wait for old snapshots';

-- The way back must not be barred by what only says that the way forth was hasty. side read: some reads are to go to the target, and the
-- source still serves.
CREATE FUNCTION migrate._gates_of(side text) RETURNS text[]
LANGUAGE sql IMMUTABLE AS $$
    SELECT CASE side WHEN 'target' THEN migrate._gate_names()
                     WHEN 'read' THEN '{paused,failed,dual_writes,failures,requeue,deferred,validation,shadow,preflight,views,snapshots}'
                     WHEN 'source' THEN '{dual_writes,failures,requeue,validation,reverse,views,swap,sequences,snapshots}'
                     ELSE '{}' END
$$;

-- Each gate with its problem (NULL: it passes) and what to do about it. under_locks: only those that a write can change meanwhile.
CREATE FUNCTION migrate._gates(m migrate._migration, caller regrole, side text, under_locks boolean, skipped text[])
RETURNS TABLE (gate text, problem text, hint text)
LANGUAGE plpgsql AS $$
DECLARE
    forward boolean := side = 'target';
BEGIN
    FOREACH gate IN ARRAY CASE WHEN under_locks THEN '{dual_writes,failures,requeue}' ELSE migrate._gates_of(side) END LOOP
        CONTINUE WHEN gate = ANY (skipped) OR gate = 'snapshots';
        problem := NULL;
        hint := NULL;
        CASE gate
        WHEN 'paused' THEN
            problem := coalesce(m.paused_reason, (SELECT c.why FROM migrate._clone c WHERE c.migration = m.id));
            hint := format('SELECT migrate.resume(%L);', m.name);
        WHEN 'failed' THEN
            problem := m.failed_reason;
            hint := format('SELECT migrate.retry(%L);', m.name);
        WHEN 'dual_writes' THEN
            SELECT 'a trigger or a partition changed since the dual writes were armed, in flow ' || string_agg(f.name, ', ' ORDER BY f.id) INTO problem
            FROM migrate._flow f WHERE f.migration = m.id AND migrate._has_gap(f);
            hint := format('SELECT migrate.retry(%L); arms them again and validates.', m.name);
        WHEN 'failures' THEN
            SELECT format('%s dual writes are not applied', count(*)) INTO problem
            FROM migrate._failure x JOIN migrate._flow f ON f.id = x.flow WHERE f.migration = m.id HAVING count(*) > 0;
            hint := format('SELECT * FROM migrate.failures WHERE migration = %L; names them. They are tried again by themselves, and at once by SELECT migrate.retry(%L);', m.name, m.name);
        WHEN 'requeue' THEN
            SELECT format('%s keys wait to be copied', count(*)) INTO problem
            FROM migrate._requeue x JOIN migrate._flow f ON f.id = x.flow WHERE f.migration = m.id HAVING count(*) > 0;
            hint := format('SELECT * FROM migrate.progress WHERE migration = %L; shows whether a worker is at it.', m.name);
        WHEN 'deferred' THEN
            SELECT 'not built or validated yet: ' || string_agg(migrate._deferred_name(d), ', ' ORDER BY d.flow, d.ordinal) INTO problem
            FROM migrate._still_deferred(m.id) d WHERE d.relation IS NULL;
            hint := format('SELECT * FROM migrate.progress WHERE migration = %L; shows whether a worker is at it.', m.name);
        WHEN 'validation' THEN
            problem := migrate._validation_gate(m.id);
            hint := format('SELECT * FROM migrate.validate(%L);', m.name);
        WHEN 'shadow' THEN
            problem := migrate._shadow_gate(m.id);
            hint := format('SELECT * FROM migrate.shadow_reads WHERE migration = %L; and migrate.shadow_mismatches show what was found.', m.name);
        WHEN 'reverse' THEN
            SELECT r.problem, r.hint INTO problem, hint FROM migrate._reverse_gate(m, forward) r;
        WHEN 'preflight' THEN
            SELECT string_agg(format('%s: %s', p."check", p.message), '; ') INTO problem
            FROM migrate._preflight(caller, m.name) p WHERE p.severity = 'error';
            hint := format('SELECT * FROM migrate.preflight(%L) WHERE severity = ''error'';', m.name);
        WHEN 'views' THEN
            SELECT r.problem, r.hint INTO problem, hint FROM migrate._views_gate(m, side) r;
        WHEN 'swap' THEN
            SELECT r.problem, r.hint INTO problem, hint FROM migrate._swap_gate(m, caller, side) r;
        WHEN 'sequences' THEN
            SELECT r.problem, r.hint INTO problem, hint FROM migrate._sequence_gate(m.id, side) r;
        END CASE;
        RETURN NEXT;
    END LOOP;
END $$;

-- What validation says against a switch, or NULL: the latest whole one must be equal, with nothing found or mended since.
CREATE FUNCTION migrate._validation_gate(m_id integer) RETURNS text
LANGUAGE plpgsql STABLE AS $$
DECLARE
    latest record;
BEGIN
    SELECT * INTO latest FROM migrate._last_validation(m_id);
    RETURN CASE WHEN latest.run IS NULL THEN 'both sides have not been validated'
                WHEN latest.open_mismatches > 0 THEN format('%s keys differ', latest.open_mismatches)
                WHEN latest.verdict <> 'equal' THEN 'the latest validation found a mismatch'
                WHEN EXISTS (SELECT FROM migrate._event e WHERE e.migration = m_id AND e.kind = 'repaired' AND e.at > latest.at)
                    THEN 'rows were repaired since the latest validation'
                WHEN EXISTS (SELECT FROM migrate._event e WHERE e.migration = m_id AND e.kind = 'rearmed' AND e.at > latest.at)
                    THEN 'the dual writes had a gap and were armed again since the latest validation'
                -- (What was written to one target came back to the source, and went no further.)
                WHEN EXISTS (SELECT FROM migrate._event e WHERE e.migration = m_id AND e.kind = 'phase' AND e.from_phase = 'cut_over' AND e.to_phase = 'ready' AND e.at > latest.at)
                     AND EXISTS (SELECT FROM migrate._flow a JOIN migrate._flow b ON b.source = a.source AND b.target <> a.target WHERE a.migration = m_id AND b.migration = m_id)
                    THEN 'what one target of a source was written while it served is not in the source''s other targets, and nothing was validated since the rollback' END;
END $$;

-- Whether what is written to the target comes back to the source.
CREATE FUNCTION migrate._reverse_gate(m migrate._migration, forward boolean, OUT problem text, OUT hint text)
LANGUAGE plpgsql STABLE AS $$
DECLARE
    accepted boolean := migrate._opt(m.id, 'accept_reverse_gaps') = 'on';
    one_way text := (SELECT string_agg(f.name, ', ' ORDER BY f.id) FROM migrate._flow f WHERE f.migration = m.id
                     AND NOT EXISTS (SELECT FROM migrate._mapping p JOIN pg_class v ON v.oid = p.view WHERE p.flow = f.id AND p.direction = 'reverse'
                                     AND NOT EXISTS (SELECT FROM pg_attribute a WHERE a.attrelid = p.dest AND a.attnum = ANY (p.key_dest) AND a.attisdropped)));
    undecided text := (SELECT string_agg(f.name, ', ' ORDER BY f.id) FROM migrate._flow f WHERE f.migration = m.id AND f.on_target_delete IS NULL
                       AND EXISTS (SELECT FROM migrate._mapping p WHERE p.flow = f.id AND p.direction = 'reverse'));
    gaps text := (SELECT string_agg(f.name || ': ' || array_to_string(f.reverse_gaps, '; '), '; ' ORDER BY f.id) FROM migrate._flow f
                  WHERE f.migration = m.id AND f.reverse_gaps <> '{}');
BEGIN
    IF NOT forward THEN
        problem := 'writes made to the target since cutover were not carried back, for there is no reverse mapping for flow ' || one_way;
        hint := 'Skip this gate if the application has written nothing, or if that may be lost.';
    ELSIF one_way IS NOT NULL AND NOT accepted THEN
        problem := 'no reverse mapping for flow ' || one_way || ': writes made after cutover would be lost by a rollback';
        hint := format('Give reverse => at define, or accept it: SELECT migrate.set(%L, ''accept_reverse_gaps'', ''on'');', m.name);
    ELSIF gaps IS NOT NULL AND NOT accepted THEN
        problem := 'writes made after cutover are carried back only in part: ' || gaps;
        hint := format('SELECT migrate.set(%L, ''accept_reverse_gaps'', ''on''); accepts it.', m.name);
    ELSIF undecided IS NOT NULL THEN
        problem := 'it is not decided what deleting a target row does to its source row, in flow ' || undecided;
        hint := format('SELECT migrate.set(%L, ''on_target_delete'', ''keep''); or ''delete''.', m.name);
    END IF;
END $$;

CREATE FUNCTION migrate._views_gate(m migrate._migration, side text, OUT problem text, OUT hint text)
LANGUAGE plpgsql STABLE AS $$
DECLARE
    v migrate._view;
    missing record;
BEGIN
    IF migrate._opt(m.id, 'cutover') = 'view' AND NOT EXISTS (SELECT FROM migrate._view x WHERE x.migration = m.id) THEN
        problem := 'option cutover is view, but there is no view';
        hint := format('SELECT migrate.add_view(%L, ''…'');', m.name);
    END IF;
    FOR v IN SELECT * FROM migrate._view x WHERE x.migration = m.id AND (side <> 'read' OR x.use = 'read') ORDER BY x.view LOOP
        IF NOT EXISTS (SELECT FROM pg_class c WHERE c.oid = v.view) THEN
            problem := format('the view with OID %s was dropped', v.view::oid);
            hint := CASE WHEN side = 'source' THEN 'Skip this gate. After the rollback ' ELSE '' END
                || CASE v.shape WHEN 'source' THEN format('ALTER TABLE %s RENAME TO …; ', (SELECT f.source FROM migrate._flow f WHERE f.id = v.flow)) ELSE '' END
                || format('SELECT migrate.add_view(%L, view => ''…''%s); puts another in its place.', m.name,
                          CASE WHEN v.shape = 'source' THEN ', shape => ''source''' WHEN v.use = 'read' THEN ', use => ''read''' ELSE '' END);
            CONTINUE;
        END IF;
        SELECT * INTO missing FROM migrate._view_rights(v, CASE side WHEN 'read' THEN 'target' ELSE side END) LIMIT 1;
        IF FOUND THEN
            problem := format('role %s lacks %s on %s, which view %s needs', missing.role, missing.privileges, missing.relation, v.view);
            hint := format('GRANT %s ON %s TO %s;', missing.privileges, missing.relation, missing.role);
        END IF;
    END LOOP;
END $$;

-- Raises with all gates that do not pass.
CREATE FUNCTION migrate._require_gates(m migrate._migration, caller regrole, side text, under_locks boolean, skipped text[]) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    failed text[];
    problems text;
    hints text;
    verb text := CASE side WHEN 'target' THEN 'cutover' WHEN 'read' THEN 'route' ELSE 'rollback' END;
BEGIN
    SELECT array_agg(g.gate), string_agg(g.gate || ': ' || g.problem, E'\n'), string_agg(g.hint, E'\n') INTO failed, problems, hints
    FROM migrate._gates(m, caller, side, under_locks, skipped) g WHERE g.problem IS NOT NULL;
    IF failed IS NOT NULL THEN
        PERFORM migrate._raise('55000', format('%s of migration "%s" is refused by gate %s', verb, m.name, array_to_string(failed, ', ')), problems,
            hints || format(E'\nTo go on all the same, by name: SELECT migrate.%s(%L, %sskip => %L);', verb, m.name, CASE side WHEN 'read' THEN '…, ' ELSE '' END, failed));
    END IF;
END $$;

-- The gates not to check: those named in this call, and those that option require leaves out. Raises on a name that is none.
CREATE FUNCTION migrate._skipped_gates(m migrate._migration, skip text[]) RETURNS text[]
LANGUAGE plpgsql STABLE AS $$
DECLARE
    required text := coalesce(migrate._opt(m.id, 'require'), 'all');
    optional text[] := (SELECT d.choices FROM migrate._option_definition d WHERE d.name = 'require');
    bad text;
BEGIN
    SELECT s INTO bad FROM unnest(skip) s WHERE s IS NULL OR s <> ALL (migrate._gate_names()) LIMIT 1;
    IF FOUND THEN
        PERFORM migrate._raise('22023', format('gate "%s" does not exist', bad),
            format('The gates are %s. The phase is no gate: it cannot be skipped.', array_to_string(migrate._gate_names(), ', ')));
    END IF;
    RETURN ARRAY(SELECT g FROM unnest(migrate._gate_names()) WITH ORDINALITY AS n(g, i)
                 WHERE g = ANY (skip) OR required <> 'all' AND g = ANY (optional) AND g <> ALL (string_to_array(required, ',')) ORDER BY i);
END $$;

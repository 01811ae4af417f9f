-- What a swap does with foreign keys, in both directions. A new one is added NOT VALID, which takes a moment; a worker validates it
-- afterwards, as it does with those that start sets aside (76_restore.sql).

-- A foreign key as text: FOREIGN KEY (…), the columns it references, and what follows them; form: why that cannot be told or not be made again.
CREATE FUNCTION migrate._swap_key_text(k pg_constraint, OUT head text, OUT referenced text, OUT rest text, OUT form text)
LANGUAGE plpgsql STABLE AS $$
DECLARE
    definition text := pg_get_constraintdef(k.oid);
    prefix text;
BEGIN
    SELECT h.head, h.prefix INTO head, prefix FROM migrate._foreign_key_head(k) h;
    referenced := '(' || migrate._column_list(k.confrelid, k.confkey) || ')';
    form := CASE
        WHEN NOT starts_with(definition, left(prefix, -1) || referenced) THEN 'its definition has a form that is not known'
        WHEN to_jsonb(k) ->> 'conenforced' = 'false' THEN 'it is not enforced'
        WHEN k.condeferred THEN 'it is INITIALLY DEFERRED'
        WHEN NOT k.conislocal OR k.coninhcount > 0 THEN 'it is inherited'
        WHEN (SELECT c.relkind FROM pg_class c WHERE c.oid = k.conrelid) = 'p' THEN 'a key of a partitioned table cannot be added NOT VALID'
        WHEN EXISTS (SELECT FROM pg_trigger g WHERE g.tgconstraint = k.oid AND g.tgenabled <> 'O') THEN 'a trigger of it is not enabled in the ordinary way' END;
    rest := regexp_replace(substr(definition, length(left(prefix, -1) || referenced) + 1), ' NOT VALID$', '');
END $$;

-- Valid, or to be validated by a worker since the last switch.
CREATE FUNCTION migrate._swap_is_valid(k pg_constraint) RETURNS boolean
LANGUAGE sql STABLE AS $$
    SELECT k.convalidated OR EXISTS (SELECT FROM migrate._deferred d WHERE d.relation = k.conrelid AND d.name = k.conname AND d.state IN ('added', 'validating'))
$$;

-- The keys of the source: the target gets those that it does not have. Where they reference a source of this migration, its target.
CREATE FUNCTION migrate._swap_outgoing_keys(m migrate._migration, p migrate._swap_pair) RETURNS SETOF migrate._swap_step
LANGUAGE plpgsql STABLE AS $$
DECLARE
    k pg_constraint;
    t record;
    other migrate._swap_pair;
    image int2[];
    twin name;
    object text;
BEGIN
    FOR k IN SELECT * FROM pg_constraint c WHERE c.conrelid = p.source AND c.contype = 'f' AND c.conparentid = 0 ORDER BY c.conname LOOP
        object := format('foreign key %I of %s', k.conname, p.source);
        SELECT * INTO other FROM migrate._swap_pairs(m.id) x WHERE x.source = k.confrelid;
        image := migrate._swap_image(p, k.conkey);
        SELECT min(c.conname::text) INTO twin FROM pg_constraint c
        WHERE c.conrelid = p.target AND c.contype = 'f' AND c.conparentid = 0 AND c.conkey = image
          AND (c.confrelid = k.confrelid AND c.confkey = k.confkey OR c.confrelid = other.target AND c.confkey = migrate._swap_image(other, k.confkey));
        SELECT * INTO t FROM migrate._swap_key_text(k);
        IF twin = k.conname THEN
            CONTINUE;
        ELSIF twin IS NOT NULL AND NOT EXISTS (SELECT FROM pg_constraint c WHERE c.conrelid = p.target AND (c.conname = k.conname OR c.conname = twin AND c.confrelid = other.source)) THEN
            -- (One that references the source of another flow is on its way to that one's target, by its own name.)
            RETURN NEXT migrate._swap_rename_constraint(p, twin, k.conname);
            RETURN QUERY SELECT x.* FROM pg_constraint c, LATERAL migrate._swap_comment(p, 'CONSTRAINT', k.conname, 'pg_constraint', k.oid, c.oid) x WHERE c.conrelid = p.target AND c.conname = twin;
        ELSIF twin IS NOT NULL THEN
            CONTINUE;
        ELSIF k.confrelid = p.target THEN
            RETURN NEXT migrate._swap_refused(object, 'references the target itself', format('ALTER TABLE %s DROP CONSTRAINT %I;', p.source, k.conname));
        ELSIF array_position(image, NULL) IS NOT NULL OR other.source IS NOT NULL AND array_position(migrate._swap_image(other, k.confkey), NULL) IS NOT NULL OR t.form IS NOT NULL
              OR (SELECT c.relkind FROM pg_class c WHERE c.oid = p.target) = 'p' OR t.rest ~ ' SET (NULL|DEFAULT) \(' THEN
            RETURN NEXT migrate._swap_refused(object, 'cannot be added to the target: ' || coalesce(t.form, 'a column of it is not mapped bare, or the target is partitioned'),
                format('ALTER TABLE %s ADD FOREIGN KEY …; or ALTER TABLE %s DROP CONSTRAINT %I;', p.target, p.source, k.conname));
        ELSIF EXISTS (SELECT FROM pg_constraint c WHERE c.conrelid = p.target AND c.conname = k.conname) THEN
            RETURN NEXT migrate._swap_refused(object, 'has a name that another constraint of the target has', format('ALTER TABLE %s RENAME CONSTRAINT %I TO …;', p.target, k.conname));
        ELSE
            RETURN NEXT migrate._swap_step(10, 'key', object, format('foreign key %I to %s is added to the new table%s', k.conname, k.confrelid::regclass,
                CASE WHEN migrate._swap_is_valid(k) THEN ', NOT VALID, and validated afterwards' ELSE ', NOT VALID as it is' END), p.target, p.owner,
                ARRAY['ALTER TABLE ', format(' ADD CONSTRAINT %I FOREIGN KEY (%s) REFERENCES %s%s%s NOT VALID', k.conname, migrate._column_list(p.target, image), migrate._relation_name(k.confrelid),
                      CASE WHEN other.source IS NULL THEN t.referenced ELSE '(' || migrate._column_list(other.target, migrate._swap_image(other, k.confkey)) || ')' END, t.rest)],
                ARRAY['ALTER TABLE ', format(' DROP CONSTRAINT %I', k.conname)], migrate._swap_is_valid(k));
            RETURN QUERY SELECT * FROM migrate._swap_comment(p, 'CONSTRAINT', k.conname, 'pg_constraint', k.oid, NULL, 10);
        END IF;
    END LOOP;
END $$;

-- The keys of others to the source reference the target. Why one cannot, or NULL; and the statement that helps.
CREATE FUNCTION migrate._swap_incoming_problem(m migrate._migration, p migrate._swap_pair, k pg_constraint, form text, OUT why text, OUT hint text)
LANGUAGE plpgsql STABLE AS $$
DECLARE
    image int2[] := migrate._swap_image(p, k.confkey);
    owner regrole := migrate._table_owner(k.conrelid);
BEGIN
    hint := format('ALTER TABLE %s DROP CONSTRAINT %I; and add it again after finalize.', k.conrelid::regclass, k.conname);
    IF form IS NOT NULL THEN
        why := form;
    ELSIF k.conrelid = p.target THEN
        why := 'it is the target''s own';
    ELSIF EXISTS (SELECT FROM pg_class c WHERE c.oid IN (p.source, p.target) AND c.relkind = 'p') THEN
        why := 'one of the tables is partitioned';
    ELSIF array_position(image, NULL) IS NOT NULL THEN
        why := 'the target has no column that is mapped from what it references, bare';
    ELSIF NOT EXISTS (SELECT FROM pg_index i WHERE i.indrelid = p.target AND i.indisunique AND i.indimmediate AND i.indisvalid AND i.indpred IS NULL AND i.indexprs IS NULL
                      AND i.indkey[0:i.indnkeyatts - 1]::int2[] <@ image AND image <@ i.indkey[0:i.indnkeyatts - 1]::int2[]) THEN
        why := 'the target has no unique index on the columns it would reference';
        hint := format('ALTER TABLE %s ADD UNIQUE (%s);', p.target, migrate._column_list(p.target, image));
    ELSIF EXISTS (SELECT FROM unnest(k.confkey, image) u(a, b) JOIN pg_attribute x ON x.attrelid = p.source AND x.attnum = u.a JOIN pg_attribute y ON y.attrelid = p.target AND y.attnum = u.b
                  WHERE NOT migrate._same_order(x.atttypid, y.atttypid) OR x.attcollation <> y.attcollation) THEN
        why := 'the target''s column is of a type that does not compare with it';
    ELSIF (SELECT w.filtered FROM migrate._mapping w WHERE w.flow = p.flow AND w.direction = 'forward') THEN
        why := 'the target has only the rows of the filter';
    ELSIF owner <> p.owner AND NOT (has_table_privilege(owner, p.source, 'REFERENCES') OR has_table_privilege(owner, p.target, 'REFERENCES')) THEN
        why := format('its owner %s may not reference the target', owner);
        hint := format('GRANT REFERENCES ON %s TO %s;', p.target, owner);
    END IF;
END $$;

-- To validate a key, PostgreSQL reads both tables as the owner of the one that references, and only to plan that runs what the other's
-- owner has put into an index of his (a call with constants). That must not be a superuser: he validates such a key himself, if he wants to.
CREATE FUNCTION migrate._swap_stays_unvalidated(p migrate._swap_pair, k pg_constraint) RETURNS boolean
LANGUAGE sql STABLE AS $$
    SELECT migrate._swap_is_valid(k) AND o.rolsuper AND NOT s.rolsuper FROM pg_roles o, pg_roles s WHERE o.oid = migrate._table_owner(k.conrelid) AND s.oid = p.owner
$$;

CREATE FUNCTION migrate._swap_incoming_keys(m migrate._migration, p migrate._swap_pair) RETURNS SETOF migrate._swap_step
LANGUAGE plpgsql STABLE AS $$
DECLARE
    k pg_constraint;
    t record;
    x record;
    object text;
    pieces text[];
    validates boolean;
BEGIN
    FOR k IN SELECT * FROM pg_constraint c WHERE c.confrelid = p.source AND c.contype = 'f' AND c.conparentid = 0 AND c.conrelid <> p.source ORDER BY c.conrelid::regclass::text, c.conname LOOP
        object := format('foreign key %I of %s', k.conname, k.conrelid::regclass);
        SELECT * INTO t FROM migrate._swap_key_text(k);
        SELECT * INTO x FROM migrate._swap_incoming_problem(m, p, k, t.form);
        IF x.why IS NOT NULL THEN
            RETURN NEXT migrate._swap_refused(object, 'cannot reference the target: ' || x.why, x.hint);
            CONTINUE;
        END IF;
        pieces := ARRAY['ALTER TABLE ', format(' DROP CONSTRAINT %I, ADD CONSTRAINT %1$I %s REFERENCES %s', k.conname, t.head, migrate._swap_name(p))];
        validates := migrate._swap_is_valid(k) AND NOT migrate._swap_stays_unvalidated(p, k);
        IF validates IS DISTINCT FROM migrate._swap_is_valid(k) THEN
            RETURN NEXT migrate._swap_warning(object, format('stays NOT VALID after cutover, and after rollback: its owner %s is a superuser, as whom no worker reads a table of %s', migrate._table_owner(k.conrelid), p.owner),
                format('ALTER TABLE %s VALIDATE CONSTRAINT %I; afterwards, as its owner, who then runs what %s has put into indexes.', k.conrelid::regclass, k.conname, p.owner));
        END IF;
        RETURN NEXT migrate._swap_step(11, 'key', object, format('foreign key %I of %s references the new table%s', k.conname, k.conrelid::regclass,
            CASE WHEN validates THEN ', NOT VALID, and is validated afterwards' ELSE '' END), k.conrelid, migrate._table_owner(k.conrelid),
            pieces[1:1] || format('%s(%s)%s NOT VALID', pieces[2], migrate._column_list(p.target, migrate._swap_image(p, k.confkey)), t.rest),
            pieces[1:1] || format('%s%s%s NOT VALID', pieces[2], t.referenced, t.rest), validates);
        IF obj_description(k.oid, 'pg_constraint') IS NOT NULL THEN
            pieces := ARRAY[format('COMMENT ON CONSTRAINT %I ON ', k.conname), format(' IS %L', obj_description(k.oid, 'pg_constraint'))];
            RETURN NEXT migrate._swap_step(11, 'comment', object, format('the comment of foreign key %I is carried', k.conname), k.conrelid, migrate._table_owner(k.conrelid), pieces, pieces);
        END IF;
    END LOOP;
    RETURN QUERY SELECT y.* FROM migrate._deferred d JOIN migrate._flow f ON f.id = d.flow,
        LATERAL migrate._swap_refused(migrate._deferred_name(d) || ' of ' || f.target, 'is set aside by another migration, which will add it to ' || p.source, 'Wait until it is back.') y
    WHERE d.referenced = p.source AND d.relation IS NULL AND d.state = 'aside' AND f.migration <> m.id;
END $$;

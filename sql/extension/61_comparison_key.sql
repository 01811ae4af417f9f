-- How values and keys of the two sides are brought to one type, so that they can be compared.

-- The type that a column has under its domains, whose checks are not for a validation to run.
CREATE FUNCTION migrate._plain_type(INOUT type oid, INOUT typmod integer, OUT name text)
LANGUAGE plpgsql STABLE AS $$
DECLARE
    t pg_type;
BEGIN
    LOOP
        SELECT * INTO t FROM pg_type WHERE oid = type;
        EXIT WHEN t.typtype <> 'd';
        type := t.typbasetype;
        typmod := t.typtypmod;
    END LOOP;
    name := format_type(type, typmod);
END $$;

-- A value as an assignment to a column of this type would store it. A cast does the same, but that it cuts what is too long, where
-- an assignment raises an error: such a value, which no row of the column can have, stays as it is, and differs from all.
CREATE FUNCTION migrate._assigned(value text, type oid, typmod integer) RETURNS text
LANGUAGE sql STABLE AS $$
    SELECT CASE WHEN typmod = -1 OR e.element NOT IN ('bpchar'::regtype, 'varchar'::regtype, 'bit'::regtype, 'varbit'::regtype) THEN format('(%s)::%s', value, n.cut)
                ELSE format('(CASE WHEN (%1$s)::%4$s%5$s OPERATOR(pg_catalog.=) (%1$s)::%2$s::%4$s%5$s THEN (%1$s)::%2$s ELSE (%1$s)::%3$s END)', value, n.cut, n.whole,
                            CASE WHEN e.is_text THEN format_type(CASE WHEN e.is_array THEN 'bpchar[]'::regtype ELSE 'bpchar'::regtype END, -1) ELSE n.whole END,
                            CASE WHEN e.is_text THEN ' COLLATE pg_catalog."C"' ELSE '' END) END
    FROM (SELECT coalesce(nullif(t.typelem, 0), t.oid)::regtype AS element, t.typelem <> 0 AND t.typlen = -1 AS is_array,
                 coalesce(nullif(t.typelem, 0), t.oid) IN ('bpchar'::regtype, 'varchar'::regtype) AS is_text FROM pg_type t WHERE t.oid = type) e,
         (SELECT format_type(type, typmod) AS cut, format_type(type, -1) AS whole) n
$$;

-- A key as a narrower integer type has it: NULL where that cannot hold it (after a cutover from integer to bigint), for no row of the
-- actual side has such a key.
CREATE FUNCTION migrate._narrowed(value text, origin oid, type oid) RETURNS text
LANGUAGE sql STABLE AS $$
    SELECT CASE WHEN origin IN ('int4'::regtype, 'int8'::regtype) AND origin <> type AND type IN ('int2'::regtype, 'int4'::regtype)
                THEN format('(CASE WHEN %1$s BETWEEN -%2$s - 1 AND %2$s THEN %1$s END)', value, CASE type WHEN 'int2'::regtype THEN 32767 ELSE 2147483647 END)
                ELSE value END
$$;

-- How a key column of the expected side is compared with a bound that is written in the actual side's type: name and bound
-- are texts of SQL. Where the two types differ, the index of the origin must still serve, and no rounding may come between.
CREATE FUNCTION migrate._key_rule(origin oid, origin_typmod integer, dest oid, dest_typmod integer, column_sql text,
                                  OUT name text, OUT bound text, OUT compared oid, OUT walkable boolean, OUT exact boolean)
LANGUAGE plpgsql STABLE AS $$
DECLARE
    integers CONSTANT oid[] := '{int2,int4,int8}'::regtype[]::oid[];
    texts CONSTANT oid[] := '{text,varchar}'::regtype[]::oid[];
BEGIN
    name := column_sql;
    walkable := true;
    exact := true;
    IF origin = ANY (integers) AND dest = ANY (integers) THEN
        compared := 'int8'::regtype;
    ELSIF origin = ANY (texts) AND dest = ANY (texts) THEN
        compared := 'text'::regtype;
    ELSIF origin = dest AND (origin_typmod = dest_typmod OR dest_typmod = -1) THEN
        compared := dest;
    ELSIF origin = ANY (integers) AND dest = 'numeric'::regtype THEN
        compared := 'int8'::regtype;
        bound := '(%s)::numeric::bigint';
        walkable := false;
    ELSE
        name := format('(%s)::%s', column_sql, format_type(dest, dest_typmod));
        compared := dest;
        walkable := false;
        exact := false;
    END IF;
    bound := coalesce(bound, '(%s)::' || format_type(compared, -1));
END $$;

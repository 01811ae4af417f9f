-- migrate_ext: joined by make from sql/extension/*.sql, in order of their numbers. Do not edit the joined file.
\echo Use "CREATE EXTENSION migrate_ext" to load this file. \quit

-- Whoever owns the schema may drop what is in it, and what was in it before may be taken for ours. (A dump creates the schema
-- first, empty.)
DO $$
DECLARE
    schema pg_catalog.oid := 'migrate'::pg_catalog.regnamespace;
BEGIN
    IF NOT (SELECT r.rolsuper FROM pg_catalog.pg_namespace n JOIN pg_catalog.pg_roles r ON r.oid OPERATOR(pg_catalog.=) n.nspowner WHERE n.oid OPERATOR(pg_catalog.=) schema) THEN
        RAISE EXCEPTION USING ERRCODE = '42501', MESSAGE = 'schema "migrate" exists and is owned by a role that is not a superuser',
            HINT = 'Drop it, or rename it, before CREATE EXTENSION migrate_ext.';
    END IF;
    IF EXISTS (SELECT FROM pg_catalog.pg_depend d WHERE d.refclassid OPERATOR(pg_catalog.=) 'pg_catalog.pg_namespace'::pg_catalog.regclass AND d.refobjid OPERATOR(pg_catalog.=) schema
               AND d.classid OPERATOR(pg_catalog.<>) 'pg_catalog.pg_default_acl'::pg_catalog.regclass AND d.classid OPERATOR(pg_catalog.<>) 'pg_catalog.pg_extension'::pg_catalog.regclass) THEN
        RAISE EXCEPTION USING ERRCODE = '55000', MESSAGE = 'schema "migrate" exists and is not empty',
            HINT = 'Drop it, or rename it, before CREATE EXTENSION migrate_ext.';
    END IF;
END $$;

-- migrate_ext: joined by make from sql/extension/*.sql, in order of their numbers. Do not edit the joined file.
\echo Use "CREATE EXTENSION migrate_ext" to load this file. \quit

-- Everybody may look into the schema; every object in it is granted (or not) one by one, in 90_grants.sql.
GRANT USAGE ON SCHEMA migrate TO PUBLIC;

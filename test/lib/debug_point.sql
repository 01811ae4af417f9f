-- Joined to the extension script of a test build alone (make MIGRATE_TEST=1): see src/debug_point.hpp.
CREATE FUNCTION migrate._debug_point(name text) RETURNS void
LANGUAGE C STRICT AS 'MODULE_PATHNAME', 'migrate_debug_point';
REVOKE ALL ON FUNCTION migrate._debug_point FROM PUBLIC;

// Named places at which a test may make the process wait, fail or die. They exist in test builds (make MIGRATE_TEST=1)
// alone; anywhere else a point is nothing. In PL/pgSQL a line "-- @point NAME" is one, which make turns into a call.
// (That call sets FOUND: no point may stand between a statement and a look at its FOUND.)
//
// The setting migrate.debug_point = 'NAME ACTION [N]' says what happens at the process's N-th arrival (1 unless given):
//   error[=SQLSTATE]  an error, XX000 unless given
//   kill              SIGKILL to itself, once only: it leaves the file migrate_debug_point in
//                     the data folder, and while that is there nothing is killed, so that the
//                     server comes back to life
//   wait              as long as another session holds pg_advisory_lock(7104) in this database;
//                     no lock_timeout and no deadlock check sees this
// Each that comes true writes 'debug point "NAME": ACTION' to the server's log. Background workers run as the bootstrap
// superuser: ALTER ROLE … SET reaches them, without sessions of others.
#pragma once
#include "compat.hpp"

#ifdef MIGRATE_TEST
namespace migrate {
void init_debug_points();
void reach_debug_point(const char *name);
}  // namespace migrate
#define INIT_DEBUG_POINTS() migrate::init_debug_points()
#define DEBUG_POINT(name) migrate::reach_debug_point(name)
#else
#define INIT_DEBUG_POINTS() ((void)0)
#define DEBUG_POINT(name) ((void)0)
#endif

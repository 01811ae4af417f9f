# PGXS build of migrate_ext: `make && make install && make installcheck`.
# Everything else (private servers, TAP, pgTAP, checks of the rules) is `bash test/run`.
EXTENSION = migrate_ext
EXTVERSION = 0.1.0
MODULE_big = migrate_ext
SOURCES = $(sort $(wildcard src/*.cpp))
OBJS = $(patsubst %.cpp,%.o,$(SOURCES))

# The extension script is kept in parts by theme; make joins them in the order of their numbers.
SCRIPT_PARTS = $(sort $(wildcard sql/extension/*.sql))
DATA_built = $(EXTENSION)--$(EXTVERSION).sql

# Each test of sql/*.sql is named here, in the order they run (test/run checks that none is left out).
REGRESS = define dual_write ddl odd_states rivals direct bulk_copy place state state_links state_types digest validate corruption corruption_keys injection rights option preflight plan deferred \
	shadow view route watch cutover swap swap_refused swap_details swap_carried finalize worker
# A database of its own encoding, whatever the cluster's.
REGRESS_OPTS = --inputdir=. --load-extension=migrate_ext --encoding=UTF8 --no-locale

PG_CXXFLAGS = -std=c++17 -fno-exceptions -fno-rtti -fno-threadsafe-statics -Wall -Wextra -Wno-unused-parameter \
	-Wno-missing-field-initializers -MMD -MP -isystem $(shell $(PG_CONFIG) --includedir-server) $(EXTRA_CXXFLAGS)

# For tests: a build without one safeguard of the protocol (see src/mutant.hpp).
ifdef MIGRATE_MUTANT
PG_CXXFLAGS += -DMIGRATE_MUTANT=$(MIGRATE_MUTANT)
endif

# For tests: a build whose dual writes all go through SQL.
ifdef MIGRATE_PATH
PG_CXXFLAGS += -DMIGRATE_PATH=$(MIGRATE_PATH)
endif

# A test build (make MIGRATE_TEST=1) has debug points, see src/debug_point.hpp; any other has no trace of them.
ifdef MIGRATE_TEST
PG_CXXFLAGS += -DMIGRATE_TEST
SCRIPT_PARTS += test/lib/debug_point.sql
POINTS = s/^\( *\)-- @point \(.*\)/\1PERFORM migrate._debug_point('\2');/
else
SOURCES := $(filter-out src/debug_point.cpp,$(SOURCES))
POINTS = /^ *-- @point /d
endif

EXTRA_CLEAN = src/*.d src/*.bc $(EXTENSION)--$(EXTVERSION).sql

PG_CONFIG ?= pg_config
PGXS := $(shell $(PG_CONFIG) --pgxs)
include $(PGXS)

# PGXS's bitcode rule does not read PG_CXXFLAGS.
override BITCODE_CXXFLAGS += $(filter-out -MMD -MP,$(PG_CXXFLAGS))
# No C++ runtime is needed: link as C, so that the library does not depend on libstdc++.
-include $(OBJS:.o=.d)

$(EXTENSION)--$(EXTVERSION).sql: $(SCRIPT_PARTS)
	sed "$(POINTS)" $(SCRIPT_PARTS) > $@

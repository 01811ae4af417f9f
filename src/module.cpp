// Loaded on first use, or at server start (shared_preload_libraries), which adds the launcher that resumes migrations.
#include "debug_point.hpp"
#include "dual_write.hpp"
#include "flow.hpp"
#include "worker.hpp"

extern "C" {
PG_MODULE_MAGIC;
PGDLLEXPORT void _PG_init(void);
}

void _PG_init(void) {
    INIT_DEBUG_POINTS();
    migrate::init_flow();
    migrate::init_dual_write();
    migrate::init_launcher();
}

// Background workers of a migration. Worker 0 leads: it does every kind of work. Workers 1, 2, … (option "workers")
// only copy batches while there is a backfill, and end with the leader.
#pragma once
#include "compat.hpp"

namespace migrate {

// What a background worker must know to begin; travels in bgw_extra.
struct WorkerStart {
    Oid database;
    int32 migration;
    int32 worker;
};

// Registers a dynamic background worker that runs the library's function `main_function`. False when no slot is free.
// The worker starts at once, before the caller's transaction commits.
bool register_worker(const WorkerStart &start, const char *main_function, const char *name,
                     BackgroundWorkerHandle **handle = nullptr);

// Handlers for SIGTERM and SIGHUP, then a connection to start.database as the bootstrap superuser.
void connect_worker(const WorkerStart &start);
WorkerStart worker_start();

// Sleeps until the time is over, the latch is set or the postmaster dies; handles interrupts.
void latch_sleep(double ms);
// The same in a background worker, which must see to SIGHUP by itself.
void worker_sleep(double ms);

bool extension_exists();

// Registers the launcher when the library is being preloaded.
void init_launcher();

}  // namespace migrate

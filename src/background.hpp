// What all background workers of the extension share: how they are registered, connect, sleep.
#pragma once
#include "compat.hpp"

namespace migrate {

// What a background worker must know to begin; travels in bgw_extra.
struct WorkerStart {
    Oid database;
    int32 migration;
    int32 worker;
    TransactionId launched_by;  // what it is to do may not be committed yet
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

// `ms`, or less where deadlock_timeout is short: who waits for a lock and is waited for gives up before anybody's
// deadlock detector looks, for that would fail the application's statement as readily as ours.
int polite_lock_timeout(int ms);
// A worker's lock_timeout.
void pin_lock_timeout();

// Registers worker number `worker` of a migration in this database. False when no slot is free, or in recovery.
bool launch_migration_worker(int32 migration, int32 worker, BackgroundWorkerHandle **handle = nullptr);

// The lock that such a worker holds while it lives; migrations: the OID of their table.
LOCKTAG migration_worker_lock(Oid migrations, int32 migration, int32 worker);

}  // namespace migrate

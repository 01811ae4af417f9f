// The launcher exists only when the library is in shared_preload_libraries. It resumes what a restart, a crash or a
// promotion interrupted: once a minute a short-lived worker looks into each database and starts the workers that its
// unfinished migrations lack. (It stays, as the postmaster restarts after a crash only those who have not ended well.)
// Without it, the next call of migrate.wait, migrate.resume or migrate.retry does the same for one migration.
#include "pace.hpp"
#include "spi.hpp"
#include "worker.hpp"

extern "C" {
PGDLLEXPORT void migrate_launcher_main(Datum);
PGDLLEXPORT void migrate_resume_main(Datum);
}

namespace migrate {
namespace {

constexpr int kRestartSeconds = 10;
constexpr double kRound = 60 * 1000;
constexpr int kLook = 5000;  // ms that looking into a database takes at most

struct Databases {
    int count;
    Oid *oids;
};

// Databases that may hold the extension, in TopMemoryContext.
Databases list_databases() {
    Databases found = {0, NULL};
    SetCurrentStatementStartTimestamp();
    StartTransactionCommand();
    Relation catalog = table_open(DatabaseRelationId, AccessShareLock);
    TableScanDesc scan = table_beginscan_catalog(catalog, 0, NULL);
    int room = 16;
    found.oids = (Oid *)MemoryContextAlloc(TopMemoryContext, sizeof(Oid) * room);
    for (HeapTuple tuple; (tuple = heap_getnext(scan, ForwardScanDirection)) != NULL;) {
        Form_pg_database database = (Form_pg_database)GETSTRUCT(tuple);
        if (!database->datallowconn || database->datistemplate || database->datconnlimit == -2) continue;
        if (found.count == room) found.oids = (Oid *)repalloc(found.oids, sizeof(Oid) * (room *= 2));
        found.oids[found.count++] = database->oid;
    }
    table_endscan(scan);
    table_close(catalog, AccessShareLock);
    CommitTransactionCommand();
    return found;
}

// Waits for the look to end, so that at most one worker slot is used; not for the worker that may have come of it.
void wait_for_end(BackgroundWorkerHandle *handle) {
    const TimestampTz start = GetCurrentTimestamp();
    pid_t pid;
    for (;;) {
        const BgwHandleStatus status = GetBackgroundWorkerPid(handle, &pid);
        if (status != BGWH_NOT_YET_STARTED && status != BGWH_STARTED) return;
        if (TimestampDifferenceExceeds(start, GetCurrentTimestamp(), kLook)) return;
        worker_sleep(100);
    }
}

// Looks into one database. Without a free slot it tries on with growing pauses; the first failure is logged, then each
// time their number doubles.
void look_into(Oid database) {
    const WorkerStart start = {database, 0, 0, InvalidTransactionId};
    BackgroundWorkerHandle *handle;
    for (int tries = 1; !register_worker(start, "migrate_resume_main", "migrate_ext resume", &handle); tries++) {
        if ((tries & (tries - 1)) == 0)
            ereport(LOG, (errmsg("migrate_ext: no background worker slot is free to resume migrations in database %u",
                                 database),
                          errdetail("max_worker_processes is %d.", max_worker_processes)));
        worker_sleep(backoff_ms(tries, 1000, kRound));
    }
    wait_for_end(handle);
    pfree(handle);
}

}  // namespace

void init_launcher() {
    if (!process_shared_preload_libraries_in_progress || IsBinaryUpgrade) return;
    BackgroundWorker worker;
    memset(&worker, 0, sizeof worker);
    worker.bgw_flags = BGWORKER_SHMEM_ACCESS | BGWORKER_BACKEND_DATABASE_CONNECTION;
    worker.bgw_start_time = BgWorkerStart_RecoveryFinished;  // a standby waits for its promotion
    worker.bgw_restart_time = kRestartSeconds;
    strlcpy(worker.bgw_library_name, "migrate_ext", sizeof worker.bgw_library_name);
    strlcpy(worker.bgw_function_name, "migrate_launcher_main", sizeof worker.bgw_function_name);
    strlcpy(worker.bgw_name, "migrate_ext launcher", sizeof worker.bgw_name);
    strlcpy(worker.bgw_type, "migrate_ext launcher", sizeof worker.bgw_type);
    RegisterBackgroundWorker(&worker);
}

}  // namespace migrate

using namespace migrate;

void migrate_launcher_main(Datum) {
    pqsignal(SIGTERM, die);
    pqsignal(SIGHUP, SignalHandlerForConfigReload);
    BackgroundWorkerUnblockSignals();
    BackgroundWorkerInitializeConnection(NULL, NULL, 0);
    for (;;) {
        const Databases found = list_databases();
        for (int i = 0; i < found.count; i++) look_into(found.oids[i]);
        pfree(found.oids);
        pgstat_report_activity(STATE_IDLE, NULL);
        worker_sleep(kRound);
    }
}

// One database: starts a worker for each migration that has work and none. Where the last free slot is its own, it
// becomes a worker itself: else there would never be one.
void migrate_resume_main(Datum) {
    WorkerStart start = worker_start();
    connect_worker(start);
    auto step = [&start] {
        if (!extension_exists()) return;
        PushActiveSnapshot(GetTransactionSnapshot());
        with_extension_owner([&start] {
            with_spi([&start] {
                run_sql("SELECT migrate._launch_unfinished()");
                const char *left_over = SPI_getvalue(SPI_tuptable->vals[0], SPI_tuptable->tupdesc, 1);
                if (left_over) start.migration = pg_strtoint32(left_over);
            });
        });
        PopActiveSnapshot();
    };
    ErrorData *error = attempt(Undo::kTransaction, step);
    if (error)
        ereport(LOG,
                (errcode(error->sqlerrcode), errmsg("migrate_ext: could not resume migrations: %s", error->message)));
    else if (start.migration != 0)
        run_worker(start);
    proc_exit(0);
}

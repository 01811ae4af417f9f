#include "background.hpp"

namespace migrate {
namespace {

// At session level and not as defaults: reset_val still tells the database's own settings.
void pin_settings() {
    const char *settings[][2] = {{"statement_timeout", "0"},
                                 {"jit", "off"},
                                 {"idle_in_transaction_session_timeout", "0"},
                                 {"transaction_timeout", "0"},
                                 {"default_transaction_isolation", "read committed"},
                                 {"default_transaction_read_only", "off"},
                                 {"default_transaction_deferrable", "off"},
                                 {"search_path", "pg_catalog, pg_temp"},
                                 {"DateStyle", "ISO"},
                                 {"IntervalStyle", "postgres"},
                                 {"TimeZone", "UTC"},
                                 {"extra_float_digits", "1"},
                                 {"bytea_output", "hex"}};
    for (auto &setting : settings)
        if (GetConfigOption(setting[0], true, false)) SetConfigOption(setting[0], setting[1], PGC_SUSET, PGC_S_SESSION);
    // A worker that waited for a synchronous replica would hold its batch's row locks meanwhile, against sessions that
    // do not wait for it themselves. What a failover loses of a batch it loses whole: rows, queue and checkpoint.
    if (synchronous_commit > SYNCHRONOUS_COMMIT_LOCAL_FLUSH)
        SetConfigOption("synchronous_commit", "local", PGC_SUSET, PGC_S_SESSION);
    pin_lock_timeout();
}

}  // namespace

void pin_lock_timeout() {
    char text[16];
    snprintf(text, sizeof text, "%d", polite_lock_timeout(100));
    SetConfigOption("lock_timeout", text, PGC_SUSET, PGC_S_SESSION);
}

bool extension_exists() {
    return OidIsValid(get_extension_oid("migrate_ext", true));
}

int polite_lock_timeout(int ms) {
    return Max(1, Min(ms, DeadlockTimeout / 2));
}

void latch_sleep(double ms) {
    (void)WaitLatch(MyLatch, WL_LATCH_SET | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH, (long)ms, PG_WAIT_EXTENSION);
    ResetLatch(MyLatch);
    CHECK_FOR_INTERRUPTS();
}

void worker_sleep(double ms) {
    latch_sleep(ms);
    if (ConfigReloadPending) {
        ConfigReloadPending = false;
        ProcessConfigFile(PGC_SIGHUP);
    }
}

WorkerStart worker_start() {
    WorkerStart start;
    memcpy(&start, MyBgworkerEntry->bgw_extra, sizeof start);
    return start;
}

void connect_worker(const WorkerStart &start) {
    pqsignal(SIGTERM, die);
    pqsignal(SIGHUP, SignalHandlerForConfigReload);
    BackgroundWorkerUnblockSignals();
    if (IsBinaryUpgrade) proc_exit(0);
    BackgroundWorkerInitializeConnectionByOid(start.database, InvalidOid, 0);
    pin_settings();
}

bool register_worker(const WorkerStart &start, const char *main_function, const char *name,
                     BackgroundWorkerHandle **handle) {
    static_assert(sizeof start <= BGW_EXTRALEN, "bgw_extra is too small");
    BackgroundWorker worker;
    memset(&worker, 0, sizeof worker);
    worker.bgw_flags = BGWORKER_SHMEM_ACCESS | BGWORKER_BACKEND_DATABASE_CONNECTION;
    worker.bgw_start_time = BgWorkerStart_RecoveryFinished;
    worker.bgw_restart_time = BGW_NEVER_RESTART;
    strlcpy(worker.bgw_library_name, "migrate_ext", sizeof worker.bgw_library_name);
    strlcpy(worker.bgw_function_name, main_function, sizeof worker.bgw_function_name);
    strlcpy(worker.bgw_name, name, sizeof worker.bgw_name);
    strlcpy(worker.bgw_type, "migrate_ext worker", sizeof worker.bgw_type);
    memcpy(worker.bgw_extra, &start, sizeof start);
    worker.bgw_notify_pid = handle ? MyProcPid : 0;
    return RegisterDynamicBackgroundWorker(&worker, handle);
}

bool launch_migration_worker(int32 migration, int32 worker, BackgroundWorkerHandle **handle) {
    if (RecoveryInProgress()) return false;  // it would keep its slot until the promotion
    const WorkerStart start = {MyDatabaseId, migration, worker, GetTopTransactionIdIfAny()};
    char name[BGW_MAXLEN];
    snprintf(name, sizeof name, "migrate_ext worker %d of migration %d", worker, migration);
    return register_worker(start, "migrate_worker_main", name, handle);
}

// It makes a worker the only one, and views find its PID by it. A user lock lives as long as the session and over
// aborted transactions; an advisory lock would do, but any role could take that and keep the worker away.
LOCKTAG migration_worker_lock(Oid migrations, int32 migration, int32 worker) {
    LOCKTAG tag;
    SET_LOCKTAG_OBJECT(tag, MyDatabaseId, migrations, (Oid)migration, (uint16)worker);
    tag.locktag_lockmethodid = USER_LOCKMETHOD;
    return tag;
}

}  // namespace migrate

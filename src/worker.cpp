// The background worker of a migration: a loop whose every turn is one transaction. What a turn does is decided and
// done in SQL (51_step.sql): _pick gives a job, _run does it, and after an error, in a transaction of its own,
// _job_failed decides what becomes of it. All state is in tables; a worker that dies loses at most its current batch.
#include "worker.hpp"
#include "debug_point.hpp"
#include "pace.hpp"
#include "restore.hpp"
#include "spi.hpp"

MIGRATE_FUNCTION(migrate_launch_worker)
extern "C" PGDLLEXPORT void migrate_worker_main(Datum);

namespace migrate {
namespace {

// A leader that finds another one in its place waits so long for it to end (it may be about to).
constexpr int kClaimTries = 50;
constexpr double kClaimPause = 100;
constexpr double kThrottleEvery = 250;  // ms between two looks at the throttle's signals
constexpr double kReportEvery = 1000;
constexpr double kFirstSilence = 1000, kLongestSilence = 3600 * 1000;
constexpr int kSignalTimeout = 10000;  // ms that reading the signals (the user's throttle_query) may take

struct Job {
    char *text;  // migrate._job in text form, for _run and _job_failed
    char *activity;
    bool restore;       // statements that are run outside of the turn's transaction
    bool switches;      // it makes another side serve
    bool own_snapshot;  // to be run in a REPEATABLE READ transaction of its own
    bool exit, wait;
    double wait_ms;
};

struct Worker {
    WorkerStart start;
    Oid table;  // migrate._migration, which the lock tag is made of
    MemoryContext turn_context;
    Job job;
    bool first;
    int turn;
    int batch;  // rows of the next batch; 0 until known
    int tries;  // turns that failed, in a row
    int idle;   // turns that found rows locked by others, in a row
    TimestampTz throttle_checked, reported;
    int64 rows_since;
    TimestampTz logged;  // the last failure that was, and its SQLSTATE
    int logged_code;
    double silence;  // ms before the same is logged again
};

bool try_lock(const Worker &w, int worker) {
    const LOCKTAG tag = migration_worker_lock(w.table, w.start.migration, worker);
    return LockAcquire(&tag, ExclusiveLock, true, true) != LOCKACQUIRE_NOT_AVAIL;
}

char *text_field(int column, MemoryContext context) {
    char *value = SPI_getvalue(SPI_tuptable->vals[0], SPI_tuptable->tupdesc, column);
    return value ? MemoryContextStrdup(context, value) : NULL;
}

int64 integer_field(int column) {
    const char *value = SPI_getvalue(SPI_tuptable->vals[0], SPI_tuptable->tupdesc, column);
    return value ? strtoll(value, NULL, 10) : 0;
}

void pick_job(Worker *w) {
    const TimestampTz now = GetCurrentTimestamp();
    const bool check = TimestampDifferenceExceeds(w->throttle_checked, now, (int)kThrottleEvery);
    const Oid types[] = {INT4OID, INT4OID, INT4OID, INT4OID, BOOLOID, BOOLOID};
    const Datum values[] = {Int32GetDatum(w->start.migration),
                            Int32GetDatum(w->start.worker),
                            Int32GetDatum(w->batch),
                            Int32GetDatum(w->turn),
                            BoolGetDatum(w->first),
                            BoolGetDatum(check)};
    static SPIPlanPtr plan = NULL;
    if (check && !w->first) enable_timeout_after(STATEMENT_TIMEOUT, kSignalTimeout);
    run_kept(&plan,
             "SELECT j.action = 'exit', j.action = 'wait', j.wait_ms, j.activity, j.own_snapshot, j::text, j.batch,"
             " j.action IN ('index', 'validate_key'), j.action = 'rollback', coalesce(j.phase IN ('backfilling', "
             "'validating'), false)"
             " FROM migrate._pick($1, $2, $3, $4, $5, $6) AS j",
             6, types, values);
    disable_timeout(STATEMENT_TIMEOUT, false);
    // (In other phases the signals are not read: the first batch must not pass for want of a look.)
    if (check && text_field(10, w->turn_context)[0] == 't') w->throttle_checked = now;
    w->job.exit = text_field(1, w->turn_context)[0] == 't';
    w->job.wait = text_field(2, w->turn_context)[0] == 't';
    w->job.wait_ms = integer_field(3);
    w->job.activity = text_field(4, w->turn_context);
    w->job.own_snapshot = text_field(5, w->turn_context)[0] == 't';
    w->job.text = text_field(6, w->turn_context);
    if (integer_field(7) > 0) w->batch = (int)integer_field(7);
    w->job.restore = text_field(8, w->turn_context)[0] == 't';
    w->job.switches = text_field(9, w->turn_context)[0] == 't';
}

// At most once a second, so that the row that views read is not written by every batch.
void report(Worker *w) {
    const TimestampTz now = GetCurrentTimestamp();
    if (!TimestampDifferenceExceeds(w->reported, now, (int)kReportEvery)) return;
    const Oid types[] = {INT4OID, INT4OID, FLOAT8OID, INT4OID};
    const Datum values[] = {Int32GetDatum(w->start.migration), Int32GetDatum(w->start.worker),
                            Float8GetDatum(w->rows_since * 1000000.0 / (double)(now - w->reported)),
                            Int32GetDatum(w->batch)};
    if (w->reported != 0) run_sql("SELECT migrate._report($1, $2, $3, $4)", 4, types, values);
    w->reported = now;
    w->rows_since = 0;
}

void run_job(Worker *w) {
    pgstat_report_activity(STATE_RUNNING, w->job.activity);
    const Oid types[] = {TEXTOID, INT4OID};
    const Datum values[] = {CStringGetTextDatum(w->job.text), Int32GetDatum(w->idle + 1)};
    static SPIPlanPtr plan = NULL;
    run_kept(&plan, "SELECT r.rows, r.wait_ms, r.next_batch, r.locked FROM migrate._run($1::migrate._job, $2) AS r", 2,
             types, values);
    w->rows_since += integer_field(1);
    w->job.wait_ms = integer_field(2);
    const int next = (int)integer_field(3);
    if (next > 0) w->batch = next;
    w->idle = text_field(4, w->turn_context)[0] == 't' ? w->idle + 1 : 0;
    DEBUG_POINT("worker: job done");
    report(w);
}

bool is_lock_trouble(int sqlerrcode) {
    return sqlerrcode == ERRCODE_LOCK_NOT_AVAILABLE || sqlerrcode == ERRCODE_T_R_DEADLOCK_DETECTED ||
           sqlerrcode == ERRCODE_T_R_SERIALIZATION_FAILURE;
}

// A disk that stays full, or a thousand bad rows, must not fill the log: a failure is logged when it is of another kind
// than the last one, and else after a silence that doubles each time.
void log_failure(Worker *w, const ErrorData *error) {
    const TimestampTz now = GetCurrentTimestamp();
    if (error->sqlerrcode != w->logged_code)
        w->silence = kFirstSilence;
    else if (!TimestampDifferenceExceeds(w->logged, now, (int)w->silence))
        return;
    else
        w->silence = Min(w->silence * 2, kLongestSilence);
    w->logged = now;
    w->logged_code = error->sqlerrcode;
    const int level = is_lock_trouble(error->sqlerrcode) && w->tries < 16 ? DEBUG1 : LOG;
    ereport(level, (errcode(error->sqlerrcode),
                    errmsg("%s: %s", w->job.activity ? w->job.activity : "migrate_ext", error->message),
                    w->tries > 1 ? errdetail("This is failure number %d in a row.", w->tries) : 0));
}

const char *object_of(const ErrorData *error) {
    return error->constraint_name ? error->constraint_name
           : error->column_name   ? error->column_name
                                  : error->datatype_name;
}

// After an error: lets SQL decide, in a new transaction. When even that fails (no disk, say), only waits.
void handle_failure(Worker *w, const ErrorData *error) {
    w->tries++;
    log_failure(w, error);
    auto decide = [w, error] {
        as_extension_owner([&] {
            const char *object = object_of(error);
            const Oid types[] = {INT4OID, INT4OID, TEXTOID, TEXTOID, TEXTOID, TEXTOID, INT4OID, INT4OID};
            const Datum values[] = {Int32GetDatum(w->start.migration),
                                    Int32GetDatum(w->start.worker),
                                    w->job.text ? CStringGetTextDatum(w->job.text) : (Datum)0,
                                    CStringGetTextDatum(unpack_sql_state(error->sqlerrcode)),
                                    CStringGetTextDatum(error->message),
                                    object ? CStringGetTextDatum(object) : (Datum)0,
                                    Int32GetDatum(w->tries),
                                    Int32GetDatum(w->batch)};
            const char nulls[] = {' ', ' ', w->job.text ? ' ' : 'n', ' ', ' ', object ? ' ' : 'n', ' ', ' '};
            run_sql(
                "SELECT f.wait_ms, f.next_batch FROM migrate._job_failed($1, $2, $3::migrate._job, $4, $5, $6, $7, $8) "
                "AS f",
                8, types, values, nulls);
            w->job.wait_ms = integer_field(1);
            DEBUG_POINT("worker: failure handled");
            if (integer_field(2) > 0) w->batch = (int)integer_field(2);
        });
    };
    w->job.wait_ms = backoff_ms(w->tries, 1000, 60000);
    ErrorData *again = attempt(Undo::kTransaction, decide);
    if (again) {
        log_failure(w, again);
        w->job.wait_ms = backoff_ms(w->tries, 1000, 60000);
    }
    // For whom no table has room to tell.
    pgstat_report_activity(STATE_IDLE, psprintf("waits %g s after: %s", w->job.wait_ms / 1000, error->message));
}

// One turn; false when there is no more to do.
bool take_turn(Worker *w) {
    w->job = Job{};
    auto whole = [w] {
        if (!extension_exists()) {
            w->job.exit = true;
            return;
        }
        as_extension_owner([w] {
            pick_job(w);
            DEBUG_POINT("worker: job picked");
            if (!w->job.exit && !w->job.wait && !w->job.own_snapshot && !w->job.restore) run_job(w);
        });
        // As the verb's, its commit must be on disk before anybody sees it.
        if (w->job.switches && synchronous_commit < SYNCHRONOUS_COMMIT_ON)
            (void)set_config_option("synchronous_commit", "on", PGC_USERSET, PGC_S_SESSION, GUC_ACTION_LOCAL, true, 0,
                                    false);
    };
    ErrorData *error = attempt(Undo::kTransaction, whole);
    disable_timeout(STATEMENT_TIMEOUT, false);
    if (error == NULL && w->job.own_snapshot) {
        auto alone = [w] {
            XactIsoLevel = XACT_REPEATABLE_READ;
            as_extension_owner([w] { run_job(w); });
        };
        error = attempt(Undo::kTransaction, alone);
    }
    if (error == NULL && w->job.restore) {
        pgstat_report_activity(STATE_RUNNING, w->job.activity);
        error = run_restore(w->job.text);
    }
    if (error)
        handle_failure(w, error);
    else if (!w->job.wait)
        w->tries = 0;
    DEBUG_POINT("worker: turn taken");
    w->first = false;
    w->turn++;
    pgstat_report_stat(false);
    return !w->job.exit;
}

// What has set the latch before (a lock that was waited for, a message of the server's) does not cut the pause short.
void rest(double ms) {
    const TimestampTz until = GetCurrentTimestamp() + (TimestampTz)(ms * 1000);
    for (; ms >= 1; ms = (double)(until - GetCurrentTimestamp()) / 1000) worker_sleep(ms);
}

// A helper without a leader has no business; the lock being free tells.
bool leader_is_gone(const Worker &w) {
    if (w.start.worker == 0 || !try_lock(w, 0)) return false;
    const LOCKTAG tag = migration_worker_lock(w.table, w.start.migration, 0);
    LockRelease(&tag, ExclusiveLock, true);
    return true;
}

// Becomes the only worker of this number; false when another one stays, or the extension is not there.
bool claim(Worker *w) {
    const int tries = w->start.worker == 0 ? kClaimTries : 1;
    for (int i = 0; i < tries; i++) {
        bool claimed = false, exists = false;
        auto step = [w, &claimed, &exists] {
            exists = extension_exists();
            if (!exists) return;
            w->table = get_relname_relid("_migration", get_namespace_oid("migrate", false));
            claimed = try_lock(*w, w->start.worker);
        };
        if (attempt(Undo::kTransaction, step) || !exists) return false;
        if (claimed) return true;
        worker_sleep(kClaimPause);
    }
    return false;
}

// A verb starts the worker before it commits. Until it does, the worker waits, for however long. (Not on the
// migration's row: that, and the extension, may have been made by the same transaction.)
void wait_for_verb(const Worker &w) {
    if (!TransactionIdIsValid(w.start.launched_by)) return;
    SetConfigOption("lock_timeout", "0", PGC_SUSET, PGC_S_SESSION);
    auto step = [&w] { XactLockTableWait(w.start.launched_by, NULL, NULL, XLTW_None); };
    (void)attempt(Undo::kTransaction, step);
    pin_lock_timeout();
}

void show_name(Worker *w) {
    char *name = NULL;
    auto step = [w, &name] {
        if (!extension_exists()) return;
        as_extension_owner([w, &name] {
            const Oid types[] = {INT4OID};
            const Datum values[] = {Int32GetDatum(w->start.migration)};
            if (run_sql("SELECT 'migrate_ext: ' || m.name FROM migrate._migration AS m WHERE m.id = $1", 1, types,
                        values) == 1)
                name = text_field(1, w->turn_context);
        });
    };
    (void)attempt(Undo::kTransaction, step);
    if (name) SetConfigOption("application_name", name, PGC_SUSET, PGC_S_SESSION);
}

}  // namespace

void run_worker(const WorkerStart &start) {
    Worker w;
    memset(&w, 0, sizeof w);
    w.start = start;
    w.first = true;
    DEBUG_POINT("worker: connected");
    w.turn_context = AllocSetContextCreate(TopMemoryContext, "migrate_ext turn", ALLOCSET_DEFAULT_SIZES);
    MemoryContextSwitchTo(w.turn_context);
    wait_for_verb(w);
    DEBUG_POINT("worker: verb seen");
    if (!claim(&w)) proc_exit(0);
    DEBUG_POINT("worker: claimed");
    show_name(&w);
    while (take_turn(&w) && !leader_is_gone(w)) {
        pgstat_report_activity(STATE_IDLE, NULL);
        CHECK_FOR_INTERRUPTS();
        if (w.job.wait_ms >= 1) rest(w.job.wait_ms);
        if (ConfigReloadPending) worker_sleep(0);
        MemoryContextReset(w.turn_context);
    }
    proc_exit(0);
}

}  // namespace migrate

using namespace migrate;

void migrate_worker_main(Datum) {
    const WorkerStart start = worker_start();
    connect_worker(start);
    run_worker(start);
}

// migrate._launch_worker(migration integer, worker integer) RETURNS boolean: false when no slot is free
Datum migrate_launch_worker(PG_FUNCTION_ARGS) {
    PG_RETURN_BOOL(launch_migration_worker(PG_GETARG_INT32(0), PG_GETARG_INT32(1)));
}

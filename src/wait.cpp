// migrate.wait: shows progress until a phase is reached. A procedure, so that it can end its transaction between two
// looks and holds back nobody's vacuum however long it waits; inside a transaction block it looks on without.
#include "spi.hpp"
#include "worker.hpp"

MIGRATE_FUNCTION(migrate_wait)

namespace migrate {
namespace {

constexpr double kLook = 200;          // ms between two looks
constexpr double kLaunchEvery = 2000;  // ms between two attempts at starting a missing worker
constexpr int kLaunches = 5;           // so many may vanish without a trace of work

struct Wait {
    Oid caller;
    char *name, *phase;
    double timeout_ms;  // 0: none
    bool atomic;
    TimestampTz began, printed, launched;
    char *shown_state, *shown_line;
    int launches;
    MemoryContext context, look_context;
};

struct Look {
    bool reached, never, worker_missing;
    char *state, *line, *reason, *hint, *now;
    TransactionId changed_by;
};

char *field(int column, MemoryContext context) {
    char *value = SPI_getvalue(SPI_tuptable->vals[0], SPI_tuptable->tupdesc, column);
    return value ? MemoryContextStrdup(context, value) : NULL;
}

bool utf8_reaches_the_client() {
    return GetDatabaseEncoding() == PG_UTF8 && pg_get_client_encoding() == PG_UTF8;
}

double ms_since(TimestampTz then) {
    return (GetCurrentTimestamp() - then) / 1000.0;
}

Look look(const Wait &w) {
    return with_extension_owner([&w] {
        const Oid types[] = {REGROLEOID, TEXTOID, TEXTOID, BOOLOID};
        const Datum values[] = {ObjectIdGetDatum(w.caller), CStringGetTextDatum(w.name), CStringGetTextDatum(w.phase),
                                BoolGetDatum(utf8_reaches_the_client())};
        run_sql(
            "SELECT l.reached, l.never, l.worker_missing, l.state, l.line, l.reason, l.hint, l.phase, l.changed_by"
            " FROM migrate._wait_look($1, $2, $3, $4) AS l",
            4, types, values);
        Look seen = {field(1, w.look_context)[0] == 't',
                     field(2, w.look_context)[0] == 't',
                     field(3, w.look_context)[0] == 't',
                     field(4, w.look_context),
                     field(5, w.look_context),
                     field(6, w.look_context),
                     field(7, w.look_context),
                     field(8, w.look_context),
                     (TransactionId)strtoul(field(9, w.look_context), NULL, 10)};
        SPI_freetuptable(SPI_tuptable);
        return seen;
    });
}

void keep(Wait *w, char **slot, const char *value) {
    if (*slot) pfree(*slot);
    *slot = MemoryContextStrdup(w->context, value);
}

// A new state at once; a renewed line each second, later less often.
void show(Wait *w, const Look &seen) {
    const double age = ms_since(w->began);
    const double every = age < 30000 ? 1000 : age < 300000 ? 5000 : 30000;
    const bool new_state = w->shown_state == NULL || strcmp(w->shown_state, seen.state) != 0;
    if (!new_state && (strcmp(w->shown_line, seen.line) == 0 || ms_since(w->printed) < every)) return;
    ereport(INFO, (errmsg_internal("%s", seen.line)));
    keep(w, &w->shown_state, seen.state);
    keep(w, &w->shown_line, seen.line);
    w->printed = GetCurrentTimestamp();
}

// After a restart without the launcher nobody works: the one who waits starts a worker.
void launch_missing(Wait *w) {
    if (RecoveryInProgress()) return;  // on a replica one can only watch
    if (w->launched != 0 && ms_since(w->launched) < kLaunchEvery) return;
    if (w->launches++ >= kLaunches)
        ereport(ERROR, (errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
                        errmsg("the worker of migration \"%s\" does not stay", w->name),
                        errdetail("It was started %d times.", kLaunches), errhint("The server's log tells why.")));
    w->launched = GetCurrentTimestamp();
    with_extension_owner([w] {
        const Oid types[] = {TEXTOID};
        const Datum values[] = {CStringGetTextDatum(w->name)};
        run_sql("SELECT migrate._launch(m) FROM migrate._migration AS m WHERE m.name = $1", 1, types, values);
    });
}

void check_reachable(const Wait &w, const Look &seen) {
    if (TransactionIdIsCurrentTransactionId(seen.changed_by) && !seen.reached)
        ereport(ERROR, (errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
                        errmsg("migration \"%s\" was changed in this same transaction", w.name),
                        errdetail("Its worker waits for the transaction's commit."),
                        errhint("COMMIT first, then CALL migrate.wait(%s);", quote_literal_cstr(w.name))));
    if (seen.never)
        ereport(ERROR, (errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
                        errmsg("migration \"%s\" does not reach phase %s", w.name, w.phase),
                        errdetail("%s", seen.reason), seen.hint ? errhint("%s", seen.hint) : 0));
}

void check_timeout(const Wait &w, const Look &seen) {
    if (w.timeout_ms <= 0 || ms_since(w.began) < w.timeout_ms) return;
    ereport(ERROR,
            (errcode(ERRCODE_QUERY_CANCELED),
             errmsg("migration \"%s\" did not reach phase %s within %g s", w.name, w.phase, w.timeout_ms / 1000),
             errdetail("It is in phase %s: %s", seen.now, seen.line),
             seen.hint ? errhint("%s", seen.hint)
                       : errhint("SELECT * FROM migrate.progress; shows it, CALL migrate.wait(%s, %s); waits on.",
                                 quote_literal_cstr(w.name), quote_literal_cstr(w.phase))));
}

void wait_until_reached(Wait *w) {
    for (;;) {
        const Look seen = look(*w);
        check_reachable(*w, seen);
        show(w, seen);
        if (seen.reached) return;
        if (seen.worker_missing) launch_missing(w);
        check_timeout(*w, seen);
        if (!w->atomic) SPI_commit();
        double pause = kLook;
        if (w->timeout_ms > 0) pause = Min(pause, Max(1, w->timeout_ms - ms_since(w->began)));
        latch_sleep(pause);
        MemoryContextReset(w->look_context);
    }
}

double interval_ms(const Interval *span) {
    return span->time / 1000.0 + span->day * 86400000.0 + span->month * 30 * 86400000.0;
}

}  // namespace
}  // namespace migrate

using namespace migrate;

// migrate.wait(name text, phase text, timeout interval)
Datum migrate_wait(PG_FUNCTION_ARGS) {
    if (PG_ARGISNULL(0))
        ereport(ERROR, (errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED), errmsg("the name of the migration is NULL")));
    Wait w;
    memset(&w, 0, sizeof w);
    w.atomic = !(fcinfo->context && IsA(fcinfo->context, CallContext) && !((CallContext *)fcinfo->context)->atomic);
    if (w.atomic && IsolationUsesXactSnapshot())
        ereport(
            ERROR,
            (errcode(ERRCODE_ACTIVE_SQL_TRANSACTION),
             errmsg("migrate.wait cannot see progress in a transaction of isolation level REPEATABLE READ or above"),
             errhint("Call it outside a transaction block.")));
    SPI_connect_ext(w.atomic ? 0 : SPI_OPT_NONATOMIC);
    // SPI's procedure context lives over the commits of a non-atomic call.
    w.context = CurrentMemoryContext;
    w.look_context = AllocSetContextCreate(w.context, "migrate.wait", ALLOCSET_DEFAULT_SIZES);
    w.caller = GetUserId();
    w.name = text_to_cstring(PG_GETARG_TEXT_PP(0));
    w.phase = PG_ARGISNULL(1) ? pstrdup("ready") : text_to_cstring(PG_GETARG_TEXT_PP(1));
    w.timeout_ms = PG_ARGISNULL(2) ? 0 : interval_ms(PG_GETARG_INTERVAL_P(2));
    if (w.timeout_ms < 0)
        ereport(ERROR, (errcode(ERRCODE_INVALID_PARAMETER_VALUE),
                        errmsg("timeout of migrate.wait is negative: %g s", w.timeout_ms / 1000),
                        errdetail("It must be more than 0; 0 and NULL are none."),
                        errhint("CALL migrate.wait(%s, timeout => '10 minutes');", quote_literal_cstr(w.name))));
    w.began = GetCurrentTimestamp();
    wait_until_reached(&w);
    SPI_finish();
    PG_RETURN_VOID();
}

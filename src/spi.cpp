#include "spi.hpp"
#include "mutant.hpp"

namespace migrate {

namespace {
// Until the GUC nest level ends.
void pin(const char *name, const char *value) {
    (void)set_config_option(name, value, PGC_USERSET, PGC_S_SESSION, GUC_ACTION_SAVE, true, 0, false);
}
}  // namespace

Identity enter_identity(Oid user, int sec_flags) {
    Identity saved;
    GetUserIdAndSecContext(&saved.user, &saved.sec_context);
    SetUserIdAndSecContext(user, saved.sec_context | sec_flags);
    saved.guc_level = NewGUCNestLevel();
    pin("search_path", "pg_catalog, pg_temp");
    pin("row_security", "off");
    pin("jit", "off");  // compiling a catalog query can take a thousand times as long as running it
    return saved;
}

void pin_output_settings() {
    pin("DateStyle", "ISO, YMD");
    pin("IntervalStyle", "postgres");
    pin("TimeZone", "UTC");
    pin("extra_float_digits", "1");
    pin("bytea_output", "hex");
    pin("lc_monetary", "C");
}

void pin_language() {
    pin("standard_conforming_strings", "on");
    pin("array_nulls", "on");
    pin("transform_null_equals", "off");
    pin("quote_all_identifiers", "off");
}

void pin_planner_to_indexes() {
    pin("enable_seqscan", "off");
    // Nor may a batch sort the rest of a range for its first rows, which a table without statistics leads to.
    pin("enable_bitmapscan", "off");
    pin("enable_sort", "off");
}

void pin_planner_to_heap() {
    pin("enable_indexonlyscan", "off");
}

void leave_identity(const Identity &identity) {
    AtEOXact_GUC(false, identity.guc_level);
    SetUserIdAndSecContext(identity.user, identity.sec_context);
}

ErrorData *attempt(Undo undo, StepFn step, void *arg) {
    MemoryContext caller = CurrentMemoryContext;
    ResourceOwner owner = CurrentResourceOwner;
    ErrorData *volatile error = NULL;

    if (undo == Undo::kSubtransaction) {
        BeginInternalSubTransaction(NULL);
    } else {
        SetCurrentStatementStartTimestamp();  // for now(), and for who looks for long transactions
        StartTransactionCommand();
    }
    if (undo == Undo::kSubtransaction) MemoryContextSwitchTo(caller);

    PG_TRY();
    {
        step(arg);
        if (undo == Undo::kSubtransaction)
            ReleaseCurrentSubTransaction();
        else
            CommitTransactionCommand();
    }
    PG_CATCH();
    {
        MemoryContextSwitchTo(caller);
        error = CopyErrorData();
        FlushErrorState();
        if (undo == Undo::kSubtransaction)
            RollbackAndReleaseCurrentSubTransaction();
        else
            AbortCurrentTransaction();
    }
    PG_END_TRY();

    MemoryContextSwitchTo(caller);
    if (undo == Undo::kSubtransaction) CurrentResourceOwner = owner;
    return error;
}

Oid extension_owner() {
    const Oid schema = get_namespace_oid("migrate", false);
    HeapTuple tuple = SearchSysCache1(NAMESPACEOID, ObjectIdGetDatum(schema));
    if (!HeapTupleIsValid(tuple)) elog(ERROR, "cache lookup failed for schema %u", schema);
    const Oid owner = ((Form_pg_namespace)GETSTRUCT(tuple))->nspowner;
    ReleaseSysCache(tuple);
    return owner;
}

Oid owner_of(Oid relation) {
    HeapTuple tuple = SearchSysCache1(RELOID, ObjectIdGetDatum(relation));
    if (!HeapTupleIsValid(tuple)) elog(ERROR, "cache lookup failed for relation %u", relation);
    const Oid owner = ((Form_pg_class)GETSTRUCT(tuple))->relowner;
    ReleaseSysCache(tuple);
    return owner;
}

namespace {
uint64 run_at(SPIPlanPtr plan, Datum *values, const char *nulls, Snapshot snapshot) {
    const int result = SPI_execute_snapshot(plan, values, nulls, snapshot, InvalidSnapshot, false, true, 0);
    if (result < 0) elog(ERROR, "SPI_execute_snapshot: %s", SPI_result_code_string(result));
    return SPI_processed;
}

// At READ COMMITTED every statement sees the latest state anyway.
bool has_old_snapshot() {
    return IsolationUsesXactSnapshot() && !is_mutant(mutant::no_latest_snapshot);
}
}  // namespace

uint64 run_latest(SPIPlanPtr plan, Datum *values, const char *nulls) {
    if (!has_old_snapshot()) return run_at(plan, values, nulls, InvalidSnapshot);
    CommandCounterIncrement();  // let the latest snapshot see our own work
    return run_at(plan, values, nulls, GetLatestSnapshot());
}

uint64 run_on_held_rows(SPIPlanPtr plan, Datum *values, const char *nulls) {
    if (!has_old_snapshot()) return run_at(plan, values, nulls, InvalidSnapshot);
    CommandCounterIncrement();
    return run_at(plan, values, nulls, SnapshotSelf);
}

uint64 run_sql(const char *sql, int nargs, const Oid *types, const Datum *values, const char *nulls, bool read_only) {
    const int result =
        SPI_execute_with_args(sql, nargs, const_cast<Oid *>(types), const_cast<Datum *>(values), nulls, read_only, 0);
    if (result < 0) elog(ERROR, "SPI_execute: %s", SPI_result_code_string(result));
    return SPI_processed;
}

uint64 run_kept(SPIPlanPtr *plan, const char *sql, int nargs, const Oid *types, const Datum *values) {
    if (*plan == NULL) {
        SPIPlanPtr made = SPI_prepare_cursor(sql, nargs, const_cast<Oid *>(types), CURSOR_OPT_GENERIC_PLAN);
        if (made == NULL || SPI_keepplan(made) != 0) elog(ERROR, "SPI_prepare: %s", SPI_result_code_string(SPI_result));
        *plan = made;
    }
    const int result = SPI_execute_plan(*plan, const_cast<Datum *>(values), NULL, false, 0);
    if (result < 0) elog(ERROR, "SPI_execute_plan: %s", SPI_result_code_string(result));
    return SPI_processed;
}

}  // namespace migrate

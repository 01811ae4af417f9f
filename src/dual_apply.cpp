#include "dual_apply.hpp"
#include "background.hpp"
#include "debug_point.hpp"
#include "direct_apply.hpp"
#include "flow.hpp"
#include "text.hpp"

namespace migrate {
namespace {

enum class Write { kUpsert, kRemove };

// More subtransactions than 64 with a transaction ID in one transaction make every snapshot on a replica slow.
// Statements share the first number; what they leave over is applied at the commit, in bulk, with so many more.
constexpr int kStatementSubtransactions = 32, kCommitSubtransactions = 24;

// Subtransactions this top-level transaction has used to keep failures from the application.
int subtransactions = 0;
int subtransaction_limit = kStatementSubtransactions;

bool none_left() {
    return subtransactions >= subtransaction_limit;
}

// A migration that this transaction has recorded failures of, to be retried by a worker; 0: none. (Of several, one will
// do: while there are failures its worker stays, and the others' next failure starts theirs.)
int32 failed_migration = 0;
Oid migrations = InvalidOid;  // the table of migrations, which cannot be looked up after the commit
// The worker that this session has started last, and whose.
BackgroundWorkerHandle *launched = NULL;
int32 launched_for = 0;

// INSERT INTO migrate._failure … as the extension's owner: in the application's transaction, so that it commits with
// it.
void record_failures(const Mapping *m, const KeyList &list, int from, int to, const char *state, const char *object) {
    Oid types[5] = {INT4OID, TEXTOID, TEXTARRAYOID, TEXTOID, TEXTOID};
    char nulls[6] = "     ";
    if (object == NULL) nulls[4] = 'n';
    if (failed_migration == 0 && is_going_on(m->migration)) {
        failed_migration = m->migration;
        migrations = get_relname_relid("_migration", get_namespace_oid("migrate", false));
    }
    DEBUG_POINT("dual write: failure to be recorded");
    auto record = [&] {
        pin_output_settings();
        for (int i = from; i < to; i++) {
            Datum values[5] = {Int32GetDatum(m->flow), CStringGetTextDatum(m->reverse ? "reverse" : "forward"),
                               key_text(list, m, i), CStringGetTextDatum(state),
                               object ? CStringGetTextDatum(object) : (Datum)0};
            run_sql(
                "INSERT INTO migrate._failure (flow, direction, key, sqlstate, object, origin) VALUES ($1, $2, $3, $4, "
                "$5, 'dual_write')",
                5, types, values, nulls);
        }
    };
    with_spi([&] { with_extension_owner(record); });
    DEBUG_POINT("dual write: failure recorded");
}

void apply_plainly(Mapping *m, Write write, const KeyList &list, int from, int to) {
    const KeySlice keys = {&list, from, to}, none = {};
    if (apply_direct(m, write == Write::kRemove ? keys : none, write == Write::kUpsert ? keys : none)) return;
    with_spi([&] {
        Datum *arrays = key_arrays(list, m, from, to);
        if (write == Write::kUpsert)
            upsert_keys(m, arrays);
        else
            remove_keys(m, arrays);
    });
}

// What a foreign key's check comes for next cannot wait for a worker.
bool is_urgent(const Mapping *m, Write write) {
    return write == Write::kUpsert ? m->insert_at_once : m->delete_at_once;
}

// Errors that mean the request itself is to end: a cancel, a shutdown, a lost connection. And conflicts with another
// transaction, where the application writes both sides: were they recorded and retried, this transaction's write of
// origin and the other's write of dest would both be acknowledged, and one of them lost. Or where the foreign key's
// check would be refused next: of a conflict the application knows that it is to try again.
bool must_pass_on(const Mapping *m, bool urgent, const ErrorData *error) {
    const int category = ERRCODE_TO_CATEGORY(error->sqlerrcode);
    return category == ERRCODE_OPERATOR_INTERVENTION ||
           ((m->both_directions || urgent) &&
            (category == ERRCODE_TRANSACTION_ROLLBACK || error->sqlerrcode == ERRCODE_LOCK_NOT_AVAILABLE));
}

// Whether an error may come of the write that has nothing to do with what the statement writes. (Where a key may stand
// twice in origin, its row of dest may be somebody else's at this moment: above READ COMMITTED a serialization
// failure.)
bool may_fail(const Mapping *m, Write write) {
    return (write == Write::kUpsert ? m->upsert_may_fail : m->delete_may_fail) ||
           (m->ambiguous && IsolationUsesXactSnapshot());
}

// Whether a failed write is kept from the statement, or tried again without what stood in its way: in a subtransaction.
// A write that comes before the statement around it has ended meets rows that this one has taken away and dest still
// has.
bool is_guarded(const Mapping *m, Write write) {
    return may_fail(m, write) && (m->on_failure == OnFailure::kRecord ||
                                  (write == Write::kUpsert && (m->insert_at_once || m->delete_at_once)));
}

// Removes what stands in the way of one key's row; false where nothing did, or it may not be removed.
bool clear_way(Mapping *m, const KeyList &list, int key, const ErrorData *error) {
    if (error->sqlerrcode != ERRCODE_UNIQUE_VIOLATION || !error->schema_name || !error->constraint_name) return false;
    const Oid index = get_relname_relid(error->constraint_name, get_namespace_oid(error->schema_name, true));
    if (!OidIsValid(index)) return false;
    bool removed = false;
    auto step = [&] { with_spi([&] { removed = remove_rivals(m, key_arrays(list, m, key, key + 1), index); }); };
    subtransactions++;
    return attempt(Undo::kSubtransaction, step) == NULL && removed;
}

// In one subtransaction; when that fails, in halves down to the row, as long as the transaction may still use
// subtransactions. What cannot be applied is the statement's error (strict), or recorded (best_effort), and a worker
// retries it.
void apply_or_record(Mapping *m, Write write, const KeyList &list, int from, int to, const char *last_state,
                     const char *last_object) {
    const bool urgent = is_urgent(m, write);
    if (none_left()) {
        if (m->on_failure == OnFailure::kRaise) return apply_plainly(m, write, list, from, to);
        if (!urgent) return record_failures(m, list, from, to, last_state ? last_state : "53400", last_object);
    }
    subtransactions++;
    auto step = [&] {
        apply_plainly(m, write, list, from, to);
        DEBUG_POINT("dual write: keys applied below a savepoint");
    };
    ErrorData *error = attempt(Undo::kSubtransaction, step);
    if (error == NULL) return;
    if (must_pass_on(m, urgent, error)) ReThrowError(error);
    const char *state = pstrdup(unpack_sql_state(error->sqlerrcode));
    const char *object = error->constraint_name ? error->constraint_name : error->column_name;
    if (to - from == 1) {
        if (write == Write::kUpsert && clear_way(m, list, from, error))
            return apply_or_record(m, write, list, from, to, state, object);
        if (m->on_failure == OnFailure::kRaise) ReThrowError(error);
        return record_failures(m, list, from, to, state, object);
    }
    const int middle = from + (to - from) / 2;
    apply_or_record(m, write, list, from, middle, state, object);
    apply_or_record(m, write, list, middle, to, state, object);
}

void apply_list(Mapping *m, Write write, const KeyList &list) {
    if (list.n == 0) return;
    if (is_guarded(m, write))
        apply_or_record(m, write, list, 0, list.n, NULL, NULL);
    else
        apply_plainly(m, write, list, 0, list.n);
}

// Within SPI; the list is made in `result`.
void list_missing(Mapping *m, KeyList *list, MemoryContext result) {
    const uint64 rows = find_all_missing(m);
    for (uint64 row = 0; row < rows; row++) {
        Datum key[INDEX_MAX_KEYS];
        bool isnull;
        for (int i = 0; i < m->nparams; i++)
            key[i] = SPI_getbinval(SPI_tuptable->vals[row], SPI_tuptable->tupdesc, i + 1, &isnull);
        append_key(list, m, key, NULL, result);
    }
}

bool needs_subtransaction(const Mapping *m) {
    return is_guarded(m, Write::kUpsert) || is_guarded(m, Write::kRemove);
}

// All at once; false where that failed, and nothing is done.
bool replace(Mapping *m, const Touched &touched) {
    auto step = [&] {
        if (!apply_direct(m, {&touched.remove, 0, touched.remove.n}, {&touched.upsert, 0, touched.upsert.n}))
            with_spi([&] {
                replace_keys(m, key_arrays(touched.remove, m, 0, touched.remove.n),
                             key_arrays(touched.upsert, m, 0, touched.upsert.n));
            });
        DEBUG_POINT("dual write: keys replaced");
    };
    if (is_exhausted(m)) return false;
    if (!needs_subtransaction(m) || none_left()) {
        step();
        return true;
    }
    subtransactions++;
    ErrorData *error = attempt(Undo::kSubtransaction, step);
    if (error && must_pass_on(m, false, error)) ReThrowError(error);
    return error == NULL;
}

// The foreign key that the error names, unless it is dest's own to another table; else NULL.
HeapTuple referencing_key(const Mapping *m, const ErrorData *error) {
    if (error->sqlerrcode != ERRCODE_FOREIGN_KEY_VIOLATION || !error->schema_name || !error->table_name ||
        !error->constraint_name)
        return NULL;
    const Oid table = get_relname_relid(error->table_name, get_namespace_oid(error->schema_name, true));
    const Oid constraint =
        OidIsValid(table) ? get_relation_constraint_oid(table, error->constraint_name, true) : InvalidOid;
    HeapTuple tuple = SearchSysCache1(CONSTROID, ObjectIdGetDatum(constraint));
    if (!HeapTupleIsValid(tuple)) return NULL;
    const Form_pg_constraint form = (Form_pg_constraint)GETSTRUCT(tuple);
    if (form->conrelid != m->dest || form->confrelid == m->dest) return tuple;
    ReleaseSysCache(tuple);
    return NULL;
}

// Whether deleting the row and inserting it anew, which stands in for a move that was refused, would take rows of other
// tables along that nobody has deleted. A foreign key that has refused the move does so, or refuses the deletion, too;
// where anything else has, nothing holds the deletion up.
bool would_act_on_deletion(const Mapping *m, const ErrorData *error) {
    HeapTuple tuple = referencing_key(m, error);
    if (tuple == NULL) return m->deletion_acts;
    const char action = ((Form_pg_constraint)GETSTRUCT(tuple))->confdeltype;
    ReleaseSysCache(tuple);
    return action != FKCONSTR_ACTION_NOACTION && action != FKCONSTR_ACTION_RESTRICT;
}

// Rows whose key has changed, one by one in the order of the changes, as the statement made them. Only a first step,
// for the sake of what dest alone has of these rows: what their keys' rows are is applied afterwards, from the state,
// also where one could not be moved.
void move_rows(Mapping *m, const Touched &touched, int from, int to) {
    if (from == to) return;
    auto step = [&] {
        with_spi([&] {
            KeyArrays all = key_arrays(touched.moved_from, m, 0, touched.moved_from.n);
            for (int i = from; i < to; i++)
                move_row(m, key_arrays(touched.moved_from, m, i, i + 1), key_arrays(touched.moved_to, m, i, i + 1),
                         all);
        });
    };
    if (m->on_failure == OnFailure::kRaise) return step();
    subtransactions++;
    ErrorData *error = attempt(Undo::kSubtransaction, step);
    if (error && (must_pass_on(m, false, error) || would_act_on_deletion(m, error))) ReThrowError(error);
    if (error == NULL || to - from == 1 || none_left()) return;
    const int middle = from + (to - from) / 2;
    move_rows(m, touched, from, middle);
    move_rows(m, touched, middle, to);
}

// Whether the migration has a worker, or will have one in a moment.
bool has_worker(int32 migration) {
    pid_t pid;
    if (launched && launched_for == migration && GetBackgroundWorkerPid(launched, &pid) != BGWH_STOPPED) return true;
    const LOCKTAG tag = migration_worker_lock(migrations, migration, 0);
    return VirtualTransactionIdIsValid(GetLockConflicts(&tag, ExclusiveLock, NULL)[0]);
}

// The worker that retries failures may have ended for want of work. It must not look before they are committed.
void launch_retry() {
    if (failed_migration == 0 || has_worker(failed_migration)) return;
    if (launched) pfree(launched);
    launched = NULL;
    launched_for = failed_migration;
    MemoryContext old = MemoryContextSwitchTo(TopMemoryContext);
    // (Without a free slot the next failure, or verb, tries again.)
    (void)launch_migration_worker(failed_migration, 0, &launched);
    MemoryContextSwitchTo(old);
}

}  // namespace

void record_gap(const Mapping *m) {
    const Oid types[1] = {INT4OID};
    const Datum values[1] = {Int32GetDatum(m->flow)};
    auto record = [&] { run_sql("INSERT INTO migrate._gap (flow) VALUES ($1)", 1, types, values); };
    with_spi([&] { with_extension_owner(record); });
}

bool is_exhausted(const Mapping *m) {
    return m->on_failure == OnFailure::kRecord && needs_subtransaction(m) && none_left();
}

void apply_removals(Mapping *m, const Touched &touched) {
    move_rows(m, touched, 0, touched.moved_from.n);
    apply_list(m, Write::kRemove, touched.remove);
}

// Deletes come first: a key that was taken away and given to another row must be free before that row is written.
void apply_touched(Mapping *m, const Touched &touched) {
    move_rows(m, touched, 0, touched.moved_from.n);
    if (touched.remove.n > 0 && touched.upsert.n > 0 && replace(m, touched)) return;
    apply_list(m, Write::kRemove, touched.remove);
    DEBUG_POINT("dual write: deletes done");
    apply_list(m, Write::kUpsert, touched.upsert);
}

// All rows at once; where one of them cannot go, by key, so that the others do.
void apply_truncation(Mapping *m) {
    auto all = [&] { with_spi([&] { remove_all_missing(m); }); };
    if (!is_guarded(m, Write::kRemove)) return all();
    if (!none_left()) {
        subtransactions++;
        ErrorData *error = attempt(Undo::kSubtransaction, all);
        if (error == NULL) return;
        if (must_pass_on(m, is_urgent(m, Write::kRemove), error)) ReThrowError(error);
    }
    KeyList missing = {};
    MemoryContext result = CurrentMemoryContext;
    auto list = [&] { with_spi([&] { list_missing(m, &missing, result); }); };
    subtransactions++;
    ErrorData *error = attempt(Undo::kSubtransaction, list);
    if (error && must_pass_on(m, is_urgent(m, Write::kRemove), error)) ReThrowError(error);
    if (error) return record_gap(m);
    grant_subtransactions();
    apply_list(m, Write::kRemove, missing);
}

void grant_subtransactions() {
    subtransaction_limit = Max(subtransaction_limit, subtransactions + kCommitSubtransactions);
}

void end_applying_transaction(bool committed) {
    if (committed) launch_retry();
    failed_migration = 0;
    subtransactions = 0;
    subtransaction_limit = kStatementSubtransactions;
}

}  // namespace migrate

// The dual-write triggers. The row trigger notes the keys a row event touched; the statement trigger, which fires after
// every row trigger of the statement, applies them in bulk from the state the (outermost) statement left. Where a
// foreign key between the two tables must find dest's row gone (or there) earlier, the row trigger applies the key at
// once: its name sorts before RI_ConstraintTrigger_…. What no statement trigger comes for (the apply worker of a
// subscription fires none, a partition attached since has none) is applied before the commit.
#include "dual_write.hpp"
#include "background.hpp"
#include "debug_point.hpp"
#include "flow.hpp"
#include "mutant.hpp"
#include "text.hpp"
#include "touched.hpp"

MIGRATE_FUNCTION(migrate_dual_write_row)
MIGRATE_FUNCTION(migrate_dual_write_flush)
MIGRATE_FUNCTION(migrate_dual_write_truncate)
MIGRATE_FUNCTION(migrate_invalidate)

namespace migrate {
namespace {

// A statement that touches more keys than this is applied in pieces, so that memory stays flat.
constexpr int kFlushAt = 10000;
// More subtransactions than 64 with a transaction ID in one transaction make every snapshot on a replica slow.
// Statements share the first number; what they leave over is applied at the commit, in bulk, with so many more.
constexpr int kStatementSubtransactions = 32, kCommitSubtransactions = 24;

struct CacheKey {
    int32 flow;
    bool reverse;
};

struct CacheEntry {
    CacheKey key;
    Mapping *mapping;
    bool stale;
    Touched touched;
};

HTAB *cache = NULL;
// Subtransactions this top-level transaction has used to keep failures from the application.
int subtransactions = 0;
int subtransaction_limit = kStatementSubtransactions;

// A migration that this transaction has recorded failures of, to be retried by a worker; 0: none. (Of several, one will
// do: while there are failures its worker stays, and the others' next failure starts theirs.)
int32 failed_migration = 0;
TimestampTz last_launch = 0;
constexpr int kLaunchEveryMs = 30000;

// ---- the cache of mappings ------------------------------------------------------------------------------------------

// Any change to origin or dest (DDL, options by migrate._invalidate) makes the mapping be read again.
void relation_changed(Datum, Oid relid) {
    HASH_SEQ_STATUS scan;
    hash_seq_init(&scan, cache);
    while (CacheEntry *entry = (CacheEntry *)hash_seq_search(&scan))
        if (entry->mapping && (relid == InvalidOid || relid == entry->mapping->origin ||
                               relid == entry->mapping->dest || relid == entry->mapping->view))
            entry->stale = true;
}

void create_cache() {
    HASHCTL control = {};
    control.keysize = sizeof(CacheKey);
    control.entrysize = sizeof(CacheEntry);
    control.hcxt = CacheMemoryContext;
    cache = hash_create("migrate_ext mappings", 16, &control, HASH_ELEM | HASH_BLOBS | HASH_CONTEXT);
    CacheRegisterRelcacheCallback(relation_changed, (Datum)0);
}

// The trigger's arguments are the flow and the direction. NULL where the mapping is gone.
CacheEntry *find_entry(const Trigger *trigger) {
    if (trigger->tgnargs != 2) elog(ERROR, "trigger \"%s\" has %d arguments, not 2", trigger->tgname, trigger->tgnargs);
    if (cache == NULL) create_cache();
    CacheKey key;
    memset(&key, 0, sizeof key);  // padding is part of the hash
    key.flow = pg_strtoint32(trigger->tgargs[0]);
    key.reverse = strcmp(trigger->tgargs[1], "reverse") == 0;
    bool found;
    CacheEntry *entry = (CacheEntry *)hash_search(cache, &key, HASH_ENTER, &found);
    if (!found) entry->mapping = NULL, entry->stale = false, memset(&entry->touched, 0, sizeof(Touched));
    const bool unused = entry->touched.upsert.n == 0 && entry->touched.remove.n == 0;
    if (entry->mapping && entry->stale && unused && !is_applying(entry->mapping->migration)) {
        free_mapping(entry->mapping);
        entry->mapping = NULL;
    }
    if (entry->mapping == NULL) {
        entry->stale = false;
        entry->mapping = with_spi([&] { return load_mapping(key.flow, key.reverse, Lifetime::kBackend); });
    }
    return entry->mapping ? entry : NULL;
}

// ---- applying what was touched
// ---------------------------------------------------------------------------------------

// INSERT INTO migrate._failure … as the extension's owner: in the application's transaction, so that it commits with
// it.
void record_failures(const Mapping *m, const KeyList &list, int from, int to, const char *state, const char *object) {
    Oid types[5] = {INT4OID, TEXTOID, TEXTARRAYOID, TEXTOID, TEXTOID};
    char nulls[6] = "     ";
    if (object == NULL) nulls[4] = 'n';
    failed_migration = m->migration;
    DEBUG_POINT("dual write: failure to be recorded");
    with_extension_owner([&] {
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
    });
    DEBUG_POINT("dual write: failure recorded");
}

enum class Write { kUpsert, kRemove };

void apply_plainly(Mapping *m, Write write, const KeyList &list, int from, int to) {
    Datum *arrays = key_arrays(list, m, from, to);
    if (write == Write::kUpsert)
        upsert_keys(m, arrays);
    else
        remove_keys(m, arrays);
}

// Errors that mean the request itself is to end: a cancel, a shutdown, a lost connection. And, where the application
// writes both sides: that another transaction is writing dest's row. Were that recorded and retried, this transaction's
// write of origin and the other's write of dest would both be acknowledged, and one of them lost.
bool must_pass_on(const Mapping *m, const ErrorData *error) {
    const int category = ERRCODE_TO_CATEGORY(error->sqlerrcode);
    return category == ERRCODE_OPERATOR_INTERVENTION ||
           (m->both_directions &&
            (category == ERRCODE_TRANSACTION_ROLLBACK || error->sqlerrcode == ERRCODE_LOCK_NOT_AVAILABLE));
}

// best_effort: in one subtransaction; when that fails, in halves down to the row, as long as the transaction may still
// use subtransactions. What cannot be applied is recorded, and a worker retries it.
void apply_or_record(Mapping *m, Write write, const KeyList &list, int from, int to, const char *last_state,
                     const char *last_object) {
    // What a foreign key's check comes for next cannot wait for a worker.
    const bool urgent = write == Write::kUpsert ? m->insert_at_once : m->delete_at_once;
    if (subtransactions >= subtransaction_limit && !urgent) {
        record_failures(m, list, from, to, last_state ? last_state : "53400", last_object);
        return;
    }
    subtransactions++;
    auto step = [&] {
        apply_plainly(m, write, list, from, to);
        DEBUG_POINT("dual write: keys applied below a savepoint");
    };
    ErrorData *error = attempt(Undo::kSubtransaction, step);
    if (error == NULL) return;
    if (must_pass_on(m, error)) ReThrowError(error);
    const char *state = pstrdup(unpack_sql_state(error->sqlerrcode));
    const char *object = error->constraint_name ? error->constraint_name : error->column_name;
    if (to - from == 1) {
        record_failures(m, list, from, to, state, object);
        return;
    }
    const int middle = from + (to - from) / 2;
    apply_or_record(m, write, list, from, middle, state, object);
    apply_or_record(m, write, list, middle, to, state, object);
}

void apply_list(Mapping *m, Write write, const KeyList &list) {
    if (list.n == 0) return;
    const bool may_fail = write == Write::kUpsert ? m->upsert_may_fail : m->delete_may_fail;
    if (may_fail && m->on_failure == OnFailure::kRecord)
        apply_or_record(m, write, list, 0, list.n, NULL, NULL);
    else
        apply_plainly(m, write, list, 0, list.n);
}

bool needs_subtransaction(const Mapping *m) {
    return m->on_failure == OnFailure::kRecord && (m->upsert_may_fail || m->delete_may_fail);
}

// Whether the statements' share of subtransactions is used up.
bool is_exhausted(const Mapping *m) {
    return needs_subtransaction(m) && subtransactions >= subtransaction_limit;
}

// All at once; false where that failed, and nothing is done. (strict: the error goes to the application.)
bool replace(Mapping *m, const Touched &touched) {
    auto step = [&] {
        replace_keys(m, key_arrays(touched.remove, m, 0, touched.remove.n),
                     key_arrays(touched.upsert, m, 0, touched.upsert.n));
    };
    if (!needs_subtransaction(m)) {
        step();
        return true;
    }
    if (subtransactions >= subtransaction_limit) return false;
    subtransactions++;
    ErrorData *error = attempt(Undo::kSubtransaction, step);
    if (error && must_pass_on(m, error)) ReThrowError(error);
    return error == NULL;
}

// Deletes come first: a key that was taken away and given to another row must be free before that row is written.
void apply_touched(Mapping *m, const Touched &touched) {
    if (touched.remove.n > 0 && touched.upsert.n > 0 && replace(m, touched)) return;
    apply_list(m, Write::kRemove, touched.remove);
    DEBUG_POINT("dual write: deletes done");
    apply_list(m, Write::kUpsert, touched.upsert);
}

void flush(CacheEntry *entry) {
    Touched touched = entry->touched;
    if (touched.upsert.n == 0 && touched.remove.n == 0) return;
    // In a subtransaction below the one that touched them (a statement nested in an EXCEPTION block of a user's
    // trigger) the keys stay: what is applied here may yet be rolled back.
    const bool final = GetCurrentTransactionNestLevel() <= outermost_level(touched);
    if (final) memset(&entry->touched, 0, sizeof(Touched));
    Mapping *m = entry->mapping;
    with_spi([&] {
        if (!final) touched.upsert = copy_keys(touched.upsert, m), touched.remove = copy_keys(touched.remove, m);
        apply_touched(m, touched);
        DEBUG_POINT("dual write: upserts done");
    });
    if (final) MemoryContextDelete(touched.context);
}

// What is to be gone before a foreign key's check; the rest is left to the commit.
void flush_removals(CacheEntry *entry) {
    Mapping *m = entry->mapping;
    with_spi([&] {
        const KeyList removed = copy_keys(entry->touched.remove, m);
        if (GetCurrentTransactionNestLevel() <= outermost_level(entry->touched))
            memset(&entry->touched.remove, 0, sizeof(KeyList));
        apply_list(m, Write::kRemove, removed);
    });
}

// Many keys are worth some more subtransactions, in the middle of a transaction and at its end.
void grant_subtransactions() {
    subtransaction_limit = Max(subtransaction_limit, subtransactions + kCommitSubtransactions);
}

// How many triggers this one is nested in, itself included.
int trigger_depth() {
    return DatumGetInt32(DirectFunctionCall1(pg_trigger_depth, (Datum)0));
}

// A statement within a statement (a user's trigger, a foreign key's cascade) leaves its keys to the one around it: only
// then the states are those that the application meant, and that dest's own constraints may be held against.
void flush_outermost(CacheEntry *entry) {
    if (trigger_depth() > entry->touched.trigger_depth) return;
    if (!is_exhausted(entry->mapping)) flush(entry);  // else left to the commit
}

CacheEntry *any_touched() {
    CacheEntry *found = NULL;
    HASH_SEQ_STATUS scan;
    hash_seq_init(&scan, cache);
    while (CacheEntry *entry = (CacheEntry *)hash_seq_search(&scan))
        if (entry->touched.upsert.n > 0 || entry->touched.remove.n > 0) found = entry;
    return found;
}

// One write may lead to another, where one migration's target is another's source. The server has fired the deferred
// triggers already: those that our writes have queued (SET CONSTRAINTS … DEFERRED) would be forgotten.
void flush_all() {
    if (cache == NULL) return;
    grant_subtransactions();
    while (CacheEntry *entry = any_touched()) {
        PushActiveSnapshot(GetTransactionSnapshot());  // the last statement's is gone by now
        flush(entry);
        PopActiveSnapshot();
        AfterTriggerFireDeferred();
    }
}

// The worker that retries failures may have ended for want of work. It must not look before they are committed.
void launch_retry() {
    if (failed_migration == 0) return;
    const TimestampTz now = GetCurrentTimestamp();
    if (!TimestampDifferenceExceeds(last_launch, now, kLaunchEveryMs)) return;
    last_launch = now;
    (void)launch_migration_worker(failed_migration, 0);  // without a free slot the next failure, or verb, tries again
}

// What a lost transaction touched needs no writing; its memory is gone with it.
void at_transaction_end(XactEvent event, void *) {
    if (event == XACT_EVENT_PRE_COMMIT || event == XACT_EVENT_PRE_PREPARE) {
        flush_all();
        return;
    }
    if (event != XACT_EVENT_ABORT && event != XACT_EVENT_COMMIT && event != XACT_EVENT_PREPARE) return;
    if (event == XACT_EVENT_COMMIT) launch_retry();
    failed_migration = 0;
    subtransactions = 0;
    subtransaction_limit = kStatementSubtransactions;
    if (cache == NULL) return;
    HASH_SEQ_STATUS scan;
    hash_seq_init(&scan, cache);
    while (CacheEntry *entry = (CacheEntry *)hash_seq_search(&scan)) memset(&entry->touched, 0, sizeof(Touched));
}

void at_subtransaction_end(SubXactEvent event, SubTransactionId, SubTransactionId, void *) {
    if (cache == NULL || (event != SUBXACT_EVENT_ABORT_SUB && event != SUBXACT_EVENT_COMMIT_SUB)) return;
    HASH_SEQ_STATUS scan;
    hash_seq_init(&scan, cache);
    while (CacheEntry *entry = (CacheEntry *)hash_seq_search(&scan))
        if (event == SUBXACT_EVENT_ABORT_SUB)
            forget_level(&entry->touched, GetCurrentTransactionNestLevel());
        else
            merge_level(&entry->touched, GetCurrentTransactionNestLevel());
}

// ---- what a row event touched
// ------------------------------------------------------------------------------------------

// The attribute of the trigger's relation (a partition may number them otherwise) that is origin's `attnum`.
AttrNumber local_attnum(const Mapping *m, Relation relation, AttrNumber attnum) {
    if (RelationGetRelid(relation) == m->origin) return attnum;
    return get_attnum(RelationGetRelid(relation), get_attname(m->origin, attnum, false));
}

void read_key(const Mapping *m, Relation relation, TupleTableSlot *slot, Datum *values) {
    for (int i = 0; i < m->nparams; i++) {
        bool isnull;
        values[i] = slot_getattr(slot, local_attnum(m, relation, m->key[m->params[i]].origin), &isnull);
        if (isnull)
            ereport(ERROR, (errcode(ERRCODE_NOT_NULL_VIOLATION),
                            errmsg("null in key column \"%s\" of \"%s\"",
                                   get_attname(m->origin, m->key[m->params[i]].origin, false),
                                   RelationGetRelationName(relation)),
                            errhint("A migrated key must be NOT NULL: ALTER TABLE %s ALTER COLUMN … SET NOT NULL;",
                                    RelationGetRelationName(relation))));
    }
}

bool same_value(TupleTableSlot *a, TupleTableSlot *b, AttrNumber attnum) {
    bool a_null, b_null;
    const Datum left = slot_getattr(a, attnum, &a_null), right = slot_getattr(b, attnum, &b_null);
    if (a_null || b_null) return a_null && b_null;
    const Form_pg_attribute att = TupleDescAttr(a->tts_tupleDescriptor, attnum - 1);
    if (att->attlen == -1 && DatumGetPointer(left) != DatumGetPointer(right) &&
        VARATT_IS_EXTERNAL_ONDISK(DatumGetPointer(left)) && VARATT_IS_EXTERNAL_ONDISK(DatumGetPointer(right)) &&
        memcmp(DatumGetPointer(left), DatumGetPointer(right), VARSIZE_EXTERNAL(DatumGetPointer(left))) == 0)
        return true;  // an unchanged toasted value: the same pointer
    return datum_image_eq(left, right, att->attbyval, att->attlen);
}

// Whether nothing that the mapping reads has changed: then dest's row is right already.
bool unchanged(const Mapping *m, Relation relation, TupleTableSlot *before, TupleTableSlot *after) {
    if (m->nreads == 1 && m->reads[0] == 0) return false;
    for (int i = 0; i < m->nreads; i++)
        if (!same_value(before, after, local_attnum(m, relation, m->reads[i]))) return false;
    return true;
}

bool same_key(const Mapping *m, Relation relation, TupleTableSlot *before, TupleTableSlot *after) {
    for (int i = 0; i < m->nparams; i++)
        if (!same_value(before, after, local_attnum(m, relation, m->key[m->params[i]].origin))) return false;
    return true;
}

void touch(CacheEntry *entry, KeyList Touched::*list, Relation relation, TupleTableSlot *slot) {
    Datum values[INDEX_MAX_KEYS];
    read_key(entry->mapping, relation, slot, values);
    Touched &touched = entry->touched;
    const int depth = trigger_depth();
    const bool none = touched.upsert.n == 0 && touched.remove.n == 0;
    touched.trigger_depth = none ? depth : Min(touched.trigger_depth, depth);
    if (touched.context == NULL)
        touched.context =
            AllocSetContextCreate(TopTransactionContext, "migrate_ext touched keys", ALLOCSET_SMALL_SIZES);
    append_key(&(touched.*list), entry->mapping, values, touched.context);
}

// A key that a row has lost. Where origin's key is deferrable another row may have it too, and be the one that stays.
void touch_old_key(CacheEntry *entry, Relation relation, TupleTableSlot *slot) {
    if (entry->mapping->carry_delete) touch(entry, &Touched::remove, relation, slot);
    if (entry->mapping->ambiguous && !is_mutant(mutant::new_key_only)) touch(entry, &Touched::upsert, relation, slot);
}

// A row that this transaction wrote: foreign keys check it again at each update, as they do an inserted one, and the
// dual write of its insertion may still be to come (a user's trigger updates it, before ours by name).
bool is_new(HeapTuple row) {
    return TransactionIdIsCurrentTransactionId(HeapTupleHeaderGetXmin(row->t_data));
}

void note_event(CacheEntry *entry, TriggerData *data) {
    const Mapping *m = entry->mapping;
    Relation relation = data->tg_relation;
    TupleTableSlot *row = data->tg_trigslot;
    bool at_once = false;
    if (TRIGGER_FIRED_BY_INSERT(data->tg_event)) {
        touch(entry, &Touched::upsert, relation, row);
        at_once = m->insert_at_once;
    } else if (TRIGGER_FIRED_BY_DELETE(data->tg_event)) {
        touch_old_key(entry, relation, row);
        at_once = m->delete_at_once;
    } else {
        TupleTableSlot *after = data->tg_newslot;
        if (unchanged(m, relation, row, after)) return;
        const bool moved = !same_key(m, relation, row, after);
        if (moved || m->filtered) {
            touch_old_key(entry, relation, row);
            at_once = m->delete_at_once;
        }
        touch(entry, &Touched::upsert, relation, after);
        at_once = at_once || (m->insert_at_once && (moved || is_new(data->tg_trigtuple)));
    }
    DEBUG_POINT("dual write: keys noted");
    if (entry->touched.upsert.n + entry->touched.remove.n >= kFlushAt) {
        grant_subtransactions();
        flush(entry);
    } else if (at_once) {
        if (is_exhausted(m) && !m->insert_at_once)
            flush_removals(entry);
        else
            flush(entry);
    }
}

TriggerData *trigger_data(FunctionCallInfo fcinfo) {
    if (!CALLED_AS_TRIGGER(fcinfo))
        ereport(ERROR, (errcode(ERRCODE_E_R_I_E_TRIGGER_PROTOCOL_VIOLATED), errmsg("not called by trigger manager")));
    return (TriggerData *)fcinfo->context;
}

}  // namespace

void init_dual_write() {
    RegisterXactCallback(at_transaction_end, NULL);
    RegisterSubXactCallback(at_subtransaction_end, NULL);
}

}  // namespace migrate

using namespace migrate;

// AFTER INSERT OR UPDATE OR DELETE … FOR EACH ROW EXECUTE FUNCTION migrate._dual_write_row(flow, direction)
Datum migrate_dual_write_row(PG_FUNCTION_ARGS) {
    TriggerData *data = trigger_data(fcinfo);
    CacheEntry *entry = find_entry(data->tg_trigger);
    if (entry && !is_echo(entry->mapping)) note_event(entry, data);
    return PointerGetDatum(NULL);
}

// AFTER INSERT OR UPDATE OR DELETE … FOR EACH STATEMENT EXECUTE FUNCTION migrate._dual_write_flush(flow, direction)
Datum migrate_dual_write_flush(PG_FUNCTION_ARGS) {
    CacheEntry *entry = find_entry(trigger_data(fcinfo)->tg_trigger);
    if (entry && !is_echo(entry->mapping)) flush_outermost(entry);
    return PointerGetDatum(NULL);
}

// AFTER TRUNCATE … FOR EACH STATEMENT EXECUTE FUNCTION migrate._dual_write_truncate(flow, direction)
Datum migrate_dual_write_truncate(PG_FUNCTION_ARGS) {
    CacheEntry *entry = find_entry(trigger_data(fcinfo)->tg_trigger);
    if (entry && entry->mapping->carry_delete && !is_echo(entry->mapping))
        with_spi([&] {
            remove_all_missing(entry->mapping);
            DEBUG_POINT("dual write: truncate carried");
        });
    return PointerGetDatum(NULL);
}

// migrate._invalidate(relation regclass) RETURNS void: every backend reads the relation's mappings again, from the
// commit on.
Datum migrate_invalidate(PG_FUNCTION_ARGS) {
    CacheInvalidateRelcacheByRelid(PG_GETARG_OID(0));
    PG_RETURN_VOID();
}

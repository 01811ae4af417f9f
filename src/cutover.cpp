// What a switch needs from the server's inside: waiting out old snapshots without holding a lock, and taking locks
// without queueing in front of the application. The switch itself is SQL (73_cutover.sql).
#include "mutant.hpp"
#include "text.hpp"

MIGRATE_FUNCTION(migrate_old_snapshots)
MIGRATE_FUNCTION(migrate_lock_relations)

namespace migrate {
namespace {

struct LockName {
    const char *name;
    LOCKMODE mode;
};

constexpr LockName kLockNames[] = {{"ACCESS SHARE", AccessShareLock},
                                   {"SHARE ROW EXCLUSIVE", ShareRowExclusiveLock},
                                   {"ACCESS EXCLUSIVE", AccessExclusiveLock}};

LOCKMODE lock_mode(const char *name) {
    for (const LockName &known : kLockNames)
        if (strcmp(known.name, name) == 0) return known.mode;
    ereport(ERROR, (errcode(ERRCODE_INVALID_PARAMETER_VALUE), errmsg("lock mode \"%s\" is not known", name)));
    return NoLock;
}

double milliseconds_since(TimestampTz start) {
    return (GetCurrentTimestamp() - start) / 1000.0;
}

// Since when the transaction that began at `transaction` has kept the application waiting.
struct Held {
    TimestampTz transaction;
    TimestampTz since;
} held = {0, 0};

// Waits for one lock as long as the budget that is left allows; raises lock_not_available after that.
void lock_within(Oid relid, LOCKMODE mode, int milliseconds) {
    if (ConditionalLockRelationOid(relid, mode)) return;
    if (milliseconds < 1)
        ereport(ERROR, (errcode(ERRCODE_LOCK_NOT_AVAILABLE), errmsg("no time is left to wait for a lock")));
    const int level = NewGUCNestLevel();
    (void)set_config_option("lock_timeout", psprintf("%d", milliseconds), PGC_USERSET, PGC_S_SESSION, GUC_ACTION_SAVE,
                            true, 0, false);
    LockRelationOid(relid, mode);
    AtEOXact_GUC(false, level);
}

void require_relation(Oid relid) {
    if (SearchSysCacheExists1(RELOID, ObjectIdGetDatum(relid))) return;
    ereport(ERROR, (errcode(ERRCODE_UNDEFINED_TABLE), errmsg("relation with OID %u was dropped meanwhile", relid)));
}

// A worker of ours reads the tables themselves, never through the views that a switch replaces.
bool is_own_worker(int pid) {
    const char *type = GetBackgroundWorkerTypeByPid(pid);
    return type != NULL && strncmp(type, "migrate", strlen("migrate")) == 0;
}

// Who waits for a lock of ours, directly or behind others, cannot go away before us: waiting for it would never end.
bool waits_for_us(int pid, int depth) {
    ArrayType *blockers = DatumGetArrayTypeP(DirectFunctionCall1(pg_blocking_pids, Int32GetDatum(pid)));
    const int n = ArrayGetNItems(ARR_NDIM(blockers), ARR_DIMS(blockers));
    const int32 *pids = (const int32 *)ARR_DATA_PTR(blockers);
    for (int i = 0; i < n; i++)
        if (pids[i] == MyProcPid || (depth > 0 && pids[i] != 0 && waits_for_us(pids[i], depth - 1))) return true;
    return false;
}

// Who waits here reads nothing of the application's by the snapshot it holds meanwhile: two switches at once must not
// wait for each other. The lock, which all of them share, tells.
LOCKTAG waiting_here() {
    LOCKTAG tag;
    SET_LOCKTAG_OBJECT(tag, MyDatabaseId, NamespaceRelationId, get_namespace_oid("migrate", false), 0);
    tag.locktag_lockmethodid = USER_LOCKMETHOD;
    return tag;
}

bool waits_here(VirtualTransactionId wanted) {
    const LOCKTAG tag = waiting_here();
    int n;
    VirtualTransactionId *list = GetLockConflicts(&tag, ExclusiveLock, &n);
    for (int i = 0; i < n; i++)
        if (VirtualTransactionIdEquals(list[i], wanted)) return true;
    return false;
}

struct Holders {
    VirtualTransactionId *list;
    int n;
};

// The transactions, other than ours, that hold a snapshot which may be as old as one with this xmin.
Holders list_holders(TransactionId limit) {
    Holders holders;
    holders.list = GetCurrentVirtualXIDs(limit, true, false, kMaintenanceFlags, &holders.n);
    return holders;
}

bool contains(const Holders &holders, VirtualTransactionId wanted) {
    for (int i = 0; i < holders.n; i++)
        if (VirtualTransactionIdEquals(holders.list[i], wanted)) return true;
    return false;
}

// Keeps of `waiting` those that still count. Whether they are to be waited for at all is asked only now and then, for
// pg_blocking_pids stops the whole lock manager for a moment.
void keep_remaining(Holders *waiting, TransactionId limit, bool ask_why) {
    const Holders now = list_holders(limit);
    int kept = 0;
    for (int i = 0; i < waiting->n; i++) {
        if (!contains(now, waiting->list[i])) continue;
        const int pid = pid_of(waiting->list[i]);
        if (ask_why && (pid == 0 || is_own_worker(pid) || waits_here(waiting->list[i]) || waits_for_us(pid, 4)))
            continue;
        waiting->list[kept++] = waiting->list[i];
    }
    waiting->n = kept;
    if (now.list) pfree(now.list);
}

Datum pid_array(const Holders &holders) {
    Datum *pids = (Datum *)palloc(sizeof(Datum) * (holders.n + 1));
    for (int i = 0; i < holders.n; i++) pids[i] = Int32GetDatum(pid_of(holders.list[i]));
    return PointerGetDatum(construct_array(pids, holders.n, INT4OID, 4, true, TYPALIGN_INT));
}

// Sleeps a moment; an interrupt of the caller (cancel, statement_timeout, shutdown) ends it.
void nap(long milliseconds) {
    (void)WaitLatch(MyLatch, WL_LATCH_SET | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH, milliseconds, PG_WAIT_EXTENSION);
    ResetLatch(MyLatch);
    CHECK_FOR_INTERRUPTS();
}

// For how long a lock may still be waited for by who has kept others waiting since then: whoever waits behind us, and
// holds what we want, must not have a deadlock found, for it is his statement that would fail.
int safe_wait(TimestampTz since) {
    return DeadlockTimeout / 2 - (int)Min(milliseconds_since(since), 1e6);
}

// Since when the transaction has held what it holds already. Locks of somebody else's making (LOCK TABLE, say) may be
// as old as itself.
TimestampTz holding_since() {
    const TimestampTz transaction = GetCurrentTransactionStartTimestamp();
    return held.transaction == transaction ? held.since : transaction;
}

}  // namespace
}  // namespace migrate

using namespace migrate;

// migrate._old_snapshots(timeout_ms bigint) RETURNS integer[]
// Waits until every snapshot that other transactions of this database hold now is gone, as CREATE INDEX CONCURRENTLY
// does, and returns '{}'; after timeout_ms, returns the PIDs of those that still hold one. A snapshot that is older
// than the last batch would, after the switch, see the new side as it was before it was filled.
Datum migrate_old_snapshots(PG_FUNCTION_ARGS) {
    const double timeout = (double)PG_GETARG_INT64(0);
    if (IsolationUsesXactSnapshot())
        ereport(ERROR, (errcode(ERRCODE_ACTIVE_SQL_TRANSACTION),
                        errmsg("cannot wait for old snapshots in a transaction that holds one itself"),
                        errhint("Call it at isolation level READ COMMITTED.")));
    const TimestampTz start = GetCurrentTimestamp();
    const LOCKTAG tag = waiting_here();
    (void)LockAcquire(&tag, ShareLock, false, false);
    const TransactionId limit = GetLatestSnapshot()->xmin;
    Holders waiting = list_holders(limit);
    if (is_mutant(mutant::no_barrier)) waiting.n = 0;
    for (int round = 0; waiting.n > 0; round++) {
        keep_remaining(&waiting, limit, round % 20 == 2);
        if (waiting.n == 0) break;
        if (milliseconds_since(start) >= timeout) {
            keep_remaining(&waiting, limit, true);
            break;
        }
        nap(round < 10 ? 5 : 50);
    }
    PG_RETURN_DATUM(pid_array(waiting));
}

// migrate._lock_relations(relations regclass[], modes text[], budget_ms integer, more boolean) RETURNS double precision
// Locks the relations by OID in the order given, each in its own mode (a view's tables are not locked along with it),
// within budget_ms for all of them together: whoever queues behind our first lock waits no longer than that. Raises
// 55P03 when it cannot; the locks it has got by then go with the caller's subtransaction. Once it holds one, it waits
// for the others only as long as is safe (safe_wait), and then tries them without waiting. `more`: the transaction
// holds locks of an earlier step already. Returns the milliseconds waited.
Datum migrate_lock_relations(PG_FUNCTION_ARGS) {
    Datum *relations, *modes;
    bool *nulls;
    int n, nmodes;
    deconstruct_array(PG_GETARG_ARRAYTYPE_P(0), REGCLASSOID, sizeof(Oid), true, TYPALIGN_INT, &relations, &nulls, &n);
    deconstruct_array(PG_GETARG_ARRAYTYPE_P(1), TEXTOID, -1, false, TYPALIGN_INT, &modes, &nulls, &nmodes);
    if (n != nmodes) elog(ERROR, "%d relations but %d lock modes", n, nmodes);
    const int budget = PG_GETARG_INT32(2);
    const bool more = PG_GETARG_BOOL(3);
    const TimestampTz start = GetCurrentTimestamp();
    TimestampTz since = more ? holding_since() : 0;
    for (int i = 0; i < n; i++) {
        const Oid relid = DatumGetObjectId(relations[i]);
        int left = Max(budget - (int)milliseconds_since(start), 1);
        if (since != 0) left = Min(left, safe_wait(since));
        lock_within(relid, lock_mode(TextDatumGetCString(modes[i])), left);
        if (since == 0) since = GetCurrentTimestamp();
        require_relation(relid);
    }
    held = {GetCurrentTransactionStartTimestamp(), since};
    PG_RETURN_FLOAT8(milliseconds_since(start));
}

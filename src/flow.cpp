#include "flow.hpp"
#include "flow_lock.hpp"
#include "flow_sql.hpp"
#include "mutant.hpp"

namespace migrate {
namespace {

// The mappings that this backend is applying just now, innermost last: the triggers of the other direction must not
// carry the write back. Only our own write sets it (trigger depth would not do: a user's trigger may write to origin in
// earnest).
struct Applying {
    const Mapping *mapping;
    int nest_level;
};
constexpr int kMaxApplying = 32;
Applying applying[kMaxApplying];
int applying_depth = 0;

// An error leaves as_dest_owner by longjmp: what it had set ends with the subtransaction it was set in.
void forget_aborted(SubXactEvent event, SubTransactionId, SubTransactionId, void *) {
    if (event != SUBXACT_EVENT_ABORT_SUB) return;
    while (applying_depth > 0 && applying[applying_depth - 1].nest_level >= GetCurrentTransactionNestLevel())
        applying_depth--;
}

void forget_all(XactEvent event, void *) {
    if (event == XACT_EVENT_ABORT || event == XACT_EVENT_COMMIT || event == XACT_EVENT_PREPARE) applying_depth = 0;
}

int times_in_use(const Mapping *m) {
    int n = 0;
    for (int i = 0; i < applying_depth; i++) n += applying[i].mapping == m;
    return n;
}

// Whether the mapping's views were lent to dest's owner.
bool may_read_views(const Mapping *m) {
    for (int i = -1; i < m->nshared; i++)
        if (!has_table_rights(i < 0 ? m->view : m->shared[i], m->dest_owner, ACL_SELECT | ACL_UPDATE)) return false;
    return !OidIsValid(m->carried) || has_table_rights(m->carried, m->dest_owner, ACL_SELECT);
}

bool is_view_of(const Mapping *m, Oid relation) {
    for (int i = 0; i < m->nshared; i++)
        if (m->shared[i] == relation) return true;
    return m->view == relation || (OidIsValid(relation) && m->carried == relation);
}

bool read_views_as_their_owner(Node *node, const Mapping *m) {
    if (node == NULL) return false;
    if (!IsA(node, Query)) return walk_expression(node, read_views_as_their_owner, m);
    read_with_rights_of(owner_of(m->view), (Query *)node, [m](Oid relation) { return is_view_of(m, relation); });
    return walk_query((Query *)node, read_views_as_their_owner, m);
}

// A generic plan, until SPI_finish or SPI_keepplan, whose parameters are the arrays of one list of keys, or of several.
SPIPlanPtr prepare(const Mapping *m, const char *sql, int lists) {
    Oid types[3 * INDEX_MAX_KEYS];
    for (int i = 0; i < m->nparams * lists; i++)
        types[i] = get_array_type(m->key[m->params[i % m->nparams]].origin_type);
    SPIPlanPtr plan = SPI_prepare_cursor(sql, m->nparams * lists, types, CURSOR_OPT_GENERIC_PLAN);
    if (plan == NULL) elog(ERROR, "SPI_prepare: %s", SPI_result_code_string(SPI_result));
    return plan;
}

// A new owner of dest is lent the views by the next verb, or by a worker. The application's statement neither waits for
// that nor does it itself (others would wait for its commit): its plan, used once, for the server would make it again
// from the text, reads the views as their owner does. Dest's owner learns nothing by it but what is written to dest.
SPIPlanPtr prepare_once(const Mapping *m, const char *sql, int lists = 1) {
    SPIPlanPtr plan = prepare(m, sql, lists);
    if (may_read_views(m)) return plan;
    ListCell *cell;
    foreach (cell, SPI_plan_get_plan_sources(plan))
        read_views_as_their_owner((Node *)((CachedPlanSource *)lfirst(cell))->query_list, m);
    return plan;
}

// The plan in *slot, made again from text when it is invalid (which covers renames). One that is running, in a write
// that has led to this one by a user's trigger, is left to be revalidated by the server.
template <class Build>
SPIPlanPtr kept_plan(const Mapping *m, SPIPlanPtr *slot, Build build, int lists = 1) {
    if (*slot && times_in_use(m) <= 1 && !SPI_plan_is_valid(*slot)) {
        SPI_freeplan(*slot);
        *slot = NULL;
    }
    const bool lent = may_read_views(m);
    if (*slot && lent) return *slot;
    Sql sql;
    build(sql);
    if (!lent) return prepare_once(m, sql.c_str(), lists);
    *slot = prepare(m, sql.c_str(), lists);
    if (m->kept) SPI_keepplan(*slot);
    return *slot;
}

// Where a key may stand twice, one of its rows may be somebody else's, who may be about to delete it or to move it: he
// would not see what we write of it to dest, and leave it there. So he is waited for, or he waits for us. locked AS
// (SELECT v.* FROM view v WHERE <condition> FOR SHARE OF v)
void held_rows(Sql &sql, const Mapping *m, const char *condition) {
    locked_rows(sql, m, condition, is_mutant(mutant::twice_not_held) ? "" : " FOR SHARE OF v");
}

// INSERT INTO dest … SELECT … FROM view v WHERE <keys><also> ON CONFLICT …; where a key may stand twice, FROM locked v,
// whose definition then comes first, behind `with`.
void insert_held(Sql &sql, const Mapping *m, const char *with, const char *keys, const char *also = "") {
    if (m->ambiguous) held_rows(sql.add(with), m, keys);
    Sql condition;
    condition.add(m->ambiguous ? "true" : keys).add(also);
    insert_from(sql.add(" "), m, m->ambiguous ? "locked" : qualified(m->view), condition.c_str());
}

// Whether ON CONFLICT DO UPDATE locks every row of dest that is there, also those that it leaves as they are.
bool holds_by_upsert(const Mapping *m) {
    return !m->partial && !is_only_key(m);
}

// The parameters of a statement that takes several lists of keys.
template <int n>
KeyArrays joined(const Mapping *m, const KeyArrays (&lists)[n]) {
    KeyArrays keys = (KeyArrays)palloc(sizeof(Datum) * m->nparams * n);
    for (int i = 0; i < n * m->nparams; i++) keys[i] = lists[i / m->nparams][i % m->nparams];
    return keys;
}

// SQL does not see the rows of a bulk copy that is under way.
void keep_out_bulk_copies(const Mapping *m) {
    if (!m->reverse) lock_flow(m, ShareLock);
}

}  // namespace

void begin_applying(const Mapping *m) {
    if (applying_depth == kMaxApplying)
        ereport(ERROR, (errcode(ERRCODE_STATEMENT_TOO_COMPLEX),
                        errmsg("dual writes lead to dual writes more than %d deep", kMaxApplying),
                        errhint("Migrations, or triggers on their targets, write into each other in a chain.")));
    applying[applying_depth++] = {m, GetCurrentTransactionNestLevel()};
}

void end_applying() {
    applying_depth--;
}

bool is_in_use(const Mapping *m) {
    return times_in_use(m) > 0;
}

bool is_applying(int32 migration) {
    for (int i = 0; i < applying_depth; i++)
        if (applying[i].mapping->migration == migration) return true;
    return false;
}

bool is_echo(const Mapping *m) {
    for (int i = 0; i < applying_depth; i++)
        if (applying[i].mapping->migration == m->migration && applying[i].mapping->reverse != m->reverse) return true;
    return false;
}

void init_flow() {
    RegisterSubXactCallback(forget_aborted, NULL);
    RegisterXactCallback(forget_all, NULL);
}

void upsert_keys(Mapping *m, KeyArrays keys) {
    keep_out_bulk_copies(m);
    as_dest_owner(m, 0, [&] {
        pin_planner_to_heap();
        // A row that is right already is not written here, and must be held all the same: a worker that does not see
        // our row of origin yet may be about to delete it.
        if (!holds_by_upsert(m))
            run_latest(kept_plan(m, &m->hold, [&](Sql &sql) { hold_dest_rows(sql, m); }), keys, NULL);
        if (m->partial && !is_only_key(m)) {
            auto build = [&](Sql &sql) { update_from(sql, m, qualified(m->view), view_key_in_params(m)); };
            run_latest(kept_plan(m, &m->update, build), keys, NULL);
        }
        SPIPlanPtr upsert =
            kept_plan(m, &m->upsert, [&](Sql &sql) { insert_held(sql, m, "WITH ", view_key_in_params(m)); });
        // An ambiguous key may stand in a row of somebody else's as well, and a partial mapping looks at dest's rows.
        if (m->ambiguous || m->partial)
            run_latest(upsert, keys, NULL);
        else
            run_on_held_rows(upsert, keys, NULL);
    });
}

void remove_keys(Mapping *m, KeyArrays keys) {
    keep_out_bulk_copies(m);
    as_dest_owner(m, 0, [&] {
        SPIPlanPtr plan = kept_plan(m, &m->remove, [&](Sql &sql) { delete_missing(sql, m, dest_key_in_params(m)); });
        run_latest(plan, keys, NULL);
    });
}

// WITH removed AS (DELETE FROM dest d WHERE <$1 …> AND NOT EXISTS … RETURNING 1)
// INSERT INTO dest … SELECT … FROM view v WHERE <$n …> AND (SELECT count(*) FROM removed) >= 0 ON CONFLICT …
void replace_keys(Mapping *m, KeyArrays removed, KeyArrays upserted) {
    if (!holds_by_upsert(m)) {
        remove_keys(m, removed);
        upsert_keys(m, upserted);
        return;
    }
    keep_out_bulk_copies(m);
    KeyArrays keys = joined(m, {removed, upserted});
    as_dest_owner(m, 0, [&] {
        auto build = [&](Sql &sql) {
            delete_missing(sql.add("WITH removed AS ("), m, dest_key_in_params(m));
            // The condition makes the DELETE come first: what it frees, the INSERT may take.
            insert_held(sql.add(" RETURNING 1)"), m, ", ", view_key_in_params(m, m->nparams + 1),
                        " AND (SELECT count(*) FROM removed) >= 0");
        };
        run_latest(kept_plan(m, &m->replace, build, 2), keys, NULL);
    });
}

void move_row(Mapping *m, KeyArrays from, KeyArrays to, KeyArrays all) {
    keep_out_bulk_copies(m);
    KeyArrays keys = joined(m, {from, to, all});
    as_dest_owner(m, 0, [&] {
        run_latest(kept_plan(
                       m, &m->move, [&](Sql &sql) { move_dest_row(sql, m); }, 3),
                   keys, NULL);
    });
}

// Nobody holds the rivals' keys in origin. So their rows are locked first, and only then, with a newer snapshot, it is
// seen whether origin has such a key (again): who gives it to a row from now on waits for this lock in his own dual
// write.
bool remove_rivals(Mapping *m, KeyArrays keys, Oid index) {
    Sql rival;
    rival.add(view_key_in_params(m)).add(" AND ");
    if (!m->carry_delete || !unique_columns_equal(rival, m, index)) return false;
    keep_out_bulk_copies(m);
    uint64 removed = 0;
    as_dest_owner(m, 0, [&] {
        Sql lock, remove, condition;
        lock.add("SELECT FROM ").relation(m->dest).add(" d, ").relation(m->view).add(" v WHERE ").add(rival.c_str());
        lock.add(" AND ").add(dest_share(m)).add(" FOR UPDATE OF d");
        condition.add("EXISTS (SELECT FROM ").relation(m->view).add(" v WHERE ").add(rival.c_str()).add(") AND ");
        delete_missing(remove, m, condition.add(dest_share(m)).c_str());
        if (run_latest(prepare_once(m, lock.c_str()), keys, NULL) > 0)
            removed = run_latest(prepare_once(m, remove.c_str()), keys, NULL);
    });
    return removed > 0;
}

void remove_all_missing(Mapping *m) {
    keep_out_bulk_copies(m);
    as_dest_owner(m, 0, [&] {
        Sql sql;
        delete_missing(sql, m, dest_share(m));
        run_latest(prepare_once(m, sql.c_str(), 0), NULL, NULL);
    });
}

uint64 find_all_missing(Mapping *m) {
    uint64 found = 0;
    as_dest_owner(m, 0, [&] {
        Sql sql;
        select_missing(sql, m, dest_share(m));
        found = run_latest(prepare_once(m, sql.c_str(), 0), NULL, NULL);
    });
    return found;
}

}  // namespace migrate

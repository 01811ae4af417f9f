#include "flow.hpp"
#include "flow_sql.hpp"

namespace migrate {
namespace {

// The migrations whose dual writes this backend is applying just now, innermost last: their triggers on dest must not
// carry the write back. Only our own write sets it (trigger depth would not do: a user's trigger may write to origin in
// earnest).
struct Applying {
    int32 migration;
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

// A kept, generic plan whose parameters are the key arrays.
SPIPlanPtr prepare(const Mapping *m, const char *sql) {
    Oid types[INDEX_MAX_KEYS];
    for (int i = 0; i < m->nparams; i++) types[i] = get_array_type(m->key[m->params[i]].origin_type);
    SPIPlanPtr plan = SPI_prepare_cursor(sql, m->nparams, types, CURSOR_OPT_GENERIC_PLAN);
    if (plan == NULL) elog(ERROR, "SPI_prepare: %s", SPI_result_code_string(SPI_result));
    SPI_keepplan(plan);
    return plan;
}

// The plan in *slot, made again from text when it is invalid (which covers renames).
template <class Build>
SPIPlanPtr kept_plan(const Mapping *m, SPIPlanPtr *slot, Build build) {
    if (*slot && !SPI_plan_is_valid(*slot)) {
        SPI_freeplan(*slot);
        *slot = NULL;
    }
    if (*slot == NULL) {
        Sql sql;
        build(sql);
        *slot = prepare(m, sql.c_str());
    }
    return *slot;
}

}  // namespace

void begin_applying(const Mapping *m) {
    if (applying_depth == kMaxApplying)
        ereport(ERROR, (errcode(ERRCODE_STATEMENT_TOO_COMPLEX),
                        errmsg("more than %d migrations write into each other in a chain", kMaxApplying)));
    applying[applying_depth++] = {m->migration, GetCurrentTransactionNestLevel()};
}

void end_applying() {
    applying_depth--;
}

bool is_applying(int32 migration) {
    for (int i = 0; i < applying_depth; i++)
        if (applying[i].migration == migration) return true;
    return false;
}

void init_flow() {
    RegisterSubXactCallback(forget_aborted, NULL);
    RegisterXactCallback(forget_all, NULL);
}

void upsert_keys(Mapping *m, KeyArrays keys) {
    as_dest_owner(m, 0, [&] {
        if (m->partial) {
            SPIPlanPtr update = kept_plan(m, &m->update, [&](Sql &sql) {
                if (!update_from(sql, m, qualified(m->view), view_key_in_params(m)))
                    sql.add("SELECT");  // nothing but the key
            });
            run_latest(update, keys, NULL);
        }
        run_latest(
            kept_plan(m, &m->upsert, [&](Sql &sql) { insert_from(sql, m, qualified(m->view), view_key_in_params(m)); }),
            keys, NULL);
    });
}

void remove_keys(Mapping *m, KeyArrays keys) {
    as_dest_owner(m, 0, [&] {
        SPIPlanPtr plan = kept_plan(m, &m->remove, [&](Sql &sql) { delete_missing(sql, m, dest_key_in_params(m)); });
        run_latest(plan, keys, NULL);
    });
}

void remove_all_missing(Mapping *m) {
    as_dest_owner(m, 0, [&] {
        Sql sql;
        delete_missing(sql, m, dest_share(m));
        SPIPlanPtr plan = SPI_prepare(sql.c_str(), 0, NULL);
        if (plan == NULL) elog(ERROR, "SPI_prepare: %s", SPI_result_code_string(SPI_result));
        run_latest(plan, NULL, NULL);
    });
}

}  // namespace migrate

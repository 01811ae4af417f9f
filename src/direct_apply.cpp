#include "direct_apply.hpp"
#include "direct_path.hpp"
#include "direct_row.hpp"
#include "flow.hpp"
#include "mutant.hpp"

namespace migrate {

// The choice for one mapping, and what it is carried out with. Made anew when a definition that it rests on changes.
struct DirectChoice {
    const Mapping *mapping;
    RowPath *rows;  // NULL: through SQL
    bool valid;
    MemoryContext context;
    MemoryContextCallback at_end;
    DirectChoice *next;
};

namespace {

constexpr int kAsOwner = SECURITY_LOCAL_USERID_CHANGE | SECURITY_NOFORCE_RLS;

DirectChoice *choices = NULL;  // of all mappings that this backend has

void relation_changed(Datum, Oid relid) {
    for (DirectChoice *c = choices; c; c = c->next)
        if (relid == InvalidOid || relid == c->mapping->origin || relid == c->mapping->dest ||
            relid == c->mapping->view)
            c->valid = false;
}

// Expressions have functions inlined and domains' checks compiled.
void function_or_type_changed(Datum, int, uint32) {
    for (DirectChoice *c = choices; c; c = c->next)
        if (c->rows && c->rows->projection->calls_functions) c->valid = false;
}

// The right to look into a schema is among those that were looked at.
void schema_changed(Datum, int, uint32) {
    for (DirectChoice *c = choices; c; c = c->next) c->valid = false;
}

void watch_definitions() {
    static bool watching = false;
    if (watching) return;
    watching = true;
    CacheRegisterRelcacheCallback(relation_changed, (Datum)0);
    CacheRegisterSyscacheCallback(PROCOID, function_or_type_changed, (Datum)0);
    CacheRegisterSyscacheCallback(TYPEOID, function_or_type_changed, (Datum)0);
    CacheRegisterSyscacheCallback(NAMESPACEOID, schema_changed, (Datum)0);
}

void forget_choice(void *arg) {
    DirectChoice **c = &choices;
    while (*c && *c != arg) c = &(*c)->next;
    if (*c) *c = (*c)->next;
}

DirectChoice *new_choice(Mapping *m) {
    watch_definitions();
    DirectChoice *c = (DirectChoice *)MemoryContextAllocZero(m->context, sizeof(DirectChoice));
    c->mapping = m;
    c->context = AllocSetContextCreate(m->context, "migrate_ext direct path", ALLOCSET_SMALL_SIZES);
    c->at_end.func = forget_choice, c->at_end.arg = c;
    MemoryContextRegisterResetCallback(m->context, &c->at_end);
    c->next = choices, choices = c;
    return m->direct = c;
}

// NULL: through SQL. Both relations are locked, so that what the choice rests on stays while it is acted upon.
RowPath *choose(Mapping *m, Relation origin, Relation dest) {
    DirectChoice *c = m->direct ? m->direct : new_choice(m);
    if (c->valid) return c->rows;
    MemoryContextReset(c->context);
    c->rows = NULL;  // after an error the query shall say what is wrong
    c->valid = true;
    auto make = [&] {
        const char *why_not = why_not_direct(m, origin, dest);
        MemoryContext old = MemoryContextSwitchTo(c->context);
        Projection *projection = why_not ? NULL : make_projection(m, origin, dest, &why_not);
        if (projection) c->rows = make_row_path(m, origin, dest, projection);
        MemoryContextSwitchTo(old);
    };
    begin_applying(m);
    with_user(m->dest_owner, kAsOwner, make);
    end_applying();
    return c->rows;
}

void say_where(void *arg) {
    const RowWriter *w = (const RowWriter *)arg;
    errcontext("dual write of migrate_ext from \"%s\" to \"%s\"", RelationGetRelationName(w->origin),
               RelationGetRelationName(w->dest));
}

template <class Fn>
void for_each_key(const Mapping *m, const KeySlice &slice, Fn each) {
    Datum key[INDEX_MAX_KEYS];
    for (int i = slice.from; i < slice.to; i++) {
        for (int k = 0; k < m->nparams; k++) key[k] = slice.list->columns[k][i];
        each(key, &slice.list->places[i]);
    }
}

void write_rows(RowPath *rows, Relation origin, Relation dest, const KeySlice &removed, const KeySlice &upserted) {
    RowWriter w;
    open_writer(&w, rows, origin, dest);
    ErrorContextCallback context = {error_context_stack, say_where, &w};
    error_context_stack = &context;
    MemoryContext old = MemoryContextSwitchTo(GetPerTupleMemoryContext(w.estate));
    for_each_key(rows->mapping, removed, [&](const Datum *key, ItemPointer) { remove_row(&w, key); });
    for_each_key(rows->mapping, upserted, [&](const Datum *key, ItemPointer place) { upsert_row(&w, key, place); });
    MemoryContextSwitchTo(old);
    close_writer(&w);
    error_context_stack = context.previous;
}

// As dest's owner. The settings are pinned, and a snapshot is taken, only for functions that could look at them.
void write_as_owner(RowPath *rows, Relation origin, Relation dest, const KeySlice &removed, const KeySlice &upserted) {
    const Mapping *m = rows->mapping;
    CommandCounterIncrement();  // the rows that an earlier part of the statement has written are to be updated
    auto write = [&] {
        begin_applying(m);
        write_rows(rows, origin, dest, removed, upserted);
        end_applying();
    };
    if (rows->calls_functions) {
        PushActiveSnapshot(IsolationUsesXactSnapshot() ? GetLatestSnapshot() : GetTransactionSnapshot());
        with_user(m->dest_owner, kAsOwner, write);
        PopActiveSnapshot();
    } else {
        with_bare_user(m->dest_owner, kAsOwner, write);
    }
    CommandCounterIncrement();
}

}  // namespace

bool apply_direct(Mapping *m, const KeySlice &removed, const KeySlice &upserted) {
    // (Whether a row of dest is one that the filter of the way forth lets through, SQL says.)
    if (is_in_use(m) || (removed.to > removed.from && OidIsValid(m->carried))) return false;
    Relation dest = try_relation_open(m->dest, RowExclusiveLock);
    if (dest) m->dest_owner = dest->rd_rel->relowner;  // it may have changed since the statement's first row
    Relation origin = dest ? try_relation_open(m->origin, AccessShareLock) : NULL;
    RowPath *rows = origin && !kOnlySql ? choose(m, origin, dest) : NULL;
    if (rows) write_as_owner(rows, origin, dest, removed, upserted);
    if (origin) relation_close(origin, NoLock);
    if (dest) relation_close(dest, NoLock);
    return rows != NULL;
}

}  // namespace migrate

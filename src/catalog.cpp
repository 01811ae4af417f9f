#include "catalog.hpp"

namespace migrate {
namespace {

const char kLoad[] =
    "SELECT migration, view, origin, dest, dest_owner, columns, reads, key_dest, key_origin, key_view, key_const, "
    "shared, shared_key, filtered, ambiguous, "
    "partial, carry_delete, delete_at_once, insert_at_once, upsert_may_fail, delete_may_fail, strict, "
    "both_directions "
    "FROM migrate._load_mapping($1, $2)";

struct Row {
    HeapTuple tuple;
    TupleDesc desc;
    Datum get(const char *name) const {
        bool isnull;
        const int column = SPI_fnumber(desc, name);
        if (column <= 0) elog(ERROR, "no column \"%s\"", name);
        const Datum value = SPI_getbinval(tuple, desc, column, &isnull);
        if (isnull) elog(ERROR, "unexpected null in column \"%s\" of a mapping", name);
        return value;
    }
    Oid oid(const char *name) const { return DatumGetObjectId(get(name)); }
    bool flag(const char *name) const { return DatumGetBool(get(name)); }
};

AttrNumber *attnums(const Row &row, const char *name, int *n) {
    Datum *values;
    deconstruct_array(DatumGetArrayTypeP(row.get(name)), INT2OID, 2, true, TYPALIGN_SHORT, &values, NULL, n);
    AttrNumber *result = (AttrNumber *)palloc(sizeof(AttrNumber) * (*n + 1));
    for (int i = 0; i < *n; i++) result[i] = DatumGetInt16(values[i]);
    return result;
}

Oid *oids(const Row &row, const char *name, int *n) {
    Datum *values;
    deconstruct_array(DatumGetArrayTypeP(row.get(name)), REGCLASSOID, 4, true, TYPALIGN_INT, &values, NULL, n);
    Oid *result = (Oid *)palloc(sizeof(Oid) * (*n + 1));
    for (int i = 0; i < *n; i++) result[i] = DatumGetObjectId(values[i]);
    return result;
}

void read_key(const Row &row, Mapping *m) {
    int n;
    const AttrNumber *dest = attnums(row, "key_dest", &m->nkey);
    const AttrNumber *origin = attnums(row, "key_origin", &n);
    const AttrNumber *view = attnums(row, "key_view", &n);
    Datum *constants;
    bool *constant_null;
    deconstruct_array(DatumGetArrayTypeP(row.get("key_const")), TEXTOID, -1, false, TYPALIGN_INT, &constants,
                      &constant_null, &n);
    m->key = (KeyColumn *)palloc0(sizeof(KeyColumn) * m->nkey);
    m->params = (int *)palloc(sizeof(int) * m->nkey);
    for (int i = 0; i < m->nkey; i++) {
        KeyColumn &key = m->key[i];
        key.dest = dest[i], key.origin = origin[i], key.view = view[i];
        key.constant = constant_null[i] ? NULL : TextDatumGetCString(constants[i]);
        key.dest_type = get_atttype(m->dest, key.dest);
        if (key.origin != 0) {
            key.origin_type = get_atttype(m->origin, key.origin);
            m->params[m->nparams++] = i;
        }
    }
}

}  // namespace

Mapping *load_mapping(int32 flow, bool reverse, Lifetime lifetime) {
    Oid types[2] = {INT4OID, TEXTOID};
    Datum args[2] = {Int32GetDatum(flow), CStringGetTextDatum(reverse ? "reverse" : "forward")};
    SPIPlanPtr plan = SPI_prepare(kLoad, 2, types);
    if (plan == NULL) elog(ERROR, "SPI_prepare: %s", SPI_result_code_string(SPI_result));
    const uint64 found = with_extension_owner([&] { return run_latest(plan, args, NULL); });
    if (found == 0) return NULL;
    const Row row = {SPI_tuptable->vals[0], SPI_tuptable->tupdesc};

    const bool kept = lifetime == Lifetime::kBackend;
    MemoryContext context = AllocSetContextCreate(kept ? CacheMemoryContext : CurrentMemoryContext,
                                                  "migrate_ext mapping", ALLOCSET_SMALL_SIZES);
    MemoryContext old = MemoryContextSwitchTo(context);
    Mapping *m = (Mapping *)palloc0(sizeof(Mapping));
    m->context = context;
    m->kept = kept;
    m->flow = flow, m->reverse = reverse;
    m->migration = DatumGetInt32(row.get("migration"));
    m->view = row.oid("view"), m->origin = row.oid("origin"), m->dest = row.oid("dest"),
    m->dest_owner = row.oid("dest_owner");
    m->columns = attnums(row, "columns", &m->ncolumns);
    m->reads = attnums(row, "reads", &m->nreads);
    read_key(row, m);
    m->shared = oids(row, "shared", &m->nshared);
    int ignored;
    m->shared_key = attnums(row, "shared_key", &ignored);
    m->filtered = row.flag("filtered"), m->ambiguous = row.flag("ambiguous"), m->partial = row.flag("partial");
    m->carry_delete = row.flag("carry_delete");
    m->delete_at_once = row.flag("delete_at_once"), m->insert_at_once = row.flag("insert_at_once");
    m->upsert_may_fail = row.flag("upsert_may_fail"), m->delete_may_fail = row.flag("delete_may_fail");
    m->on_failure = row.flag("strict") ? OnFailure::kRaise : OnFailure::kRecord;
    m->both_directions = row.flag("both_directions");
    MemoryContextSwitchTo(old);
    return m;
}

void free_mapping(Mapping *mapping) {
    SPIPlanPtr plans[] = {mapping->upsert, mapping->update, mapping->remove, mapping->replace};
    for (SPIPlanPtr plan : plans)
        if (plan) SPI_freeplan(plan);
    MemoryContextDelete(mapping->context);
}

}  // namespace migrate

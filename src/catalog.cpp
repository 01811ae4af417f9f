#include "catalog.hpp"

namespace migrate {
namespace {

// --- what is on record -----------------------------------------------------------------------------------------------
// (Read without a query, as PostgreSQL reads its catalogs: every new connection's first write waits for it, and parsing
// and planning took 20 ms. The tables have a few rows each.)

struct Row {
    TupleTableSlot *slot;

    Datum get(const char *name, bool *isnull) const {
        const int column = SPI_fnumber(slot->tts_tupleDescriptor, name);
        if (column <= 0) elog(ERROR, "no column \"%s\"", name);
        return slot_getattr(slot, column, isnull);
    }
    Datum get(const char *name) const {
        bool isnull;
        const Datum value = get(name, &isnull);
        if (isnull) elog(ERROR, "unexpected null in column \"%s\"", name);
        return value;
    }
    Oid oid(const char *name) const { return DatumGetObjectId(get(name)); }
    int32 number(const char *name) const { return DatumGetInt32(get(name)); }
    bool flag(const char *name) const { return DatumGetBool(get(name)); }
    bool says(const char *name, const char *text) const {
        bool isnull;
        const Datum value = get(name, &isnull);
        if (isnull) return false;
        const struct varlena *given = PG_DETOAST_DATUM_PACKED(value);
        return VARSIZE_ANY_EXHDR(given) == strlen(text) && memcmp(VARDATA_ANY(given), text, strlen(text)) == 0;
    }
};

// Calls fn(row) for each row of migrate.<table>, as of the latest snapshot.
template <class Fn>
void for_each_row(const char *table, Fn fn) {
    Relation relation = table_open(get_relname_relid(table, get_namespace_oid("migrate", false)), AccessShareLock);
    Snapshot snapshot = RegisterSnapshot(GetLatestSnapshot());
    TableScanDesc scan = table_beginscan(relation, snapshot, 0, NULL);
    const Row row = {table_slot_create(relation, NULL)};
    while (table_scan_getnextslot(scan, ForwardScanDirection, row.slot)) fn(row);
    ExecDropSingleTupleTableSlot(row.slot);
    table_endscan(scan);
    UnregisterSnapshot(snapshot);
    table_close(relation, AccessShareLock);
}

AttrNumber *attnums(const Row &row, const char *name, int *n) {
    Datum *values;
    deconstruct_array(DatumGetArrayTypeP(row.get(name)), INT2OID, 2, true, TYPALIGN_SHORT, &values, NULL, n);
    AttrNumber *result = (AttrNumber *)palloc(sizeof(AttrNumber) * (*n + 1));
    for (int i = 0; i < *n; i++) result[i] = DatumGetInt16(values[i]);
    return result;
}

// For each key column of dest its constant, or NULL.
const char **key_constants(const Row &row, int *n) {
    Datum *texts;
    bool *isnull;
    deconstruct_array(DatumGetArrayTypeP(row.get("key_const")), TEXTOID, -1, false, TYPALIGN_INT, &texts, &isnull, n);
    const char **constants = (const char **)palloc(sizeof(char *) * (*n + 1));
    for (int i = 0; i < *n; i++) constants[i] = isnull[i] ? NULL : TextDatumGetCString(texts[i]);
    return constants;
}

void read_key(const Row &row, Mapping *m) {
    int n;
    const AttrNumber *dest = attnums(row, "key_dest", &m->nkey);
    const AttrNumber *origin = attnums(row, "key_origin", &n);
    const AttrNumber *view = attnums(row, "key_view", &n);
    const char **constants = key_constants(row, &n);
    m->key = (KeyColumn *)palloc0(sizeof(KeyColumn) * m->nkey);
    m->params = (int *)palloc(sizeof(int) * m->nkey);
    for (int i = 0; i < m->nkey; i++) {
        KeyColumn &key = m->key[i];
        key.dest = dest[i], key.origin = origin[i], key.view = view[i];
        key.constant = constants[i];
        key.dest_type = get_atttype(m->dest, key.dest);
        if (key.origin != 0) {
            key.origin_type = get_atttype(m->origin, key.origin);
            m->params[m->nparams++] = i;
        }
    }
}

bool is_of(const Row &row, int32 flow, bool reverse) {
    return row.number("flow") == flow && row.says("direction", reverse ? "reverse" : "forward");
}

bool read_row(Mapping *m) {
    bool found = false;
    for_each_row("_mapping", [&](const Row &row) {
        if (!is_of(row, m->flow, m->reverse)) return;
        found = true;
        m->view = row.oid("view"), m->origin = row.oid("origin"), m->dest = row.oid("dest");
        m->columns = attnums(row, "columns", &m->ncolumns);
        m->reads = attnums(row, "reads", &m->nreads);
        read_key(row, m);
        m->filtered = row.flag("filtered");
        m->plain = row.flag("plain");
    });
    return found;
}

int32 migration_of(int32 flow) {
    int32 migration = 0;
    for_each_row("_flow", [&](const Row &row) {
        if (row.number("id") == flow) migration = row.number("migration");
    });
    return migration;
}

// The option's value, or its default.
bool is_strict(int32 migration) {
    bool chosen = false, strict = false;
    for_each_row("_option", [&](const Row &row) {
        bool lasts;
        if (row.number("migration") != migration || !row.says("name", "dual_write")) return;
        const TimestampTz end = DatumGetTimestampTz(row.get("expires_at", &lasts));
        if (lasts || end > GetCurrentTimestamp()) chosen = true, strict = row.says("value", "strict");
    });
    if (!chosen)
        for_each_row("_option_definition", [&](const Row &row) {
            if (row.says("name", "dual_write")) strict = row.says("standard", "strict");
        });
    return strict;
}

// The other mappings of the same migration into dest, and where their views have its key.
void read_shared(Mapping *m) {
    List *views = NIL, *positions = NIL;
    for_each_row("_mapping", [&](const Row &row) {
        const int32 flow = row.number("flow");
        if (flow == m->flow || !is_of(row, flow, false) || row.oid("dest") != m->dest ||
            migration_of(flow) != m->migration || !SearchSysCacheExists1(RELOID, ObjectIdGetDatum(row.oid("view"))))
            return;
        int n;
        const AttrNumber *columns = attnums(row, "columns", &n);
        views = lappend_oid(views, row.oid("view"));
        for (int i = 0; i < m->nkey; i++) positions = lappend_int(positions, position_of(columns, n, m->key[i].dest));
    });
    m->nshared = list_length(views);
    m->shared = (Oid *)palloc(sizeof(Oid) * (m->nshared + 1));
    m->shared_key = (AttrNumber *)palloc(sizeof(AttrNumber) * (list_length(positions) + 1));
    for (int i = 0; i < m->nshared; i++) m->shared[i] = list_nth_oid(views, i);
    for (int i = 0; i < list_length(positions); i++) m->shared_key[i] = (AttrNumber)list_nth_int(positions, i);
}

// The forward view's column that is one of dest's key: one of its own key, or what the reverse mapping reads it from.
AttrNumber find_carried(const KeyColumn &key, const Row &forward) {
    int n;
    const AttrNumber *from = attnums(forward, "key_origin", &n);
    const int k = position_of(from, n, key.dest);
    if (k > 0) return attnums(forward, "key_view", &n)[k - 1];
    const AttrNumber *columns = attnums(forward, "columns", &n);
    const AttrNumber position = position_of(columns, n, key.origin);
    return position > 0 && get_atttype(forward.oid("view"), position) == key.dest_type ? position : 0;
}

// False where it has not all of the key, or is gone.
bool find_carried_key(Mapping *m, const Row &forward) {
    if (!SearchSysCacheExists1(RELOID, ObjectIdGetDatum(forward.oid("view")))) return false;
    for (int i = 0; i < m->nkey; i++) {
        if (m->key[i].origin == 0) continue;
        m->carried_key[i] = find_carried(m->key[i], forward);
        if (m->carried_key[i] == 0) return false;
    }
    return true;
}

// What a reverse mapping owes to the forward one. Rows of dest that its filter leaves out have none in origin, and are
// not to be deleted for that (nor is any, where the filter is gone); rows of origin with other constants in the key
// come from other flows.
void read_way_forth(Mapping *m) {
    m->carried_key = (AttrNumber *)palloc0(sizeof(AttrNumber) * m->nkey);
    for_each_row("_mapping", [&](const Row &row) {
        if (!is_of(row, m->flow, false)) return;
        int n;
        const AttrNumber *to = attnums(row, "key_dest", &n);
        if (row.flag("filtered") && find_carried_key(m, row))
            m->carried = row.oid("view");
        else if (row.flag("filtered"))
            m->carry_delete = false;
        const char **constants = key_constants(row, &n);
        m->fixed = (FixedColumn *)palloc(sizeof(FixedColumn) * n);
        for (int i = 0; i < n; i++)
            if (constants[i]) m->fixed[m->nfixed++] = {to[i], constants[i], 0};
    });
}

// planned: the dual writes are just being turned on.
bool is_before_the_end_of_backfill(const Row &migration) {
    return migration.says("phase", "planned") || migration.says("phase", "dual_writing") ||
           migration.says("phase", "backfilling");
}

void read_migration(Mapping *m) {
    for_each_row("_flow", [&](const Row &row) {
        if (row.number("id") != m->flow) return;
        m->migration = row.number("migration");
        m->carry_delete = !m->reverse || row.says("on_target_delete", "delete");
        m->copied_by_place = !m->reverse && row.flag("by_place");
    });
    for_each_row("_migration", [&](const Row &row) {
        if (row.number("id") != m->migration) return;
        m->migration_name = TextDatumGetCString(row.get("name"));
        m->both_directions = row.flag("both_directions");
        if (!is_before_the_end_of_backfill(row)) m->copied_by_place = false;
    });
    m->on_failure = is_strict(m->migration) ? OnFailure::kRaise : OnFailure::kRecord;
    if (m->reverse)
        read_way_forth(m);
    else
        read_shared(m);
}

}  // namespace

int position_of(const AttrNumber *columns, int n, AttrNumber attnum) {
    for (int i = 0; i < n; i++)
        if (columns[i] == attnum) return i + 1;
    return 0;
}

bool compares_as_column(Relation relation, Relation index, int i) {
    const AttrNumber attnum = index->rd_index->indkey.values[i];
    if (attnum <= 0) return false;
    const Form_pg_attribute att = TupleDescAttr(RelationGetDescr(relation), attnum - 1);
    return index->rd_opfamily[i] == lookup_type_cache(att->atttypid, TYPECACHE_BTREE_OPFAMILY)->btree_opf &&
           index->rd_indcollation[i] == att->attcollation;
}

List *attnums_read(Node *expression) {
    Bitmapset *used = NULL;
    pull_varattnos(expression, 1, &used);
    List *attnums = NIL;
    for (int x = bms_next_member(used, -1); x >= 0; x = bms_next_member(used, x))
        attnums = lappend_int(attnums, x + FirstLowInvalidHeapAttributeNumber);
    return attnums;
}

Datum int2_array(Datum *values, int n) {
    return PointerGetDatum(construct_array(values, n, INT2OID, 2, true, TYPALIGN_SHORT));
}

Datum attnum_array(const List *attnums) {
    Datum *values = (Datum *)palloc(sizeof(Datum) * (list_length(attnums) + 1));
    int n = 0;
    ListCell *cell;
    foreach (cell, attnums) values[n++] = Int16GetDatum(lfirst_int(cell));
    return int2_array(values, n);
}

bool is_dual_write_trigger(const Trigger *t) {
    static const char *const kFunctions[] = {"_dual_write_row", "_dual_write_flush", "_dual_write_truncate"};
    const Oid schema = get_func_namespace(t->tgfoid);
    if (schema != get_namespace_oid("migrate", true)) return false;
    const char *name = get_func_name(t->tgfoid);
    for (const char *function : kFunctions)
        if (name && strcmp(name, function) == 0) return true;
    return false;
}

bool is_key(const Mapping *m, AttrNumber KeyColumn::*column, AttrNumber attnum) {
    for (int i = 0; i < m->nkey; i++)
        if (m->key[i].*column == attnum) return true;
    return false;
}

bool is_going_on(int32 migration) {
    bool going_on = false;
    for_each_row("_migration", [&](const Row &row) {
        bool not_paused, not_failed;
        if (row.number("id") != migration) return;
        (void)row.get("paused_since", &not_paused);
        (void)row.get("failed_since", &not_failed);
        going_on = not_paused && not_failed;
    });
    return going_on;
}

bool read_mapping(Mapping *m) {
    if (!read_row(m)) return false;
    read_migration(m);
    return true;
}

}  // namespace migrate

#include "flow_sql.hpp"
#include "mutant.hpp"

namespace migrate {
namespace {

constexpr const char *kEqual = " OPERATOR(pg_catalog.=) ";

// v."column" of the view
void view_column(Sql &sql, const Mapping *m, const char *alias, AttrNumber position) {
    sql.add(alias).add(".").column(m->view, position);
}

// v.k1 = (d.k1)::origin_type AND …: one row of dest against the view; constants are compared as well.
// `sibling` is the number of another view that feeds dest, or -1 for the mapping's own.
void view_row_is_dest_row(Sql &sql, const Mapping *m, int sibling = -1) {
    for (int i = 0; i < m->nkey; i++) {
        const KeyColumn &key = m->key[i];
        const Oid view = sibling < 0 ? m->view : m->shared[sibling];
        const AttrNumber position = sibling < 0 ? key.view : m->shared_key[sibling * m->nkey + i];
        sql.sep(i == 0, " AND ")
            .add("v.")
            .column(view, position)
            .add(kEqual)
            .add("(d.")
            .column(m->dest, key.dest)
            .add(")");
        if (key.origin != 0 && key.origin_type != key.dest_type) sql.add("::").type(key.origin_type);
    }
}

// (c1, c2, …) of dest
void dest_columns(Sql &sql, const Mapping *m) {
    for (int i = 0; i < m->ncolumns; i++) sql.comma(i == 0).column(m->dest, m->columns[i]);
}

void view_columns(Sql &sql, const Mapping *m, const char *alias) {
    for (int i = 0; i < m->ncolumns; i++) view_column(sql.comma(i == 0), m, alias, i + 1);
}

// Whether equal values of a key's type may differ in what is stored, as the numbers 1.0 and 1.00 do: then the key, too,
// is written to a row that is there. The B-tree tells; of intervals it says so only since PostgreSQL 17, and of
// character(n) without a length it does not know.
bool has_several_forms(Oid type) {
    type = getBaseType(type);
    if (type == INTERVALOID || type == BPCHAROID) return true;
    const TypeCacheEntry *entry = lookup_type_cache(type, TYPECACHE_BTREE_OPFAMILY);
    return !OidIsValid(
        get_opfamily_proc(entry->btree_opf, entry->btree_opintype, entry->btree_opintype, BTEQUALIMAGE_PROC));
}

// Calls each(column, is_first) for the columns that a row found by its key may have otherwise; returns how many there
// are.
template <class Fn>
int for_each_value_column(const Mapping *m, Fn each) {
    int n = 0;
    for (int i = 0; i < m->ncolumns; i++)
        if (!is_key(m, &KeyColumn::dest, m->columns[i]) || has_several_forms(get_atttype(m->dest, m->columns[i])))
            each(i, n++ == 0);
    return n;
}

// k COLLATE … opclass: without them, an index that compares otherwise would be an arbiter too.
void arbiter_column(Sql &sql, const Mapping *m, AttrNumber attnum) {
    Oid type, collation;
    int32 typmod;
    get_atttypetypmodcoll(m->dest, attnum, &type, &typmod, &collation);
    sql.column(m->dest, attnum);
    if (OidIsValid(collation)) sql.add(" COLLATE ").collation(collation);
    sql.add(" ").opclass(GetDefaultOpClass(type, BTREE_AM_OID));
}

// ON CONFLICT (k) DO UPDATE SET c = excluded.c, … WHERE (d.c, …) *<> (excluded.c, …)
// The arbiter is the mapped key only: a conflict on any other unique index is an error, never another row's end.
void on_conflict(Sql &sql, const Mapping *m) {
    sql.add(" ON CONFLICT (");
    for (int i = 0; i < m->nkey; i++) arbiter_column(sql.comma(i == 0), m, m->key[i].dest);
    sql.add(") DO ");
    Sql set, ours, theirs;
    const int n = for_each_value_column(m, [&](int i, bool first) {
        const char *name = quote_identifier(get_attname(m->dest, m->columns[i], false));
        set.comma(first).add(name).add(" = excluded.").add(name);
        ours.comma(first).add("d.").add(name);
        theirs.comma(first).add("excluded.").add(name);
    });
    if (n == 0)
        sql.add("NOTHING");
    else
        sql.add("UPDATE SET ")
            .add(set.c_str())
            .add(" WHERE ROW(")
            .add(ours.c_str())
            .add(")::record OPERATOR(pg_catalog.*<>) ROW(")
            .add(theirs.c_str())
            .add(")::record");
}

// v.k1 = d.k1 AND …: whether the filter of the way forth has let one row of dest through.
void is_carried(Sql &sql, const Mapping *m) {
    bool first = true;
    for (int i = 0; i < m->nkey; i++) {
        if (m->carried_key[i] == 0) continue;
        sql.sep(first, " AND ").add("v.").column(m->carried, m->carried_key[i]);
        sql.add(kEqual).add("d.").column(m->dest, m->key[i].dest);
        first = false;
    }
}

// FROM dest d WHERE <condition> AND NOT EXISTS (SELECT FROM view v WHERE v.k = d.k) [for each view that feeds dest]
// [AND EXISTS (SELECT FROM forward_view v WHERE v.k = d.k)]
void from_missing(Sql &sql, const Mapping *m, const char *condition) {
    sql.add(" FROM ").relation(m->dest).add(" d WHERE ").add(condition);
    for (int i = is_mutant(mutant::event_not_state) ? m->nshared : -1; i < m->nshared; i++) {
        const Oid view = i < 0 ? m->view : m->shared[i];
        view_row_is_dest_row(sql.add(" AND NOT EXISTS (SELECT FROM ").relation(view).add(" v WHERE "), m, i);
        sql.add(")");
    }
    if (OidIsValid(m->carried)) {
        is_carried(sql.add(" AND EXISTS (SELECT FROM ").relation(m->carried).add(" v WHERE "), m);
        sql.add(")");
    }
}

}  // namespace

char *qualified(Oid relid) {
    Sql sql;
    return pstrdup(sql.relation(relid).c_str());
}

void view_key(Sql &sql, const Mapping *m, const char *alias) {
    for (int i = 0; i < m->nparams; i++) view_column(sql.comma(i == 0), m, alias, m->key[m->params[i]].view);
}

void locked_rows(Sql &sql, const Mapping *m, const char *condition, const char *lock) {
    sql.add("locked AS MATERIALIZED (SELECT v.* FROM ")
        .relation(m->view)
        .add(" v WHERE ")
        .add(condition)
        .add(lock)
        .add(")");
}

// INSERT INTO dest AS d (c1, …) OVERRIDING SYSTEM VALUE SELECT v.c1, … FROM <from> v WHERE <condition> [and not yet
// there] ON CONFLICT …
void insert_from(Sql &sql, const Mapping *m, const char *from, const char *condition) {
    dest_columns(sql.add("INSERT INTO ").relation(m->dest).add(" AS d ("), m);
    sql.add(") OVERRIDING SYSTEM VALUE SELECT ");
    if (m->ambiguous) view_key(sql.add("DISTINCT ON ("), m, "v"), sql.add(") ");
    view_columns(sql, m, "v");
    sql.add(" FROM ").add(from).add(" v WHERE ").add(condition);
    if (m->partial) {
        view_row_is_dest_row(sql.add(" AND NOT EXISTS (SELECT FROM ").relation(m->dest).add(" d WHERE "), m);
        sql.add(")");
    }
    on_conflict(sql, m);
}

// UPDATE dest d SET c = v.c, … FROM view v WHERE v.k = ANY($1) AND v.k = d.k AND (d.c, …) *<> (v.c::type, …)
// For a dest with columns that an INSERT from here could not fill. False where there is nothing but the key.
bool update_from(Sql &sql, const Mapping *m, const char *from, const char *condition) {
    Sql set, ours, theirs;
    const int n = for_each_value_column(m, [&](int i, bool first) {
        const AttrNumber column = m->columns[i];
        Oid type, collation;
        int32 typmod;
        get_atttypetypmodcoll(m->dest, column, &type, &typmod, &collation);
        view_column(set.comma(first).column(m->dest, column).add(" = "), m, "v", i + 1);
        ours.comma(first).add("d.").column(m->dest, column);
        view_column(theirs.comma(first).add("("), m, "v", i + 1);
        theirs.add(")::").type(type, typmod);
    });
    if (n == 0) return false;
    sql.add("UPDATE ")
        .relation(m->dest)
        .add(" d SET ")
        .add(set.c_str())
        .add(" FROM ")
        .add(from)
        .add(" v WHERE ")
        .add(condition)
        .add(" AND ");
    view_row_is_dest_row(sql, m);
    sql.add(" AND ROW(")
        .add(ours.c_str())
        .add(")::record OPERATOR(pg_catalog.*<>) ROW(")
        .add(theirs.c_str())
        .add(")::record");
    return true;
}

char *dest_share(const Mapping *m) {
    Sql sql;
    bool first = true;
    for (int i = 0; i < m->nkey; i++) {
        const KeyColumn &key = m->key[i];
        if (key.origin != 0) continue;
        sql.sep(first, " AND ")
            .add("d.")
            .column(m->dest, key.dest)
            .add(kEqual)
            .literal(key.constant)
            .add("::")
            .type(key.dest_type);
        first = false;
    }
    return pstrdup(first ? "true" : sql.c_str());
}

namespace {
bool is_integer(Oid type) {
    return type == INT2OID || type == INT4OID || type == INT8OID;
}

// A key that dest's type does not hold is not in dest, and to look for it is no error: whole numbers of different
// widths compare as they are, by an index too.
bool compares_as_it_is(const KeyColumn &key) {
    return key.origin_type == key.dest_type || (is_integer(key.origin_type) && is_integer(key.dest_type) &&
                                                get_typlen(key.origin_type) > get_typlen(key.dest_type));
}
}  // namespace

char *dest_key_in_params(const Mapping *m, int first) {
    Sql sql, columns, arrays;
    for (int i = 0; i < m->nparams; i++) {
        const KeyColumn &key = m->key[m->params[i]];
        columns.comma(i == 0).add("d.").column(m->dest, key.dest);
        arrays.comma(i == 0).addf("$%d", first + i);
        if (!compares_as_it_is(key)) arrays.add("::").type(key.dest_type).add("[]");
    }
    if (m->nparams == 1)
        sql.add(columns.c_str()).add(kEqual).add("ANY (").add(arrays.c_str()).add(")");
    else
        sql.add("(").add(columns.c_str()).add(") IN (SELECT * FROM unnest(").add(arrays.c_str()).add("))");
    return pstrdup(sql.add(" AND ").add(dest_share(m)).c_str());
}

void move_dest_row(Sql &sql, const Mapping *m) {
    const int to = m->nparams + 1;
    sql.add("UPDATE ").relation(m->dest).add(" d SET ");
    for (int i = 0; i < m->nparams; i++) {
        const KeyColumn &key = m->key[m->params[i]];
        sql.comma(i == 0).column(m->dest, key.dest).addf(" = ($%d)[1]::", to + i).type(key.dest_type);
    }
    sql.add(" WHERE ").add(dest_key_in_params(m)).add(" AND NOT EXISTS (SELECT FROM ").relation(m->dest);
    sql.add(" d WHERE ").add(dest_key_in_params(m, to)).add(") AND (EXISTS (SELECT FROM ").relation(m->view);
    sql.add(" v WHERE ").add(view_key_in_params(m, to)).add(") OR ");
    Sql given, left;
    for (int i = 0; i < m->nparams; i++) {
        given.comma(i == 0).addf("($%d)[1]", to + i);
        left.comma(i == 0).addf("$%d", to + m->nparams + i);
    }
    if (m->nparams == 1)
        sql.add(given.c_str()).add(kEqual).add("ANY (").add(left.c_str()).add("))");
    else
        sql.add("(").add(given.c_str()).add(") IN (SELECT * FROM unnest(").add(left.c_str()).add(")))");
}

bool is_only_key(const Mapping *m) {
    return for_each_value_column(m, [](int, bool) {}) == 0;
}

void hold_dest_rows(Sql &sql, const Mapping *m) {
    sql.add("SELECT FROM ").relation(m->dest).add(" d WHERE ").add(dest_key_in_params(m)).add(" FOR NO KEY UPDATE");
}

char *view_key_in_params(const Mapping *m, int first) {
    Sql sql;
    if (m->nparams == 1) {
        view_key(sql, m, "v");
        return pstrdup(sql.add(kEqual).addf("ANY ($%d)", first).c_str());
    }
    view_key(sql.add("("), m, "v");
    sql.add(") IN (SELECT * FROM unnest(");
    for (int i = 0; i < m->nparams; i++) sql.comma(i == 0).addf("$%d", first + i);
    return pstrdup(sql.add("))").c_str());
}

bool unique_columns_equal(Sql &sql, const Mapping *m, Oid index) {
    HeapTuple tuple = SearchSysCache1(INDEXRELID, ObjectIdGetDatum(index));
    if (!HeapTupleIsValid(tuple)) return false;
    const Form_pg_index form = (Form_pg_index)GETSTRUCT(tuple);
    bool all = true;
    for (int i = 0; all && i < form->indnkeyatts; i++) {
        const AttrNumber attnum = form->indkey.values[i];  // 0: an expression
        // (The index may be a partition's, which may number the columns otherwise.)
        const AttrNumber column = attnum == 0 ? 0 : get_attnum(m->dest, get_attname(form->indrelid, attnum, false));
        const int position = position_of(m->columns, m->ncolumns, column);
        if (!(all = position > 0)) continue;
        view_column(sql.sep(i == 0, " AND ").add("d.").column(m->dest, column).add(kEqual).add("("), m, "v", position);
        sql.add(")::").type(get_atttype(m->dest, column));
        // (A column of an index has the collation that this compares by.)
        Oid type, collation;
        int32 typmod;
        get_atttypetypmodcoll(index, i + 1, &type, &typmod, &collation);
        if (OidIsValid(collation)) sql.add(" COLLATE ").collation(collation);
    }
    ReleaseSysCache(tuple);
    return all;
}

void delete_missing(Sql &sql, const Mapping *m, const char *condition) {
    from_missing(sql.add("DELETE"), m, condition);
}

void select_missing(Sql &sql, const Mapping *m, const char *condition) {
    sql.add("SELECT ");
    for (int i = 0; i < m->nparams; i++) {
        const KeyColumn &key = m->key[m->params[i]];
        sql.comma(i == 0).add("(d.").column(m->dest, key.dest).add(")::").type(key.origin_type);
    }
    from_missing(sql, m, condition);
}

}  // namespace migrate

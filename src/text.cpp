#include "text.hpp"

namespace migrate {

Sql &Sql::addf(const char *format, ...) {
    for (;;) {
        va_list args;
        va_start(args, format);
        const int needed = appendStringInfoVA(&buffer_, format, args);
        va_end(args);
        if (needed == 0) return *this;
        enlargeStringInfo(&buffer_, needed);
    }
}

Sql &Sql::literal(const char *value) {
    return add(quote_literal_cstr(value));
}

Sql &Sql::relation(Oid relid) {
    const char *name = get_rel_name(relid);
    if (name == NULL)
        ereport(ERROR, (errcode(ERRCODE_UNDEFINED_TABLE), errmsg("relation with OID %u does not exist", relid)));
    return add(quote_qualified_identifier(get_namespace_name(get_rel_namespace(relid)), name));
}

Sql &Sql::collation(Oid id) {
    HeapTuple tuple = SearchSysCache1(COLLOID, ObjectIdGetDatum(id));
    if (!HeapTupleIsValid(tuple)) elog(ERROR, "collation with OID %u does not exist", id);
    const Form_pg_collation form = (Form_pg_collation)GETSTRUCT(tuple);
    add(quote_qualified_identifier(get_namespace_name(form->collnamespace), NameStr(form->collname)));
    ReleaseSysCache(tuple);
    return *this;
}

Sql &Sql::opclass(Oid id) {
    HeapTuple tuple = SearchSysCache1(CLAOID, ObjectIdGetDatum(id));
    if (!HeapTupleIsValid(tuple)) elog(ERROR, "operator class with OID %u does not exist", id);
    const Form_pg_opclass form = (Form_pg_opclass)GETSTRUCT(tuple);
    add(quote_qualified_identifier(get_namespace_name(form->opcnamespace), NameStr(form->opcname)));
    ReleaseSysCache(tuple);
    return *this;
}

}  // namespace migrate

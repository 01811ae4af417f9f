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

Sql &Sql::qualified(int cache, Oid id, AttrNumber schema, AttrNumber name) {
    HeapTuple tuple = SearchSysCache1(cache, ObjectIdGetDatum(id));
    if (!HeapTupleIsValid(tuple)) elog(ERROR, "cache %d has no object with OID %u", cache, id);
    bool isnull;
    const Oid schema_oid = DatumGetObjectId(SysCacheGetAttr(cache, tuple, schema, &isnull));
    const Name own = DatumGetName(SysCacheGetAttr(cache, tuple, name, &isnull));
    add(quote_qualified_identifier(get_namespace_name(schema_oid), NameStr(*own)));
    ReleaseSysCache(tuple);
    return *this;
}

Sql &Sql::collation(Oid id) {
    return qualified(COLLOID, id, Anum_pg_collation_collnamespace, Anum_pg_collation_collname);
}

Sql &Sql::opclass(Oid id) {
    return qualified(CLAOID, id, Anum_pg_opclass_opcnamespace, Anum_pg_opclass_opcname);
}

}  // namespace migrate

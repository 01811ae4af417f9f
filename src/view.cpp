// The views that a switch replaces: reading a mapping view back as text, column by column, and finding the name that a
// caller means by an unqualified one. And what is asked of relations so often that a query for it would be slow.
#include "catalog.hpp"
#include "text.hpp"

MIGRATE_FUNCTION(migrate_view_body)
MIGRATE_FUNCTION(migrate_view_name)
MIGRATE_FUNCTION(migrate_relation_name)
MIGRATE_FUNCTION(migrate_table_owner)

namespace migrate {
namespace {

int origin_index(const Query *query) {
    if (list_length(query->jointree->fromlist) != 1 || !IsA(linitial(query->jointree->fromlist), RangeTblRef))
        elog(ERROR, "mapping view does not read one relation");
    return ((RangeTblRef *)linitial(query->jointree->fromlist))->rtindex;
}

Datum text_array(Datum *values, int n) {
    return PointerGetDatum(construct_array(values, n, TEXTOID, -1, false, TYPALIGN_INT));
}

}  // namespace
}  // namespace migrate

using namespace migrate;

// migrate._view_body(view regclass, OUT expressions text[], OUT filter text, OUT yields int2[])
// The expressions of a mapping view over the columns of its one relation, and its WHERE clause, deparsed: what is not
// in pg_catalog is schema-qualified, for that is our search_path. And the columns that the expressions are computed
// from.
Datum migrate_view_body(PG_FUNCTION_ARGS) {
    TupleDesc desc;
    if (get_call_result_type(fcinfo, NULL, &desc) != TYPEFUNC_COMPOSITE) elog(ERROR, "return type must be a row type");
    Relation view = relation_open(PG_GETARG_OID(0), AccessShareLock);
    Query *query = (Query *)copyObjectImpl(get_view_query(view));
    const int index = origin_index(query);
    const Oid origin = ((RangeTblEntry *)list_nth(query->rtable, index - 1))->relid;
    ChangeVarNodes((Node *)query->targetList, index, 1, 0);
    ChangeVarNodes(query->jointree->quals, index, 1, 0);
    List *context = deparse_context_for(get_rel_name(origin), origin);

    Datum *expressions = (Datum *)palloc(sizeof(Datum) * list_length(query->targetList));
    int n = 0;
    ListCell *cell;
    foreach (cell, query->targetList) {
        TargetEntry *entry = (TargetEntry *)lfirst(cell);
        expressions[n++] = CStringGetTextDatum(deparse_expression((Node *)entry->expr, context, false, false));
    }
    Node *filter = query->jointree->quals;
    Datum values[3] = {text_array(expressions, n),
                       filter ? CStringGetTextDatum(deparse_expression(filter, context, false, false)) : (Datum)0,
                       attnum_array(attnums_read((Node *)query->targetList))};
    bool nulls[3] = {false, filter == NULL, false};
    relation_close(view, AccessShareLock);
    PG_RETURN_DATUM(HeapTupleGetDatum(heap_form_tuple(BlessTupleDesc(desc), values, nulls)));
}

// migrate._view_name(caller regrole, name text, search_path text, OUT schema text, OUT name text, OUT existing
// regclass) What `name` means to the caller: a relation that exists, or else where CREATE would put it.
Datum migrate_view_name(PG_FUNCTION_ARGS) {
    TupleDesc desc;
    if (get_call_result_type(fcinfo, NULL, &desc) != TYPEFUNC_COMPOSITE) elog(ERROR, "return type must be a row type");
    RangeVar *name = makeRangeVarFromNameList(textToQualifiedNameList(PG_GETARG_TEXT_PP(1)));
    const char *path = text_to_cstring(PG_GETARG_TEXT_PP(2));
    Oid found = InvalidOid, schema = InvalidOid;
    with_user(PG_GETARG_OID(0), SECURITY_LOCAL_USERID_CHANGE, [&] {
        (void)set_config_option("search_path", path, PGC_USERSET, PGC_S_SESSION, GUC_ACTION_SAVE, true, 0, false);
        found = RangeVarGetRelid(name, NoLock, true);
        schema = OidIsValid(found) ? get_rel_namespace(found) : RangeVarGetCreationNamespace(name);
    });
    if (isAnyTempNamespace(schema))
        ereport(ERROR, (errcode(ERRCODE_WRONG_OBJECT_TYPE), errmsg("view \"%s\" is temporary", name->relname),
                        errhint("Give the name of a permanent view, with its schema.")));
    Datum values[3] = {CStringGetTextDatum(get_namespace_name(schema)), CStringGetTextDatum(name->relname),
                       ObjectIdGetDatum(found)};
    bool nulls[3] = {false, false, !OidIsValid(found)};
    PG_RETURN_DATUM(HeapTupleGetDatum(heap_form_tuple(BlessTupleDesc(desc), values, nulls)));
}

// migrate._relation_name(relation regclass) RETURNS text: schema.name, quoted; NULL where there is none.
Datum migrate_relation_name(PG_FUNCTION_ARGS) {
    const char *name = get_rel_name(PG_GETARG_OID(0));
    if (name == NULL) PG_RETURN_NULL();
    const char *schema = get_namespace_name(get_rel_namespace(PG_GETARG_OID(0)));
    PG_RETURN_DATUM(CStringGetTextDatum(quote_qualified_identifier(schema, name)));
}

// migrate._table_owner(relation regclass) RETURNS regrole: NULL where there is none.
Datum migrate_table_owner(PG_FUNCTION_ARGS) {
    if (!SearchSysCacheExists1(RELOID, PG_GETARG_DATUM(0))) PG_RETURN_NULL();
    PG_RETURN_OID(owner_of(PG_GETARG_OID(0)));
}

// From the text of a mapping to its view, and from that of a predicate to its expression. The text is parsed, never
// pasted: what is kept is what PostgreSQL makes of the parse tree.
#include "mapping_report.hpp"
#include "catalog.hpp"
#include "spi.hpp"
#include "text.hpp"

MIGRATE_FUNCTION(migrate_create_mapping_view)
MIGRATE_FUNCTION(migrate_parse_predicate)

namespace migrate {
namespace {

struct Request {
    const char *what;  // as messages call it
    const char *view_name;
    Oid origin;
    Oid dest;  // invalid for a predicate, which is over origin alone
    const char *mapping;
    const char *filter;  // NULL: all rows
    Oid caller;
    const char *parsing;  // the SQL whose parse tree an error's position points into; NULL: none that could be shown
};

// Errors of the parser point into the user's text, not into the verb's own SQL.
void explain_where(void *arg) {
    const Request *request = (const Request *)arg;
    const int position = geterrposition();
    if (position > 0) {
        errposition(0);
        if (request->parsing) {
            internalerrposition(position);
            internalerrquery(request->parsing);
        }
    }
    if (OidIsValid(request->dest))
        errcontext("mapping from \"%s\" to \"%s\"", get_rel_name(request->origin), get_rel_name(request->dest));
    else
        errcontext("predicate over \"%s\"", get_rel_name(request->origin));
}

[[noreturn]] void refuse_shape(const Request *request, const char *what, const char *text) {
    ereport(
        ERROR,
        (errcode(ERRCODE_INVALID_PARAMETER_VALUE), errmsg("%s", what), errdetail("It is: %s", text),
         OidIsValid(request->dest)
             ? errhint("Give expressions over the columns of one row, as in: id AS user_id, coalesce(bio, '') AS bio")
             : errhint("Give one condition over the view's columns, as in: tenant_id IN (1, 2)")));
    pg_unreachable();
}

// Parses `text` as the select list of a SELECT that has nothing else.
List *parse_select_list(Request *request, const char *text, const char *complaint) {
    request->parsing = psprintf("SELECT %s", text);
    List *statements = parse_sql(request->parsing);
    if (list_length(statements) != 1) refuse_shape(request, complaint, text);
    Node *node = ((RawStmt *)linitial(statements))->stmt;
    if (!IsA(node, SelectStmt)) refuse_shape(request, complaint, text);
    SelectStmt *select = (SelectStmt *)node;
    if (select->targetList == NIL || select->fromClause || select->whereClause || select->groupClause ||
        select->havingClause || select->windowClause || select->valuesLists || select->sortClause ||
        select->limitOffset || select->limitCount || select->lockingClause || select->withClause ||
        select->distinctClause || select->intoClause || select->op != SETOP_NONE)
        refuse_shape(request, complaint, text);
    return select->targetList;
}

Node *parse_condition(Request *request, const char *text, const char *complaint) {
    List *list = parse_select_list(request, text, complaint);
    ResTarget *target = (ResTarget *)linitial(list);
    if (list_length(list) != 1 || target->name != NULL) refuse_shape(request, complaint, text);
    return target->val;
}

void require_plain_query(const Query *query, const char *of) {
    const char *what = query->hasSubLinks      ? "a subquery"
                       : query->hasAggs        ? "an aggregate"
                       : query->hasWindowFuncs ? "a window function"
                       : query->hasTargetSRFs  ? "a set-returning function"
                                               : NULL;
    if (what == NULL) return;
    ereport(ERROR,
            (errcode(ERRCODE_FEATURE_NOT_SUPPORTED), errmsg("%s contains %s", of, what),
             errhint("A target row is computed from one source row. Join or aggregate in a view of the application, or "
                     "keep the value in a column.")));
}

// Whether reading a literal of the type may run a domain's check: the parser reads literals at once. (A base type's
// input function is C, which only a superuser can have made.)
bool literal_runs_user_code(Oid type) {
    const Oid element = get_element_type(type);
    if (OidIsValid(element)) return literal_runs_user_code(element);
    const char kind = get_typtype(type);
    return kind == TYPTYPE_COMPOSITE || kind == TYPTYPE_DOMAIN ||
           (type >= FirstNormalObjectId && type_is_range(type)) || (type >= FirstNormalObjectId && is_multirange(type));
}

bool find_unsafe_literal(Node *node, Oid *type) {
    if (node == NULL) return false;
    if (IsA(node, Const)) {
        *type = ((Const *)node)->consttype;
        return literal_runs_user_code(*type);
    }
    return walk_expression(node, find_unsafe_literal, type);
}

// The caller's statement, analyzed as the caller: PostgreSQL reads literals at once, and a domain's check must not run
// as the extension's owner, a superuser. What would read it again from a text of the view later is refused.
Query *analyze_as_caller(const Request &request, SelectStmt *select, const char *sql) {
    RawStmt *statement = makeNode(RawStmt);
    statement->stmt = (Node *)select;
    const char *path = pstrdup(namespace_search_path);
    Query *query = with_user(request.caller, SECURITY_RESTRICTED_OPERATION, [&] {
        (void)set_config_option("search_path", path, PGC_USERSET, PGC_S_SESSION, GUC_ACTION_SAVE, true, 0, false);
        return analyze_sql(statement, sql);
    });
    require_plain_query(query, request.what);
    Oid type = InvalidOid;
    if (find_unsafe_literal((Node *)query->targetList, &type) || find_unsafe_literal(query->jointree->quals, &type))
        ereport(ERROR, (errcode(ERRCODE_FEATURE_NOT_SUPPORTED),
                        errmsg("%s contains a literal of type %s", request.what, format_type_be(type)),
                        errdetail("Reading it may run the check of a domain, at a time when it must not."),
                        errhint("Build the value from literals of the types of PostgreSQL, as in ROW('a', 1)::%s.",
                                format_type_be(type))));
    return query;
}

// schema.name, quoted
const char *collation_name(Oid collation) {
    HeapTuple tuple = SearchSysCache1(COLLOID, ObjectIdGetDatum(collation));
    if (!HeapTupleIsValid(tuple)) elog(ERROR, "cache lookup failed for collation %u", collation);
    const Form_pg_collation row = (Form_pg_collation)GETSTRUCT(tuple);
    const char *name = quote_qualified_identifier(get_namespace_name(row->collnamespace), NameStr(row->collname));
    ReleaseSysCache(tuple);
    return name;
}

// SELECT NULL::type COLLATE … AS name, …: the columns of a query, and nothing that a user has written.
char *columns_of(const Query *query) {
    Sql sql;
    ListCell *cell;
    foreach (cell, query->targetList) {
        const TargetEntry *entry = (const TargetEntry *)lfirst(cell);
        Node *expr = (Node *)entry->expr;
        const Oid collation = exprCollation(expr);
        sql.comma(cell == list_head(query->targetList))
            .add("NULL::")
            .add(format_type_extended(exprType(expr), exprTypmod(expr),
                                      FORMAT_TYPE_TYPEMOD_GIVEN | FORMAT_TYPE_FORCE_QUALIFY));
        if (OidIsValid(collation)) sql.add(" COLLATE ").add(collation_name(collation));
        sql.add(" AS ").ident(entry->resname);
    }
    return psprintf("SELECT %s", sql.c_str());
}

// CREATE VIEW migrate.<view_name> AS SELECT <mapping> FROM <origin> WHERE <filter>
// The view is made with the right columns first, and then given the query that was analyzed as the caller. To analyze
// the caller's text once more, as the extension's owner, would let names mean something else, and run it as a
// superuser.
Oid create_view(Request *request) {
    SelectStmt *select = makeNode(SelectStmt);
    select->targetList = parse_select_list(request, request->mapping, "mapping is not a select list");
    select->fromClause = list_make1(
        makeRangeVar(get_namespace_name(get_rel_namespace(request->origin)), get_rel_name(request->origin), -1));
    if (request->filter)
        select->whereClause = parse_condition(request, request->filter, "filter is not a single condition");
    const char *sql = psprintf("SELECT %s", request->mapping);
    request->parsing = request->filter ? NULL : sql;
    Query *query = analyze_as_caller(*request, select, sql);

    ViewStmt *view = makeNode(ViewStmt);
    view->view = makeRangeVar(pstrdup("migrate"), pstrdup(request->view_name), -1);
    view->withCheckOption = NO_CHECK_OPTION;
    const char *columns = columns_of(query);
    view->query = ((RawStmt *)linitial(parse_sql(columns)))->stmt;
    const ObjectAddress made = DefineView(view, columns, 0, 0);
    CommandCounterIncrement();
    StoreViewQuery(made.objectId, query, true);
    // Not a member of the extension, for pg_dump leaves members out; but DROP EXTENSION takes it along.
    ObjectAddress extension;
    ObjectAddressSet(extension, ExtensionRelationId, get_extension_oid("migrate_ext", false));
    recordDependencyOn(&made, &extension, DEPENDENCY_AUTO_EXTENSION);
    CommandCounterIncrement();
    return made.objectId;
}

// The condition of SELECT FROM <view> WHERE <predicate>. Whoever reads the view evaluates it, so it runs nobody's code.
Node *analyze_predicate(Request *request, const char *text) {
    SelectStmt *select = makeNode(SelectStmt);
    select->whereClause = parse_condition(request, text, "predicate is not a single condition");
    select->fromClause = list_make1(
        makeRangeVar(get_namespace_name(get_rel_namespace(request->origin)), get_rel_name(request->origin), -1));
    Query *query = analyze_as_caller(*request, select, request->parsing);
    if (((RangeTblEntry *)linitial(query->rtable))->relid != request->origin)
        ereport(ERROR, (errcode(ERRCODE_OBJECT_IN_USE),
                        errmsg("relation \"%s\" was renamed meanwhile", get_rel_name(request->origin))));
    Node *condition = query->jointree->quals;
    if (runs_user_code(condition, NULL))
        ereport(ERROR,
                (errcode(ERRCODE_FEATURE_NOT_SUPPORTED), errmsg("predicate calls a function that is not PostgreSQL's"),
                 errdetail("It is: %s", text),
                 errhint("It is evaluated by all who read the view. Write it with functions, operators and types of "
                         "PostgreSQL itself.")));
    require_immutable(condition, request->origin, "predicate", false);
    return condition;
}

// Attribute numbers of origin that the condition reads, as int2[].
Datum columns_read(Node *condition, const char *text) {
    const List *attnums = attnums_read(condition);
    if (attnums == NIL || linitial_int(attnums) <= 0)
        ereport(ERROR, (errcode(ERRCODE_INVALID_PARAMETER_VALUE), errmsg("predicate must read columns by their names"),
                        errdetail("It is: %s", text), errhint("To route all reads: percent => 100.")));
    return attnum_array(attnums);
}

}  // namespace
}  // namespace migrate

using namespace migrate;

// migrate._create_mapping_view(view_name text, origin regclass, dest regclass, mapping text, filter text, search_path
// text,
//     OUT view regclass, OUT columns int2[], OUT bare int2[], OUT inverse int2[], OUT constants text[], OUT reads
//     int2[])
// Names are resolved by `search_path`; the view belongs to the current user.
Datum migrate_create_mapping_view(PG_FUNCTION_ARGS) {
    Request request = {"mapping",
                       text_to_cstring(PG_GETARG_TEXT_PP(0)),
                       PG_GETARG_OID(1),
                       PG_GETARG_OID(2),
                       text_to_cstring(PG_GETARG_TEXT_PP(3)),
                       PG_ARGISNULL(4) ? NULL : text_to_cstring(PG_GETARG_TEXT_PP(4)),
                       PG_GETARG_OID(6),
                       NULL};
    TupleDesc desc;
    if (get_call_result_type(fcinfo, NULL, &desc) != TYPEFUNC_COMPOSITE) elog(ERROR, "return type must be a row type");

    ErrorContextCallback context = {error_context_stack, explain_where, &request};
    error_context_stack = &context;
    const int level = NewGUCNestLevel();
    (void)set_config_option("search_path", text_to_cstring(PG_GETARG_TEXT_PP(5)), PGC_USERSET, PGC_S_SESSION,
                            GUC_ACTION_SAVE, true, 0, false);
    const Oid view = create_view(&request);
    AtEOXact_GUC(false, level);
    const int output = NewGUCNestLevel();
    pin_output_settings();  // a constant's text is read under other settings than the caller's
    HeapTuple tuple = describe_mapping(view, request.origin, request.dest, BlessTupleDesc(desc));
    AtEOXact_GUC(false, output);
    error_context_stack = context.previous;
    PG_RETURN_DATUM(HeapTupleGetDatum(tuple));
}

// migrate._parse_predicate(view regclass, predicate text, search_path text, caller regrole, OUT expression text,
//     OUT columns int2[])
Datum migrate_parse_predicate(PG_FUNCTION_ARGS) {
    const Oid view = PG_GETARG_OID(0);
    const char *predicate = text_to_cstring(PG_GETARG_TEXT_PP(1));
    Request request = {"predicate", NULL, view, InvalidOid, NULL, NULL, PG_GETARG_OID(3), NULL};
    TupleDesc desc;
    if (get_call_result_type(fcinfo, NULL, &desc) != TYPEFUNC_COMPOSITE) elog(ERROR, "return type must be a row type");

    ErrorContextCallback context = {error_context_stack, explain_where, &request};
    error_context_stack = &context;
    const int level = NewGUCNestLevel();
    (void)set_config_option("search_path", text_to_cstring(PG_GETARG_TEXT_PP(2)), PGC_USERSET, PGC_S_SESSION,
                            GUC_ACTION_SAVE, true, 0, false);
    Node *condition = analyze_predicate(&request, predicate);
    AtEOXact_GUC(false, level);
    error_context_stack = context.previous;
    List *names = deparse_context_for(get_rel_name(view), view);
    Datum values[2] = {CStringGetTextDatum(deparse_expression(condition, names, false, false)),
                       columns_read(condition, predicate)};
    bool nulls[2] = {};
    PG_RETURN_DATUM(HeapTupleGetDatum(heap_form_tuple(BlessTupleDesc(desc), values, nulls)));
}

// From the text of a mapping to its view. The text is parsed, never pasted: what is kept is the view that PostgreSQL
// makes of the parse tree, and what is reported is read off that view's query.
#include "spi.hpp"
#include "text.hpp"

MIGRATE_FUNCTION(migrate_create_mapping_view)

namespace migrate {
namespace {

struct Request {
    const char *view_name;
    Oid origin;
    Oid dest;
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
    errcontext("mapping from \"%s\" to \"%s\"", get_rel_name(request->origin), get_rel_name(request->dest));
}

[[noreturn]] void refuse_shape(const char *what, const char *text) {
    ereport(ERROR,
            (errcode(ERRCODE_INVALID_PARAMETER_VALUE), errmsg("%s", what), errdetail("It is: %s", text),
             errhint("Give expressions over the columns of one row, as in: id AS user_id, coalesce(bio, '') AS bio")));
    pg_unreachable();
}

// Parses `text` as the select list of a SELECT that has nothing else.
List *parse_select_list(Request *request, const char *text, const char *complaint) {
    request->parsing = psprintf("SELECT %s", text);
    List *statements = parse_sql(request->parsing);
    if (list_length(statements) != 1) refuse_shape(complaint, text);
    Node *node = ((RawStmt *)linitial(statements))->stmt;
    if (!IsA(node, SelectStmt)) refuse_shape(complaint, text);
    SelectStmt *select = (SelectStmt *)node;
    if (select->targetList == NIL || select->fromClause || select->whereClause || select->groupClause ||
        select->havingClause || select->windowClause || select->valuesLists || select->sortClause ||
        select->limitOffset || select->limitCount || select->lockingClause || select->withClause ||
        select->distinctClause || select->intoClause || select->op != SETOP_NONE)
        refuse_shape(complaint, text);
    return select->targetList;
}

Node *parse_filter(Request *request, const char *text) {
    List *list = parse_select_list(request, text, "filter is not a single condition");
    ResTarget *target = (ResTarget *)linitial(list);
    if (list_length(list) != 1 || target->name != NULL) refuse_shape("filter is not a single condition", text);
    return target->val;
}

Oid owner_of(Oid relation) {
    HeapTuple tuple = SearchSysCache1(RELOID, ObjectIdGetDatum(relation));
    if (!HeapTupleIsValid(tuple)) elog(ERROR, "cache lookup failed for relation %u", relation);
    const Oid owner = ((Form_pg_class)GETSTRUCT(tuple))->relowner;
    ReleaseSysCache(tuple);
    return owner;
}

void require_plain_query(const Query *query) {
    const char *what = query->hasSubLinks      ? "a subquery"
                       : query->hasAggs        ? "an aggregate"
                       : query->hasWindowFuncs ? "a window function"
                       : query->hasTargetSRFs  ? "a set-returning function"
                                               : NULL;
    if (what == NULL) return;
    ereport(ERROR,
            (errcode(ERRCODE_FEATURE_NOT_SUPPORTED), errmsg("mapping contains %s", what),
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
    require_plain_query(query);
    Oid type = InvalidOid;
    if (find_unsafe_literal((Node *)query->targetList, &type) || find_unsafe_literal(query->jointree->quals, &type))
        ereport(ERROR, (errcode(ERRCODE_FEATURE_NOT_SUPPORTED),
                        errmsg("mapping contains a literal of type %s", format_type_be(type)),
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
    if (request->filter) select->whereClause = parse_filter(request, request->filter);
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

bool forbidden_function(Oid function, void *dest_owner) {
    return !may_execute(function, *(Oid *)dest_owner);
}

bool find_forbidden_function(Node *node, Oid *dest_owner) {
    if (node == NULL) return false;
    if (check_functions_in_node(node, forbidden_function, dest_owner)) return true;
    return walk_expression(node, find_forbidden_function, dest_owner);
}

// Dual writes and the backfill evaluate the expression at different times, as dest's owner.
void require_pure(Node *expr, Oid origin, Oid dest, const char *what) {
    List *context = deparse_context_for(get_rel_name(origin), origin);
    if (contain_mutable_functions(expr))
        ereport(ERROR, (errcode(ERRCODE_INVALID_OBJECT_DEFINITION), errmsg("%s is not immutable", what),
                        errdetail("It is: %s", deparse_expression(expr, context, false, false)),
                        errhint("Its value must depend on the row alone, not on the time, the session or a setting. "
                                "For example, write "
                                "created_at AT TIME ZONE 'UTC' instead of created_at::timestamp.")));
    Oid owner = owner_of(dest);
    if (find_forbidden_function(expr, &owner))
        ereport(ERROR,
                (errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
                 errmsg("%s calls a function that role \"%s\" may not execute", what, GetUserNameFromId(owner, false)),
                 errdetail("It is: %s", deparse_expression(expr, context, false, false)),
                 errhint("Dual writes run as the owner of \"%s\": GRANT EXECUTE ON FUNCTION … TO %s;",
                         get_rel_name(dest), quote_identifier(GetUserNameFromId(owner, false)))));
}

// The origin column whose value a target value, as it is, maps back to; 0 where there is none.
AttrNumber invertible_column(Node *expr, bool dest_not_null) {
    if (IsA(expr, RelabelType)) return invertible_column((Node *)((RelabelType *)expr)->arg, dest_not_null);
    if (IsA(expr, Var)) return Max(((Var *)expr)->varattno, 0);
    if (IsA(expr, CoalesceExpr) && dest_not_null) {  // the default stands for NULL, every other value for itself
        List *args = ((CoalesceExpr *)expr)->args;
        if (list_length(args) == 2 && IsA(lsecond(args), Const))
            return invertible_column((Node *)linitial(args), false);
    }
    if (IsA(expr, FuncExpr)) {  // widening of integers
        FuncExpr *call = (FuncExpr *)expr;
        const bool cast = call->funcformat == COERCE_EXPLICIT_CAST || call->funcformat == COERCE_IMPLICIT_CAST;
        if (cast && list_length(call->args) == 1) {
            const Oid from = exprType((Node *)linitial(call->args)), to = call->funcresulttype;
            const bool widens = (from == INT2OID && (to == INT4OID || to == INT8OID || to == NUMERICOID)) ||
                                (from == INT4OID && (to == INT8OID || to == NUMERICOID)) ||
                                (from == INT8OID && to == NUMERICOID);
            if (widens) return invertible_column((Node *)linitial(call->args), dest_not_null);
        }
    }
    return 0;
}

bool is_users_function(Oid function, void *) {
    return function >= FirstNormalObjectId;
}

// Whether evaluating the expression would run code that a user has written.
bool runs_user_code(Node *node, void *context) {
    if (node == NULL) return false;
    if (IsA(node, CoerceToDomain) || check_functions_in_node(node, is_users_function, context)) return true;
    return walk_expression(node, runs_user_code, context);
}

// The text of a constant in dest's type, or NULL where the expression is no constant. We are the extension's owner
// here: what would run a user's code is not looked into.
Datum constant_text(Node *coerced, bool *isnull) {
    *isnull = true;
    if (runs_user_code(coerced, NULL)) return (Datum)0;
    Node *folded = eval_const_expressions(NULL, coerced);
    *isnull = !IsA(folded, Const) || ((Const *)folded)->constisnull;
    if (*isnull) return (Datum)0;
    const Const *value = (Const *)folded;
    Oid out;
    bool varlena;
    getTypeOutputInfo(value->consttype, &out, &varlena);
    return CStringGetTextDatum(OidOutputFunctionCall(out, value->constvalue));
}

// One int2 (or text) for each column of the view.
struct Report {
    int n;
    Datum *columns, *bare, *inverse, *constants;
    bool *constant_null;
};

Form_pg_attribute dest_column(Relation dest, const char *name) {
    for (int i = 0; i < RelationGetDescr(dest)->natts; i++) {
        Form_pg_attribute att = TupleDescAttr(RelationGetDescr(dest), i);
        if (!att->attisdropped && strcmp(NameStr(att->attname), name) == 0) return att;
    }
    Sql names;
    for (int i = 0, first = 1; i < RelationGetDescr(dest)->natts; i++) {
        Form_pg_attribute att = TupleDescAttr(RelationGetDescr(dest), i);
        if (!att->attisdropped) names.comma(first).ident(NameStr(att->attname)), first = 0;
    }
    ereport(ERROR, (errcode(ERRCODE_UNDEFINED_COLUMN),
                    errmsg("column \"%s\" of relation \"%s\" does not exist", name, RelationGetRelationName(dest)),
                    errdetail("Its columns are: %s.", names.c_str()),
                    errhint("Name the target column with AS, as in: name AS display_name")));
    return NULL;
}

Node *coerce_for_assignment(Node *expr, Form_pg_attribute att, Relation dest) {
    Node *coerced = coerce_to_target_type(NULL, expr, exprType(expr), att->atttypid, att->atttypmod,
                                          COERCION_ASSIGNMENT, COERCE_IMPLICIT_CAST, -1);
    if (coerced == NULL)
        ereport(ERROR,
                (errcode(ERRCODE_DATATYPE_MISMATCH),
                 errmsg("column \"%s\" of \"%s\" is of type %s but the mapping gives %s", NameStr(att->attname),
                        RelationGetRelationName(dest), format_type_be(att->atttypid), format_type_be(exprType(expr))),
                 errhint("Cast the expression: (…)::%s AS %s", format_type_be(att->atttypid),
                         quote_identifier(NameStr(att->attname)))));
    return coerced;
}

void inspect_column(TargetEntry *entry, Relation dest, Oid origin, int i, Report *report) {
    Form_pg_attribute att = dest_column(dest, entry->resname);
    const char *what = psprintf("mapping of column \"%s\"", entry->resname);
    if (att->attgenerated)
        ereport(ERROR,
                (errcode(ERRCODE_GENERATED_ALWAYS),
                 errmsg("column \"%s\" of \"%s\" is a generated column", entry->resname, RelationGetRelationName(dest)),
                 errhint("Leave it out of the mapping: PostgreSQL computes it.")));
    Node *expr = (Node *)entry->expr;
    Node *coerced = coerce_for_assignment(expr, att, dest);
    require_pure(coerced, origin, RelationGetRelid(dest), what);
    report->columns[i] = Int16GetDatum(att->attnum);
    report->bare[i] = Int16GetDatum(IsA(expr, Var) && ((Var *)expr)->varattno > 0 ? ((Var *)expr)->varattno : 0);
    report->inverse[i] = Int16GetDatum(invertible_column(expr, att->attnotnull));
    report->constants[i] = constant_text(coerced, &report->constant_null[i]);
}

Datum int2_array(Datum *values, int n) {
    return PointerGetDatum(construct_array(values, n, INT2OID, 2, true, TYPALIGN_SHORT));
}

// Attribute numbers of origin that the query reads: {0} stands for a whole-row reference.
Datum columns_read(Query *query) {
    Bitmapset *used = NULL;
    pull_varattnos((Node *)query->targetList, 1, &used);
    pull_varattnos((Node *)query->jointree->quals, 1, &used);
    Datum *values = (Datum *)palloc(sizeof(Datum) * (bms_num_members(used) + 1));
    int n = 0;
    for (int x = bms_next_member(used, -1); x >= 0; x = bms_next_member(used, x)) {
        const AttrNumber attnum = x + FirstLowInvalidHeapAttributeNumber;
        if (attnum < 0)
            ereport(ERROR,
                    (errcode(ERRCODE_FEATURE_NOT_SUPPORTED),
                     errmsg("mapping reads the system column with number %d", attnum),
                     errhint("System columns (ctid, xmin, tableoid, …) change without a write that a trigger sees.")));
        values[n++] = Int16GetDatum(attnum);
    }
    return int2_array(values, n);
}

// The origin was looked up again by name when the view was made: it must still be the same.
bool reads_only(const Query *query, Oid origin) {
    ListCell *cell;
    foreach (cell, query->rtable) {
        const RangeTblEntry *entry = (const RangeTblEntry *)lfirst(cell);
        if (entry->rtekind == RTE_RELATION && entry->inFromCl && entry->relid != origin) return false;
    }
    return true;
}

HeapTuple describe_view(Oid view_oid, const Request &request, TupleDesc desc) {
    Relation view = relation_open(view_oid, AccessShareLock);
    Relation dest = relation_open(request.dest, AccessShareLock);
    Query *query = (Query *)copyObjectImpl(get_view_query(view));
    // Until PostgreSQL 16 a view's query lists OLD and NEW first.
    const int origin_index = ((RangeTblRef *)linitial(query->jointree->fromlist))->rtindex;
    ChangeVarNodes((Node *)query->targetList, origin_index, 1, 0);
    ChangeVarNodes(query->jointree->quals, origin_index, 1, 0);
    if (list_length(query->rtable) == 0 || !reads_only(query, request.origin))
        ereport(ERROR, (errcode(ERRCODE_OBJECT_IN_USE),
                        errmsg("relation \"%s\" was renamed meanwhile", get_rel_name(request.origin))));
    if (query->jointree->quals) require_pure(query->jointree->quals, request.origin, request.dest, "filter");

    Report report;
    report.n = list_length(query->targetList);
    Datum **parts[] = {&report.columns, &report.bare, &report.inverse, &report.constants};
    for (Datum **part : parts) *part = (Datum *)palloc(sizeof(Datum) * report.n);
    report.constant_null = (bool *)palloc(sizeof(bool) * report.n);
    for (int i = 0; i < report.n; i++)
        inspect_column((TargetEntry *)list_nth(query->targetList, i), dest, request.origin, i, &report);

    int dims[1] = {report.n}, lower[1] = {1};
    Datum values[6] = {ObjectIdGetDatum(view_oid),
                       int2_array(report.columns, report.n),
                       int2_array(report.bare, report.n),
                       int2_array(report.inverse, report.n),
                       PointerGetDatum(construct_md_array(report.constants, report.constant_null, 1, dims, lower,
                                                          TEXTOID, -1, false, TYPALIGN_INT)),
                       columns_read(query)};
    bool nulls[6] = {};
    relation_close(dest, AccessShareLock);
    relation_close(view, AccessShareLock);
    return heap_form_tuple(desc, values, nulls);
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
    Request request = {text_to_cstring(PG_GETARG_TEXT_PP(0)),
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
    HeapTuple tuple = describe_view(view, request, BlessTupleDesc(desc));
    error_context_stack = context.previous;
    PG_RETURN_DATUM(HeapTupleGetDatum(tuple));
}

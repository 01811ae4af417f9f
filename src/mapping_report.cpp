#include "mapping_report.hpp"
#include "catalog.hpp"
#include "text.hpp"

namespace migrate {
namespace {

bool is_users_function(Oid function, void *) {
    return function >= FirstNormalObjectId;
}

bool forbidden_function(Oid function, void *dest_owner) {
    return !may_execute(function, *(Oid *)dest_owner);
}

bool find_forbidden_function(Node *node, Oid *dest_owner) {
    if (node == NULL) return false;
    if (check_functions_in_node(node, forbidden_function, dest_owner)) return true;
    return walk_expression(node, find_forbidden_function, dest_owner);
}

// For messages: the context alone takes a time that grows with the square of origin's columns.
const char *as_text(Node *expr, Oid origin) {
    return deparse_expression(expr, deparse_context_for(get_rel_name(origin), origin), false, false);
}

}  // namespace

bool runs_user_code(Node *node, void *context) {
    if (node == NULL) return false;
    if (IsA(node, CoerceToDomain) || check_functions_in_node(node, is_users_function, context)) return true;
    return walk_expression(node, runs_user_code, context);
}

void require_immutable(Node *expr, Oid origin, const char *what, bool may_call_users) {
    if (!contain_mutable_functions(expr)) return;
    ereport(ERROR, (errcode(ERRCODE_INVALID_OBJECT_DEFINITION), errmsg("%s is not immutable", what),
                    errdetail("It is: %s", as_text(expr, origin)),
                    errhint("Its value must depend on the row alone, not on the time, the session or a setting. "
                            "For example, write "
                            "created_at AT TIME ZONE 'UTC' instead of created_at::timestamp.%s",
                            may_call_users ? " What PostgreSQL takes to depend on more, such as the text of an enum or "
                                             "a date, a function of your own can give that is declared IMMUTABLE."
                                           : "")));
}

namespace {

// Dual writes and the backfill evaluate the expression at different times, as dest's owner.
void require_pure(Node *expr, Oid origin, Oid dest, const char *what) {
    require_immutable(expr, origin, what, true);
    Oid owner = owner_of(dest);
    if (find_forbidden_function(expr, &owner))
        ereport(ERROR,
                (errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
                 errmsg("%s calls a function that role \"%s\" may not execute", what, GetUserNameFromId(owner, false)),
                 errdetail("It is: %s", as_text(expr, origin)),
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

// Attribute numbers of origin that the query reads: {0} alone where it has a whole-row reference, whatever else it
// reads.
Datum columns_read(Query *query) {
    List *attnums = attnums_read((Node *)list_make2(query->targetList, query->jointree->quals));
    if (attnums != NIL && linitial_int(attnums) < 0)
        ereport(ERROR,
                (errcode(ERRCODE_FEATURE_NOT_SUPPORTED),
                 errmsg("mapping reads the system column \"%s\"",
                        NameStr(SystemAttributeDefinition((AttrNumber)linitial_int(attnums))->attname)),
                 errhint("System columns (ctid, xmin, tableoid, …) change without a write that a trigger sees.")));
    return attnum_array(list_member_int(attnums, 0) ? list_make1_int(0) : attnums);
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

}  // namespace

HeapTuple describe_mapping(Oid view_oid, Oid origin, Oid dest_oid, TupleDesc desc) {
    Relation view = relation_open(view_oid, AccessShareLock);
    Relation dest = relation_open(dest_oid, AccessShareLock);
    Query *query = (Query *)copyObjectImpl(get_view_query(view));
    // Until PostgreSQL 16 a view's query lists OLD and NEW first.
    const int origin_index = ((RangeTblRef *)linitial(query->jointree->fromlist))->rtindex;
    ChangeVarNodes((Node *)query->targetList, origin_index, 1, 0);
    ChangeVarNodes(query->jointree->quals, origin_index, 1, 0);
    if (list_length(query->rtable) == 0 || !reads_only(query, origin))
        ereport(ERROR, (errcode(ERRCODE_OBJECT_IN_USE),
                        errmsg("relation \"%s\" was renamed meanwhile", get_rel_name(origin))));
    if (query->jointree->quals) require_pure(query->jointree->quals, origin, dest_oid, "filter");

    Report report;
    report.n = list_length(query->targetList);
    Datum **parts[] = {&report.columns, &report.bare, &report.inverse, &report.constants};
    for (Datum **part : parts) *part = (Datum *)palloc(sizeof(Datum) * report.n);
    report.constant_null = (bool *)palloc(sizeof(bool) * report.n);
    for (int i = 0; i < report.n; i++)
        inspect_column((TargetEntry *)list_nth(query->targetList, i), dest, origin, i, &report);

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

}  // namespace migrate

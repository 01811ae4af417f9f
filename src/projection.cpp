#include "projection.hpp"

namespace migrate {
namespace {

struct Builder {
    const Mapping *mapping;
    Relation origin;
    Relation dest;
    Projection *projection;
    const char *why_not;
    bool planned;  // false: only to learn whether it can be done
};

bool is_function(Oid, void *) {
    return true;
}

// A domain's checks may call functions, whatever else the expression does.
bool find_function(Node *node, void *) {
    if (node == NULL) return false;
    if (IsA(node, CoerceToDomain) || check_functions_in_node(node, is_function, NULL)) return true;
    return walk_expression(node, find_function, (void *)NULL);
}

// System columns and whole rows are not what a slot of origin is kept for; a virtual column is stored nowhere.
bool find_unreadable(Node *node, Builder *b) {
    if (node == NULL) return false;
    if (!IsA(node, Var)) return walk_expression(node, find_unreadable, b);
    const AttrNumber attnum = ((Var *)node)->varattno;
    if (attnum <= 0) return true;
    b->projection->last_read = Max(b->projection->last_read, attnum);
    return TupleDescAttr(RelationGetDescr(b->origin), attnum - 1)->attgenerated == kVirtualColumn;
}

Expr *plan(Builder *b, Node *expression) {
    if (find_unreadable(expression, b)) b->why_not = "the mapping reads system columns, whole rows or virtual columns";
    if (!b->planned) return (Expr *)expression;
    Expr *planned = expression_planner((Expr *)expression);
    if (find_function((Node *)planned, NULL)) b->projection->calls_functions = true;
    return planned;
}

// As INSERT … SELECT assigns a column of the view to one of dest.
Expr *assigned(Builder *b, Node *expression, AttrNumber column) {
    const Form_pg_attribute att = TupleDescAttr(RelationGetDescr(b->dest), column - 1);
    if (att->attisdropped || att->attgenerated) {
        b->why_not = psprintf("a mapped column of \"%s\" is dropped or generated", RelationGetRelationName(b->dest));
        return NULL;
    }
    Node *coerced = coerce_to_target_type(NULL, expression, exprType(expression), att->atttypid, att->atttypmod,
                                          COERCION_ASSIGNMENT, COERCE_IMPLICIT_CAST, -1);
    if (coerced == NULL) {
        b->why_not = psprintf("the value of column \"%s\" is not of its type", NameStr(att->attname));
        return NULL;
    }
    if (coerced != expression) assign_expr_collations(NULL, coerced);
    return plan(b, coerced);
}

void add_column(Builder *b, int i, TargetEntry *entry) {
    Projection *p = b->projection;
    p->columns[i] = b->mapping->columns[i];
    Expr *expression = assigned(b, (Node *)entry->expr, p->columns[i]);
    while (expression && IsA(expression, RelabelType)) expression = ((RelabelType *)expression)->arg;
    if (expression && IsA(expression, Var))
        p->bare[i] = ((Var *)expression)->varattno;
    else
        p->expressions[i] = expression;
}

bool is_mapped(const Mapping *m, AttrNumber column) {
    for (int i = 0; i < m->ncolumns; i++)
        if (m->columns[i] == column) return true;
    return false;
}

// What an INSERT that names the view's columns only would put into the others.
void add_unmapped(Builder *b) {
    Projection *p = b->projection;
    TupleDesc desc = RelationGetDescr(b->dest);
    p->default_columns = (AttrNumber *)palloc(sizeof(AttrNumber) * desc->natts);
    p->default_expressions = (Expr **)palloc(sizeof(Expr *) * desc->natts);
    p->defaults = (ExprState **)palloc0(sizeof(ExprState *) * desc->natts);
    for (int i = 0; i < desc->natts; i++) {
        const Form_pg_attribute att = TupleDescAttr(desc, i);
        if (att->attisdropped || is_mapped(b->mapping, att->attnum)) continue;
        if (att->attgenerated) {
            b->why_not = psprintf("column \"%s\" of \"%s\" is generated", NameStr(att->attname),
                                  RelationGetRelationName(b->dest));
            return;
        }
        Node *value = build_column_default(b->dest, att->attnum);
        if (value == NULL && getBaseType(att->atttypid) != att->atttypid) {
            b->why_not = psprintf("column \"%s\" of \"%s\" is of a domain and not mapped", NameStr(att->attname),
                                  RelationGetRelationName(b->dest));
            return;
        }
        if (value == NULL) continue;
        p->default_columns[p->ndefaults] = att->attnum;
        p->default_expressions[p->ndefaults++] = plan(b, value);
    }
}

// The one relation that the view reads, as it stands in the view's range table.
int origin_index(const Query *query, Oid origin) {
    const List *from = query->jointree->fromlist;
    if (list_length(from) != 1 || !IsA(linitial(from), RangeTblRef)) return 0;
    const int index = ((RangeTblRef *)linitial(from))->rtindex;
    const RangeTblEntry *entry = (const RangeTblEntry *)list_nth(query->rtable, index - 1);
    return entry->rtekind == RTE_RELATION && entry->relid == origin ? index : 0;
}

void add_view(Builder *b, Query *query) {
    Projection *p = b->projection;
    const int index = origin_index(query, RelationGetRelid(b->origin));
    if (index == 0 || query->hasSubLinks || query->hasAggs || query->hasWindowFuncs || query->hasTargetSRFs ||
        list_length(query->targetList) != b->mapping->ncolumns) {
        b->why_not = "the mapping view is not a plain one";
        return;
    }
    ChangeVarNodes((Node *)query->targetList, index, 1, 0);
    ChangeVarNodes(query->jointree->quals, index, 1, 0);
    p->ncolumns = b->mapping->ncolumns;
    p->columns = (AttrNumber *)palloc0(sizeof(AttrNumber) * p->ncolumns);
    p->bare = (AttrNumber *)palloc0(sizeof(AttrNumber) * p->ncolumns);
    p->expressions = (Expr **)palloc0(sizeof(Expr *) * p->ncolumns);
    p->values = (ExprState **)palloc0(sizeof(ExprState *) * p->ncolumns);
    int i = 0;
    ListCell *cell;
    foreach (cell, query->targetList) add_column(b, i++, (TargetEntry *)lfirst(cell));
    if (query->jointree->quals) p->filter_expressions = make_ands_implicit(plan(b, query->jointree->quals));
}

const char *build(const Mapping *m, Relation origin, Relation dest, Projection *p, bool planned) {
    Builder builder = {m, origin, dest, p, NULL, planned};
    Relation view = relation_open(m->view, AccessShareLock);
    add_view(&builder, (Query *)copyObjectImpl(get_view_query(view)));
    relation_close(view, AccessShareLock);
    if (builder.why_not == NULL) add_unmapped(&builder);
    return builder.why_not;
}

// Read-only, for the slot's values are looked at more than once.
void put(Projection *p, ExprState *state, TupleTableSlot *slot, AttrNumber column) {
    const int i = column - 1;
    const Datum value = ExecEvalExprSwitchContext(state, p->row, &slot->tts_isnull[i]);
    slot->tts_values[i] =
        MakeExpandedObjectReadOnly(value, slot->tts_isnull[i], TupleDescAttr(slot->tts_tupleDescriptor, i)->attlen);
}

}  // namespace

const char *why_not_projected(const Mapping *m, Relation origin, Relation dest) {
    Projection ignored = {};
    return build(m, origin, dest, &ignored, false);
}

Projection *make_projection(const Mapping *m, Relation origin, Relation dest, const char **why_not) {
    Projection *p = (Projection *)palloc0(sizeof(Projection));
    p->context = CurrentMemoryContext;
    *why_not = build(m, origin, dest, p, true);
    return *why_not ? NULL : p;
}

void begin_projection(Projection *p) {
    if (p->ready && !p->calls_functions) return;
    p->ready = false;
    if (p->states) MemoryContextDelete(p->states);
    p->states = AllocSetContextCreate(p->context, "migrate_ext projection", ALLOCSET_SMALL_SIZES);
    MemoryContext old = MemoryContextSwitchTo(p->states);
    p->row = CreateStandaloneExprContext();
    for (int i = 0; i < p->ncolumns; i++)
        if (p->bare[i] == 0) p->values[i] = ExecInitExpr(p->expressions[i], NULL);
    p->filter = p->filter_expressions ? ExecInitQual(p->filter_expressions, NULL) : NULL;
    for (int i = 0; i < p->ndefaults; i++) p->defaults[i] = ExecInitExpr(p->default_expressions[i], NULL);
    MemoryContextSwitchTo(old);
    p->ready = true;
}

bool project(Projection *p, TupleTableSlot *origin_row, TupleTableSlot *dest_row) {
    ResetExprContext(p->row);
    p->row->ecxt_scantuple = origin_row;
    slot_getsomeattrs(origin_row, p->last_read);
    if (!ExecQual(p->filter, p->row)) return false;
    ExecClearTuple(dest_row);
    memset(dest_row->tts_isnull, true, sizeof(bool) * dest_row->tts_tupleDescriptor->natts);
    for (int i = 0; i < p->ncolumns; i++) {
        const int to = p->columns[i] - 1, from = p->bare[i] - 1;
        if (from >= 0)
            dest_row->tts_values[to] = origin_row->tts_values[from],
            dest_row->tts_isnull[to] = origin_row->tts_isnull[from];
        else
            put(p, p->values[i], dest_row, p->columns[i]);
    }
    ExecStoreVirtualTuple(dest_row);
    return true;
}

void add_defaults(Projection *p, TupleTableSlot *dest_row) {
    for (int i = 0; i < p->ndefaults; i++) put(p, p->defaults[i], dest_row, p->default_columns[i]);
}

}  // namespace migrate

#include "mapping_load.hpp"
#include "spi.hpp"

namespace migrate {
namespace {

bool is_over_plain_columns(Relation index) {
    return RelationGetIndexPredicate(index) == NIL && RelationGetIndexExpressions(index) == NIL;
}

bool is_fixed(const Mapping *m, AttrNumber attnum) {
    for (int i = 0; i < m->nfixed; i++)
        if (m->fixed[i].origin == attnum) return true;
    return false;
}

// Whether no unique index that is checked at once is over just the key's columns (constants are none), and such as have
// one value in all rows of this flow: then a key may stand twice in origin for a moment.
bool is_ambiguous(const Mapping *m, Relation origin) {
    bool ambiguous = true;
    for_each_index(origin, [&](Relation index) {
        const Form_pg_index form = index->rd_index;
        bool is_over_key = form->indisunique && form->indimmediate && is_over_plain_columns(index);
        int keys = 0;
        for (int i = 0; i < form->indnkeyatts && is_over_key; i++) {
            const bool key = is_key(m, &KeyColumn::origin, form->indkey.values[i]);
            keys += key;
            is_over_key = (key || is_fixed(m, form->indkey.values[i])) && compares_as_column(origin, index, i);
        }
        if (is_over_key && keys == m->nparams) ambiguous = false;
    });
    return ambiguous;
}

bool references(Relation from, Oid to) {
    ListCell *cell;
    foreach (cell, RelationGetFKeyList(from))
        if (((ForeignKeyCacheInfo *)lfirst(cell))->confrelid == to) return true;
    return false;
}

// Whether an INSERT must name the column.
bool wants_value(Form_pg_attribute column) {
    return column->attnotnull && !column->atthasdef && column->attidentity == '\0';
}

bool is_partial(const Mapping *m, Relation dest) {
    const TupleDesc desc = RelationGetDescr(dest);
    for (int i = 0; i < desc->natts; i++) {
        const Form_pg_attribute column = TupleDescAttr(desc, i);
        if (!column->attisdropped && wants_value(column) && position_of(m->columns, m->ncolumns, column->attnum) == 0)
            return true;
    }
    return false;
}

// Whether a column of the mapping view cannot be NULL: a key column, or any where all that is read is NOT NULL and
// bare.
bool is_never_null(const Mapping *m, Relation origin, AttrNumber view_column) {
    if (is_key(m, &KeyColumn::view, view_column)) return true;
    if (!m->plain) return false;
    for (int i = 0; i < m->nreads; i++)
        if (m->reads[i] <= 0 || !never_null(RelationGetDescr(origin), m->reads[i] - 1)) return false;
    return true;
}

// A constant, as it stands or under casts of the server's own that the column's type asks for (a length, a scale): to
// evaluate it calls nobody else's code.
bool is_constant(Node *value) {
    if (IsA(value, Const)) return true;
    if (!IsA(value, FuncExpr)) return false;
    const FuncExpr *cast = (FuncExpr *)value;
    bool constant = cast->funcformat == COERCE_IMPLICIT_CAST && cast->funcid < FirstNormalObjectId;
    ListCell *cell;
    foreach (cell, cast->args) constant = constant && is_constant((Node *)lfirst(cell));
    return constant;
}

bool is_time(const Node *value) {
    if (IsA(value, SQLValueFunction)) return ((const SQLValueFunction *)value)->op <= SVFOP_LOCALTIMESTAMP_N;
    return IsA(value, FuncExpr) && ((const FuncExpr *)value)->funcid == F_NOW;
}

// Whether what an INSERT puts into an unmapped column may raise an error, or be NULL where it must not.
bool default_may_refuse(Relation dest, Form_pg_attribute column) {
    if (column->attidentity != '\0') return true;
    if (!column->atthasdef) return column->attnotnull;
    Node *value = build_column_default(dest, column->attnum);
    if (is_time(value)) return false;
    if (!is_constant(value)) return true;
    auto evaluate = [&] { value = (Node *)expression_planner((Expr *)value); };
    if (!IsA(value, Const) && attempt(Undo::kSubtransaction, evaluate)) return true;
    return !IsA(value, Const) || (((Const *)value)->constisnull && column->attnotnull);
}

bool column_may_refuse(const Mapping *m, Relation origin, Relation dest, Relation view, Form_pg_attribute column) {
    const int position = position_of(m->columns, m->ncolumns, column->attnum);
    if (column->attisdropped) return position != 0;
    if (column->attgenerated != '\0' || get_typtype(column->atttypid) == TYPTYPE_DOMAIN) return true;
    if (position == 0) return default_may_refuse(dest, column);
    const Form_pg_attribute value = TupleDescAttr(RelationGetDescr(view), position - 1);
    return column->atttypid != value->atttypid || (column->atttypmod != -1 && column->atttypmod != value->atttypmod) ||
           (column->attnotnull && !is_never_null(m, origin, value->attnum));
}

// Whether there is another trigger than ours that fires for an event of these.
bool has_trigger_for(Relation dest, int16 events) {
    const TriggerDesc *triggers = dest->trigdesc;
    for (int i = 0; triggers && i < triggers->numtriggers; i++) {
        const Trigger *t = &triggers->triggers[i];
        if (!t->tgisinternal && (t->tgtype & events) && !is_dual_write_trigger(t)) return true;
    }
    return false;
}

bool is_referenced(Relation dest) {
    const TriggerDesc *triggers = dest->trigdesc;
    for (int i = 0; triggers && i < triggers->numtriggers; i++)
        if (RI_FKey_trigger_type(triggers->triggers[i].tgfoid) == RI_TRIGGER_PK) return true;
    return false;
}

bool acts_on_deletion(Relation dest) {
    const TriggerDesc *triggers = dest->trigdesc;
    for (int i = 0; triggers && i < triggers->numtriggers; i++) {
        const Oid function = triggers->triggers[i].tgfoid;
        if (function == F_RI_FKEY_CASCADE_DEL || function == F_RI_FKEY_SETNULL_DEL ||
            function == F_RI_FKEY_SETDEFAULT_DEL)
            return true;
    }
    return false;
}

// A btree refuses an entry that is larger than a third of a page, overhead included.
constexpr int kSafeEntryBytes = BLCKSZ / 4;

// Whether an entry's columns are surely together no larger than that.
bool is_entry_small(Relation dest, Relation index) {
    int size = 0;
    for (int i = 0; i < index->rd_index->indnatts; i++) {
        const Form_pg_attribute column = TupleDescAttr(RelationGetDescr(dest), index->rd_index->indkey.values[i] - 1);
        const int most = column->attlen > 0 ? column->attlen : type_maximum_size(column->atttypid, column->atttypmod);
        if (most < 0 || most > kSafeEntryBytes) return false;
        size += MAXALIGN(most);
    }
    return size <= kSafeEntryBytes;
}

// Whether origin's index of the key, which is checked at once, has taken the same columns.
bool is_entry_of_origin(const Mapping *m, Relation index) {
    return !m->ambiguous && m->nparams == m->nkey && index->rd_index->indnatts == m->nkey;
}

// Of the indexes of dest just one, which upserts arbitrate on, may refuse a row, none computes anything, and none meets
// an entry that is too large for it.
bool index_may_refuse(const Mapping *m, Relation dest) {
    int keys = 0;
    bool may_refuse = false;
    for_each_index(dest, [&](Relation index) {
        const Form_pg_index form = index->rd_index;
        bool is_key = form->indisunique && form->indnkeyatts == m->nkey && is_over_plain_columns(index);
        for (int i = 0; i < form->indnkeyatts && is_key; i++)
            is_key = form->indkey.values[i] == m->key[i].dest && compares_as_column(dest, index, i);
        if (is_key)
            keys++;
        else if (form->indisunique || form->indisexclusion || !is_over_plain_columns(index))
            may_refuse = true;
        if (may_refuse || (is_key && is_entry_of_origin(m, index))) return;
        may_refuse = index->rd_rel->relam != BTREE_AM_OID || !is_entry_small(dest, index);
    });
    return may_refuse || keys != 1;
}

// Whether an upsert into dest could be refused by anything at all. Where it could not, best effort needs no
// subtransaction. (A filter is an expression like any other; that of a reverse mapping only compares constants.)
bool upsert_may_fail(const Mapping *m, Relation origin, Relation dest, Relation view) {
    const TupleDesc desc = RelationGetDescr(dest);
    if (!m->plain || dest->rd_rel->relkind != RELKIND_RELATION || (desc->constr && desc->constr->num_check > 0) ||
        RelationGetFKeyList(dest) != NIL ||
        has_trigger_for(dest, TRIGGER_TYPE_INSERT | TRIGGER_TYPE_UPDATE | TRIGGER_TYPE_TRUNCATE) ||
        index_may_refuse(m, dest))
        return true;
    for (int i = 0; i < desc->natts; i++)
        if (column_may_refuse(m, origin, dest, view, TupleDescAttr(desc, i))) return true;
    return false;
}

// A virtual column is stored nowhere, and is NULL in what a trigger sees: then any change may be one of it, and what it
// is computed by may raise.
void look_at_virtual_columns(Mapping *m, Relation origin) {
    for (int i = 0; i < m->nreads; i++) {
        if (m->reads[i] <= 0 ||
            TupleDescAttr(RelationGetDescr(origin), m->reads[i] - 1)->attgenerated != kVirtualColumn)
            continue;
        m->nreads = 1, m->reads[0] = 0;
        m->plain = false;
    }
}

// Whether dest may refuse a write by what is not one of its own constraints, indexes and triggers: those of partitions
// or heirs, a partition's bounds, rules, a publication that could not tell which row was changed.
bool has_ways_of_its_own(Relation dest) {
    if (dest->rd_rel->relkind != RELKIND_RELATION || dest->rd_rel->relispartition || dest->rd_rel->relhassubclass ||
        dest->rd_rules)
        return true;
    auto is_identified = [dest] {
        CheckCmdReplicaIdentity(dest, CMD_UPDATE);
        CheckCmdReplicaIdentity(dest, CMD_DELETE);
    };
    return attempt(Undo::kSubtransaction, is_identified) != NULL;
}

bool keeps_its_key(const Mapping *m, Relation dest) {
    for (int i = 0; i < m->nkey; i++)
        if (TupleDescAttr(RelationGetDescr(dest), m->key[i].dest - 1)->attisdropped) return false;
    return true;
}

// Whether dest's rows have what deleting one and inserting another would lose: columns of their own, or rows elsewhere
// that reference them, or one of its partitions. (No UPDATE gives a key that is GENERATED ALWAYS.)
bool has_more_than_mapped(const Mapping *m, Relation dest) {
    bool more = is_referenced(dest) || dest->rd_rel->relkind == RELKIND_PARTITIONED_TABLE;
    for (int i = 0; i < RelationGetNumberOfAttributes(dest); i++) {
        const Form_pg_attribute att = TupleDescAttr(RelationGetDescr(dest), i);
        if (att->attisdropped || att->attgenerated) continue;
        more = more || position_of(m->columns, m->ncolumns, att->attnum) == 0;
        if (att->attidentity == ATTRIBUTE_IDENTITY_ALWAYS && is_key(m, &KeyColumn::dest, att->attnum)) return false;
    }
    return more;
}

void look_at(Mapping *m, Relation origin, Relation dest, Relation view) {
    m->dest_owner = dest->rd_rel->relowner;
    look_at_virtual_columns(m, origin);
    m->ambiguous = is_ambiguous(m, origin);
    m->partial = is_partial(m, dest);
    m->delete_at_once = references(dest, m->origin);
    m->insert_at_once = references(origin, m->dest);
    // (Until the first cutover there is nothing in dest but what comes from here, and bulk copies keep SQL waiting.)
    m->moves_rows = m->both_directions && m->carry_delete && !m->ambiguous && has_more_than_mapped(m, dest);
    m->deletion_acts = acts_on_deletion(dest);
    const bool refused = (m->filtered && !m->reverse) || !owner_may_write(m) || has_ways_of_its_own(dest);
    m->upsert_may_fail = refused || upsert_may_fail(m, origin, dest, view);
    m->delete_may_fail =
        refused || OidIsValid(m->carried) || is_referenced(dest) || has_trigger_for(dest, TRIGGER_TYPE_DELETE);
}

// The constants as values of origin's columns, under the settings that they are written under.
void read_constants(Mapping *m) {
    if (m->nfixed == 0) return;
    with_user(m->dest_owner, SECURITY_RESTRICTED_OPERATION, [m] {
        pin_output_settings();
        for (int i = 0; i < m->nfixed; i++) {
            Oid type, collation, input, argument;
            int32 typmod;
            get_atttypetypmodcoll(m->origin, m->fixed[i].origin, &type, &typmod, &collation);
            getTypeInputInfo(getBaseTypeAndTypmod(type, &typmod), &input, &argument);
            m->fixed[i].value = OidInputFunctionCall(input, const_cast<char *>(m->fixed[i].constant), argument, typmod);
        }
    });
}

}  // namespace

bool owner_may_write(const Mapping *m) {
    constexpr AclMode kNeeded = ACL_SELECT | ACL_INSERT | ACL_UPDATE | ACL_DELETE;
    return pg_class_aclmask(m->dest, m->dest_owner, kNeeded, ACLMASK_ALL) == kNeeded &&
           pg_class_aclcheck(m->view, m->dest_owner, ACL_SELECT) == ACLCHECK_OK &&
           may_use_schema(get_rel_namespace(m->dest), m->dest_owner) &&
           may_use_schema(get_rel_namespace(m->view), m->dest_owner);
}

void look_at_tables(Mapping *m) {
    Relation origin = try_relation_open(m->origin, AccessShareLock), dest = try_relation_open(m->dest, AccessShareLock),
             view = try_relation_open(m->view, AccessShareLock);
    m->lost = origin == NULL || dest == NULL || view == NULL || !keeps_its_key(m, dest);
    if (!m->lost) look_at(m, origin, dest, view);
    if (view) relation_close(view, AccessShareLock);
    if (dest) relation_close(dest, AccessShareLock);
    if (origin) relation_close(origin, AccessShareLock);
}

Mapping *load_mapping(int32 flow, bool reverse, Lifetime lifetime) {
    const bool kept = lifetime == Lifetime::kBackend;
    MemoryContext context = AllocSetContextCreate(CurrentMemoryContext, "migrate_ext mapping", ALLOCSET_SMALL_SIZES);
    MemoryContext old = MemoryContextSwitchTo(context);
    Mapping *m = (Mapping *)palloc0(sizeof(Mapping));
    m->context = context;
    m->kept = kept;
    m->flow = flow, m->reverse = reverse;
    bool found = read_mapping(m);
    if (found) look_at_tables(m);
    if (found && !m->lost) read_constants(m);
    if (!kept && m->lost) found = false;
    MemoryContextSwitchTo(old);
    if (!found) {
        MemoryContextDelete(context);
        return NULL;
    }
    if (kept) MemoryContextSetParent(context, CacheMemoryContext);  // an error before this leaves nothing behind
    return m;
}

void free_mapping(Mapping *mapping) {
    SPIPlanPtr plans[] = {mapping->hold,   mapping->upsert,  mapping->update,
                          mapping->remove, mapping->replace, mapping->move};
    for (SPIPlanPtr plan : plans)
        if (plan) SPI_freeplan(plan);
    MemoryContextDelete(mapping->context);
}

}  // namespace migrate

#include "direct_path.hpp"
#include "mutant.hpp"
#include "projection.hpp"

MIGRATE_FUNCTION(migrate_path)

namespace migrate {
namespace {

bool is_plain_heap(Relation r) {
    return r->rd_rel->relkind == RELKIND_RELATION && r->rd_rel->relam == HEAP_TABLE_AM_OID &&
           r->rd_rel->relpersistence == RELPERSISTENCE_PERMANENT && !r->rd_rel->relispartition &&
           !r->rd_rel->relhassubclass && r->rd_rules == NULL && !IsCatalogRelation(r);
}

const char *why_not_mapping(const Mapping *m) {
    if (kOnlySql) return "this build has no other way";
    if (m->partial) return "the target has NOT NULL columns that the mapping does not fill";
    if (m->ambiguous) return "no unique index of the source is over just its key and checked at once";
    if (m->nshared > 0) return "other flows write to the target";
    if (m->nparams < m->nkey) return "the key has a constant";
    for (int i = 0; i < m->nkey; i++)
        if (m->key[i].origin_type != m->key[i].dest_type) return "a key column changes its type";
    return NULL;
}

// A trigger of a foreign key, or one of ours, is queued and fired as the executor does; any other might do anything.
const char *why_not_triggers(Relation dest) {
    const TriggerDesc *triggers = dest->trigdesc;
    for (int i = 0; triggers && i < triggers->numtriggers; i++) {
        const Trigger *t = &triggers->triggers[i];
        if (t->tgenabled == TRIGGER_DISABLED || is_dual_write_trigger(t)) continue;
        if (t->tgisinternal && RI_FKey_trigger_type(t->tgfoid) != RI_TRIGGER_NONE) continue;
        return t->tgisinternal ? psprintf("\"%s\" has a deferrable constraint", RelationGetRelationName(dest))
                               : psprintf("\"%s\" has the trigger \"%s\"", RelationGetRelationName(dest), t->tgname);
    }
    return NULL;
}

const char *why_not_indexes(Relation dest) {
    const char *why_not = NULL;
    for_each_index(dest, [&](Relation index) {
        if (index->rd_index->indisexclusion || (index->rd_index->indisunique && !index->rd_index->indimmediate))
            why_not = psprintf("\"%s\" has an exclusion or deferrable constraint", RelationGetRelationName(dest));
    });
    return why_not;
}

// Whether what is stored in dest is the source's key, which the row is looked for by: a modifier may round it, or cut
// off spaces.
bool keeps_key(Form_pg_attribute origin, Form_pg_attribute dest) {
    if (dest->atttypmod == -1 || dest->atttypmod == origin->atttypmod) return true;
    return dest->atttypid == VARCHAROID && origin->atttypmod != -1 && dest->atttypmod > origin->atttypmod;
}

const char *why_not_key(const Mapping *m, Relation origin, Relation dest) {
    if (find_key_indexes(m, origin, &KeyColumn::origin) == NIL)
        return psprintf("\"%s\" has no index over just the key", RelationGetRelationName(origin));
    if (find_key_indexes(m, dest, &KeyColumn::dest) == NIL)
        return psprintf("\"%s\" has no index over just the key", RelationGetRelationName(dest));
    for (int i = 0; i < m->nkey; i++) {
        const Form_pg_attribute column = TupleDescAttr(RelationGetDescr(dest), m->key[i].dest - 1);
        if (!column->attnotnull) return psprintf("a key column of \"%s\" may be NULL", RelationGetRelationName(dest));
        if (!keeps_key(TupleDescAttr(RelationGetDescr(origin), m->key[i].origin - 1), column))
            return "a key column changes its type's modifier";
    }
    return NULL;
}

// A query checks rights by statement; here they are looked at when the path is chosen. A revocation from dest's owner
// changes dest, and so makes the choice anew: then the query raises its own error. The rights of dest's owner that only
// a group gave him, and has taken since, are the exception: as the owner he may grant them to himself again any time.
const char *why_not_rights(const Mapping *m, Relation origin, Relation dest) {
    const Oid reader = owner_of(m->view);
    if (dest->rd_rel->relowner != m->dest_owner) return "the owner of the target is just changing";
    if (!owner_may_write(m)) return "the owner of the target lacks rights";
    if (pg_class_aclcheck(RelationGetRelid(origin), reader, ACL_SELECT) != ACLCHECK_OK) return "the view lacks rights";
    if (dest->rd_rel->relforcerowsecurity || (origin->rd_rel->relrowsecurity && !superuser_arg(reader)))
        return "row level security is forced";
    return NULL;
}

}  // namespace

List *find_key_indexes(const Mapping *m, Relation relation, AttrNumber KeyColumn::*column) {
    List *found = NIL;
    for_each_index(relation, [&](Relation index) {
        const Form_pg_index form = index->rd_index;
        bool fits = form->indisunique && form->indimmediate && form->indisvalid && form->indnkeyatts == m->nkey &&
                    index->rd_rel->relam == BTREE_AM_OID && RelationGetIndexPredicate(index) == NIL;
        for (int i = 0; i < form->indnkeyatts && fits; i++)
            fits = is_key(m, column, form->indkey.values[i]) && compares_as_column(relation, index, i);
        if (fits) found = lappend_oid(found, RelationGetRelid(index));
    });
    return found;
}

const char *why_not_direct(const Mapping *m, Relation origin, Relation dest) {
    const char *why_not = why_not_mapping(m);
    if (why_not) return why_not;
    const Relation both[] = {origin, dest};
    for (Relation r : both)
        if (!is_plain_heap(r)) return psprintf("\"%s\" is no plain table", RelationGetRelationName(r));
    if ((why_not = why_not_triggers(dest)) || (why_not = why_not_indexes(dest)) ||
        (why_not = why_not_key(m, origin, dest)) || (why_not = why_not_rights(m, origin, dest)))
        return why_not;
    return why_not_projected(m, origin, dest);
}

}  // namespace migrate

using namespace migrate;

// migrate._path(flow integer, direction text) RETURNS text: NULL where its dual writes are made without SQL, else why
// not
Datum migrate_path(PG_FUNCTION_ARGS) {
    const bool reverse = strcmp(text_to_cstring(PG_GETARG_TEXT_PP(1)), "reverse") == 0;
    return answer_of_flow(fcinfo, reverse, why_not_direct);
}

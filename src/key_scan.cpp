#include "key_scan.hpp"

namespace migrate {
namespace {

const KeyColumn &column_of_key(const Mapping *m, int i) {
    return m->key[m->params[i]];
}

// Whether the index's column i sorts as the key's column i is compared in SQL.
bool sorts_as_key(const Mapping *m, Relation origin, Relation index, int i) {
    return index->rd_index->indkey.values[i] == column_of_key(m, i).origin && index->rd_indoption[i] == 0 &&
           compares_as_column(origin, index, i);
}

bool is_in_key_order(const Mapping *m, Relation origin, Relation index) {
    const Form_pg_index form = index->rd_index;
    if (index->rd_rel->relam != BTREE_AM_OID || !form->indisunique || !form->indimmediate || !form->indisvalid ||
        !form->indisready || !form->indislive || form->indcheckxmin || form->indnkeyatts != m->nparams ||
        RelationGetIndexPredicate(index) != NIL)
        return false;
    for (int i = 0; i < m->nparams; i++)
        if (!sorts_as_key(m, origin, index, i)) return false;
    return true;
}

}  // namespace

Oid key_order_index(const Mapping *m, Relation origin) {
    Oid found = InvalidOid;
    for_each_index(origin, [&](Relation index) {
        if (!OidIsValid(found) && is_in_key_order(m, origin, index)) found = RelationGetRelid(index);
    });
    return found;
}

namespace {

Datum read_value(const Mapping *m, int i, Datum value) {
    Oid input, element;
    getTypeInputInfo(column_of_key(m, i).origin_type, &input, &element);
    return OidInputFunctionCall(input, TextDatumGetCString(value), element, -1);
}

// A condition on one column is an operator's; a row of one, the B-tree does not expect.
void compare_column(ScanKey condition, Relation index, StrategyNumber strategy, Datum value) {
    const Oid type = index->rd_opcintype[0];
    const Oid compare = get_opfamily_member(index->rd_opfamily[0], type, type, strategy);
    if (!OidIsValid(compare)) elog(ERROR, "index %u has no operator of strategy %d", RelationGetRelid(index), strategy);
    ScanKeyEntryInitialize(condition, 0, 1, strategy, InvalidOid, index->rd_indcollation[0], get_opcode(compare),
                           value);
}

}  // namespace

// A condition on a row is a header that points to its members (access/skey.h).
void compare_row(ScanKey condition, const Mapping *m, Relation index, StrategyNumber strategy, Datum key) {
    Datum *texts;
    bool *nulls;
    int n;
    deconstruct_array(DatumGetArrayTypeP(key), TEXTOID, -1, false, TYPALIGN_INT, &texts, &nulls, &n);
    if (n != m->nparams)
        ereport(ERROR, (errcode(ERRCODE_ARRAY_SUBSCRIPT_ERROR), errmsg("key has %d columns, not %d", n, m->nparams)));
    for (int i = 0; i < n; i++)
        if (nulls[i]) ereport(ERROR, (errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED), errmsg("null in a key")));
    if (n == 1) return compare_column(condition, index, strategy, read_value(m, 0, texts[0]));
    ScanKey members = (ScanKey)palloc0(sizeof(ScanKeyData) * n);
    for (int i = 0; i < n; i++)
        ScanKeyEntryInitialize(&members[i], SK_ROW_MEMBER | (i == n - 1 ? SK_ROW_END : 0), i + 1, strategy, InvalidOid,
                               index->rd_indcollation[i], index_getprocid(index, i + 1, BTORDER_PROC),
                               read_value(m, i, texts[i]));
    memset(condition, 0, sizeof(ScanKeyData));
    condition->sk_flags = SK_ROW_HEADER;
    condition->sk_attno = 1;
    condition->sk_strategy = strategy;
    condition->sk_argument = PointerGetDatum(members);
}

void key_texts(const Mapping *m, TupleTableSlot *row, Datum *texts) {
    for (int i = 0; i < m->nparams; i++) {
        const KeyColumn &column = column_of_key(m, i);
        Oid output;
        bool is_varlena, isnull;
        getTypeOutputInfo(column.origin_type, &output, &is_varlena);
        const Datum value = slot_getattr(row, column.origin, &isnull);
        if (isnull) elog(ERROR, "null in key column %d", column.origin);
        texts[i] = CStringGetTextDatum(OidOutputFunctionCall(output, value));
    }
}

Datum key_list(const Mapping *m, Datum *texts, int n, MemoryContext result) {
    int dims[2] = {n, m->nparams}, lower[2] = {1, 1};
    MemoryContext old = MemoryContextSwitchTo(result);
    const Datum list =
        PointerGetDatum(construct_md_array(texts, NULL, 2, dims, lower, TEXTOID, -1, false, TYPALIGN_INT));
    MemoryContextSwitchTo(old);
    return list;
}

}  // namespace migrate

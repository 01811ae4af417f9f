#include "place_scan.hpp"

namespace migrate {
namespace {

ItemPointerData read_place(Datum texts) {
    Datum *elements;
    bool *nulls;
    int n;
    deconstruct_array(DatumGetArrayTypeP(texts), TEXTOID, -1, false, TYPALIGN_INT, &elements, &nulls, &n);
    if (n != 1 || nulls[0])
        ereport(ERROR, (errcode(ERRCODE_ARRAY_SUBSCRIPT_ERROR), errmsg("a place has %d columns, not 1", n)));
    return *(ItemPointer)DatumGetPointer(DirectFunctionCall1(tidin, CStringGetDatum(TextDatumGetCString(elements[0]))));
}

}  // namespace

void begin_place_scan(PlaceScan *s, Relation origin, Snapshot snapshot, Datum after, Datum until) {
    if (origin->rd_rel->relkind != RELKIND_RELATION || origin->rd_rel->relam != HEAP_TABLE_AM_OID)
        ereport(ERROR, (errcode(ERRCODE_WRONG_OBJECT_TYPE),
                        errmsg("\"%s\" cannot be read in the order of place any more", RelationGetRelationName(origin)),
                        errdetail("It is no heap table.")));
    ItemPointerSet(&s->after, 0, 0);
    ItemPointerSet(&s->until, MaxBlockNumber, 0);
    if (after) s->after = read_place(after);
    if (until) s->until = read_place(until);
    s->scan = NULL;
    const BlockNumber first = ItemPointerGetBlockNumberNoCheck(&s->after);
    BlockNumber end = ItemPointerGetBlockNumberNoCheck(&s->until);
    if (ItemPointerGetOffsetNumberNoCheck(&s->until) > 0) end++;
    // (Nobody cuts blocks off while the table is locked.)
    end = Min(end, RelationGetNumberOfBlocks(origin));
    if (first >= end) return;
    s->scan = table_beginscan_strat(origin, snapshot, 0, NULL, true, false);
    heap_setscanlimits(s->scan, first, end - first);
}

bool next_in_place(PlaceScan *s, TupleTableSlot *row) {
    while (s->scan && table_scan_getnextslot(s->scan, ForwardScanDirection, row)) {
        if (ItemPointerCompare(&row->tts_tid, &s->until) > 0) return false;
        if (ItemPointerCompare(&row->tts_tid, &s->after) > 0) return true;
    }
    return false;
}

void end_place_scan(PlaceScan *s) {
    if (s->scan) table_endscan(s->scan);
}

Datum place_texts(ItemPointer place) {
    Datum text = CStringGetTextDatum(
        psprintf("(%u,%u)", ItemPointerGetBlockNumberNoCheck(place), ItemPointerGetOffsetNumberNoCheck(place)));
    return PointerGetDatum(construct_array(&text, 1, TEXTOID, -1, false, TYPALIGN_INT));
}

}  // namespace migrate

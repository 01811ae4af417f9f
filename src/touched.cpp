#include "touched.hpp"

namespace migrate {
namespace {

void forget_level(KeyList *list, int nest_level) {
    while (list->n > 0 && list->nest_levels[list->n - 1] >= nest_level) list->n--;
}

void merge_level(KeyList *list, int nest_level) {
    for (int i = list->n - 1; i >= 0 && list->nest_levels[i] >= nest_level; i--) list->nest_levels[i] = nest_level - 1;
}

void *grow(void *array, Size size) {
    return array ? repalloc(array, size) : palloc(size);
}

}  // namespace

int outermost_level(const Touched &touched) {
    const int upsert = touched.upsert.n > 0 ? touched.upsert.nest_levels[0] : INT_MAX;
    const int remove = touched.remove.n > 0 ? touched.remove.nest_levels[0] : INT_MAX;
    return Min(upsert, remove);
}

void forget_level(Touched *touched, int nest_level) {
    forget_level(&touched->upsert, nest_level);
    forget_level(&touched->remove, nest_level);
    forget_level(&touched->moved_from, nest_level);
    forget_level(&touched->moved_to, nest_level);
}

void merge_level(Touched *touched, int nest_level) {
    merge_level(&touched->upsert, nest_level);
    merge_level(&touched->remove, nest_level);
    merge_level(&touched->moved_from, nest_level);
    merge_level(&touched->moved_to, nest_level);
}

void append_key(KeyList *list, const Mapping *mapping, const Datum *values, const ItemPointerData *place,
                MemoryContext context) {
    MemoryContext old = MemoryContextSwitchTo(context);
    if (list->n == list->capacity) {
        list->capacity = Max(8, list->capacity * 2);
        list->nest_levels = (int *)grow(list->nest_levels, sizeof(int) * list->capacity);
        list->places = (ItemPointerData *)grow(list->places, sizeof(ItemPointerData) * list->capacity);
        for (int i = 0; i < mapping->nparams; i++)
            list->columns[i] = (Datum *)grow(list->columns[i], sizeof(Datum) * list->capacity);
    }
    for (int i = 0; i < mapping->nparams; i++) {
        int16 length;
        bool by_value;
        get_typlenbyval(mapping->key[mapping->params[i]].origin_type, &length, &by_value);
        const Datum value = length == -1 ? PointerGetDatum(PG_DETOAST_DATUM(values[i])) : values[i];
        list->columns[i][list->n] = datumCopy(value, by_value, length);
    }
    if (place)
        list->places[list->n] = *place;
    else
        ItemPointerSetInvalid(&list->places[list->n]);
    list->nest_levels[list->n++] = GetCurrentTransactionNestLevel();
    MemoryContextSwitchTo(old);
}

void forget_places(KeyList *list) {
    for (int i = 0; i < list->n; i++) ItemPointerSetInvalid(&list->places[i]);
}

KeyList copy_keys(const KeyList &list, const Mapping *mapping) {
    KeyList copy = list;
    for (int i = 0; i < mapping->nparams && list.n > 0; i++) {
        copy.columns[i] = (Datum *)palloc(sizeof(Datum) * list.n);
        memcpy(copy.columns[i], list.columns[i], sizeof(Datum) * list.n);
    }
    if (list.n > 0) {
        copy.places = (ItemPointerData *)palloc(sizeof(ItemPointerData) * list.n);
        memcpy(copy.places, list.places, sizeof(ItemPointerData) * list.n);
    }
    return copy;
}

Datum *key_arrays(const KeyList &list, const Mapping *mapping, int from, int to) {
    Datum *arrays = (Datum *)palloc(sizeof(Datum) * mapping->nparams);
    for (int i = 0; i < mapping->nparams; i++) {
        const Oid type = mapping->key[mapping->params[i]].origin_type;
        int16 length;
        bool by_value;
        char align;
        get_typlenbyvalalign(type, &length, &by_value, &align);
        arrays[i] = PointerGetDatum(construct_array(list.columns[i] + from, to - from, type, length, by_value, align));
    }
    return arrays;
}

Datum key_text(const KeyList &list, const Mapping *mapping, int index) {
    Datum texts[INDEX_MAX_KEYS];
    for (int i = 0; i < mapping->nparams; i++) {
        Oid out;
        bool varlena;
        getTypeOutputInfo(mapping->key[mapping->params[i]].origin_type, &out, &varlena);
        texts[i] = CStringGetTextDatum(OidOutputFunctionCall(out, list.columns[i][index]));
    }
    return PointerGetDatum(construct_array(texts, mapping->nparams, TEXTOID, -1, false, TYPALIGN_INT));
}

}  // namespace migrate

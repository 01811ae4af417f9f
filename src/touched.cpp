#include "touched.hpp"

namespace migrate {

void append_key(KeyList *list, const Mapping *mapping, const Datum *values, MemoryContext context) {
    MemoryContext old = MemoryContextSwitchTo(context);
    if (list->n == list->capacity) {
        list->capacity = Max(8, list->capacity * 2);
        for (int i = 0; i < mapping->nparams; i++) {
            const Size size = sizeof(Datum) * list->capacity;
            list->columns[i] = (Datum *)(list->n == 0 ? palloc(size) : repalloc(list->columns[i], size));
        }
    }
    for (int i = 0; i < mapping->nparams; i++) {
        int16 length;
        bool by_value;
        get_typlenbyval(mapping->key[mapping->params[i]].origin_type, &length, &by_value);
        const Datum value = length == -1 ? PointerGetDatum(PG_DETOAST_DATUM(values[i])) : values[i];
        list->columns[i][list->n] = datumCopy(value, by_value, length);
    }
    list->n++;
    MemoryContextSwitchTo(old);
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

#include "image.hpp"

namespace migrate {

namespace {

// Whether every part of the type has a binary send function. That of a container exists even if its elements have none.
bool has_send(Oid type) {
    type = getBaseType(type);
    if (type == RECORDOID) return true;
    TypeCacheEntry *entry = lookup_type_cache(type, TYPECACHE_RANGE_INFO);
    HeapTuple tuple = SearchSysCache1(TYPEOID, ObjectIdGetDatum(type));
    if (!HeapTupleIsValid(tuple)) elog(ERROR, "cache lookup failed for type %u", type);
    const bool own = OidIsValid(((Form_pg_type)GETSTRUCT(tuple))->typsend);
    ReleaseSysCache(tuple);
    if (!own) return false;

    if (OidIsValid(get_element_type(type))) return has_send(get_element_type(type));
    if (entry->rngelemtype != NULL) return has_send(entry->rngelemtype->type_id);
    if (entry->typtype != TYPTYPE_COMPOSITE) return true;
    TupleDesc desc = lookup_rowtype_tupdesc_copy(type, -1);
    for (int i = 0; i < desc->natts; i++)
        if (!TupleDescAttr(desc, i)->attisdropped && !has_send(TupleDescAttr(desc, i)->atttypid)) return false;
    return true;
}

Form form_of(Oid type, int16 length, bool by_value) {
    if (get_typtype(type) == TYPTYPE_ENUM) return Form::kOutput;
    if (by_value) return Form::kByValue;
    if (length == -2 || type == NAMEOID) return Form::kCString;
    switch (type) {
        case TEXTOID:
        case VARCHAROID:
        case BPCHAROID:
        case BYTEAOID:
        case JSONOID:
        case XMLOID:
            return Form::kVarlena;
        default:
            return has_send(type) ? Form::kSend : Form::kOutput;
    }
}

// Send functions convert text to the client's encoding; only these are known to hold no text.
Reads reads_of(Oid type, Form form) {
    if (form == Form::kOutput) return get_typtype(type) == TYPTYPE_ENUM ? Reads::kNothing : Reads::kAll;
    if (form != Form::kSend) return Reads::kNothing;
    switch (type) {
        case NUMERICOID:
        case UUIDOID:
        case INTERVALOID:
        case TIMETZOID:
        case INETOID:
        case CIDROID:
        case MACADDROID:
        case BITOID:
        case VARBITOID:
            return Reads::kNothing;
        default:
            return Reads::kClientEncoding;
    }
}

void pin(const char *name, const char *value) {
    (void)set_config_option(name, value, PGC_USERSET, PGC_S_SESSION, GUC_ACTION_SAVE, true, 0, false);
}

// Calls the type's function with the settings it reads pinned; an error leaves it to the abort to set them back.
std::string_view call_pinned(Encoder *encoder, Datum value) {
    const bool foreign = pg_get_client_encoding() != GetDatabaseEncoding();
    const bool all = encoder->reads == Reads::kAll;
    const bool pins = all || (encoder->reads == Reads::kClientEncoding && foreign);
    const int level = pins ? NewGUCNestLevel() : 0;
    if (pins && foreign) pin("client_encoding", GetDatabaseEncodingName());
    if (all) {
        pin("datestyle", "ISO, MDY");
        pin("intervalstyle", "postgres");
        pin("timezone", "UTC");
        pin("extra_float_digits", "1");
        pin("bytea_output", "hex");
        pin("lc_monetary", "C");
        pin("search_path", "pg_catalog, pg_temp");
        pin("quote_all_identifiers", "off");
    }
    std::string_view image;
    if (encoder->form == Form::kSend) {
        bytea *sent = SendFunctionCall(&encoder->function, value);
        image = std::string_view(VARDATA(sent), VARSIZE(sent) - VARHDRSZ);
    } else {
        image = std::string_view(OutputFunctionCall(&encoder->function, value));
    }
    if (pins) AtEOXact_GUC(false, level);
    return image;
}

// The value's bytes in network order, whatever the machine's order is.
std::string_view by_value_image(int16 length, Datum value, char (&scratch)[sizeof(int64)]) {
    const uint64 bits = static_cast<uint64>(value);
    for (int i = 0; i < length; i++) scratch[i] = static_cast<char>(bits >> (8 * (length - 1 - i)));
    return std::string_view(scratch, length);
}

}  // namespace

Encoder make_encoder(Oid type, MemoryContext context) {
    Encoder encoder;
    bool by_value;
    Oid function;
    bool is_varlena;

    const Oid base = getBaseType(type);
    encoder.type = type;
    get_typlenbyval(base, &encoder.length, &by_value);
    encoder.form = form_of(base, encoder.length, by_value);
    encoder.reads = reads_of(base, encoder.form);
    if (encoder.form == Form::kSend)
        getTypeBinaryOutputInfo(base, &function, &is_varlena);
    else if (encoder.form == Form::kOutput)
        getTypeOutputInfo(base, &function, &is_varlena);
    else
        return encoder;
    fmgr_info_cxt(function, &encoder.function, context);
    return encoder;
}

std::string_view image_of(Encoder *encoder, Datum value, char (&scratch)[sizeof(int64)]) {
    switch (encoder->form) {
        case Form::kByValue:
            return by_value_image(encoder->length, value, scratch);
        case Form::kVarlena: {
            struct varlena *flat = PG_DETOAST_DATUM_PACKED(value);
            return std::string_view(VARDATA_ANY(flat), VARSIZE_ANY_EXHDR(flat));
        }
        case Form::kCString:
            return std::string_view(DatumGetCString(value));
        case Form::kSend:
        case Form::kOutput:
            return call_pinned(encoder, value);
    }
    pg_unreachable();
}

}  // namespace migrate

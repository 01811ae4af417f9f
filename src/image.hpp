// The canonical image of a value, which the digests are made of (digest.cpp, row_sum.cpp; SQL-callable, 60_digest.sql)
// and same_image. Never shares code with flow.cpp: a verifier that shares code with the copier verifies nothing.
#pragma once
#include "compat.hpp"

#include <string_view>

namespace migrate {

// How the bytes of a type's value are had. The image never depends on settings, on TOAST or on the machine.
enum class Form {
    kByValue,  // the value's bytes, most significant first (what int4send, float8send, timestamptz_send … give)
    kVarlena,  // the bytes after the length word: text, varchar, bpchar, bytea, json, xml
    kCString,  // up to the zero byte: name, cstring, literals of unknown type
    kSend,     // the type's binary send function: numeric with its scale, jsonb, arrays, ranges, composites …
    kOutput    // the type's text: enums (the label), and types without a send function
};

// Which settings the function of a Form reads; they are pinned while it runs.
enum class Reads { kNothing, kClientEncoding, kAll };

struct Encoder {
    Oid type;
    Form form;
    Reads reads;
    int16 length;
    FmgrInfo function;
};

// Prepares to encode values of `type` (a domain counts as its base type). What it keeps lives in `context`.
Encoder make_encoder(Oid type, MemoryContext context);

// The image of a value that is not NULL; valid until the current memory context is reset. `scratch` holds short ones.
std::string_view image_of(Encoder *encoder, Datum value, char (&scratch)[sizeof(int64)]);

}  // namespace migrate

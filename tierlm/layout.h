// Where the fields of a struct lie, for Python to compare with what it passes: tierlm/library.py.
#pragma once

#include <cstddef>
#include <cstdint>

struct Field {
    const char* name;  // null for the struct itself, at the end
    int64_t offset, size;
};

#define FIELD(name) {#name, int64_t(offsetof(Struct, name)), int64_t(sizeof(Struct::name))}
#define LAYOUT(type, ...)                                                                   \
    extern "C" const Field* tierlm_layout_##type() {                                        \
        using Struct = type;                                                                \
        static const Field fields[] = {__VA_ARGS__, {nullptr, 0, int64_t(sizeof(Struct))}}; \
        return fields;                                                                      \
    }

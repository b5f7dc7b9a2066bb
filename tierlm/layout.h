// Exports the layout of a struct, which tierlm/library.py compares with its ctypes twin.
#pragma once

#include <cstddef>
#include <cstdint>

struct Field {
    const char* name;  // null in the last entry, whose size is the struct's
    int64_t offset, size;
};

#define FIELD(name) {#name, int64_t(offsetof(Struct, name)), int64_t(sizeof(Struct::name))}
#define LAYOUT(type, ...)                                                                   \
    extern "C" const Field* tierlm_layout_##type() {                                        \
        using Struct = type;                                                                \
        static const Field fields[] = {__VA_ARGS__, {nullptr, 0, int64_t(sizeof(Struct))}}; \
        return fields;                                                                      \
    }

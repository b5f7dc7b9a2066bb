// Values of a KV cache as floats, LANES at a time or one.
#pragma once

#include <cstring>

#include "vectors.h"

namespace {

struct Float32 {
    static constexpr int size = 4;
    static INLINE Floats load(const uint8_t* p) { return *reinterpret_cast<const Floats*>(p); }
    static INLINE float one(const uint8_t* p) {
        float x;
        std::memcpy(&x, p, size);
        return x;
    }
};

struct BFloat16 {
    static constexpr int size = 2;
    static INLINE Floats load(const uint8_t* p) {
        const Words bits = __builtin_convertvector(*reinterpret_cast<const Halves*>(p), Words) << 16;
        return reinterpret_cast<Floats>(bits);
    }
    static INLINE float one(const uint8_t* p) {
        uint16_t half;
        std::memcpy(&half, p, size);
        const uint32_t bits = static_cast<uint32_t>(half) << 16;
        float x;
        std::memcpy(&x, &bits, sizeof x);
        return x;
    }
};

}  // namespace

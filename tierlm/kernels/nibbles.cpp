// Four-bit codes with their scales apart (formats/nibbles.py): widened in registers, multiplied and summed in float32.
//
// Eight codes are a 32-bit word, the first in its lowest bits. Scales are [outs, ins / columns]. Stored::whole applies
// the factor of a whole weight.

#include <algorithm>
#include <cstring>

#include "product.h"

namespace {

INLINE float as_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

struct Mxfp4Apart {
    static constexpr int64_t columns = 32;
    static INLINE Floats values(Words codes) {  // e2m1 times two; as shifted bits, one would be subnormal, and slow
        const Floats sizes = {0, 1, 2, 3, 4, 6, 8, 12};
#ifdef __clang__
        Floats found;
        for (int i = 0; i < LANES; ++i) found[i] = sizes[codes[i] & 7u];
#else
        const Floats found = __builtin_shuffle(sizes, reinterpret_cast<Ints>(codes & 7u));
#endif
        return reinterpret_cast<Floats>(reinterpret_cast<Words>(found) | (codes & 8u) << 28);
    }
    static INLINE float scale(const void* scales, int64_t at) {  // 2 ** (power - 128)
        const uint32_t power = static_cast<const uint8_t*>(scales)[at];
        return as_float(power < 2 ? 0x200000u << power : (power - 1) << 23);
    }
    template <class T>
    static INLINE T whole(T value, const Product&) { return value; }
};

template <bool DIVIDES>
struct Nvfp4 {
    static constexpr int64_t columns = 16;
    static INLINE Floats values(Words codes) { return Mxfp4Apart::values(codes) * 0.5f; }
    static INLINE float scale(const void* scales, int64_t at) {  // float8
        const uint32_t raw = static_cast<const uint8_t*>(scales)[at];
        return as_float((raw & 0x80u) << 24 | (raw & 0x7fu) << 20) * 0x1p120f;
    }
    template <class T>
    static INLINE T whole(T value, const Product& p) {
        const float factor = *static_cast<const float*>(p.extra);
        return DIVIDES ? value / factor : value * factor;
    }
};

template <int64_t COLUMNS>
struct Int4Groups {
    static constexpr int64_t columns = COLUMNS;
    static INLINE Floats values(Words codes) {
        return __builtin_convertvector(reinterpret_cast<Ints>(codes) - 8, Floats);
    }
    static INLINE float scale(const void* scales, int64_t at) {  // bfloat16
        return as_float(static_cast<uint32_t>(static_cast<const uint16_t*>(scales)[at]) << 16);
    }
    template <class T>
    static INLINE T whole(T value, const Product&) { return value; }
};

// The numbers in eight columns of weight row `out`.
template <class Stored>
INLINE Floats numbers(const Product& p, int64_t out, int64_t column) {
    uint32_t word;
    std::memcpy(&word, p.w + (out * p.ins + column) / 2, sizeof word);
    return Stored::values((Words{} + word) >> Words{0, 4, 8, 12, 16, 20, 24, 28} & 15u);
}

template <class Stored>
INLINE float scale(const Product& p, int64_t out, int64_t column) {
    return Stored::scale(p.scale, (out * p.ins + column) / Stored::columns);
}

INLINE Floats load(const float* x) { return *reinterpret_cast<const Floats*>(x); }

// OUTS weight rows times ROWS activation rows, starting at weight row `out` and activation row `row`.
template <class Stored, int OUTS, int ROWS>
INLINE void tile(const Product& p, int64_t out, int64_t row) {
    Floats total[OUTS][ROWS] = {};
    for (int64_t start = 0; start < p.ins; start += Stored::columns) {
        Floats group[OUTS][ROWS] = {};
        for (int64_t i = start; i < start + Stored::columns; i += LANES) {
            for (int o = 0; o < OUTS; ++o) {
                const Floats w = numbers<Stored>(p, out + o, i);
                for (int r = 0; r < ROWS; ++r) group[o][r] += w * load(p.x + (row + r) * p.ins + i);
            }
        }
        for (int o = 0; o < OUTS; ++o) {
            const float factor = scale<Stored>(p, out + o, start);
            for (int r = 0; r < ROWS; ++r) total[o][r] += group[o][r] * factor;
        }
    }
    for (int o = 0; o < OUTS; ++o) {
        for (int r = 0; r < ROWS; ++r) {
            float sum = 0;
            for (int i = 0; i < LANES; ++i) sum += total[o][r][i];
            p.y[(row + r) * p.stride + out + o - p.origin] = Stored::whole(sum, p);
        }
    }
}

template <class Stored>
INLINE void outputs(const Product& p, int64_t first, int64_t last) {
    int64_t row = 0;
    for (; row + 4 <= p.rows; row += 4) {
        for (int64_t out = first; out < last; ++out) tile<Stored, 1, 4>(p, out, row);
    }
    for (; row < p.rows; ++row) {
        int64_t out = first;
        for (; out + 4 <= last; out += 4) tile<Stored, 4, 1>(p, out, row);
        for (; out < last; ++out) tile<Stored, 1, 1>(p, out, row);
    }
}

// Format::weighted_rows, in the order of the weight rows.
template <class Stored>
INLINE void weighted_rows(const Product& p, int64_t first, int64_t last) {
    std::fill(p.y, p.y + p.rows * p.ins, 0.0f);
    for (int64_t n = first; n < last; ++n) {
        for (int64_t i = 0; i < p.ins; i += LANES) {
            const Floats w = Stored::whole(numbers<Stored>(p, n, i) * scale<Stored>(p, n, i), p);
            for (int64_t r = 0; r < p.rows; ++r)
                *reinterpret_cast<Floats*>(p.y + r * p.ins + i) += w * p.x[r * p.stride + n - first];
        }
    }
}

template <class Stored>
INLINE void widened(const Product& p, int64_t first, int64_t last) {
    for (int64_t out = first; out < last; ++out) {
        for (int64_t i = 0; i < p.ins; i += LANES)
            *reinterpret_cast<Floats*>(p.y + out * p.ins + i) =
                Stored::whole(numbers<Stored>(p, out, i) * scale<Stored>(p, out, i), p);
    }
}

#define KERNEL(work, name, ...) \
    CLONES void work##_##name(const Product& p, int64_t first, int64_t last) { work<__VA_ARGS__>(p, first, last); }
#define KERNELS(name, ...)                    \
    KERNEL(outputs, name, __VA_ARGS__)        \
    KERNEL(weighted_rows, name, __VA_ARGS__)  \
    KERNEL(widened, name, __VA_ARGS__)

KERNELS(mxfp4, Mxfp4Apart)
KERNELS(int4_32, Int4Groups<32>)
KERNELS(int4_64, Int4Groups<64>)
KERNELS(int4_128, Int4Groups<128>)
KERNELS(nvfp4, Nvfp4<false>)
KERNELS(nvfp4_ct, Nvfp4<true>)

}  // namespace

const Format NIBBLE_FORMATS[NIBBLES] = {
    {outputs_mxfp4, weighted_rows_mxfp4, widened_mxfp4, false},
    {outputs_int4_32, weighted_rows_int4_32, widened_int4_32, false},
    {outputs_int4_64, weighted_rows_int4_64, widened_int4_64, false},
    {outputs_int4_128, weighted_rows_int4_128, widened_int4_128, false},
    {outputs_nvfp4, weighted_rows_nvfp4, widened_nvfp4, false},
    {outputs_nvfp4_ct, weighted_rows_nvfp4_ct, widened_nvfp4_ct, false},
};

// Weights in the blocks of GGUF files, on any processor. Rows are independent, and so are blocks of a row.
//
// Products are rounded before additions (no FMA), see blocks.h; so widened values equal those of formats/ggml.py too.
#if defined(__clang__)
#pragma clang fp contract(off)
#else
#pragma GCC optimize("fp-contract=off")
#endif

#include <algorithm>
#include <cstring>

#include "blocks.h"

namespace {

template <class Stored>
constexpr int64_t GROUPS = Stored::columns / GROUP;

template <class Stored>
struct Block {
    int8_t numbers[Stored::columns];
    float scales[GROUPS<Stored> * Stored::parts];
    float minima[GROUPS<Stored>];  // if it has any
};

INLINE float as_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE float half(const uint8_t* p) {  // as from_half in vectors.h
    const uint32_t raw = p[0] | p[1] << 8;
    return as_float((raw & 0x8000u) << 16 | (raw & 0x7fffu) << 13) * 0x1p112f;
}

INLINE void unpack(const uint8_t* p, Block<Q8_0>& to) {
    to.scales[0] = half(p);
    std::memcpy(to.numbers, p + 2, sizeof to.numbers);
}

// Two codes a byte: the low bits are those of the first half of a group, the high ones of the second.
INLINE void nibbles(const uint8_t* p, int64_t half, int8_t* numbers) {
    for (int64_t i = 0; i < half; ++i) {
        numbers[i] = static_cast<int8_t>(p[i] & 15);
        numbers[half + i] = static_cast<int8_t>(p[i] >> 4);
    }
}

INLINE void unpack(const uint8_t* p, Block<Q4_0>& to) {
    to.scales[0] = half(p);
    nibbles(p + 2, 16, to.numbers);
    for (int8_t& number : to.numbers) number -= 8;
}

INLINE void unpack(const uint8_t* p, Block<Q4_1>& to) {
    to.scales[0] = half(p);
    to.minima[0] = -half(p + 2);
    nibbles(p + 4, 16, to.numbers);
}

INLINE void unpack(const uint8_t* p, Block<Q5_0>& to) {
    to.scales[0] = half(p);
    nibbles(p + 6, 16, to.numbers);
    for (int i = 0; i < 32; ++i) to.numbers[i] += static_cast<int8_t>((p[2 + i / 8] >> i % 8 & 1) * 16 - 16);
}

INLINE void unpack(const uint8_t* p, Block<Mxfp4>& to) {
    to.scales[0] = as_float(p[0] < 2 ? 0x200000u << p[0] : (p[0] - 1u) << 23);  // 2 ** (p[0] - 128)
    nibbles(p + 1, 16, to.numbers);
    for (int8_t& number : to.numbers) number = E2M1[number];
}

// The first 16 bytes of Q4_K and Q5_K.
template <class Stored>
INLINE void scales_and_minima(const uint8_t* p, Block<Stored>& to) {
    const float scale = half(p), minimum = half(p + 2);
    const uint8_t *six = p + 4, *low = p + 12;  // six bits of four scales and minima, and two more bits of the others
    for (int g = 0; g < 4; ++g) {
        to.scales[g] = scale * (six[g] & 63);
        to.minima[g] = minimum * (six[4 + g] & 63);
        to.scales[4 + g] = scale * ((low[g] & 15) | (six[g] >> 6 << 4));
        to.minima[4 + g] = minimum * ((low[g] >> 4) | (six[4 + g] >> 6 << 4));
    }
}

INLINE void unpack(const uint8_t* p, Block<Q4_K>& to) {
    scales_and_minima(p, to);
    for (int i = 0; i < 4; ++i) nibbles(p + 16 + 32 * i, 32, to.numbers + 64 * i);
}

INLINE void unpack(const uint8_t* p, Block<Q5_K>& to) {
    scales_and_minima(p, to);
    for (int i = 0; i < 4; ++i) nibbles(p + 48 + 32 * i, 32, to.numbers + 64 * i);
    for (int i = 0; i < 256; ++i) to.numbers[i] += static_cast<int8_t>((p[16 + i % 32] >> i / 32 & 1) * 16);
}

INLINE void unpack(const uint8_t* p, Block<Q6_K>& to) {
    const float scale = half(p + 208);
    for (int i = 0; i < 16; ++i) to.scales[i] = scale * static_cast<int8_t>(p[192 + i]);
    for (int i = 0; i < 64; ++i) {
        const int at = i / 32 * 128 + i % 32, high = p[128 + i];
        const uint8_t* low = p + i / 32 * 64 + i % 32;
        to.numbers[at] = static_cast<int8_t>(((low[0] & 15) | (high & 3) << 4) - 32);
        to.numbers[at + 32] = static_cast<int8_t>(((low[32] & 15) | (high >> 2 & 3) << 4) - 32);
        to.numbers[at + 64] = static_cast<int8_t>((low[0] >> 4 | (high >> 4 & 3) << 4) - 32);
        to.numbers[at + 96] = static_cast<int8_t>((low[32] >> 4 | high >> 6 << 4) - 32);
    }
}

// Block `b` of weight row `out`.
template <class Stored>
INLINE const uint8_t* block_at(const Product& p, int64_t out, int64_t b) {
    return p.w + (out * (p.ins / Stored::columns) + b) * Stored::bytes;
}

// The values of a block.
template <class Stored>
INLINE void widen(const uint8_t* p, float* values) {
    constexpr int64_t part = GROUP / Stored::parts;
    Block<Stored> block;
    unpack(p, block);
    for (int64_t c = 0; c < Stored::columns; ++c) {
        values[c] = block.numbers[c] * block.scales[c / part];
        if (Stored::minima) values[c] -= block.minima[c / GROUP];
    }
}

template <class Stored>
INLINE float group_product(const Block<Stored>& block, int64_t g, const Rounded& x) {
    constexpr int64_t part = GROUP / Stored::parts;
    float sum = 0;
    for (int64_t i = 0; i < Stored::parts; ++i) {
        int32_t dot = 0;
        for (int64_t c = i * part; c < (i + 1) * part; ++c) dot += block.numbers[g * GROUP + c] * x.numbers[c];
        const float scaled = static_cast<float>(dot) * block.scales[g * Stored::parts + i];
        sum = i ? sum + scaled : scaled;
    }
    if (Stored::minima) sum -= static_cast<float>(x.sum()) * block.minima[g];
    return sum * x.scale;
}

// Rounded activations. A block is unpacked once for all rows.
template <class Stored>
INLINE void outputs(const Product& p, int64_t first, int64_t last) {
    for (int64_t out = first; out < last; ++out) {
        float* y = p.y + out - p.origin;
        for (int64_t row = 0; row < p.rows; ++row) y[row * p.stride] = 0;
        for (int64_t b = 0; b < p.ins / Stored::columns; ++b) {
            Block<Stored> block;
            unpack(block_at<Stored>(p, out, b), block);
            for (int64_t row = 0; row < p.rows; ++row) {
                const Rounded* x = p.rounded + row * groups_of(p.ins) + b * GROUPS<Stored>;
                for (int64_t g = 0; g < GROUPS<Stored>; ++g) y[row * p.stride] += group_product(block, g, x[g]);
            }
        }
    }
}

// Unrounded activations.
template <class Stored>
INLINE void exact(const Product& p, int64_t first, int64_t last) {
    constexpr int64_t MANY = 8;  // rows that share widened values
    for (int64_t row = 0; row < p.rows; row += MANY) {
        const int64_t rows = std::min(MANY, p.rows - row);
        for (int64_t out = first; out < last; ++out) {
            Floats totals[MANY] = {};
            for (int64_t b = 0; b < p.ins / Stored::columns; ++b) {
                float values[Stored::columns];
                widen<Stored>(block_at<Stored>(p, out, b), values);
                for (int64_t r = 0; r < rows; ++r) {
                    const float* x = p.x + (row + r) * p.ins + b * Stored::columns;
                    for (int64_t c = 0; c < Stored::columns; c += LANES)
                        totals[r] += *reinterpret_cast<Floats*>(values + c) * *reinterpret_cast<const Floats*>(x + c);
                }
            }
            for (int64_t r = 0; r < rows; ++r) {
                float total = 0;
                for (int i = 0; i < LANES; ++i) total += totals[r][i];
                p.y[(row + r) * p.stride + out - p.origin] = total;
            }
        }
    }
}

// Format::weighted_rows, in the order of the weight rows.
template <class Stored>
INLINE void weighted_rows(const Product& p, int64_t first, int64_t last) {
    std::fill(p.y, p.y + p.rows * p.ins, 0.0f);
    for (int64_t n = first; n < last; ++n) {
        for (int64_t b = 0; b < p.ins / Stored::columns; ++b) {
            float values[Stored::columns];
            widen<Stored>(block_at<Stored>(p, n, b), values);
            for (int64_t r = 0; r < p.rows; ++r) {
                const float x = p.x[r * p.stride + n - first];
                float* y = p.y + r * p.ins + b * Stored::columns;
                for (int64_t c = 0; c < Stored::columns; ++c) y[c] += x * values[c];
            }
        }
    }
}

template <class Stored>
INLINE void widened(const Product& p, int64_t first, int64_t last) {
    for (int64_t out = first; out < last; ++out)
        for (int64_t b = 0; b < p.ins / Stored::columns; ++b)
            widen<Stored>(block_at<Stored>(p, out, b), p.y + out * p.ins + b * Stored::columns);
}

#define KERNEL(name, work, Stored) \
    CLONES void name##_##Stored(const Product& p, int64_t first, int64_t last) { work<Stored>(p, first, last); }
#define KERNELS(Stored)                  \
    KERNEL(outputs, outputs, Stored)     \
    KERNEL(exact, exact, Stored)         \
    KERNEL(rows, weighted_rows, Stored)  \
    KERNEL(widened, widened, Stored)

KERNELS(Q8_0)
KERNELS(Q4_0)
KERNELS(Q4_1)
KERNELS(Q5_0)
KERNELS(Q4_K)
KERNELS(Q5_K)
KERNELS(Q6_K)
KERNELS(Mxfp4)

Work best(int number, Work plain) {
    const Work* x86 = ggml_outputs_x86();
    return x86 ? x86[number] : plain;
}

}  // namespace

const Format GGML_FORMATS[GGML] = {
    {best(0, outputs_Q8_0), rows_Q8_0, widened_Q8_0, true},
    {best(1, outputs_Q4_0), rows_Q4_0, widened_Q4_0, true},
    {best(2, outputs_Q4_1), rows_Q4_1, widened_Q4_1, true},
    {best(3, outputs_Q5_0), rows_Q5_0, widened_Q5_0, true},
    {best(4, outputs_Q4_K), rows_Q4_K, widened_Q4_K, true},
    {best(5, outputs_Q5_K), rows_Q5_K, widened_Q5_K, true},
    {best(6, outputs_Q6_K), rows_Q6_K, widened_Q6_K, true},
    {best(7, outputs_Mxfp4), rows_Mxfp4, widened_Mxfp4, true},
    {exact_Q8_0, rows_Q8_0, widened_Q8_0, false},
    {exact_Q4_0, rows_Q4_0, widened_Q4_0, false},
    {exact_Q4_1, rows_Q4_1, widened_Q4_1, false},
    {exact_Q5_0, rows_Q5_0, widened_Q5_0, false},
    {exact_Q4_K, rows_Q4_K, widened_Q4_K, false},
    {exact_Q5_K, rows_Q5_K, widened_Q5_K, false},
    {exact_Q6_K, rows_Q6_K, widened_Q6_K, false},
    {exact_Mxfp4, rows_Mxfp4, widened_Mxfp4, false},
};

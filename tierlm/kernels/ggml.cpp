// Weights in the blocks of GGUF files, on any processor. Rows are independent, and so are blocks of a row.
//
// Products are rounded before additions (no FMA), see blocks.h; so widened values equal those of formats/ggml.py too.
#if defined(__clang__)
#pragma clang fp contract(off)
#else
#pragma GCC optimize("fp-contract=off")
#endif

#include <algorithm>

#include "unpack.h"

namespace {

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
        if (Stored::minima) values[c] -= block.minima[c / part];
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
    if (Stored::minima)
        for (int64_t i = 0; i < Stored::parts; ++i)
            sum -= static_cast<float>(sum_of<Stored>(x, i)) * block.minima[g * Stored::parts + i];
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
    void name##_##Stored(const Product& p, int64_t first, int64_t last) { work<Stored>(p, first, last); }
// Processors with clones use x86 kernels for products of whole rows.
#define KERNELS(Stored)                        \
    KERNEL(outputs, outputs, Stored)           \
    KERNEL(exact, exact, Stored)               \
    CLONES KERNEL(rows, weighted_rows, Stored) \
    CLONES KERNEL(widened, widened, Stored)
EACH_BLOCKS(KERNELS)

#define NUMBER(Stored) NUMBER_##Stored,
enum { EACH_BLOCKS(NUMBER) COUNT };
static_assert(GGML == 2 * COUNT, "all, each with rounded and unrounded activations");

Work best(int number, Work plain) {
    const Work* x86 = ggml_outputs_avx512();
    if (!x86) x86 = ggml_outputs_avx2();
    return x86 ? x86[number] : plain;
}

}  // namespace

#define ROUNDED(Stored) {best(NUMBER_##Stored, outputs_##Stored), rows_##Stored, widened_##Stored, true},
#define UNROUNDED(Stored) {best(COUNT + NUMBER_##Stored, exact_##Stored), rows_##Stored, widened_##Stored, false},
const Format GGML_FORMATS[GGML] = {EACH_BLOCKS(ROUNDED) EACH_BLOCKS(UNROUNDED)};

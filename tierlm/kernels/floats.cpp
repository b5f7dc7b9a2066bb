// Weights stored as floats: widened in registers, multiplied and summed in float32.

#include <algorithm>
#include <cstring>

#include "product.h"

namespace {

// Each struct loads LANES stored values as float32.
struct Float32 {
    static constexpr int size = 4;
    static INLINE Floats load(const uint8_t* p) { return *reinterpret_cast<const Floats*>(p); }
};

struct BFloat16 {
    static constexpr int size = 2;
    static INLINE Floats load(const uint8_t* p) {
        Words bits = __builtin_convertvector(*reinterpret_cast<const Halves*>(p), Words) << 16;
        return reinterpret_cast<Floats>(bits);
    }
};

struct Float16 {
    static constexpr int size = 2;
    static INLINE Floats load(const uint8_t* p) { return from_half(p); }
};

struct Float8 {  // e4m3
    static constexpr int size = 1;
    static INLINE Floats load(const uint8_t* p) {
        // Two conversions of one instruction each; compilers split a single one badly.
        Words raw = __builtin_convertvector(__builtin_convertvector(*reinterpret_cast<const Bytes*>(p), Halves), Words);
        Words bits = ((raw & 0x80u) << 24) | ((raw & 0x7fu) << 20);
        return reinterpret_cast<Floats>(bits) * 0x1p120f;
    }
};

INLINE float sum(Floats v) {
    float total = 0;
    for (int i = 0; i < LANES; ++i) total += v[i];
    return total;
}

// OUTS weight rows times ROWS activation rows, starting at weight row `out` and activation row `row`. Each pair has two
// accumulators, for even and odd vectors, and a scalar one for the remaining columns.
template <class Stored, int OUTS, int ROWS>
INLINE void tile(const Product& p, int64_t out, int64_t row) {
    const auto* scales = static_cast<const float*>(p.scale);
    const int64_t width = scales ? BLOCK : p.ins;
    const int64_t blocks = (p.ins + BLOCK - 1) / BLOCK;
    Floats total[OUTS][ROWS] = {};
    float rest[OUTS][ROWS] = {};
    for (int64_t start = 0; start < p.ins; start += width) {
        const int64_t end = start + width < p.ins ? start + width : p.ins;
        Floats even[OUTS][ROWS] = {}, odd[OUTS][ROWS] = {};
        int64_t i = start;
        for (; i + 2 * LANES <= end; i += 2 * LANES) {
            for (int o = 0; o < OUTS; ++o) {
                const uint8_t* w = p.w + ((out + o) * p.ins + i) * Stored::size;
                const Floats first = Stored::load(w), second = Stored::load(w + LANES * Stored::size);
                for (int r = 0; r < ROWS; ++r) {
                    const float* x = p.x + (row + r) * p.ins + i;
                    even[o][r] += first * *reinterpret_cast<const Floats*>(x);
                    odd[o][r] += second * *reinterpret_cast<const Floats*>(x + LANES);
                }
            }
        }
        for (int o = 0; o < OUTS; ++o) {
            const float scale = scales ? scales[(out + o) / BLOCK * blocks + start / BLOCK] : 1.0f;
            for (int r = 0; r < ROWS; ++r) total[o][r] += (even[o][r] + odd[o][r]) * scale;
            for (int64_t j = i; j < end; ++j) {
                uint8_t one[LANES * 4] = {};
                std::memcpy(one, p.w + ((out + o) * p.ins + j) * Stored::size, Stored::size);
                const float weight = Stored::load(one)[0] * scale;
                for (int r = 0; r < ROWS; ++r) rest[o][r] += weight * p.x[(row + r) * p.ins + j];
            }
        }
    }
    for (int o = 0; o < OUTS; ++o)
        for (int r = 0; r < ROWS; ++r) p.y[(row + r) * p.stride + out + o - p.origin] = sum(total[o][r]) + rest[o][r];
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

// Adds COUNT weight rows, starting at `n`, to y in order.
template <class Stored, int COUNT>
INLINE void add_rows(const Product& p, const float* x, int64_t n, float* y) {
    const auto* scales = static_cast<const float*>(p.scale);
    const int64_t blocks = (p.ins + BLOCK - 1) / BLOCK;
    const uint8_t* w = p.w + n * p.ins * Stored::size;
    for (int64_t i = 0; i < p.ins;) {
        float factors[COUNT];
        for (int k = 0; k < COUNT; ++k)
            factors[k] = x[k] * (scales ? scales[(n + k) / BLOCK * blocks + i / BLOCK] : 1.0f);
        const int64_t end = scales ? std::min(p.ins, (i / BLOCK + 1) * BLOCK) : p.ins;
        for (; i + LANES <= end; i += LANES) {
            Floats sum = *reinterpret_cast<Floats*>(y + i);
            for (int k = 0; k < COUNT; ++k) sum += Stored::load(w + (k * p.ins + i) * Stored::size) * factors[k];
            *reinterpret_cast<Floats*>(y + i) = sum;
        }
        for (; i < end; ++i) {
            for (int k = 0; k < COUNT; ++k) {
                uint8_t one[LANES * 4] = {};
                std::memcpy(one, w + (k * p.ins + i) * Stored::size, Stored::size);
                y[i] += Stored::load(one)[0] * factors[k];
            }
        }
    }
}

// Sums the weight rows in order; a run of them stays in cache for all rows of x.
template <class Stored>
INLINE void weighted_rows(const Product& p, int64_t first, int64_t last) {
    constexpr int64_t RUN = 64;
    for (int64_t r = 0; r < p.rows; ++r) std::fill(p.y + r * p.ins, p.y + (r + 1) * p.ins, 0.0f);
    for (int64_t start = first; start < last; start += RUN) {
        const int64_t end = std::min(last, start + RUN);
        for (int64_t r = 0; r < p.rows; ++r) {
            const float* x = p.x + r * p.stride - first;
            float* y = p.y + r * p.ins;
            int64_t n = start;
            for (; n + 4 <= end; n += 4) add_rows<Stored, 4>(p, x + n, n, y);
            for (; n < end; ++n) add_rows<Stored, 1>(p, x + n, n, y);
        }
    }
}

CLONES void outputs_float32(const Product& p, int64_t first, int64_t last) { outputs<Float32>(p, first, last); }
CLONES void outputs_bfloat16(const Product& p, int64_t first, int64_t last) { outputs<BFloat16>(p, first, last); }
CLONES void outputs_float16(const Product& p, int64_t first, int64_t last) { outputs<Float16>(p, first, last); }
CLONES void outputs_float8(const Product& p, int64_t first, int64_t last) { outputs<Float8>(p, first, last); }

CLONES void rows_float32(const Product& p, int64_t first, int64_t last) { weighted_rows<Float32>(p, first, last); }
CLONES void rows_bfloat16(const Product& p, int64_t first, int64_t last) { weighted_rows<BFloat16>(p, first, last); }
CLONES void rows_float16(const Product& p, int64_t first, int64_t last) { weighted_rows<Float16>(p, first, last); }
CLONES void rows_float8(const Product& p, int64_t first, int64_t last) { weighted_rows<Float8>(p, first, last); }

// Float8 weight rows `first` to `last` as float32, into y [outs, ins].
CLONES void widened_float8(const Product& p, int64_t first, int64_t last) {
    const int64_t blocks = (p.ins + BLOCK - 1) / BLOCK;
    for (int64_t out = first; out < last; ++out) {
        const uint8_t* w = p.w + out * p.ins;
        float* y = p.y + out * p.ins;
        for (int64_t i = 0; i < p.ins;) {
            const float scale = static_cast<const float*>(p.scale)[out / BLOCK * blocks + i / BLOCK];
            const int64_t end = std::min(p.ins, (i / BLOCK + 1) * BLOCK);
            for (; i + LANES <= end; i += LANES) *reinterpret_cast<Floats*>(y + i) = Float8::load(w + i) * scale;
            for (; i < end; ++i) {
                uint8_t one[LANES] = {w[i]};
                y[i] = Float8::load(one)[0] * scale;
            }
        }
    }
}

Work best(int number, Work plain) {
    const Work* avx512 = float_outputs_avx512();
    return avx512 ? avx512[number] : plain;
}

}  // namespace

const Format FLOAT_FORMATS[FLOATS] = {
    {best(0, outputs_float32), rows_float32, nullptr, false},
    {best(1, outputs_bfloat16), rows_bfloat16, nullptr, false},
    {best(2, outputs_float16), rows_float16, nullptr, false},
    {best(3, outputs_float8), rows_float8, widened_float8, false},
};

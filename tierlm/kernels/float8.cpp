// float8 (e4m3) with scales of rows, of the whole weight, or of blocks in bfloat16; floats.cpp has blocks in float32. It is
// widened in registers, multiplied and summed in float32.

#include <algorithm>
#include <cstring>

#include "product.h"

namespace {

typedef int8_t SignedBytes __attribute__((vector_size(LANES), aligned(1), may_alias));
typedef int16_t SignedHalves __attribute__((vector_size(LANES * 2)));

INLINE Floats load(const uint8_t* p) {
    // Two conversions of one instruction each, which copy the sign; compilers split a single one badly.
    const auto raw = __builtin_convertvector(*reinterpret_cast<const SignedBytes*>(p), SignedHalves);
    const Words bits = reinterpret_cast<Words>(__builtin_convertvector(raw, Ints)) << 20 & 0x87f00000u;
    return reinterpret_cast<Floats>(bits) * 0x1p120f;
}

// The last `count` columns of a row, then zeros.
INLINE Floats load_some(const uint8_t* p, int64_t count) {
    uint8_t some[LANES] = {};
    std::memcpy(some, p, count);
    return load(some);
}

INLINE float value_of(const void* p, int64_t at, float) { return static_cast<const float*>(p)[at]; }
INLINE float value_of(const void* p, int64_t at, uint16_t) {  // bfloat16
    const uint32_t bits = static_cast<uint32_t>(static_cast<const uint16_t*>(p)[at]) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// Each struct finds the scale of a value. `width`: columns that share it; 0: all. T: float, or bfloat16's bits.
template <class T>
struct Blocks {
    static constexpr int64_t width = BLOCK;
    static INLINE float scale(const Product& p, int64_t out, int64_t column) {
        return value_of(p.scale, out / BLOCK * ((p.ins + BLOCK - 1) / BLOCK) + column / BLOCK, T{});
    }
};

template <class T>
struct Rows {
    static constexpr int64_t width = 0;
    static INLINE float scale(const Product& p, int64_t out, int64_t) { return value_of(p.scale, out, T{}); }
};

template <class T>
struct Whole {
    static constexpr int64_t width = 0;
    static INLINE float scale(const Product& p, int64_t, int64_t) { return value_of(p.extra, 0, T{}); }
};

INLINE Floats activations(const float* x, int64_t count) {
    Floats some = {};
    std::memcpy(&some, x, count * sizeof(float));
    return some;
}

// OUTS weight rows times ROWS activation rows. Each pair has two accumulators, for even and odd vectors.
template <class Scales, int OUTS, int ROWS>
INLINE void tile(const Product& p, int64_t out, int64_t row) {
    const int64_t width = Scales::width ? Scales::width : p.ins;
    Floats total[OUTS][ROWS] = {};
    for (int64_t start = 0; start < p.ins; start += width) {
        const int64_t end = std::min(p.ins, start + width);
        Floats even[OUTS][ROWS] = {}, odd[OUTS][ROWS] = {};
        int64_t i = start;
        for (; i + 2 * LANES <= end; i += 2 * LANES) {
            for (int o = 0; o < OUTS; ++o) {
                const uint8_t* w = p.w + (out + o) * p.ins + i;
                const Floats first = load(w), second = load(w + LANES);
                for (int r = 0; r < ROWS; ++r) {
                    const float* x = p.x + (row + r) * p.ins + i;
                    even[o][r] += first * *reinterpret_cast<const Floats*>(x);
                    odd[o][r] += second * *reinterpret_cast<const Floats*>(x + LANES);
                }
            }
        }
        for (; i < end; i += LANES) {
            const int64_t count = std::min<int64_t>(LANES, end - i);
            for (int o = 0; o < OUTS; ++o) {
                const Floats w = load_some(p.w + (out + o) * p.ins + i, count);
                for (int r = 0; r < ROWS; ++r) even[o][r] += w * activations(p.x + (row + r) * p.ins + i, count);
            }
        }
        for (int o = 0; o < OUTS; ++o) {
            const float scale = Scales::scale(p, out + o, start);
            for (int r = 0; r < ROWS; ++r) total[o][r] += (even[o][r] + odd[o][r]) * scale;
        }
    }
    for (int o = 0; o < OUTS; ++o) {
        for (int r = 0; r < ROWS; ++r) {
            float sum = 0;
            for (int i = 0; i < LANES; ++i) sum += total[o][r][i];
            p.y[(row + r) * p.stride + out + o - p.origin] = sum;
        }
    }
}

template <class Scales>
INLINE void outputs(const Product& p, int64_t first, int64_t last) {
    int64_t row = 0;
    for (; row + 4 <= p.rows; row += 4) {
        for (int64_t out = first; out < last; ++out) tile<Scales, 1, 4>(p, out, row);
    }
    for (; row < p.rows; ++row) {
        int64_t out = first;
        for (; out + 4 <= last; out += 4) tile<Scales, 4, 1>(p, out, row);
        for (; out < last; ++out) tile<Scales, 1, 1>(p, out, row);
    }
}

// Calls use(i, count, values) for each vector of weight row `out`.
template <class Scales, class Use>
INLINE void each_vector(const Product& p, int64_t out, Use use) {
    const uint8_t* w = p.w + out * p.ins;
    int64_t i = 0;
    for (; i + LANES <= p.ins; i += LANES) use(i, LANES, load(w + i) * Scales::scale(p, out, i));
    if (i < p.ins) use(i, p.ins - i, load_some(w + i, p.ins - i) * Scales::scale(p, out, i));
}

// Format::weighted_rows, in the order of the weight rows.
template <class Scales>
INLINE void weighted_rows(const Product& p, int64_t first, int64_t last) {
    std::fill(p.y, p.y + p.rows * p.ins, 0.0f);
    for (int64_t n = first; n < last; ++n) {
        each_vector<Scales>(p, n, [&](int64_t i, int64_t count, Floats w) {
            for (int64_t r = 0; r < p.rows; ++r) {
                float* y = p.y + r * p.ins + i;
                const Floats sum = activations(y, count) + w * p.x[r * p.stride + n - first];
                std::memcpy(y, &sum, count * sizeof(float));
            }
        });
    }
}

template <class Scales>
INLINE void widened(const Product& p, int64_t first, int64_t last) {
    for (int64_t out = first; out < last; ++out) {
        each_vector<Scales>(p, out, [&](int64_t i, int64_t count, Floats w) {
            std::memcpy(p.y + out * p.ins + i, &w, count * sizeof(float));
        });
    }
}

#define KERNEL(work, name, ...) \
    CLONES void work##_##name(const Product& p, int64_t first, int64_t last) { work<__VA_ARGS__>(p, first, last); }
#define KERNELS(name, ...)                   \
    KERNEL(outputs, name, __VA_ARGS__)       \
    KERNEL(weighted_rows, name, __VA_ARGS__) \
    KERNEL(widened, name, __VA_ARGS__)

KERNELS(blocks, Blocks<uint16_t>)
KERNELS(rows, Rows<float>)
KERNELS(bfloat_rows, Rows<uint16_t>)
KERNELS(whole, Whole<float>)
KERNELS(bfloat_whole, Whole<uint16_t>)

}  // namespace

const Format FLOAT8_FORMATS[FLOAT8] = {
    {outputs_blocks, weighted_rows_blocks, widened_blocks, false},
    {outputs_rows, weighted_rows_rows, widened_rows, false},
    {outputs_bfloat_rows, weighted_rows_bfloat_rows, widened_bfloat_rows, false},
    {outputs_whole, weighted_rows_whole, widened_whole, false},
    {outputs_bfloat_whole, weighted_rows_bfloat_whole, widened_bfloat_whole, false},
};

// Products of a few float32 rows with weights as they are stored.
//
// The threads are OpenMP's, and in practice torch's own: a second pool beside it would fight it for the cores, since
// either keeps its idle threads spinning for a while. Plain C interface, called through ctypes; no dependency but the
// compiler. Vector code is written with the compiler's own vector types and compiled once per instruction set; the best
// one is chosen when the library is loaded.
//
// Every output is computed by one thread, over the columns in one fixed order, whatever the number of threads, rows or
// neighbours: results depend on the operands alone.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif
#define INLINE inline __attribute__((always_inline))

namespace {

constexpr int LANES = 8;
constexpr int64_t BLOCK = 128;  // columns (and rows) that share one scale in block-scaled float8

typedef float Floats __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint32_t Words __attribute__((vector_size(LANES * 4)));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));
typedef uint16_t Halves __attribute__((vector_size(LANES * 2), aligned(1), may_alias));
typedef uint8_t Bytes __attribute__((vector_size(LANES), aligned(1), may_alias));

// How LANES stored values become float32, and one of them.
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

// Exponent and mantissa are moved into place and the difference of the exponents' biases multiplied in, which is right
// for subnormal numbers as well. Infinities and NaN become large numbers: a weight is neither.
struct Float16 {
    static constexpr int size = 2;
    static INLINE Floats load(const uint8_t* p) {
        Words raw = __builtin_convertvector(*reinterpret_cast<const Halves*>(p), Words);
        Words bits = ((raw & 0x8000u) << 16) | ((raw & 0x7fffu) << 13);
        return reinterpret_cast<Floats>(bits) * 0x1p112f;
    }
};

struct Float8 {  // e4m3
    static constexpr int size = 1;
    static INLINE Floats load(const uint8_t* p) {
        // In two steps, each of which is one instruction; compilers take the one step apart.
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

struct Product {
    const float* x;        // [rows, ins]
    const uint8_t* w;      // [outs, ins] as stored
    const float* scale;    // [ceil(outs / BLOCK), ceil(ins / BLOCK)] or null
    float* y;              // [rows, outs], rows `stride` floats apart
    int64_t rows, ins, outs, stride;
    int64_t origin = 0;    // the weight row that y begins with
};

// OUTS weight rows against ROWS activation rows, from the first weight row `out` and activation row `row`.
// Two accumulators for each pair, over even and odd vectors; then what does not fill a vector, one by one.
template <class Format, int OUTS, int ROWS>
INLINE void tile(const Product& p, int64_t out, int64_t row) {
    const int64_t width = p.scale ? BLOCK : p.ins;
    const int64_t blocks = (p.ins + BLOCK - 1) / BLOCK;
    Floats total[OUTS][ROWS] = {};
    float rest[OUTS][ROWS] = {};
    for (int64_t start = 0; start < p.ins; start += width) {
        const int64_t end = start + width < p.ins ? start + width : p.ins;
        Floats even[OUTS][ROWS] = {}, odd[OUTS][ROWS] = {};
        int64_t i = start;
        for (; i + 2 * LANES <= end; i += 2 * LANES) {
            for (int o = 0; o < OUTS; ++o) {
                const uint8_t* w = p.w + ((out + o) * p.ins + i) * Format::size;
                const Floats first = Format::load(w), second = Format::load(w + LANES * Format::size);
                for (int r = 0; r < ROWS; ++r) {
                    const float* x = p.x + (row + r) * p.ins + i;
                    even[o][r] += first * *reinterpret_cast<const Floats*>(x);
                    odd[o][r] += second * *reinterpret_cast<const Floats*>(x + LANES);
                }
            }
        }
        for (int o = 0; o < OUTS; ++o) {
            const float scale = p.scale ? p.scale[(out + o) / BLOCK * blocks + start / BLOCK] : 1.0f;
            for (int r = 0; r < ROWS; ++r) total[o][r] += (even[o][r] + odd[o][r]) * scale;
            for (int64_t j = i; j < end; ++j) {
                uint8_t one[LANES * 4] = {};
                std::memcpy(one, p.w + ((out + o) * p.ins + j) * Format::size, Format::size);
                const float weight = Format::load(one)[0] * scale;
                for (int r = 0; r < ROWS; ++r) rest[o][r] += weight * p.x[(row + r) * p.ins + j];
            }
        }
    }
    for (int o = 0; o < OUTS; ++o)
        for (int r = 0; r < ROWS; ++r) p.y[(row + r) * p.stride + out + o - p.origin] = sum(total[o][r]) + rest[o][r];
}

template <class Format>
INLINE void outputs(const Product& p, int64_t first, int64_t last) {
    int64_t row = 0;
    for (; row + 4 <= p.rows; row += 4) {
        for (int64_t out = first; out < last; ++out) tile<Format, 1, 4>(p, out, row);
    }
    for (; row < p.rows; ++row) {
        int64_t out = first;
        for (; out + 4 <= last; out += 4) tile<Format, 4, 1>(p, out, row);
        for (; out < last; ++out) tile<Format, 1, 1>(p, out, row);
    }
}

// y[r, :] = sum over the weight rows n in [first, last) of x[r, n - first] * w[n, :], r < rows: y [rows, ins], x rows
// `stride` floats apart. The rows of w are added up in order.
template <class Format>
INLINE void weighted_rows(const Product& p, int64_t first, int64_t last) {
    const int64_t blocks = (p.ins + BLOCK - 1) / BLOCK;
    for (int64_t r = 0; r < p.rows; ++r) {
        float* y = p.y + r * p.ins;
        const float* x = p.x + r * p.stride;
        std::fill(y, y + p.ins, 0.0f);
        for (int64_t n = first; n < last; ++n) {
            const uint8_t* w = p.w + n * p.ins * Format::size;
            for (int64_t i = 0; i < p.ins;) {
                const float factor = x[n - first] * (p.scale ? p.scale[n / BLOCK * blocks + i / BLOCK] : 1.0f);
                const int64_t end = p.scale ? std::min(p.ins, (i / BLOCK + 1) * BLOCK) : p.ins;
                for (; i + LANES <= end; i += LANES)
                    *reinterpret_cast<Floats*>(y + i) += Format::load(w + i * Format::size) * factor;
                for (; i < end; ++i) {
                    uint8_t one[LANES * 4] = {};
                    std::memcpy(one, w + i * Format::size, Format::size);
                    y[i] += Format::load(one)[0] * factor;
                }
            }
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

// e^x by 2^n e^r, |r| <= ln(2) / 2, with a polynomial for e^r (Cephes, expf.c): within 2 units in the last place.
INLINE Floats exponential(Floats x) {
    const Floats low = Floats{} - 87.0f, high = Floats{} + 88.0f;
    x = x < low ? low : x > high ? high : x;
    const Ints n = __builtin_convertvector(x * 1.44269504f + (x < 0.0f ? Floats{} - 0.5f : Floats{} + 0.5f), Ints);
    const Floats whole = __builtin_convertvector(n, Floats);
    const Floats r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    Floats p = 1.9875691500e-4f * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    return (p * r * r + r + 1.0f) * reinterpret_cast<Floats>((n + 127) << 23);
}

// gate = silu(gate) * up, of `count` values.
CLONES void gated(float* gate, const float* up, int64_t count) {
    for (int64_t i = 0; i < count; i += LANES) {
        Floats g = {}, u = {};
        const size_t size = std::min<int64_t>(LANES, count - i) * sizeof(float);
        std::memcpy(&g, gate + i, size);
        std::memcpy(&u, up + i, size);
        g = g / (1.0f + exponential(-g)) * u;
        std::memcpy(gate + i, &g, size);
    }
}

// Float8 weight rows `first` to `last` as float32, into y [outs, ins].
CLONES void widened_float8(const Product& p, int64_t first, int64_t last) {
    const int64_t blocks = (p.ins + BLOCK - 1) / BLOCK;
    for (int64_t out = first; out < last; ++out) {
        const uint8_t* w = p.w + out * p.ins;
        float* y = p.y + out * p.ins;
        for (int64_t i = 0; i < p.ins;) {
            const float scale = p.scale[out / BLOCK * blocks + i / BLOCK];
            const int64_t end = std::min(p.ins, (i / BLOCK + 1) * BLOCK);
            for (; i + LANES <= end; i += LANES) *reinterpret_cast<Floats*>(y + i) = Float8::load(w + i) * scale;
            for (; i < end; ++i) {
                uint8_t one[LANES] = {w[i]};
                y[i] = Float8::load(one)[0] * scale;
            }
        }
    }
}

using Work = void (*)(const Product&, int64_t, int64_t);
constexpr Work OUTPUTS[] = {outputs_float32, outputs_bfloat16, outputs_float16, outputs_float8};
constexpr Work WEIGHTED_ROWS[] = {rows_float32, rows_bfloat16, rows_float16, rows_float8};

// Work is shared out by weight rows, in pieces of about 64 Ki weights: long enough to outweigh the hand-over, short
// enough to end together.
int64_t piece_of(int64_t ins) { return std::max<int64_t>(4, (65536 / std::max<int64_t>(ins, 1)) & ~int64_t{3}); }

void share(int threads, Work work, const Product& product) {
    const int64_t outs = product.outs, piece = piece_of(product.ins), pieces = (outs + piece - 1) / piece;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (pieces > 1)
    for (int64_t i = 0; i < pieces; ++i) work(product, i * piece, std::min(outs, (i + 1) * piece));
}

}  // namespace

extern "C" {

// `format` counts float32, bfloat16, float16, block-scaled float8.

// y = x @ w.T
void tierlm_linear(int threads, int format, const float* x, const void* w, const float* scale, float* y, int64_t rows,
                   int64_t ins, int64_t outs, int64_t stride) {
    share(threads, OUTPUTS[format], Product{x, static_cast<const uint8_t*>(w), scale, y, rows, ins, outs, stride});
}

// y = w, block-scaled float8, as float32. Row 0 of `w` is the first of a block of scales.
void tierlm_widen_float8(int threads, const void* w, const float* scale, float* y, int64_t ins, int64_t outs) {
    share(threads, widened_float8, Product{nullptr, static_cast<const uint8_t*>(w), scale, y, 0, ins, outs, 0});
}

// One expert and the rows that chose it.
struct Expert {
    const float* x;  // [rows, hidden]
    const void *gate, *up, *down;
    const float *gate_scale, *up_scale, *down_scale;
    float *inner, *scratch;  // [rows, width] each
    float* y;                // [rows, hidden]
    int64_t rows;
};

// y = down(silu(gate(x)) * up(x)) of several experts at once: the threads are woken once for all of them.
void tierlm_gated_mlps(int threads, int format, const Expert* experts, int64_t count, int64_t hidden, int64_t width) {
    const Work work = OUTPUTS[format];
    const int64_t in_piece = piece_of(hidden), in_pieces = (width + in_piece - 1) / in_piece;
    const int64_t out_piece = piece_of(width), out_pieces = (hidden + out_piece - 1) / out_piece;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < count * in_pieces; ++i) {
            const Expert& e = experts[i / in_pieces];
            const int64_t first = i % in_pieces * in_piece, last = std::min(width, first + in_piece);
            const auto *gate = static_cast<const uint8_t*>(e.gate), *up = static_cast<const uint8_t*>(e.up);
            work(Product{e.x, gate, e.gate_scale, e.inner, e.rows, hidden, width, width}, first, last);
            work(Product{e.x, up, e.up_scale, e.scratch, e.rows, hidden, width, width}, first, last);
            for (int64_t row = 0; row < e.rows; ++row)
                gated(e.inner + row * width + first, e.scratch + row * width + first, last - first);
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < count * out_pieces; ++i) {
            const Expert& e = experts[i / out_pieces];
            const int64_t first = i % out_pieces * out_piece, last = std::min(hidden, first + out_piece);
            const auto* down = static_cast<const uint8_t*>(e.down);
            work(Product{e.inner, down, e.down_scale, e.y, e.rows, width, hidden, hidden}, first, last);
        }
    }
}

// The two halves of kv_b in absorbed attention, w [heads, per_head, rank] as stored, for `group` heads from `head` on.
// into: q [rows, group, nope], with these strides in floats -> latent [group, rows, rank]; a head's first `nope` rows.
void tierlm_into_latent(int threads, int format, const float* q, const void* w, const float* scale, float* latent,
                        int64_t rows, int64_t head, int64_t group, int64_t nope, int64_t per_head, int64_t rank,
                        int64_t row_stride, int64_t head_stride) {
    const auto* weights = static_cast<const uint8_t*>(w);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t h = 0; h < group; ++h) {
        const int64_t first = (head + h) * per_head;
        const Product p{q + h * head_stride, weights, scale, latent + h * rows * rank, rows, rank, 0, row_stride};
        WEIGHTED_ROWS[format](p, first, first + nope);
    }
}

// out of: mixed [group, rows, rank] -> y [rows, group, value]; a head's last `value` rows.
void tierlm_from_latent(int threads, int format, const float* mixed, const void* w, const float* scale, float* y,
                        int64_t rows, int64_t head, int64_t group, int64_t value, int64_t per_head, int64_t rank) {
    const auto* weights = static_cast<const uint8_t*>(w);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t h = 0; h < group; ++h) {
        const int64_t last = (head + h + 1) * per_head, first = last - value;
        const Product p{mixed + h * rows * rank, weights, scale, y + h * value, rows, rank, 0, group * value, first};
        OUTPUTS[format](p, first, last);
    }
}

}

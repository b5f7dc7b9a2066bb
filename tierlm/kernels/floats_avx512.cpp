// The products of floats.cpp by AVX-512. A vector holds both of its accumulators, so sums have the same order and the
// same bits as with AVX2.

#define TIERLM_AVX512

#include "x86.h"

#ifdef TIERLM_X86

#include <algorithm>
#include <memory>

namespace {

typedef float Sixteen __attribute__((vector_size(64), aligned(4), may_alias));

// Each struct loads sixteen stored values as float32.
struct Float32 {
    static constexpr int size = 4;
    STEP Values load(const uint8_t* p) { return *reinterpret_cast<const Sixteen*>(p); }
};

struct BFloat16 {
    static constexpr int size = 2;
    STEP Values load(const uint8_t* p) {
        const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
        return reinterpret_cast<Values>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
    }
};

STEP Values from_halves(__m256i raw) { return reinterpret_cast<Values>(_mm512_cvtph_ps(raw)); }

struct Float16 {
    static constexpr int size = 2;
    STEP Values load(const uint8_t* p) { return from_halves(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
};

struct Float8 {  // e4m3; as float16, a 256th of the value
    static constexpr int size = 1;
    STEP Values load(const uint8_t* p) {
        const __m256i raw = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
        const __m256i kept = _mm256_set1_epi16(static_cast<int16_t>(0xbf80));
        return from_halves(_mm256_and_si256(_mm256_slli_epi16(raw, 7), kept)) * 256.0f;
    }
};

// As bfloat16, which holds them exactly.
STEP void store_half(uint16_t* to, Values x) {
    const __m512i bits = _mm512_srli_epi32(reinterpret_cast<__m512i>(x), 16);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(bits));
}

template <class Stored>
STEP float one(const uint8_t* p) {
    uint8_t padded[64] = {};
    std::memcpy(padded, p, Stored::size);
    return Stored::load(padded)[0];
}

constexpr int OUTS = 4;  // weight rows at a time

// The sum of the two accumulators.
STEP Floats even_plus_odd(Values both) {
    const __m512d raw = reinterpret_cast<__m512d>(both);
    const __m256d odd = _mm512_extractf64x4_pd(raw, 1);
    return reinterpret_cast<Floats>(_mm512_castpd512_pd256(raw)) + reinterpret_cast<Floats>(odd);
}

// OUTS weight rows from `out` on; those past the last row repeat it. The sums are those of `tile` in floats.cpp.
template <class Stored>
struct Panel {
    const Product& p;
    int64_t out, last;

    INLINED const uint8_t* at(int o, int64_t column) const {
        return p.w + (std::min(out + o, last - 1) * p.ins + column) * Stored::size;
    }
    // Columns that share a scale.
    INLINED int64_t width() const { return p.scale ? BLOCK : p.ins; }
    INLINED float scale(int o, int64_t column) const {
        if (!p.scale) return 1.0f;
        const uint64_t row = std::min(out + o, last - 1), blocks = (p.ins + BLOCK - 1) / BLOCK;
        return static_cast<const float*>(p.scale)[row / BLOCK * blocks + static_cast<uint64_t>(column) / BLOCK];
    }
    // Adds the sums of columns with one scale. The columns from `whole` on are less than a vector.
    template <int ROWS>
    INLINED void add(const Values (&both)[OUTS][ROWS], int64_t row, int64_t whole, int64_t end,
                     Floats (&total)[OUTS][ROWS], float (&rest)[OUTS][ROWS]) const {
#pragma GCC unroll 4
        for (int o = 0; o < OUTS; ++o) {
            const float factor = scale(o, end - 1);
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; ++r) total[o][r] += even_plus_odd(both[o][r]) * factor;
        }
        for (int64_t j = whole; j < end; ++j) {
            for (int o = 0; o < OUTS; ++o) {
                const float weight = one<Stored>(at(o, j)) * scale(o, j);
                for (int r = 0; r < ROWS; ++r)
                    rest[o][r] = __builtin_fmaf(weight, p.x[(row + r) * p.ins + j], rest[o][r]);
            }
        }
    }
    template <int ROWS>
    INLINED void store(int64_t row, const Floats (&total)[OUTS][ROWS], const float (&rest)[OUTS][ROWS]) const {
        for (int o = 0; o < OUTS && out + o < last; ++o) {
            for (int r = 0; r < ROWS; ++r) {
                float sum = 0;
                for (int lane = 0; lane < LANES; ++lane) sum += total[o][r][lane];
                p.y[(row + r) * p.stride + out + o - p.origin] = sum + rest[o][r];
            }
        }
    }
};

STEP Values activations(const Product& p, int64_t row, int64_t column) {
    return *reinterpret_cast<const Sixteen*>(p.x + row * p.ins + column);
}

// Multiplies with ROWS rows of activations. Weights are widened in registers; the next panel is fetched to L2, which
// holds what several rows of weights take.
template <class Stored, int ROWS>
STEP void multiply(const Panel<Stored>& panel, int64_t row) {
    const Product& p = panel.p;
    // What is fetched ahead is not past a piece's end, and needed by the first rows of activations.
    const int64_t ahead = row == 0 && panel.out + OUTS < panel.last ? OUTS * p.ins * Stored::size : 0;
    Floats total[OUTS][ROWS] = {};
    float rest[OUTS][ROWS] = {};
    for (int64_t start = 0; start < p.ins; start += panel.width()) {
        const int64_t end = std::min(p.ins, start + panel.width());
        Values both[OUTS][ROWS] = {};
        int64_t i = start;
        for (; i + WIDTH <= end; i += WIDTH) {
            Values w[OUTS];
            for (int o = 0; o < OUTS; ++o) {
                const uint8_t* from = panel.at(o, i);
                _mm_prefetch(from + ahead, _MM_HINT_T1);
                w[o] = Stored::load(from);
            }
            for (int r = 0; r < ROWS; ++r) {
                const Values x = activations(p, row + r, i);
                for (int o = 0; o < OUTS; ++o) both[o][r] += w[o] * x;
            }
        }
        panel.add(both, row, i, end, total, rest);
    }
    panel.store(row, total, rest);
}

template <class Stored, int ROWS>
STEP void all_outs(const Product& p, int64_t first, int64_t last, int64_t row) {
    for (int64_t out = first; out < last; out += OUTS) multiply<Stored, ROWS>({p, out, last}, row);
}

template <class Stored>
TARGET void outputs(const Product& p, int64_t first, int64_t last) {
    int64_t row = 0;
    for (; row + 4 <= p.rows; row += 4) all_outs<Stored, 4>(p, first, last, row);
    if (p.rows - row == 3) all_outs<Stored, 3>(p, first, last, row);
    if (p.rows - row == 2) all_outs<Stored, 2>(p, first, last, row);
    if (p.rows - row == 1) all_outs<Stored, 1>(p, first, last, row);
}

// Many rows of activations share weights in bfloat16, which holds every float8 exactly and takes fewer steps to widen.
TARGET void float8_outputs(const Product& p, int64_t first, int64_t last) {
    constexpr int64_t MANY = 16, SOME = 16;  // rows of activations, and weight rows that stay in cache
    if (p.rows < MANY) return outputs<Float8>(p, first, last);
    const std::unique_ptr<uint16_t[]> halves(new uint16_t[SOME * p.ins + WIDTH]);
    for (int64_t out = first; out < last; out += SOME) {
        const int64_t end = std::min(last, out + SOME), count = (end - out) * p.ins;
        const uint8_t* w = p.w + out * p.ins;
        for (int64_t i = 0; i + WIDTH <= count; i += WIDTH) store_half(halves.get() + i, Float8::load(w + i));
        if (count % WIDTH) {
            uint8_t padded[WIDTH] = {};
            std::memcpy(padded, w + count / WIDTH * WIDTH, count % WIDTH);
            store_half(halves.get() + count / WIDTH * WIDTH, Float8::load(padded));
        }
        Product part = p;  // its weight row `out` is the first of `halves`
        part.w = reinterpret_cast<const uint8_t*>(halves.get()) - out * p.ins * BFloat16::size;
        outputs<BFloat16>(part, out, end);
    }
}

const Work OUTPUTS[FLOATS] = {outputs<Float32>, outputs<BFloat16>, outputs<Float16>, float8_outputs};

}  // namespace

const Work* float_outputs_avx512() { return has_avx512() ? OUTPUTS : nullptr; }

#else

const Work* float_outputs_avx512() { return nullptr; }

#endif

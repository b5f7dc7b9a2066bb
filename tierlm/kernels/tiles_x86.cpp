// Rounded activations times tiles of int8 and int4 by the byte products of AVX2.

#include "x86.h"

#ifdef TIERLM_X86

#include <algorithm>

#define FMA __attribute__((target("avx2,fma,f16c")))

namespace {

STEP __m256i load(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }

struct Int4 {
    static constexpr int64_t tile = 128;
    template <int ROWS>
    STEP void add(__m256i* sums, const uint8_t* w, const Rounded* x, int64_t groups) {
        const __m256i low = _mm256_set1_epi8(15);
        for (int v = 0; v < 4; ++v) {
            const __m256i both = load(w + 32 * v);
            const __m256i lower = _mm256_and_si256(both, low);
            const __m256i upper = _mm256_and_si256(_mm256_srli_epi16(both, 4), low);
            for (int r = 0; r < ROWS; ++r) {
                const int8_t* numbers = x[r * groups].numbers + 4 * v;
                sums[r] = add4(sums[r], lower, four(numbers));
                sums[r] = add4(sums[r], upper, four(numbers + 16));
                if (ROWS > 1) settle(sums[r]);
            }
        }
        for (int r = 0; r < ROWS; ++r) sums[r] = end4(sums[r], x[r * groups].sum());
    }
};

struct Int8 {
    static constexpr int64_t tile = 256;
    template <int ROWS>
    STEP void add(__m256i* sums, const uint8_t* w, const Rounded* x, int64_t groups) {
        for (int q = 0; q < 8; ++q) {
            const __m256i quad = load(w + 32 * q);
            for (int r = 0; r < ROWS; ++r) {
                sums[r] = add8(sums[r], quad, four(x[r * groups].numbers + 4 * q));
                if (ROWS > 1) settle(sums[r]);
            }
        }
    }
};

// Prefetch distance in bytes, so that reads overlap computation. Past the end of a piece lie the weights of another
// thread, or nothing.
constexpr int64_t AHEAD = 2048;

// Unpacks each tile once for ROWS rows of activations.
template <class Stored, int ROWS>
FMA void outputs_of_rows(const Product& p, int64_t first, int64_t last, int64_t row) {
    const int64_t groups = groups_of(p.ins);
    const Rounded* x = p.rounded + row * groups;
    for (int64_t block = first / LANES; block * LANES < last; ++block) {
        const uint8_t* w = p.w + block * groups * Stored::tile;
        const auto* scales = static_cast<const uint16_t*>(p.scale) + block * groups * LANES;
        __m256 totals[ROWS];
        for (int r = 0; r < ROWS; ++r) totals[r] = _mm256_setzero_ps();
        for (int64_t g = 0; g < groups; ++g) {
            const uint8_t* tile = w + g * Stored::tile;
            for (int64_t i = 0; i < Stored::tile; i += 64) _mm_prefetch(tile + AHEAD + i, _MM_HINT_T0);
            __m256i sums[ROWS];
            for (int r = 0; r < ROWS; ++r) sums[r] = _mm256_setzero_si256();
            Stored::template add<ROWS>(sums, tile, x + g, groups);
            const __m256 scale = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(scales + g * LANES)));
            for (int r = 0; r < ROWS; ++r) {
                const __m256 factor = _mm256_mul_ps(scale, _mm256_set1_ps(x[r * groups + g].scale));
                totals[r] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[r]), factor, totals[r]);
            }
        }
        const int64_t out = block * LANES;
        for (int r = 0; r < ROWS; ++r) {
            float* y = p.y + (row + r) * p.stride + out - p.origin;
            if (last - out >= LANES) {
                _mm256_storeu_ps(y, totals[r]);
            } else {
                std::memcpy(y, &totals[r], (last - out) * sizeof(float));
            }
        }
    }
}

template <class Stored>
void outputs(const Product& p, int64_t first, int64_t last) {
    int64_t row = 0;
    for (; row + 4 <= p.rows; row += 4) outputs_of_rows<Stored, 4>(p, first, last, row);
    if (p.rows - row == 3) outputs_of_rows<Stored, 3>(p, first, last, row);
    if (p.rows - row == 2) outputs_of_rows<Stored, 2>(p, first, last, row);
    if (p.rows - row == 1) outputs_of_rows<Stored, 1>(p, first, last, row);
}

template <class Stored>
Work best() {
    return has_avx2() ? outputs<Stored> : nullptr;
}

}  // namespace

Work int8_outputs_avx2() { return best<Int8>(); }
Work int4_outputs_avx2() { return best<Int4>(); }

#else

Work int8_outputs_avx2() { return nullptr; }
Work int4_outputs_avx2() { return nullptr; }

#endif

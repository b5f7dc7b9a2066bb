// flash.h on bfloat16 by AVX-512 BF16, whose products add pairs of neighbours: of dimensions in scores, of tokens in
// values.

#include "flash.h"

#include <algorithm>

#include "vectors.h"

#if defined(__x86_64__) && !defined(TIERLM_PORTABLE)

#include <immintrin.h>

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))
#define STEP TARGET __attribute__((always_inline)) static inline

namespace {

typedef __m512 Values;

STEP __m512bh pairs(__m512i x) { return reinterpret_cast<__m512bh>(x); }

// Two neighbouring numbers in each lane.
STEP __m512bh both(const void* p) {
    int32_t two;
    __builtin_memcpy(&two, p, sizeof two);
    return pairs(_mm512_set1_epi32(two));
}

// The numbers of `low` and `high` in turn.
STEP __m512i interleaved(__m512i low_high) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, low_high);
}

STEP __m512i rounded_pairs(Values low, Values high) {
    return interleaved(reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low)));
}

// [dim / 2, QUERIES, 2]
TARGET void pack(const float* rows, int64_t count, int64_t row_stride, int64_t stride, int64_t dim, float scale,
                 void* packed) {
    auto* to = static_cast<uint16_t*>(packed);
    const __m512i lanes = _mm512_mullo_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
                                             _mm512_set1_epi32(static_cast<int>(row_stride)));
    const __mmask16 some = static_cast<__mmask16>((1u << count) - 1u);
    for (int64_t d = 0; d < dim; d += 2) {
        const Values low = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), some, lanes, rows + d * stride, 4);
        const Values high = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), some, lanes, rows + (d + 1) * stride, 4);
        const Values factor = _mm512_set1_ps(scale);
        _mm512_storeu_si512(to + d * QUERIES, rounded_pairs(_mm512_mul_ps(low, factor), _mm512_mul_ps(high, factor)));
    }
}

template <int COUNT>
STEP void dots_of(const uint16_t* queries, const uint8_t* tokens, int64_t pitch, int64_t dim, float* sums) {
    Values found[COUNT];
    for (int k = 0; k < COUNT; ++k) found[k] = _mm512_setzero_ps();
    for (int64_t d = 0; d < dim; d += 2) {
        const __m512bh query = pairs(_mm512_loadu_si512(queries + d * QUERIES));
#pragma GCC unroll 16
        for (int k = 0; k < COUNT; ++k) found[k] = _mm512_dpbf16_ps(found[k], query, both(tokens + k * pitch + d * 2));
    }
    for (int k = 0; k < COUNT; ++k) _mm512_storeu_ps(sums + k * QUERIES, found[k]);
}

TARGET void dots(const void* packed, const uint8_t* tokens, int64_t pitch, int64_t count, int64_t dim, float* sums) {
    const auto* queries = static_cast<const uint16_t*>(packed);
    int64_t t = 0;
    for (; t + 8 <= count; t += 8) dots_of<8>(queries, tokens + t * pitch, pitch, dim, sums + t * QUERIES);
    for (; t < count; ++t) dots_of<1>(queries, tokens + t * pitch, pitch, dim, sums + t * QUERIES);
}

// e^x for x <= 0, as in exponential.h.
STEP Values exponential(Values x) {
    x = _mm512_max_ps(_mm512_set1_ps(-87.0f), x);  // NaN stays NaN
    const Values n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
    Values r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fmadd_ps(n, _mm512_set1_ps(2.12194440e-4f), r);
    Values p = _mm512_fmadd_ps(_mm512_set1_ps(1.9875691500e-4f), r, _mm512_set1_ps(1.3981999507e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
    p = _mm512_fmadd_ps(_mm512_mul_ps(p, r), r, _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
    return _mm512_scalef_ps(p, n);
}

// The weight of a score; NaN is not unseen.
STEP Values weight_of(Values score, Values peak) {
    const __mmask16 seen = _mm512_cmp_ps_mask(score, _mm512_set1_ps(UNSEEN), _CMP_NLE_UQ);
    return _mm512_maskz_mov_ps(seen, exponential(_mm512_sub_ps(score, peak)));
}

// Turns scores into weights, pairs of tokens in each lane, in place, and updates peaks and sums. Returns the factors of
// what was seen before.
STEP Values weigh(float* scores, int64_t count, const Seen& seen) {
    const Values before = _mm512_loadu_ps(seen.peaks);
    Values peak = before, sum = _mm512_setzero_ps();
    for (int64_t t = 0; t < count; ++t) peak = _mm512_max_ps(_mm512_loadu_ps(scores + t * QUERIES), peak);
    for (int64_t t = 0; t < count; t += 2) {
        const Values low = weight_of(_mm512_loadu_ps(scores + t * QUERIES), peak);
        Values high = _mm512_setzero_ps();
        if (t + 1 < count) high = weight_of(_mm512_loadu_ps(scores + (t + 1) * QUERIES), peak);
        sum = _mm512_add_ps(sum, _mm512_add_ps(low, high));
        _mm512_storeu_si512(scores + t / 2 * QUERIES, rounded_pairs(low, high));
    }
    const Values factor = exponential(_mm512_sub_ps(before, peak));
    _mm512_storeu_ps(seen.peaks, peak);
    _mm512_storeu_ps(seen.sums, _mm512_fmadd_ps(_mm512_loadu_ps(seen.sums), factor, sum));
    return factor;
}

TARGET void add(float* scores, const uint8_t* values, int64_t pitch, int64_t count, int64_t dim, const Seen& seen) {
    float factors[QUERIES];
    _mm512_storeu_ps(factors, weigh(scores, count, seen));
    for (int64_t d = 0; d < dim; d += 16) {
        const __mmask16 some = static_cast<__mmask16>((1u << std::min<int64_t>(16, dim - d)) - 1u);
        Values sums[QUERIES];
#pragma GCC unroll 16
        for (int q = 0; q < QUERIES; ++q)
            sums[q] = _mm512_mul_ps(_mm512_maskz_loadu_ps(some, seen.mixed + q * dim + d), _mm512_set1_ps(factors[q]));
        for (int64_t t = 0; t < count; t += 2) {
            const uint8_t* value = values + t * pitch + d * 2;
            const __m256i low = _mm256_maskz_loadu_epi16(some, value);
            __m256i high = _mm256_setzero_si256();
            if (t + 1 < count) high = _mm256_maskz_loadu_epi16(some, value + pitch);
            const __m512bh two = pairs(interleaved(_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1)));
#pragma GCC unroll 16
            for (int q = 0; q < QUERIES; ++q)
                sums[q] = _mm512_dpbf16_ps(sums[q], two, both(scores + t / 2 * QUERIES + q));
        }
#pragma GCC unroll 16
        for (int q = 0; q < QUERIES; ++q) _mm512_mask_storeu_ps(seen.mixed + q * dim + d, some, sums[q]);
    }
}

TARGET void store(const float* sums, int64_t count, int64_t outs, uint8_t* y, int64_t pitch) {
    const __mmask16 some = static_cast<__mmask16>((1u << outs) - 1u);
    for (int64_t t = 0; t < count; ++t) {
        const __m256bh rounded = _mm512_cvtneps_pbh(_mm512_loadu_ps(sums + t * QUERIES));
        _mm256_mask_storeu_epi16(y + t * pitch, some, reinterpret_cast<__m256i>(rounded));
    }
}

const Flash BFLOAT16 = {pack, dots, add, store};

}  // namespace

const Flash* flash_avx512() {
    __builtin_cpu_init();
    const bool here = __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl");
    return here ? &BFLOAT16 : nullptr;
}

#else

const Flash* flash_avx512() { return nullptr; }

#endif

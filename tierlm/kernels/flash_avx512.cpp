// flash.h by AVX-512, for processors with AVX-512 BF16, whose products add pairs of neighbours: of dimensions in scores,
// of tokens in values.

#include "flash.h"

#include <algorithm>

#include "vectors.h"

#if defined(__x86_64__) && !defined(TIERLM_PORTABLE)

#include <immintrin.h>

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))
#define STEP TARGET __attribute__((always_inline)) static inline

namespace {

typedef __m512 Values;

// The numbers of `low` and `high` in turn.
STEP __m512i interleaved(__m512i low_high) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, low_high);
}

// How numbers are stored. A lane has four bytes: one number, or two neighbours, whose products are added.
struct Float32 {
    static constexpr int64_t size = 4, neighbours = 1;

    STEP __m512i lanes(Values low, Values) { return _mm512_castps_si512(low); }
    STEP Values add(Values sum, __m512i a, __m512i b) {
        return _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum);
    }
    // Up to 16 dimensions of one token.
    STEP __m512i values(const uint8_t* token, int64_t, bool, __mmask16 some) {
        return _mm512_maskz_loadu_epi32(some, token);
    }
    STEP void store(uint8_t* y, __mmask16 some, Values x) { _mm512_mask_storeu_ps(y, some, x); }
};

struct BFloat16 {
    static constexpr int64_t size = 2, neighbours = 2;

    STEP __m512i lanes(Values low, Values high) {
        return interleaved(reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low)));
    }
    STEP Values add(Values sum, __m512i a, __m512i b) {
        return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
    }
    // Up to 16 dimensions of a token and the next, or of the last one.
    STEP __m512i values(const uint8_t* token, int64_t pitch, bool last, __mmask16 some) {
        const __m256i low = _mm256_maskz_loadu_epi16(some, token);
        __m256i high = _mm256_setzero_si256();
        if (!last) high = _mm256_maskz_loadu_epi16(some, token + pitch);
        return interleaved(_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1));
    }
    STEP void store(uint8_t* y, __mmask16 some, Values x) {
        _mm256_mask_storeu_epi16(y, some, reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)));
    }
};

// The same four bytes in each lane.
STEP __m512i each(const void* p) {
    int32_t four;
    __builtin_memcpy(&four, p, sizeof four);
    return _mm512_set1_epi32(four);
}

// Masks of the first lanes.
STEP __mmask16 first(int64_t lanes) { return static_cast<__mmask16>((1u << std::min<int64_t>(16, lanes)) - 1u); }

// [dim / neighbours, QUERIES, neighbours]
template <class Stored>
TARGET void pack(const float* rows, int64_t count, int64_t row_stride, int64_t stride, int64_t dim, float scale,
                 void* packed) {
    auto* to = static_cast<uint8_t*>(packed);
    const __m512i lanes = _mm512_mullo_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
                                             _mm512_set1_epi32(static_cast<int>(row_stride)));
    const Values none = _mm512_setzero_ps(), factor = _mm512_set1_ps(scale);
    for (int64_t d = 0; d < dim; d += Stored::neighbours) {
        Values found[2] = {none, none};
        for (int64_t i = 0; i < Stored::neighbours; ++i)
            found[i] = factor * _mm512_mask_i32gather_ps(none, first(count), lanes, rows + (d + i) * stride, 4);
        _mm512_storeu_si512(to + d * QUERIES * Stored::size, Stored::lanes(found[0], found[1]));
    }
}

template <class Stored, int COUNT>
STEP void dots_of(const uint8_t* queries, const uint8_t* tokens, int64_t pitch, int64_t bytes, float* sums) {
    Values found[COUNT];
    for (int k = 0; k < COUNT; ++k) found[k] = _mm512_setzero_ps();
    for (int64_t at = 0; at < bytes; at += 4) {
        const __m512i query = _mm512_loadu_si512(queries + at * QUERIES);
#pragma GCC unroll 16
        for (int k = 0; k < COUNT; ++k) found[k] = Stored::add(found[k], query, each(tokens + k * pitch + at));
    }
    for (int k = 0; k < COUNT; ++k) _mm512_storeu_ps(sums + k * QUERIES, found[k]);
}

template <class Stored>
TARGET void dots(const void* packed, const uint8_t* tokens, int64_t pitch, int64_t count, int64_t dim, float* sums) {
    const auto* queries = static_cast<const uint8_t*>(packed);
    const int64_t bytes = dim * Stored::size;
    int64_t t = 0;
    for (; t + 8 <= count; t += 8) dots_of<Stored, 8>(queries, tokens + t * pitch, pitch, bytes, sums + t * QUERIES);
    for (; t < count; ++t) dots_of<Stored, 1>(queries, tokens + t * pitch, pitch, bytes, sums + t * QUERIES);
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

// Turns scores into weights, neighbouring tokens in each lane, in place, and updates peaks and sums. Returns the factors
// of what was seen before.
template <class Stored>
STEP Values weigh(float* scores, int64_t count, const Seen& seen) {
    const Values before = _mm512_loadu_ps(seen.peaks);
    Values peak = before, sum = _mm512_setzero_ps();
    for (int64_t t = 0; t < count; ++t) peak = _mm512_max_ps(_mm512_loadu_ps(scores + t * QUERIES), peak);
    for (int64_t t = 0; t < count; t += Stored::neighbours) {
        Values found[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
        for (int64_t i = 0; i < Stored::neighbours && t + i < count; ++i)
            found[i] = weight_of(_mm512_loadu_ps(scores + (t + i) * QUERIES), peak);
        sum = _mm512_add_ps(sum, _mm512_add_ps(found[0], found[1]));
        _mm512_storeu_si512(scores + t / Stored::neighbours * QUERIES, Stored::lanes(found[0], found[1]));
    }
    const Values factor = exponential(_mm512_sub_ps(before, peak));
    _mm512_storeu_ps(seen.peaks, peak);
    _mm512_storeu_ps(seen.sums, _mm512_fmadd_ps(_mm512_loadu_ps(seen.sums), factor, sum));
    return factor;
}

template <class Stored>
TARGET void add(float* scores, const uint8_t* values, int64_t pitch, int64_t count, int64_t dim, const Seen& seen) {
    float factors[QUERIES];
    _mm512_storeu_ps(factors, weigh<Stored>(scores, count, seen));
    for (int64_t d = 0; d < dim; d += 16) {
        const __mmask16 some = first(dim - d);
        Values sums[QUERIES];
#pragma GCC unroll 16
        for (int q = 0; q < QUERIES; ++q)
            sums[q] = _mm512_mul_ps(_mm512_maskz_loadu_ps(some, seen.mixed + q * dim + d), _mm512_set1_ps(factors[q]));
        for (int64_t t = 0; t < count; t += Stored::neighbours) {
            const __m512i value = Stored::values(values + t * pitch + d * Stored::size, pitch, t + 1 == count, some);
            const float* weights = scores + t / Stored::neighbours * QUERIES;
#pragma GCC unroll 16
            for (int q = 0; q < QUERIES; ++q) sums[q] = Stored::add(sums[q], value, each(weights + q));
        }
#pragma GCC unroll 16
        for (int q = 0; q < QUERIES; ++q) _mm512_mask_storeu_ps(seen.mixed + q * dim + d, some, sums[q]);
    }
}

template <class Stored>
TARGET void store(const float* sums, int64_t count, int64_t outs, uint8_t* y, int64_t pitch) {
    for (int64_t t = 0; t < count; ++t) Stored::store(y + t * pitch, first(outs), _mm512_loadu_ps(sums + t * QUERIES));
}

template <class Stored>
constexpr Flash KERNELS = {pack<Stored>, dots<Stored>, add<Stored>, store<Stored>};

}  // namespace

const Flash* flash_avx512(bool half) {
    __builtin_cpu_init();
    const bool here = __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl");
    return !here ? nullptr : half ? &KERNELS<BFloat16> : &KERNELS<Float32>;
}

#else

const Flash* flash_avx512(bool) { return nullptr; }

#endif

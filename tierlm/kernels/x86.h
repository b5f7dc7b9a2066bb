// Vectors of x86 processors, whose lanes are rows of a weight: 8 with AVX2, or 16 in files that define TIERLM_AVX512.
#pragma once

#include "product.h"

#if defined(__x86_64__) && !defined(TIERLM_PORTABLE)
#define TIERLM_X86

#include <immintrin.h>

#include <cstring>

#ifdef TIERLM_AVX512
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni,f16c")))
#else
#define TARGET __attribute__((target("avx2,f16c")))
#endif
#define INLINED TARGET __attribute__((always_inline))  // methods and lambdas
#define STEP INLINED static inline

namespace {

#ifdef TIERLM_AVX512
constexpr int WIDTH = 16;
typedef __m512i Raw;
#else
constexpr int WIDTH = 8;
typedef __m256i Raw;
#endif

typedef uint32_t Codes __attribute__((vector_size(WIDTH * 4)));  // often four bytes in each lane
typedef int32_t Sums __attribute__((vector_size(WIDTH * 4)));
typedef float Values __attribute__((vector_size(WIDTH * 4)));

STEP Raw raw(Codes x) { return reinterpret_cast<Raw>(x); }
STEP Codes codes(Raw x) { return reinterpret_cast<Codes>(x); }

#ifndef TIERLM_AVX512

// Sums of pairs of 16-bit numbers in 32 bits.
STEP __m256i wide(__m256i pairs) { return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)); }

// add4, add6 and add8 add columns of 8 rows, `w`, times the activations in each lane of `x`, to `sum`: four columns, or
// eight in add6. Numbers are unsigned, below 16 in add4 and below 64 in add6; end4 subtracts 8 times the sum of the
// activations. They are signed in add8.
STEP __m256i add4(__m256i sum, __m256i w, __m256i x) {  // fits int16: 8 sums of pairs, at most 8 * 2 * 15 * 127
    return _mm256_add_epi16(sum, _mm256_maddubs_epi16(w, x));
}
STEP __m256i end4(__m256i sum, int32_t of_x) { return _mm256_sub_epi32(wide(sum), _mm256_set1_epi32(8 * of_x)); }
STEP __m256i add6(__m256i sum, __m256i w, __m256i x, __m256i w2, __m256i x2) {  // 2 * 2 * 63 * 127 fits int16
    return _mm256_add_epi32(sum, wide(_mm256_add_epi16(_mm256_maddubs_epi16(w, x), _mm256_maddubs_epi16(w2, x2))));
}
STEP __m256i add8(__m256i sum, __m256i w, __m256i x) {  // signs move to the activations: 2 * 128 * 127 fits int16
    return _mm256_add_epi32(sum, wide(_mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w))));
}

STEP __m256i four(const int8_t* x) {
    int32_t quad;
    std::memcpy(&quad, x, sizeof quad);
    return _mm256_set1_epi32(quad);
}

// Keeps a sum in its register: if the compiler reordered the sums of several rows, they would spill.
STEP void settle(__m256i& sum) { __asm__("" : "+x"(sum)); }

#endif

inline bool has_avx2() {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

inline bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
}

}  // namespace

#endif

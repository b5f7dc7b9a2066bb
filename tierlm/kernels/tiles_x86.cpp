// Rounded activations times tiles of int8 and int4 by x86 byte products: AVX2, or AVX-512 VNNI on 256-bit vectors. Both
// give the same integer sums, and so the same bits.

#include "product.h"

#if defined(__x86_64__) && !defined(TIERLM_PORTABLE)

#include <immintrin.h>

#include <algorithm>
#include <cstring>

#define AVX2 __attribute__((target("avx2,fma,f16c")))
#define STEP AVX2 __attribute__((always_inline)) static inline

namespace {

// add4 and add8 add four columns of 8 rows, `w`, times the four activations in each lane of `x`, to `sum`. int4 numbers
// are stored as 0 to 15: end4 subtracts 8 times the sum of the activations.
struct Maddubs {
    STEP __m256i add4(__m256i sum, __m256i w, __m256i x) {  // fits int16: 8 sums of pairs, at most 8 * 2 * 15 * 127
        return _mm256_add_epi16(sum, _mm256_maddubs_epi16(w, x));
    }
    STEP __m256i end4(__m256i sum, int32_t of_x) {
        return _mm256_sub_epi32(_mm256_madd_epi16(sum, _mm256_set1_epi16(1)), _mm256_set1_epi32(8 * of_x));
    }
    STEP __m256i add8(__m256i sum, __m256i w, __m256i x) {  // signs move to the activations: 2 * 128 * 127 fits int16
        const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
        return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
    STEP __m256i end8(__m256i sum, int32_t) { return sum; }
};

struct Vnni {
    STEP __m256i dot(__m256i sum, __m256i w, __m256i x) {  // inline assembly, since the target is AVX2
        __asm__("vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(w), "x"(x));
        return sum;
    }
    STEP __m256i add4(__m256i sum, __m256i w, __m256i x) { return dot(sum, w, x); }
    STEP __m256i end4(__m256i sum, int32_t of_x) { return _mm256_sub_epi32(sum, _mm256_set1_epi32(8 * of_x)); }
    STEP __m256i add8(__m256i sum, __m256i w, __m256i x) {  // w + 128 is unsigned
        return dot(sum, _mm256_xor_si256(w, _mm256_set1_epi8(-128)), x);
    }
    STEP __m256i end8(__m256i sum, int32_t of_x) { return _mm256_sub_epi32(sum, _mm256_set1_epi32(128 * of_x)); }
};

STEP __m256i four(const int8_t* x) {
    int32_t quad;
    std::memcpy(&quad, x, sizeof quad);
    return _mm256_set1_epi32(quad);
}

// Keeps a sum in its register: if the compiler reordered the sums of several rows, they would spill.
STEP void settle(__m256i& sum) { __asm__("" : "+x"(sum)); }

STEP __m256i load(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }

struct Int4 {
    static constexpr int64_t tile = 128;
    template <class Isa, int ROWS>
    STEP void add(__m256i* sums, const uint8_t* w, const Rounded* x, int64_t groups) {
        const __m256i low = _mm256_set1_epi8(15);
        for (int v = 0; v < 4; ++v) {
            const __m256i both = load(w + 32 * v);
            const __m256i lower = _mm256_and_si256(both, low);
            const __m256i upper = _mm256_and_si256(_mm256_srli_epi16(both, 4), low);
            for (int r = 0; r < ROWS; ++r) {
                const int8_t* numbers = x[r * groups].numbers + 4 * v;
                sums[r] = Isa::add4(sums[r], lower, four(numbers));
                sums[r] = Isa::add4(sums[r], upper, four(numbers + 16));
                if (ROWS > 1) settle(sums[r]);
            }
        }
        for (int r = 0; r < ROWS; ++r) sums[r] = Isa::end4(sums[r], x[r * groups].sum);
    }
};

struct Int8 {
    static constexpr int64_t tile = 256;
    template <class Isa, int ROWS>
    STEP void add(__m256i* sums, const uint8_t* w, const Rounded* x, int64_t groups) {
        for (int q = 0; q < 8; ++q) {
            const __m256i quad = load(w + 32 * q);
            for (int r = 0; r < ROWS; ++r) {
                sums[r] = Isa::add8(sums[r], quad, four(x[r * groups].numbers + 4 * q));
                if (ROWS > 1) settle(sums[r]);
            }
        }
        for (int r = 0; r < ROWS; ++r) sums[r] = Isa::end8(sums[r], x[r * groups].sum);
    }
};

// Prefetch distance in bytes, so that reads overlap computation. Past the end of a piece lie the weights of another
// thread, or nothing.
constexpr int64_t AHEAD = 2048;

// Unpacks each tile once for ROWS rows of activations.
template <class Stored, class Isa, int ROWS>
AVX2 void outputs_of_rows(const Product& p, int64_t first, int64_t last, int64_t row) {
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
            Stored::template add<Isa, ROWS>(sums, tile, x + g, groups);
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

template <class Stored, class Isa>
void outputs(const Product& p, int64_t first, int64_t last) {
    int64_t row = 0;
    for (; row + 4 <= p.rows; row += 4) outputs_of_rows<Stored, Isa, 4>(p, first, last, row);
    if (p.rows - row == 3) outputs_of_rows<Stored, Isa, 3>(p, first, last, row);
    if (p.rows - row == 2) outputs_of_rows<Stored, Isa, 2>(p, first, last, row);
    if (p.rows - row == 1) outputs_of_rows<Stored, Isa, 1>(p, first, last, row);
}

template <class Stored>
Work best() {
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (!avx2) return nullptr;
    const bool vnni = __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vl");
    return vnni ? outputs<Stored, Vnni> : outputs<Stored, Maddubs>;
}

}  // namespace

Work int8_outputs_x86() { return best<Int8>(); }
Work int4_outputs_x86() { return best<Int4>(); }

#else

Work int8_outputs_x86() { return nullptr; }
Work int4_outputs_x86() { return nullptr; }

#endif

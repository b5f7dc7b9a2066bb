// The products of floats.cpp by AVX-512. A vector holds both of its accumulators, so sums have the same order and the
// same bits as with AVX2.

#define TIERLM_AVX512

#include "x86.h"

#ifdef TIERLM_X86

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
        const __m256i sign = _mm256_and_si256(raw, _mm256_set1_epi16(static_cast<int16_t>(0x8000)));
        const __m256i rest = _mm256_and_si256(_mm256_slli_epi16(raw, 7), _mm256_set1_epi16(0x3f80));
        return from_halves(_mm256_or_si256(sign, rest)) * 256.0f;
    }
};

template <class Stored>
STEP float one(const uint8_t* p) {
    uint8_t padded[64] = {};
    std::memcpy(padded, p, Stored::size);
    return Stored::load(padded)[0];
}

// OUTS weight rows times ROWS activation rows, with the sums of `tile` in floats.cpp.
template <class Stored, int OUTS, int ROWS>
STEP void tile(const Product& p, int64_t out, int64_t row) {
    const auto* scales = static_cast<const float*>(p.scale);
    const int64_t width = scales ? BLOCK : p.ins;
    const int64_t blocks = (p.ins + BLOCK - 1) / BLOCK;
    Floats total[OUTS][ROWS] = {};
    float rest[OUTS][ROWS] = {};
    for (int64_t start = 0; start < p.ins; start += width) {
        const int64_t end = start + width < p.ins ? start + width : p.ins;
        Values both[OUTS][ROWS] = {};
        int64_t i = start;
        for (; i + WIDTH <= end; i += WIDTH) {
            Values w[OUTS];
            for (int o = 0; o < OUTS; ++o) w[o] = Stored::load(p.w + ((out + o) * p.ins + i) * Stored::size);
            for (int r = 0; r < ROWS; ++r) {
                const Values x = *reinterpret_cast<const Sixteen*>(p.x + (row + r) * p.ins + i);
                for (int o = 0; o < OUTS; ++o) both[o][r] += w[o] * x;
            }
        }
        for (int o = 0; o < OUTS; ++o) {
            const float scale = scales ? scales[(out + o) / BLOCK * blocks + start / BLOCK] : 1.0f;
            for (int r = 0; r < ROWS; ++r) {
                Floats even, odd;
                std::memcpy(&even, &both[o][r], sizeof even);
                std::memcpy(&odd, reinterpret_cast<const char*>(&both[o][r]) + sizeof even, sizeof odd);
                total[o][r] += (even + odd) * scale;
            }
            for (int64_t j = i; j < end; ++j) {
                const float weight = one<Stored>(p.w + ((out + o) * p.ins + j) * Stored::size) * scale;
                for (int r = 0; r < ROWS; ++r) rest[o][r] += weight * p.x[(row + r) * p.ins + j];
            }
        }
    }
    for (int o = 0; o < OUTS; ++o) {
        for (int r = 0; r < ROWS; ++r) {
            float sum = 0;
            for (int lane = 0; lane < LANES; ++lane) sum += total[o][r][lane];
            p.y[(row + r) * p.stride + out + o - p.origin] = sum + rest[o][r];
        }
    }
}

template <class Stored, int ROWS>
STEP void rows_of(const Product& p, int64_t first, int64_t last, int64_t row) {
    int64_t out = first;
    for (; out + 4 <= last; out += 4) tile<Stored, 4, ROWS>(p, out, row);
    for (; out < last; ++out) tile<Stored, 1, ROWS>(p, out, row);
}

template <class Stored>
TARGET void outputs(const Product& p, int64_t first, int64_t last) {
    int64_t row = 0;
    for (; row + 4 <= p.rows; row += 4) rows_of<Stored, 4>(p, first, last, row);
    for (; row < p.rows; ++row) rows_of<Stored, 1>(p, first, last, row);
}

const Work OUTPUTS[FLOATS] = {outputs<Float32>, outputs<BFloat16>, outputs<Float16>, outputs<Float8>};

}  // namespace

const Work* float_outputs_avx512() { return has_avx512() ? OUTPUTS : nullptr; }

#else

const Work* float_outputs_avx512() { return nullptr; }

#endif

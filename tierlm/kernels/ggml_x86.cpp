// Rounded activations times the blocks of GGUF files by the byte products of AVX2, eight weight rows at a time. The
// target has no FMA, see blocks.h.

#include "exact_x86.h"

#ifdef TIERLM_X86

#include <algorithm>

namespace {

// A group of each row.
template <class Stored>
struct Group {
    Codes quads[GROUP / 4];
    Factors<Stored> factors;
};

// Keeps what is unpacked.
template <class Stored>
struct Kept {
    Group<Stored>* groups;
    INLINED void quad(int64_t g, int64_t q, Codes codes) { groups[g].quads[q] = codes; }
    INLINED void end(int64_t g, const Factors<Stored>& factors) { groups[g].factors = factors; }
};

// Adds the products of a tile and ROWS rows of activations, `groups` apart, to their totals.
template <class Stored, int ROWS>
STEP void multiply(const Group<Stored>* group, const Rounded* x, int64_t groups, __m256* totals) {
    constexpr int64_t QUADS = GROUP / 4 / Stored::parts;
    for (int64_t g = 0; g < GROUPS<Stored>; ++g, ++x, ++group) {
        __m256 products[ROWS];
#pragma GCC unroll 2
        for (int64_t part = 0; part < Stored::parts; ++part) {
            __m256i dots[ROWS];
            for (int r = 0; r < ROWS; ++r) dots[r] = _mm256_setzero_si256();
            for (int64_t q = part * QUADS; q < (part + 1) * QUADS; q += 2) {
                const __m256i w = raw(group->quads[q]), w2 = raw(group->quads[q + 1]);
                for (int r = 0; r < ROWS; ++r) {
                    const int8_t* numbers = x[r * groups].numbers + 4 * q;
                    if (SIGNED<Stored>) {
                        dots[r] = add8(add8(dots[r], w, four(numbers)), w2, four(numbers + 4));
                    } else {
                        dots[r] = add6(dots[r], w, four(numbers), w2, four(numbers + 4));
                    }
                    if (ROWS > 1) settle(dots[r]);
                }
            }
            for (int r = 0; r < ROWS; ++r) {
                const int32_t of_x = sum_of<Stored>(x[r * groups], part);
                if (BIAS<Stored>) dots[r] = _mm256_sub_epi32(dots[r], _mm256_set1_epi32(BIAS<Stored> * of_x));
                const Values product = as_floats(codes(dots[r])) * group->factors.scales[part];
                products[r] = part ? _mm256_add_ps(products[r], product) : product;
            }
        }
        for (int r = 0; r < ROWS; ++r) {
            const Rounded& of_row = x[r * groups];
            for (int64_t part = 0; Stored::minima && part < Stored::parts; ++part) {
                const __m256 sum = _mm256_set1_ps(static_cast<float>(sum_of<Stored>(of_row, part)));
                products[r] -= sum * group->factors.minima[part];
            }
            totals[r] = _mm256_add_ps(totals[r], _mm256_mul_ps(products[r], _mm256_set1_ps(of_row.scale)));
        }
    }
}

template <class Stored>
TARGET void outputs(const Product& p, int64_t first, int64_t last) {
    constexpr int64_t MANY = 32;  // rows that share a tile
    const int64_t groups = groups_of(p.ins), blocks = p.ins / Stored::columns, size = blocks * Stored::bytes;
    for (int64_t row = 0; row < p.rows; row += MANY) {
        const int64_t rows = std::min(MANY, p.rows - row);
        for (int64_t out = first; out < last; out += LANES) {
            Rows weights;  // lanes past the last row repeat it
            for (int64_t r = 0; r < LANES; ++r) weights.row[r] = p.w + std::min(out + r, last - 1) * size;
            const uint8_t* next = p.w + (out + LANES) * size;
            __m256 totals[MANY];
            for (int64_t r = 0; r < rows; ++r) totals[r] = _mm256_setzero_ps();
            for (int64_t b = 0; b < blocks; ++b) {
                // So that reads overlap computation. Past the end of a piece lie the weights of another thread, or
                // nothing.
                for (int64_t i = 0; i < LANES * Stored::bytes; i += 64) _mm_prefetch(next + i, _MM_HINT_T0);
                next += LANES * Stored::bytes;
                Group<Stored> tile[GROUPS<Stored>];
                weights.block = b * Stored::bytes;
                Kept<Stored> kept = {tile};
                unpack(Stored(), weights, kept);
                const Rounded* x = p.rounded + row * groups + b * GROUPS<Stored>;
                int64_t r = 0;
                for (; r + 4 <= rows; r += 4) multiply<Stored, 4>(tile, x + r * groups, groups, totals + r);
                if (rows - r == 3) multiply<Stored, 3>(tile, x + r * groups, groups, totals + r);
                if (rows - r == 2) multiply<Stored, 2>(tile, x + r * groups, groups, totals + r);
                if (rows - r == 1) multiply<Stored, 1>(tile, x + r * groups, groups, totals + r);
            }
            const size_t count = std::min<int64_t>(LANES, last - out) * sizeof(float);
            float* y = p.y + row * p.stride + out - p.origin;
            for (int64_t r = 0; r < rows; ++r) std::memcpy(y + r * p.stride, &totals[r], count);
        }
    }
}

#define OUTPUTS_OF(Stored) outputs<Stored>,
#define EXACT_OF(Stored) exact<Stored>,
const Work OUTPUTS[] = {EACH_BLOCKS(OUTPUTS_OF) EACH_BLOCKS(EXACT_OF)};

}  // namespace

const Work* ggml_outputs_avx2() { return has_avx2() ? OUTPUTS : nullptr; }

#else

const Work* ggml_outputs_avx2() { return nullptr; }

#endif

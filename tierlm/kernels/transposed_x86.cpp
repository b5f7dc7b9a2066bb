// Rounded activations times the four-bit integers of AWQ and GPTQ by x86 byte products, TILE weight rows at a time. The
// target has no FMA, see transposed.h.

#include "transposed.h"

#include "x86.h"

#ifdef TIERLM_X86

#include <algorithm>

namespace {

// Sums of products as in x86.h: of AVX2, or of AVX-512 VNNI on 256-bit vectors, which gives the same sums.
struct Maddubs {
    STEP __m256i add(__m256i sum, __m256i w, __m256i x) { return add4(sum, w, x); }
    STEP __m256i end(__m256i sum) { return wide(sum); }
};

struct Vnni {
    STEP __m256i add(__m256i sum, __m256i w, __m256i x) {  // inline assembly, since the target is AVX2
        __asm__("vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(w), "x"(x));
        return sum;
    }
    STEP __m256i end(__m256i sum) { return sum; }
};

constexpr int VECTORS = TILE / LANES;
constexpr int64_t STRIP = 4;  // tiles side by side: what is read of a column is then long enough for hardware to prefetch

// GROUP columns of TILE rows. quads[q][v]: columns 4 q to 4 q + 3 of the eight rows of vector v, as bytes from 0 to 15.
//
// GPTQ: vector v has rows 8 v to 8 v + 7. AWQ: vectors 2 k and 2 k + 1 have those of words k and k + 4 of a column, four
// rows each: 0, 4, 1, 5, then 2, 6, 3, 7, which are the low and the high halves of their bytes.
struct Tile {
    __m256i quads[GROUP / 4][VECTORS];
};

// The zero points and scales of TILE rows.
struct Scales {
    __m256i zeros[VECTORS];
    __m256 scales[VECTORS];
};

STEP __m256i load(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
STEP __m256i low_halves(__m256i bytes) { return _mm256_and_si256(bytes, _mm256_set1_epi8(15)); }
STEP __m256i high_halves(__m256i bytes) { return low_halves(_mm256_srli_epi16(bytes, 4)); }
STEP __m256i lower(__m256i a, __m256i b) { return _mm256_permute2x128_si256(a, b, 0x20); }
STEP __m256i upper(__m256i a, __m256i b) { return _mm256_permute2x128_si256(a, b, 0x31); }
STEP __m256 lower(__m256 a, __m256 b) { return _mm256_permute2f128_ps(a, b, 0x20); }
STEP __m256 upper(__m256 a, __m256 b) { return _mm256_permute2f128_ps(a, b, 0x31); }
STEP __m256i shuffled(__m256i a, __m256i b, bool odd) {  // the even or odd words of both
    const __m256 x = _mm256_castsi256_ps(a), y = _mm256_castsi256_ps(b);
    return _mm256_castps_si256(odd ? _mm256_shuffle_ps(x, y, 0xdd) : _mm256_shuffle_ps(x, y, 0x88));
}

template <bool DOWN>
STEP void unpack(const Product& p, int64_t out, int64_t column, Tile& to) {
    if (DOWN) {
        for (int64_t q = 0; q < GROUP / 4; q += 2) {
            const uint8_t* w = p.w + ((column + 4 * q) / 8 * p.outs + out) * 4;
            for (int v = 0; v < VECTORS; ++v) {
                const __m256i both = load(w + 32 * v), even = low_halves(both), odd = high_halves(both);
                const __m256i low = _mm256_unpacklo_epi8(even, odd), high = _mm256_unpackhi_epi8(even, odd);
                to.quads[q][v] = shuffled(low, high, false);
                to.quads[q + 1][v] = shuffled(low, high, true);
            }
        }
        return;
    }
    for (int64_t q = 0; q < GROUP / 4; ++q) {
        const int64_t stride = p.outs / 2;
        const uint8_t* w = p.w + (column + 4 * q) * stride + out / 2;
        const __m256i a = load(w), b = load(w + stride), c = load(w + 2 * stride), d = load(w + 3 * stride);
        const __m256i ab[2] = {_mm256_unpacklo_epi8(a, b), _mm256_unpackhi_epi8(a, b)};
        const __m256i cd[2] = {_mm256_unpacklo_epi8(c, d), _mm256_unpackhi_epi8(c, d)};
        for (int k = 0; k < 4; ++k) {
            const __m256i low = _mm256_unpacklo_epi16(ab[k / 2], cd[k / 2]);
            const __m256i bytes = k % 2 ? _mm256_unpackhi_epi16(ab[k / 2], cd[k / 2]) : low;
            to.quads[q][2 * k] = low_halves(bytes);
            to.quads[q][2 * k + 1] = high_halves(bytes);
        }
    }
}

// Four numbers of each of two words, from bit `start` on.
STEP __m256i of_words(uint32_t first, uint32_t second, int start) {
    const __m256i words = _mm256_inserti128_si256(
        _mm256_set1_epi32(static_cast<int>(first)), _mm_set1_epi32(static_cast<int>(second)), 1);
    const __m256i shifts = _mm256_add_epi32(_mm256_setr_epi32(0, 8, 16, 24, 0, 8, 16, 24), _mm256_set1_epi32(start));
    return _mm256_and_si256(_mm256_srlv_epi32(words, shifts), _mm256_set1_epi32(15));
}

template <class Stored>
STEP void unpack_scales(const Product& p, int64_t out, int64_t column, Scales& to) {
    const int64_t at = column / Stored::columns * p.outs + out;
    const auto* scales = static_cast<const uint16_t*>(p.scale) + at;
    uint32_t words[VECTORS];
    std::memcpy(words, static_cast<const uint8_t*>(p.extra) + at / 2, sizeof words);
    __m256 wide[VECTORS];
    for (int v = 0; v < VECTORS; ++v) {
        const __m256i raw = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(scales + 8 * v)));
        const __m256i sign = _mm256_slli_epi32(_mm256_and_si256(raw, _mm256_set1_epi32(0x8000)), 16);
        const __m256i size = _mm256_slli_epi32(_mm256_and_si256(raw, _mm256_set1_epi32(0x7fff)), 13);
        wide[v] = _mm256_mul_ps(_mm256_castsi256_ps(_mm256_or_si256(sign, size)), _mm256_set1_ps(0x1p112f));
    }
    if (Stored::down) {
        for (int v = 0; v < VECTORS; ++v) {
            const __m256i word = _mm256_set1_epi32(static_cast<int>(words[v] + Stored::less));
            const __m256i moved = _mm256_srlv_epi32(word, _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28));
            to.zeros[v] = _mm256_and_si256(moved, _mm256_set1_epi32(15));
            to.scales[v] = wide[v];
        }
        return;
    }
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    for (int k = 0; k < 4; ++k) {
        const __m256 first = _mm256_permutevar8x32_ps(wide[k], order);
        const __m256 second = _mm256_permutevar8x32_ps(wide[k + 4], order);
        to.scales[2 * k] = lower(first, second);
        to.scales[2 * k + 1] = upper(first, second);
        to.zeros[2 * k] = of_words(words[k], words[k + 4], 0);
        to.zeros[2 * k + 1] = of_words(words[k], words[k + 4], 4);
    }
}

// Adds the products of a tile and ROWS rows of activations, `groups` apart, to their totals.
template <class Isa, int ROWS>
STEP void multiply(const Tile& tile, const Scales& scales, const Rounded* x, int64_t groups,
                   __m256 (*totals)[VECTORS]) {
    constexpr int SOME = ROWS < 3 ? VECTORS / ROWS : 2;  // vectors whose sums are in registers
    for (int start = 0; start < VECTORS; start += SOME) {
        __m256i dots[SOME][ROWS];
        for (int v = 0; v < SOME; ++v)
            for (int r = 0; r < ROWS; ++r) dots[v][r] = _mm256_setzero_si256();
#pragma GCC unroll 8
        for (int64_t q = 0; q < GROUP / 4; ++q) {
            for (int r = 0; r < ROWS; ++r) {
                const __m256i numbers = four(x[r * groups].numbers + 4 * q);
                for (int v = 0; v < SOME; ++v) {
                    dots[v][r] = Isa::add(dots[v][r], tile.quads[q][start + v], numbers);
                    settle(dots[v][r]);
                }
            }
        }
        for (int r = 0; r < ROWS; ++r) {
            const Rounded& of_row = x[r * groups];
            const __m256i sum = _mm256_set1_epi32(of_row.sum() & 0xffff);  // zero points fit 16 bits too
            const __m256 scale = _mm256_set1_ps(of_row.scale);
            for (int v = 0; v < SOME; ++v) {
                const __m256i less = _mm256_madd_epi16(scales.zeros[start + v], sum);
                const __m256i whole = _mm256_sub_epi32(Isa::end(dots[v][r]), less);
                const __m256 product = _mm256_mul_ps(_mm256_cvtepi32_ps(whole), scales.scales[start + v]);
                totals[r][start + v] = _mm256_add_ps(totals[r][start + v], _mm256_mul_ps(product, scale));
            }
        }
    }
}

// The totals of TILE rows, in their order.
template <bool DOWN>
STEP void store(float* y, const __m256* totals) {
    if (DOWN) {
        for (int v = 0; v < VECTORS; ++v) _mm256_storeu_ps(y + 8 * v, totals[v]);
        return;
    }
    const __m256i order = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7);
    for (int k = 0; k < 4; ++k) {
        const __m256 first = lower(totals[2 * k], totals[2 * k + 1]), second = upper(totals[2 * k], totals[2 * k + 1]);
        _mm256_storeu_ps(y + 8 * k, _mm256_permutevar8x32_ps(first, order));
        _mm256_storeu_ps(y + 8 * k + 32, _mm256_permutevar8x32_ps(second, order));
    }
}

// So that reads overlap computation. Past the end lies another tensor, or nothing.
template <bool DOWN>
STEP void prefetch(const Product& p, int64_t out, int64_t column, int64_t tiles) {
    constexpr int64_t BYTES = DOWN ? 4 * TILE : TILE / 2;  // of a tile in a row of the data
    const int64_t stride = p.outs * BYTES / TILE, first = DOWN ? column / 8 : column;
    for (int64_t row = first; row < first + (DOWN ? GROUP / 8 : GROUP); ++row)
        for (int64_t i = 0; i < tiles * BYTES; i += 64)
            _mm_prefetch(p.w + row * stride + out * BYTES / TILE + i, _MM_HINT_T0);
}

// `tiles` tiles from weight row `out` times `rows` rows of activations from `row`.
template <class Stored, class Isa, int MANY>
STEP void strip(const Product& p, int64_t out, int64_t tiles, int64_t row, int64_t rows) {
    const int64_t groups = groups_of(p.ins);
    __m256 totals[STRIP][MANY][VECTORS];
    for (int64_t t = 0; t < tiles; ++t)
        for (int64_t r = 0; r < rows; ++r)
            for (int v = 0; v < VECTORS; ++v) totals[t][r][v] = _mm256_setzero_ps();
    const Rounded* x = p.rounded + row * groups;
    Scales scales[STRIP];
    for (int64_t column = 0; column < p.ins; column += GROUP, ++x) {
        prefetch<Stored::down>(p, out, column + GROUP, tiles);
        for (int64_t t = 0; t < tiles; ++t) {
            if (column % Stored::columns == 0) unpack_scales<Stored>(p, out + t * TILE, column, scales[t]);
            Tile tile;
            unpack<Stored::down>(p, out + t * TILE, column, tile);
            int64_t r = 0;
            for (; r + 4 <= rows; r += 4) multiply<Isa, 4>(tile, scales[t], x + r * groups, groups, totals[t] + r);
            if (rows - r == 3) multiply<Isa, 3>(tile, scales[t], x + r * groups, groups, totals[t] + r);
            if (rows - r == 2) multiply<Isa, 2>(tile, scales[t], x + r * groups, groups, totals[t] + r);
            if (rows - r == 1) multiply<Isa, 1>(tile, scales[t], x + r * groups, groups, totals[t] + r);
        }
    }
    for (int64_t t = 0; t < tiles; ++t)
        for (int64_t r = 0; r < rows; ++r)
            store<Stored::down>(p.y + (row + r) * p.stride + out + t * TILE - p.origin, totals[t][r]);
}

template <class Stored, class Isa>
TARGET void outputs(const Product& p, int64_t first, int64_t last) {
    constexpr int MANY = 16;  // rows that share a tile
    for (int64_t row = 0; row < p.rows; row += MANY) {
        const int64_t rows = std::min<int64_t>(MANY, p.rows - row);
        for (int64_t out = first; out < last; out += STRIP * TILE)
            strip<Stored, Isa, MANY>(p, out, std::min(STRIP, (last - out) / TILE), row, rows);
    }
}

#define OUTPUTS_OF(Stored) outputs<Stored, Isa>,
template <class Isa>
const Work OUTPUTS[] = {EACH_TRANSPOSED(OUTPUTS_OF)};

}  // namespace

const Work* transposed_outputs_x86() { return !has_avx2() ? nullptr : has_avx512() ? OUTPUTS<Vnni> : OUTPUTS<Maddubs>; }

#else

const Work* transposed_outputs_x86() { return nullptr; }

#endif

// Rounded activations times the blocks of GGUF files by x86 byte products. Eight weight rows at a time are rearranged
// into the tiles of formats/tiles.py, in cache: the rows become the lanes of vectors. The target has no FMA, see
// blocks.h.

#include "blocks.h"
#include "x86.h"

#ifdef TIERLM_X86

#include <algorithm>

namespace {

// The same block of eight weight rows: at byte `block` of each.
struct Rows {
    const uint8_t* row[LANES];
    int64_t block;
    INLINE const uint8_t* at(int r, int64_t byte) const { return row[r] + block + byte; }
};

// Groups of eight rows. `quads[q]`: columns 4 q to 4 q + 3 of each row, in lanes. They are unsigned, the number plus
// the format's `bias`, but signed in Q8_0.
template <class Stored>
struct Tile {
    static constexpr int64_t groups = Stored::columns / GROUP;
    struct {
        __m256i quads[GROUP / 4];
        __m256 scales[Stored::parts], minimum;
    } group[groups];
};

template <class Stored>
constexpr int32_t BIAS = 0;
template <>
constexpr int32_t BIAS<Q4_0> = 8;
template <>
constexpr int32_t BIAS<Q6_K> = 32;
template <>
constexpr int32_t BIAS<Mxfp4> = 12;

// Sixteen bytes of each row: word i of all rows is `to[i]`.
STEP void words(const Rows& rows, int64_t at, __m256i* to) {
    __m256i pairs[4];
    for (int r = 0; r < 4; ++r) {
        const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows.at(r, at)));
        const __m128i high = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows.at(r + 4, at)));
        pairs[r] = _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
    }
    const __m256i low01 = _mm256_unpacklo_epi32(pairs[0], pairs[1]), low23 = _mm256_unpacklo_epi32(pairs[2], pairs[3]);
    const __m256i high01 = _mm256_unpackhi_epi32(pairs[0], pairs[1]), high23 = _mm256_unpackhi_epi32(pairs[2], pairs[3]);
    to[0] = _mm256_unpacklo_epi64(low01, low23);
    to[1] = _mm256_unpackhi_epi64(low01, low23);
    to[2] = _mm256_unpacklo_epi64(high01, high23);
    to[3] = _mm256_unpackhi_epi64(high01, high23);
}

// Four bytes of each row.
STEP __m256i word(const Rows& rows, int64_t at) {
    __m128i half[2];
    for (int i = 0; i < 2; ++i) {
        int32_t found[4];
        for (int r = 0; r < 4; ++r) std::memcpy(found + r, rows.at(4 * i + r, at), sizeof *found);
        half[i] = _mm_cvtsi32_si128(found[0]);
        half[i] = _mm_insert_epi32(half[i], found[1], 1);
        half[i] = _mm_insert_epi32(half[i], found[2], 2);
        half[i] = _mm_insert_epi32(half[i], found[3], 3);
    }
    return _mm256_inserti128_si256(_mm256_castsi128_si256(half[0]), half[1], 1);
}

// The low 16 bits of each lane, as from_half in vectors.h.
STEP __m256 half(__m256i raw) {
    const __m256i sign = _mm256_slli_epi32(_mm256_and_si256(raw, _mm256_set1_epi32(0x8000)), 16);
    const __m256i size = _mm256_slli_epi32(_mm256_and_si256(raw, _mm256_set1_epi32(0x7fff)), 13);
    return _mm256_mul_ps(_mm256_castsi256_ps(_mm256_or_si256(sign, size)), _mm256_set1_ps(0x1p112f));
}

STEP __m256i low_nibbles(__m256i bytes) { return _mm256_and_si256(bytes, _mm256_set1_epi8(15)); }
STEP __m256i high_nibbles(__m256i bytes) { return low_nibbles(_mm256_srli_epi16(bytes, 4)); }
STEP __m256 as_floats(__m256i whole) { return _mm256_cvtepi32_ps(whole); }

STEP void unpack(const Rows& rows, Tile<Q8_0>& to) {
    to.group[0].scales[0] = half(word(rows, 0));
    words(rows, 2, to.group[0].quads);
    words(rows, 18, to.group[0].quads + 4);
}

STEP void unpack(const Rows& rows, Tile<Q4_0>& to) {
    to.group[0].scales[0] = half(word(rows, 0));
    __m256i both[4];
    words(rows, 2, both);
    for (int v = 0; v < 4; ++v) {
        to.group[0].quads[v] = low_nibbles(both[v]);
        to.group[0].quads[v + 4] = high_nibbles(both[v]);
    }
}

STEP void unpack(const Rows& rows, Tile<Mxfp4>& to) {
    const __m256i one = _mm256_set1_epi32(1), byte = _mm256_and_si256(word(rows, 0), _mm256_set1_epi32(255));
    const __m256i normal = _mm256_slli_epi32(_mm256_sub_epi32(byte, one), 23);
    const __m256i small = _mm256_sllv_epi32(_mm256_set1_epi32(0x200000), byte);
    to.group[0].scales[0] =
        _mm256_castsi256_ps(_mm256_blendv_epi8(small, normal, _mm256_cmpgt_epi32(byte, one)));
    const __m128i numbers = _mm_loadu_si128(reinterpret_cast<const __m128i*>(E2M1));
    const __m256i table =
        _mm256_broadcastsi128_si256(_mm_add_epi8(numbers, _mm_set1_epi8(static_cast<char>(BIAS<Mxfp4>))));
    __m256i both[4];
    words(rows, 1, both);
    for (int v = 0; v < 4; ++v) {
        to.group[0].quads[v] = _mm256_shuffle_epi8(table, low_nibbles(both[v]));
        to.group[0].quads[v + 4] = _mm256_shuffle_epi8(table, high_nibbles(both[v]));
    }
}

STEP void unpack(const Rows& rows, Tile<Q4_K>& to) {
    __m256i header[4];  // scale and minimum; then bytes of four groups each, as in ggml.cpp
    words(rows, 0, header);
    const __m256 scale = half(header[0]), minimum = half(_mm256_srli_epi32(header[0], 16));
    const __m256i four_bits = _mm256_set1_epi32(15), six_bits = _mm256_set1_epi32(63), high = _mm256_set1_epi32(48);
    for (int g = 0; g < 4; ++g) {
        const __m256i scales = _mm256_srli_epi32(header[1], 8 * g), minima = _mm256_srli_epi32(header[2], 8 * g);
        const __m256i low = _mm256_srli_epi32(header[3], 8 * g);
        const __m256i later_scale = _mm256_or_si256(_mm256_and_si256(low, four_bits),
                                                    _mm256_and_si256(_mm256_srli_epi32(scales, 2), high));
        const __m256i later_minimum = _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi32(low, 4), four_bits),
                                                      _mm256_and_si256(_mm256_srli_epi32(minima, 2), high));
        to.group[g].scales[0] = _mm256_mul_ps(scale, as_floats(_mm256_and_si256(scales, six_bits)));
        to.group[g].minimum = _mm256_mul_ps(minimum, as_floats(_mm256_and_si256(minima, six_bits)));
        to.group[g + 4].scales[0] = _mm256_mul_ps(scale, as_floats(later_scale));
        to.group[g + 4].minimum = _mm256_mul_ps(minimum, as_floats(later_minimum));
    }
    for (int g = 0; g < 8; g += 2) {
        __m256i both[8];
        words(rows, 16 + 16 * g, both);
        words(rows, 32 + 16 * g, both + 4);
        for (int q = 0; q < 8; ++q) {
            to.group[g].quads[q] = low_nibbles(both[q]);
            to.group[g + 1].quads[q] = high_nibbles(both[q]);
        }
    }
}

STEP void unpack(const Rows& rows, Tile<Q6_K>& to) {
    const __m256 scale = half(_mm256_srli_epi32(word(rows, 206), 16));
    __m256i scales[4];
    words(rows, 192, scales);
    for (int i = 0; i < 16; ++i) {
        const __m256i number = _mm256_srai_epi32(_mm256_slli_epi32(scales[i / 4], 24 - i % 4 * 8), 24);
        to.group[i / 2].scales[i % 2] = _mm256_mul_ps(scale, as_floats(number));
    }
    const __m256i two_bits = _mm256_set1_epi8(48);
    for (int g = 0; g < 8; g += 4) {
        for (int part = 0; part < 2; ++part) {  // sixteen columns of four groups
            __m256i first[4], second[4], high[4];
            words(rows, 16 * g + 16 * part, first);
            words(rows, 16 * g + 16 * part + 32, second);
            words(rows, 128 + 8 * g + 16 * part, high);
            for (int i = 0; i < 4; ++i) {
                const int q = 4 * part + i;
                const auto with = [&](__m256i low, __m256i bits) __attribute__((always_inline, target("avx2"))) {
                    return _mm256_or_si256(low, _mm256_and_si256(bits, two_bits));
                };
                to.group[g].quads[q] = with(low_nibbles(first[i]), _mm256_slli_epi16(high[i], 4));
                to.group[g + 1].quads[q] = with(low_nibbles(second[i]), _mm256_slli_epi16(high[i], 2));
                to.group[g + 2].quads[q] = with(high_nibbles(first[i]), high[i]);
                to.group[g + 3].quads[q] = with(high_nibbles(second[i]), _mm256_srli_epi16(high[i], 2));
            }
        }
    }
}

// Adds the products of a tile and ROWS rows of activations, `groups` apart, to their totals.
template <class Stored, class Isa, int ROWS>
STEP void multiply(const Tile<Stored>& tile, const Rounded* x, int64_t groups, __m256* totals) {
    constexpr int64_t QUADS = GROUP / 4 / Stored::parts;
    constexpr bool SIGNED = Stored::bytes > Stored::columns;
    for (int64_t g = 0; g < Tile<Stored>::groups; ++g, ++x) {
        const auto& group = tile.group[g];
        __m256 products[ROWS];
        for (int64_t part = 0; part < Stored::parts; ++part) {
            __m256i dots[ROWS];
            for (int r = 0; r < ROWS; ++r) dots[r] = _mm256_setzero_si256();
            for (int64_t q = part * QUADS; q < (part + 1) * QUADS; q += 2) {
                const __m256i w = group.quads[q], w2 = group.quads[q + 1];
                for (int r = 0; r < ROWS; ++r) {
                    const int8_t* numbers = x[r * groups].numbers + 4 * q;
                    if (SIGNED) {
                        dots[r] = Isa::add8(Isa::add8(dots[r], w, four(numbers)), w2, four(numbers + 4));
                    } else {
                        dots[r] = Isa::add6(dots[r], w, four(numbers), w2, four(numbers + 4));
                    }
                    if (ROWS > 1) settle(dots[r]);
                }
            }
            for (int r = 0; r < ROWS; ++r) {
                const int32_t of_x = Stored::parts > 1 ? x[r * groups].sums[part] : x[r * groups].sum();
                if (SIGNED) dots[r] = Isa::end8(dots[r], of_x);
                if (BIAS<Stored>) dots[r] = _mm256_sub_epi32(dots[r], _mm256_set1_epi32(BIAS<Stored> * of_x));
                const __m256 product = _mm256_mul_ps(as_floats(dots[r]), group.scales[part]);
                products[r] = part ? _mm256_add_ps(products[r], product) : product;
            }
        }
        for (int r = 0; r < ROWS; ++r) {
            const Rounded& of_row = x[r * groups];
            if (Stored::minima) {
                const __m256 sum = _mm256_set1_ps(static_cast<float>(of_row.sum()));
                products[r] = _mm256_sub_ps(products[r], _mm256_mul_ps(sum, group.minimum));
            }
            totals[r] = _mm256_add_ps(totals[r], _mm256_mul_ps(products[r], _mm256_set1_ps(of_row.scale)));
        }
    }
}

template <class Stored, class Isa>
AVX2 void outputs(const Product& p, int64_t first, int64_t last) {
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
                Tile<Stored> tile;
                weights.block = b * Stored::bytes;
                unpack(weights, tile);
                const Rounded* x = p.rounded + row * groups + b * Tile<Stored>::groups;
                int64_t r = 0;
                for (; r + 4 <= rows; r += 4) multiply<Stored, Isa, 4>(tile, x + r * groups, groups, totals + r);
                if (rows - r == 3) multiply<Stored, Isa, 3>(tile, x + r * groups, groups, totals + r);
                if (rows - r == 2) multiply<Stored, Isa, 2>(tile, x + r * groups, groups, totals + r);
                if (rows - r == 1) multiply<Stored, Isa, 1>(tile, x + r * groups, groups, totals + r);
            }
            const size_t count = std::min<int64_t>(LANES, last - out) * sizeof(float);
            for (int64_t r = 0; r < rows; ++r) std::memcpy(p.y + (row + r) * p.stride + out - p.origin, &totals[r], count);
        }
    }
}

template <class Isa>
const Work OUTPUTS[] = {outputs<Q8_0, Isa>, outputs<Q4_0, Isa>, outputs<Q4_K, Isa>, outputs<Q6_K, Isa>,
                        outputs<Mxfp4, Isa>};

}  // namespace

const Work* ggml_outputs_x86() { return !has_avx2() ? nullptr : has_vnni() ? OUTPUTS<Vnni> : OUTPUTS<Maddubs>; }

#else

const Work* ggml_outputs_x86() { return nullptr; }

#endif

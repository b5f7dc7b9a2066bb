// Eight weight rows of GGUF's blocks as tiles in cache, like those of formats/tiles.py: rows are the lanes of vectors.
#pragma once

#include "blocks.h"
#include "x86.h"

#ifdef TIERLM_X86

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
constexpr int32_t BIAS<Q5_0> = 16;
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
    const __m256i low01 = _mm256_unpacklo_epi32(pairs[0], pairs[1]);
    const __m256i low23 = _mm256_unpacklo_epi32(pairs[2], pairs[3]);
    const __m256i high01 = _mm256_unpackhi_epi32(pairs[0], pairs[1]);
    const __m256i high23 = _mm256_unpackhi_epi32(pairs[2], pairs[3]);
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
// Four bits, and the two above them from bits 4 and 5 of `high`.
STEP __m256i six_bits(__m256i low, __m256i high) {
    return _mm256_or_si256(low, _mm256_and_si256(high, _mm256_set1_epi8(48)));
}
STEP __m256 as_floats(__m256i whole) { return _mm256_cvtepi32_ps(whole); }

STEP void unpack(const Rows& rows, Tile<Q8_0>& to) {
    to.group[0].scales[0] = half(word(rows, 0));
    words(rows, 2, to.group[0].quads);
    words(rows, 18, to.group[0].quads + 4);
}

// Two codes a byte, as in ggml.cpp, of one group whose bytes begin at `at`.
STEP void nibbles(const Rows& rows, int64_t at, __m256i* quads) {
    words(rows, at, quads);
    for (int q = 0; q < 4; ++q) {
        quads[q + 4] = high_nibbles(quads[q]);
        quads[q] = low_nibbles(quads[q]);
    }
}

STEP void unpack(const Rows& rows, Tile<Q4_0>& to) {
    to.group[0].scales[0] = half(word(rows, 0));
    nibbles(rows, 2, to.group[0].quads);
}

STEP void unpack(const Rows& rows, Tile<Q4_1>& to) {
    const __m256i header = word(rows, 0);
    to.group[0].scales[0] = half(header);
    to.group[0].minimum = _mm256_xor_ps(half(_mm256_srli_epi32(header, 16)), _mm256_set1_ps(-0.0f));
    nibbles(rows, 4, to.group[0].quads);
}

STEP void unpack(const Rows& rows, Tile<Q5_0>& to) {
    to.group[0].scales[0] = half(word(rows, 0));
    nibbles(rows, 6, to.group[0].quads);
    const __m256i bits = word(rows, 2), sixteen = _mm256_set1_epi8(16);  // a bit for each column, in order
    const __m256i lanes = _mm256_broadcastsi128_si256(_mm_set_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0));
    for (int i = 0; i < 4; ++i) {
        const __m256i byte = _mm256_shuffle_epi8(bits, _mm256_add_epi8(lanes, _mm256_set1_epi8(i)));  // four times
        for (int q = 2 * i; q < 2 * i + 2; ++q) {
            const __m256i own = _mm256_set1_epi32(q % 2 ? 0x80402010 : 0x08040201);
            const __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(byte, own), own);
            to.group[0].quads[q] = _mm256_or_si256(to.group[0].quads[q], _mm256_and_si256(set, sixteen));
        }
    }
}

STEP void unpack(const Rows& rows, Tile<Mxfp4>& to) {
    const __m256i one = _mm256_set1_epi32(1), byte = _mm256_and_si256(word(rows, 0), _mm256_set1_epi32(255));
    const __m256i normal = _mm256_slli_epi32(_mm256_sub_epi32(byte, one), 23);
    const __m256i small = _mm256_sllv_epi32(_mm256_set1_epi32(0x200000), byte);
    to.group[0].scales[0] = _mm256_castsi256_ps(_mm256_blendv_epi8(small, normal, _mm256_cmpgt_epi32(byte, one)));
    const __m128i numbers = _mm_loadu_si128(reinterpret_cast<const __m128i*>(E2M1));
    const __m256i table =
        _mm256_broadcastsi128_si256(_mm_add_epi8(numbers, _mm_set1_epi8(static_cast<char>(BIAS<Mxfp4>))));
    nibbles(rows, 1, to.group[0].quads);
    for (__m256i& quad : to.group[0].quads) quad = _mm256_shuffle_epi8(table, quad);
}

// The first 16 bytes of Q4_K and Q5_K.
template <class Stored>
STEP void scales_and_minima(const Rows& rows, Tile<Stored>& to) {
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
}

STEP void unpack(const Rows& rows, Tile<Q4_K>& to) {
    scales_and_minima(rows, to);
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

STEP void unpack(const Rows& rows, Tile<Q5_K>& to) {
    scales_and_minima(rows, to);
    __m256i fifth[8];  // bit g of a byte belongs to group g
    words(rows, 16, fifth);
    words(rows, 32, fifth + 4);
    for (int g = 0; g < 8; g += 2) {
        __m256i both[8];
        words(rows, 48 + 16 * g, both);
        words(rows, 64 + 16 * g, both + 4);
        for (int q = 0; q < 8; ++q) {
            const __m256i first = _mm256_and_si256(_mm256_slli_epi16(fifth[q], 4), _mm256_set1_epi8(16));
            const __m256i second = _mm256_and_si256(_mm256_slli_epi16(fifth[q], 3), _mm256_set1_epi8(16));
            to.group[g].quads[q] = _mm256_or_si256(low_nibbles(both[q]), first);
            to.group[g + 1].quads[q] = _mm256_or_si256(high_nibbles(both[q]), second);
            fifth[q] = _mm256_srli_epi16(fifth[q], 2);
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
    for (int g = 0; g < 8; g += 4) {
        for (int part = 0; part < 2; ++part) {  // sixteen columns of four groups
            __m256i first[4], second[4], high[4];
            words(rows, 16 * g + 16 * part, first);
            words(rows, 16 * g + 16 * part + 32, second);
            words(rows, 128 + 8 * g + 16 * part, high);
            for (int i = 0; i < 4; ++i) {
                const int q = 4 * part + i;
                to.group[g].quads[q] = six_bits(low_nibbles(first[i]), _mm256_slli_epi16(high[i], 4));
                to.group[g + 1].quads[q] = six_bits(low_nibbles(second[i]), _mm256_slli_epi16(high[i], 2));
                to.group[g + 2].quads[q] = six_bits(high_nibbles(first[i]), high[i]);
                to.group[g + 3].quads[q] = six_bits(high_nibbles(second[i]), _mm256_srli_epi16(high[i], 2));
            }
        }
    }
}

}  // namespace

#endif

// Blocks of GGUF files unpacked as tiles in cache, eight weight rows at a time. The rows are the lanes of vectors, as
// in formats/tiles.py.
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

// Groups of eight rows. `quads[q]`: columns 4 q to 4 q + 3 of each row, in lanes. They are bytes: the numbers,
// SIGNED, or the numbers plus BIAS, from 0 to 63.
template <class Stored>
struct Tile {
    static constexpr int64_t groups = Stored::columns / GROUP;
    struct {
        __m256i quads[GROUP / 4];
        __m256 scales[Stored::parts], minima[Stored::parts];
    } group[groups];
};

template <class Stored>
constexpr int32_t BIAS = 0;
template <>
constexpr int32_t BIAS<Q4_0> = 8;
template <>
constexpr int32_t BIAS<Q5_0> = 16;
template <>
constexpr int32_t BIAS<Q3_K> = 4;
template <>
constexpr int32_t BIAS<Q6_K> = 32;
template <>
constexpr int32_t BIAS<MXFP4> = 12;

template <class Stored>
constexpr bool SIGNED = false;
template <>
constexpr bool SIGNED<Q8_0> = true;
template <>
constexpr bool SIGNED<IQ4_NL> = true;
template <>
constexpr bool SIGNED<IQ4_XS> = true;

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
STEP __m256 as_floats(__m256i whole) { return _mm256_cvtepi32_ps(whole); }

STEP void unpack(const Rows& rows, Tile<Q8_0>& to) {
    to.group[0].scales[0] = half(word(rows, 0));
    words(rows, 2, to.group[0].quads);
    words(rows, 18, to.group[0].quads + 4);
}

// Two codes a byte, as in unpack.h, of one group whose bytes begin at `at`.
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

// A scale, and what is added to the numbers.
template <class Stored>
STEP void scale_and_offset(const Rows& rows, Tile<Stored>& to) {
    const __m256i header = word(rows, 0);
    to.group[0].scales[0] = half(header);
    to.group[0].minima[0] = _mm256_xor_ps(half(_mm256_srli_epi32(header, 16)), _mm256_set1_ps(-0.0f));
}

STEP void unpack(const Rows& rows, Tile<Q4_1>& to) {
    scale_and_offset(rows, to);
    nibbles(rows, 4, to.group[0].quads);
}

// Adds a fifth bit to each of 32 numbers, lowest first.
STEP void fifth_bits(const Rows& rows, int64_t at, __m256i* quads) {
    const __m256i bits = word(rows, at);
    const __m256i first = _mm256_broadcastsi128_si256(_mm_set_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0));
    for (int i = 0; i < 4; ++i) {  // byte i of each lane, four times
        const __m256i byte = _mm256_shuffle_epi8(bits, _mm256_add_epi8(first, _mm256_set1_epi8(static_cast<char>(i))));
        for (int q = 2 * i; q < 2 * i + 2; ++q) {
            const __m256i own = _mm256_set1_epi32(q % 2 ? static_cast<int32_t>(0x80402010) : 0x08040201);
            const __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(byte, own), own);
            quads[q] = _mm256_or_si256(quads[q], _mm256_and_si256(set, _mm256_set1_epi8(16)));
        }
    }
}

STEP void unpack(const Rows& rows, Tile<Q5_0>& to) {
    to.group[0].scales[0] = half(word(rows, 0));
    nibbles(rows, 6, to.group[0].quads);
    fifth_bits(rows, 2, to.group[0].quads);
}

STEP void unpack(const Rows& rows, Tile<Q5_1>& to) {
    scale_and_offset(rows, to);
    nibbles(rows, 8, to.group[0].quads);
    fifth_bits(rows, 4, to.group[0].quads);
}

// Replaces four-bit codes by their numbers plus a bias.
STEP void look_up(const int8_t* numbers, int32_t bias, __m256i* quads) {
    const __m128i table = _mm_loadu_si128(reinterpret_cast<const __m128i*>(numbers));
    const __m128i sums = _mm_add_epi8(table, _mm_set1_epi8(static_cast<char>(bias)));
    for (int q = 0; q < 8; ++q) quads[q] = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(sums), quads[q]);
}

STEP void unpack(const Rows& rows, Tile<IQ4_NL>& to) {
    to.group[0].scales[0] = half(word(rows, 0));
    nibbles(rows, 2, to.group[0].quads);
    look_up(CURVE, 0, to.group[0].quads);
}

STEP void unpack(const Rows& rows, Tile<MXFP4>& to) {
    const __m256i one = _mm256_set1_epi32(1), byte = _mm256_and_si256(word(rows, 0), _mm256_set1_epi32(255));
    const __m256i normal = _mm256_slli_epi32(_mm256_sub_epi32(byte, one), 23);
    const __m256i small = _mm256_sllv_epi32(_mm256_set1_epi32(0x200000), byte);
    to.group[0].scales[0] = _mm256_castsi256_ps(_mm256_blendv_epi8(small, normal, _mm256_cmpgt_epi32(byte, one)));
    nibbles(rows, 1, to.group[0].quads);
    look_up(E2M1, BIAS<MXFP4>, to.group[0].quads);
}

}  // namespace

#endif

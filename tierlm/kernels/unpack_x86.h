// Blocks of GGUF files unpacked in cache, several weight rows at a time. The rows are the lanes of vectors, as in
// formats/tiles.py.
#pragma once

#include "blocks.h"
#include "x86.h"

#ifdef TIERLM_X86

namespace {

// The same block of several weight rows: at byte `block` of each.
struct Rows {
    const uint8_t* row[WIDTH];
    int64_t block;
    INLINE const uint8_t* at(int r, int64_t byte) const { return row[r] + block + byte; }
};

// The scales and minima of a group of each row.
template <class Stored>
struct Factors {
    Values scales[Stored::parts], minima[Stored::parts];
};

// Quad q of a group is columns 4 q to 4 q + 3 of each row, in lanes. They are bytes: the numbers, SIGNED, or the
// numbers plus BIAS, from 0 to 63.
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

STEP __m128i sixteen(const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }

// of_rows: sixteen bytes of rows `r`, `r` + 4 and so on. looked_up: bytes of a table. half: float16 in the low 16 bits
// of each lane.
#ifdef TIERLM_AVX512
STEP Raw joined(__m128i a, __m128i b, __m128i c, __m128i d) {
    const __m512i low = _mm512_inserti32x4(_mm512_castsi128_si512(a), b, 1);
    return _mm512_inserti32x4(_mm512_inserti32x4(low, c, 2), d, 3);
}
STEP Raw of_rows(const Rows& rows, int r, int64_t at) {
    return joined(sixteen(rows.at(r, at)), sixteen(rows.at(r + 4, at)), sixteen(rows.at(r + 8, at)),
                  sixteen(rows.at(r + 12, at)));
}
STEP Raw low_words(Raw a, Raw b) { return _mm512_unpacklo_epi32(a, b); }
STEP Raw high_words(Raw a, Raw b) { return _mm512_unpackhi_epi32(a, b); }
STEP Codes low_pairs(Raw a, Raw b) { return codes(_mm512_unpacklo_epi64(a, b)); }
STEP Codes high_pairs(Raw a, Raw b) { return codes(_mm512_unpackhi_epi64(a, b)); }
STEP Codes looked_up(__m128i table, Codes at) {
    return codes(_mm512_shuffle_epi8(_mm512_broadcast_i32x4(table), raw(at)));
}
STEP Values half(Codes x) { return reinterpret_cast<Values>(_mm512_cvtph_ps(_mm512_cvtepi32_epi16(raw(x)))); }
#else
STEP Raw of_rows(const Rows& rows, int r, int64_t at) {
    return _mm256_inserti128_si256(_mm256_castsi128_si256(sixteen(rows.at(r, at))), sixteen(rows.at(r + 4, at)), 1);
}
STEP Raw low_words(Raw a, Raw b) { return _mm256_unpacklo_epi32(a, b); }
STEP Raw high_words(Raw a, Raw b) { return _mm256_unpackhi_epi32(a, b); }
STEP Codes low_pairs(Raw a, Raw b) { return codes(_mm256_unpacklo_epi64(a, b)); }
STEP Codes high_pairs(Raw a, Raw b) { return codes(_mm256_unpackhi_epi64(a, b)); }
STEP Codes looked_up(__m128i table, Codes at) {
    return codes(_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(table), raw(at)));
}
STEP Values half(Codes x) {
    const __m256i low = _mm256_permute4x64_epi64(_mm256_packus_epi32(raw(x & 0xffffu), _mm256_setzero_si256()), 0xd8);
    return reinterpret_cast<Values>(_mm256_cvtph_ps(_mm256_castsi256_si128(low)));
}
#endif

// `unpack` hands the groups of a block to a sink: quad(g, q, codes) of all quads in any order, and after them end(g,
// factors) in order.

// Sixteen bytes of each row: word i of all rows is `to[i]`.
STEP void words(const Rows& rows, int64_t at, Codes* to) {
    const Raw a = of_rows(rows, 0, at), b = of_rows(rows, 1, at), c = of_rows(rows, 2, at), d = of_rows(rows, 3, at);
    const Raw low01 = low_words(a, b), low23 = low_words(c, d), high01 = high_words(a, b), high23 = high_words(c, d);
    to[0] = low_pairs(low01, low23);
    to[1] = high_pairs(low01, low23);
    to[2] = low_pairs(high01, high23);
    to[3] = high_pairs(high01, high23);
}

// Four bytes of each row.
STEP Codes word(const Rows& rows, int64_t at) {
    Codes found;
    for (int r = 0; r < WIDTH; ++r) {
        uint32_t one;
        std::memcpy(&one, rows.at(r, at), sizeof one);
        found[r] = one;
    }
    return found;
}

STEP Values as_floats(Codes whole) { return __builtin_convertvector(reinterpret_cast<Sums>(whole), Values); }
STEP Values bits(Codes x) { return reinterpret_cast<Values>(x); }

STEP Codes low_nibbles(Codes bytes) { return bytes & 0x0f0f0f0fu; }
STEP Codes high_nibbles(Codes bytes) { return bytes >> 4 & 0x0f0f0f0fu; }

// Numbers of four-bit codes plus a bias.
STEP Codes number_of(const int8_t* numbers, int32_t bias, Codes at) {
    const __m128i table = _mm_loadu_si128(reinterpret_cast<const __m128i*>(numbers));
    return looked_up(_mm_add_epi8(table, _mm_set1_epi8(static_cast<char>(bias))), at);
}

// Two codes a byte, as in unpack.h, of group `g`, whose bytes begin at `at`. `number` makes a quad of its codes.
template <class To, class Number>
STEP void nibbles(const Rows& rows, int64_t at, int64_t g, To& to, Number number) {
    Codes both[4];
    words(rows, at, both);
#pragma GCC unroll 4
    for (int64_t q = 0; q < 4; ++q) {
        to.quad(g, q, number(low_nibbles(both[q]), q));
        to.quad(g, q + 4, number(high_nibbles(both[q]), q + 4));
    }
}

template <class Stored>
STEP Factors<Stored> only(Values scale) {
    Factors<Stored> found;
    found.scales[0] = scale;
    return found;
}

// A scale, and what is added to the numbers.
template <class Stored>
STEP Factors<Stored> scale_and_offset(Codes header) {
    Factors<Stored> found = only<Stored>(half(header));
    found.minima[0] = -half(header >> 16);
    return found;
}

template <class To>
STEP void unpack(Q8_0, const Rows& rows, To& to) {
#pragma GCC unroll 2
    for (int64_t part = 0; part < 2; ++part) {
        Codes four[4];
        words(rows, 2 + 16 * part, four);
        for (int64_t q = 0; q < 4; ++q) to.quad(0, 4 * part + q, four[q]);
    }
    to.end(0, only<Q8_0>(half(word(rows, 0))));
}

template <class To>
STEP void unpack(Q4_0, const Rows& rows, To& to) {
    nibbles(rows, 2, 0, to, [](Codes codes, int64_t) INLINED { return codes; });
    to.end(0, only<Q4_0>(half(word(rows, 0))));
}

template <class To>
STEP void unpack(Q4_1, const Rows& rows, To& to) {
    nibbles(rows, 4, 0, to, [](Codes codes, int64_t) INLINED { return codes; });
    to.end(0, scale_and_offset<Q4_1>(word(rows, 0)));
}

// The fifth bits, lowest first, of quad `q`: a product puts four bits in four bytes.
STEP Codes fifth_bits(Codes all, int64_t q) { return ((all >> 4 * q & 15u) * 0x00204081u & 0x01010101u) << 4; }

template <class To>
STEP void unpack(Q5_0, const Rows& rows, To& to) {
    const Codes bits = word(rows, 2);
    nibbles(rows, 6, 0, to, [=](Codes codes, int64_t q) INLINED { return codes | fifth_bits(bits, q); });
    to.end(0, only<Q5_0>(half(word(rows, 0))));
}

template <class To>
STEP void unpack(Q5_1, const Rows& rows, To& to) {
    const Codes bits = word(rows, 4);
    nibbles(rows, 8, 0, to, [=](Codes codes, int64_t q) INLINED { return codes | fifth_bits(bits, q); });
    to.end(0, scale_and_offset<Q5_1>(word(rows, 0)));
}

template <class To>
STEP void unpack(IQ4_NL, const Rows& rows, To& to) {
    nibbles(rows, 2, 0, to, [](Codes codes, int64_t) INLINED { return number_of(CURVE, 0, codes); });
    to.end(0, only<IQ4_NL>(half(word(rows, 0))));
}

template <class To>
STEP void unpack(MXFP4, const Rows& rows, To& to) {
    nibbles(rows, 1, 0, to, [](Codes codes, int64_t) INLINED { return number_of(E2M1, BIAS<MXFP4>, codes); });
    const Codes byte = word(rows, 0) & 255u;
    const Codes scale = byte < 2u ? 0x200000u << byte : (byte - 1u) << 23;
    to.end(0, only<MXFP4>(bits(scale)));
}

}  // namespace

#endif

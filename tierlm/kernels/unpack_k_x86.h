// Blocks of eight groups unpacked as in unpack_x86.h.
#pragma once

#include "unpack_x86.h"

#ifdef TIERLM_X86

namespace {

// 32 bytes of each row, as in `words`.
STEP void more_words(const Rows& rows, int64_t at, __m256i* to) {
    words(rows, at, to);
    words(rows, at + 16, to + 4);
}

// `scale` times codes of six bits minus 32: the lowest four bits of `low`, and above them the lowest two of `high`.
STEP __m256 signed_six(__m256 scale, __m256i low, __m256i high) {
    const __m256i upper = _mm256_slli_epi32(_mm256_and_si256(high, _mm256_set1_epi32(3)), 4);
    const __m256i code = _mm256_or_si256(_mm256_and_si256(low, _mm256_set1_epi32(15)), upper);
    return _mm256_mul_ps(scale, as_floats(_mm256_sub_epi32(code, _mm256_set1_epi32(32))));
}

// Four codes a byte, as in unpack.h.
template <class Stored>
STEP void two_bits(const Rows& rows, int64_t at, Tile<Stored>& to) {
    for (int g = 0; g < 8; g += 4) {
        __m256i codes[8];
        more_words(rows, at + 8 * g, codes);
        for (int q = 0; q < 8; ++q) {
            const __m256i mask = _mm256_set1_epi8(3);
            to.group[g].quads[q] = _mm256_and_si256(codes[q], mask);
            to.group[g + 1].quads[q] = _mm256_and_si256(_mm256_srli_epi16(codes[q], 2), mask);
            to.group[g + 2].quads[q] = _mm256_and_si256(_mm256_srli_epi16(codes[q], 4), mask);
            to.group[g + 3].quads[q] = _mm256_and_si256(_mm256_srli_epi16(codes[q], 6), mask);
        }
    }
}

// Adds a bit of the value 1 << PLACE to each number, in the order of unpack.h.
template <int PLACE, class Stored>
STEP void one_bit(const Rows& rows, int64_t at, Tile<Stored>& to) {
    __m256i bits[8];
    more_words(rows, at, bits);
    for (auto& group : to.group) {
        for (int q = 0; q < 8; ++q) {
            const __m256i bit = _mm256_and_si256(_mm256_slli_epi16(bits[q], PLACE), _mm256_set1_epi8(1 << PLACE));
            group.quads[q] = _mm256_or_si256(group.quads[q], bit);
            bits[q] = _mm256_srli_epi16(bits[q], 1);
        }
    }
}

STEP void unpack(const Rows& rows, Tile<Q2_K>& to) {
    const __m256i header = word(rows, 80), four_bits = _mm256_set1_epi32(15);
    const __m256 scale = half(header), minimum = half(_mm256_srli_epi32(header, 16));
    __m256i codes[4];
    words(rows, 0, codes);
    for (int i = 0; i < 16; ++i) {
        const __m256i code = _mm256_srli_epi32(codes[i / 4], i % 4 * 8);
        const __m256i upper = _mm256_and_si256(_mm256_srli_epi32(code, 4), four_bits);
        to.group[i / 2].scales[i % 2] = _mm256_mul_ps(scale, as_floats(_mm256_and_si256(code, four_bits)));
        to.group[i / 2].minima[i % 2] = _mm256_mul_ps(minimum, as_floats(upper));
    }
    two_bits(rows, 16, to);
}

STEP void unpack(const Rows& rows, Tile<Q3_K>& to) {
    __m256i last[4], codes[3];  // bytes 94 to 109; bytes 96 to 107
    words(rows, 94, last);
    for (int i = 0; i < 3; ++i)
        codes[i] = _mm256_or_si256(_mm256_srli_epi32(last[i], 16), _mm256_slli_epi32(last[i + 1], 16));
    const __m256 scale = half(_mm256_srli_epi32(last[3], 16));
    for (int i = 0; i < 16; ++i) {
        const __m256i low = _mm256_srli_epi32(codes[i / 4 % 2], i % 4 * 8 + i / 8 * 4);
        const __m256i high = _mm256_srli_epi32(codes[2], i % 4 * 8 + i / 4 * 2);
        to.group[i / 2].scales[i % 2] = signed_six(scale, low, high);
    }
    two_bits(rows, 32, to);
    one_bit<2>(rows, 0, to);
}

// The first 16 bytes of Q4_K and Q5_K.
template <class Stored>
STEP void scales_and_minima(const Rows& rows, Tile<Stored>& to) {
    __m256i header[4];  // scale and minimum; then bytes of four groups each, as in unpack.h
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
        to.group[g].minima[0] = _mm256_mul_ps(minimum, as_floats(_mm256_and_si256(minima, six_bits)));
        to.group[g + 4].scales[0] = _mm256_mul_ps(scale, as_floats(later_scale));
        to.group[g + 4].minima[0] = _mm256_mul_ps(minimum, as_floats(later_minimum));
    }
}

// Two codes a byte: the low bits of 32 bytes are those of a group, the high ones of the next.
template <class Stored>
STEP void four_bits(const Rows& rows, int64_t at, Tile<Stored>& to) {
    for (int g = 0; g < 8; g += 2) {
        __m256i both[8];
        more_words(rows, at + 16 * g, both);
        for (int q = 0; q < 8; ++q) {
            to.group[g].quads[q] = low_nibbles(both[q]);
            to.group[g + 1].quads[q] = high_nibbles(both[q]);
        }
    }
}

STEP void unpack(const Rows& rows, Tile<Q4_K>& to) {
    scales_and_minima(rows, to);
    four_bits(rows, 16, to);
}

STEP void unpack(const Rows& rows, Tile<Q5_K>& to) {
    scales_and_minima(rows, to);
    four_bits(rows, 48, to);
    one_bit<4>(rows, 16, to);
}

// Four bits, and the two above them from bits 4 and 5 of `high`.
STEP __m256i six_bits(__m256i low, __m256i high) {
    return _mm256_or_si256(low, _mm256_and_si256(high, _mm256_set1_epi8(48)));
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

STEP void unpack(const Rows& rows, Tile<IQ4_XS>& to) {
    __m256i header[4];
    words(rows, 0, header);
    const __m256 scale = half(header[0]);
    for (int g = 0; g < 8; ++g) {
        const __m256i low = _mm256_srli_epi32(header[1], 4 * g), high = _mm256_srli_epi32(header[0], 16 + 2 * g);
        to.group[g].scales[0] = signed_six(scale, low, high);
        nibbles(rows, 8 + 16 * g, to.group[g].quads);
        look_up(CURVE, 0, to.group[g].quads);
    }
}

}  // namespace

#endif

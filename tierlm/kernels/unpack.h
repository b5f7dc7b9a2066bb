// Blocks of GGUF files unpacked into numbers, scales and minima, on any processor.
#pragma once

#include <cstring>

#include "blocks.h"

namespace {

template <class Stored>
struct Block {
    int8_t numbers[Stored::columns];
    float scales[GROUPS<Stored> * Stored::parts];
    float minima[GROUPS<Stored> * Stored::parts];  // if it has any
};

INLINE float as_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE float half(const uint8_t* p) {  // as from_half in vectors.h
    const uint32_t raw = p[0] | p[1] << 8, size = (raw & 0x7fffu) << 13;
    const float value = size < 0x800000u ? as_float(size | 0x38800000u) - 0x1p-14f : as_float(size + 0x38000000u);
    return raw & 0x8000u ? -value : value;
}

INLINE void unpack(const uint8_t* p, Block<Q8_0>& to) {
    to.scales[0] = half(p);
    std::memcpy(to.numbers, p + 2, sizeof to.numbers);
}

// Two codes a byte: the low bits are those of the first half of a group, the high ones of the second.
INLINE void nibbles(const uint8_t* p, int64_t half, int8_t* numbers) {
    for (int64_t i = 0; i < half; ++i) {
        numbers[i] = static_cast<int8_t>(p[i] & 15);
        numbers[half + i] = static_cast<int8_t>(p[i] >> 4);
    }
}

// Adds a fifth bit to each of 32 numbers, lowest first.
INLINE void fifth_bits(const uint8_t* p, int8_t* numbers) {
    for (int i = 0; i < 32; ++i) numbers[i] += static_cast<int8_t>((p[i / 8] >> i % 8 & 1) * 16);
}

INLINE void unpack(const uint8_t* p, Block<Q4_0>& to) {
    to.scales[0] = half(p);
    nibbles(p + 2, 16, to.numbers);
    for (int8_t& number : to.numbers) number -= 8;
}

INLINE void unpack(const uint8_t* p, Block<Q4_1>& to) {
    to.scales[0] = half(p);
    to.minima[0] = -half(p + 2);
    nibbles(p + 4, 16, to.numbers);
}

INLINE void unpack(const uint8_t* p, Block<Q5_0>& to) {
    to.scales[0] = half(p);
    nibbles(p + 6, 16, to.numbers);
    fifth_bits(p + 2, to.numbers);
    for (int8_t& number : to.numbers) number -= 16;
}

INLINE void unpack(const uint8_t* p, Block<Q5_1>& to) {
    to.scales[0] = half(p);
    to.minima[0] = -half(p + 2);
    nibbles(p + 8, 16, to.numbers);
    fifth_bits(p + 4, to.numbers);
}

INLINE void unpack(const uint8_t* p, Block<IQ4_NL>& to) {
    to.scales[0] = half(p);
    nibbles(p + 2, 16, to.numbers);
    for (int8_t& number : to.numbers) number = CURVE[number];
}

INLINE void unpack(const uint8_t* p, Block<MXFP4>& to) {
    to.scales[0] = as_float(p[0] < 2 ? 0x200000u << p[0] : (p[0] - 1u) << 23);  // 2 ** (p[0] - 128)
    nibbles(p + 1, 16, to.numbers);
    for (int8_t& number : to.numbers) number = E2M1[number];
}

// Four codes a byte, in two halves: the lowest bits of 32 bytes are those of a half's first group.
INLINE int8_t two_bits(const uint8_t* p, int column) {
    return static_cast<int8_t>(p[column / 128 * 32 + column % 32] >> column % 128 / 32 * 2 & 3);
}

// A bit for each column: those of 32 bytes, lowest first, belong to the eight groups.
INLINE int8_t one_bit(const uint8_t* p, int column) {
    return static_cast<int8_t>(p[column % 32] >> column / 32 & 1);
}

INLINE void unpack(const uint8_t* p, Block<Q2_K>& to) {
    const float scale = half(p + 80), minimum = half(p + 82);
    for (int i = 0; i < 16; ++i) {
        to.scales[i] = scale * (p[i] & 15);
        to.minima[i] = minimum * (p[i] >> 4);
    }
    for (int i = 0; i < 256; ++i) to.numbers[i] = two_bits(p + 16, i);
}

INLINE void unpack(const uint8_t* p, Block<Q3_K>& to) {
    const float scale = half(p + 108);
    for (int i = 0; i < 16; ++i) {
        const int low = p[96 + i % 8] >> i / 8 * 4 & 15, high = p[104 + i % 4] >> i / 4 * 2 & 3;
        to.scales[i] = scale * ((low | high << 4) - 32);
    }
    for (int i = 0; i < 256; ++i) to.numbers[i] = two_bits(p + 32, i) + 4 * one_bit(p, i) - 4;
}

// The first 16 bytes of Q4_K and Q5_K.
template <class Stored>
INLINE void scales_and_minima(const uint8_t* p, Block<Stored>& to) {
    const float scale = half(p), minimum = half(p + 2);
    const uint8_t *six = p + 4, *low = p + 12;  // six bits of four scales and minima, and two more bits of the others
    for (int g = 0; g < 4; ++g) {
        to.scales[g] = scale * (six[g] & 63);
        to.minima[g] = minimum * (six[4 + g] & 63);
        to.scales[4 + g] = scale * ((low[g] & 15) | (six[g] >> 6 << 4));
        to.minima[4 + g] = minimum * ((low[g] >> 4) | (six[4 + g] >> 6 << 4));
    }
}

INLINE void unpack(const uint8_t* p, Block<Q4_K>& to) {
    scales_and_minima(p, to);
    for (int i = 0; i < 4; ++i) nibbles(p + 16 + 32 * i, 32, to.numbers + 64 * i);
}

INLINE void unpack(const uint8_t* p, Block<Q5_K>& to) {
    scales_and_minima(p, to);
    for (int i = 0; i < 4; ++i) nibbles(p + 48 + 32 * i, 32, to.numbers + 64 * i);
    for (int i = 0; i < 256; ++i) to.numbers[i] += 16 * one_bit(p + 16, i);
}

INLINE void unpack(const uint8_t* p, Block<Q6_K>& to) {
    const float scale = half(p + 208);
    for (int i = 0; i < 16; ++i) to.scales[i] = scale * static_cast<int8_t>(p[192 + i]);
    for (int i = 0; i < 64; ++i) {
        const int at = i / 32 * 128 + i % 32, high = p[128 + i];
        const uint8_t* low = p + i / 32 * 64 + i % 32;
        to.numbers[at] = static_cast<int8_t>(((low[0] & 15) | (high & 3) << 4) - 32);
        to.numbers[at + 32] = static_cast<int8_t>(((low[32] & 15) | (high >> 2 & 3) << 4) - 32);
        to.numbers[at + 64] = static_cast<int8_t>((low[0] >> 4 | (high >> 4 & 3) << 4) - 32);
        to.numbers[at + 96] = static_cast<int8_t>((low[32] >> 4 | high >> 6 << 4) - 32);
    }
}

INLINE void unpack(const uint8_t* p, Block<IQ4_XS>& to) {
    const float scale = half(p);
    for (int g = 0; g < 8; ++g) {
        const int low = p[4 + g / 2] >> g % 2 * 4 & 15, high = p[2 + g / 4] >> g % 4 * 2 & 3;
        to.scales[g] = scale * ((low | high << 4) - 32);
        nibbles(p + 8 + 16 * g, 16, to.numbers + 32 * g);
    }
    for (int8_t& number : to.numbers) number = CURVE[number];
}

}  // namespace

// Blocks of eight groups unpacked as in unpack_x86.h.
#pragma once

#include "unpack_x86.h"

#ifdef TIERLM_X86

namespace {

// 32 bytes of each row, as in `words`.
STEP void more_words(const Rows& rows, int64_t at, Codes* to) {
    words(rows, at, to);
    words(rows, at + 16, to + 4);
}

// `scale` times codes of six bits minus 32: the lowest four bits of `low`, and above them the lowest two of `high`.
STEP Values signed_six(Values scale, Codes low, Codes high) {
    return scale * as_floats(((low & 15u) | (high & 3u) << 4) - 32u);
}

template <class Stored>
STEP Factors<Stored> both(Values first, Values second) {
    Factors<Stored> found = only<Stored>(first);
    found.scales[1] = second;
    return found;
}

// A bit of the value 1 << PLACE of each number of group `g`, in the order of unpack.h.
template <int PLACE>
STEP Codes one_bit(Codes eight, int64_t g) {
    return (g < PLACE ? eight << (PLACE - g) : eight >> (g - PLACE)) & 0x01010101u << PLACE;
}

// Four codes a byte, as in unpack.h, of groups `g` to `g` + 3.
template <class To, class Number>
STEP void two_bits(const Rows& rows, int64_t at, int64_t g, To& to, Number number) {
    Codes four[8];
    more_words(rows, at + 8 * g, four);
#pragma GCC unroll 8
    for (int64_t q = 0; q < 8; ++q)
#pragma GCC unroll 4
        for (int64_t i = g; i < g + 4; ++i) to.quad(i, q, number(four[q] >> 2 * (i - g) & 0x03030303u, i, q));
}

template <class To>
STEP void unpack(Q2_K, const Rows& rows, To& to) {
    const Codes header = word(rows, 80);
    const Values scale = half(header), minimum = half(header >> 16);
    Codes four[4];
    words(rows, 0, four);
    const auto factors = [&](int64_t g) INLINED {
        Factors<Q2_K> found;
        for (int64_t part = 0; part < 2; ++part) {
            const Codes code = four[g / 2] >> (g % 2 * 16 + part * 8);
            found.scales[part] = scale * as_floats(code & 15u);
            found.minima[part] = minimum * as_floats(code >> 4 & 15u);
        }
        return found;
    };
#pragma GCC unroll 8
    for (int64_t g = 0; g < 8; g += 4) {
        two_bits(rows, 16, g, to, [](Codes codes, int64_t, int64_t) INLINED { return codes; });
#pragma GCC unroll 4
        for (int64_t i = g; i < g + 4; ++i) to.end(i, factors(i));
    }
}

template <class To>
STEP void unpack(Q3_K, const Rows& rows, To& to) {
    Codes last[4], six[3], eight[8];  // bytes 94 to 109; bytes 96 to 107; the first 32 bytes
    words(rows, 94, last);
    for (int i = 0; i < 3; ++i) six[i] = last[i] >> 16 | last[i + 1] << 16;
    const Values scale = half(last[3] >> 16);
    more_words(rows, 0, eight);
    const auto scale_at = [&](int64_t i) INLINED {
        return signed_six(scale, six[i / 4 % 2] >> (i % 4 * 8 + i / 8 * 4), six[2] >> (i % 4 * 8 + i / 4 * 2));
    };
#pragma GCC unroll 8
    for (int64_t g = 0; g < 8; g += 4) {
        two_bits(rows, 32, g, to, [&](Codes codes, int64_t i, int64_t q) INLINED {
            return codes | one_bit<2>(eight[q], i);
        });
#pragma GCC unroll 4
        for (int64_t i = g; i < g + 4; ++i) to.end(i, both<Q3_K>(scale_at(2 * i), scale_at(2 * i + 1)));
    }
}

// The first 16 bytes of Q4_K and Q5_K.
template <class Stored>
struct Header {
    Values scale, minimum;
    Codes scales, minima, low;  // as in unpack.h

    STEP Header of(const Rows& rows) {
        Codes four[4];
        words(rows, 0, four);
        return {half(four[0]), half(four[0] >> 16), four[1], four[2], four[3]};
    }
    STEP Values six(const Header& h, int64_t g, Values unit, Codes first, int64_t nibble) {
        const Codes code = first >> 8 * (g % 4);
        if (g < 4) return unit * as_floats(code & 63u);
        return unit * as_floats((h.low >> (8 * (g % 4) + 4 * nibble) & 15u) | (code >> 2 & 48u));
    }
    STEP Factors<Stored> factors(const Header& h, int64_t g) {
        Factors<Stored> found = only<Stored>(six(h, g, h.scale, h.scales, 0));
        found.minima[0] = six(h, g, h.minimum, h.minima, 1);
        return found;
    }
};

// Two codes a byte: the low bits of 32 bytes are those of a group, the high ones of the next.
template <class Stored, class To, class Number>
STEP void four_bits(const Rows& rows, int64_t at, To& to, Number number) {
    const Header<Stored> header = Header<Stored>::of(rows);
#pragma GCC unroll 8
    for (int64_t g = 0; g < 8; g += 2) {
#pragma GCC unroll 2
        for (int64_t part = 0; part < 8; part += 4) {
            Codes both[4];
            words(rows, at + 16 * g + 4 * part, both);
#pragma GCC unroll 4
            for (int64_t q = part; q < part + 4; ++q) {
                to.quad(g, q, number(low_nibbles(both[q - part]), g, q));
                to.quad(g + 1, q, number(high_nibbles(both[q - part]), g + 1, q));
            }
        }
        for (int64_t i = g; i < g + 2; ++i) to.end(i, Header<Stored>::factors(header, i));
    }
}

template <class To>
STEP void unpack(Q4_K, const Rows& rows, To& to) {
    four_bits<Q4_K>(rows, 16, to, [](Codes codes, int64_t, int64_t) INLINED { return codes; });
}

template <class To>
STEP void unpack(Q5_K, const Rows& rows, To& to) {
    Codes eight[8];
    more_words(rows, 16, eight);
    four_bits<Q5_K>(rows, 48, to, [&](Codes codes, int64_t g, int64_t q) INLINED {
        return codes | one_bit<4>(eight[q], g);
    });
}

// Four bits, and the two above them from bits 4 and 5 of `high`.
STEP Codes six_bits(Codes low, Codes high) { return low | (high & 0x30303030u); }

template <class To>
STEP void unpack(Q6_K, const Rows& rows, To& to) {
    const Values scale = half(word(rows, 206) >> 16);
    Codes scales[4];
    words(rows, 192, scales);
    const auto scale_at = [&](int64_t i) INLINED {
        const Sums number = reinterpret_cast<Sums>(scales[i / 4] << (24 - i % 4 * 8)) >> 24;
        return scale * as_floats(reinterpret_cast<Codes>(number));
    };
#pragma GCC unroll 8
    for (int64_t g = 0; g < 8; g += 4) {
#pragma GCC unroll 2
        for (int64_t part = 0; part < 2; ++part) {  // sixteen columns of four groups
            Codes first[4], second[4], high[4];
            words(rows, 16 * g + 16 * part, first);
            words(rows, 16 * g + 16 * part + 32, second);
            words(rows, 128 + 8 * g + 16 * part, high);
#pragma GCC unroll 4
            for (int64_t i = 0; i < 4; ++i) {
                const int64_t q = 4 * part + i;
                to.quad(g, q, six_bits(low_nibbles(first[i]), high[i] << 4));
                to.quad(g + 1, q, six_bits(low_nibbles(second[i]), high[i] << 2));
                to.quad(g + 2, q, six_bits(high_nibbles(first[i]), high[i]));
                to.quad(g + 3, q, six_bits(high_nibbles(second[i]), high[i] >> 2));
            }
        }
#pragma GCC unroll 4
        for (int64_t i = g; i < g + 4; ++i) to.end(i, both<Q6_K>(scale_at(2 * i), scale_at(2 * i + 1)));
    }
}

template <class To>
STEP void unpack(IQ4_XS, const Rows& rows, To& to) {
    Codes header[4];
    words(rows, 0, header);
    const Values scale = half(header[0]);
#pragma GCC unroll 8
    for (int64_t g = 0; g < 8; ++g) {
        nibbles(rows, 8 + 16 * g, g, to, [](Codes codes, int64_t) INLINED { return number_of(CURVE, 0, codes); });
        to.end(g, only<IQ4_XS>(signed_six(scale, header[1] >> 4 * g, header[0] >> (16 + 2 * g))));
    }
}

}  // namespace

#endif

// Floats to integers and a scale, rounding half to even: activations to int8, weights to tiles of int8 and int4.
//
// Products are rounded before additions (no FMA), so that all processors, and torch, give the same numbers.
#if defined(__clang__)
#pragma clang fp contract(off)
#else
#pragma GCC optimize("fp-contract=off")
#endif

#include <algorithm>
#include <cstring>

#include "product.h"

namespace {

constexpr float NEGLIGIBLE = 1e-30f;  // a group with no larger magnitude becomes zeros
constexpr float WHOLE = 0x1.8p23f;    // adding and subtracting it rounds magnitudes below 2^22

INLINE Floats whole(Floats x) { return (x + WHOLE) - WHOLE; }

// Rounds a group of activations; the largest magnitude becomes 127. An infinity or NaN makes the scale NaN, so that it
// propagates to the outputs.
INLINE void round_group(const float* x, int64_t count, Rounded* to) {
    constexpr int VECTORS = GROUP / LANES;
    Floats values[VECTORS] = {};
    std::memcpy(values, x, count * sizeof(float));
    Floats largest = {}, nothing = {};
    for (int v = 0; v < VECTORS; ++v) {
        const Floats size = values[v] < 0.0f ? -values[v] : values[v];
        largest = size > largest ? size : largest;
        nothing += values[v] * 0.0f;
    }
    float most = 0, poison = 0;
    for (int i = 0; i < LANES; ++i) {
        most = std::max(most, largest[i]);
        poison += nothing[i];
    }
    const float inverse = most > NEGLIGIBLE && poison == 0 ? 127.0f / most : 0.0f;
    to->scale = most / 127.0f + poison;
    Ints sums[2] = {};
    for (int v = 0; v < VECTORS; ++v) {
        const Ints number = poison == 0 ? __builtin_convertvector(whole(values[v] * inverse), Ints) : Ints{};
        sums[v * 2 / VECTORS] += number;
        for (int i = 0; i < LANES; ++i) to->numbers[v * LANES + i] = static_cast<int8_t>(number[i]);
    }
    for (int half = 0; half < 2; ++half) {
        to->sums[half] = 0;
        for (int i = 0; i < LANES; ++i) to->sums[half] += static_cast<int16_t>(sums[half][i]);
    }
    to->total = static_cast<float>(to->sum());
}

// The bits of the nearest float16, clamped to its finite range.
INLINE Words to_half(Floats x) {
    const Floats size = x < 0.0f ? -x : x;
    const Words bits = reinterpret_cast<Words>((size > 65504.0f ? Floats{} + 65504.0f : size) * 0x1p-112f);
    const Words rounded = (bits + 0xfffu + ((bits >> 13) & 1u)) >> 13;
    return rounded | (reinterpret_cast<Words>(x) >> 31 << 15);
}

INLINE Floats as_half(Floats x) {
    const Halves bits = __builtin_convertvector(to_half(x), Halves);
    return from_half(&bits);
}

// The nearest integer to each value times the inverse of its scale, clamped.
INLINE Floats number(Floats value, Floats inverse, float low, float high) {
    const Floats found = whole(value * inverse);
    return found < low ? Floats{} + low : found > high ? Floats{} + high : found;
}

INLINE Floats inverse_of(Floats scale) { return scale == 0.0f ? Floats{} : 1.0f / scale; }

// The values of a tile, 8 rows per vector, and each row's value of largest magnitude.
struct Values {
    Floats columns[GROUP];
    Floats largest;
};

INLINE Values values_at(const float* w, int64_t outs, int64_t ins, int64_t row, int64_t column) {
    Values found = {};
    Floats most = {};
    for (int64_t c = 0; c < std::min(GROUP, ins - column); ++c) {
        Floats& values = found.columns[c];
        for (int64_t r = 0; r < std::min<int64_t>(LANES, outs - row); ++r) values[r] = w[(row + r) * ins + column + c];
        const Floats size = values < 0.0f ? -values : values;
        found.largest = size > most ? values : found.largest;
        most = size > most ? size : most;
    }
    return found;
}

INLINE Floats int8_scale(const Values& values) {
    return as_half((values.largest < 0.0f ? -values.largest : values.largest) / 127.0f);
}

// The search in formats/tiles.py, Int4Tiles.
INLINE Floats int4_scale(const Values& values) {
    Floats best = Floats{} + __builtin_inff(), scale = {};
    for (int step = 0; step < 13; ++step) {
        Floats inverse = inverse_of(as_half(values.largest / (-6.0f - 0.25f * step)));
        Floats product = {}, square = {}, error = {};
        for (int64_t c = 0; c < GROUP; ++c) {
            const Floats found = number(values.columns[c], inverse, -8, 7);
            product += values.columns[c] * found;
            square += found * found;
        }
        const Floats tried = as_half(product / (square < 1.0f ? Floats{} + 1.0f : square));
        inverse = inverse_of(tried);
        for (int64_t c = 0; c < GROUP; ++c) {
            const Floats lost = values.columns[c] - tried * number(values.columns[c], inverse, -8, 7);
            error += lost * lost;
        }
        scale = error < best ? tried : scale;
        best = error < best ? error : best;
    }
    return scale;
}

}  // namespace

CLONES void round_activations(const float* x, Rounded* rounded, int64_t rows, int64_t ins, int64_t first,
                              int64_t last) {
    const int64_t groups = groups_of(ins);
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t i = first; i < last; i += GROUP)
            round_group(x + row * ins + i, std::min(GROUP, last - i), rounded + row * groups + i / GROUP);
}

CLONES void quantised(const float* w, uint8_t* data, uint16_t* scales, int64_t outs, int64_t ins, int64_t first,
                      int64_t last, bool four) {
    for (int64_t row = first; row < last; row += LANES) {
        for (int64_t column = 0; column < ins; column += GROUP) {
            const int64_t at = row / LANES * groups_of(ins) + column / GROUP;
            const Values values = values_at(w, outs, ins, row, column);
            const Floats scale = four ? int4_scale(values) : int8_scale(values), inverse = inverse_of(scale);
            const Halves bits = __builtin_convertvector(to_half(scale), Halves);
            std::memcpy(scales + at * LANES, &bits, sizeof bits);
            Words quads[GROUP / 4] = {};  // four columns of each row
            for (int64_t c = 0; c < GROUP; ++c) {
                const Floats found = four ? number(values.columns[c], inverse, -8, 7) + 8.0f
                                          : number(values.columns[c], inverse, -127, 127);
                quads[c / 4] |= (reinterpret_cast<Words>(__builtin_convertvector(found, Ints)) & 255u) << (c % 4 * 8);
            }
            if (four) {
                for (int v = 0; v < 4; ++v) quads[v] |= quads[v + 4] << 4;
            }
            const size_t size = four ? sizeof quads / 2 : sizeof quads;
            std::memcpy(data + at * size, quads, size);
        }
    }
}

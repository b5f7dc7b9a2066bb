// Unrounded activations times the blocks of GGUF files, WIDTH weight rows at a time: the sums of `exact` in ggml.cpp, in
// the same order.
#pragma once

#include "unpack_k_x86.h"

#ifdef TIERLM_X86

#include <algorithm>

namespace {

// Keeps what is unpacked of a block.
template <class Stored>
struct Unpacked {
    Codes quads[GROUPS<Stored>][GROUP / 4];
    Factors<Stored> factors[GROUPS<Stored>];
    INLINED void quad(int64_t g, int64_t q, Codes codes) { quads[g][q] = codes; }
    INLINED void end(int64_t g, const Factors<Stored>& of_group) { factors[g] = of_group; }
};

// Column `c` of a group.
template <class Stored>
STEP Values value_of(const Unpacked<Stored>& block, int64_t g, int64_t c) {
    const Codes quad = block.quads[g][c / 4];
    const int32_t place = c % 4 * 8;
    const Sums number = SIGNED<Stored> ? reinterpret_cast<Sums>(quad << (24 - place)) >> 24
                                       : reinterpret_cast<Sums>(quad >> place & 255u) - BIAS<Stored>;
    const int64_t part = c * Stored::parts / GROUP;
    const Values value = __builtin_convertvector(number, Values) * block.factors[g].scales[part];
    return Stored::minima ? value - block.factors[g].minima[part] : value;
}

template <class Stored>
TARGET void exact(const Product& p, int64_t first, int64_t last) {
    constexpr int64_t SOME = 8;  // rows that share widened values
    const int64_t blocks = p.ins / Stored::columns, size = blocks * Stored::bytes;
    for (int64_t row = 0; row < p.rows; row += SOME) {
        const int64_t rows = std::min(SOME, p.rows - row);
        for (int64_t out = first; out < last; out += WIDTH) {
            Rows weights;  // lanes past the last row repeat it
            for (int64_t r = 0; r < WIDTH; ++r) weights.row[r] = p.w + std::min(out + r, last - 1) * size;
            Values totals[SOME][LANES] = {};  // of columns that are equal modulo LANES
            for (int64_t b = 0; b < blocks; ++b) {
                weights.block = b * Stored::bytes;
                Unpacked<Stored> block;
                unpack(Stored(), weights, block);
                for (int64_t g = 0; g < GROUPS<Stored>; ++g) {
                    const float* x = p.x + row * p.ins + b * Stored::columns + g * GROUP;
                    Values values[GROUP];
#pragma GCC unroll 32
                    for (int64_t c = 0; c < GROUP; ++c) values[c] = value_of(block, g, c);
                    for (int64_t r = 0; r < rows; ++r)
#pragma GCC unroll 32
                        for (int64_t c = 0; c < GROUP; ++c) totals[r][c % LANES] += values[c] * x[r * p.ins + c];
                }
            }
            const size_t count = std::min<int64_t>(WIDTH, last - out) * sizeof(float);
            for (int64_t r = 0; r < rows; ++r) {
                Values total = {};
                for (const Values& part : totals[r]) total += part;
                std::memcpy(p.y + (row + r) * p.stride + out - p.origin, &total, count);
            }
        }
    }
}

}  // namespace

#endif

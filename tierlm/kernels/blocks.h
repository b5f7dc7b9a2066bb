// The blocks of GGUF files (formats/ggml.py).
//
// A value is number * scale - minimum. Each GROUP of columns has one scale and at most one minimum, or `parts` of them,
// one after the other. A product with rounded activations adds up, group by group in order,
//
//     (dot of part 0 * its scale + dot of part 1 * its scale - sum of x in part 0 * its minimum - ...) * scale of x
//
// in float32. Dots are exact; each product and sum is rounded (no FMA). So all processors give the same bits.
#pragma once

#include "product.h"

template <int64_t COLUMNS, int64_t BYTES, int64_t PARTS = 1, bool MINIMA = false>
struct Blocks {
    static constexpr int64_t columns = COLUMNS, bytes = BYTES, parts = PARTS;
    static constexpr bool minima = MINIMA;
};

template <class Stored>
constexpr int64_t GROUPS = Stored::columns / GROUP;

struct Q8_0 : Blocks<32, 34> {};
struct Q4_0 : Blocks<32, 18> {};
struct Q4_1 : Blocks<32, 20, 1, true> {};
struct Q5_0 : Blocks<32, 22> {};
struct Q5_1 : Blocks<32, 24, 1, true> {};
struct Q2_K : Blocks<256, 84, 2, true> {};
struct Q3_K : Blocks<256, 110, 2> {};
struct Q4_K : Blocks<256, 144, 1, true> {};
struct Q5_K : Blocks<256, 176, 1, true> {};
struct Q6_K : Blocks<256, 210, 2> {};
struct IQ4_NL : Blocks<32, 18> {};
struct IQ4_XS : Blocks<256, 136> {};
struct MXFP4 : Blocks<32, 17> {};

// of(Stored) for each, in the order of formats/ggml.py.
#define EACH_BLOCKS(of)                                                                                 \
    of(Q8_0) of(Q4_0) of(Q4_1) of(Q5_0) of(Q5_1) of(Q2_K) of(Q3_K) of(Q4_K) of(Q5_K) of(Q6_K) of(IQ4_NL) \
    of(IQ4_XS) of(MXFP4)

// Numbers of four-bit codes: of IQ4_NL and IQ4_XS, and of MXFP4 times two.
constexpr int8_t CURVE[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
constexpr int8_t E2M1[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

// The sum of the numbers of `x` that belong to a part of a group.
template <class Stored>
INLINE int32_t sum_of(const Rounded& x, int64_t part) {
    return Stored::parts > 1 ? x.sums[part] : x.sum();
}

// x86 kernels for rounded activations in the same order, then for unrounded ones; null: not for this processor.
const Work* ggml_outputs_avx512();
const Work* ggml_outputs_avx2();

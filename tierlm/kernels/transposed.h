// The four-bit integers of AWQ and GPTQ, with columns first (formats/transposed.py).
//
// A product with rounded activations adds up, GROUP columns by GROUP columns in order,
//
//     (sum of numbers * x - zero * sum of x) * scale * scale of x
//
// in float32. Whole numbers are exact; each product and sum is rounded (no FMA). So all processors give the same bits.
#pragma once

#include "product.h"

// `columns` that share a scale. `down`: words of the data hold columns. `less`: added to words of zero points.
template <int64_t COLUMNS, bool DOWN, uint32_t LESS>
struct Transposed {
    static constexpr int64_t columns = COLUMNS;
    static constexpr bool down = DOWN;
    static constexpr uint32_t less = LESS;
};

using Awq32 = Transposed<32, false, 0>;
using Awq64 = Transposed<64, false, 0>;
using Awq128 = Transposed<128, false, 0>;
using Gptq32 = Transposed<32, true, 0x11111111>;
using Gptq64 = Transposed<64, true, 0x11111111>;
using Gptq128 = Transposed<128, true, 0x11111111>;
using GptqV2_32 = Transposed<32, true, 0>;
using GptqV2_64 = Transposed<64, true, 0>;
using GptqV2_128 = Transposed<128, true, 0>;

// of(Stored) for each, in the order of formats/transposed.py.
#define EACH_TRANSPOSED(of) \
    of(Awq32) of(Awq64) of(Awq128) of(Gptq32) of(Gptq64) of(Gptq128) of(GptqV2_32) of(GptqV2_64) of(GptqV2_128)

constexpr int64_t TILE = 64;  // weight rows that the x86 kernels take at once

// The fastest x86 kernels for rounded activations on this processor; `last - first` is a multiple of TILE. Null: use the
// portable ones.
const Work* transposed_outputs_x86();

// A product of activation rows with a weight in its stored format, and the kernels that compute it.
#pragma once

#include "vectors.h"

constexpr int64_t BLOCK = 128;  // rows and columns per scale in block-scaled float8
constexpr int64_t GROUP = 32;   // columns of a row per scale in int8 and int4, and of rounded activations

INLINE int64_t groups_of(int64_t ins) { return (ins + GROUP - 1) / GROUP; }

// GROUP activations of a row as scale * numbers (rounding.cpp).
struct Rounded {
    float scale;
    int16_t sums[2];  // of the numbers in each half
    float total;      // of all numbers
    int8_t numbers[GROUP];
    int32_t sum() const { return sums[0] + sums[1]; }
};
static_assert(sizeof(Rounded) == 44, "no padding");

struct Product {
    const float* x;          // [rows, ins]
    const Rounded* rounded;  // the same, [rows, groups_of(ins)], for formats that round
    const uint8_t* w;        // [outs, ins] as stored
    const void* scale;       // as stored: float [ceil(outs / BLOCK), ceil(ins / BLOCK)], tiles' float16, or null
    float* y;                // [rows, outs], rows `stride` floats apart
    int64_t rows, ins, outs, stride;
    int64_t origin = 0;      // first weight row in y
    const void* extra = nullptr;  // as stored: zero points, or one float
};

// Computes weight rows `first` to `last`. One thread sums each output over the columns in a fixed order, for any number
// of threads and rows: results depend only on the operands.
using Work = void (*)(const Product&, int64_t first, int64_t last);

struct Format {
    Work outputs;        // y = x @ w.T
    Work weighted_rows;  // y[r, :] = sum over weight rows n of x[r, n - first] * w[n, :]; x rows are `stride` apart
    Work widened;        // y = w as float32; y [outs, ins]
    bool rounds;         // whether `outputs` takes rounded activations
    int64_t least = GROUP;  // threads share multiples of this many weight rows
};

constexpr int FLOATS = 4, TILES = 4, GGML = 26, NIBBLES = 6, FLOAT8 = 5, TRANSPOSED = 18;
extern const Format FLOAT_FORMATS[FLOATS];  // float32, bfloat16, float16, block-scaled float8
extern const Format TILE_FORMATS[TILES];    // int8, int4, and both with unrounded activations
extern const Format GGML_FORMATS[GGML];     // those of blocks.h, and all with unrounded activations
extern const Format NIBBLE_FORMATS[NIBBLES];  // mxfp4, int4 in groups of 32, 64 and 128, and two nvfp4
extern const Format FLOAT8_FORMATS[FLOAT8];    // scales of blocks in bfloat16; of rows in float32, bfloat16; of all
extern const Format TRANSPOSED_FORMATS[TRANSPOSED];  // those of transposed.h, and all with unrounded activations

// The fastest x86 kernels for rounded activations times int8 and int4 on this processor; null: use the portable ones.
Work int8_outputs_avx2();
Work int4_outputs_avx2();
Work int8_outputs_avx512();
Work int4_outputs_avx512();

// `outputs` of FLOAT_FORMATS by AVX-512, with the bits of AVX2; null: this processor has none.
const Work* float_outputs_avx512();

// Rounds columns `first` to `last` of x [rows, ins]; `first` begins a group.
void round_activations(const float* x, Rounded* rounded, int64_t rows, int64_t ins, int64_t first, int64_t last);

// Quantises rows `first` to `last` of w [outs, ins] to tiles of int4 or int8; `first` is a multiple of 8.
void quantised(const float* w, uint8_t* data, uint16_t* scales, int64_t outs, int64_t ins, int64_t first, int64_t last,
               bool four);

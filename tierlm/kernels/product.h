// A product of a few rows of activations with a weight as it is stored, and who computes it.
#pragma once

#include "vectors.h"

constexpr int64_t BLOCK = 128;  // columns (and rows) that share one scale in block-scaled float8
constexpr int64_t GROUP = 32;   // columns of a row that share one scale in int8 and int4

INLINE int64_t groups_of(int64_t ins) { return (ins + GROUP - 1) / GROUP; }

// GROUP activations of a row as scale * numbers: see rounding.cpp.
struct Rounded {
    float scale;
    int32_t sum;  // of the numbers
    int8_t numbers[GROUP];
};
static_assert(sizeof(Rounded) == 40, "native.py makes room for it");

struct Product {
    const float* x;          // [rows, ins]
    const Rounded* rounded;  // the same [rows, groups_of(ins)], for the formats that want it
    const uint8_t* w;        // [outs, ins] as stored
    const void* scale;       // as stored: float [ceil(outs / BLOCK), ceil(ins / BLOCK)], tiles' float16, or null
    float* y;                // [rows, outs], rows `stride` floats apart
    int64_t rows, ins, outs, stride;
    int64_t origin = 0;      // the weight row that y begins with
};

// Of the weight rows `first` to `last`. Every output is computed by one thread, over the columns in one fixed order,
// whatever the number of threads, rows or neighbours: results depend on the operands alone.
using Work = void (*)(const Product&, int64_t first, int64_t last);

struct Format {
    Work outputs;        // y = x @ w.T
    Work weighted_rows;  // y[r, :] = sum over the weight rows n of x[r, n - first] * w[n, :]; x rows `stride` apart
    Work widened;        // y = w as float32; y [outs, ins]
    bool rounds;         // whether `outputs` takes its activations rounded
};

constexpr int FLOATS = 4, TILES = 4;
extern const Format FLOAT_FORMATS[FLOATS];  // float32, bfloat16, float16, block-scaled float8
extern const Format TILE_FORMATS[TILES];    // int8, int4, and the same with activations as they are

// The fastest products of rounded activations with int8 and int4 on this processor, or null where none is better than
// what the compiler makes of the plain ones.
Work int8_outputs_x86();
Work int4_outputs_x86();

// Rows of x [rows, ins] to rounded; of the groups of columns `first` to `last`.
void round_activations(const float* x, Rounded* rounded, int64_t rows, int64_t ins, int64_t first, int64_t last);

// Rows `first` to `last` of w [outs, ins] to tiles of int4 or int8; `first` is a multiple of 8.
void quantised(const float* w, uint8_t* data, uint16_t* scales, int64_t outs, int64_t ins, int64_t first, int64_t last,
               bool four);

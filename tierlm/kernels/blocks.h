// The blocks of GGUF files (formats/ggml.py) that have kernels.
//
// A value is number * scale - minimum. Each GROUP of columns has one scale, or `parts` of them, and at most one
// minimum. A product with rounded activations adds up, group by group in order,
//
//     (dot of part 0 * scale of part 0 + dot of part 1 * scale of part 1 - sum of x * minimum) * scale of x
//
// in float32. Dots are exact; each product and sum is rounded (no FMA). So all processors give the same bits.
#pragma once

#include "product.h"

struct Q8_0 {
    static constexpr int64_t columns = 32, bytes = 34, parts = 1;
    static constexpr bool minima = false;
};

struct Q4_0 {
    static constexpr int64_t columns = 32, bytes = 18, parts = 1;
    static constexpr bool minima = false;
};

struct Q4_1 {
    static constexpr int64_t columns = 32, bytes = 20, parts = 1;
    static constexpr bool minima = true;
};

struct Q5_0 {
    static constexpr int64_t columns = 32, bytes = 22, parts = 1;
    static constexpr bool minima = false;
};

struct Q4_K {
    static constexpr int64_t columns = 256, bytes = 144, parts = 1;
    static constexpr bool minima = true;
};

struct Q5_K {
    static constexpr int64_t columns = 256, bytes = 176, parts = 1;
    static constexpr bool minima = true;
};

struct Q6_K {
    static constexpr int64_t columns = 256, bytes = 210, parts = 2;
    static constexpr bool minima = false;
};

struct Mxfp4 {
    static constexpr int64_t columns = 32, bytes = 17, parts = 1;
    static constexpr bool minima = false;
};

constexpr int8_t E2M1[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};  // times two

// The fastest x86 kernels for rounded activations on this processor, in the order of GGML_FORMATS; null: use the
// portable ones.
const Work* ggml_outputs_x86();

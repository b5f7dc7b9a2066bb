// Parts of attention that run in one parallel region.
#pragma once

#include <cstring>

#include "activations.h"
#include "team.h"

// Activations, float32 and rounded, as operands of products.
class Input {
   public:
    Input(int64_t rows, int64_t ins)
        : ins_(ins), values_(room<float>(rows * ins)), rounded_(room<Rounded>(rows * groups_of(ins))) {}
    float* row(int64_t row) { return values_.get() + row * ins_; }
    void round(int64_t row) {
        round_activations(this->row(row), rounded_.get() + row * groups_of(ins_), 1, ins_, 0, ins_);
    }
    Job times(const Matrix& matrix, float* y, int64_t rows) {
        return {&matrix, matrix.times(values_.get(), rounded_.get(), y, rows)};
    }

   private:
    int64_t ins_;
    std::unique_ptr<float[]> values_;
    std::unique_ptr<Rounded[]> rounded_;
};

// Rounds half to even; NaN stays NaN.
inline uint16_t to_bfloat16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    if (x != x) return static_cast<uint16_t>(bits >> 16 | 0x40u);
    return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// Writes `count` values to a cache whose values have `item` bytes: float32 or bfloat16.
inline void append(const float* values, uint8_t* cache, int64_t count, int64_t item) {
    if (item == 4) {
        std::memcpy(cache, values, count * item);
        return;
    }
    for (int64_t i = 0; i < count; ++i) {
        const uint16_t half = to_bfloat16(values[i]);
        std::memcpy(cache + 2 * i, &half, 2);
    }
}

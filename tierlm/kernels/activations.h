// Operations on float32 activations between products.
#pragma once

#include <cstdint>

// gate = silu(gate) * up, for `count` values.
void gated(float* gate, const float* up, int64_t count);

// y = weight * x / root mean square of x, for `count` values.
void normalised(const float* x, const float* weight, float* y, int64_t count, float eps);

// The largest of `count` values; NaN counts as smallest.
float largest(const float* x, int64_t count);

// x = e^(scale * (x - peak)), for `count` values. Returns their sum.
float exponentials(float* x, int64_t count, float peak, float scale);

// x = softmax(scale * x), for `count` values; `scale` is positive.
void softmax(float* x, int64_t count, float scale);

// Rotates the pairs of x, which are neighbours or `half` apart. y holds all first elements, then all second elements.
void rotated(const float* x, const float* cosine, const float* sine, float* y, int64_t half, bool interleaved);

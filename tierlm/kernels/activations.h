// What is done to activations between the products, in float32: see activations.cpp.
#pragma once

#include <cstdint>

// gate = silu(gate) * up, of `count` values.
void gated(float* gate, const float* up, int64_t count);

// y = weight * x / root mean square of x, of `count` values.
void normalised(const float* x, const float* weight, float* y, int64_t count, float eps);

// x = softmax(scale * x), of `count` values, `scale` above 0.
void softmax(float* x, int64_t count, float scale);

// Pairs of x, which are neighbours or `half` apart, rotated; y has the first halves of all pairs, then the second.
void rotated(const float* x, const float* cosine, const float* sine, float* y, int64_t half, bool interleaved);

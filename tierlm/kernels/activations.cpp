// Operations on float32 activations between products.

#include <algorithm>
#include <cmath>
#include <cstring>

#include "activations.h"
#include "exponential.h"

namespace {

// The vector at index `i` of `count` values, padded with `rest`.
INLINE Floats vector_of(const float* x, int64_t i, int64_t count, float rest) {
    if (count - i >= LANES) return *reinterpret_cast<const Floats*>(x + i);
    Floats found = Floats{} + rest;
    std::memcpy(&found, x + i, (count - i) * sizeof(float));
    return found;
}

INLINE void store(float* y, int64_t i, int64_t count, Floats value) {
    if (count - i >= LANES) {
        *reinterpret_cast<Floats*>(y + i) = value;
    } else {
        std::memcpy(y + i, &value, (count - i) * sizeof(float));
    }
}

}  // namespace

CLONES void gated(float* gate, const float* up, int64_t count) {
    for (int64_t i = 0; i < count; i += LANES) {
        const Floats g = vector_of(gate, i, count, 0), u = vector_of(up, i, count, 0);
        store(gate, i, count, g / (1.0f + exponential(-g)) * u);
    }
}

CLONES void normalised(const float* x, const float* weight, float* y, int64_t count, float eps) {
    Floats squares = {};
    for (int64_t i = 0; i < count; i += LANES) {
        const Floats v = vector_of(x, i, count, 0);
        squares += v * v;
    }
    float sum = 0;
    for (int lane = 0; lane < LANES; ++lane) sum += squares[lane];
    const float factor = 1.0f / std::sqrt(sum / static_cast<float>(count) + eps);
    for (int64_t i = 0; i < count; i += LANES)
        store(y, i, count, vector_of(x, i, count, 0) * factor * vector_of(weight, i, count, 0));
}

CLONES float largest(const float* x, int64_t count) {
    Floats most = Floats{} - INFINITY;
    for (int64_t i = 0; i < count; i += LANES) {
        const Floats v = vector_of(x, i, count, -INFINITY);
        most = v > most ? v : most;
    }
    float found = most[0];
    for (int lane = 1; lane < LANES; ++lane) found = std::max(found, most[lane]);
    return found;
}

CLONES float exponentials(float* x, int64_t count, float peak, float scale) {
    Floats sums = {};
    for (int64_t i = 0; i < count; i += LANES) {
        const Floats e = exponential((vector_of(x, i, count, peak) - peak) * scale);
        sums += vector_of(reinterpret_cast<const float*>(&e), 0, count - i, 0);
        store(x, i, count, e);
    }
    float sum = 0;
    for (int lane = 0; lane < LANES; ++lane) sum += sums[lane];
    return sum;
}

CLONES void softmax(float* x, int64_t count, float scale) {
    const float sum = exponentials(x, count, largest(x, count), scale);
    for (int64_t i = 0; i < count; i += LANES) store(x, i, count, vector_of(x, i, count, 0) / sum);
}

CLONES void rotated(const float* x, const float* cosine, const float* sine, float* y, int64_t half, bool interleaved) {
    const int64_t next = interleaved ? 2 : 1, second = interleaved ? 1 : half;
    for (int64_t i = 0; i < half; ++i) {
        const float a = x[i * next], b = x[i * next + second];
        y[i] = a * cosine[i] - b * sine[i];
        y[half + i] = b * cosine[i] + a * sine[i];
    }
}

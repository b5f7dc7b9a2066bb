// SwiGLU's activation.

#include <algorithm>
#include <cstring>

#include "product.h"

namespace {

// e^x by 2^n e^r, |r| <= ln(2) / 2, with a polynomial for e^r (Cephes, expf.c): within 2 units in the last place.
INLINE Floats exponential(Floats x) {
    const Floats low = Floats{} - 87.0f, high = Floats{} + 88.0f;
    x = x < low ? low : x > high ? high : x;
    const Ints n = __builtin_convertvector(x * 1.44269504f + (x < 0.0f ? Floats{} - 0.5f : Floats{} + 0.5f), Ints);
    const Floats whole = __builtin_convertvector(n, Floats);
    const Floats r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    Floats p = 1.9875691500e-4f * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    return (p * r * r + r + 1.0f) * reinterpret_cast<Floats>((n + 127) << 23);
}

}  // namespace

CLONES void gated(float* gate, const float* up, int64_t count) {
    for (int64_t i = 0; i < count; i += LANES) {
        Floats g = {}, u = {};
        const size_t size = std::min<int64_t>(LANES, count - i) * sizeof(float);
        std::memcpy(&g, gate + i, size);
        std::memcpy(&u, up + i, size);
        g = g / (1.0f + exponential(-g)) * u;
        std::memcpy(gate + i, &g, size);
    }
}
